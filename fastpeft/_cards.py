"""The machine's NVIDIA cards, asked of NVML: no CUDA context is made, so that a process may still fork."""

from __future__ import annotations

import ctypes
import functools
import os


@functools.cache
def cards() -> tuple[tuple[int, int], list[tuple[int, int]]] | None:
    """(CUDA version that the driver serves, compute capability of each visible card); None where there is no driver or no card."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2():
            return None
    except (OSError, AttributeError):
        return None
    try:
        version, count = ctypes.c_int(), ctypes.c_uint()
        if nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(version)) or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return None
        found = []
        for index in range(count.value):
            device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
            if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)):
                continue
            if nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor)) == 0:
                found.append((major.value, minor.value))
    except AttributeError:
        return None
    finally:
        nvml.nvmlShutdown()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    numbered = all(entry.strip().isdigit() and int(entry) < len(found) for entry in visible)  # else names: all of them count
    # NVML counts by bus, and CUDA too where it is told to: else the fastest is the first, whichever that is
    if numbered and os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
        found = [found[int(entry)] for entry in visible]
    return ((version.value // 1000, version.value % 1000 // 10), found) if found else None
