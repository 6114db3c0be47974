"""The byte models in the ops' docstrings: how often each wide tensor is read or written, and what is launched. Counted, not timed."""

import importlib
import importlib.util
from pathlib import Path
from unittest import mock

import pytest
import torch

from fastpeft import _library, ops
from fastpeft.ops.prefix_attention import join_prefix, join_prefix_bwd

if _library.FORCED == "composite":
    pytest.skip("the same in every mode", allow_module_level=True)
spec = importlib.util.spec_from_file_location("_traffic", Path(__file__).parents[1] / "_traffic.py")
_traffic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_traffic)

TRITON = _library.FORCED == "triton"
tiles = pytest.mark.skipif(not TRITON, reason="the kernels' own choices")
rows = pytest.mark.skipif(TRITON, reason="the same in every mode")


def counted(function, *tensors, wanted=None):
    """(traffic of forward, of backward): ``wanted`` gradients, or those of all tensors that have one."""
    forward, backward = _traffic.Traffic(), _traffic.Traffic()
    with forward.counted():
        outputs = function(*tensors)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    dys = [torch.randn_like(y) for y in outputs]
    with backward.counted():
        torch.autograd.grad(outputs, wanted or [t for t in tensors if t.requires_grad], dys)
    return forward, backward


M, K, N, R = 144, 96, 160, 4
WIDE = {"x": M * K, "y": M * N, "W": N * K}  # dx has x's size, dy y's
# backend: what forward moves, what backward moves (dx, dA, dB; W is frozen), and how many kernels and products each takes
MODELS = {
    "cpu": ({"x": 2, "y": 3, "W": 1}, {"x": 4, "y": 2, "W": 1}),
    "triton": ({"x": 2, "y": 3, "W": 1}, {"x": 4, "y": 2, "W": 1}, 2, 4),
}


def lora(dtype):
    x, A, B = (torch.randn(s, dtype=dtype, requires_grad=True) for s in ((M, K), (R, K), (N, R)))
    W, b = torch.randn(N, K, dtype=dtype), torch.randn(N, dtype=dtype)
    return counted(lambda x, A, B: ops.lora_linear(x, W, b, A, B, 0.5), x, A, B)


@rows
def test_lora_linear_on_a_cpu():
    forward, backward = lora(torch.float32)
    assert (forward.moved(**WIDE), backward.moved(**WIDE)) == MODELS["cpu"]


@tiles
def test_lora_linear_by_passes():
    forward, backward = lora(torch.bfloat16)
    assert (forward.moved(**WIDE), backward.moved(**WIDE), len(forward.kernels), len(backward.kernels)) == MODELS["triton"]


@rows
def test_projections_of_one_input():
    """q, k, v: x once for all S, and each product's own; one dx, to which each dy adds."""
    x, A, B = (torch.randn(s, requires_grad=True) for s in ((M, K), (R, K), (N, R)))
    W = torch.randn(N, K)
    branch = (W, None, A, B, 0.5)
    forward, backward = counted(lambda x, A, B: ops.lora_linears(x, [branch, (W,), branch]), x, A, B)
    assert forward.moved(**WIDE) == {"x": 1 + 3, "y": 3 + 1 + 3, "W": 3}
    assert backward.moved(**WIDE) == {"x": 1 + 3 * 2 + 1, "y": 2 + 3, "W": 3}


H, T, D, n = 4, 72, 16, 3
HEADS = (2, H, T, D)
QUERIES = 2 * H * T * D


@tiles
def test_excitor_keys():
    """The merge reads k and writes it; beside it the hidden states are read once. Its backward reads the gradient once (in 16 bit)."""
    k, hidden = torch.randn(HEADS).bfloat16(), torch.randn(2, T, H * D).bfloat16()
    parameters = [torch.randn(s).bfloat16().requires_grad_() for s in ((R, H * D), (H * D, R), (5, H * D), (H,))]
    forward, backward = counted(lambda *p: ops.excitor_keys(k, hidden, *p), *parameters)
    assert forward.moved(k=QUERIES) == {"k": 3} and forward.kernels[-1] == "_excitor_merge_fwd_kernel"
    assert backward.moved(k=QUERIES) == {"k": 2}  # dw_down reads the hidden states once more
    assert [name for name in backward.kernels if name.endswith("_kernel")] == [
        "_excitor_scores_kernel", "_lora_pass_kernel", "_excitor_scores_kernel", "_excitor_table_kernel"
    ]  # fmt: skip


@tiles
def test_excitor_turn():
    """q and k are read and written once, by one launch; beside them the hidden states are read. Backward: the pass that turns dQ' and dK'
    back, the parameters' pass over dK', and dw_down's over the hidden states."""
    turn = importlib.import_module("fastpeft.ops.excitor_turn")
    q, k = (torch.randn(HEADS).bfloat16().requires_grad_() for _ in range(2))
    hidden, angle = torch.randn(2, T, H * D).bfloat16(), torch.rand(1, T, D // 2).repeat(1, 1, 2)
    parameters = [torch.randn(s).bfloat16().requires_grad_() for s in ((R, H * D), (H * D, R), (5, H * D), (H,))]
    forward, backward = _traffic.Traffic(), _traffic.Traffic()
    with forward.counted():
        made = turn.excitor_turn(q, k, (angle.cos(), angle.sin()), hidden, *parameters)
    assert forward.moved(k=QUERIES) == {"k": 5} and forward.kernels[-1] == "_excitor_turn_fwd_kernel"
    served, dys = _library.backend_of() | {"attention_inputs_bwd": {"CPU": "native"}}, [torch.randn_like(t) for t in made]
    csrc = mock.patch.object(_library, "backend_of", lambda: served)  # csrc's operator is one launch
    with csrc, mock.patch.object(turn.attention_inputs, "ONE_PASS", {"cpu"}), backward.counted():
        torch.autograd.grad(made, (q, k, *parameters), dys)
    assert backward.moved(k=QUERIES) == {"k": 6}, backward.launches


@tiles
def test_prefix_attention():
    """One launch beside the tokens' attention, whatever N is: q and o in, o out."""
    q, o, do, dq = (torch.randn(HEADS) for _ in range(4))
    lse, prefix = torch.randn(2, H, T), [torch.randn(H, n, D) for _ in range(2)]
    traffic = _traffic.Traffic()
    with traffic.counted():
        o, lse = join_prefix(q, o, lse, *prefix, 0.25)
    assert traffic.moved(q=QUERIES) == {"q": 3} and traffic.kernels == ["_prefix_attention_fwd_kernel"]
    traffic = _traffic.Traffic()
    with traffic.counted():
        join_prefix_bwd(do, q, o, lse, *prefix, dq, 0.25, True)
    assert traffic.moved(q=QUERIES) == {"q": 5} and traffic.kernels == ["_prefix_attention_bwd_kernel"]


@rows
def test_ia3_in_attention():
    """Two passes of two beside q, k, v and o; in backward one of three for each factor with its gradient, and q l_k once more."""
    q, k, v = (torch.randn(2, T, H, D).transpose(1, 2).requires_grad_() for _ in range(3))
    factors = [torch.rand(H, D, requires_grad=True) for _ in range(2)]
    forward, backward = counted(lambda q, k, v, *l: ops.attention(q, k, v, rescale=l), q, k, v, *factors)
    assert forward.moved(q=QUERIES) == {"q": 2 + 4 + 2}
    assert backward.moved(q=QUERIES) == {"q": 3 + 2 + 8 + 3}


@rows
def test_attention_inputs():
    """Sides of unlike sizes: norms and rotations move what one of them would, keys behind a prefix what a rotation would."""
    module = importlib.import_module("fastpeft.ops.attention_inputs")
    sizes = {"q": 2 * T * H * D, "k": 2 * T * D, "behind": 2 * (T + n) * D}
    angle = torch.rand(1, T, D // 2).repeat(1, 1, 2)
    tables, norms, factor = (angle.cos(), angle.sin()), torch.randn(2, D), torch.rand(1, D)
    prefix = torch.randn(2, 1, n, D)
    cases = {
        "norms": (module._How(*tables, *norms), {"q": 2, "k": 2}, {"q": 3, "k": 3}),
        "rotary": (module._How(*tables), {"q": 2, "k": 2}, {"q": 2, "k": 2}),
        "l_k": (module._How(*tables, l_k=factor.requires_grad_()), {"q": 2, "k": 2}, {"q": 2, "k": 3}),
        "prefix": (module._How(*tables, p_k=prefix[0], p_v=prefix[1]), {"q": 2, "k": 2, "behind": 2}, {"q": 2, "k": 2}),
    }
    native = mock.patch.object(_library, "backend_of", lambda: _Everywhere())  # csrc's form is CUDA's: here its operator is counted as one
    for name, (how, *models) in cases.items():
        q, k, v = (torch.randn(2, T, heads, D, requires_grad=True) for heads in (H, 1, 1))
        with native:
            changed = 3 if how.p_k is not None else 2
            passes = counted(lambda *t, how=how, n=changed: module._together(*t, how, module._Form(1e-6))[:n], q, k, v, wanted=[q, k])
        assert [traffic.moved(**sizes) for traffic in passes] == models, name
        assert [len(traffic.launches) for traffic in passes] == [1, 1], name


class _Everywhere(dict):
    def __missing__(self, name):
        return {"CPU": "native"}


@tiles
def test_mm_adapter():
    x, routing = torch.randn(2, 40, 96, requires_grad=True), torch.rand(2, 2)
    parameters = [torch.randn(s, requires_grad=True) for s in ((8, 96), (8,), (2, 96, 4), (2, 96))]
    forward, backward = counted(lambda x, *p: ops.mm_adapter(x, *p, routing), x, *parameters)
    assert (forward.moved(x=x.numel()), len(forward.kernels)) == ({"x": 2}, 1)
    assert forward.programs == backward.programs[:1] == [80 // 16]  # each reads all weights
    assert (backward.moved(x=x.numel()), len(backward.kernels)) == ({"x": 5}, 3)


@rows
def test_row_wise_ops_are_one_pass():
    x, other, weight = torch.randn(70, 96, requires_grad=True), torch.randn(70, 96, requires_grad=True), torch.randn(96, requires_grad=True)
    cos, sin = torch.randn(70, 96), torch.randn(70, 96)
    for name, function, tensors, read in (
        ("layer_norm", ops.layer_norm, (x, weight, weight.detach().clone().requires_grad_()), (2, 3)),
        ("rms_norm", ops.rms_norm, (x, weight), (2, 3)),
        ("add_rms_norm", lambda *t: ops.add_rms_norm(*t)[0], (x, other, weight), (4, 3)),
        ("swiglu", ops.swiglu, (x, other), (3, 5)),
        ("rotary", lambda x: ops.rotary(x, cos, sin), (x,), (4, 4)),  # tables as large as x here
        ("rescale", ops.rescale, (x, weight), (2, 3)),
    ):
        passes = counted(function, *tensors)
        assert tuple(traffic.moved(x=x.numel())["x"] for traffic in passes) == read, name
        assert [len(traffic.launches) for traffic in passes] == [1, 1], name
