"""Files of tensors that nobody vouches for: what they declare is compared with what they hold before anything is allocated."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

UNPACKED = 1.5  # times a zip's size on the disk that its members may take together: PyTorch stores tensors as they are
SLACK = 1 << 24  # bytes beyond, of code and directories
SHARED = 4  # times a file's size that its tensors may take together: tied weights are there once, and named twice
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def is_zip(path: Path) -> bool:
    """Whether it is one, damaged or not."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # it says that it goes on in other files
        return True


def check_archive(path: Path) -> None:
    """ValueError for a zip whose members would take far more than the file itself."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
        raise ValueError(f"no zip archive, or a truncated one: {error}") from None
    size = path.stat().st_size
    if unpacked > UNPACKED * size + SLACK:
        raise ValueError(f"it would unpack to {unpacked:,} bytes, and has {size:,}: refused, as no PyTorch file is packed like that")


def check_tensors(tensors: Mapping[Any, Any], size: int | None = None) -> None:
    """ValueError names the first tensor that is not dense, in memory, with an element of its own for each place; and, given the file's
    ``size``, tensors that together are much larger. Values of other kinds, and what they hold, count only where they are lists or dicts."""
    total = 0
    for name, tensor in _all(tensors):
        if problem := _problem(tensor):
            raise ValueError(f"{name} is {problem}: only dense tensors with their values are read")
        total += tensor.nbytes
    if size is not None and total > SHARED * size + SLACK:
        raise ValueError(f"its tensors take {total:,} bytes, and the file has {size:,}")


def _all(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name or "its tensor", value
    elif depth < 8 and isinstance(value, Mapping | list | tuple):
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _all(inner, f"{name}.{key}" if name else str(key), depth + 1)


def _problem(tensor: Tensor) -> str:
    """Why a tensor is none that is read, in words; '' for one that is."""
    if tensor.layout != torch.strided:
        return f"sparse ({str(tensor.layout).removeprefix('torch.')})"
    if tensor.is_meta:
        return "on the meta device, without values"
    if tensor.is_quantized:
        return f"of the quantised type {tensor.dtype}"
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        return f"{list(tensor.shape)} over a memory of {tensor.untyped_storage().nbytes():,} bytes"
    return ""


def read_shapes(path: Path) -> dict[str, Tensor]:
    """A safetensors file's tensors by name, on the meta device: shapes and dtypes by its header, which is as long as the file says it is.
    ValueError for a damaged file."""
    shapes = {}
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118, it is no mapping
                found = file.get_slice(name)
                dtype = DTYPES.get(found.get_dtype(), torch.uint8)
                shapes[name] = torch.empty(found.get_shape(), dtype=dtype, device="meta")
    except (SafetensorError, OSError, RuntimeError, OverflowError) as error:  # RuntimeError: sizes beyond 2**63
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from None
    return shapes


