"""transformers' float32 islands (norms, rotary tables, softmax, losses) in float64, without a change to its code."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode


class Double(TorchFunctionMode):
    """While it is active, what asks for float32 by name gets float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return func(*args, **{name: torch.float64 if a is torch.float32 else a for name, a in (kwargs or {}).items()})
