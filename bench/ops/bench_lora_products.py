"""LoRA's narrow products as csrc/autograd/lora_linear.h lays S and dS out, [r, M], and laid out [M, r].

They are ATen's, on CUDA cuBLAS's. On an H200 a layer of 700 rows took 48 us of graph replay so, and 38 in PyTorch's own order of products,
which has more launches: this tells which of them are to blame.
"""

from collections.abc import Callable

import torch

from bench.timing import Row, Settings, compare

SHAPES = [(700, 768, 768), (8192, 768, 768), (8192, 4096, 4096)]  # rows, in, out
R = 8


def products(m: int, k: int, n: int, device: str, dtype: torch.dtype) -> dict[str, tuple[Callable, Callable]]:
    """By name, both layouts' calls."""
    x, dy, A, B, y = (torch.randn(s, device=device).to(dtype) for s in ((m, k), (m, n), (R, k), (n, R), (m, n)))
    wide = torch.randn(R, m, device=device).to(dtype)
    tall = wide.t().contiguous()
    return {
        "S": (lambda: A @ x.t(), lambda: x @ A.t()),
        "y + S B": (lambda: torch.addmm(y, wide.t(), B.t()), lambda: torch.addmm(y, tall, B.t())),
        "dS": (lambda: B.t() @ dy.t(), lambda: dy @ B),
        "dB": (lambda: dy.t() @ wide.t(), lambda: dy.t() @ tall),
        "dA": (lambda: wide @ x, lambda: tall.t() @ x),
        "dS A": (lambda: wide.t() @ A, lambda: tall @ A),
    }


def run(settings: Settings) -> list[Row]:
    rows = []
    for dtype in settings.dtypes:
        for m, k, n in SHAPES[:1] if settings.device == "cpu" else SHAPES:
            for product, (ours, other) in products(m, k, n, settings.device, dtype).items():
                rivals = {"[r, M]": ours, "[M, r]": other}
                rows += compare("lora_products", f"{product}, {m}x{k}x{n} r{R}", dtype, rivals, settings)
    return rows
