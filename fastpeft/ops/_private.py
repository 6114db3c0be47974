"""PyTorch's private interfaces that fastpeft uses, all in one place."""

from __future__ import annotations

import contextlib
import sys

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

__all__ = ["FakeTensor", "FakeTensorMode", "StorageWeakRef", "TorchDispatchMode", "tree_iter", "tree_map_only"]  # for fastpeft.cost

without_dispatch_modes = torch._C._DisableTorchDispatch  # a context in which operators run as if no mode were on
softmax_backward = torch._softmax_backward_data  # P (dP - rowsum(P dP)) in one pass
assert_async = torch._assert_async  # an assertion on the device, which the host does not wait for


def in_forward_mode(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors carries a tangent of forward-mode differentiation."""
    if forward_ad._current_level < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def storage_id(storage: torch.UntypedStorage) -> int:
    """An identity of a storage while it lives; fake storages, which have no address, have one too."""
    return storage._cdata


def under_func_grad() -> bool:
    """Whether torch.func differentiates what runs now."""
    return any(level.key() == TransformType.Grad for level in get_interpreter_stack() or ())


under_func = torch._C._are_functorch_transforms_active  # whether torch.func transforms what runs now


def compiles_backward() -> bool:
    """Whether compiled autograd is on, which can only look into Functions whose state it knows."""
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return module is not None and module.compiled_autograd_enabled


def is_fake(t: Tensor) -> bool:
    """Whether a tensor has a shape and no values, on any device."""
    return t.device.type == "meta" or isinstance(t, FakeTensor)


def end_allocation(device: int, pool: tuple[int, int]) -> None:
    """After a capture into ``pool`` that the driver ended: PyTorch's ``capture_end`` then raises before it tells the allocator, which frees
    no memory that it keeps while it believes in a capture (``empty_cache`` fails), and holds the pool for good. Nothing after another."""
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(device, pool)  # RuntimeError: there is none
        torch._C._cuda_releasePool(device, pool)


def module_hooks() -> tuple[dict, ...]:
    """Hooks on every module there is."""
    every = torch.nn.modules.module
    return every._global_forward_hooks, every._global_forward_pre_hooks, every._global_backward_hooks, every._global_backward_pre_hooks


def step_hooks(optimizer: torch.optim.Optimizer) -> tuple[dict, ...]:
    """Hooks around an optimiser's step: its own, and those of all."""
    own = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    return *own, _global_optimizer_pre_hooks, _global_optimizer_post_hooks


def graph_is_kept() -> bool:
    """Whether the backward that runs now was called with retain_graph=True."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def onednn_accepts(dtype: torch.dtype) -> bool:
    """Whether oneDNN takes products of bfloat16 or float16 on this CPU; its own limit of instructions counts."""
    if not torch.backends.mkldnn.is_available():
        return False
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    try:
        return getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")()
    except (AttributeError, RuntimeError):  # a build without them
        return False


def avx512_without_bfloat16() -> bool:
    """Whether this CPU has AVX-512, and no instructions for bfloat16 in it."""
    return torch.cpu._is_avx512_supported() and not torch.cpu._is_avx512_bf16_supported()
