"""How a tile-wise op reaches its Triton launcher: imported when first called, float64 left to ATen, a seed sent to the device."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from fastpeft.ops._common import to_device_async


def triton_launcher(module: str, name: str, composite: Callable) -> Callable:
    """``fastpeft.kernels.<module>.<name>``; float64 goes to ``composite``, because the kernels accumulate in float32."""

    def launch(*args):
        tensors = args[0] if isinstance(args[0], (list, tuple)) else args[:1]
        if any(t is not None and t.dtype == torch.float64 for t in tensors):
            return composite(*args)
        device = next(t for t in tensors if t is not None).device
        # seeds lie on the host
        args = [to_device_async(arg, device) if isinstance(arg, Tensor) and arg.device != device else arg for arg in args]
        return getattr(import_module(f"fastpeft.kernels.{module}"), name)(*args)

    return launch
