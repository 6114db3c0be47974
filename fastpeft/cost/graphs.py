"""Which steps pay as CUDA graphs, and the memory that these take: inputs and gradients that stay, and a pool of activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpeft.data.buckets import measured_batch, padded
from fastpeft.labels import IGNORE_INDEX
from fastpeft.models import family_of
from fastpeft.ops._private import without_dispatch_modes
from fastpeft.static_shapes import NotStatic, Seeds, static_shapes

# A step pays as a graph where the host takes longer to launch it than the GPU to compute it. That is told from sizes, not by a clock: a run
# that is resumed must pad its batches as one that was not interrupted. The host's side as an H200's machine took for linear layers of 700
# rows, forward and backward, eagerly: 0.1 ms, 0.3 to 0.4 with LoRA (bench/results/gpu_h200.md). The GPU's side is modelled: forward and the
# activations' gradients at what products of a step's size sustain on an H100, which has other units for float32
HOST_SECONDS = 2e-4  # for each module with parameters of its own
FLOPS = {"16 bit": 300e12, "tf32": 150e12, "float32": 40e12}


class InGraphs(NamedTuple):
    """Bytes: of the padded batch, and the most that forward and backward hold at once beside it, weights and gradients."""

    inputs: int
    activations: int


def most_tokens(model: nn.Module) -> float:
    """Of a batch whose launches take the host longer than its products the GPU."""
    parameters = list(model.parameters())
    launching = sum(1 for module in model.modules() if next(module.parameters(recurse=False), None) is not None)
    wide = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "float32"
    flops = FLOPS["16 bit" if parameters[0].element_size() == 2 else wide]
    return HOST_SECONDS * launching * flops / (4 * sum(p.numel() for p in parameters))


def longest_text(model: nn.Module) -> int:
    """Tokens that a model with tables of positions has room for, beside a prefix."""
    prefixes = (module.prefix_encoder.tokens for module in model.modules() if getattr(module, "prefix_encoder", None) is not None)
    return model.config.text_config.max_position_embeddings - max(prefixes, default=0)


def in_graphs(network: nn.Module, inputs: dict[str, Tensor], batch: Mapping[str, Any], samples: int, tracker) -> InGraphs | None:
    """The step of ``inputs``, made of a collated ``batch`` where there is one, in the static shapes of its bucket, on fake tensors whose
    bytes ``tracker`` follows; the gradients are there. None where it is not captured: its samples share what they begin with, or the GPU
    takes longer for it than the host."""
    family, inputs = family_of(network), dict(inputs)
    with without_dispatch_modes():
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        if family.kind == "vqa" and "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = inputs["labels"].clamp(min=0)
            inputs["decoder_attention_mask"] = (inputs["labels"] != IGNORE_INDEX).long()
        terms, seeds = torch.ones(()), Seeds(0, torch.device("cpu"))
    try:
        own = measured_batch(inputs, batch, samples, family.image_tokens(network.config))
        if own.bucket.tokens + own.bucket.answers > most_tokens(network):
            return None
        bucket = own.bucket.rounded(longest_text(network) if family.kind == "vqa" else 1 << 30)
        static = padded(own, bucket)
        before = tracker.peak = tracker.live
        with static_shapes(bucket.sizes, seeds):
            network(**static, num_items_in_batch=terms).loss.backward()
    except NotStatic:
        return None
    return InGraphs(sum(t.nbytes for t in static.values()), tracker.peak - before)
