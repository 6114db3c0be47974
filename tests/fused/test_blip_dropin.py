"""optimize() on transformers' BLIPs: what users set, read, hook and replace counts as in the model itself, loss and gradients to 1e-10."""

import copy

import pytest
import torch
from dropin import assert_equal, each, run, set_config
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipModel,
)
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel, BlipTextModel, BlipTextOnlyMLMHead

import fastpeft as fp
from fastpeft.fused.head.outputs import lean_logits
from fastpeft.fused.stack.flatten import sees_no_values
from fastpeft.models.miss import miss_config

IDS = torch.randint(5, 60, (3, 7), generator=torch.Generator().manual_seed(7))
MASKS = {"right": torch.ones(3, 7, dtype=torch.long), "left": torch.ones(3, 7, dtype=torch.long)}
MASKS["right"][1, 4:], MASKS["right"][2, 5:], MASKS["left"][1, :3], MASKS["left"][2, :2] = 0, 0, 0, 0
STATES = torch.randn(3, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(8))


@pytest.fixture
def make(miss):
    def make(cls, **options):
        torch.manual_seed(4)
        config = miss_config(tiny=True, **miss.SMALL | options)
        return miss.without_dropout(cls(config.text_config if cls in (BlipTextLMHeadModel, BlipTextModel) else config).double())

    return make


@pytest.fixture
def pixels(miss):
    return miss.batch()["pixel_values"]


def caption(pixels, side="right", **more):
    return lambda m: m(pixel_values=pixels, input_ids=IDS, attention_mask=MASKS[side], labels=IDS.clone(), **more)


def question(pixels, side="right", **more):
    """Questions without padding (transformers loses their mask), answers with."""
    answers = {"decoder_input_ids": IDS, "decoder_attention_mask": MASKS[side], "labels": IDS.clone()}
    return lambda m: m(pixel_values=pixels, input_ids=IDS.flip(0), **answers, **more)


BOTH = {BlipForConditionalGeneration: caption, BlipForQuestionAnswering: question}
MODELS = pytest.mark.parametrize("cls", BOTH)


@MODELS
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("side", MASKS)
def test_labels_at_padding(make, pixels, cls, side, training):
    assert_equal(make(cls).train(training), lambda m: BOTH[cls](pixels, side)(m).loss)


@pytest.mark.parametrize("side", MASKS)
def test_lean_logits_change_no_loss(make, pixels, side):
    for labels in (IDS, IDS.masked_fill(MASKS[side] == 0, -100)):

        def call(m, labels=labels):
            with lean_logits(m):
                return m(pixel_values=pixels, input_ids=IDS, attention_mask=MASKS[side], labels=labels).loss

        assert_equal(make(BlipForConditionalGeneration), call)


@pytest.mark.parametrize("side", MASKS)
def test_values_at_padding(make, pixels, side):
    """Poolers and heads read the first position, users any."""
    given = {"pixel_values": pixels, "input_ids": IDS, "attention_mask": MASKS[side]}
    for itm in (True, False):
        assert_equal(make(BlipForImageTextRetrieval), lambda m, itm=itm: m(**given, use_itm_head=itm).to_tuple())
    assert_equal(make(BlipModel), lambda m: m(**given, return_loss=True).to_tuple()[:5])
    assert_equal(make(BlipForConditionalGeneration), lambda m: m(**given, labels=IDS).logits)
    text = {"input_ids": IDS, "attention_mask": MASKS[side], "encoder_hidden_states": STATES}
    assert_equal(make(BlipTextModel), lambda m: m(**text).last_hidden_state)
    assert_equal(make(BlipTextModel), lambda m: m(**text, is_decoder=True, output_hidden_states=True).hidden_states)


@MODELS
@pytest.mark.parametrize(
    "asked",
    [
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"output_hidden_states": True, "output_attentions": True},
        {"return_dict": False},
        {"is_causal": False},
        {"interpolate_pos_encoding": True},
    ],
    ids=str,
)
def test_what_a_call_asks_for(make, pixels, cls, asked):
    def call(m):
        out = BOTH[cls](pixels, **asked)(m)
        return out if isinstance(out, tuple) else (out.loss, *(out.hidden_states or ()), *(out.attentions or ()))

    assert_equal(make(cls), call)


@pytest.mark.parametrize("by", ["argument", "configuration"])
def test_attentions_and_states_of_text(make, by):
    asked = {"output_hidden_states": True, "output_attentions": True}
    given = {"input_ids": IDS, "attention_mask": MASKS["right"], "labels": IDS, "encoder_hidden_states": STATES}

    def configure(m):
        for name, value in asked.items():
            setattr(m.config, name, value)

    def call(m):
        out = m(**given, **(asked if by == "argument" else {}))
        assert [len(t) for t in (out.hidden_states, out.attentions, out.cross_attentions)] == [3, 2, 2]
        return (out.loss, *out.hidden_states, *out.attentions, *out.cross_attentions)

    assert_equal(make(BlipTextLMHeadModel), call, configure if by == "configuration" else None)


def own_forward(m):
    layer = m.text_decoder.bert.encoder.layer[0]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: 1.3 * forward(*args, **kwargs)


class Mixing(nn.Linear):
    """A linear layer that mixes tokens and samples, as some adapters do."""

    def forward(self, x):
        assert x.shape[:2] == (3, 7)
        y = super().forward(x)
        return y + 0.1 * y.roll(1, 0) + 0.1 * y.roll(1, 1)


def mix(m):
    m.text_decoder.bert.encoder.layer[0].output.dense.__class__ = Mixing


def cut(m):
    bert = m.text_decoder.bert
    bert.encoder.layer = bert.encoder.layer[:1]


CHANGES = {
    "is_causal": set_config("text_config", is_causal=False),
    "attention implementation": set_config("text_config", _attn_implementation="someone's"),
    "text output_attentions": set_config("text_config", output_attentions=True),
    "vision output_hidden_states": set_config("vision_config", output_hidden_states=True),
    "scale": each("qkv", scale=0.01),
    "dropout": each("query", dropout=nn.Identity()),
    "vision dropout": each("qkv", dropout=nn.Identity()),
    "label smoothing": each("label_smoothing", label_smoothing=0.3),
    "activation": each("intermediate_act_fn", intermediate_act_fn=nn.Tanh()),
    "forward": own_forward,
    "a module that mixes": mix,
    "fewer layers": cut,
    "num_hidden_layers": set_config("text_config", num_hidden_layers=1),
}


@MODELS
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_set_or_replaced(make, pixels, cls, change, before):
    report = assert_equal(make(cls), lambda m: BOTH[cls](pixels)(m).loss, CHANGES[change], before)
    told = {"dropout": "its dropout is a Identity", "attention implementation": 'for the attention implementation "someone\'s"'}
    if before and change in told:
        assert any(told[change] in reason for _, reason in report.skipped)


PLACES = (
    "",
    ".bert",
    ".bert.encoder",
    ".bert.encoder.layer.1",
    ".bert.encoder.layer.0.attention",
    ".bert.encoder.layer.1.crossattention.self",
)
PLACES += (".bert.encoder.layer.0.attention.self.query", ".bert.encoder.layer.1.output", ".bert.encoder.layer.0.intermediate.dense")
PLACES += (".bert.encoder.layer.0.attention.self.dropout", ".bert.encoder.layer.1.output.LayerNorm", ".cls.predictions.transform")
PLACES += (".cls.predictions.decoder", ".bert.embeddings.word_embeddings")


def add_to_sample_0(m, place):
    """A steering vector for one sample, which asserts that it sees tokens as transformers lays them out."""

    def moved(t):
        assert t.shape[0] == 3 and 7 in t.shape
        t = t.clone()
        t[0] = t[0] + torch.linspace(-1, 1, t.shape[-1], dtype=t.dtype)
        return t

    def hook(module, args, out):
        if torch.is_tensor(out):
            return moved(out)
        if isinstance(out, tuple):
            assert torch.is_tensor(out[1])  # attention's probabilities
            return (moved(out[0]), *out[1:])
        name = "logits" if "logits" in out else "last_hidden_state"
        out[name] = moved(out[name])
        if name == "logits":
            out["loss"] = out["loss"] + out["logits"].square().mean()
        return out

    m.get_submodule("text_decoder" + place).register_forward_hook(hook)


@MODELS
@pytest.mark.parametrize("place", PLACES)
def test_hooks_see_what_transformers_lays_out(make, pixels, cls, place):
    padded = IDS.masked_fill(MASKS["right"] == 0, -100)
    given = {"pixel_values": pixels, "labels": padded}
    given |= (
        {"input_ids": IDS, "attention_mask": MASKS["right"]}
        if cls is BlipForConditionalGeneration
        else {"input_ids": IDS.flip(0), "decoder_input_ids": IDS, "decoder_attention_mask": MASKS["right"]}
    )
    assert_equal(make(cls), lambda m: m(**given).loss, lambda m: add_to_sample_0(m, place))


def test_without_hooks_no_padding_is_computed(make, pixels):
    """Of a BLIP for questions: its outputs hold no state of the text."""
    model, rows = make(BlipForQuestionAnswering), {}
    fp.optimize(model)
    for name, text in (("question", model.text_encoder), ("answer", model.text_decoder.bert)):
        for i, layer in enumerate(text.encoder.layer):
            layer.intermediate.register_forward_hook(sees_no_values(lambda m, args, out, key=(name, i): rows.update({key: out.shape[0]})))
    labels = IDS.masked_fill(MASKS["right"] == 0, -100)
    given = {"pixel_values": pixels, "input_ids": IDS, "attention_mask": MASKS["right"]}
    model(**given, decoder_input_ids=IDS, decoder_attention_mask=MASKS["right"], labels=labels).loss.backward()
    real = int(MASKS["right"].sum())
    assert rows == {("question", 0): real, ("question", 1): real, ("answer", 0): real, ("answer", 1): int((labels[:, 1:] != -100).sum())}


KEPT = {
    "the last 2": 2,
    "a tensor": torch.tensor([1, 3]),
    "each its own": torch.tensor([[1, 3], [0, 2], [5, 6]]),
    "a mask": IDS > 20,
}


@pytest.mark.parametrize("trained", [True, False], ids=["head trained", "head frozen"])
@pytest.mark.parametrize("kept", KEPT)
def test_logits_to_keep_and_shift_labels(make, kept, trained):
    given = {"input_ids": IDS, "attention_mask": MASKS["right"], "encoder_hidden_states": STATES, "logits_to_keep": KEPT[kept]}
    model = make(BlipTextLMHeadModel)
    for module in () if trained else (model.cls, model.bert.embeddings):
        module.requires_grad_(False)
    rows = int(KEPT[kept].sum()) if kept == "a mask" else 6
    targets = IDS.flatten()[:rows].clone()
    targets[0] = -100
    for mode in (True, False):
        assert_equal(copy.deepcopy(model).train(mode), lambda m: m(**given).logits)
        for reduction in ("mean", "sum", "none"):
            labelled = given | {"labels": IDS, "shift_labels": targets, "reduction": reduction}
            assert_equal(copy.deepcopy(model).train(mode), lambda m, labelled=labelled: m(**labelled).to_tuple())
        if kept != "a mask":
            assert_equal(copy.deepcopy(model).train(mode), lambda m: m(**given, labels=IDS[:, :2]).loss)


@pytest.mark.parametrize("shape", [(21,), (1, 21), (3, 7)])
def test_shift_labels_of_any_shape(make, shape):
    targets = IDS.flip(1).masked_fill(IDS > 50, -100).view(shape)
    given = {"input_ids": IDS, "encoder_hidden_states": STATES, "labels": IDS, "shift_labels": targets}
    for reduction in ("mean", "none"):
        assert_equal(make(BlipTextLMHeadModel), lambda m, reduction=reduction: m(**given, reduction=reduction).loss)


def test_labels_that_do_not_fit(make):
    model = make(BlipTextLMHeadModel)
    fp.optimize(model)
    with pytest.raises(ValueError, match="labels"):
        model(input_ids=IDS, encoder_hidden_states=STATES, labels=IDS[:, :4])


def test_captions_logits_wait_for_a_reader(make, pixels, monkeypatch):
    model = make(BlipForConditionalGeneration)
    model.text_decoder.cls.requires_grad_(False)
    plain = copy.deepcopy(model)
    fp.optimize(model)
    heads, forward = [], BlipTextOnlyMLMHead.forward
    monkeypatch.setattr(BlipTextOnlyMLMHead, "forward", lambda head, hidden: heads.append(1) or forward(head, hidden))
    out = caption(pixels)(model)
    out.loss.backward()
    assert type(out).__name__ == "BlipForConditionalGenerationModelOutput" and "logits" in out and not heads
    torch.testing.assert_close(out.logits, caption(pixels)(plain).logits, rtol=1e-10, atol=1e-10)
    assert len(caption(pixels, return_dict=False)(model)) == len(caption(pixels, return_dict=False)(plain)) == 4
    report = fp.optimize(model, lean_logits=True)
    assert caption(pixels)(model).logits is None and any("lean_logits" in note for note in report.notes)
    for mine, theirs in zip(*(caption(pixels, return_dict=False)(m) for m in (model, plain)), strict=True):  # known by their places
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_one_state_for_all_and_masks(make):
    """A batch of one state broadcasts; additive masks [B, 1, L, L] go through; a mask that does not fit is an error, not a result."""
    given = {"input_ids": IDS, "labels": IDS}
    assert_equal(make(BlipTextLMHeadModel), lambda m: m(**given, encoder_hidden_states=STATES[:1]).loss)
    additive = torch.zeros(3, 1, 7, 7, dtype=torch.float64).masked_fill(torch.rand(3, 1, 7, 7) > 0.6, -1e9)
    assert_equal(make(BlipTextLMHeadModel), lambda m: m(**given, encoder_hidden_states=STATES, attention_mask=additive).loss)
    fused = make(BlipTextLMHeadModel)
    fp.optimize(fused)
    for mask in (torch.ones(3, 9), torch.ones(3, 5)):
        with pytest.raises(RuntimeError):
            fused(**given, encoder_hidden_states=STATES, attention_mask=mask)


@MODELS
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_one_graph_for_every_length(make, pixels, cls, backend):
    def given(length):
        ids = torch.randint(5, 60, (3, length))
        mask = torch.ones_like(ids)
        mask[1, length - 2 :] = 0
        text = {"labels": ids.masked_fill(mask == 0, -100)}
        if cls is BlipForConditionalGeneration:
            return {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask} | text
        return {"pixel_values": pixels, "input_ids": ids, "decoder_input_ids": ids, "decoder_attention_mask": mask} | text

    model = make(cls, vision_layers=1, text_layers=1)
    fp.optimize(model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for length in range(5, 15):
        batch = given(length)
        for t in [batch[name] for name in batch if name != "pixel_values"] if length == 5 else ():
            torch._dynamo.mark_dynamic(t, 1)  # compiled once, not for the first length and then for all; a length written in is an error
        torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss, rtol=1e-10, atol=0)
    assert counter.frame_count == 1
    (_, wanted), (_, gradients) = (run(m, lambda m: m(**batch).loss) for m in (model, compiled))
    gradients = {name.removeprefix("_orig_mod."): t for name, t in gradients.items()}
    assert gradients.keys() == wanted.keys()
    largest = max(float(t.abs().max()) for t in wanted.values())
    assert max(float((gradients[name] - t).abs().max()) for name, t in wanted.items()) < 1e-10 * largest
    torch._dynamo.reset()


def test_adapter_names(make, pixels):
    """PEFT's samples of one batch with adapters of their own."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make(BlipForConditionalGeneration), peft.LoraConfig(r=2, target_modules=["query", "value", "dense"]))
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["query", "value"]))
    for name, p in model.named_parameters():
        if "lora" in name:
            p.data = 0.1 * torch.randn_like(p)
    given = {"pixel_values": pixels, "input_ids": IDS, "attention_mask": MASKS["right"], "labels": IDS}
    names = ["default", "other", "__base__"]
    assert_equal(model.eval(), lambda m: m(**given, adapter_names=names).loss)
