"""Quantise a backbone: the linear layers of its attention and feed-forward blocks go into bitsandbytes' 4 or 8 bits, nothing else does.

Embeddings, head, norms, the patch convolution and what joins an image encoder to a language model keep their dtype. QLoRA's choices
(Dettmers et al., 2023): NF4 in blocks of 64, their maxima quantised again ("double"); in 8 bits, LLM.int8's one scale an output.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import nn

from fastpeft.methods.base import find
from fastpeft.methods.quantized import is_quantized
from fastpeft.models.family import ModelSource
from fastpeft.registry import original_class

BITS = ("4bit", "8bit")
BLOCK, NESTED = 64, 256  # weights of a maximum, maxima of a second one


def check_quantize(quantize: str, dtype: torch.dtype, source: ModelSource, meta: bool = False) -> None:
    """ValueError for a format, a dtype, a machine or a model that cannot."""
    if quantize not in BITS:
        raise ValueError(f"quantize must be one of {', '.join(BITS)}, not {quantize!r}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"quantize={quantize!r} is for a model in float32, bfloat16 or float16, not {dtype}")
    if not meta and find_spec("bitsandbytes") is None:
        raise ValueError(f"quantize={quantize!r} needs bitsandbytes: pip install 'fastpeft[bitsandbytes]', or leave quantize out")
    if source.kind != "causal":
        raise ValueError(f"quantize={quantize!r} is for models with a language model of LLaMA's kind, and {source} is none")


def quantizable(model: nn.Module, parts) -> Iterator[tuple[str, nn.Linear]]:
    """(name, layer) of what is quantised."""
    for part in parts:
        root = part.of(model)
        for block, module in find(root, (*part.attention, *part.ffn)):
            for name, layer in module.named_modules():
                if isinstance(layer, nn.Linear) and part.holds(f"{block}.{name}"):
                    yield ".".join(filter(None, (part.path, block, name))), layer


def quantize_base(model: nn.Module, parts, quantize: str, device: torch.device) -> nn.Module:
    """Replace the layers' weights in place, one at a time, each on ``device``. ``parts``: of the model; MISS's cannot be."""
    import bitsandbytes as bnb

    for name, layer in list(quantizable(model, parts)):
        if original_class(layer) is not nn.Linear or is_quantized(layer.weight):
            raise ValueError(f"{name} is a {type(layer).__name__} already: quantise a model once, before it is adapted")
        shape = (layer.in_features, layer.out_features, layer.bias is not None)
        weight = layer.weight.detach()
        if quantize == "4bit":
            new = bnb.nn.Linear4bit(*shape, quant_type="nf4", compress_statistics=True, device="meta")
            kept = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", blocksize=BLOCK, compress_statistics=True, module=new)
        else:
            new = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False, device="meta")
            kept = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        new.weight = kept.to(device)
        new.bias = layer.bias
        model.set_submodule(name, new.requires_grad_(False).train(layer.training))
    return model


def quantized_bytes(shape: tuple[int, int], quantize: str) -> int:
    """What a weight [out, in] takes."""
    elements = shape[0] * shape[1]
    if quantize == "8bit":
        return elements + 4 * shape[0]
    blocks = -(-elements // BLOCK)
    tables = 4 * (16 + 256 + 1)  # the two codes' values and the mean of the maxima
    return -(-elements // 2) + blocks + 4 * -(-blocks // NESTED) + tables
