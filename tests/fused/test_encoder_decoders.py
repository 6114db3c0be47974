"""Encoder-decoder models after optimize, on what their callers give them: padding on either side, decoder inputs and masks of one's own,
labels left out in the middle and for a whole sample; how many tokens they compute; and what keeps the padding."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as T
from double import assert_same, step
from tiny_models import NO_DROPOUT, PAD, TEXT, VISION, V, tiny
from torch import nn
from torch.utils._pytree import tree_leaves

import fastpeft as fp
from fastpeft.fused.stack import any_stack

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
SIZES = HEADS | {"encoder_layers": 2, "decoder_layers": 2, "vocab_size": V, "d_model": 32, "dropout": 0.0, "init_std": 0.3}
SIZES |= {"attention_dropout": 0.0, "activation_dropout": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
SIZES |= {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": V, "dropout_rate": 0.0}
T5 |= {"decoder_start_token_id": PAD, "pad_token_id": PAD}
PLAIN = ("mt5", "mbart", "marian", "pegasus", "blenderbot", "m2m100", "plbart", "bart")


def make(name):
    """(model, batch); whatever is not among the tiny models has T5's batches."""
    torch.manual_seed(0)
    if name in ("t5", "whisper", "florence2"):
        return tiny(name)
    batch = tiny("t5")[1]
    if name == "blip2-t5":
        sizes = {"num_query_tokens": 4, "image_token_index": 98}
        asked = T.Blip2QFormerConfig(**TEXT | NO_DROPOUT, encoder_hidden_size=24, cross_attention_frequency=1).to_dict()
        seen = T.Blip2VisionConfig(**VISION).to_dict()
        config = T.Blip2Config(vision_config=seen, qformer_config=asked, text_config=T.T5Config(**T5).to_dict(), **sizes)
        model, with_image = T.Blip2ForConditionalGeneration(config), tiny("florence2")[1]

        def pictured(kind):
            given = with_image(kind)
            ids = given["input_ids"]
            ids[ids == 98] = 97
            for row in range(3):  # four image tokens each, where the first real ones are
                ids[row, given["attention_mask"][row].nonzero().flatten()[:4]] = 98
            return given

        return model.double(), pictured
    if name == "t5gemma":
        sub = T.T5GemmaModuleConfig(**TEXT | {"num_key_value_heads": 2, "head_dim": 8, "attention_dropout": 0.0})
        config = T.T5GemmaConfig(encoder=sub, decoder=sub, vocab_size=V, dropout_rate=0.0, attn_implementation="eager")
        return T.T5GemmaForConditionalGeneration(config).double(), batch
    if name == "speech2text":
        config = T.Speech2TextConfig(**SIZES, max_target_positions=32, input_feat_per_channel=8, attn_implementation="eager")

        def spoken(kind):
            return {"input_features": torch.randn(3, 24, 8).double(), "labels": batch(kind)["labels"]}

        return T.Speech2TextForConditionalGeneration(config).double(), spoken
    cased = {"mt5": "MT5", "mbart": "MBart", "m2m100": "M2M100", "plbart": "PLBart"}.get(name, name.title())
    model = getattr(T, cased + ("MTModel" if name == "marian" else "ForConditionalGeneration"))
    config = getattr(T, f"{cased}Config")(**(T5 if name == "mt5" else SIZES | {"max_position_embeddings": 64}))
    return model(config).double(), batch


def both(name, lean=True):
    plain, batch = make(name)
    model = copy.deepcopy(plain.train())
    fp.optimize(model, lean_logits=lean)
    return plain, model, batch


@pytest.fixture
def tokens_seen(monkeypatch):
    """Tokens that each layer of a stack computed where it stood for real tokens."""
    seen, run = [], any_stack.OnTokens.run

    def watched(self, forward, hidden, *args, **kwargs):
        seen.append(hidden.shape[:2].numel())
        return run(self, forward, hidden, *args, **kwargs)

    monkeypatch.setattr(any_stack.OnTokens, "run", watched)
    return seen


def given(batch):
    """(what, batch) of every kind."""
    for kind in ("padded", "left"):
        plain = batch(kind)
        labels, places = plain["labels"], torch.arange(6)
        yield f"{kind}, gaps in the labels", plain | {"labels": labels.masked_fill(places % 3 == 1, -100)}
        yield f"{kind}, a sample without labels", plain | {"labels": labels.masked_fill(torch.arange(3)[:, None] == 1, -100)}
        inputs = labels.masked_fill(labels == -100, PAD).roll(1, 1)
        inputs[:, 0] = 2
        mask = (places < torch.tensor([[6], [4], [2]])).long()
        yield f"{kind}, decoder inputs", plain | {"decoder_input_ids": inputs}
        yield f"{kind}, a decoder mask", plain | {"decoder_input_ids": inputs, "decoder_attention_mask": mask}
        yield f"{kind}, padding before an answer", plain | {"decoder_input_ids": inputs.flip(1), "decoder_attention_mask": mask.flip(1)}


QUICK = [("t5", True), ("bart", True), ("mbart", True), ("whisper", None), ("florence2", None)]
LEAN = ["t5", "whisper", "florence2", "blip2-t5", "t5gemma", "speech2text", *PLAIN]
EVERY = [(n, True) for n in LEAN] + [(n, None) for n in ("t5", "bart", "whisper", "florence2")]
EVERY = [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in EVERY]


@pytest.mark.parametrize("name, lean", EVERY)
def test_the_model_as_it_was(name, lean):
    plain, model, batch = both(name, lean)
    for what, one in given(batch):
        if name in ("mbart", "plbart") and "without labels" in what:  # it moves the last label to the front
            continue
        mine, theirs = step(model, one), step(plain, one)
        assert_same(mine, theirs, what)
        if lean is None:
            torch.testing.assert_close(mine[0].logits, theirs[0].logits, rtol=1e-9, atol=1e-10)


# labels are 6, 3 and 1 of a row of 6: behind them no decoder computes anything. T5Gemma returns its decoder's states: it computes them all.
COUNTED = {"t5gemma": [28, 28, 18, 18], "speech2text": [10] * 2, "whisper": [10] * 2, "florence2": [43, 43, 10, 10]}
COUNTED |= {"blip2-t5": [43, 43, 10, 10]}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ("t5", "bart", "whisper") else pytest.mark.slow) for n in LEAN])
def test_what_is_computed(name, tokens_seen):
    plain, model, batch = both(name)
    one = batch("padded")
    assert_same(step(model, one), step(plain, one))
    assert tokens_seen == COUNTED.get(name, [28, 28, 10, 10])


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoders_padding_is_returned_to_nobody(name, tokens_seen):
    """Its last hidden state is left out, as logits are, where it has no padding; and computed where somebody asks."""
    plain, model, batch = both(name)
    one = batch("padded")
    assert model(**one).encoder_last_hidden_state is None
    tokens_seen.clear()
    for asked in ({"return_dict": False}, {"output_hidden_states": True}, {"output_attentions": True}):
        for each in (plain, model):
            each.set_attn_implementation("eager" if "output_attentions" in asked else "sdpa")
        mine, theirs = model(**one, **asked), plain(**one, **asked)
        torch.testing.assert_close(mine[0], theirs[0], rtol=1e-5, atol=0)
        if "return_dict" not in asked:
            torch.testing.assert_close(mine.encoder_last_hidden_state, theirs.encoder_last_hidden_state, rtol=1e-4, atol=1e-5)
    assert not tokens_seen
    full = {key: value for key, value in batch("full").items() if key != "attention_mask"}
    for called in (full, one):
        mine, theirs = (each(**called).encoder_last_hidden_state for each in (model, plain))
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)  # T5's norms are float32
        model.eval(), plain.eval()


@pytest.mark.parametrize("name", ["bart", "blip2-t5"])
def test_a_tuple_is_whole(name, tokens_seen):
    """Its parts are known by their places, so none is left out, of a model inside neither."""
    plain, model, batch = both(name)
    mine, theirs = (flat(each(**batch("padded"), return_dict=False)) for each in (model, plain))
    assert len(mine) == len(theirs) and not tokens_seen
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def flat(output) -> list[torch.Tensor]:
    return [tensor for tensor in tree_leaves(output) if isinstance(tensor, torch.Tensor)]


def test_an_encoder_of_ones_own_outputs(tokens_seen):
    """States that a caller computed have their padding: the decoder does not read it."""
    plain, model, batch = both("bart")
    one = batch("left")
    states = torch.randn(3, 12, 32, dtype=torch.float64)
    one |= {"encoder_outputs": (states,), "input_ids": None}
    assert_same(step(model, one), step(plain, one))
    assert tokens_seen == [6 + 6 + 6] * 2 and model(**one).encoder_last_hidden_state is not None


def test_gradient_checkpointing_of_biases(tokens_seen):
    """T5's first layer forms what the others take."""
    torch.manual_seed(0)
    plain = T.T5ForConditionalGeneration(T.T5Config(**T5)).train()
    model, one = copy.deepcopy(plain), tiny("t5")[1]("padded")
    fp.optimize(model, lean_logits=True)
    losses = []
    for each in (plain, model):
        each.gradient_checkpointing_enable({"use_reentrant": False})
        losses.append(each(**one).loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    for mine, theirs in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    assert set(tokens_seen) == {28, 10}


KEEPS = ["a hook", "a sample without tokens", "module of one's own", "float mask of numbers", "checkpointing", "layer drop"]


@pytest.mark.parametrize("why, name", [(why, name) for why in KEEPS for name in ("t5", "mbart") if name == "mbart" or why not in KEEPS[4:]])
def test_what_keeps_padding_and_what_does_not(why, name, tokens_seen):
    plain, model, batch = both(name)
    one, heard, kept = batch("padded"), [], []
    encoder, decoder = ((m.get_encoder(), m.get_decoder()) for m in (plain, model)), [28, 28, 10, 10]
    (_, _), (encoder, _) = encoder
    if why == "a hook":
        for each in (plain, model):
            first = next(m for m in each.get_encoder().modules() if isinstance(m, nn.Linear))
            first.register_forward_hook(lambda module, args, output: heard.append(output.shape[:2]))
        kept = [10, 10]
    elif why == "a sample without tokens":
        one["attention_mask"][1] = 0
    elif why == "module of one's own":
        for each in (plain, model):
            name, last = [(n, m) for n, m in each.get_decoder().named_modules() if isinstance(m, nn.Linear)][-1]
            parent, _, child = name.rpartition(".")
            setattr(each.get_decoder().get_submodule(parent), child, Doubled(last))
        kept = [28, 28]
    elif why == "float mask of numbers":
        one["attention_mask"] = one["attention_mask"].double() * 0.5
        kept = decoder
    elif why == "checkpointing":
        for each in (plain, model):
            each.gradient_checkpointing_enable({"use_reentrant": False})
        kept = None
    else:
        for each in (plain, model):
            each.get_encoder().layerdrop = each.get_decoder().layerdrop = 1.0
    assert_same(step(model, one), step(plain, one))
    assert all(shape == (3, 12) for shape in heard)
    if kept is not None:
        assert tokens_seen == kept
    else:
        assert set(tokens_seen) == {28, 10}


class Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.weight = inner, inner.weight

    def forward(self, x):
        return self.inner(x) + x.mean(1, keepdim=True)[..., : self.weight.shape[0]].mean()


def test_a_bias_of_zeros_is_not_kept():
    """T5's cross-attention adds zeros; its frozen biases of its own positions are kept once for all layers of a stack."""
    plain, model, batch = both("t5", None)
    for each in (plain, model):
        each.get_decoder().block[0].layer[0].SelfAttention.relative_attention_bias.weight.requires_grad_(False)
    one, kept = batch("full"), []
    assert_same(step(model, one), step(plain, one))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(**one)
    found = {t.untyped_storage().data_ptr(): tuple(t.shape) for t in kept if t.dim() == 4 and t.shape[0] == 1}
    assert sorted(found.values()) == [(1, 4, 6, 6), (1, 4, 12, 12)]


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_adapters(name, tokens_seen):
    peft = pytest.importorskip("peft")
    plain, batch = make(name)
    plain = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).double().train()
    model = copy.deepcopy(plain)
    fp.optimize(model, lean_logits=True)
    one = batch("padded")
    assert_same(step(model, one), step(plain, one))
    assert tokens_seen == [28, 28, 10, 10]


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_eager_attention(name, tokens_seen):
    plain, model, batch = both(name)
    for each in (plain, model):
        each.set_attn_implementation("eager")
    for _, one in given(batch):
        assert_same(step(model, one), step(plain, one))
    assert 28 in tokens_seen


def test_float16_sees_every_token(tokens_seen):
    """What such layers do in float16 depends on whether any token of the batch is infinite."""
    _, model, batch = both("bart")
    model.half()(**batch("padded"))
    assert set(tokens_seen) == {10}  # BART's decoder does nothing of the kind
