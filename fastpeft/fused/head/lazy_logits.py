"""Logits of a model's own forward that are computed where the forward reads them.

A language model hands its last hidden states [..., C] to its head and the head's logits [..., V] to a cross entropy, which counts labelled
positions only. Inside :func:`lazy_head` the head returns :class:`LazyLogits`: a tensor that knows its shape and how to compute its values.
What models do to logits on the way (a cast, a view, a shift by one, a logit scale, a soft cap, a fixed bias) gives lazy logits again, and
``F.cross_entropy`` of them forms logits at labelled positions alone. Every other function gets the values, computed by the model's own
operations in their order. So the code of the model decides what its loss is, and no model is described here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from numbers import Number
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.utils._pytree import tree_map_only

from fastpeft import ops
from fastpeft.fused.head.outputs import as_of_now
from fastpeft.methods.quantized import is_quantized
from fastpeft.ops._common import accumulator, to_device_async
from fastpeft.registry import original_class


class Transform(NamedTuple):
    """Logits z' of a head's z: ``softcap tanh((scale z + shift) / softcap)``, without the tanh where softcap is 0; shift [V] or None."""

    scale: float | Tensor = 1.0
    shift: Tensor | None = None
    softcap: float = 0.0


class LazyLogits(Tensor):
    """Logits [..., V] of hidden states [..., C] under a head, computed when a function needs their values.

    Made by :func:`lazy_head`. ``read()`` computes them once. Not a leaf of autograd, and never handed out of a model's forward."""

    hidden: Tensor  # [..., C]: the rows of logits one to one
    head: nn.Module
    steps: tuple[Callable[[Tensor], Tensor], ...]  # what is done to each row of the head's output, in order
    transform: Transform | None  # the same as a formula; None where it is no such
    parent: LazyLogits | None
    compute: Callable[[], Tensor]

    @staticmethod
    def of(hidden: Tensor, width: int, dtype: torch.dtype, **fields: Any) -> LazyLogits:
        logits = _Anchored.apply(hidden, width, dtype)
        logits.hidden, logits.value = hidden, None
        for name, value in fields.items():
            setattr(logits, name, value)
        return logits

    def read(self) -> Tensor:
        """Their values, with autograd attached."""
        if self.value is None:
            self.value = self.compute()
        return self.value

    @property
    def is_read(self) -> bool:
        """Whether these logits, or others that they were made of, have been computed: what was done to those in place is then in them."""
        return self.value is not None or (self.parent is not None and self.parent.is_read)

    def derived(self, func: Callable, args: tuple, kwargs: dict, **changes: Any) -> LazyLogits:
        """``func(self, *args, **kwargs)``, lazily; changes: the fields that differ."""
        fields = {name: getattr(self, name) for name in ("hidden", "head", "steps", "transform")}
        fields |= {"width": self.shape[-1], "dtype": self.dtype} | changes
        return LazyLogits.of(**fields, parent=self, compute=lambda: func(self.read(), *args, **kwargs))

    def applied(self, step: Callable[[Tensor], Tensor], func: Callable, args: tuple, kwargs: dict, **changes: Any) -> LazyLogits:
        """The same for a ``func`` that treats each row by itself, as ``step`` does."""
        return self.derived(func, args, kwargs, steps=(*self.steps, step), **changes)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        rule = RULES.get(func)
        if rule is not None and args and isinstance(args[0], LazyLogits) and not args[0].is_read:
            result = rule(func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        args, kwargs = tree_map_only(LazyLogits, LazyLogits.read, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} got logits that are not computed yet; please report this, and call fastpeft.restore(model)")

    __repr__ = object.__repr__


class _Anchored(Function):
    """Attaches lazy logits to autograd, so that who differentiates them behind PyTorch's functions gets an error, and no wrong gradient."""

    @staticmethod
    def forward(ctx, hidden: Tensor, width: int, dtype: torch.dtype) -> LazyLogits:
        return Tensor._make_wrapper_subclass(LazyLogits, (*hidden.shape[:-1], width), dtype=dtype, device=hidden.device)

    @staticmethod
    def backward(ctx, grad: Tensor):
        raise RuntimeError("an autograd Function of somebody else's took logits that were not computed: call fastpeft.restore on the model")


METADATA = {Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.is_floating_point, Tensor.__len__} | {
    getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "is_cuda", "layout", "is_sparse", "is_meta")
}


@contextmanager
def lazy_head(head: nn.Module) -> Iterator[None]:
    """Inside, and on this thread, ``head`` returns lazy logits. It must treat each row by itself and have no hooks."""
    own, thread = type(head).forward.__get__(head), threading.get_ident()

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        mine = threading.get_ident() == thread and isinstance(hidden, Tensor) and not (args or kwargs)
        return _first(own, head, hidden) if mine else own(hidden, *args, **kwargs)

    head.__dict__["forward"] = forward
    try:
        yield
    finally:
        if head.__dict__.get("forward") is forward:  # else another thread's is there, which serves this head the same way
            del head.__dict__["forward"]


def _first(own: Callable[[Tensor], Tensor], head: nn.Module, hidden: Tensor) -> LazyLogits:
    compute = as_of_now(lambda: own(hidden), hidden.device)
    if is_plain(head):
        width, cast = head.out_features, torch.is_autocast_enabled(hidden.device.type)
        dtype = torch.get_autocast_dtype(hidden.device.type) if cast and hidden.dtype != torch.float64 else hidden.dtype
    else:
        with torch.no_grad():
            empty = own(hidden.reshape(-1, hidden.shape[-1])[:0])
        width, dtype = empty.shape[-1], empty.dtype
    return LazyLogits.of(hidden, width, dtype, head=head, steps=(own,), transform=Transform(), parent=None, compute=compute)


def is_plain(head: nn.Module) -> bool:
    """Whether a head computes what its weight and bias say, and no more."""
    return original_class(head) is nn.Linear and not is_quantized(head.weight)


# -- what models do to logits: rules by function, NotImplemented where a call needs values --


def _cast(func, x: LazyLogits, *args, **kwargs):
    dtype, device = _target_of(func, x, *args, **kwargs)
    if dtype is None or device != x.device or not dtype.is_floating_point:
        return NotImplemented
    if dtype == x.dtype:
        return x
    if dtype.itemsize < x.dtype.itemsize and func is not Tensor.float:
        return NotImplemented  # rounds; float() of float64 does too, and the loss is then more exact than the model's
    return x.applied(lambda z: z.to(dtype), func, args, kwargs, dtype=dtype)


def _target_of(func, x: LazyLogits, *args, **kwargs) -> tuple[torch.dtype | None, torch.device]:
    """(dtype, device) that a cast asks for; dtype None where it asks for something else."""
    named = {Tensor.float: torch.float32, Tensor.double: torch.float64}
    if func in named:
        return (None if args or kwargs else named[func]), x.device
    if len(args) != 1 or kwargs:
        return None, x.device
    (to,) = args
    if isinstance(to, torch.dtype):
        return to, x.device
    if isinstance(to, Tensor):
        return to.dtype, to.device
    where = torch.device(to)
    index = where.index if where.index is not None or where.type == "cpu" else x.device.index
    return x.dtype, torch.device(where.type, index) if index is not None else where


def _same(func, x: LazyLogits, *args, **kwargs):
    return NotImplemented if args or kwargs else x


def _reshape(func, x: LazyLogits, *shape, **kwargs):
    sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    if kwargs or not isinstance(sizes, list | tuple) or not sizes or not all(isinstance(n, int) for n in sizes):
        return NotImplemented
    width, rows, sizes = x.shape[-1], prod(x.shape[:-1]), list(sizes)
    if -1 in sizes:
        known = prod(n for n in sizes if n != -1)
        if sizes.count(-1) > 1 or not known or x.numel() % known:
            return NotImplemented
        sizes[sizes.index(-1)] = x.numel() // known
    if sizes[-1] != width or prod(sizes[:-1]) != rows:
        return NotImplemented
    return x.derived(func, shape, kwargs, hidden=x.hidden.reshape(*sizes[:-1], x.hidden.shape[-1]))


def _flatten(func, x: LazyLogits, start_dim=0, end_dim=-1):
    if x.dim() < 2 or end_dim % x.dim() == x.dim() - 1:
        return NotImplemented
    return x.derived(func, (start_dim, end_dim), {}, hidden=x.hidden.flatten(start_dim % x.dim(), end_dim % x.dim()))


def _index(func, x: LazyLogits, index):
    parts = list(index) if isinstance(index, tuple) else [index]
    if not all(part is Ellipsis or (isinstance(part, int | slice | Tensor) and not isinstance(part, bool | LazyLogits)) for part in parts):
        return NotImplemented
    used = sum(_dims_used(part) for part in parts)
    dots = [i for i, part in enumerate(parts) if part is Ellipsis]
    if len(dots) > 1 or used > x.dim():
        return NotImplemented
    if dots:
        parts[dots[0] : dots[0] + 1] = [slice(None)] * (x.dim() - used)
        used = x.dim()
    if used == x.dim():
        if not (isinstance(parts[-1], slice) and parts[-1] == slice(None)):
            return NotImplemented
        parts.pop()
    return x.derived(func, (index,), {}, hidden=x.hidden[tuple(parts)])


def _dims_used(part) -> int:
    if part is Ellipsis:
        return 0
    return part.dim() if isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) else 1


def _times(func, x: LazyLogits, factor, **kwargs):
    if kwargs or not _is_constant(factor):
        return NotImplemented
    if isinstance(factor, Tensor) and torch.result_type(torch.empty(0, dtype=x.dtype), factor) != x.dtype:
        return NotImplemented
    divides = func in DIVISIONS
    new, old = None, x.transform
    if old is not None and not old.softcap:
        scale = old.scale / factor if divides else old.scale * factor
        new = Transform(scale, None if old.shift is None else old.shift / factor if divides else old.shift * factor)
    elif old is not None and old.softcap == 1.0 and not divides and isinstance(factor, Number) and factor > 0:
        # factor tanh(s z + t): as the formula has it
        new = Transform(old.scale * factor, None if old.shift is None else old.shift * factor, float(factor))
    return x.applied(lambda z: func(z, factor), func, (factor,), {}, transform=new)


def _is_constant(factor) -> bool:
    if isinstance(factor, Tensor):
        return factor.dim() == 0 and not factor.requires_grad and not isinstance(factor, LazyLogits)
    return isinstance(factor, int | float) and not isinstance(factor, bool)


def _plus(func, x: LazyLogits, other, **kwargs):
    """A fixed bias, [V], [1, V] or [1, 1, V], as BART's."""
    if kwargs or not isinstance(other, Tensor) or isinstance(other, LazyLogits) or other.requires_grad or other.device != x.device:
        return NotImplemented
    if other.shape[-1:] != x.shape[-1:] or other.numel() != x.shape[-1] or other.dim() > x.dim() or other.dtype != x.dtype:
        return NotImplemented
    new, flat = None, other.reshape(-1)
    if x.transform is not None and not x.transform.softcap:
        new = x.transform._replace(shift=flat if x.transform.shift is None else x.transform.shift + flat)
    return x.applied(lambda z: func(z, flat), func, (other,), {}, transform=new)


def _tanh(func, x: LazyLogits, *args, **kwargs):
    if args or kwargs:
        return NotImplemented
    new = x.transform._replace(softcap=1.0) if x.transform is not None and not x.transform.softcap else None
    return x.applied(func, func, (), {}, transform=new)


def _cross_entropy(
    func,
    x: LazyLogits,
    target: Tensor,
    weight=None,
    size_average=None,
    ignore_index: int = -100,
    reduce=None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
):
    """Over lazy logits [N, V] and class indices [N]."""
    if weight is not None or size_average is not None or reduce is not None or reduction not in ("mean", "sum", "none"):
        return NotImplemented
    fits = isinstance(target, Tensor) and not isinstance(target, LazyLogits) and x.dim() == 2 and target.shape == x.shape[:1]
    if not fits or target.dtype != torch.int64 or target.device != x.device or not 0 <= label_smoothing <= 1:
        return NotImplemented
    options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
    cast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    loss = (_fused_loss if _is_fusable(x) else _loss_of_rows)(x, target, options)
    return loss.to(torch.float32 if cast else x.dtype)


def _is_fusable(x: LazyLogits) -> bool:
    return x.transform is not None and is_plain(x.head)


def _fused_loss(x: LazyLogits, target: Tensor, options: dict[str, Any]) -> Tensor:
    """Without logits: the scale goes to the hidden states, scale and shift to the bias."""
    head, (scale, shift, softcap) = x.head, x.transform
    hidden, bias = x.hidden, head.bias
    if isinstance(scale, Tensor) or scale != 1.0:
        hidden, bias = hidden * scale, None if bias is None else bias * scale
    if shift is not None:
        bias = shift if bias is None else bias + shift
    return ops.linear_cross_entropy(hidden, head.weight, bias, target, softcap=softcap, **options)


def _loss_of_rows(x: LazyLogits, target: Tensor, options: dict[str, Any]) -> Tensor:
    """With logits of labelled rows, as the model's own operations form them: an adapter on the head, or a quantised head."""
    rows = (target != options["ignore_index"]).nonzero().squeeze(1)
    logits = x.hidden.index_select(0, to_device_async(rows, x.hidden.device))
    for step in x.steps:
        logits = step(logits)
    loss = F.cross_entropy(logits.to(accumulator(logits.dtype)), target[rows], **options)
    return loss if options["reduction"] != "none" else loss.new_zeros(len(target)).index_copy_(0, rows, loss)


DIVISIONS = {Tensor.div, Tensor.__truediv__, Tensor.divide, Tensor.true_divide, torch.div, torch.divide, torch.true_divide}
RULES: dict[Callable, Callable] = {
    F.cross_entropy: _cross_entropy,
    Tensor.__getitem__: _index,
    **dict.fromkeys((Tensor.float, Tensor.double, Tensor.to), _cast),
    **dict.fromkeys((Tensor.contiguous,), _same),
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape), _reshape),
    **dict.fromkeys((Tensor.flatten, torch.flatten), _flatten),
    **dict.fromkeys((Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.multiply, torch.mul, torch.multiply, *DIVISIONS), _times),
    **dict.fromkeys((Tensor.add, Tensor.__add__, torch.add), _plus),
    **dict.fromkeys((Tensor.tanh, torch.tanh, F.tanh), _tanh),
}
