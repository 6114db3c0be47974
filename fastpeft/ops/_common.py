"""Small things every op shares: dtypes, argument checks, and whether autograd is needed at all."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft import _library
from fastpeft.ops._private import compiles_backward, in_forward_mode, under_func, under_func_grad

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wants_grad(*tensors: Tensor | None) -> bool:
    """False: the caller may skip the autograd Function, which costs more than a small op itself. RuntimeError where a derivative is asked
    for in another way: to forward mode the operators' outputs would be constants, and their tangents silently zero."""
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if not torch.compiler.is_compiling() and (in_forward_mode(*tensors) or (wanted and under_func_grad())):
        raise RuntimeError(
            "fastpeft: this operator has a gradient in PyTorch's autograd only, not in forward mode or under torch.func; call "
            "fastpeft.restore(model), or the op's *_reference, there"
        )
    return wanted


def in_cpp(op: str, *args):
    """What csrc/autograd's ``op`` returns: a Function in C++, which with its backward costs the host half of one in Python. None where it
    is missing or the call is not plain (module.cpp), and where PyTorch looks into a Function: the one in Python serves then."""
    if _library.autograd is None or torch.compiler.is_compiling() or under_func() or compiles_backward():
        return None
    return getattr(_library.autograd, op)(*args)


def no_view(y: Tensor) -> Tensor:
    """``y`` as a Function returns it. Autograd refuses a change in place of a view that was made inside a Function, and a caller may change
    what a layer returned: Falcon adds to a linear layer's output, Wav2Vec2 overwrites frames of one. The storage must be y's alone."""
    return y.detach()


def to_device_async(t: Tensor, device: torch.device) -> Tensor:
    """``t`` on ``device``. What lies on the host goes to a GPU through pinned memory, in the stream's order: the host does not wait.

    RuntimeError while a CUDA graph is captured: every replay would read what lies in that memory then.
    """
    if t.device.type == "cpu" and device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"fastpeft: a CUDA graph cannot hold a tensor of the host, {list(t.shape)} {t.dtype} (dropout's seed is one);"
                " move it to the device before the capture, or set dropout to 0"
            )
        return t.pin_memory().to(device, non_blocking=True)
    return t.to(device)


def check_floating(op: str, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{op}: {name} is {tensor.dtype}; cast it to float64, float32, bfloat16 or float16")


def check_affine(op: str, x: Tensor, **params: Tensor | None) -> None:
    """Per-channel parameters: shape [N], dtype of x or the accumulator's (float32 masters over a bfloat16 trunk)."""
    for name, p in params.items():
        if p is None:
            continue
        if p.dim() != 1 or p.shape[0] != x.shape[-1]:
            raise ValueError(f"{op}: {name} has shape {tuple(p.shape)}; pass [{x.shape[-1]}], x's last dimension")
        if p.dtype not in (x.dtype, accumulator(x.dtype)):
            raise TypeError(f"{op}: {name} is {p.dtype} and x is {x.dtype}; cast {name} to {x.dtype} or {accumulator(x.dtype)}")
    dtypes = {p.dtype for p in params.values() if p is not None}
    if len(dtypes) > 1:
        raise TypeError(f"{op}: {' and '.join(params)} differ in dtype ({', '.join(map(str, dtypes))}); cast one to the other's")


def check_norm(op: str, x: Tensor, residual: Tensor | None, eps: float, **params: Tensor | None) -> None:
    check_floating(op, x=x, residual=residual, **params)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; it needs a last dimension of at least 1 to normalise over")
    check_affine(op, x, **params)
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        got, want = f"{tuple(residual.shape)} {residual.dtype}", f"{tuple(x.shape)} {x.dtype}"
        raise ValueError(f"{op}: residual is {got} and x is {want}; expand or cast residual to match")
    if eps < 0:
        raise ValueError(f"{op}: eps is {eps}; it must not be negative")
