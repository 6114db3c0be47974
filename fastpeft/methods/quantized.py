"""Linear layers with a frozen quantised weight: bitsandbytes' 4-bit and 8-bit layers, and torchao's weight-only tensors.

The base stays in the library's own modules: files, devices and transformers' loading are the library's. :class:`DequantizingLinear`
computes x W^T + b with W = dequantise(codes), made when an op multiplies by it (ops/_quantized_weight.py). bitsandbytes' own
8-bit layer also rounds activations to int8; ours does not, so a quantised model equals the one with dequantised weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastpeft._when_imported import loaded
from fastpeft.methods.linear_spec import LinearSpec
from fastpeft.ops._gemm import widened
from fastpeft.ops._quantized_weight import QuantizedWeight
from fastpeft.ops._recompute import recipe_of
from fastpeft.ops.lora_linear import Projection, linear
from fastpeft.registry import fuses, swap_class

# what bitsandbytes' layers have beside a plain layer's attributes
LEFTOVERS = ("quant_state", "quant_storage", "compute_dtype", "compute_type_is_set", "support_avx512bf16_for_cpu", "state", "index")


class FourBit(QuantizedWeight):
    """bitsandbytes' blockwise NF4 or FP4: two weights a byte, an absolute maximum for every block (itself in 8 bit, if nested)."""

    def __init__(self, layer: nn.Linear):
        self.weight, self.shape = layer.weight, layer.weight.quant_state.shape

    def dense(self, dtype: torch.dtype) -> Tensor:
        from bitsandbytes import functional

        weight = self.weight
        if getattr(weight.quant_state, "packing_format_for_cpu", False):  # bitsandbytes' own inference on AVX512 lays codes out anew
            weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)
        return functional.dequantize_4bit(weight.detach(), weight.quant_state).to(dtype)


class EightBit(QuantizedWeight):
    """bitsandbytes' int8 with an absolute maximum for every output."""

    def __init__(self, layer: nn.Linear):
        self.codes, self.shape = layer.weight.detach(), layer.weight.shape
        self.scale = getattr(layer.weight, "SCB", None)
        if self.scale is None:  # its first forward moves it there
            self.scale = layer.state.SCB

    def dense(self, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant

        return int8_vectorwise_dequant(self.codes, self.scale.to(self.codes.device)).to(dtype)


class Subclass(QuantizedWeight):
    """A weight of one of torchao's classes, which say themselves what they are in full."""

    def __init__(self, layer: nn.Linear):
        self.weight, self.shape = layer.weight.detach(), layer.weight.shape

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.weight.dequantize().to(dtype)


def is_quantized(tensor: Tensor) -> bool:
    """Whether a weight's elements are not what it holds in memory."""
    if (ao := loaded("torchao.utils")) is not None and isinstance(tensor, ao.TorchAOBaseTensor):
        return True
    if (bnb := loaded("bitsandbytes.nn")) is None:
        return False
    if isinstance(tensor, bnb.Params4bit):
        return tensor.quant_state is not None
    return isinstance(tensor, bnb.Int8Params) and tensor.dtype == torch.int8


def weight_of(layer: nn.Linear) -> Tensor | QuantizedWeight:
    """The weight of a linear layer, as ops take it."""
    weight = layer.weight
    if type(weight) is nn.Parameter or not is_quantized(weight):
        return weight.t() if is_conv1d(layer) else weight
    bnb = loaded("bitsandbytes.nn")
    if bnb is not None and isinstance(weight, bnb.Params4bit | bnb.Int8Params):
        return (FourBit if isinstance(weight, bnb.Params4bit) else EightBit)(layer)
    if reason := why_not(layer):
        raise TypeError(f"{reason}, so nothing trains on top of it")
    return Subclass(layer)


def why_not(layer: nn.Linear) -> str:
    """'' or why a layer that was made to be quantised cannot be written out."""
    if not is_quantized(layer.weight):
        return "its weight is not quantised yet: move the model to its device first"
    kind = type(layer.weight)
    if kind.dequantize is Tensor.dequantize and not hasattr(layer.weight, "quant_state") and not hasattr(layer.weight, "SCB"):
        return f"torchao's {kind.__name__} cannot be written out (use a format with dequantize(), such as Int8WeightOnlyConfig's)"
    return ""


def is_held(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose weight is quantised."""
    return isinstance(module, nn.Linear) and is_quantized(module.weight)


def plain_linear_spec(layer: nn.Linear) -> LinearSpec:
    """The specification of a linear layer without adapters, quantised or not."""
    return LinearSpec(Projection(weight_of(layer), layer.bias))


def is_conv1d(layer: nn.Module) -> bool:
    """Whether ``layer`` is GPT-2's linear layer, transformers' Conv1D, whose weight is [in, out]; also of a class made of it, as
    ``torch.nn.utils.parametrize`` and FSDP make one."""
    home = loaded("transformers.pytorch_utils")
    return home is not None and isinstance(layer, home.Conv1D)


NOTE_8BIT = "bitsandbytes' 8-bit layers multiply by their weights written out; their own forward also rounds its input to 8 bit"


@fuses("bitsandbytes.nn.modules.Linear4bit")
@fuses("bitsandbytes.nn.modules.Linear8bitLt", note=NOTE_8BIT)
class DequantizingLinear:
    """y = x W^T + b with W dequantised when it is multiplied by. A layer that is not quantised yet runs its own forward."""

    takes_flat_tokens = True
    plain_class = nn.Linear  # what it is once its weight stays dequantised
    why_not = staticmethod(why_not)  # '' or why a layer stays as it is

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in] -> [..., out]."""
        spec = self.linear_spec()
        return super().forward(input) if spec is None else spec(input)

    def linear_spec(self) -> LinearSpec | None:
        """None for a layer that is not quantised."""
        return plain_linear_spec(self) if is_quantized(self.weight) else None


@fuses("torch.nn.modules.linear.Linear")
class FusedLinear(DequantizingLinear):
    """A linear layer that keeps nothing of its input for a trained weight where backward can form it again (ops/_recompute.py); its
    weight may be of one of torchao's classes."""

    @staticmethod
    def why_not(module: nn.Linear) -> str:
        """'' or why this one stays as it is."""
        return why_not(module) if is_quantized(module.weight) else ""

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in] -> [..., out]."""
        weight = self.weight
        return linear(input, weight if type(weight) is nn.Parameter else weight_of(self), self.bias)

    def linear_spec(self) -> LinearSpec:
        return plain_linear_spec(self)


@fuses("transformers.models.falcon.modeling_falcon.FalconLinear", code="b6c19f635f5a")
class FusedFalconLinear(FusedLinear):
    """Falcon's, which writes the product out."""


@fuses("transformers.pytorch_utils.Conv1D")
class FusedConv1D:
    """GPT-2's linear layer, likewise."""

    takes_flat_tokens = True

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return super().forward(x) if recipe_of(x) is None and not widened(x) else self.linear_spec()(x)

    def linear_spec(self) -> LinearSpec:
        return plain_linear_spec(self)


def size_of(tensor: Tensor) -> int:
    """Elements of a parameter, whatever it holds in memory."""
    state = getattr(tensor, "quant_state", None)
    return tensor.numel() if state is None else state.shape.numel()


def pieces_of(tensor: Tensor) -> list[Tensor]:
    """What a tensor of torchao's classes is made of, and any other itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [piece for name in tensor.__tensor_flatten__()[0] for piece in pieces_of(getattr(tensor, name))]


def bytes_held(layer: nn.Linear) -> int:
    """Bytes of a linear layer's weight in memory, its scales and tables with it."""
    weight = layer.weight
    pieces = pieces_of(weight)
    if (state := getattr(weight, "quant_state", None)) is not None:
        pieces += [state.absmax, state.code, *([state.offset, state.state2.absmax, state.state2.code] if state.nested else [])]
    elif isinstance(held := weight_of(layer), EightBit):
        pieces.append(held.scale)
    return sum(t.numel() * t.element_size() for t in pieces)


@torch.no_grad()
def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Write every quantised linear layer out, in place: a plain ``nn.Linear`` with what was attached to it, the same outputs. ``dtype``:
    of the weights; None: as the model's other weights."""
    if dtype is None:
        plain = [p for p in model.parameters() if p.is_floating_point() and not is_quantized(p)]
        dtype = plain[0].dtype if plain else torch.float32
    for module in model.modules():
        if not is_held(module):
            continue
        held = weight_of(module)
        if type(module).__module__.startswith("bitsandbytes") or hasattr(type(module), "plain_class"):
            swap_class(module, getattr(type(module), "plain_class", nn.Linear))
        module.weight = nn.Parameter(held.dense(dtype), requires_grad=False)
        for name in LEFTOVERS:
            module.__dict__.pop(name, None)
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)
        for name in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
            model.__dict__.pop(name, None)
    return model


def refuse_training(what: str, parameters: dict[str, nn.Parameter]) -> None:
    """ValueError where weights that are to be trained are quantised."""
    if held := [name for name, p in parameters.items() if is_quantized(p)]:
        raise ValueError(
            f"{what} would train {len(held)} quantised weights, such as {held[0]}: a quantised base can only stay as it is. Train adapters"
            f" on it, or leave these modules out when quantising (transformers' llm_int8_skip_modules), or do not quantise"
        )
