"""ReLU kept as what is above zero and a bit for each element: PyTorch's values to the bit, in fewer bytes."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import fastpeft as fp
from fastpeft import _library, ops
from fastpeft.ops._recompute import recompute, to_save
from fastpeft.ops.relu import FEW, relu_pays

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def hard(shape, dtype, shift=0.0):
    """Numbers with every special one among them, at the beginning and at the end."""
    torch.manual_seed(len(shape))
    x = (torch.randn(shape, dtype=torch.float64) - shift).to(dtype)
    least = torch.finfo(dtype)
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan, least.tiny, -least.tiny, least.tiny / 2, least.max, least.min]
    special = torch.tensor(special, dtype=dtype)
    flat, n = x.view(-1), min(len(special), x.numel())
    if n:
        flat[:n], flat[-n:] = special[:n], special[-n:]
    return x


# a byte that is not full, whole bytes, several parts, nothing above zero, everything, no element
SHAPES = [((1,), 0), ((7, 3), 0), ((4, 5, 16), 0.5), ((150, 1201), 1.5), ((64, 8), 50), ((64, 8), -50), ((0, 4), 0)]


@pytest.mark.parametrize("shape, shift", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_pytorch_to_the_bit(shape, shift, dtype):
    x = hard(shape, dtype, shift).requires_grad_()
    want, y = F.relu(x), ops.relu(x)
    assert y.shape == want.shape and y.dtype == dtype and torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.nan_to_num(7.0), want.nan_to_num(7.0))
    dy = torch.randn(shape, dtype=torch.float64).to(dtype)
    (ours,), (theirs,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(want, x, dy)
    assert torch.equal(ours, theirs)
    again = recompute(*to_save(y))
    assert again.shape == y.shape and torch.equal(again.isnan(), y.isnan()) and torch.equal(again.nan_to_num(7.0), y.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_kept(dtype):
    """A bit of each element for ReLU itself, and for who reads it what is above zero."""
    x = torch.randn(40, 48).to(dtype).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ops.relu(x)
    assert [(t.dtype, t.numel()) for t in kept] == [(torch.uint8, 40 * 48 // 8)]
    _, (values, bits) = to_save(y)
    assert bits.data_ptr() == kept[0].data_ptr() and torch.equal(values, y[y > 0])
    assert to_save(y)[1][0] is values  # packed once for all who ask


def test_what_reads_its_output():
    """A linear layer behind it, behind dropout too; and a change of the output in place, which the layer then keeps as it is."""
    torch.manual_seed(0)
    first, last = (torch.nn.Linear(*sizes).double() for sizes in ((12, 40), (40, 6)))
    x = torch.randn(5, 12, dtype=torch.float64)

    def grads(relu, linear, change=lambda y: y):
        y = linear(change(relu(first(x))), last.weight)
        return torch.autograd.grad(y.square().sum(), (first.weight, last.weight))

    def fused(y, weight):
        return ops.lora_linear(y, weight, None, None, None, 1.0)

    changes = (lambda y: y, lambda y: y.mul_(2), lambda y: ops.dropout(y, 0.0, True), lambda y: ops.dropout(y, 0.3, True))
    for change in changes:
        torch.manual_seed(1)
        ours = grads(ops.relu, fused, change)
        torch.manual_seed(1)
        for mine, theirs in zip(ours, grads(ops.relu, F.linear, change)):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(grads(ops.relu, fused), grads(F.relu, F.linear)):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_where_pytorch_serves():
    """No gradient, no floating point, another layout in memory, recipes off, a transformed function."""
    x = torch.randn(4, 16, requires_grad=True)
    assert type(ops.relu(x).grad_fn).__name__ == "_ReLUBackward"
    images = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    assert ops.relu(images).stride() == images.stride()
    assert ops.relu(x.detach()).grad_fn is None and ops.relu(torch.tensor([-1, 2])).tolist() == [0, 2]
    with fp.without("remake"):
        assert type(ops.relu(x).grad_fn).__name__ == "ReluBackward0"
    tangent = torch.func.jvp(ops.relu, (x.detach(),), (torch.ones_like(x),))[1]
    assert torch.equal(tangent, (x > 0).float())
    per_row = torch.func.vmap(torch.func.grad(lambda row: ops.relu(row).sum()))(x.detach())
    assert torch.equal(per_row, (x > 0).float())
    with pytest.raises(RuntimeError, match=r"twice|second|double"):
        (once,) = torch.autograd.grad(ops.relu(x).square().sum(), x, create_graph=True)
        once.sum().backward()


def test_operators_say_what_they_do():
    x = torch.randn(5, 9)
    y, bits = torch.ops.fastpeft.relu_fwd(x)
    values = torch.ops.fastpeft.relu_pack(y, bits)
    calls = {"relu_fwd": (x,), "relu_pack": (y, bits), "relu_again": (values, bits, [5, 9]), "relu_bwd": (torch.randn(5, 9), bits)}
    for name, args in calls.items():
        torch.library.opcheck(getattr(torch.ops.fastpeft, name).default, args, test_utils=("test_schema", "test_faketensor"))
    if _library.backend_of()["relu_fwd"]["CPU"] == "native":
        with pytest.raises(RuntimeError, match="do not fit"):
            torch.ops.fastpeft.relu_again(values, bits, [50, 9])
        with pytest.raises(RuntimeError, match="do not fit"):
            torch.ops.fastpeft.relu_again(values[1:].contiguous(), bits, [5, 9])


def test_where_it_pays():
    packs = _library.backend_of()["relu_fwd"]["CPU"] == "native"
    assert relu_pays(torch.empty(FEW)) == packs
    assert not relu_pays(torch.empty(FEW - 1)) and not relu_pays(torch.empty(FEW, device="meta"))


def test_shapes_without_values():
    with FakeTensorMode():
        x = torch.empty(3, 40, requires_grad=True)
        y = ops.relu(x)
        y.sum().backward()
    assert y.shape == (3, 40) and x.grad.shape == x.shape
