"""What attention layers of every backbone share: joint projections, and attention under transformers' own masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpeft import ops
from fastpeft.methods.adapted import AdaptedLinear
from fastpeft.ops._remade import recipe_of
from fastpeft.ops.lora_linear import Projection, lora_linears


def projection_of(linear: nn.Linear) -> Projection:
    if isinstance(linear, AdaptedLinear) and linear.lora_A is not None:
        return Projection(linear.weight, linear.bias, linear.lora_A, linear.lora_B, linear.scaling)
    return Projection(linear.weight, linear.bias)


def project_together(linears: tuple[nn.Linear, ...], x: Tensor) -> tuple[Tensor, ...]:
    """Several projections of one input, without IA3's factors on outputs, which attention folds into q and into its own output."""
    ours = [linear for linear in linears if isinstance(linear, AdaptedLinear)]
    joint = all(type(linear) is nn.Linear or linear in ours for linear in linears)
    joint = joint and not any(linear.ia3_feedforward for linear in ours)
    # what is trained without LoRA joins too where backward can form x again: as one op it does so once, and keeps nothing
    joint = joint and (
        any(linear.lora_A is not None for linear in ours)
        or (any(linear.weight.requires_grad for linear in linears) and torch.is_grad_enabled() and recipe_of(x) is not None)
    )
    if not joint or len({linear.active_dropout for linear in ours if linear.lora_A is not None}) > 1:
        return tuple(linear.before_rescale(x) if linear in ours else linear(x) for linear in linears)
    return lora_linears(x, [projection_of(linear) for linear in linears], max((linear.active_dropout for linear in ours), default=0.0))


def dense_mask_attention(q, k, v, mask, *, prefix, rescale, dropout_p) -> Tensor:
    """Attention under transformers' own [B, 1, M, N] mask, for text models whose outer modules were left as they are."""
    if rescale is not None:
        k, v = k * rescale[0][:, None].to(k.dtype), v * rescale[1][:, None].to(v.dtype)
    if prefix is not None:
        k, v = (torch.cat([p.to(t.dtype).expand(t.shape[0], -1, -1, -1), t], dim=2) for p, t in zip(prefix, (k, v)))
        mask = F.pad(mask, (prefix[0].shape[1], 0), value=True if mask.dtype == torch.bool else 0.0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, enable_gqa=q.shape[1] != k.shape[1])


def as_key_mask(mask: Tensor | None) -> Tensor | None:
    """[B, N] of any dtype -> bool; transformers' 4-D masks pass as they are."""
    return mask if mask is None or mask.dim() == 4 else mask.bool()


def rescaled(linear: nn.Linear, y: Tensor) -> Tensor:
    """``y``, a projection that :func:`project_together` made, with IA3's factor on it where ``linear`` has one."""
    factor = linear.output_rescale if isinstance(linear, AdaptedLinear) else None
    return y if factor is None else ops.rescale(y, factor)


def project(linears: tuple[nn.Linear, ...], x: Tensor) -> tuple[Tensor, ...]:
    """Several projections of one input, each as its own ``forward`` gives it."""
    return tuple(rescaled(linear, y) for linear, y in zip(linears, project_together(linears, x)))


def project_one(linear: nn.Linear, x: Tensor) -> Tensor:
    """``linear(x)``, saving nothing for a trained weight where backward can form ``x`` again."""
    return project((linear,), x)[0]


def key_value_rescale(key: nn.Linear, value: nn.Linear, heads: int) -> tuple[Tensor, Tensor] | None:
    """IA3's (l_k, l_v), each [H, d], as attention takes them; None where neither has one."""
    l_k, l_v = (linear.output_rescale if isinstance(linear, AdaptedLinear) else None for linear in (key, value))
    if l_k is None and l_v is None:
        return None
    l_k, l_v = (torch.ones_like(l_v) if l_k is None else l_k), (torch.ones_like(l_k) if l_v is None else l_v)
    return l_k.view(heads, -1), l_v.view(heads, -1)
