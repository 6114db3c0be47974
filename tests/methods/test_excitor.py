"""Excitor against the paper's equations with both score matrices formed, in float64: values and every gradient."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

import fastpeft as fp
from fastpeft.cost.profile import measure

SHAPE = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 50}


def build(kv_heads=4, method=None, visual_dim=None, **more):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | more, num_key_value_heads=kv_heads, initializer_range=0.2)).double()
    fp.optimize(model)
    for layer in model.model.layers:
        layer.self_attn.visual_dim = visual_dim
    fp.adapt(model, llm=method or fp.Excitor(layers=2, num_prompts=5, r=3, gate_std=0.5))
    for name, p in model.named_parameters():
        if "excitor" in name and name.endswith("up"):
            torch.nn.init.normal_(p, std=0.5)
    return model.train()


def literal_attention(attention, x, tables, visual, index):
    """Equations 1-9 for x [B, M, C], one sample after the other."""
    heads, d, block = attention.config.num_attention_heads, attention.head_dim, getattr(attention, "excitor", None)
    split = lambda t: t.unflatten(-1, (-1, d)).transpose(1, 2)  # noqa: E731
    q, k, v = (split(linear(x)) for linear in (attention.q_proj, attention.k_proj, attention.v_proj))
    q, k = apply_rotary_pos_emb(q, k, *tables)
    k, v = (repeat_kv(t, attention.num_key_value_groups) for t in (k, v))
    scores = q @ k.mT / math.sqrt(d)
    if block is not None:
        extra = []
        for b in range(len(x)):
            keys = values = block.prompt
            if visual is not None and index[b] >= 0:
                image = visual[index[b]]
                keys = torch.cat([keys, image @ block.wk_down.T @ block.wk_up.T])
                values = torch.cat([values, image @ block.wv_down.T @ block.wv_up.T])
            width = x.shape[-1] if block.scale == x.shape[-1] ** -0.5 else d
            s_excitor = (x[b] @ block.w_down.T @ block.w_up.T) @ keys.T / math.sqrt(width)
            extra.append(s_excitor.softmax(-1) @ values)
        key_extra = split(torch.stack(extra))
        if block.rotary:
            key_extra = apply_rotary_pos_emb(key_extra, key_extra, *tables)[0]
        scores = scores + block.gate.view(1, -1, 1, 1) * (q @ key_extra.mT / math.sqrt(d))
    causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    return attention.o_proj((scores.masked_fill(~causal, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)), heads


def literal_loss(model, samples, visual=None, index=None):
    """Mean over labelled tokens, each sample alone: no padding anywhere."""
    total, count = 0.0, 0
    norm = lambda h, n: n.weight * h * torch.rsqrt(h.square().mean(-1, keepdim=True) + n.variance_epsilon)  # noqa: E731
    for b, (ids, labels) in enumerate(samples):
        h = model.model.embed_tokens(ids)[None]
        cos, sin = (t.double() for t in model.model.rotary_emb(h, torch.arange(len(ids))[None]))
        for layer in model.model.layers:
            of = None if index is None else index[b : b + 1]
            h = h + literal_attention(layer.self_attn, norm(h, layer.input_layernorm), (cos, sin), visual, of)[0]
            y, mlp = norm(h, layer.post_attention_layernorm), layer.mlp
            h = h + mlp.down_proj(torch.nn.functional.silu(mlp.gate_proj(y)) * mlp.up_proj(y))
        logits = model.lm_head(norm(h, model.model.norm))[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
        count += int((labels[1:] != -100).sum())
    return total / count


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None} | {"loss": loss.detach()}


def assert_same(mine, theirs):
    assert mine.keys() == theirs.keys() and len(mine) > 4
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture
def samples():
    torch.manual_seed(2)
    out = []
    for length in (7, 3, 5):
        ids = torch.randint(3, 50, (length,))
        out.append((ids, torch.where(torch.arange(length) < 2, -100, ids)))
    return out


def padded(samples):
    pad, most = torch.nn.functional.pad, max(len(ids) for ids, _ in samples)
    rows = [
        (pad(i, (0, most - len(i))), pad(torch.ones_like(i), (0, most - len(i))), pad(y, (0, most - len(i)), value=-100))
        for i, y in samples
    ]
    return dict(zip(("input_ids", "attention_mask", "labels"), map(torch.stack, zip(*rows))))


def packed(samples):
    ids, labels = (torch.cat([s[i] for s in samples])[None] for i in (0, 1))
    return {"input_ids": ids, "labels": labels, "position_ids": torch.cat([torch.arange(len(s[0])) for s in samples])[None]}


METHODS = {
    "as published": fp.Excitor(layers=2, num_prompts=5, r=3, gate_std=0.5),
    "one gate a layer": fp.Excitor(layers=1, num_prompts=4, r=2, gate="layer", gate_std=0.5),
    "scaled by head": fp.Excitor(layers=2, num_prompts=4, r=2, gate_std=0.5, excitor_scale="head"),
    "rotated": fp.Excitor(layers=2, num_prompts=4, r=2, gate_std=0.5, rotary=True),
}


@pytest.mark.parametrize("form", [padded, packed])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("kind", METHODS)
def test_text(samples, kind, kv_heads, form):
    model = build(kv_heads, METHODS[kind])
    assert_same(gradients(model, model(**form(samples)).loss), gradients(model, literal_loss(model, samples)))


@pytest.mark.parametrize("form", [padded, packed])
@pytest.mark.parametrize("index", [[0, 1, 0], [1, -1, 0], [-1, -1, -1], [-1, 0, -1]])
def test_images(samples, index, form):
    model, index = build(visual_dim=6), torch.tensor(index)
    visual = torch.randn(2, 9, 6, dtype=torch.float64)
    want = gradients(model, literal_loss(model, samples, visual, index))
    assert_same(gradients(model, model(**form(samples), visual=visual, visual_index=index).loss), want)
    own = visual[index.clamp(min=0)]
    assert_same(gradients(model, model(**form(samples), visual=own, visual_seen=index >= 0).loss), want)


def test_with_lora(samples):
    model = fp.optimize(build()) and build()
    fp.plan.detach(model)
    fp.adapt(model, "Excitor+LoRA")
    kinds = {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert {"gate", "prompt", "w_down", "w_up", "lora_A", "lora_B"} == kinds
    assert gradients(model, model(**padded(samples)).loss).keys() > {"loss"}


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True, "top_p": 0.75, "temperature": 0.7}])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_cached_generation_equals_uncached(samples, how, kv_heads):
    """The cache holds merged keys; left padding is masked."""
    model, most = build(kv_heads, visual_dim=6).eval(), 7
    fill = [(most - len(ids), 0) for ids, _ in samples]
    ids = torch.stack([torch.nn.functional.pad(ids, f) for (ids, _), f in zip(samples, fill)])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(ids), f) for (ids, _), f in zip(samples, fill)])
    seen = {"visual": torch.randn(3, 9, 6, dtype=torch.float64), "visual_seen": torch.tensor([True, False, True])}
    answers = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        options = {"max_new_tokens": 7, "pad_token_id": 0, "eos_token_id": None, "use_cache": use_cache} | how
        answers.append(model.generate(ids, attention_mask=mask, **seen, **options))
    assert torch.equal(*answers)
    if how == {}:
        alone = model.generate(samples[0][0][None], visual=seen["visual"][:1], max_new_tokens=7, pad_token_id=0, eos_token_id=None)
        assert torch.equal(alone[0, 7:], answers[0][0, 7:])


@pytest.mark.parametrize(
    "model, plan, trained", [("llama-7b", "Excitor", 7_618_560 + 960), ("llama-13b", "Excitor", 30 * (5120 * 62 + 40))]
)
def test_counts(model, plan, trained):
    assert fp.count(fp.adapt(fp.build(model, device="meta"), plan))["trainable"] == trained


def test_layers_from_the_top():
    model = fp.adapt(fp.build("llama-tiny"), "Excitor")
    assert [hasattr(layer.self_attn, "excitor") for layer in model.model.layers] == [False, False, True, True]


def test_saved_bytes():
    """Under 1% more than the frozen model that its gradient passes through."""

    def saved(plan):
        options = {"hidden_size": 1024, "intermediate_size": 2752, "num_attention_heads": 8, "num_hidden_layers": 3, "pretrained": False}
        model = fp.adapt(fp.build("llama-tiny", **options), plan).train()
        embeds = torch.randn(1, 256, 1024, requires_grad=True)
        with measure(model) as cost:
            model(inputs_embeds=embeds, labels=torch.full((1, 256), 3)).loss.backward()
        return cost.saved_bytes

    assert saved("Excitor") <= 1.01 * saved("F")


def test_flops_against_the_literal_block():
    torch.manual_seed(0)
    H, d, M, K, r = 8, 128, 512, 30, 16
    C = H * d
    k, hidden = (torch.randn(s, requires_grad=True) for s in ((1, H, M, d), (1, M, C)))
    params = [torch.randn(s, requires_grad=True) for s in ((r, C), (C, r), (K, C), (H,))]
    with FlopCounterMode(display=False) as ours:
        fp.ops.excitor_keys(k, hidden, *params).sum().backward()
    w_down, w_up, prompt, gate = params
    q = torch.randn(1, H, M, d, requires_grad=True)
    with FlopCounterMode(display=False) as theirs:
        s = (hidden @ w_down.T @ w_up.T @ prompt.T / C**0.5).softmax(-1)
        extra = (s @ prompt).view(1, M, H, d).transpose(1, 2)
        (gate.view(1, H, 1, 1) * (q @ extra.mT)).sum().backward()
    assert 10 * ours.get_total_flops() < theirs.get_total_flops()


def test_adapter_round_trip_detach_and_merge(samples, tmp_path):
    model = build()
    want, plain = model(**padded(samples)).loss, None
    fp.save_adapter(model, tmp_path)
    other = build(method="F")
    plain = other(**padded(samples)).loss
    fp.plan.detach(other)
    fp.load_adapter(other, tmp_path)
    assert torch.equal(other.train()(**padded(samples)).loss, want)
    with pytest.raises(ValueError, match="no weight can take in Excitor of llm"):
        fp.merge(model)
    assert fp.restore(model)
    fp.optimize(model)
    fp.plan.detach(model)
    assert torch.equal(model.train()(**padded(samples)).loss, plain)


def test_on_a_transformers_model(samples):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).double()
    fp.adapt(model, "Excitor")
    assert model(**padded(samples)).loss.requires_grad


@pytest.mark.parametrize(
    "bad, message", [({"layers": 0}, "layers must be a positive"), ({"gate": "token"}, "gate must be one of head, layer")]
)
def test_bad_options(bad, message):
    with pytest.raises(ValueError, match=message):
        fp.Excitor(**bad)
