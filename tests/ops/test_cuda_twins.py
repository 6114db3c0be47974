"""csrc's CUDA kernels (and the Triton row pass) against their CPU twins: same inputs, both devices. Only where there is a GPU."""

import functools
import importlib

import pytest
import torch

from fastpeft import _library, ops

pytestmark = pytest.mark.gpu
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
WIDTHS = [1, 7, 257, 768, 4096, 4097]


def same(check, fn, inputs, needs=None, floor=1e-3):
    on_cpu = check.run(fn, inputs, needs)
    on_gpu = check.run(fn, [t.cuda() for t in inputs], needs)
    for value, want in zip(on_gpu[0] + on_gpu[1], on_cpu[0] + on_cpu[1]):
        assert (value is None) == (want is None)
        if value is not None:
            assert check.error(value.cpu(), want, floor) <= TOLERANCE[inputs[0].dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", WIDTHS)
def test_norms(check, n, dtype):
    # more rows than the blocks that sum over them; of wide ones few more, for they take seconds on a CPU
    x, residual = torch.randn(2, 3, 301 if n < 4096 else 91, n).to(dtype).unbind(0)
    weight, bias = torch.randn(2, n).to(dtype).unbind(0)
    floor = 1.0 if n == 1 else 1e-3  # of one element, dx is what eps leaves of a difference
    for needs in check.subsets(3):
        same(check, lambda *a: ops.layer_norm(*a, 1e-5), [x, weight, bias], needs, floor)
    for needs in check.subsets(2):
        same(check, lambda *a: ops.rms_norm(*a, 1e-6), [x, weight], needs, floor)
    same(check, lambda *a: ops.add_layer_norm(*a, 1e-5), [x, residual, weight, bias])
    same(check, lambda *a: ops.add_rms_norm(*a, 1e-6), [x, residual, weight])
    same(check, lambda *a: ops.rms_norm(*a, 1e-6), [x[:, ::2], weight])
    same(check, lambda *a: ops.layer_norm(*a, 1e-5), [x[:0], weight, bias])


@pytest.mark.parametrize(("rows", "n"), [(8191, 768), (1601, 4096)])
def test_norms_of_more_rows_than_a_gpu_takes_at_once(check, rows, n):
    """Backward's blocks walk over them, and read ahead."""
    x, weight, bias = (torch.randn(*shape).bfloat16() for shape in ((rows, n), (n,), (n,)))
    for needs in ((True, True, True), (True, False, False), (False, True, True)):
        same(check, lambda *a: ops.layer_norm(*a, 1e-5), [x, weight, bias], needs)
    same(check, lambda *a: ops.add_rms_norm(*a, 1e-6), [x, x.flip(0), weight], (True, True, False))


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "rescale", "gelu"])
def test_a_layer_left_on_the_cpu_is_an_error(name):
    """Of that call alone: a kernel that read the host's memory would end CUDA for the process."""
    x, scale = torch.randn(3, 8, device="cuda"), torch.ones(8)
    op = functools.partial(ops.layer_norm, bias=None) if name == "layer_norm" else getattr(ops, name)
    with pytest.raises(RuntimeError, match="device"):
        op(x, scale)
    assert torch.isfinite(op(x, scale.cuda())).all()


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


INPUTS = importlib.import_module("fastpeft.ops.attention_inputs")  # fastpeft.ops has the function under that name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d, rot", [(128, 128), (64, 32), (80, 20), (256, 256)])
def test_attention_inputs(check, d, rot, dtype):
    """Norms, rotary embedding, factors and a prefix in one pass, and each of them alone; more rows than backward's groups walk at once."""
    q, k, v = torch.randn(2, 301, 7 * d).to(dtype).split([3 * d, 2 * d, 2 * d], -1)
    angle = torch.rand(1, 301, rot // 2).repeat(1, 1, 2)
    tables = [angle.cos().to(dtype), angle.sin().to(dtype)]
    parameters = {"norms": torch.randn(2, d), "factors": torch.randn(2, 2, d), "prefix": torch.randn(2, 2, 3, d)}
    for kinds in (("norms", "factors", "prefix"), ("norms",), ("factors",), ("prefix",), ()):
        given = [t.to(dtype) for kind in kinds for t in parameters[kind]]

        def call(q, k, v, cos, sin, *given, kinds=kinds):
            q, k, v = (t.unflatten(-1, (-1, d)) for t in (q, k, v))
            rest = iter(given)
            how = {kind: (next(rest), next(rest)) for kind in kinds}
            how = INPUTS._How(cos, sin, *(t for kind in parameters for t in how.get(kind, (None, None))))
            return INPUTS._together(q, k, v, how, INPUTS._Form(1e-6, 1.0))

        same(check, call, [q, k, v, *tables, *given], (True, True, True, False, False, *(True for _ in given)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy(check, dtype, reduction):
    hidden, weight, bias = torch.randn(60, 64).to(dtype), (torch.randn(5003, 64) / 8).to(dtype), torch.randn(5003).to(dtype)
    labels = torch.randint(0, 5003, (60,))
    labels[::3] = -100
    for smoothing in (0.0, 0.1):
        options = {"reduction": reduction, "label_smoothing": smoothing}
        same(check, lambda *a, o=options: ops.linear_cross_entropy(*a, **o), [hidden, weight, bias, labels], (True, True, True, False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_op(check, row, dtype):
    """On CUDA as far from float64 as the definition is in the same dtype on the CPU, times four; strides included."""
    if row.random:
        pytest.skip("draws another mask on another device")
    for m, n in ((3, 33), (40, 64), (5, 256)):
        inputs = row.inputs(m, n, dtype)
        views = [t.mT.contiguous().mT if t.dim() > 1 else t for t in inputs]
        wide, needs = [t.double() if t.is_floating_point() else t for t in inputs], row.needs(inputs)
        runs = [(row.call, [t.cuda() for t in views]), (row.reference, inputs), (row.reference, wide)]
        for value, other, exact in zip(*(outputs + grads for outputs, grads in (check.run(*pair, needs) for pair in runs))):
            assert (value is None) == (exact is None)
            if value is not None:
                error, own = check.error(value.cpu(), exact, 1e-3), check.error(other, exact, 1e-3)
                assert error <= 4 * own + TOLERANCE[dtype]


def two_branches(x, A, B, W, b):
    """Two branches and a frozen projection of one input."""
    one = ops.Projection(W, b, A, B, 0.5)
    return ops.lora_linears(x, [one, ops.Projection(W), one._replace(bias=None, scaling=2.0)])


def one_branch(x, A, B, W, b):
    return ops.lora_linear(x, W, b, A, B, 0.5)


@functools.cache
def branches_on_cpu(run, branches, m, k, n, r):
    """(inputs, which need gradients, outputs and gradients): once for all forms, as CPUs without bfloat16 arithmetic take seconds."""
    torch.manual_seed(0)
    sizes = ((m, k), (r, k), (n, r), (n, k), (n,))
    inputs = [(torch.randn(size) * (size[-1] ** -0.5 if i else 1.0)).bfloat16() for i, size in enumerate(sizes)]
    needs = (True, True, True, False, False)
    outputs, grads = run(branches, inputs, needs)
    return inputs, needs, outputs + grads


@pytest.mark.parametrize(
    "m, k, n, r, programs",
    [
        (33, 64, 72, 3, 128),
        (300, 256, 520, 8, 128),
        # of an H100's 128 programs as few as make 1100 rows what 4100 are there: tiles of 32 rows, several to a program, sums over spans;
        # and more than one group of eight blocks of rows
        (1100, 64, 136, 16, 32),
        (300, 328, 2056, 16, 16),  # sums longer than the pipelines have stages
        (304, 256, 520, 8, 4),  # rows in multiples of 16: wide loads of S
    ],
)
def test_passes_of_lora_linear(check, monkeypatch, request, m, k, n, r, programs):
    """At sizes that a CPU without bfloat16 arithmetic bears: branches together, and one alone."""
    from fastpeft.kernels import lora_branch

    monkeypatch.setattr(lora_branch, "PROGRAMS", programs)
    if _library.autograd is not None:  # which forms what is short itself
        before = _library.autograd.set_products_on_cuda(False)
        request.addfinalizer(lambda: _library.autograd.set_products_on_cuda(before))
    for branches in (two_branches, one_branch):
        inputs, needs, on_cpu = branches_on_cpu(check.run, branches, m, k, n, r)
        outputs, grads = check.run(branches, [t.cuda() for t in inputs], needs)
        for value, want in zip(outputs + grads, on_cpu):
            assert (value is None) == (want is None)
            if value is not None:
                assert check.error(value.cpu(), want, 1e-3) <= TOLERANCE[torch.bfloat16]


def test_no_op_waits_for_the_gpu(check, row):
    """A training step, after one that compiled and allocated, with the host's waits forbidden; labels lie on the host."""
    inputs = [t.cuda() if t.is_floating_point() else t for t in row.inputs(8, 64, torch.bfloat16)]
    needs = row.needs(inputs)
    leaves = [t.requires_grad_(need) for t, need in zip(inputs, needs)]

    def step():
        outputs = row.call(*leaves)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        return torch.autograd.grad(outputs, [t for t in leaves if t.requires_grad], [torch.ones_like(o) for o in outputs])

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["lora_linear", "mm_adapter", "norm_mm_adapter"])
def test_dropout_does_not_wait_for_the_gpu(table, name):
    """Its seed is drawn on the host."""
    calls = {
        "lora_linear": lambda *args: ops.lora_linear(*args, 0.5, 0.1),
        "mm_adapter": lambda *args: ops.mm_adapter(*args, 0.7, 1, 0.1),
        "norm_mm_adapter": lambda x, gamma, *args: ops.norm_mm_adapter(x, gamma, 1e-6, *args, 0.7, 1, 0.1),
    }
    leaves = [t.cuda().requires_grad_() for t in table[name].inputs(8, 64, torch.bfloat16)]

    def step():
        y = calls[name](*leaves)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
