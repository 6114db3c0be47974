"""How an op reaches its Triton launcher: imported when first called, on the tensors' own device, and ATen where it does not fit."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable
from importlib import import_module

import torch
from torch import Tensor

from fastpeft import _library
from fastpeft.ops._common import to_device_async


def _tensors(args: Iterable) -> Iterable[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from _tensors(arg)


def on_device_of(tensors: Iterable[Tensor]):
    """A context with the device of the first CUDA tensor current: Triton launches on the current device, whatever its tensors lie on."""
    device = next((t.device for t in tensors if t.device.type == "cuda"), None)
    if device is None or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def triton_launcher(module: str, name: str, composite: Callable, *, draws: bool = False) -> Callable:
    """``fastpeft.kernels.<module>.<name>`` with the tensors' device current.

    ``composite`` serves float64, because the kernels accumulate in float32, and what this card has too little shared memory for, with a
    warning that says so. Not where a dropout seed is given (``draws``): both directions must draw one mask, and ATen draws another.
    """

    @functools.cache
    def kernels():
        """(the launcher's module, what a launch raises where the card has too little shared memory)"""
        return import_module(f"fastpeft.kernels.{module}"), import_module("fastpeft.kernels.card").OutOfResources

    def launch(*args):
        tensors = list(_tensors(args))
        if tensors[0].dtype == torch.float64:
            return composite(*args)
        device = tensors[0].device
        # a dropout seed is drawn on the host
        args = [to_device_async(arg, device) if isinstance(arg, Tensor) and arg.device != device else arg for arg in args]
        home, out_of_resources = kernels()
        with on_device_of(tensors):
            try:
                return getattr(home, name)(*args)
            except out_of_resources as error:
                if draws and any(t.dtype == torch.int64 and t.shape == (1,) for t in tensors):
                    raise RuntimeError(f"fastpeft: {name}: {error}; set dropout to 0, or FASTPEFT_BACKEND=composite") from None
                if _library.leave_to_composite(name, device, str(error).partition(". ")[0]):
                    warnings.warn(f"fastpeft: {name} runs on ATen here: {error}", RuntimeWarning, stacklevel=2)
        return composite(*args)

    return launch
