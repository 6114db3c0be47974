"""Which products ATen computes, and in which dtypes."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastpeft.ops._flash import FORWARD_IN_16_BIT

NAMES = ("mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "dot", "_scaled_dot_product", "linear", "convolution")


class Products(TorchDispatchMode):
    """``seen``: (operator, dtype) of every floating factor, inside fastpeft's operators too."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastpeft":  # its CPU kernel, with this mode on
            with self:
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **(kwargs or {}))
        if func.namespace == "aten" and func._schema.name.split("::")[1].startswith(NAMES):
            self.seen += [(str(func), t.dtype) for t in args if isinstance(t, torch.Tensor) and t.is_floating_point()]
        return func(*args, **(kwargs or {}))

    def in_16_bit(self) -> set[str]:
        """Operators that multiplied in bfloat16 or float16; without attention's forward where that has MKL's products."""
        well = {"aten._scaled_dot_product_flash_attention_for_cpu.default"} if FORWARD_IN_16_BIT else set()
        return {op for op, dtype in self.seen if dtype in (torch.bfloat16, torch.float16)} - well
