"""Where tokens lie, and the last decoder layer that computes labelled positions only."""

from __future__ import annotations

import pytest
import torch

import fastpeft as fp
from fastpeft.fused.head import loss as losses
from fastpeft.fused.layout import Layout, image_layout, queries_at, rows_of, self_layout
from fastpeft.methods.base import sees_no_values
from fastpeft.ops import layer_norm
from fastpeft.ops._recompute import recipe_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_a_tail_lays_out_what_is_wanted(padded, causal):
    """Against the table of token numbers: every wanted token keeps its sample, its order, and all keys up to its own column."""
    mask = torch.ones(3, 6, dtype=torch.bool)
    if padded:
        mask[1, 4:], mask[2, 5:] = False, False
    wanted = torch.zeros(3, 6, dtype=torch.bool)
    wanted[0, 2:4], wanted[1, 3], wanted[2, 2] = True, True, True
    layout = self_layout((3, 6), mask, CPU)
    numbers = layout.unpad(torch.arange(1, 19.0).view(3, 6, 1))  # [T, 1]
    labelled = queries_at(layout, wanted, causal, CPU)
    assert numbers[labelled.tokens].flatten().tolist() == [3, 4, 10, 15]
    table = labelled.queries.pad(numbers[labelled.tokens])[..., 0]
    first, last = (2, 3) if causal else (0, 5)
    assert torch.equal(table, (torch.arange(1, 19.0).view(3, 6) * wanted)[:, first : last + 1])
    keys = labelled.keys.pad(rows_of(numbers, labelled.seen))[..., 0]
    assert torch.equal(keys, (torch.arange(1, 19.0).view(3, 6) * mask)[:, : last + 1])
    assert torch.equal(labelled.outputs.pad(numbers[labelled.tokens])[..., 0], torch.arange(1, 19.0).view(3, 6) * wanted)
    assert torch.equal(labelled.queries.unpad(labelled.queries.pad(numbers[labelled.tokens])), numbers[labelled.tokens])


def test_tokens_row_by_row():
    """Samples that ask about images 1, 0, 1, some of them padded: tokens of image 0 first, whatever their samples' order."""
    mask = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])
    images = image_layout(self_layout((3, 3), mask, CPU), torch.tensor([1, 0, 1]), 3, CPU)
    numbers = torch.arange(6.0)[:, None]
    assert images.counts == (3, 3, 0) and images.columns == 3 and images.tokens == 6
    assert images.by_row(numbers).flatten().tolist() == [2, 3, 4, 0, 1, 5]
    assert images.pad(numbers)[..., 0].tolist() == [[2, 3, 4], [0, 1, 5], [0, 0, 0]]
    assert torch.equal(images.from_rows(images.by_row(numbers)), numbers)
    whole = self_layout((2, 3), None, CPU)
    assert whole.counts is None and whole.tokens == 6 and whole.by_row(numbers) is numbers and whole.from_rows(numbers) is numbers


def test_no_tail_where_nothing_is_saved():
    layout = Layout(2, 3, None)
    assert queries_at(layout, torch.ones(2, 3, dtype=torch.bool), True, CPU) is None
    assert queries_at(layout, torch.zeros(2, 3, dtype=torch.bool), True, CPU) is None
    padded = self_layout((2, 3), torch.tensor([[True, True, False], [True, True, True]]), CPU)
    assert queries_at(padded, torch.tensor([[True, True, False], [True, True, True]]), True, CPU) is None


def test_rows_of_what_backward_forms_again():
    x, w = torch.randn(5, 4, requires_grad=True), torch.ones(4)
    y = layer_norm(x, w, w)
    rows = rows_of(y, torch.tensor([3, 1]))
    assert torch.equal(rows, y[[3, 1]]) and recipe_of(rows) is not None
    assert rows_of(y, None) is y
    assert recipe_of(rows_of(x, torch.tensor([3, 1]))) is None


def labelled_somewhere(inputs, which):
    """Labels of a few positions: answers with holes, one without any, some from the middle on."""
    labels = inputs["labels"].clone()
    labels[0, 2], labels[1, 2:] = -100, -100
    if which == "late":
        labels[:, :3] = -100
    if which == "one":
        labels[:, :], labels[0, 3] = -100, 7
    return inputs | {
        "labels": labels,
        "decoder_input_ids": inputs["labels"].clamp_min(0),
        "decoder_attention_mask": inputs["labels"] != -100,
    }


@pytest.mark.parametrize("which", ["holes", "late", "one"])
@pytest.mark.parametrize("plan", ["T/T/T", "F/LoRA/LoRA", "IA3/F/IA3", "F/PTv2/Prefix", "F/F/LayerNorm", "T/Attention/FFN", "F/LoRA/F"])
def test_labelled_positions_only_changes_nothing(miss, plan, which):
    model = miss.without_dropout(miss.build(plan))
    for padded in (False, True):
        inputs = labelled_somewhere(miss.batch(padded=padded), which)
        loss, gradients = miss.step(model, inputs)
        with fp.without("labelled"):
            want, wanted = miss.step(model, inputs)
        assert loss == pytest.approx(want, rel=1e-12)
        miss.assert_same(gradients, wanted)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_the_decoder_alone(miss, reduction):
    """Against transformers' own decoder, on labels it is handed directly."""
    model = miss.without_dropout(miss.build("F/F/T"))
    theirs, inputs = miss.plain(model), miss.batch(padded=True)
    labels = labelled_somewhere(inputs, "holes")["labels"]
    given = {"input_ids": inputs["labels"].clamp_min(0), "encoder_hidden_states": torch.randn(3, 6, 32, dtype=torch.float64)}
    given |= {"labels": labels, "reduction": reduction}
    torch.testing.assert_close(model.text_decoder(**given).loss, theirs.text_decoder(**given).loss, rtol=1e-11, atol=0)


def test_without_any_label(miss):
    model, inputs = miss.build("F/F/LoRA").train(), miss.batch()
    inputs = labelled_somewhere(inputs, "holes")
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss = model(**inputs).loss
    loss.backward()
    assert loss.item() == 0.0


def test_the_last_layer_computes_what_is_labelled(miss, monkeypatch):
    """Rows that reach the last layer's feed-forward: the labelled positions' and no others."""
    model = miss.without_dropout(miss.build("F/F/LoRA"))
    rows = {}
    for i, layer in enumerate(model.text_decoder.bert.encoder.layer):
        layer.intermediate.register_forward_hook(sees_no_values(lambda module, args, out, i=i: rows.update({i: out.shape[0]})))
    calls = []
    monkeypatch.setattr(losses.ops, "linear_cross_entropy", lambda hidden, *args, **how: calls.append(hidden.shape[0]) or hidden.sum())
    inputs = labelled_somewhere(miss.batch(padded=True), "holes")
    model(**inputs)
    wanted = int(((inputs["labels"][:, 1:] != -100) & inputs["decoder_attention_mask"][:, :-1]).sum())
    assert rows == {0: int(inputs["decoder_attention_mask"].sum()), 1: wanted} and calls == [wanted]


def llama(plan):
    shape = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    model = fp.build("llama-tiny", pretrained=False, dtype=torch.float64, num_key_value_heads=2, **shape)
    torch.manual_seed(1)
    fp.adapt(model, plan)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p) * p.requires_grad
    return model.train()


@pytest.mark.parametrize("batch", ["padded", "left", "packed", "full"])
@pytest.mark.parametrize("plan", ["T", "LoRA", "IA3", "PTv2", "LayerNorm", "IA3+PTv2", "Excitor", "Excitor+LoRA"])
def test_llamas_last_layer_at_labelled_positions_only(miss, plan, batch):
    """Answers behind their questions, with a hole: keys of every question, queries of answers."""
    model = llama(plan)
    model.lean_logits = True
    torch.manual_seed(3)
    ids = torch.randint(3, 50, (3, 8))
    labels = ids.clone()
    labels[:, :3], labels[0, 5] = -100, -100
    given = {"input_ids": ids, "labels": labels}
    if batch in ("padded", "left"):
        mask = torch.ones_like(ids)
        mask[1, 5:], mask[2, 6:] = 0, 0
        labels[mask == 0] = -100
        if batch == "left":
            mask, labels = mask.flip(1), labels.flip(1)
            labels[mask.cumsum(1) <= 1] = -100  # what the last of the padding predicts: see test_labels_at_padding
        given |= {"attention_mask": mask, "labels": labels}
    if batch == "packed":
        position_ids = torch.cat([torch.arange(10), torch.arange(6), torch.arange(8)])[None]
        given = {"input_ids": ids.view(1, -1), "labels": labels.view(1, -1), "position_ids": position_ids}
    loss, gradients = miss.step(model, given)
    rows = []
    model.model.layers[1].mlp.register_forward_hook(sees_no_values(lambda module, args, out: rows.append(out.shape[0])))
    with fp.without("labelled"):
        want, wanted = miss.step(model, given)
    miss.step(model, given)
    assert loss == pytest.approx(want, rel=1e-12)
    miss.assert_same(gradients, wanted)
    assert rows[1] < rows[0] and rows[1] <= int((given["labels"][:, 1:] != -100).sum())


def test_padding_copies_no_zeros_and_keeps_no_tokens():
    """The table is zeroed and written, once each, and backward needs the places alone: index_copy would keep the tokens for it."""
    layout = Layout(3, 4, torch.tensor([0, 1, 4, 8, 9, 10]))
    x, kept = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), []
    packing = torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t)
    with packing, torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        table = layout.pad(x)
    assert {"aten::index_copy_", "aten::zero_"} <= (ran := {event.name for event in trace.events()}) and "aten::copy_" not in ran
    assert len(kept) == 1 and kept[0].data_ptr() == layout.place.data_ptr()
    assert torch.equal(layout.unpad(table), x) and table.count_nonzero() == x.numel()
    assert torch.autograd.gradcheck(layout.pad, x)


@pytest.mark.parametrize("lay", ["pad", "from_rows"])
def test_tokens_laid_elsewhere_are_not_kept(lay):
    """``index_copy_`` itself keeps what it copies, to expand a gradient to its shape."""
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    batch = self_layout((2, 3), mask, torch.device("cpu"))
    layout = batch if lay == "pad" else image_layout(batch, torch.tensor([1, 0]), 2, torch.device("cpu"))
    x, kept = torch.randn(4, 5, dtype=torch.float64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        table = getattr(layout, lay)(x * 1.0)
    assert kept and all(t.dtype == torch.int64 for t in kept)
    assert torch.autograd.gradcheck(getattr(layout, lay), x)
    assert table.sum() == x.sum()
