"""Attention of any transformers model that takes its function from ``ALL_ATTENTION_FUNCTIONS``.

The attention layer keeps its own forward, from its projections to its output, and everything it says to others: configuration, name,
signature, masks. Only the function that it looks up is another one, where the one that was set is transformers' "sdpa" or a plain "eager":

    interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)

In the replacing class, that line reads a :class:`Functions` in place of ``ALL_ATTENTION_FUNCTIONS``: no configuration changes, so nothing
of it can be saved, copied or pickled to where fastpeft is not, ``set_attn_implementation`` means what it meant, and code that asks for
"sdpa" or "eager" (masks, generation, capture of attentions) finds it. The same function is registered under the name "fastpeft", for those
who set it themselves.

The function saves q, k, v, o and lse: neither keys and values once more for every query head, nor scores and probabilities, nor an additive
mask for each layer; nor o of real tokens beside o, where padding was left out. A mask [B, 1, M, N] that is causality or nothing besides key
padding is taken as that. With soft caps, sinks and trained biases it saves q, k and v. What it does not do exactly it hands on to the
function that was set (:func:`why_not_here`).

The function that turns queries and keys (rotary embedding) is exchanged in the same way (:mod:`fastpeft.fused.attention.rotary`).

An "eager" function is part of the model's file, and reads what it likes: it is known by its code (:data:`EAGER`).
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import cache, partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import output_capturing

from fastpeft import ops
from fastpeft.forms import function_digest
from fastpeft.fused.attention.common import why_not_fused
from fastpeft.fused.attention.masks import MaskContent, adds_nothing, attend_allowed, read_mask
from fastpeft.fused.attention.rotary import Rotary, RotaryOfOne, recomputable
from fastpeft.fused.attention.rotary import kind_of as rotary_kind
from fastpeft.fused.attention.tokens import of_real_tokens, told_of_keys
from fastpeft.fused.layers.shared_input import join_calls
from fastpeft.methods.base import has_hooks
from fastpeft.ops.attention_backends import allowed_keys
from fastpeft.ops.attention_scores import attention_with_scores
from fastpeft.registry import fuses

THEIRS = "ALL_ATTENTION_FUNCTIONS"
OURS = "_fastpeft_{}".format  # the name, in the same file, of what stands in place of a name


class Kind(NamedTuple):
    """What an attention function computes besides softmax(scaling Q K^T + mask) V: of its keywords, or of its module, it reads these."""

    eager: bool = True
    grouped: bool = False  # keys serve module.num_key_value_groups query heads each
    softcap: bool = False
    position_bias: bool = False
    sinks: bool = False


SDPA = Kind(eager=False, grouped=True, position_bias=True)
# Digests (fastpeft.forms.function_digest) of the eager functions in transformers' model files, each with a file that has it.
EAGER = {
    "0c7ae4c17c1c": Kind(grouped=True),  # llama
    "fdeeffa4309e": Kind(grouped=True),  # evolla
    "76bd5c1a51ba": Kind(grouped=True),  # llama4
    "b0fd333eb9d5": Kind(),  # bert
    "aa486789e4ef": Kind(),  # siglip
    "697938f829f9": Kind(),  # clip
    "82de0788fe75": Kind(),  # vit
    "a8fcd00e6f3d": Kind(),  # blip_2
    "c7cd3b05e737": Kind(),  # gpt2
    "cc6b017c42c9": Kind(),  # internvl
    "392a7e982980": Kind(),  # bigbird_pegasus
    "d6630e5a24e2": Kind(position_bias=True),  # t5
    "8956242eae18": Kind(grouped=True, softcap=True),  # gemma2
    "bc8c3e065f77": Kind(grouped=True, sinks=True),  # gpt_oss
    "90634b7d9cb4": Kind(grouped=True, sinks=True),  # openai_privacy_filter
}


@cache
def kind_of(function: Callable) -> Kind | None:
    """What an attention function computes; None where that is not known."""
    if function is sdpa_attention_forward:
        return SDPA
    return EAGER.get(function_digest(function)) if isinstance(function, FunctionType) else None


def reads_interface(cls: type) -> bool:
    """Whether the forward of ``cls`` is a plain function that looks its attention up in transformers' interface."""
    forward = cls.forward
    return isinstance(forward, FunctionType) and not hasattr(forward, "__wrapped__") and THEIRS in forward.__code__.co_names


@fuses(rule=reads_interface)
class FusedInterfaceAttention:
    """An attention layer whose function is fastpeft's; all else is its own."""

    computes_only = staticmethod(lambda module: None)  # its projections are layers that it calls

    @staticmethod
    def why_not(module: nn.Module) -> str:
        """'' or why this one stays as it is."""
        config = getattr(module, "config", None)
        if config is None:
            return "it has no configuration that names its attention function"
        name = config._attn_implementation or "eager"
        if reason := why_not_fused(module):
            return reason
        return "" if name in ("sdpa", "eager") else f"its attention function is {name!r}, which stays"

    @staticmethod
    def forward_of(cls: type) -> FunctionType:
        """The forward of ``cls``, with the function looked up here, and its projections of one input joined."""
        return told_of_keys(looking_up_ours(join_calls(cls.forward)))


def looking_up_ours(theirs: FunctionType) -> FunctionType:
    """A forward of an attention layer, the functions that it looks up ours."""
    code, namespace = theirs.__code__, theirs.__globals__
    kinds = {name: rotary_kind(namespace.get(name)) for name in code.co_names if "rotary" in name}
    others = {name: RotaryOfOne if kind.alone else Rotary for name, kind in kinds.items() if kind is not None}
    for name, make in (others := {THEIRS: Functions} | others).items():
        namespace.setdefault(OURS(name), make(namespace, name))
    names = tuple(OURS(name) if name in others else name for name in code.co_names)
    ours = FunctionType(code.replace(co_names=names), namespace, theirs.__name__, theirs.__defaults__, theirs.__closure__)
    ours.__kwdefaults__, ours.__doc__, ours.__module__ = theirs.__kwdefaults__, theirs.__doc__, theirs.__module__
    ours.__annotations__, ours.__qualname__ = theirs.__annotations__, theirs.__qualname__
    ours.__dict__.update(theirs.__dict__)
    return ours


class Functions:
    """``ALL_ATTENTION_FUNCTIONS`` of one model file, but for the function that :meth:`get_interface` gives."""

    def __init__(self, namespace: dict[str, Any], name: str):
        self.namespace, self.name = namespace, name

    @property
    def theirs(self):
        return self.namespace[self.name]

    def get_interface(self, name: str | None, default: Callable) -> Callable:
        """The attention function for an implementation's name; ``default`` is the model file's eager one."""
        theirs = self.theirs.get_interface(name, default)
        if torch.compiler.is_compiling():
            return theirs
        if not torch.is_grad_enabled() or (kind := kind_of(theirs)) is None:
            return partial(of_real_tokens, theirs)
        return partial(of_real_tokens, partial(attention_forward, otherwise=theirs, kind=kind))

    def __getattr__(self, name: str):
        return getattr(self.theirs, name)

    def __getitem__(self, name: str) -> Callable:
        return self.theirs[name]

    def __contains__(self, name: str) -> bool:
        return name in self.theirs


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
    kind: Kind = SDPA,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """An attention function as transformers calls it: query [B, H, M, d], key and value [B, H_kv, N, d] -> ([B, M, H, d], None).

    Computes what ``otherwise``, of this ``kind``, does, but saves less; what :func:`why_not_here` names ``otherwise`` computes itself."""
    causal = not kind.eager and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    bias = position_bias if kind.position_bias and not adds_nothing(position_bias, attention_mask) else None
    if why_not_here(kind, module, query, key, value, attention_mask, scaling, causal, bias, kwargs):
        kwargs |= {} if is_causal is None else {"is_causal": is_causal}
        kwargs |= {} if position_bias is None else {"position_bias": position_bias}
        return otherwise(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if attention_mask is not None:
        causal, content = False, read_mask(attention_mask)
    else:
        M, N = query.shape[2], key.shape[2]
        causal, content = causal and M > 1, MaskContent()
        if causal and N > M:  # a cache of fixed size, not yet filled: causality is aligned at the first key
            key, value, bias = key[:, :, :M], value[:, :, :M], None if bias is None else bias[..., :M]
    if content.bias is not None:
        added = attention_mask.to(query.dtype)
        bias = added if bias is None else bias + added
    if scaling is None:
        scaling = (module.head_dim if kind.softcap else query.shape[3]) ** -0.5
    extras = {"softcap": kwargs.get("softcap") if kind.softcap else None, "sinks": module.sinks if kind.sinks else None}
    dropout = dropout if module.training or not kind.eager else 0.0
    query = _tokens_first(recomputable(query))
    output = _attend(query, key, value, content, causal, bias, kind.eager, extras, scale=scaling, dropout_p=dropout)
    return _tokens_behind(output, extras), None


def _tokens_behind(output: Tensor, extras: dict[str, Any]) -> Tensor:
    """[B, H, M, d] -> [B, M, H, d], with a note on it where the operator keeps this memory for its backward."""
    laid = output.transpose(1, 2)
    laid._fastpeft_is_kept = laid.is_contiguous() and not any(extra is not None for extra in extras.values())
    return laid.contiguous()


def _tokens_first(query: Tensor) -> Tensor:
    """``query`` [B, H, M, d] with a token's heads side by side in memory. ATen's kernels lay their output out as their queries: what is
    returned then is that output, kept for backward once, and no copy of it, which the output projection would keep too."""
    batch, heads, tokens, _ = query.stride()
    return query if batch >= tokens >= heads else query.transpose(1, 2).contiguous().transpose(1, 2)


def _attend(query, key, value, content: MaskContent, causal: bool, bias, eager: bool, extras, **options) -> Tensor:
    """Attention by the operator that computes the extras; ``causal`` where there is no mask."""
    uniform = eager and content.dead
    if uniform or any(extra is not None for extra in extras.values()) or (bias is not None and bias.requires_grad):
        allowed = allowed_keys(query, key, causal, content.allowed)
        return attention_with_scores(query, key, value, allowed, options.pop("scale"), bias=bias, uniform=uniform, **extras, **options)
    if content.causal is None and not causal:
        return attend_allowed(query, key, value, content, bias=bias, **options)
    if content.causal is None:
        return ops.attention(query, key, value, causal=causal, bias=bias, **options)
    padding = content.padding if content.padding is None else content.padding.expand(len(query), -1)
    return ops.attention(query, key, value, causal=content.causal, key_padding_mask=padding, bias=bias, **options)


def why_not_here(kind, module, query, key, value, mask, scaling, causal, bias, options) -> str:
    """'' or why this call is for the function that was set."""
    return (
        _why_not_such_tensors(kind, module, query, key, value, mask, causal, bias)
        or _why_not_such_options(kind, scaling, causal, options)
        or (_why_not_such_reader(module, options) if kind.eager else "")
        or _why_not_such_mask(kind, query, mask, bias)
    )


def _why_not_such_tensors(kind, module, query, key, value, mask, causal, bias) -> str:
    tensors, added = (query, key, value), [t for t in (mask, bias) if t is not None]
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        return "nothing is kept for backward"
    groups = getattr(module, "num_key_value_groups", 1) if kind.grouped else 1
    if not _match(query, key, value, groups):
        return "its queries, keys and values do not match"
    if causal and mask is None and key.shape[2] < query.shape[2] > 1:
        return "causality over fewer keys than queries"
    if not all(_fits(t, query, key) for t in added):
        return "its mask does not fit its scores"
    # PyTorch's kernels for CUDA take masks as they are; the rest has not been measured there
    return "" if query.device.type == "cpu" or not (kind.eager or added) else "its device has kernels for this"


def _match(query: Tensor, key: Tensor, value: Tensor, groups: int) -> bool:
    """Whether they are of one dtype (autocast makes it one), batch and width of heads, each key serving ``groups`` query heads."""
    lowered = torch.is_autocast_enabled(query.device.type) and torch.float64 not in (query.dtype, key.dtype, value.dtype)
    if not (lowered or query.dtype == key.dtype == value.dtype):
        return False
    if any(t.dim() != 4 for t in (query, key, value)) or key.shape != value.shape or 0 in key.shape:
        return False
    return query.shape[::3] == key.shape[::3] and query.shape[1] == key.shape[1] * groups


def _fits(added: Tensor, query: Tensor, key: Tensor) -> bool:
    """Whether a mask or bias has four dimensions that broadcast to the scores, the keys in full."""
    scores = (*query.shape[:3], key.shape[2])
    return added.dim() == 4 and added.shape[3] == scores[3] and all(n in (1, size) for n, size in zip(added.shape, scores))


def _why_not_such_options(kind, scaling, causal, options) -> str:
    if options.get("cache") is not None:
        return "its cache is paged"
    if not kind.eager and options.get("softcap") is not None:
        return "SDPA has no soft cap, and says so"
    if not isinstance(scaling, int | float | None) or not isinstance(options.get("softcap"), int | float | None):
        return "its scaling is a tensor"
    return "" if isinstance(causal, bool) else "its causality is a tensor"


def _why_not_such_reader(module, options) -> str:
    """'' or who reads the probabilities that an eager function returns."""
    captured = output_capturing._active_collector.get() or ()
    if options.get("output_attentions") or module.config.output_attentions or any("attention" in name for name in captured):
        return "its probabilities are asked for"
    if not returns_probabilities_only(type(module)):
        return "its own forward reads its probabilities"
    return "a hook sees its probabilities" if has_hooks(module) else ""


def _why_not_such_mask(kind, query, mask, bias) -> str:
    if mask is None:
        return ""
    if not mask.is_floating_point() and (kind.eager or mask.dtype != torch.bool):
        return "its mask's True is a number, added to the scores"
    content, trained = read_mask(mask), mask.requires_grad
    if trained and content.bias is None:
        return "its mask is trained, and has but two values"
    if content.dead and content.least == -torch.inf:
        return "a query without any key becomes NaN"
    if content.dead and (content.bias is not None or query.dtype == torch.float16):
        return "a query without any key sees the differences between numbers near the least"
    if content.dead and not kind.eager and (bias is not None or mask.dtype != torch.bool):
        return "a query without any key attends to all"
    return ""


@cache
def returns_probabilities_only(cls: type) -> bool:
    """Whether the forward of ``cls`` does nothing with an eager function's probabilities but return them."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls.forward)))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Assign) and isinstance(n.value, ast.Call)]
    names = {
        target.elts[1].id
        for call in calls
        if isinstance(call.value.func, ast.Name) and "attention" in call.value.func.id
        for target in call.targets
        if isinstance(target, ast.Tuple) and len(target.elts) == 2 and isinstance(target.elts[1], ast.Name)
    }
    returned = [r.value for r in ast.walk(tree) if isinstance(r, ast.Return)]
    passed_on = {id(n) for value in returned for n in (value.elts if isinstance(value, ast.Tuple) else (value,))}
    loaded = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load) and n.id in names]
    return all(id(n) in passed_on for n in loaded)


ALL_ATTENTION_FUNCTIONS.register("fastpeft", attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register("fastpeft", sdpa_mask)
