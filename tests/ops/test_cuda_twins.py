"""csrc's CUDA kernels (and the Triton row pass) against their CPU twins: same inputs, both devices. Only where there is a GPU."""

import pytest
import torch

from fastpeft import ops

pytestmark = pytest.mark.gpu
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
WIDTHS = [1, 7, 257, 768, 4096, 4097]


def same(check, fn, inputs, needs=None):
    on_cpu = check.run(fn, inputs, needs)
    on_gpu = check.run(fn, [t.cuda() for t in inputs], needs)
    for value, want in zip(on_gpu[0] + on_gpu[1], on_cpu[0] + on_cpu[1]):
        assert (value is None) == (want is None)
        if value is not None:
            assert check.error(value.cpu(), want, floor=1e-3) <= TOLERANCE[inputs[0].dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", WIDTHS)
def test_norms(check, n, dtype):
    x, residual = torch.randn(2, 3, 301, n).to(dtype).unbind(0)
    weight, bias = torch.randn(2, n).to(dtype).unbind(0)
    for needs in check.subsets(3):
        same(check, lambda *a: ops.layer_norm(*a, 1e-5), [x, weight, bias], needs)
    for needs in check.subsets(2):
        same(check, lambda *a: ops.rms_norm(*a, 1e-6), [x, weight], needs)
    same(check, lambda *a: ops.add_layer_norm(*a, 1e-5), [x, residual, weight, bias])
    same(check, lambda *a: ops.add_rms_norm(*a, 1e-6), [x, residual, weight])
    same(check, lambda *a: ops.rms_norm(*a, 1e-6), [x[:, ::2], weight])
    same(check, lambda *a: ops.layer_norm(*a, 1e-5), [x[:0], weight, bias])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_wise(check, dtype):
    x, up = torch.randn(2, 3, 301, 257).to(dtype).unbind(0)
    scale = torch.randn(257).to(dtype)
    for needs in check.subsets(3):
        same(check, ops.swiglu, [x, up, scale], needs)
    for needs in check.subsets(2):
        same(check, ops.gelu, [x, scale], needs)
        same(check, lambda *a: ops.gelu(*a, approximate="tanh"), [x, scale], needs)
        same(check, ops.rescale, [x, scale], needs)
    heads, angle = torch.randn(2, 7, 3, 80).to(dtype).transpose(1, 2), torch.rand(7, 10).repeat(1, 2)
    for tables in (
        [angle.cos().to(dtype), angle.sin().to(dtype)],
        [t.to(torch.promote_types(dtype, torch.float32)) for t in (angle.cos(), angle.sin())],
    ):
        same(check, ops.rotary, [heads, *tables], (True, False, False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy(check, dtype, reduction):
    hidden, weight, bias = torch.randn(60, 64).to(dtype), (torch.randn(5003, 64) / 8).to(dtype), torch.randn(5003).to(dtype)
    labels = torch.randint(0, 5003, (60,))
    labels[::3] = -100
    for smoothing in (0.0, 0.1):
        options = {"reduction": reduction, "label_smoothing": smoothing}
        same(check, lambda *a, o=options: ops.linear_cross_entropy(*a, **o), [hidden, weight, bias, labels], (True, True, True, False))
