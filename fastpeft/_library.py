"""One registry for operators: schema, fake, and an implementation per backend. PyTorch's dispatcher chooses among them.

Backends: ``native`` (csrc, row-wise ops), ``triton`` (kernels/, tile-wise ops), ``composite`` (ATen, always there).
``FASTPEFT_BACKEND`` forces one; where an op lacks the forced backend it stays on composite, and :func:`backend_of` says so.
``FASTPEFT_BACKEND=triton`` with ``TRITON_INTERPRET=1`` runs the Triton kernels on CPU tensors, through Triton's interpreter.
``FASTPEFT_LIBRARY`` is another build of csrc to load; that of tests/cuda/build.py runs the CUDA sources on CPU tensors.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch

from fastpeft._cards import cards
from fastpeft._when_imported import loaded, when_imported

NAMESPACE = "fastpeft"
BACKENDS = ("native", "triton", "composite")


def chosen(variable: str, choices: tuple[str, ...]) -> str:
    """What an environment variable chooses, "" where it is unset. ValueError for anything else."""
    value = os.environ.get(variable, "")
    if value not in ("", *choices):
        raise ValueError(f"{variable}={value!r} is not a backend; use one of {', '.join(choices)}, or unset it")
    return value


FORCED = chosen("FASTPEFT_BACKEND", BACKENDS)
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

library = torch.library.Library(NAMESPACE, "FRAGMENT")  # lives as long as the process
_served: dict[str, dict[str, str]] = {}  # op -> device -> why that backend
_forms: dict[str, tuple[str, ...]] = {}  # op -> the backends it has beside composite, whether or not they serve here
_ours: dict[str, bool] = {}  # op -> whether it has a kernel of ours for CUDA


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


OLDEST = (8, 0)  # compute capability: what our CUDA and Triton kernels are written, compiled and checked for
_native_cuda = (0, 0)  # the CUDA that csrc's library was built with


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def cuda_unfit(built: tuple[int, int]) -> str:
    """Why kernels of ours that need ``built``'s CUDA ((0, 0): any) cannot run on this machine's cards, "" where they can or where there is
    no card to ask."""
    if torch.version.hip:
        return "a ROCm build of torch: our kernels are for NVIDIA's cards"
    if (found := cards()) is None:
        return ""
    driver, capabilities = found
    if min(capabilities) < OLDEST:
        newer = max(capabilities) >= OLDEST
        hide = "; hide it with CUDA_DEVICE_ORDER=PCI_BUS_ID and CUDA_VISIBLE_DEVICES where only the others are used" if newer else ""
        return f"a card of compute capability {_dotted(min(capabilities))}: our kernels need {_dotted(OLDEST)}{hide}"
    if driver < built:
        return f"csrc was built with CUDA {_dotted(built)}, and the driver serves {_dotted(driver)}"
    return ""


def _built_with(path) -> tuple[int, int]:
    """The CUDA version of a library (setup.py's fastpeft_build); within a major version every driver serves every minor one."""
    try:
        build = ctypes.CDLL(str(path)).fastpeft_build
    except (OSError, AttributeError):  # the emulator's
        return (0, 0)
    build.restype = ctypes.c_char_p
    found = re.match(rb"cuda (\d+)\.\d+ ", build() or b"")
    return (int(found[1]), 0) if found else (0, 0)


def _load_native() -> str:
    """Load csrc's library once; returns '' or the reason it is not there."""
    global _native_cuda
    if FORCED not in ("", "native"):
        return f"FASTPEFT_BACKEND={FORCED}"
    path = os.environ.get("FASTPEFT_LIBRARY") or next(iter(sorted(Path(__file__).parent.glob("_C*.so"))), None)
    if path is None:
        return "csrc was not built (FASTPEFT_NO_EXT=1, or no compiler or no torch at install)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"csrc did not load: {str(error).splitlines()[0]}"
    _native_cuda = _built_with(path)
    return ""


native_missing = _load_native()


def autograd_name(version: str) -> str:
    """The module of csrc/autograd that was built for a torch: its C++ interface changes between versions. The first number is that of what
    the module offers (setup.py): one that was built from older sources is not found."""
    return "_autograd_2_" + re.sub(r"\W", "_", version)


def _load_autograd():
    """(csrc/autograd's module, ""), or (None, why not)."""
    if FORCED not in ("", "native"):
        return None, f"FASTPEFT_BACKEND={FORCED}"
    name = autograd_name(torch.__version__)
    try:
        return importlib.import_module(f"fastpeft.{name}"), ""
    except ModuleNotFoundError:
        return None, f"it was not built from these sources for torch {torch.__version__} and this Python"
    except ImportError as error:
        return None, f"it did not load: {str(error).splitlines()[0]}"


autograd, autograd_missing = _load_autograd()


def triton_serves() -> bool:
    """Whether Triton's kernels run on this machine's cards, as far as can be told."""
    return has_triton() and FORCED in ("", "triton") and (bool(FORCED) or not cuda_unfit((0, 0)))


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)


def define(
    schema: str, *, fake: Callable, composite: Callable, triton: Callable | None = None, native: bool | None = None, cuda: bool = True
):
    """Define ``fastpeft::<schema>`` and register its backends; returns the op's default overload.

    C++ implementations register themselves when the library loads; ``triton`` is a launcher that imports triton when called.
    ``native``: whether csrc has this op, which can only be told when the library is there (None: where there is no ``triton``).
    ``cuda``: whether it has a kernel of ours for CUDA; without one ATen's products are what it is meant to run on there.
    CPU order: native, composite (triton under the interpreter when forced). CUDA order: triton, native, composite; composite where
    the machine's cards cannot run the others.
    """
    name = schema.split("(", 1)[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    served = _served.setdefault(name, {})
    native = triton is None if native is None else native
    _forms[name] = tuple(form for form, has in (("native", native), ("triton", triton is not None)) if has)
    _ours[name] = cuda and (native or triton is not None)

    if _has_kernel(name, "CPU"):
        # csrc/autograd's are ATen's products, formed without Python
        served["CPU"] = "native" if native else f"composite ({_why_composite('CPU', native, triton is not None)})"
    elif triton and FORCED == "triton" and INTERPRET and has_triton():
        library.impl(name, triton, "CPU")
        served["CPU"] = "triton (interpreted)"
    else:
        library.impl(name, composite, "CPU")
        served["CPU"] = f"composite ({_why_composite('CPU', native, triton is not None)})"

    if triton and triton_serves():
        if not _has_kernel(name, "CUDA"):  # csrc/autograd's hands over what it does not form
            library.impl(name, triton, "CUDA")
        served["CUDA"] = "triton"
    elif native and _has_kernel(name, "CUDA") and not cuda_unfit(_native_cuda):
        served["CUDA"] = "native"
    else:
        if native or not _has_kernel(name, "CUDA"):  # csrc/autograd's products are ATen's
            library.impl(name, composite, "CUDA", allow_override=True)
        served["CUDA"] = f"composite ({_why_composite('CUDA', native, triton is not None)})"
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _why_composite(device: str, native: bool, triton: bool) -> str:
    """Why an op with these backends runs on ATen there."""
    if FORCED == "composite":
        return "FASTPEFT_BACKEND=composite"
    unfit = cuda_unfit(_native_cuda if native else (0, 0)) if device == "CUDA" and (native or triton) else ""
    if unfit and FORCED in ("", "native" if native else "triton"):
        return unfit
    if triton and FORCED in ("", "triton"):
        return _why_no_triton(device)
    if native and FORCED in ("", "native"):
        return native_missing or f"csrc has no {device} form here"
    only = "it has native only" if native else "it has triton only" if triton else "it has no other form"
    return f"FASTPEFT_BACKEND={FORCED}, and {only}" if FORCED else only


def _why_no_triton(device: str) -> str:
    """Why an op whose kernel is Triton's runs on ATen there."""
    if device == "CPU" and not FORCED:
        return "tile-wise: Triton serves it on CUDA, ATen's GEMM and attention on CPU"
    return "triton runs on CPU tensors with TRITON_INTERPRET=1" if has_triton() else "triton is not installed"


def flop_formula(targets, get_raw: bool = False) -> Callable[[Callable], Callable]:
    """PyTorch's ``register_flop_formula``, as soon as its FLOP counter is imported: what counts nothing does not pay for that (85 ms)."""

    def register(formula: Callable) -> Callable:
        _formulas.append((targets, get_raw, formula))
        if loaded(FLOP_COUNTER) is not None:
            _register_formulas()
        return formula

    return register


def _register_formulas() -> None:
    """Hand over the formulas that wait; one that PyTorch has itself stays PyTorch's."""
    counter = loaded(FLOP_COUNTER)
    while _formulas:
        targets, get_raw, formula = _formulas.pop(0)
        if counter.flop_registry.get(targets) is None:
            counter.register_flop_formula(targets, get_raw=get_raw)(formula)


FLOP_COUNTER = "torch.utils.flop_counter"
_formulas: list[tuple] = []
when_imported(FLOP_COUNTER, _register_formulas)


def has_kernel_of_ours(name: str) -> bool:
    """Whether an op has more than its ATen form: ATen on CUDA is then a fallback."""
    return _ours[name]


def leave_to_composite(name: str, device: torch.device, reason: str) -> bool:
    """Notes that some calls of an op run on ATen, for :func:`backend_of`; whether this was not known yet."""
    served, key = _served.setdefault(name, {}), device.type.upper()
    told = f"triton; composite for some shapes ({reason})"
    known = served.get(key, "").startswith("triton; composite")
    served[key] = served[key] if known else told
    return not known


def backend_of() -> dict[str, dict[str, str]]:
    """Which backend serves each defined op on each device, with the reason: ``{op: {"CPU": ..., "CUDA": ...}}``."""
    return {name: dict(devices) for name, devices in sorted(_served.items())}


def forms_of() -> dict[str, tuple[str, ...]]:
    """The backends that each defined op has beside composite, whether or not they serve here."""
    return dict(sorted(_forms.items()))
