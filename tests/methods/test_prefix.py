"""Prefix and P-tuning v2: PEFT's matrix, keys and values before those of self-attention, positions after the prefix."""

import pytest
import torch

import fastpeft as fp
from fastpeft.methods.prefix import PrefixEncoder


@pytest.mark.parametrize("projection", [None, 12])
def test_the_matrix_is_that_of_peft(projection):
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(
        num_virtual_tokens=5,
        num_layers=3,
        num_attention_heads=2,
        token_dim=8,
        encoder_hidden_size=projection,
        prefix_projection=projection is not None,
    )
    theirs, ours = peft.PrefixEncoder(config), PrefixEncoder(5, 3, 2, 4, projection)
    ours.load_state_dict(theirs.state_dict())
    matrix = theirs(torch.arange(5)[None])
    torch.testing.assert_close(ours.matrix(), matrix[0])
    # PEFT: [batch, n, layers * 2, H, d] -> one [2 * batch, H, n, d] a layer, keys and values in turn
    pairs = matrix.view(1, 5, 6, 2, 4).permute(2, 0, 3, 1, 4)
    for i, (keys, values) in enumerate(ours()):
        assert keys.shape == (2, 5, 4)
        torch.testing.assert_close(keys, pairs[2 * i, 0])
        torch.testing.assert_close(values, pairs[2 * i + 1, 0])


@pytest.mark.parametrize("method", [fp.PTv2(num_virtual_tokens=3), fp.Prefix(num_virtual_tokens=3), fp.Prefix(projection_dim=8)])
def test_parameters(miss, method):
    model = fp.adapt(miss.build(), dec=method)
    n, C, layers = method.num_virtual_tokens or 10, 32, 2
    width = getattr(method, "projection_dim", None) or C
    direct = n * layers * 2 * C
    projected = n * C + width * (C + 1) + (width + 1) * layers * 2 * C
    assert fp.count(model)["trainable"] == (projected if method.projection else direct)


def self_attention(host, layer, hidden, prefix, causal):
    """transformers' arithmetic with the prefix written before the keys and values."""
    attention = host.encoder.layer[layer].attention.self
    q, k, v = (attention._heads(linear(hidden)) for linear in (attention.query, attention.key, attention.value))
    k, v = (torch.cat([p.expand(len(hidden), -1, -1, -1), t], 2) for p, t in zip(prefix, (k, v)))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if causal:
        M = hidden.shape[1]
        allowed = torch.cat([torch.ones(M, prefix[0].shape[1]), torch.ones(M, M).tril()], 1).bool()
        scores = scores.masked_fill(~allowed, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("part", ["jtm", "dec"])
@pytest.mark.parametrize("kind", ["Prefix", "PTv2"])
def test_keys_and_values_stand_before_those_of_self_attention(miss, part, kind):
    plan = {"jtm": f"F/{kind}/F", "dec": f"F/F/{kind}"}[part]
    model, inputs = miss.build(plan), miss.batch()
    host = model.text_encoder if part == "jtm" else model.text_decoder.bert
    seen = {}
    for i, layer in enumerate(host.encoder.layer):
        layer.attention.self.register_forward_hook(lambda m, args, out, i=i: seen.update({i: (args[0], out[0])}))
    positions = []
    host.embeddings.register_forward_hook(lambda m, a, k, out: positions.append(k["past_key_values_length"]), with_kwargs=True)
    with torch.no_grad(), fp.without("labelled"):  # every position of the last layer, too
        model(**inputs)
        for i, (hidden, context) in seen.items():
            shape = inputs["input_ids" if part == "jtm" else "labels"].shape
            hidden = hidden.reshape(*shape, -1)  # tokens may come without their padding
            want = self_attention(host, i, hidden, host.prefix_encoder()[i], causal=part == "dec")
            torch.testing.assert_close(context.reshape(want.shape), want, rtol=0, atol=1e-10)
    assert positions == [10]  # text positions start after the prefix


def test_samples_share_the_prefix(miss):
    model, inputs = miss.build("F/Prefix/Prefix"), miss.batch()
    _, together = miss.step(model, inputs)
    parts = [miss.step(model, miss.alone(inputs, i))[1] for i in range(3)]
    miss.assert_same(together, {name: sum(p[name] for p in parts) / 3 for name in together})


def test_a_prefix_needs_text(miss):
    for kind in ("Prefix", "PTv2"):
        with pytest.raises(ValueError, match=rf"{kind} is not defined for part 'vit': it needs text self-attention"):
            fp.adapt(miss.build(), vit=kind)


def test_works_on_a_model_that_was_not_optimised(miss):
    """The attached prefix brings the modules that can run with it."""
    model, inputs = miss.build("F/Prefix/PTv2"), miss.batch()
    theirs = fp.adapt(miss.plain(miss.build()), "F/Prefix/PTv2")
    theirs.load_state_dict(model.state_dict())
    (loss, gradients), (want, wanted) = miss.step(theirs, inputs), miss.step(model, inputs)
    assert loss == pytest.approx(want, rel=1e-12)
    miss.assert_same(gradients, wanted)
