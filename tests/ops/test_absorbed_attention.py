"""Cross-attention that never forms the keys and values of what it attends to, against the form that does."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from fastpeft.ops.absorbed_attention import absorbed_attention, absorbed_attention_reference, absorbed_pays
from fastpeft.ops.lora_linear import Projection

NAMES = ("q", "states", "w_k", "b_k", "a_k", "l_k", "w_v", "b_v", "a_v", "l_v")


def inputs(U=2, H=3, M=5, d=4, N=7, C=12, r=2, dtype=torch.float64) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(U * M, H, d), (U, N, C), *[(H * d, C), (H * d,), (r, C), (H * d, r)] * 2]
    return {name: torch.randn(shape, dtype=torch.float64).to(dtype) for name, shape in zip(NAMES, shapes)}


def run(form, t: dict[str, torch.Tensor], lora=True, **options) -> torch.Tensor:
    factors = [(t["a_k"], t["l_k"], 0.7), (t["a_v"], t["l_v"], 1.3)] if lora else [(), ()]
    return form(
        t["q"], t["states"], Projection(t["w_k"], t["b_k"], *factors[0]), Projection(t["w_v"], t["b_v"], *factors[1]), 0.5, **options
    )


@pytest.mark.parametrize("size", [{}, {"U": 1, "H": 1, "M": 1, "N": 1}, {"M": 1, "N": 33}, {"U": 3, "M": 9, "N": 2, "C": 5, "d": 1}])
@pytest.mark.parametrize("lora", [True, False])
def test_equals_the_ordinary_form_with_every_gradient(size, lora):
    mine, theirs = ({k: v.requires_grad_() for k, v in inputs(**size).items()} for _ in range(2))
    outs = [run(form, t, lora) for form, t in ((absorbed_attention, mine), (absorbed_attention_reference, theirs))]
    torch.testing.assert_close(*outs, rtol=1e-11, atol=1e-12)
    upstream = torch.randn_like(outs[0])
    for out in outs:
        out.backward(upstream)
    for name in NAMES if lora else ("q", "states", "w_k", "b_k", "w_v", "b_v"):
        torch.testing.assert_close(mine[name].grad, theirs[name].grad, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("pads", [False, True], ids=["as many as there are", "padded"])
@pytest.mark.parametrize("counts", [(1, 5, 4), (0, 9, 1), (10, 0, 0), (3, 3, 4)])
def test_images_with_different_numbers_of_queries(counts, pads, monkeypatch):
    monkeypatch.setattr(importlib.import_module("fastpeft.ops.absorbed_attention"), "_pads", lambda device: pads)
    given = inputs(U=3, M=4) | {"q": torch.randn(10, 3, 4, dtype=torch.float64)}
    mine, theirs = ({k: v.clone().requires_grad_() for k, v in given.items()} for _ in range(2))
    outs = [run(form, t, counts=counts) for form, t in ((absorbed_attention, mine), (absorbed_attention_reference, theirs))]
    torch.testing.assert_close(*outs, rtol=1e-11, atol=1e-12)
    upstream = torch.randn_like(outs[0])
    for out in outs:
        out.backward(upstream)
    for name in NAMES:
        torch.testing.assert_close(mine[name].grad, theirs[name].grad, rtol=1e-9, atol=1e-11, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(run(absorbed_attention, given, counts=counts), outs[1], rtol=1e-11, atol=1e-12)


def test_no_padding_is_computed():
    """FLOPs of ten queries of three images, wherever they lie."""
    seen = []
    for counts in ((1, 8, 1), (4, 3, 3)):
        t = inputs(U=3, M=4) | {"q": torch.randn(10, 3, 4, dtype=torch.float64)}
        with FlopCounterMode(display=False) as counter:
            run(absorbed_attention, {k: v.requires_grad_() for k, v in t.items()}, counts=counts).sum().backward()
        seen.append(counter.get_total_flops())
    assert seen[0] == seen[1]


@pytest.mark.parametrize("counts", [(5, 4), (5, 5, 0), (11, -1)])
def test_counts_that_do_not_add_up(counts):
    with pytest.raises(ValueError, match="counts"):
        run(absorbed_attention, inputs(), counts=counts)


@pytest.mark.parametrize("needed", [*list(itertools.combinations(("q", "states", "w_k", "a_v"), 2)), ("q",), ("states",), ("a_v",)])
def test_any_subset_of_gradients(needed):
    mine, theirs = inputs(), inputs()
    grads = []
    for form, t in ((absorbed_attention, mine), (absorbed_attention_reference, theirs)):
        leaves = [t[name].requires_grad_() for name in needed]
        grads.append(torch.autograd.grad(run(form, t).square().sum(), leaves))
        assert all(not t[name].requires_grad for name in set(NAMES) - set(needed))
    for mine_, theirs_ in zip(*grads):
        torch.testing.assert_close(mine_, theirs_, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_worse_than_the_ordinary_form_in_the_same_dtype(dtype):
    truth = run(absorbed_attention_reference, inputs(M=6, N=65, d=8, C=24))
    errors = [
        (run(form, inputs(M=6, N=65, d=8, C=24, dtype=dtype)).double() - truth).norm()
        for form in (absorbed_attention, absorbed_attention_reference)
    ]
    assert errors[0] <= 1.5 * errors[1] + 1e-6 * truth.norm()


@pytest.mark.parametrize("needed", [("q",), ("states",), ("q", "states", "a_k", "l_k", "a_v", "l_v"), ("q", "w_v", "w_k"), NAMES])
def test_keeps_queries_and_states_only(needed):
    """Neither probabilities, nor q~, nor their mix of states, nor a copy of a weight, whatever is trained."""
    t = inputs(M=5, N=101, C=48)
    for name in needed:
        t[name].requires_grad_()
    kept = []
    with saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        run(absorbed_attention, t, lora="a_v" in needed)
    U, H, M, d, r = 2, 3, 5, 4, 2
    assert any(x.data_ptr() == t["states"].data_ptr() for x in kept)
    given = {x.untyped_storage().data_ptr() for x in t.values()}
    new = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept if x.untyped_storage().data_ptr() not in given}
    most = U * H * M * (d + (r if "l_k" in needed else 0)) * 8
    assert U * H * M * d * 8 <= sum(new.values()) <= most, new


@pytest.mark.parametrize("lora", [True, False])
def test_dropout_is_unbiased_and_its_gradient_is_of_the_same_mask(lora):
    t = inputs(U=1, H=2, M=2, N=4, C=6)
    torch.manual_seed(0)
    many = torch.stack([run(absorbed_attention, t, lora, dropout_p=0.3) for _ in range(4000)])
    want = run(absorbed_attention, t, lora)
    torch.testing.assert_close(many.mean(0), want, atol=0.1 * float(want.abs().max()), rtol=0)

    def same_draw(*values):
        torch.manual_seed(3)
        return run(absorbed_attention, dict(zip(NAMES, values)), lora, dropout_p=0.5)

    assert torch.autograd.gradcheck(same_draw, [x.requires_grad_() for x in t.values()])


def test_biases_count_dropped_probabilities():
    t = inputs(N=9)
    t["w_v"].zero_(), t["b_v"].fill_(1.0)
    torch.manual_seed(1)
    out = run(absorbed_attention, t, lora=False, dropout_p=0.5)
    assert out.std() > 0.1, "with dropout the rows no longer sum to one, and neither does what the bias is multiplied with"


def test_pays_for_short_queries_as_counted():
    size = {"states": 901, "width": 768, "heads": 12}
    for most, training, trained in ((64, False, False), (27, True, False), (38, True, True)):
        assert absorbed_pays(most, **size, training=training, states_need_grad=trained)
        assert not absorbed_pays(most + 1, **size, training=training, states_need_grad=trained)


def test_bad_shapes_are_named():
    t = inputs()
    t["w_k"] = t["w_k"][:, 1:]
    with pytest.raises(ValueError, match="do not fit"):
        run(absorbed_attention, t)
