"""LaVIN against its equations written out in float64: the modality token in the text, masked after itself, each sample alone."""

import math

import pytest
import torch
from lavin_batches import PLAN, build, images_of, lavin_pixels, lavin_samples, packed, padded, randomise  # noqa: F401 - fixtures
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

import fastpeft as fp

BLOCK = "MMAdapter(position=block)/T/MMAdapter(position=block)"
PLAIN_BLOCK = "RepAdapter(position=block)/T/RepAdapter(position=block)"


def expand(a, up, bias):
    """A grouped 1 x 1 convolution: a [..., h], up [C, h / g]."""
    groups = a.shape[-1] // up.shape[1]
    per = up.shape[0] // groups
    pieces = [a[..., g * up.shape[1] : (g + 1) * up.shape[1]] @ up[g * per : (g + 1) * per].T for g in range(groups)]
    return torch.cat(pieces, -1) + bias


def adapter(block, x, weights):
    a = x @ block.w_down.T + block.b_down
    mixed = sum(weights[..., e : e + 1] * expand(a, block.w_up[e], block.b_up[e]) for e in range(len(block.w_up)))
    return x + block.scale * mixed


def router(block, x):
    if len(block.w_up) == 1:
        return torch.ones(*x.shape[:-1], 1, dtype=x.dtype)
    return ((x @ block.router_weight.T + block.router_bias) / block.temperature).softmax(-1)


def layer_norm(x, norm):
    return torch.nn.functional.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def literal_image(model, pixels):
    """[cls] tokens of one image [1, N, C]: every token of CLIP routed by its own features."""
    tower, seen = model.vision, []
    h = tower.pre_layrnorm(tower.embeddings(pixels[None]))
    for number, layer in enumerate(tower.encoder.layers, 1):
        x = layer_norm(h, layer.layer_norm1)
        if hasattr(layer, "mm_adapter"):
            x = adapter(layer.mm_adapter, x, router(layer.mm_adapter, x))
        split = lambda t: t.unflatten(-1, (layer.self_attn.num_heads, -1)).transpose(1, 2)  # noqa: B023, E731
        q, k, v = (split(linear(x)) for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj))
        context = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        h = h + layer.self_attn.out_proj(context.transpose(1, 2).flatten(2))
        x = layer_norm(h, layer.layer_norm2)
        if hasattr(layer, "mm_adapter_mlp"):
            x = adapter(layer.mm_adapter_mlp, x, router(layer.mm_adapter_mlp, x))
        y = layer.mlp.fc1(x)
        h = h + layer.mlp.fc2(y * torch.sigmoid(1.702 * y))
        if number % model.config.cls_every == 0:
            seen.append(h[:, 0])
    return torch.stack(seen, 1)


def literal_logits(model, ids, places, pixels):
    """Logits [L, vocabulary] of one sample, with t_m at position 0 of the text."""
    llm, neck = model.llm, model.neck
    text = llm.model.embed_tokens(ids)
    if pixels is not None:
        images = neck.up(torch.nn.functional.silu(neck.down(literal_image(model, pixels))))[0]
        text = text.masked_scatter(places[:, None], images)
    h = torch.cat([neck.modality.weight[0 if pixels is None else 1][None], text])[None]
    L = h.shape[1]
    mask = torch.ones(L, L, dtype=torch.bool).tril()
    mask[1:, 0] = False
    tables = tuple(t.double() for t in llm.model.rotary_emb(h, torch.arange(L)[None]))
    norm = lambda h, n: n.weight * h * torch.rsqrt(h.square().mean(-1, keepdim=True) + n.variance_epsilon)  # noqa: E731
    for layer in llm.model.layers:
        x, attention, block = norm(h, layer.input_layernorm), layer.self_attn, getattr(layer, "mm_adapter", None)
        if block is not None:
            x = adapter(block, x, router(block, x[:, :1]))
        split = lambda t: t.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # noqa: B023, E731
        q, k, v = (split(linear(x)) for linear in (attention.q_proj, attention.k_proj, attention.v_proj))
        q, k = apply_rotary_pos_emb(q, k, *tables)
        k, v = (repeat_kv(t, attention.num_key_value_groups) for t in (k, v))
        scores = (q @ k.mT / math.sqrt(attention.head_dim)).masked_fill(~mask, -torch.inf)
        h = h + attention.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        y, mlp, block = norm(h, layer.post_attention_layernorm), layer.mlp, getattr(layer, "mm_adapter_mlp", None)
        if block is not None:  # t_m after the attention of its layer
            y = adapter(block, y, router(block, y[:, :1]))
        h = h + mlp.down_proj(torch.nn.functional.silu(mlp.gate_proj(y)) * mlp.up_proj(y))
    return llm.lm_head(norm(h, llm.model.norm))[0, 1:]


def literal_loss(model, samples, pixels):
    total, count = 0.0, 0
    for ids, places, labels, image in samples:
        logits = literal_logits(model, ids, places, None if image is None else pixels[image])
        total = total + torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum")
        count += int((labels[1:] != -100).sum())
    return total / count


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None} | {"loss": loss.detach()}


@pytest.mark.parametrize("form", [padded, packed])
@pytest.mark.parametrize("plan", [PLAN, "MMAdapter/T/RepAdapter", "F/T/MMAdapter", "RepAdapter/F/MMAdapter", BLOCK, PLAIN_BLOCK])
def test_loss_and_gradients(samples, pixels, plan, form):
    model, batch = build(plan), form(samples, pixels)
    want, got = gradients(model, literal_loss(model, samples, pixels)), gradients(model, model(**batch).loss)
    # the literal text begins at position 1, after t_m, ours at 0: the same distances, from float32 angles rounded otherwise
    batch["position_ids"] = batch.get("position_ids", torch.arange(batch["input_ids"].shape[1]).expand(batch["input_ids"].shape)) + 1
    same = gradients(model, model(**batch).loss)
    assert got.keys() == want.keys() == same.keys() and len(got) > 5
    for name in want:
        scale = float(want[name].abs().max())
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=3e-5 * scale, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(same[name], want[name], rtol=1e-9, atol=1e-11 * scale, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("plan", ["MMAdapter/T/MMAdapter+LoRA", "F/T/MMAdapter+PTv2", "MMAdapter/T/LoRA"])
def test_combinations(samples, pixels, plan):
    """A batch and its samples alone agree."""
    model = build(plan)
    together, total, count = model(**padded(samples, pixels)).loss, 0.0, 0
    for sample in samples:
        one, n = packed([sample], pixels), int((sample[2][1:] != -100).sum())
        total, count = total + n * model(**one).loss, count + n
    torch.testing.assert_close(together, total / count)


def test_only_text(samples):
    model, text = build(), [sample for sample in samples if sample[3] is None]
    batch = {name: t for name, t in padded(text, None).items() if name not in ("pixel_values", "image_index")}
    torch.testing.assert_close(model(**batch).loss, literal_loss(model, text, None))


@pytest.mark.parametrize("plan, how", [(PLAN, {}), (PLAN, {"num_beams": 2}), (BLOCK, {})])
def test_generation(samples, pixels, how, plan):
    """Cached equals uncached equals one by one equals step by step through the literal form."""
    model, how = build(plan).eval(), how | {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    batch = padded(samples, pixels, "left")
    batch.pop("labels")
    together = model.generate(**batch, **how)
    assert torch.equal(together, model.generate(**batch, use_cache=False, **how))
    for row, sample in enumerate(samples):
        one = {"input_ids": sample[0][None], "image_mask": sample[1][None]} | images_of([sample], pixels)
        assert torch.equal(model.generate(**one, **how)[0, len(sample[0]) :], together[row, 11:])
    if "num_beams" in how:
        return
    for row, (ids, places, _, image) in enumerate(samples):
        for token in together[row, 11:]:
            assert literal_logits(model, ids, places, None if image is None else pixels[image])[-1].argmax() == token
            ids, places = torch.cat([ids, token[None]]), torch.cat([places, places.new_zeros(1)])


def test_half_precision_and_files(samples, pixels, tmp_path):
    base = fp.build("lavin-tiny", dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    model = randomise(fp.adapt(base, PLAN)).eval()
    assert model.llm.model.layers[0].mm_adapter.w_down.dtype == torch.float32
    batch = padded(samples, pixels.bfloat16())
    loss = model(**batch).loss
    loss.backward()
    fp.save_adapter(model, tmp_path / "adapter")
    other = fp.load_adapter(fp.build(tmp_path / "base", dtype=torch.bfloat16), tmp_path / "adapter").eval()
    assert torch.equal(other(**batch).loss, loss)
    model.double()
    torch.testing.assert_close(model(**padded(samples, pixels)).loss.float(), loss.float(), rtol=2e-2, atol=0)


def test_what_cannot_be(samples, pixels):
    batch = padded(samples, pixels)
    batch["image_mask"][0, 3] = False
    with pytest.raises(ValueError, match="11 places for 3 images of 4 tokens each"):
        build()(**batch)
