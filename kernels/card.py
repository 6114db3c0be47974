"""What a launch depends on beside its tensors: the card's shared memory, and PyTorch's setting for float32 products."""

import functools

import torch
import triton
from triton.runtime.errors import OutOfResources  # noqa: F401 - for ops/_tiled.py, which imports no triton

# bytes of shared memory a block may have, by compute capability (CUDA C++ Programming Guide, technical specifications)
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


@functools.cache
def _shared_of(device: int) -> int:
    return triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"]  # what Triton will hold a launch to


def shared_memory(t: torch.Tensor) -> int:
    """Bytes of shared memory that one block may have on t's card; Triton's interpreter gets an H100's."""
    return _shared_of(t.device.index) if t.is_cuda else SHARED[90]


def stages(most: int, tile: int, fixed: int, shared: int) -> int:
    """How many of ``most`` stages of a loop fit: all but the last hold ``tile`` bytes, beside ``fixed`` ones. `make aot` checks the sum."""
    return max(1, min(most, 1 + (shared - fixed) // tile))


def ieee() -> bool:
    """Whether float32 products keep all digits: the user's setting for PyTorch's own holds here too. The old setting raises where the
    new one was used, and the new one shows both."""
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    return not matmul.allow_tf32 if precision is None else precision != "tf32"


def padded(n: int) -> int:
    """The block of n channels that tl.dot takes: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(n))
