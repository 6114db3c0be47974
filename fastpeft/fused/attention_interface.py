"""Attention of any transformers model that takes its function from ``ALL_ATTENTION_FUNCTIONS``.

The attention layer keeps its own forward, from its projections to its output, and everything it says to others: configuration, name,
signature, masks. Only the function that it looks up is another one, where the one that was set is transformers' "sdpa" or a plain "eager":

    interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)

In the replacing class, that line reads :data:`NAME`, a :class:`Functions`, in place of ``ALL_ATTENTION_FUNCTIONS``: no configuration changes,
so nothing of it can be saved, copied or pickled to where fastpeft is not, ``set_attn_implementation`` means what it meant, and code that asks
for "sdpa" or "eager" (masks, generation, capture of attentions) finds it. The same function is registered under the name "fastpeft", for
those who set it themselves.

The function saves q, k, v, o and lse: neither keys and values once more for every query head, nor an additive mask for each layer. A mask
[B, 1, M, N] that is causality or nothing besides key padding is taken as that. What it does not do exactly it hands on to the function that
was set (:func:`why_not_here`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastpeft import ops
from fastpeft.fused.attention import why_not_fused
from fastpeft.fused.layout import Layout
from fastpeft.registry import fuses_code

NAME = "_fastpeft_attention_functions"
LAYOUT = "fastpeft_layout"  # the keyword argument by which layers hand on where tokens lie
THEIRS = "ALL_ATTENTION_FUNCTIONS"


def reads_interface(cls: type) -> bool:
    """Whether the forward of ``cls`` is a plain function that looks its attention up in transformers' interface."""
    forward = cls.forward
    return isinstance(forward, FunctionType) and not hasattr(forward, "__wrapped__") and THEIRS in forward.__code__.co_names


@fuses_code(reads_interface)
class FusedInterfaceAttention:
    """An attention layer whose function is fastpeft's; all else is its own."""

    @staticmethod
    def why_not(module: nn.Module) -> str:
        """'' or why this one stays as it is."""
        config = getattr(module, "config", None)
        if config is None:
            return "it has no configuration that names its attention function"
        name = config._attn_implementation or "eager"
        return why_not_fused(module) or ("" if name in ("sdpa", "eager") else f"its attention function is {name!r}, which stays")

    @staticmethod
    def forward_of(cls: type) -> FunctionType:
        """The forward of ``cls``, with the function looked up here."""
        theirs = cls.forward
        code = theirs.__code__
        names = tuple(NAME if name == THEIRS else name for name in code.co_names)
        theirs.__globals__.setdefault(NAME, Functions(theirs.__globals__))
        ours = FunctionType(code.replace(co_names=names), theirs.__globals__, theirs.__name__, theirs.__defaults__, theirs.__closure__)
        ours.__kwdefaults__, ours.__doc__, ours.__module__ = theirs.__kwdefaults__, theirs.__doc__, theirs.__module__
        ours.__annotations__, ours.__qualname__ = theirs.__annotations__, theirs.__qualname__
        ours.__dict__.update(theirs.__dict__)
        return ours


class Functions:
    """``ALL_ATTENTION_FUNCTIONS`` of one model file, but for the function that :meth:`get_interface` gives."""

    def __init__(self, namespace: dict[str, Any]):
        self.namespace = namespace

    @property
    def theirs(self):
        return self.namespace[THEIRS]

    def get_interface(self, name: str | None, default: Callable) -> Callable:
        """The attention function for an implementation's name; ``default`` is the model file's eager one."""
        theirs = self.theirs.get_interface(name, default)
        ours = partial(attention_forward, otherwise=theirs) if theirs is sdpa_attention_forward else theirs
        return partial(of_real_tokens, ours)

    def __getattr__(self, name: str):
        return getattr(self.theirs, name)

    def __getitem__(self, name: str) -> Callable:
        return self.theirs[name]

    def __contains__(self, name: str) -> bool:
        return name in self.theirs


def of_real_tokens(function: Callable, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs):
    """``function``, an attention function, where ``fastpeft_layout`` among the keyword arguments says that query, key and value [1, H, T, d]
    are those of real tokens only: they are padded for it, as the mask is."""
    layout = kwargs.pop(LAYOUT, None)
    if layout is None:
        return function(module, query, key, value, *args, **kwargs)
    padded = [_pad(layout, x) for x in (query, key, value)]
    output, weights = function(module, *padded, *args, **kwargs)
    B, L, H, d = output.shape
    return layout.unpad(output.reshape(B, L, H * d)).view(1, -1, H, d), weights


def _pad(layout: Layout, x: Tensor) -> Tensor:
    """[1, H, T, d] -> [B, H, L, d]."""
    _, H, T, d = x.shape
    return layout.pad(x.transpose(1, 2).reshape(T, H * d)).view(layout.rows, layout.columns, H, d).transpose(1, 2)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    *,
    otherwise: Callable = sdpa_attention_forward,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """An attention function as transformers calls it: query [B, H, M, d], key and value [B, H_kv, N, d] -> ([B, M, H, d], None).

    The mathematics of transformers' "sdpa"; ``otherwise`` computes what :func:`why_not_here` names."""
    mask, causal = attention_mask, getattr(module, "is_causal", True) if is_causal is None else is_causal
    if why_not_here(module, query, key, value, mask, scaling, causal, position_bias, kwargs):
        kwargs |= {} if is_causal is None else {"is_causal": is_causal}
        kwargs |= {} if position_bias is None else {"position_bias": position_bias}
        return otherwise(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    M, N = query.shape[2], key.shape[2]
    causal = bool(causal) and M > 1 and mask is None
    if causal and N > M:  # a cache of fixed size, not yet filled: causality is aligned at the first key
        key, value = key[:, :, :M], value[:, :, :M]
        position_bias = None if position_bias is None else position_bias[..., :M]
    given: dict[str, Any] = {"causal": causal, "bias": position_bias}
    if mask is not None:
        given |= pattern_of(mask, query)
    return ops.attention(query, key, value, scale=scaling, dropout_p=dropout, **given).transpose(1, 2).contiguous(), None


def why_not_here(module, query, key, value, mask, scaling, causal, position_bias, options) -> str:
    """'' or why this call is for the function that was set. Where no gradient is asked for, and under torch.compile, whose partitioner
    chooses what is kept, nothing is gained."""
    tensors = (query, key, value)
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        return "nothing is kept for backward"
    if given := [name for name in ("softcap", "s_aux", "cache") if options.get(name) is not None]:
        return f"{given[0]} is given"
    if any(t.dim() != 4 for t in tensors) or key.shape != value.shape or query.shape[::3] != key.shape[::3]:
        return "its queries, keys and values differ in width or batch"
    if query.shape[1] != key.shape[1] * getattr(module, "num_key_value_groups", 1) or len({t.dtype for t in tensors}) > 1:
        return "its heads or dtypes do not match"
    if not isinstance(scaling, int | float | None) or not isinstance(causal, bool):
        return "its scaling or causality is a tensor"
    if causal and mask is None and key.shape[2] < query.shape[2] > 1:
        return "causality over fewer keys than queries"
    on_cpu = query.device.type == "cpu"
    if (mask is not None or position_bias is not None) and not on_cpu:
        return "SDPA takes masks and biases here as they are"
    if mask is not None and (mask.dtype != torch.bool or not _broadcasts(mask, query, key)):
        return "its mask is added to the scores"
    if position_bias is not None and (position_bias.requires_grad or not _broadcasts(position_bias, query, key)):
        return "its position bias is trained"
    return ""


def _broadcasts(mask: Tensor, query: Tensor, key: Tensor) -> bool:
    scores = (*query.shape[:3], key.shape[2])
    return mask.dim() == 4 and mask.shape[3] == scores[3] and all(n in (1, size) for n, size in zip(mask.shape, scores))


def pattern_of(mask: Tensor, query: Tensor) -> dict[str, Any]:
    """``mask`` [B or 1, H or 1, M or 1, N] bool, True = attend, as arguments of :func:`fastpeft.ops.attention`: causality and key padding
    where it says no more than these, else itself. A model's layers share one mask: it is read once, and notes what it says."""
    noted = getattr(mask, "_fastpeft_pattern", None)
    if noted is None or noted[0] != mask._version:
        noted = mask._fastpeft_pattern = (mask._version, _read_pattern(mask))
    causal, padding = noted[1]
    if causal is None:
        return {"attn_mask": mask}
    if padding is not None and len(padding) != len(query):
        padding = padding.expand(len(query), -1)
    return {"causal": causal, "key_padding_mask": padding}


def _read_pattern(mask: Tensor) -> tuple[bool | None, Tensor | None]:
    """(causal, key padding [B or 1, N]); causal None: neither."""
    if mask.shape[1] != 1:
        return None, None
    rows = mask[:, 0]
    padding = rows.any(1)  # keys that some query sees
    square = rows.shape[1] == rows.shape[2]
    if bool(rows.eq(padding[:, None]).all()):
        return False, None if bool(padding.all()) else padding
    if square and bool(rows.eq(padding[:, None] & _triangle(rows)).all()):
        return True, None if bool(padding.all()) else padding
    return None, None


def _triangle(rows: Tensor) -> Tensor:
    return torch.ones(rows.shape[1:], dtype=torch.bool, device=rows.device).tril()


ALL_ATTENTION_FUNCTIONS.register("fastpeft", attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register("fastpeft", sdpa_mask)
