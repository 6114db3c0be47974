"""Every op on the device that its tensors lie on, while another one is current: `make test-cuda` has two that are not there."""

import sys

import pytest
import torch

from fastpeft import ops
from fastpeft.ops import _tiled

pytestmark = pytest.mark.gpu


@pytest.fixture
def second():
    """The second device; the first one is current."""
    if torch.cuda.device_count() < 2 and "lookalike" not in sys.modules:
        pytest.skip("needs a second CUDA device")
    before = torch.cuda.current_device()
    yield torch.device("cuda", 1)
    assert torch.cuda.current_device() == before == 0


def test_where_a_device_is_current(second):
    assert torch.empty(1, device="cuda").device.index == 0
    with _tiled.on_device_of([torch.empty(1), torch.empty(1, device=second)]):
        assert torch.cuda.current_device() == 1 and torch.empty(1, device="cuda").device == second
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(2, device=second) + torch.ones(2, device="cuda:0")
    leaf = torch.ones(2, device=second, requires_grad=True)
    seen = []
    leaf.register_hook(lambda g: seen.append((g.device, torch.cuda.current_device())))
    (leaf * 2).sum().backward()
    assert seen == [(second, 1)]  # autograd's threads have a device each


def test_every_op(second, check, row):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = row.inputs(5, 64, dtype)
        outputs, grads = check.run(row.call, [t.to(second) for t in inputs], row.needs(inputs))
        found = [t for t in outputs + grads if t is not None]
        assert {t.device for t in found} == {second}
        if not row.random:
            on_host = [t for part in check.run(row.call, inputs, row.needs(inputs)) for t in part if t is not None]
            for value, want in zip(found, on_host, strict=True):
                assert check.error(value.cpu(), want, 1e-3) <= (2e-4 if dtype == torch.float32 else 4e-2)


@pytest.mark.parametrize("name", ["lora_linear", "mm_adapter"])
def test_dropout_whose_seed_is_drawn_on_the_host(second, table, check, name):
    call = {"lora_linear": lambda *a: ops.lora_linear(*a, 0.5, 0.3), "mm_adapter": lambda *a: ops.mm_adapter(*a, 0.7, 1, 0.3)}[name]
    outputs, grads = check.run(call, [t.to(second) for t in table[name].inputs(5, 64, torch.bfloat16)])
    assert {t.device for t in outputs + grads} == {second}
