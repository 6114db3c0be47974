"""Safe reader of tensor files: pickles by ``torch.load(weights_only=True)`` alone, safetensors, and the tensors of TorchScript archives,
whose code is not run."""

from __future__ import annotations

import re
import shutil
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from fastpeft.convert.tensors import listing
from fastpeft.tensor_files import check_archive, check_tensors, is_zip

MODULES = 100_000  # of a TorchScript archive


@dataclass(frozen=True)
class Contents:
    """What a file holds: a state dict, and where that lay under a ``key``, what lay ``beside`` it."""

    state: dict
    key: str = ""
    beside: dict[str, Any] = field(default_factory=dict)

    def notes(self, *used: str) -> list[str]:
        """What was left out, but for what was ``used``."""
        left = sorted(set(self.beside) - set(used))
        return [f"left out what lies beside {self.key!r}: {listing(left)}"] if left else []


def read_file(path: Path) -> Contents:
    """ValueError for a damaged file, one that holds more than tensors and plain values, and one without a state dict."""
    if path.suffix == ".safetensors":
        return Contents(read_safetensors(path))
    if is_zip(path):
        check_archive(path)
    content = _read_torchscript(path) if is_torchscript(path) else _read_pickle(path)
    if not isinstance(content, dict):
        raise ValueError(f"holds a {type(content).__name__}, not a state dict")
    found = Contents(content)
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), dict):
            found = Contents(content[key], key, {str(k): v for k, v in content.items() if k != key})
            break
    check_tensors(found.state, path.stat().st_size)
    return found


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """ValueError for a damaged file."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path.name} is no safetensors file, or a truncated one: {error}") from None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A ValueError from within begins with the path it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


class _Inert:
    """Stands for an object of ruamel.yaml while unpickling: takes anything, keeps and does nothing."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    __setstate__ = __init__


class Attributes(_Inert):
    """Stands for an object whose attributes are wanted, and nothing else of it: argparse.Namespace, a TorchScript module."""

    def __setstate__(self, state):
        self.__dict__.update({k: v for k, v in state.items() if isinstance(k, str)} if isinstance(state, dict) else {})


def _value(value, *kind):
    """Stands for the functions by which TorchScript marks a list or a dict with its type."""
    return value


# weights_only sets items on exactly dict, OrderedDict and Counter, and of these only a Counter takes any state
_MAPPINGS = ("CommentedMap", "CommentedOrderedMap", "ordereddict")
# names whose objects get a stand-in; any other that weights_only refuses is an error
_STAND_INS = (
    (re.compile(rf"ruamel\.yaml\..*({'|'.join(_MAPPINGS)})"), Counter),
    (re.compile(r"ruamel\.yaml\..*"), _Inert),
    (re.compile(r"argparse\.Namespace"), Attributes),
)
_TORCHSCRIPT_STAND_INS = (
    (re.compile(r"__torch__\..*"), Attributes),
    (re.compile(r"torch\.jit\._pickle\.(restore_type_tag|build_(int|tensor|double|bool)list)"), _value),
)


def _read_pickle(path: Path, stand_ins=_STAND_INS):
    """MISS and MILE save the ruamel.yaml objects of their config beside the tensors, LaVIN its argparse.Namespace: for these names the
    unpickler gets classes that do nothing, whether the packages are installed or not. Any other name that weights_only refuses is an
    error."""
    zipped = is_zip(path)  # the format before PyTorch 1.6 is no zip: it cannot be mapped, nor its names listed
    try:
        names = sorted(get_unsafe_globals_in_checkpoint(path)) if zipped else []
        known = {name: next((cls for pattern, cls in stand_ins if pattern.fullmatch(name)), None) for name in names}
        refused = [name for name, cls in known.items() if cls is None]
        if not refused:
            with safe_globals([(cls, name) for name, cls in known.items()]):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped and stand_ins is _STAND_INS)
    except Exception as error:  # torch and pickle raise a dozen types on a broken file
        if re.search("Can only (append to|extend) lists", str(error)):
            raise ValueError(
                "its ruamel.yaml config holds a list, which weights_only cannot read: if you trust the file, keep its tensors alone, with "
                f"torch.save({{'model': torch.load({path.name!r}, weights_only=False)['model']}}, 'tensors.pth'), and convert that"
            ) from None
        refused = re.findall(r"GLOBAL (\S+)", str(error))
        if not refused:
            # torch's own first line is advice to load it without weights_only
            inner = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
            reason = inner[1] if inner else next(iter(str(error).splitlines()), repr(error))
            raise ValueError(f"no PyTorch checkpoint, or a truncated one: {reason[:200]}") from None
    raise ValueError(f"holds {listing(refused)}, not only tensors: refused, as loading it could run code")


def is_torchscript(path: Path) -> bool:
    """Whether it is a zip that torch.jit.save wrote: torch.load tells by the same name."""
    if not is_zip(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def _read_torchscript(path: Path) -> dict[str, Tensor]:
    """The tensors of a scripted or traced module by their names in it.

    torch.jit.load compiles the archive's code and runs its modules' ``__setstate__``. Here a copy without code is unpickled by
    weights_only, each module a bare bag of attributes.
    """
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder, path.name)
        try:
            with zipfile.ZipFile(path) as archive, zipfile.ZipFile(bare, "w") as copy:
                for entry in archive.infolist():
                    inner = entry.filename.partition("/")[2]
                    if inner in ("data.pkl", "version", "byteorder") or inner.startswith("data/"):
                        with archive.open(entry) as source, copy.open(zipfile.ZipInfo(entry.filename), "w", force_zip64=True) as target:
                            shutil.copyfileobj(source, target, 1 << 24)
        except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"no TorchScript archive, or a truncated one: {error}") from None
        module = _read_pickle(bare, _TORCHSCRIPT_STAND_INS)
    if not isinstance(module, Attributes):
        raise ValueError(f"a TorchScript archive of a {type(module).__name__}, not of a module")
    return dict(_tensors(module, "", (), iter(range(MODULES))))


def _tensors(module: Attributes, path: str, outer: tuple, left: Iterator[int]) -> Iterator[tuple[str, Tensor]]:
    """Tensors inside ``module`` by dotted names that begin with ``path``; ``outer``: the modules around it; ``left``: counts modules,
    which may hold each other many times over."""
    if any(module is one for one in outer):
        raise ValueError(f"a TorchScript module that holds itself, as {path[:-1]}")
    if next(left, None) is None:
        raise ValueError(f"a TorchScript archive of more than {MODULES:,} modules")
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield path + name, value
        elif isinstance(value, Attributes):
            yield from _tensors(value, f"{path}{name}.", (*outer, module), left)
