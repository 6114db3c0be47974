"""Excitor's similarities by layer against equations 2-7, each sample alone, in float64."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import fastpeft as fp
from fastpeft.data import CausalDataset, Instruction, Preprocess, train_causal_tokenizer
from fastpeft.evaluate.similarity import excitor_similarity

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ["one", "one two three", "three two one zero"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_causal_tokenizer(TEXTS, min_frequency=1)


def data(tokenizer, image=None):
    images = [image, None, image]
    samples = [Instruction(((text, "no"),), images[i], "llava", str(i), i, Path("d")) for i, text in enumerate(TEXTS)]
    preprocess = None if image is None else Preprocess(32, mean=(0.5,) * 3, std=(0.5,) * 3)
    return CausalDataset(samples, tokenizer, "plain", prompts_only=True, preprocess=preprocess)


def adapted(name, plan, **shape):
    torch.manual_seed(0)
    model = fp.adapt(fp.build(name, dtype=torch.float64, **shape), plan)
    for key, p in model.named_parameters():
        if "excitor" in key:
            p.data += 0.3 * torch.randn_like(p)
    return model.train()


def by_hand(model, llm, ids, seen):
    """Sums of |S|, |g S_extra| and the change, with their numbers, of one text."""
    more = {} if seen is None else {"image_embeds": seen}
    states = model(input_ids=ids[None], output_hidden_states=True, use_cache=False, **more).hidden_states
    found = {}
    for layer, hidden in zip(llm.model.layers, states):
        attention, block = layer.self_attn, getattr(layer.self_attn, "excitor", None)
        if block is None:
            continue
        x = layer.input_layernorm(hidden)
        heads = lambda t: t.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # noqa: B023, E731
        q, k = heads(attention.q_proj(x)), heads(attention.k_proj(x))
        tables = llm.model.rotary_emb(x, torch.arange(len(ids))[None])
        q, k = apply_rotary_pos_emb(q, k, *(t.double() for t in tables))
        k = k.repeat_interleave(attention.num_key_value_groups, 1)
        keys = values = block.prompt
        if seen is not None:
            keys = torch.cat([keys, seen[0] @ block.wk_down.T @ block.wk_up.T])
            values = torch.cat([values, seen[0] @ block.wv_down.T @ block.wv_up.T])
        extra = (x @ block.w_down.T @ block.w_up.T @ keys.T * block.scale).softmax(-1) @ values
        base = q @ k.mT / attention.head_dim**0.5
        added = block.gate[:, None, None] * (q @ heads(extra).mT) / attention.head_dim**0.5
        allowed = torch.ones(len(ids), len(ids), dtype=torch.bool).tril().expand_as(base)
        a, b = (t.masked_fill(~allowed, -torch.inf).softmax(-1) for t in (base, base + added))
        change = (a - b).abs().sum(-1) / 2
        terms = (base.abs()[allowed], added.abs()[allowed], change)
        found[attention.layer_idx] = torch.stack([torch.tensor([float(t.sum()), t.numel()], dtype=torch.float64) for t in terms])
    return found


@pytest.mark.parametrize("kind", ["text", "groups", "image"])
def test_similarity(tokenizer, tmp_path, kind):
    image = None
    if kind == "image":
        image = tmp_path / "a.png"
        Image.effect_noise((32, 32), 90).convert("RGB").save(image)
    shape = {"num_key_value_heads": 2} if kind == "groups" else {}
    model = adapted("excitor-tiny", "F/Excitor(layers=[1,3])") if image else adapted("llama-tiny", "Excitor(layers=[1, 3])", **shape)
    dataset = data(tokenizer, image)
    got = excitor_similarity(model, dataset, batch_size=2)
    assert model.training and list(got) == [1, 3]
    model.eval()
    total = {}
    with torch.no_grad():
        for item in (dataset[i] for i in range(3)):
            seen = model.encode_images(item["pixel_values"][None].double()) if "pixel_values" in item else None
            for layer, sums in by_hand(model, getattr(model, "llm", model), item["input_ids"], seen).items():
                total[layer] = total.get(layer, 0) + sums
    for layer, sums in total.items():
        want = dict(zip(("base", "extra", "change"), (sums[:, 0] / sums[:, 1]).tolist()))
        assert got[layer] == pytest.approx(want, rel=1e-6), layer
        assert 0 < got[layer]["change"] < 1 and got[layer]["extra"] > 0
    one = excitor_similarity(model, dataset, samples=1)
    assert one[1] != got[1] and excitor_similarity(fp.build("llama-tiny"), data(tokenizer)) == {}
