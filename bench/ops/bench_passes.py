"""The passes of LoRA, LaVIN's adapter and Excitor alone, as they are launched and with other blocks, against a copy of what they read.

On CUDA with Triton, in 16 bit. A ratio of 1 is a copy's rate: a pass that only reads may have 2, one that reads two tensors and writes one
2/3. Blocks are those of the launch but for what a row's name says; one that wins belongs into its kernel's file.
"""

from collections.abc import Callable
from unittest import mock

import torch

from bench.timing import Row, Settings, compare
from fastpeft._library import has_triton

M = 8192
SIDES = (768, 4096)  # LoRA's in and out
R, WIDTH, HEADS, PROMPTS = 8, 4096, 32, 30


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


class Launch:
    """A launch that ``fn`` makes of ``kernel``, to be made again with other arguments."""

    def __init__(self, module, kernel: str, fn: Callable):
        self.kernel = getattr(module, kernel)
        with mock.patch.object(module, kernel, self):
            fn()

    def __getitem__(self, grid):
        def launch(**arguments):
            self.grid, self.arguments = grid, arguments
            return self.kernel[grid](**arguments)

        return launch

    def varied(self, grid=None, **changed) -> Callable:
        return lambda: self.kernel[grid or self.grid](**self.arguments | changed)


def named(changed: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in changed.items())


def lora(side: int, device: str, dtype: torch.dtype) -> dict[str, Callable]:
    from fastpeft.kernels import lora_branch as branch

    x, dy, A, B, bias = (torch.randn(s, device=device).to(dtype) for s in ((M, side), (M, side), (R, side), (side, R), (side,)))
    y, s, wide = torch.empty_like(dy), x.new_zeros(R, M), torch.zeros(R, M, device=device)
    parts = [branch.branch_pass(t, wide, A, outer=True) for t in (x, dy)]
    calls = {
        "S": lambda: branch.project_down(x, A, s),
        "S and y_0": lambda: branch.project_down(x, A, s, B=B, up=y, bias=bias),
        "y_0": lambda: branch.branch_pass(None, s, B.t(), up=y, bias=bias),
        "dS": lambda: branch.project_down(dy, B.t(), wide),
        "dS and dB": lambda: branch.branch_pass(dy, s, B.t(), outer=True, down=wide),
        "dA": lambda: branch.branch_pass(x, wide, A, outer=True),
        "dA and dx_0": lambda: branch.branch_pass(x, wide, A, outer=True, up=y),
        "their sums": lambda: branch.reduce_grads(parts[0], A, parts[1], B),
    }
    for what, blocks in (
        ("dS and dB", {"BLOCK_M": 16}),
        ("dS and dB", {"BLOCK_C": 512, "BLOCK_M": 16, "SHARES": 8, "num_warps": 8}),
        ("dA and dx_0", {"BLOCK_C": 512, "SHARES": 8, "num_warps": 8}),
        ("dA and dx_0", {"BLOCK_M": 32}),
    ):
        calls[f"{what}: {named(blocks)}"] = _with_blocks(branch, calls[what], blocks)
    for programs in (88, 176):
        for what in ("dS and dB", "dA and dx_0"):
            calls[f"{what}: {programs} x 3 programs"] = _with_programs(branch, calls[what], programs)
    return calls


def _with_blocks(branch, call: Callable, changed: dict) -> Callable:
    own = branch._pass_blocks

    def launched():
        with mock.patch.object(branch, "_pass_blocks", lambda *sizes, **flags: own(*sizes, **flags) | changed):
            call()

    return launched


def _with_programs(branch, call: Callable, programs: int) -> Callable:
    def launched():
        with mock.patch.object(branch, "PROGRAMS", programs):
            call()

    return launched


def adapter(norm: bool, device: str, dtype: torch.dtype) -> dict[str, Callable]:
    from fastpeft.kernels import mm_adapter as kernels

    sizes = ((4, M // 4, WIDTH), (8, WIDTH), (8,), (2, WIDTH, 4), (2, WIDTH), (4, 2), (WIDTH,))
    x, *params, gamma = (torch.randn(s, device=device).to(dtype) for s in sizes)
    gamma, how = gamma if norm else None, (*params, 1.0, 2, 0.0, None)
    _, a, rstd = kernels.norm_mm_adapter_fwd(x, gamma, 1e-6, *how)

    def backward(*needs):
        return kernels.norm_mm_adapter_bwd(x, x, gamma, rstd if norm else None, a, *how, *needs)

    calls = {
        "forward": lambda: kernels.norm_mm_adapter_fwd(x, gamma, 1e-6, *how),
        "dx": lambda: backward(True, False, False, False, False),
        "parameters": lambda: backward(False, False, True, True, False),
        "backward": lambda: backward(True, False, True, True, False),
    }
    for what, kernel in (("forward", "_mm_adapter_fwd_kernel"), ("dx", "_mm_adapter_dx_kernel")):
        launch = Launch(kernels, kernel, calls[what])
        for rows, warps, stages, columns in ((16, 8, 4, 512), (16, 8, 2, 512), (16, 4, 3, 256), (32, 8, 3, 512), (32, 4, 3, 256)):
            blocks = {"BLOCK_M": rows, "WARPS": warps, "STAGES": stages, "BLOCK_C": columns, "num_warps": warps}
            calls[f"{what}: {named(blocks)}"] = launch.varied((ceil_div(M, rows),), **blocks)
    return calls


def excitor(device: str, dtype: torch.dtype) -> dict[str, Callable]:
    from fastpeft.kernels import excitor_keys as kernels

    sizes = ((4, M // 4, WIDTH), (4, M // 4, 16), (1, 16, PROMPTS), (PROMPTS, WIDTH), (HEADS,))
    flat, u, n, prompt, gate = (torch.randn(s, device=device).to(dtype) for s in sizes)
    k = flat.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    calls = {
        "merge": lambda: kernels.excitor_merge_fwd(k, u, n, None, prompt, None, gate),
        "its backward": lambda: kernels.excitor_text_bwd(flat, u, n, prompt, gate, True, True),
    }
    launch = Launch(kernels, "_excitor_merge_fwd_kernel", calls["merge"])
    for rows, columns, warps, stages, parts in ((16, 128, 4, 3, 1), (64, 128, 4, 3, 1), (32, 256, 8, 3, 1), (32, 128, 4, 3, 2)):
        blocks = {"BLOCK_M": rows, "BLOCK_C": columns, "num_warps": warps, "STAGES": stages}
        grid = (parts, ceil_div(M // 4, rows), 4)
        steps = ceil_div(ceil_div(WIDTH, columns), parts)
        calls[f"merge: {named(blocks)}, {parts} parts"] = launch.varied(grid, STEPS=steps, **blocks)
    return calls


def run(settings: Settings) -> list[Row]:
    if settings.device != "cuda" or not has_triton():
        return []
    rows = []
    for dtype in settings.dtypes:
        if dtype.itemsize != 2:
            continue
        cases = [(f"LoRA's, {M} x {side}, r {R}", lora(side, settings.device, dtype), side) for side in SIDES]
        for norm in (True, False):
            name = f"adapter's, {M} x {WIDTH}{', with its norm' if norm else ''}"
            cases.append((name, adapter(norm, settings.device, dtype), WIDTH))
        cases.append((f"Excitor's, {M} x {WIDTH}", excitor(settings.device, dtype), WIDTH))
        for name, calls, width in cases:
            source = torch.randn(M, width, device=settings.device).to(dtype)
            target = torch.empty_like(source)
            calls["a copy"] = lambda source=source, target=target: target.copy_(source)
            rows += compare("passes", name, dtype, {what: _alone(call) for what, call in calls.items()}, settings)
    return rows


def _alone(call: Callable) -> Callable:
    """Without its result: partial sums are no numbers to check."""

    def launched():
        call()

    return launched
