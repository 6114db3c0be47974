"""LLaMA's original layout against its forward pass with interleaved rotary embedding, written out in float64."""

import json
import math

import pytest
import torch
from transformers import LlamaForCausalLM

from fastpeft.convert.formats import convert

DIM, HEADS, GROUPS, LAYERS, FFN, VOCAB, EPS, THETA = 32, 4, 2, 2, 48, 50, 1e-5, 500.0
SPLIT = {"tok_embeddings": 1, "output": 0, "wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "wo": 1, "w2": 1}


def official():
    torch.manual_seed(0)
    new = lambda *shape: torch.randn(*shape, dtype=torch.float64) / 4  # noqa: E731
    state = {"tok_embeddings.weight": new(VOCAB, DIM), "norm.weight": new(DIM) + 1, "output.weight": new(VOCAB, DIM)}
    kv = DIM * GROUPS // HEADS
    for i in range(LAYERS):
        for name, shape in (("wq", (DIM, DIM)), ("wk", (kv, DIM)), ("wv", (kv, DIM)), ("wo", (DIM, DIM))):
            state[f"layers.{i}.attention.{name}.weight"] = new(*shape)
        for name, shape in (("w1", (FFN, DIM)), ("w2", (DIM, FFN)), ("w3", (FFN, DIM))):
            state[f"layers.{i}.feed_forward.{name}.weight"] = new(*shape)
        for name in ("attention_norm", "ffn_norm"):
            state[f"layers.{i}.{name}.weight"] = new(DIM) + 1
    return state


def write(folder, state, shards=1):
    folder.mkdir(exist_ok=True)
    params = {
        "dim": DIM,
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "n_kv_heads": GROUPS,
        "norm_eps": EPS,
        "rope_theta": THETA,
        "vocab_size": -1,
    }
    (folder / "params.json").write_text(json.dumps(params))
    for i in range(shards):
        part = {n: t.chunk(shards, SPLIT[n.split(".")[-2]])[i].clone() if n.split(".")[-2] in SPLIT else t for n, t in state.items()}
        torch.save(part | {"rope.freqs": torch.ones(4)}, folder / f"consolidated.{i:02d}.pth")
    return folder


def turned(x):
    """[L, H, d]: each pair (2i, 2i + 1) turned by position * theta^(-2i / d)."""
    length, _, d = x.shape
    angle = torch.arange(length, dtype=torch.float64)[:, None, None] * THETA ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).flatten(-2)


def literal(w, ids):
    norm = lambda x, name: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * w[f"{name}.weight"]  # noqa: E731
    h = w["tok_embeddings.weight"][ids]
    hidden = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
    for i in range(LAYERS):
        p, x = f"layers.{i}.", norm(h, f"layers.{i}.attention_norm")
        q, k, v = ((x @ w[f"{p}attention.{n}.weight"].T).unflatten(-1, (-1, DIM // HEADS)) for n in ("wq", "wk", "wv"))
        q, k, v = turned(q), turned(k).repeat_interleave(HEADS // GROUPS, 1), v.repeat_interleave(HEADS // GROUPS, 1)
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(DIM // HEADS)
        context = torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
        h = h + context.flatten(1) @ w[f"{p}attention.wo.weight"].T
        x = norm(h, f"{p}ffn_norm")
        w1, w2, w3 = (w[f"{p}feed_forward.{n}.weight"] for n in ("w1", "w2", "w3"))
        h = h + (torch.nn.functional.silu(x @ w1.T) * (x @ w3.T)) @ w2.T
    return norm(h, "norm") @ w["output.weight"].T


@pytest.mark.parametrize("shards", [1, 2])
def test_logits(tmp_path, shards):
    state, ids = official(), torch.randint(VOCAB, (9,))
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    report = convert(write(tmp_path / "llama", state, shards), tmp_path / "hf")
    assert report.n_tensors == len(state) and (tmp_path / "hf/tokenizer.model").read_bytes() == b"pieces"
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64)
    # transformers' rotary angles are float32
    torch.testing.assert_close(model(ids[None]).logits[0], literal(state, ids), rtol=1e-4, atol=1e-5)


def test_what_cannot_be(tmp_path):
    state, name = official(), "layers.1.attention.wq.weight"
    cases = [
        ({n: t for n, t in state.items() if n != name}, f"missing {name}"),
        (state | {"x.weight": torch.ones(1)}, r"unexpected x\.weight"),
    ]
    for bad, message in [*cases, (state | {name: torch.ones(3, DIM)}, f"misshapen.*{name}")]:
        with pytest.raises(ValueError, match=message):
            convert(write(tmp_path / "llama", bad), tmp_path / "hf")
    write(tmp_path / "two", state, 2)
    (tmp_path / "two/consolidated.00.pth").unlink()
    with pytest.raises(ValueError, match=r"consolidated\.00\.pth is missing"):
        convert(tmp_path / "two", tmp_path / "hf")
    (tmp_path / "two/params.json").write_text("{}")
    with pytest.raises(ValueError, match=r"missing|dim must be"):
        convert(tmp_path / "two", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
