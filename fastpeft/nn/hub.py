"""Mapping of transformers' layers to fastpeft's operators, for Hugging Face's ``kernels``.

transformers marks layers with ``use_kernel_forward_from_hub(name)``; ``kernels.kernelize`` gives each a forward from a mapping of names.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fastpeft import ops


class RMSNorm(nn.Module):
    """What transformers marks as "RMSNorm": ``weight x / rms(x)``, with ``variance_epsilon``; float32 statistics, one rounding."""

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)


@dataclass(frozen=True)
class OwnLayer:
    """A layer of this package where ``kernels`` expects one of a repository."""

    layer_name: str

    def load(self) -> type[nn.Module]:
        """The layer's class: no parameters of its own, a ``forward`` that is bound to transformers' module."""
        return LAYERS[self.layer_name]


LAYERS = {"RMSNorm": RMSNorm}


def kernel_mapping() -> dict[str, dict[str, OwnLayer]]:
    """``{layer: {device: implementation}}`` for ``kernels.register_kernel_mapping`` or ``kernels.use_kernel_mapping``, for every mode::

        with kernels.use_kernel_mapping(fastpeft.nn.kernel_mapping()):
            kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cuda")

    It serves who runs a model through ``kernels`` already; :func:`fastpeft.optimize` exchanges more, and needs no such package. A module
    has one or the other: what is kernelized has a forward of its own, which ``optimize`` leaves and names in its report.
    """
    return {name: dict.fromkeys(("cpu", "cuda"), OwnLayer(name)) for name in LAYERS}
