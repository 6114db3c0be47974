"""What backward forms again: the same bits as what it would have kept, and kept nowhere."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import fastpeft as fp
from fastpeft import ops
from fastpeft.ops._recompute import mark_recomputable, recipe_of, recompute, to_save
from fastpeft.ops.lora_linear import linear

M, C, F = 11, 8, 24


def tensors(dtype=torch.float64, trained=()):
    torch.manual_seed(0)
    shapes = {"x": (M, C), "r": (M, C), "w": (C,), "b": (C,), "W1": (F, C), "Wu": (F, C), "l": (F,), "W2": (C, F), "A": (2, F), "B": (C, 2)}
    t = {name: torch.randn(shape, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}
    for name in trained:
        t[name].requires_grad_()
    return t


def layer_norm(t):
    return ops.layer_norm(t["x"], t["w"], t["b"])


def add_layer_norm(t):
    return ops.add_layer_norm(t["x"], t["r"], t["w"], t["b"])[0]


def rms_norm(t):
    return ops.rms_norm(t["x"], t["w"])


def add_rms_norm(t):
    return ops.add_rms_norm(t["x"], t["r"], t["w"])[0]


def gelu(y, t):
    return ops.rescale(ops.gelu(linear(y, t["W1"])), t["l"])


def fused_gelu(y, t):
    return ops.gelu(linear(y, t["W1"]), t["l"], approximate="tanh")


def swiglu(y, t):
    return ops.swiglu(linear(y, t["W1"]), linear(y, t["Wu"]), t["l"])


def run(norm, activation, t, lora=True):
    """Loss, gradients of what is trained, and bytes kept beside what was given."""
    kept, given = {}, {p.untyped_storage().data_ptr() for p in t.values()}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        z = activation(norm(t), t)
        loss = ops.lora_linear(z, t["W2"], None, t["A"] if lora else None, t["B"] if lora else None, 0.7).sum()
    trained = [p for p in t.values() if p.requires_grad]
    new = sum(size for address, size in kept.items() if address not in given)
    return loss, torch.autograd.grad(loss, trained, allow_unused=True), new


EVERYTHING = ("x", "w", "b", "W1", "Wu", "l", "W2", "A", "B")


@pytest.mark.parametrize("trained", [EVERYTHING, ("x", "A", "B"), ("x", "W2"), ("w", "l"), ("x", "W1", "l"), ("A",), ("W1", "A")])
@pytest.mark.parametrize("activation", [gelu, fused_gelu, swiglu])
@pytest.mark.parametrize("norm", [layer_norm, add_layer_norm, rms_norm, add_rms_norm])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_same_bits_from_less_memory(norm, activation, trained, dtype):
    loss, grads, new = run(norm, activation, tensors(dtype, trained))
    with fp.without("remake"):
        want, wanted, more = run(norm, activation, tensors(dtype, trained))
    assert torch.equal(loss, want)
    assert all(g is w is None or torch.equal(g, w) for g, w in zip(grads, wanted))
    assert new <= more


@pytest.mark.parametrize("trained", [EVERYTHING, ("x", "A", "B"), ("x", "W2", "W1")])
def test_a_feed_forward_block_keeps_its_norms_input_and_its_hidden_layer(trained):
    """MATH's floor: h (C), the activation's input (F; 2F with a gate), statistics, LoRA's S: whatever is trained."""
    for norm, activation, floor in (
        (add_layer_norm, gelu, M * (C + F + 2)),
        (add_rms_norm, swiglu, M * (C + 2 * F + 1)),
    ):
        _, _, new = run(norm, activation, tensors(trained=trained))
        assert new <= 8 * (floor + 2 * M)
        with fp.without("remake"):
            assert run(norm, activation, tensors(trained=trained))[2] > new


def test_changed_in_place_is_kept_as_it_is():
    t = tensors(trained=("x", "W1"))
    y = layer_norm(t)
    assert recipe_of(y) is not None
    y.mul_(2.0)
    assert recipe_of(y) is None
    linear(y, t["W1"]).sum().backward()
    torch.testing.assert_close(t["W1"].grad, y.detach().sum(0).expand(F, C))


def test_an_input_changed_in_place_is_an_error_not_a_wrong_gradient():
    t = tensors(trained=("x", "A", "B"))
    h = t["x"] * 1.0
    z = ops.lora_linear(ops.gelu(h @ t["W1"].mT), t["W2"], None, t["A"], t["B"])
    with torch.no_grad():
        t["W2"] += 1.0  # unused by the recipe, needed by dx
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_recipes_compose_and_views_lose_them():
    t = tensors(trained=("x", "l"))
    y = ops.rescale(ops.gelu(t["x"]), t["l"][:C])
    how, kept = to_save(y)
    assert [k.data_ptr() for k in kept] == [t["x"].data_ptr(), t["l"].data_ptr()]
    assert torch.equal(recompute(how, kept), y)
    assert recipe_of(y.view(-1)) is None and to_save(y.view(-1))[0] is None


def test_a_recipe_that_whole_views_have():
    t = tensors(trained=("x",))
    y = mark_recomputable(t["x"] * 2.0, lambda x: x * 2.0, t["x"], in_views=True)
    flat, how, kept = y.view(-1), *to_save(y.view(-1))
    assert [k.data_ptr() for k in kept] == [t["x"].data_ptr()]
    assert torch.equal(recompute(how, kept), flat) and torch.equal(recompute(*to_save(y.unsqueeze(0))), y.unsqueeze(0))
    for other in (y[1:], y.mT, y.view(-1)[:C], y.reshape(-1) * 1.0, y.detach()):
        assert recipe_of(other) is None and to_save(other)[0] is None
    with torch.no_grad():
        flat[0] = 1.0
    assert to_save(y.view(-1))[0] is None


def test_backward_lets_go_of_what_it_used():
    """Recipes hold no tensors: after backward, with the loss still there, nothing of the graph is left."""
    t = tensors(trained=("x", "W1", "A", "B", "l"))
    with saved_tensors_hooks(lambda x: x, lambda x: x):
        h = t["x"] * 2.0
        alive = weakref.ref(h)
        y = ops.layer_norm(h, t["w"], t["b"])
        loss = ops.lora_linear(ops.rescale(ops.gelu(linear(y, t["W1"])), t["l"]), t["W2"], None, t["A"], t["B"]).sum()
    del h, y
    loss.backward()
    assert alive() is None


def test_nothing_is_noted_where_there_is_no_backward():
    t = tensors()
    assert recipe_of(layer_norm(t)) is None
    t["x"].requires_grad_()
    with torch.no_grad():
        assert recipe_of(layer_norm(t)) is None
    small = torch.ones(1)
    assert recipe_of(mark_recomputable(torch.ones(3), torch.ones, small, smaller=True)) is not None


def test_compiled_is_as_eager():
    t = tensors(trained=EVERYTHING)
    eager = run(add_layer_norm, gelu, t)
    step = torch.compile(lambda: ops.lora_linear(gelu(add_layer_norm(t), t), t["W2"], None, t["A"], t["B"], 0.7).sum(), backend="aot_eager")
    grads = torch.autograd.grad(step(), [p for p in t.values() if p.requires_grad], allow_unused=True)
    for got, want in zip(grads, eager[1]):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want)


def test_unknown_savings_are_named():
    with pytest.raises(ValueError, match="no saving is called caching; there are remake, labelled, absorb"), fp.without("caching"):
        pass
