"""BLIP on fastpeft's operators against transformers' own modules, under every plan, and what only ours promises: nothing saved below
the lowest trainable parameter, logits formed when they are read, gradients where they are asked for and nowhere else."""

import contextlib
import functools

import pytest
import torch
import torch.nn.functional as F
from transformers.models.blip import modeling_blip_text

import fastpeft as fp
from fastpeft.fused.attention import blip_text as attention_text
from fastpeft.fused.head.outputs import lean_logits
from fastpeft.fused.stack.flatten import sees_no_values
from fastpeft.registry import is_fused

PLANS = (
    "T/T/T",
    "F/LoRA/LoRA",
    "LoRA/LoRA/LoRA",
    "F/T/LoRA",
    "IA3/IA3/IA3",
    "F/IA3/T",
    "F/Prefix/Prefix",
    "T/F/Prefix",
    "F/PTv2/PTv2",
    "LayerNorm/LayerNorm/LayerNorm",
    "T/Attention/FFN",
    "LoRA+LayerNorm/LoRA+IA3/IA3+Prefix",
)
IN_TRANSFORMERS = [plan for plan in PLANS if "P" not in plan]  # a prefix cannot run in transformers' modules


@pytest.mark.parametrize("plan", IN_TRANSFORMERS)
def test_loss_and_gradients_are_those_of_transformers(miss, plan):
    model, inputs = miss.without_dropout(miss.build(plan)), miss.batch()
    theirs = miss.plain(model)
    assert not any(is_fused(m) for m in theirs.modules())
    (loss, gradients), (want, wanted) = miss.step(model, inputs), miss.step(theirs, inputs)
    assert loss == pytest.approx(want, rel=1e-12)
    miss.assert_same(gradients, wanted)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == trainable - {"text_decoder.cls.predictions.decoder.bias"}


@pytest.mark.parametrize("plan", [plan for plan in PLANS if "P" in plan])
def test_gradients_exist_for_what_is_trained_and_nothing_else(miss, plan):
    model = miss.without_dropout(miss.build(plan))
    _, gradients = miss.step(model, miss.batch(padded=True))
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(g.isfinite().all() for g in gradients.values())


@pytest.mark.parametrize("plan", PLANS)
def test_bfloat16_base_with_float32_adapters(miss, plan):
    reference = miss.without_dropout(miss.build(plan, scatter=0.05))
    model = miss.without_dropout(miss.build(plan, dtype=torch.bfloat16))
    model.load_state_dict(reference.state_dict())
    loss, gradients = miss.step(model, miss.batch(padded=True, dtype=torch.bfloat16))
    want, wanted = miss.step(reference, miss.batch(padded=True))
    assert loss == pytest.approx(want, rel=0.05)
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert gradients[name].dtype == p.dtype == (torch.float32 if fp.methods.is_adapter(name) else torch.bfloat16)
    got, truth = (torch.cat([g[name].double().flatten() for name in wanted]) for g in (gradients, wanted))
    assert F.cosine_similarity(got, truth, dim=0) > 0.98
    answers = model.eval().generate(**miss.questions(miss.batch(padded=True, dtype=torch.bfloat16)), num_beams=2, max_length=4)
    assert answers.shape[0] == 3


@torch.no_grad()
def test_outputs_of_each_part(miss):
    model, inputs = miss.build(), miss.batch()
    theirs, answers = miss.plain(model), {"input_ids": inputs["labels"], "attention_mask": torch.ones_like(inputs["labels"])}
    images = model.vision_model(inputs["pixel_values"], output_hidden_states=True)
    want = theirs.vision_model(inputs["pixel_values"], output_hidden_states=True)
    for a, b in zip((*images.hidden_states, images.pooler_output), (*want.hidden_states, want.pooler_output), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    question = {"input_ids": inputs["input_ids"], "encoder_hidden_states": images.last_hidden_state, "output_hidden_states": True}
    states, want = model.text_encoder(**question), theirs.text_encoder(**question)
    for a, b in zip((*states.hidden_states, states.last_hidden_state), (*want.hidden_states, want.last_hidden_state), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    for reduction in ("mean", "sum", "none"):
        given = answers | {"encoder_hidden_states": states.last_hidden_state, "labels": inputs["labels"], "reduction": reduction}
        out, want = model.text_decoder(**given), theirs.text_decoder(**given)
        torch.testing.assert_close(out.logits, want.logits, rtol=0, atol=1e-10)
        torch.testing.assert_close(out.loss, want.loss, rtol=1e-12, atol=0)
    given = answers | {"encoder_hidden_states": states.last_hidden_state}
    for option in ({"return_logits": True}, {"return_dict": False}, {"logits_to_keep": 2}, {"logits_to_keep": torch.tensor([1, 3])}):
        got, want = (m.text_decoder(**given, **option) for m in (model, theirs))
        got, want = (out.logits if hasattr(out, "logits") else out if torch.is_tensor(out) else out[0] for out in (got, want))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_labels_that_are_shifted_already(miss):
    model, labels = miss.build(), miss.batch()["labels"]
    given = {"input_ids": labels, "encoder_hidden_states": torch.randn(3, 7, 32, dtype=torch.float64), "labels": labels}
    targets = labels.flip(1).index_fill(1, torch.tensor([4]), -100)
    with torch.no_grad():
        want = miss.plain(model).text_decoder(**given, shift_labels=targets).loss
        torch.testing.assert_close(model.text_decoder(**given, shift_labels=targets).loss, want, rtol=1e-12, atol=0)
        assert abs(model.text_decoder(**given).loss - want) > 1e-3


def test_logits_of_a_training_step(miss, monkeypatch):
    """Formed when they are read; with lean_logits, never."""
    decoder = miss.build("F/F/LoRA").text_decoder
    labels = miss.batch(padded=True)["labels"]
    given = {"input_ids": labels.clamp(min=0), "encoder_hidden_states": torch.randn(3, 7, 32, dtype=torch.float64), "labels": labels}
    heads, forward = [], modeling_blip_text.BlipTextOnlyMLMHead.forward
    monkeypatch.setattr(
        modeling_blip_text.BlipTextOnlyMLMHead, "forward", lambda head, hidden: heads.append(hidden.shape[:2]) or forward(head, hidden)
    )
    for mode in (True, False):
        out = decoder.train(mode)(**given)
        assert not heads and "logits" in out  # the loss took its own logits, at labelled positions
        assert out.logits.shape == (3, 5, 64) and heads == [(3, 5)]
        heads.clear()
    assert decoder(**given, return_dict=False)[1].shape == (3, 5, 64)
    assert decoder.train()(**given, return_logits=True).shape == (3, 4, 64)
    heads.clear()
    with lean_logits(decoder):
        assert decoder(**given).logits is None and not heads
        assert decoder.eval()(**given).logits.shape == (3, 5, 64)


@pytest.mark.parametrize(
    "method", [fp.LoRA(r=2, target_modules=("decoder",)), fp.IA3(("decoder",), ()), fp.IA3(("decoder",), ("decoder",))]
)
def test_adapters_on_the_head(miss, method):
    model, inputs = miss.build(), miss.batch()
    fp.adapt(model, dec=method)
    miss.scatter_trained(model)
    miss.without_dropout(model)
    (loss, gradients), (want, wanted) = miss.step(model, inputs), miss.step(miss.plain(model), inputs)
    assert loss == pytest.approx(want, rel=1e-12) and loss != pytest.approx(miss.step(miss.build(), inputs)[0], rel=1e-6)
    assert len(wanted) == (2 if isinstance(method, fp.LoRA) else 1)
    miss.assert_same(gradients, wanted)


def test_a_mask_of_ones_is_no_mask(miss):
    model, inputs = miss.build(), miss.batch()
    without = {name: t for name, t in inputs.items() if name != "attention_mask"}
    with torch.no_grad():
        want = model(**inputs).loss
        for mask in (None, inputs["attention_mask"].bool(), inputs["attention_mask"].double()):
            torch.testing.assert_close(model(**without, attention_mask=mask).loss, want, rtol=1e-12, atol=0)


def test_four_dimensional_masks(miss):
    """transformers' own [B, 1, M, N] masks pass through, additive or boolean."""
    model, inputs = miss.build(), miss.batch()
    allowed = torch.ones(7, 7).tril().bool().expand(3, 1, 7, 7)
    additive = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)
    given = {"input_ids": inputs["input_ids"], "encoder_hidden_states": torch.randn(3, 5, 32, dtype=torch.float64)}
    with torch.no_grad():
        want = miss.plain(model).text_encoder(**given, attention_mask=additive).last_hidden_state
        for mask in (additive, allowed):
            got = model.text_encoder(**given, attention_mask=mask).last_hidden_state
            torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_masked_states_do_not_matter(miss):
    model = miss.build()
    states, mask = torch.randn(3, 6, 32, dtype=torch.float64), torch.ones(3, 6)
    mask[0, 4:], mask[2, :2] = 0, 0
    given = {"input_ids": miss.batch()["labels"], "encoder_attention_mask": mask}
    with torch.no_grad():
        first = model.text_decoder(**given, encoder_hidden_states=states).logits
        changed = states.masked_fill(mask[..., None] == 0, 1e3)
        torch.testing.assert_close(model.text_decoder(**given, encoder_hidden_states=changed).logits, first, rtol=0, atol=1e-10)
        alone = model.text_decoder(input_ids=given["input_ids"][2:], encoder_hidden_states=states[2:, 2:]).logits
        torch.testing.assert_close(alone, first[2:], rtol=0, atol=1e-10)


def test_a_cache_fed_in_steps(miss):
    """Prefill, then several tokens at once, then one: as without a cache."""
    for plan in (None, "F/F/IA3", "F/F/Prefix"):
        model, ids = miss.build(plan), miss.batch()["input_ids"]
        states, mask = torch.randn(3, 6, 32, dtype=torch.float64), torch.ones(3, 6)
        mask[1, 3:] = 0
        encoder = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
        with torch.no_grad():
            want, logits, cache = model.text_decoder(input_ids=ids, **encoder).logits, [], None
            for piece in ids.split((2, 4, 1), dim=1):
                out = model.text_decoder(input_ids=piece, past_key_values=cache, use_cache=True, **encoder)
                logits, cache = [*logits, out.logits], out.past_key_values
            torch.testing.assert_close(torch.cat(logits, 1), want, rtol=0, atol=1e-10)


def test_what_a_prefix_cannot_give(miss):
    with pytest.raises(ValueError, match="a prefix runs in fused attention alone, and attention probabilities are asked for"):
        miss.build("F/Prefix/F").text_encoder(input_ids=miss.batch()["input_ids"], output_attentions=True)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        miss.build().text_encoder()


@contextlib.contextmanager
def counting(bases=()):
    """Bytes that autograd keeps, parameters (and views of them) aside."""
    kept, own = [0], {p.untyped_storage().data_ptr() for p in bases}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[0] += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "treatments, silent",
    [
        ({"dec": "LoRA"}, ["vision_model", "text_encoder", "text_decoder.bert.embeddings"]),
        ({"jtm": "LoRA"}, ["vision_model", "text_encoder.embeddings"]),
        ({"jtm": fp.LoRA(target_modules=r"encoder\.layer\.1\..*query")}, ["vision_model", "text_encoder.encoder.layer.0"]),
        (
            {"dec": fp.LoRA(target_modules=r"bert\.encoder\.layer\.1\.output\.dense")},
            ["vision_model", "text_encoder", "text_decoder.bert.encoder.layer.0", "text_decoder.bert.encoder.layer.1.crossattention"],
        ),
        ({"vit": fp.LoRA(target_modules=r"encoder\.layers\.1\.mlp\.fc2")}, ["vision_model.encoder.layers.0", "vision_model.embeddings"]),
        ({"dec": "Prefix"}, ["vision_model", "text_encoder", "text_decoder.bert.embeddings"]),
        ({"dec": "IA3"}, ["vision_model", "text_encoder", "text_decoder.bert.embeddings"]),
        (
            {"jtm": fp.IA3(target_modules=("layer.1.output.dense",), feedforward_modules=("output.dense",))},
            ["text_encoder.encoder.layer.0"],
        ),
    ],
)
def test_nothing_is_saved_below_the_lowest_trainable_parameter(miss, treatments, silent, padded):
    model = fp.adapt(miss.build(), **treatments).train()
    kept = {}
    with counting() as total:
        for name in silent:
            module = model.get_submodule(name)
            module.register_forward_pre_hook(sees_no_values(lambda *_, name=name: kept.update({name: [total[0]]})))
            module.register_forward_hook(sees_no_values(lambda *_, name=name: kept[name].append(total[0])))
        loss = model(**miss.batch(padded=padded)).loss
    assert total[0] > 0 and loss.requires_grad
    assert {name: after - start for name, (start, after) in kept.items()} == dict.fromkeys(silent, 0)


def test_no_gradient_flows_below_the_lowest_trainable_parameter(miss):
    model = fp.adapt(miss.build(), jtm=fp.LoRA(target_modules=r"encoder\.layer\.1\..*query")).train()
    seen = {}
    for name in ("encoder.layer.0", "encoder.layer.1"):
        module = model.text_encoder.get_submodule(name)
        module.register_forward_hook(lambda *args, name=name: seen.update({name: args[2].requires_grad}))
    model(**miss.batch()).loss.backward()
    assert seen == {"encoder.layer.0": False, "encoder.layer.1": True}


FLOORS = {"vision_model.encoder.layers": (10, 17), "text_encoder.encoder.layer": (13, 7), "text_decoder.bert.encoder.layer": (13, 5)}


@pytest.mark.parametrize("plan", PLANS)
def test_layers_save_what_math_says_they_must(miss, plan, monkeypatch):
    """Elements of C per token in the upper layer of each stack, whatever the method, with all of its dropout. Apart: what layers share,
    a decoder's keys and values of the question, statistics and LoRA's S (rank 4 of 32 here)."""
    monkeypatch.setattr(attention_text, "absorbed_pays", lambda *args, **kwargs: True)
    model, (B, C) = miss.build(plan, dtype=torch.float32, scatter=0.0), (3, 32)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    kept, at, alive, seen = dict.fromkeys(FLOORS, 0), [], [], {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if at and storage.data_ptr() not in seen and storage.nbytes() >= 4 * B * C:
            kept[at[-1]] += storage.nbytes() / (4 * B * C)
        seen.add(storage.data_ptr())
        alive.append(storage)  # so that no address comes twice
        return tensor

    def enter(module, args, name):
        at.append(name)
        seen.update(states.untyped_storage().data_ptr() for states in args[1:])

    for name in FLOORS:
        layer = model.get_submodule(name)[1]
        layer.register_forward_pre_hook(sees_no_values(functools.partial(enter, name=name)))
        layer.register_forward_hook(sees_no_values(lambda *_: at.clear()))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), fp.without("labelled"):
        assert model.train()(**miss.batch(dtype=torch.float32)).loss.requires_grad
    for name, (floor, tokens) in FLOORS.items():
        question = 2 * 7 / 5 if "decoder" in name else 0
        assert kept[name] / tokens <= floor + question + 0.2 + (1.9 if "LoRA" in plan else 0), (name, kept[name] / tokens)


def test_adapters_save_no_more_than_full_tuning_and_less_than_transformers(miss):
    """257 image tokens: where attention's probabilities weigh what they weigh in earnest."""
    size, inputs = miss.SMALL | {"image_size": 128}, miss.batch(dtype=torch.float32, padded=True)
    inputs["pixel_values"] = torch.randn(3, 3, 128, 128)

    def bytes_kept(plan, change=lambda model: model):
        model = fp.adapt(fp.build("miss-tiny", pretrained=False, **size), plan)
        with counting(model.parameters()) as kept:
            assert change(model).train()(**inputs).loss.requires_grad
        return kept[0]

    full = bytes_kept("T/T/T")
    for plan in ("LoRA/LoRA/LoRA", "IA3/IA3/IA3", "LayerNorm/LayerNorm/LayerNorm"):
        ours = bytes_kept(plan)
        assert ours < 1.1 * full  # MATH: what a layer must save does not depend on the method
        assert ours < 0.75 * bytes_kept(plan, miss.plain)


def test_gradient_checkpointing(miss):
    model, inputs = miss.without_dropout(miss.build("T/T/T", scatter=0)), miss.batch(padded=True)
    want, wanted = miss.step(model, inputs)
    model.gradient_checkpointing_enable()
    calls = []
    model.text_encoder.encoder.layer[0].intermediate.register_forward_hook(lambda *_: calls.append(1))
    loss, gradients = miss.step(model, inputs)
    assert len(calls) == 2  # once more in backward
    assert loss == pytest.approx(want, rel=1e-12)
    miss.assert_same(gradients, wanted)


def test_attention_dropout_keeps_the_mean(miss):
    attention = miss.build().text_encoder.encoder.layer[0].attention.self.train()
    attention.dropout.p = 0.3
    x = torch.randn(1, 5, 32, dtype=torch.float64)
    with torch.no_grad():
        many = attention(x.expand(4000, -1, -1))[0]
        want = attention.eval()(x)[0]
    assert not torch.equal(many[0], many[1])
    torch.testing.assert_close(many.mean(0, keepdim=True), want, rtol=0, atol=0.15 * float(want.abs().max()))
    assert isinstance(attention, modeling_blip_text.BlipTextSelfAttention)


@pytest.mark.parametrize("shared", [False, True], ids=["own images", "shared images"])
@pytest.mark.parametrize("plan", ["T/T/T", "F/T/F", "LoRA/LoRA/F", "T/LoRA+IA3/F", "F/IA3/LoRA"])
def test_absorbed_cross_attention_changes_nothing(miss, plan, shared, monkeypatch):
    """Wherever it is chosen, attention to the image's states themselves equals attention to its keys and values."""
    options = {"target_modules": ("query", "key", "value", "qkv")} if "LoRA" in plan and "IA3" not in plan else {}
    model, inputs = miss.without_dropout(miss.build(plan, **options)), miss.batch(padded=True)
    if shared:
        inputs |= {"pixel_values": inputs["pixel_values"][:2], "image_index": torch.tensor([1, 0, 1])}
    results, calls, absorbed = [], [], attention_text.absorbed_attention
    monkeypatch.setattr(attention_text, "absorbed_attention", lambda *args: calls.append(1) or absorbed(*args))
    for pays in (True, False):
        monkeypatch.setattr(attention_text, "absorbed_pays", lambda *args, pays=pays, **kwargs: pays)
        results.append(miss.step(model, inputs))
    assert len(calls) == 2  # one a layer of the question's encoder; a padded question has a mask
    (loss, gradients), (want, wanted) = results
    assert loss == pytest.approx(want, rel=1e-12)
    miss.assert_same(gradients, wanted)


def test_shared_states_with_masks_of_ones_own(miss):
    """A mask over states belongs to a sample: those that share states may mask them differently."""
    model, ids = miss.build(), miss.batch()["input_ids"]
    states, index, mask = torch.randn(2, 6, 32, dtype=torch.float64), torch.tensor([1, 0, 1]), torch.ones(3, 6)
    mask[0, 3:], mask[2, :2] = 0, 0
    with torch.no_grad():
        for given in ({}, {"encoder_attention_mask": mask}):
            got = model.text_encoder(ids, encoder_hidden_states=states, encoder_index=index, **given).last_hidden_state
            want = model.text_encoder(ids, encoder_hidden_states=states[index], **given).last_hidden_state
            torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
