"""Environment report: versions, devices, and the backend of each operator (`fastpeft doctor`)."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
import platform

import torch

from fastpeft import _library, ops
from fastpeft.ops import attention_backends

OPTIONAL = ("triton", "flash_attn", "xformers", "peft", "tensorboard")


def diagnose() -> dict[str, dict]:
    """{"environment": versions and devices, "operators": {op: {"CPU": backend and why, "CUDA": ...}}}."""
    for module in pkgutil.iter_modules(ops.__path__):
        importlib.import_module(f"fastpeft.ops.{module.name}")  # defines its operators
    environment = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads",
        "csrc": _library.native_missing or "loaded",
        "csrc/autograd": _library.autograd_missing or "loaded",
        "forced backend": os.environ.get("FASTPEFT_BACKEND") or "none",
    }
    environment["forced attention"] = attention_backends.CHOICE or "none"
    environment |= {name: "installed" if importlib.util.find_spec(name) else "not installed" for name in OPTIONAL}
    # attention registers no operator: it calls kernels of others
    attention = {"CPU": "composite (ATen's flash attention)", "CUDA": attention_backends.serving()}
    attention["CUDA"] += "; with a prefix, ATen's kernels and prefix_attention" if attention_backends.CHOICE in ("", "sdpa") else ""
    return {"environment": environment, "operators": {"attention": attention} | _library.backend_of()}
