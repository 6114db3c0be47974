"""GELU, SwiGLU and GEGLU, each with an optional (IA)^3 scale on its output, saving only their inputs; and SiLU and products for other
units.

    gelu:    a = x Phi(x)             y = a l     dx = dy l gelu'(x)
    swiglu:  a = silu(gate) up        y = a l     dgate = dy l up silu'(gate)     dup = dy l silu(gate)
    geglu:   the same with gelu in place of silu
    all:     dl = sum_rows dy a                   silu(z) = z sigma(z),  silu'(z) = sigma(z) (1 + z (1 - sigma(z)))

Source: Hendrycks, Gimpel (2016); Shazeer, "GLU Variants Improve Transformer" (2020), eq. 6; Liu et al. (2022), eq. 1 for l_ff.
Shapes: x, gate, up, y [..., N]; scale l [N]. Accumulation: float32 (float64 for float64), one rounding.

| gradient needed for | saved by gelu | saved by swiglu and geglu   |
|---------------------|---------------|-----------------------------|
| x, gate, or scale   | x, scale      | gate, up, scale             |
| up only             |               | gate, scale; up is let go   |
| none                | nothing       | nothing                     |

silu(x, alpha) = x sigma(alpha x) saves x. multiply(a, b) = a b saves what backward recomputes a and b from, where it can: for
a = quick_gelu(gate) and b = up, gate and up.

The activation itself is never saved: backward recomputes it, for dl too, so l_ff costs no activation of its own; nor does the linear layer
that follows save it (see _recompute.py).
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function

from fastpeft import _library
from fastpeft.ops._autocast import first_order, under_autocast
from fastpeft.ops._common import accumulator, check_affine, check_floating, wants_grad
from fastpeft.ops._recompute import mark_recomputable, recipe_of, recompute, recompute_all, to_save, to_save_all

aten = torch.ops.aten


def gelu_reference(x: Tensor, scale: Tensor | None = None, approximate: str = "none") -> Tensor:
    acc = accumulator(x.dtype)
    y = F.gelu(x.to(acc), approximate=approximate)
    return (y if scale is None else y * scale.to(acc)).to(x.dtype)


def swiglu_reference(gate: Tensor, up: Tensor, scale: Tensor | None = None) -> Tensor:
    acc = accumulator(gate.dtype)
    y = F.silu(gate.to(acc)) * up.to(acc)
    return (y if scale is None else y * scale.to(acc)).to(gate.dtype)


def geglu_reference(gate: Tensor, up: Tensor, scale: Tensor | None = None, approximate: str = "none") -> Tensor:
    acc = accumulator(gate.dtype)
    y = F.gelu(gate.to(acc), approximate=approximate) * up.to(acc)
    return (y if scale is None else y * scale.to(acc)).to(gate.dtype)


def _dense(like: Tensor, value: Tensor) -> Tensor:
    """``value`` rounded to the dtype of ``like``, contiguous and never an alias of an input."""
    return like.new_empty(like.shape).copy_(value)


def _sum_rows(value: Tensor, scale: Tensor) -> Tensor:
    return value.reshape(-1, scale.shape[0]).sum(0).to(scale.dtype)


def _gelu_fwd(x, scale, approximate):
    return _dense(x, gelu_reference(x, scale, approximate))


def _gelu_bwd(dy, x, scale, approximate, need_dx, need_dscale):
    acc = accumulator(x.dtype)
    dy, wide = dy.to(acc), x.to(acc)
    dscale = _sum_rows(dy * F.gelu(wide, approximate=approximate), scale) if need_dscale else x.new_empty(0)
    if not need_dx:
        return x.new_empty(0), dscale
    return _dense(x, aten.gelu_backward(dy if scale is None else dy * scale, wide, approximate=approximate)), dscale


_gelu_forward = _library.define(
    "gelu_fwd(Tensor x, Tensor? scale, str approximate) -> Tensor",
    fake=lambda x, scale, approximate: x.new_empty(x.shape),
    composite=_gelu_fwd,
)
_gelu_backward = _library.define(
    "gelu_bwd(Tensor dy, Tensor x, Tensor? scale, str approximate, bool need_dx, bool need_dscale) -> (Tensor dx, Tensor dscale)",
    fake=lambda dy, x, scale, approximate, need_dx, need_dscale: (
        x.new_empty(x.shape if need_dx else 0),
        scale.new_empty(scale.shape) if need_dscale else x.new_empty(0),
    ),
    composite=_gelu_bwd,
)


# Where ATen's own op serves as well: gelu by erf. By tanh, ATen's takes twice csrc's time on the CPU (788 x 3072, fp32, Intel Xeon, one
# thread: forward 4.6 and 2.1 ms, backward 5.1 and 2.6; by erf 1.7 and 1.5, 2.9 and 2.7).
NATIVE_TANH = _library.backend_of()["gelu_fwd"]["CPU"] == "native"


class _GELU(Function):
    @staticmethod
    def forward(ctx, x, scale, approximate):
        ctx.approximate = approximate
        ctx.recipe, kept = to_save(x)
        ctx.save_for_backward(scale, *kept)
        return _gelu_forward(x, scale, approximate)

    @staticmethod
    @first_order
    def backward(ctx, dy):
        need_dx, need_dscale, _ = ctx.needs_input_grad
        scale, *kept = ctx.saved_tensors
        dx, dscale = _gelu_backward(dy, recompute(ctx.recipe, kept), scale, ctx.approximate, need_dx, need_dscale)
        return dx if need_dx else None, dscale if need_dscale else None, None


def _check_kind(op: str, approximate: str) -> None:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"{op}: approximate={approximate!r}; use 'none' or 'tanh'")


@under_autocast("promote")
def gelu(x: Tensor, scale: Tensor | None = None, approximate: str = "none") -> Tensor:
    """GELU of ``x`` [..., N], times ``scale`` [N] if given; ``approximate`` is "none" (erf) or "tanh".

    Raises ValueError or TypeError where shapes or dtypes do not fit.
    """
    check_floating("gelu", x=x, scale=scale)
    _check_kind("gelu", approximate)
    native = NATIVE_TANH and approximate == "tanh" and x.device.type == "cpu" and not torch.compiler.is_compiling()
    if scale is None and recipe_of(x) is None and not native:  # nothing to fuse: ATen's own op saves x alone, as ours would
        return mark_recomputable(F.gelu(x, approximate=approximate), partial(F.gelu, approximate=approximate), x)
    if scale is not None:
        check_affine("gelu", x, scale=scale)
    if wants_grad(x, scale):
        return mark_recomputable(_GELU.apply(x, scale, approximate), partial(_gelu_forward, approximate=approximate), x, scale)
    return _gelu_forward(x, scale, approximate)


def _swiglu_fwd(gate, up, scale):
    return _dense(gate, swiglu_reference(gate, up, scale))


def _swiglu_bwd(dy, gate, up, scale, need_dgate, need_dup, need_dscale):
    acc = accumulator(gate.dtype)
    dy, gate32 = dy.to(acc), gate.to(acc)
    sigma = torch.sigmoid(gate32)
    silu = gate32 * sigma
    up32 = None if up is None else up.to(acc)
    dscale = _sum_rows(dy * silu * up32, scale) if need_dscale else gate.new_empty(0)
    da = dy if scale is None else dy * scale
    dgate = _dense(gate, da * up32 * (sigma * (1 + gate32 * (1 - sigma)))) if need_dgate else gate.new_empty(0)
    return dgate, _dense(gate, da * silu) if need_dup else gate.new_empty(0), dscale


_swiglu_forward = _library.define(
    "swiglu_fwd(Tensor gate, Tensor up, Tensor? scale) -> Tensor",
    fake=lambda gate, up, scale: gate.new_empty(gate.shape),
    composite=_swiglu_fwd,
)
_swiglu_backward = _library.define(
    "swiglu_bwd(Tensor dy, Tensor gate, Tensor? up, Tensor? scale, bool need_dgate, bool need_dup, bool need_dscale)"
    " -> (Tensor dgate, Tensor dup, Tensor dscale)",
    fake=lambda dy, gate, up, scale, need_dgate, need_dup, need_dscale: (
        gate.new_empty(gate.shape if need_dgate else 0),
        gate.new_empty(gate.shape if need_dup else 0),
        scale.new_empty(scale.shape) if need_dscale else gate.new_empty(0),
    ),
    composite=_swiglu_bwd,
)


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx, gate, up, scale):
        need_dgate, _, need_dscale = ctx.needs_input_grad
        ctx.recipe, kept = to_save_all(gate, up if need_dgate or need_dscale else None)
        ctx.save_for_backward(scale, *kept)
        return _swiglu_forward(gate, up, scale)

    @staticmethod
    @first_order
    def backward(ctx, dy):
        scale, *kept = ctx.saved_tensors
        grads = _swiglu_backward(dy, *recompute_all(ctx.recipe, kept), scale, *ctx.needs_input_grad)
        return tuple(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad))


def _check_gated(op: str, gate: Tensor, up: Tensor, scale: Tensor | None) -> None:
    check_floating(op, gate=gate, up=up, scale=scale)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"{op}: gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} must match")
    if scale is not None:
        check_affine(op, gate, scale=scale)


@under_autocast("promote")
def swiglu(gate: Tensor, up: Tensor, scale: Tensor | None = None) -> Tensor:
    """``silu(gate) * up`` [..., N], times ``scale`` [N] if given.

    Raises ValueError or TypeError where shapes or dtypes do not fit.
    """
    _check_gated("swiglu", gate, up, scale)
    if wants_grad(gate, up, scale):
        return mark_recomputable(_SwiGLU.apply(gate, up, scale), _swiglu_forward, gate, up, scale)
    return _swiglu_forward(gate, up, scale)


def _geglu_fwd(gate, up, scale, approximate):
    return _dense(gate, geglu_reference(gate, up, scale, approximate))


def _geglu_bwd(dy, gate, up, scale, approximate, need_dgate, need_dup, need_dscale):
    acc = accumulator(gate.dtype)
    dy, wide = dy.to(acc), gate.to(acc)
    a = F.gelu(wide, approximate=approximate)
    up32 = None if up is None else up.to(acc)
    dscale = _sum_rows(dy * a * up32, scale) if need_dscale else gate.new_empty(0)
    da = dy if scale is None else dy * scale
    dgate = _dense(gate, aten.gelu_backward(da * up32, wide, approximate=approximate)) if need_dgate else gate.new_empty(0)
    return dgate, _dense(gate, da * a) if need_dup else gate.new_empty(0), dscale


_geglu_forward = _library.define(
    "geglu_fwd(Tensor gate, Tensor up, Tensor? scale, str approximate) -> Tensor",
    fake=lambda gate, up, scale, approximate: gate.new_empty(gate.shape),
    composite=_geglu_fwd,
)
_geglu_backward = _library.define(
    "geglu_bwd(Tensor dy, Tensor gate, Tensor? up, Tensor? scale, str approximate, bool need_dgate, bool need_dup, bool need_dscale)"
    " -> (Tensor dgate, Tensor dup, Tensor dscale)",
    fake=lambda dy, gate, up, scale, approximate, need_dgate, need_dup, need_dscale: (
        gate.new_empty(gate.shape if need_dgate else 0),
        gate.new_empty(gate.shape if need_dup else 0),
        scale.new_empty(scale.shape) if need_dscale else gate.new_empty(0),
    ),
    composite=_geglu_bwd,
)


class _GEGLU(Function):
    @staticmethod
    def forward(ctx, gate, up, scale, approximate):
        need_dgate, _, need_dscale, _ = ctx.needs_input_grad
        ctx.approximate = approximate
        ctx.recipe, kept = to_save_all(gate, up if need_dgate or need_dscale else None)
        ctx.save_for_backward(scale, *kept)
        return _geglu_forward(gate, up, scale, approximate)

    @staticmethod
    @first_order
    def backward(ctx, dy):
        scale, *kept = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        grads = _geglu_backward(dy, *recompute_all(ctx.recipe, kept), scale, ctx.approximate, *needs)
        return *(grad if need else None for grad, need in zip(grads, needs)), None


@under_autocast("promote")
def geglu(gate: Tensor, up: Tensor, scale: Tensor | None = None, approximate: str = "none") -> Tensor:
    """``gelu(gate) * up`` [..., N], times ``scale`` [N] if given; ``approximate`` is "none" (erf) or "tanh".

    Raises ValueError or TypeError where shapes or dtypes do not fit.
    """
    _check_gated("geglu", gate, up, scale)
    _check_kind("geglu", approximate)
    if wants_grad(gate, up, scale):
        again = partial(_geglu_forward, approximate=approximate)
        return mark_recomputable(_GEGLU.apply(gate, up, scale, approximate), again, gate, up, scale)
    return _geglu_forward(gate, up, scale, approximate)


def _silu(x, alpha):
    return F.silu(x) if alpha == 1.0 else F.silu(x * alpha).mul_(1 / alpha)


class _SiLU(Function):
    @staticmethod
    def forward(ctx, x, alpha):
        ctx.alpha = alpha
        ctx.recipe, kept = to_save(x)
        ctx.save_for_backward(*kept)
        return _silu(x, alpha)

    @staticmethod
    @first_order
    def backward(ctx, dy):
        x = recompute(ctx.recipe, ctx.saved_tensors)
        return aten.silu_backward(dy, x if ctx.alpha == 1.0 else x * ctx.alpha), None


def silu(x: Tensor, alpha: float = 1.0) -> Tensor:
    """``x sigma(alpha x)``, of any shape: SiLU, and for alpha = 1.702 quick GELU. Saves x alone."""
    if alpha == 1.0 and recipe_of(x) is None:  # ATen's own op saves x alone, as ours would
        return mark_recomputable(F.silu(x), F.silu, x)
    again = partial(_silu, alpha=alpha)
    return mark_recomputable(_SiLU.apply(x, alpha), again, x) if wants_grad(x) else again(x)


class _Multiply(Function):
    @staticmethod
    def forward(ctx, a, b):
        need_a, need_b = ctx.needs_input_grad
        ctx.recipe, kept = to_save_all(a if need_b else None, b if need_a else None)
        ctx.save_for_backward(*kept)
        return torch.mul(a, b)

    @staticmethod
    @first_order
    def backward(ctx, dy):
        a, b = recompute_all(ctx.recipe, ctx.saved_tensors)
        return None if b is None else dy * b, None if a is None else dy * a


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """``a * b``, of one shape and dtype; a factor that backward can form again, such as an activation, is not kept. Factors of different
    shapes or dtypes are multiplied as PyTorch does."""
    if a.shape != b.shape or a.dtype != b.dtype or (recipe_of(a) is None and recipe_of(b) is None) or not wants_grad(a, b):
        return a * b
    return mark_recomputable(_Multiply.apply(a, b), torch.mul, a, b)
