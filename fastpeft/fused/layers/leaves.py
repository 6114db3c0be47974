"""Dropout and activations on fastpeft's operators: leaves that every backbone has. Linear layers: methods/quantized.py; norms: norms.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.autograd.graph import saved_tensors_hooks
from transformers.activations import GELUActivation, GELUTanh

from fastpeft import ops
from fastpeft.ops._autocast import first_order
from fastpeft.ops._recompute import mark_recomputable, recomputes
from fastpeft.ops.activations import multiply, silu
from fastpeft.ops.relu import relu_pays
from fastpeft.registry import fuses


@fuses("torch.nn.modules.dropout.Dropout")
class FusedDropout:
    """Dropout that keeps a seed for backward instead of a mask."""

    takes_flat_tokens = True

    def forward(self, input: Tensor) -> Tensor:
        """input of any shape."""
        return ops.dropout(input, self.p, self.training)

    @staticmethod
    def why_not(module: nn.Dropout) -> str:
        """'' or why this one stays as it is."""
        return "works in place" if module.inplace else "drops everything" if module.p == 1 else ""


@fuses("transformers.activations.GELUActivation")
class FusedGELU:
    """GELU whose output the linear layer after it need not keep."""

    takes_flat_tokens = True

    def forward(self, input: Tensor) -> Tensor:
        """input of any shape."""
        return ops.gelu(input) if self.act is F.gelu else super().forward(input)

    @staticmethod
    def why_not(module: GELUActivation) -> str:
        """'' or why this one stays as it is."""
        return "" if module.act is F.gelu else "is written out in Python (use_gelu_python)"


@fuses("transformers.activations.GELUTanh")
class FusedGELUTanh:
    """GELU by tanh, likewise."""

    takes_flat_tokens = True

    def forward(self, input: Tensor) -> Tensor:
        """input of any shape."""
        return super().forward(input) if self.why_not(self) else ops.gelu(input, approximate="tanh")

    @staticmethod
    def why_not(module: GELUTanh) -> str:
        """'' or why this one stays as it is."""
        act = module.act
        usual = isinstance(act, partial) and act.func is F.gelu and act.keywords == {"approximate": "tanh"}
        return "" if usual else "is written out in Python (use_gelu_tanh_python)"


@fuses("transformers.activations.NewGELUActivation")
@fuses("transformers.activations.AccurateGELUActivation")
@fuses("transformers.activations.FastGELUActivation")  # its 0.7978845608 is sqrt(2 / pi) to 4e-12 of it
class FusedWrittenGELU:
    """GELU by tanh, which transformers writes out in Python and whose every step PyTorch then keeps."""

    takes_flat_tokens = True

    def forward(self, input: Tensor) -> Tensor:
        """input of any shape."""
        return ops.gelu(input, approximate="tanh")


@fuses("torch.nn.modules.activation.GELU")
class FusedTorchGELU:
    """PyTorch's module, either kind."""

    takes_flat_tokens = True

    def forward(self, input: Tensor) -> Tensor:
        """input of any shape."""
        return ops.gelu(input, approximate=self.approximate)


@fuses("torch.nn.modules.activation.SiLU", "transformers.activations.SiLUActivation")
class FusedSiLU:
    """SiLU whose output the linear layer after it need not keep."""

    takes_flat_tokens = True

    def forward(self, input: Tensor) -> Tensor:
        """input of any shape."""
        return silu(input)

    @staticmethod
    def why_not(module: nn.Module) -> str:
        """'' or why this one stays as it is."""
        return "works in place" if getattr(module, "inplace", False) else ""


@fuses("transformers.activations.QuickGELUActivation")
class FusedQuickGELU:
    """x sigmoid(1.702 x), which keeps its input alone."""

    takes_flat_tokens = True

    def forward(self, input: Tensor) -> Tensor:
        """input of any shape."""
        return silu(input, 1.702)


@fuses("torch.nn.modules.activation.ReLU")
class FusedReLU:
    """ReLU of which the linear layer after it keeps what is above zero."""

    takes_flat_tokens = True

    def forward(self, input: Tensor) -> Tensor:
        """input of any shape."""
        return ops.relu(input) if relu_pays(input) else super().forward(input)

    @staticmethod
    def why_not(module: nn.ReLU) -> str:
        """'' or why this one stays as it is."""
        return "works in place" if module.inplace else ""


@fuses("transformers.activations.ReLUSquaredActivation")
class FusedReLUSquared:
    """Its square, likewise."""

    takes_flat_tokens = True

    def forward(self, input: Tensor) -> Tensor:
        """input of any shape."""
        if not relu_pays(input):
            return super().forward(input)
        above = ops.relu(input)
        return multiply(above, above)


@fuses("transformers.activations.XIELUActivation")  # Apertus
@fuses("transformers.activations.MishActivation")
@fuses("transformers.activations.LaplaceActivation")
@fuses("transformers.activations.ClippedGELUActivation")
class FusedOtherActivation:
    """An activation that transformers writes out, every step of which PyTorch keeps: it keeps its input alone, and the linear layer after
    it nothing."""

    takes_flat_tokens = True

    def forward(self, input: Tensor) -> Tensor:
        """input of any shape."""
        own, kept = super().forward, recomputes() and torch.is_grad_enabled() and input.requires_grad
        return keeping_input_alone(own, input) if kept and not any(p.requires_grad for p in self.parameters()) else own(input)


def keeping_input_alone(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)``, of x and constants, of which backward keeps x alone; what reads the result keeps nothing. Backward computes it once
    more, for both."""
    again = _Again(function)
    return mark_recomputable(_Recomputed.apply(again, x), again, x, peek=function)


class _Again:
    """``function``, whose steps stay from when what read its output asked for it again until its own backward, which comes next."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        self.function, self.steps = function, None

    def __call__(self, x: Tensor) -> Tensor:
        with torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):  # what is kept for a moment is nobody's to count or move
            x = x.detach().requires_grad_()
            self.steps = x, self.function(x)
        return self.steps[1].detach()

    def backward(self, x: Tensor, dy: Tensor) -> Tensor:
        if self.steps is None:
            self(x)
        (x, y), self.steps = self.steps, None
        return torch.autograd.grad(y, x, dy)[0]


class _Recomputed(Function):
    @staticmethod
    def forward(ctx, again: _Again, x: Tensor) -> Tensor:
        ctx.again = again
        ctx.save_for_backward(x)
        return again.function(x)

    @staticmethod
    @first_order
    def backward(ctx, dy: Tensor) -> tuple[None, Tensor]:
        return None, ctx.again.backward(*ctx.saved_tensors, dy)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def gelu_kind(act: nn.Module) -> str | None:
    """The ``approximate`` of GELU that a fused activation computes; None for others."""
    if isinstance(act, FusedTorchGELU):
        return act.approximate
    if isinstance(act, FusedWrittenGELU) or (isinstance(act, FusedGELUTanh) and not act.why_not(act)):
        return "tanh"
    return "none" if isinstance(act, FusedGELU) and not act.why_not(act) else None
