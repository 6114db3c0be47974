"""Linear layers that write their quantised weight out when they multiply by it, with adapters and without."""

from __future__ import annotations

from torch import Tensor, nn

from fastpeft.methods.adapted import AdaptedLinear, Terms, terms_with
from fastpeft.methods.quantized import is_quantized, why_not
from fastpeft.methods.replacement import register


class Written:
    """y = x W^T + b with W written out (see quantized.py)."""

    layout_aware = True
    plain_class = nn.Linear  # what it is once its weight stays written out
    unfit = staticmethod(why_not)  # '' or why a layer stays as it is

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        terms = self.terms()
        return super().forward(x) if terms is None else terms(x)

    def terms(self) -> Terms | None:
        """None for a layer that is not quantised: its own way."""
        return terms_with(self) if is_quantized(self.weight) else None


class WrittenLinear(Written, nn.Linear):
    """PyTorch's layer with a weight of one of torchao's classes."""


register({nn.Linear: WrittenLinear})


class AdaptedWritten(AdaptedLinear, WrittenLinear):
    """The same with LoRA and IA3."""

    plain_class = AdaptedLinear


HOSTS = {WrittenLinear: AdaptedWritten}
