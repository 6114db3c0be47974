"""csrc/autograd against the Functions in Python: the same bits, the same tensors saved, the same refusals."""

import gc
import importlib
import itertools
import threading
import weakref

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastpeft import _library, ops
from fastpeft.ops import _common
from fastpeft.ops._recompute import mark_recomputable

lora_linear = importlib.import_module("fastpeft.ops.lora_linear")
if _library.FORCED not in ("", "native"):
    pytest.skip("the same in every mode", allow_module_level=True)


@pytest.fixture
def in_python(monkeypatch):
    """Everything from here on by Python's Functions, and LoRA's products formed in Python."""

    def switch():
        monkeypatch.setattr(_library, "autograd", None)
        monkeypatch.setattr(lora_linear, "_forward", lora_linear._fwd)
        monkeypatch.setattr(lora_linear, "_backward", lora_linear._bwd)

    return switch


def norm_inputs(dtype, masters):
    torch.manual_seed(0)
    x, residual = (torch.randn(3, 5, 24).to(dtype) for _ in range(2))
    return x, residual, torch.randn(24).to(masters), torch.randn(24).to(masters)


NORMS = {
    "layer_norm": lambda x, r, w, b: (ops.layer_norm(x, w, b, 1e-5),),
    "layer_norm without parameters": lambda x, r, w, b: (ops.layer_norm(x * 1, None, None, 1e-5),),
    "layer_norm of columns": lambda x, r, w, b: (ops.layer_norm(x.transpose(0, 1), w, None),),
    "add_layer_norm": lambda x, r, w, b: ops.add_layer_norm(x, r, w, b, 1e-5),
    "add_layer_norm, its sum": lambda x, r, w, b: ops.add_layer_norm(x, r, w, b)[1:],
    "add_layer_norm, its norm": lambda x, r, w, b: ops.add_layer_norm(x, r, w, b)[:1],
    "rms_norm": lambda x, r, w, b: (ops.rms_norm(x, w, 1e-6),),
    "add_rms_norm": lambda x, r, w, b: ops.add_rms_norm(x, r, w, 1e-6),
    "add_rms_norm, its sum": lambda x, r, w, b: ops.add_rms_norm(x, r, None)[1:],
}


def taken(function, tensors, subset):
    """(outputs, gradients, what was saved) of ``function``; the tensors in ``subset`` have gradients."""
    leaves = [t.clone().requires_grad_(i in subset) for i, t in enumerate(tensors)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append((t.shape, t.dtype, t.detach().clone())) or t, lambda t: t):
        outputs = function(*leaves)
    live = [y for y in outputs if y.requires_grad]
    if live:
        torch.manual_seed(1)
        torch.autograd.backward(live, [torch.randn(y.shape).to(y.dtype) for y in live])
    return [y.detach() for y in outputs], [leaf.grad for leaf in leaves], saved


def assert_same(ours, theirs):
    for a, b in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.dtype == b.dtype and a.shape == b.shape and a.is_contiguous() == b.is_contiguous() and torch.equal(a, b))
    assert [s[:2] for s in ours[2]] == [s[:2] for s in theirs[2]]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(ours[2], theirs[2]))


def subsets(n):
    return [set(c) for k in range(n + 1) for c in itertools.combinations(range(n), k)]


@pytest.mark.parametrize("name", NORMS)
def test_norms_are_the_same_for_every_subset(name, in_python):
    cases = [(norm_inputs(dtype, masters), s) for dtype, masters in DTYPES for s in subsets(4)]
    ours = [taken(NORMS[name], *case) for case in cases]
    in_python()
    for got, case in zip(ours, cases):
        assert_same(got, taken(NORMS[name], *case))


DTYPES = [(torch.float64,) * 2, (torch.float32,) * 2, (torch.bfloat16, torch.float32)]


def lora_inputs(dtype, masters, rank):
    """x, and three projections: the first and the last have branches, of different ranks."""
    torch.manual_seed(0)
    x, weights = torch.randn(2, 7, 12).to(dtype), [torch.randn(n, 12).to(dtype) for n in (12, 8, 20)]
    biases = [torch.randn(12).to(dtype), torch.randn(8).to(dtype)]
    branches = [torch.randn(rank, 12), torch.randn(12, rank), torch.randn(3, 12), torch.randn(20, 3)]
    return [x, *weights, *biases, *(t.to(masters) for t in branches)]


def three(x, w1, w2, w3, b1, b2, A1, B1, A3, B3):
    return ops.lora_linears(x, [(w1, b1, A1, B1, 0.5), (w2, b2), (w3, None, A3, B3, 2.0)])


LORA = {
    "one": lambda x, w1, w2, w3, b1, b2, A1, B1, A3, B3: (ops.lora_linear(x, w1, b1, A1, B1, 0.7),),
    "no branch": lambda x, w1, *rest: (ops.lora_linear(x, w1, None, None, None),),
    "columns": lambda x, w1, w2, w3, b1, b2, A1, B1, A3, B3: (ops.lora_linear(x.transpose(0, 1), w1, None, A1, B1, 0.7),),
    "three": three,
    "one of three is used": lambda *tensors: three(*tensors)[2:],
    "after a norm": lambda x, *rest: three(ops.layer_norm(x, None, None), *rest),
    "after a sum": lambda x, *rest: three(ops.add_rms_norm(x, x, None)[0], *rest),
    "a row": lambda x, *rest: three(x[0, 0], *rest),
    "no rows": lambda x, *rest: three(x[:0], *rest),
}


def dropped(x, w1, w2, w3, b1, b2, A1, B1, A3, B3):
    torch.manual_seed(2)
    return ops.lora_linears(x, [(w1, b1, A1, B1, 0.5), (w3, None, A3, B3, 2.0)], 0.3)


@pytest.mark.parametrize("name", LORA)
def test_lora_is_the_same_for_every_kind_of_subset(name, in_python):
    kinds = [{0}, {1, 2, 3}, {4, 5}, {6, 8}, {7, 9}, {6}, {9}]  # x, weights, biases, lora_A, lora_B, one of each
    chosen = [set().union(*(kinds[i] for i in s)) for s in subsets(5)] + [{0, *kinds[5]}, kinds[6], {0, *kinds[5], *kinds[6]}]
    cases = [(lora_inputs(torch.float32, torch.float32, 4), s) for s in chosen]
    cases += [(lora_inputs(d, m, r), {0, 6, 7, 8, 9}) for d, m in DTYPES for r in (4, 17)]
    ours = [taken(LORA[name], *case) for case in cases]
    in_python()
    for got, case in zip(ours, cases):
        assert_same(got, taken(LORA[name], *case))


@pytest.mark.parametrize("function", [*LORA.values(), dropped], ids=[*LORA, "dropout"])
def test_products_of_a_gpu(function, monkeypatch, check):
    """They are ATen's, so any device can form them; as near to float64 as Python's are, in each dtype, for each kind of gradient."""
    ext = _library.autograd
    pairs, chosen = [*DTYPES, (torch.float16,) * 2], ({0}, {6, 8}, {0, 7, 9}, set(range(10)))
    cases = [(lora_inputs(*pair, 4), subset) for pair in pairs for subset in chosen]
    truth = [taken(function, [t.double() for t in tensors], subset) for tensors, subset in cases]
    theirs = [taken(function, *case) for case in cases]
    monkeypatch.setattr(_library, "autograd", None)
    monkeypatch.setattr(lora_linear, "_forward", ext.lora_linears_fwd_on_gpu)
    monkeypatch.setattr(lora_linear, "_backward", ext.lora_linears_bwd_on_gpu)
    for case, want, other in zip(cases, truth, theirs):
        got, eps = taken(function, *case), torch.finfo(case[0][0].dtype).eps
        for a, exact, b in zip(got[0] + got[1], want[0] + want[1], other[0] + other[1], strict=True):
            assert (a is None) == (exact is None)
            if a is not None:
                assert a.dtype == b.dtype
                assert check.error(a, exact) <= 2 * check.error(b, exact) + 4 * eps


class Launches(TorchDispatchMode):
    """ATen's operators that compute or copy: on a GPU a launch each."""

    FREE = ("t", "view", "reshape", "transpose", "detach", "narrow", "slice", "split_with_sizes", "_unsafe_view", "empty")

    def __enter__(self):
        self.seen = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        self.seen += [] if name in self.FREE else [name]
        return func(*args, **(kwargs or {}))


# of one branch: S, and the branch in y's product; then dS and dB, dx's two, dA
@pytest.mark.parametrize(
    "needs, need_dx, most", [(12, True, 5), (0, True, 3), (4, True, 4), (8, True, 4), (12, False, 3), (4, False, 2), (8, False, 1)]
)
def test_launches_on_a_gpu(needs, need_dx, most):
    """As many as there are products. Several branches: one copy of all A, one of each dA; a cast of all A of another dtype."""
    ext, trained = _library.autograd, bool(needs & 4) + bool(needs & 8)
    for n, bias, wide in itertools.product((1, 3), (False, True), (False, True)):
        x, dy, (weight, A, B) = *torch.randn(2, 20, 16).bfloat16().unbind(0), (torch.randn(s, 16).bfloat16() for s in (16, 4, 4))
        A, B = (t.float() if wide else t for t in (A, B.t()))
        parts, biases = ([weight] * n, [A] * n, [B] * n), [weight[0] if bias else None] * n
        with Launches() as forward:
            *_, S = ext.lora_linears_fwd_on_gpu(x, parts[0], biases, *parts[1:], [2.0] * n, 0.0, None)
        joint = n > 1
        assert len(forward.seen) == 1 + 2 * n + joint + wide * (1 + n), forward.seen
        with Launches() as backward:
            ext.lora_linears_bwd_on_gpu([dy] * n, x, *parts, S, [2.0] * n, 0.0, None, need_dx, [needs] * n)
        once = need_dx + bool(needs & 4)  # products of all branches together
        casts = wide * (n * trained + need_dx + n * bool(need_dx or needs & 4))  # of each gradient, of all A, of each B
        clones = n if joint and needs & 4 and not wide else 0
        assert len(backward.seen) == once + n * (most - once) + (joint and need_dx) + casts + clones, backward.seen


def test_dropout_is_the_same(in_python):
    case = lora_inputs(torch.float32, torch.float32, 4), {0, 1, 6, 7, 8, 9}
    ours = taken(dropped, *case)
    in_python()
    assert_same(ours, taken(dropped, *case))


def calls():
    """One call of each Function, of leaves that have gradients."""
    x, residual, weight, bias = (t.requires_grad_() for t in norm_inputs(torch.float32, torch.float32))
    tensors = [t.requires_grad_() for t in lora_inputs(torch.float32, torch.float32, 4)]
    return {
        "LayerNorm": (lambda: ops.layer_norm(x, weight, bias), [x, weight, bias]),
        "RMSNorm": (lambda: ops.add_rms_norm(x, residual, weight)[0], [x, weight, residual]),
        "LoRALinears": (lambda: three(*tensors)[0], [tensors[i] for i in (0, 1, 4, 6, 7)]),
    }


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "LoRALinears"])
def test_what_serves_and_what_it_refuses(name):
    call, leaves = calls()[name]
    assert name in call().grad_fn.name() and "CppNode" in call().grad_fn.name()
    y = call()
    first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=f"fastpeft: {name} has no second derivative; call fastpeft.restore"):
        torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    y = call()
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
    y = call()
    with torch.no_grad():
        leaves[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "LoRALinears"])
def test_what_python_takes(name):
    """Subclasses and modes have their say, forward mode and torch.func their error, and autocast its casts."""
    call, leaves = calls()[name]

    class Told(TorchFunctionMode):
        seen = ()

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.seen += (str(function),)
            return function(*args, **(kwargs or {}))

    with Told() as told:
        assert "CppNode" not in call().grad_fn.name()
    assert any("fastpeft" in function for function in told.seen)
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(leaves[0], torch.ones_like(leaves[0]))
        with pytest.raises(RuntimeError, match="has a gradient in PyTorch's autograd only"):
            ops.rms_norm(x, None)
    with pytest.raises(RuntimeError, match="has a gradient in PyTorch's autograd only"):
        torch.func.grad(lambda x: ops.rms_norm(x, None).sum())(leaves[0].detach())
    with torch.autocast("cpu", torch.bfloat16):
        y = call()
        assert y.dtype == (torch.bfloat16 if name == "LoRALinears" else torch.float32)
        grads = torch.autograd.grad(y.float().sum(), leaves)
    assert all(g.dtype == leaf.dtype for g, leaf in zip(grads, leaves))
    assert _common.in_cpp("rms_norm", torch.ones(2, 3), None, torch.ones(3), 1e-6) is None  # no gradient
    assert _common.in_cpp("rms_norm", torch.ones(2, 3, requires_grad=True), None, torch.ones(4), 1e-6) is None
    with pytest.raises(ValueError, match="weight has shape"):
        ops.rms_norm(torch.ones(2, 3, requires_grad=True), torch.ones(4))
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor"):
        ops.layer_norm([1.0], None, None)


def test_a_recipe_runs_in_backward_and_goes_with_the_graph():
    x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    ran = []

    class Double:
        def __call__(self, t):
            ran.append(torch.is_grad_enabled())
            return t * 2

    recipe = Double()
    alive = weakref.ref(recipe)
    y = ops.lora_linear(mark_recomputable(x * 2, recipe, x), weight, None, None, None)
    del recipe
    worker = threading.Thread(target=lambda: y.sum().backward())  # another thread than the one that made the graph
    worker.start()
    worker.join()
    assert ran == [False]
    assert torch.allclose(weight.grad, (2 * x).sum(0).expand(5, 6))
    del y, worker
    gc.collect()
    assert alive() is None

    y = ops.lora_linear(mark_recomputable(x * 2, lambda t: t.nothing, x), weight, None, None, None)
    with pytest.raises(AttributeError, match="nothing"):
        y.sum().backward()


@pytest.mark.slow
def test_compiled_autograd_looks_into_pythons():
    from torch._dynamo import compiled_autograd

    call, leaves = calls()["LoRALinears"]
    want = torch.autograd.grad(call().sum(), leaves)
    with compiled_autograd._enable(lambda graph: graph):
        call().sum().backward()
    assert all(torch.equal(leaf.grad, g) for leaf, g in zip(leaves, want))


def test_a_change_in_place_of_what_a_layer_returned():
    x, weight, A, B = (torch.randn(n, 6, requires_grad=True) for n in (4, 6, 2, 6))
    y = ops.lora_linear(x, weight, None, A, B[:, :2])
    y += 1
    y[0] = 0
    y.sum().backward()
    assert torch.equal(x.grad[0], torch.zeros(6)) and x.grad[1].abs().sum() > 0


def test_the_name_is_that_of_the_build():
    assert _library.autograd is not None, _library.autograd_missing
    assert _library.autograd.__name__.split(".")[-1] == _library.autograd_name(torch.__version__)
    assert _library.autograd_name("2.10.1+cu128") == "_autograd_2_2_10_1_cu128"
