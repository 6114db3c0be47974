"""LaVIN's published adapters -> fastpeft's LaVIN: names, shapes and the implied options of its MM-Adapters.

Source: mm_adapter.py, model.py, misc.py and train.py of https://github.com/luogen1996/LaVIN. A file holds, under ``model``, the float32
parameters of a training whose names have "adapter" in them, from a distributed run behind ``module.``; beside it the optimiser and the
run's arguments, which alone say the router's temperature and the adapters' scale. An adapter is made of 1 x 1 convolutions: conv_A
[h, C, 1] down; conv_B and conv_D [C, h / groups, 1] up, mixed by the first and the second output of expert_weights [2, C]. The neck is
adapter_proj; rows of adapter_modality_embedding are text, and image and text.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig

from fastpeft.convert.tensors import check_tensors, common_size, count_layers, listing
from fastpeft.methods import MMAdapter
from fastpeft.models.lavin import LavinConfig

EVERY, SEQUENCE, DROPOUT = 4, 512, 0.1  # of LaVIN's code: layers between two [cls] tokens; tokens with t_m; in its adapters
_BLOCKS = {  # part: (LaVIN's names of its layers, fastpeft's)
    "vision": ("backbone.visual.transformer.resblocks.", "vision.encoder.layers."),
    "llm": ("layers.", "llm.model.layers."),
}
_NECK = {
    "adapter_proj.conv_A.weight": "neck.down.weight",
    "adapter_proj.conv_A.bias": "neck.down.bias",
    "adapter_proj.conv_B.weight": "neck.up.weight",
    "adapter_proj.conv_B.bias": "neck.up.bias",
    "adapter_modality_embedding.weight": "neck.modality.weight",
}
_NOT_OURS = (  # what LaVIN's code can also train, and why it does not convert
    (r"\.adapter_mlp\.", "adapters before feed-forward layers (adapter_type block or router_block), which no published file has"),
)


@dataclass(frozen=True)
class Lavin:
    """``base``: the neck's tensors. ``adapters``: by part, the tensors of its MM-Adapters, by their names in the model; ``methods``: by
    part, the MM-Adapter itself."""

    config: LavinConfig
    base: dict[str, Tensor]
    adapters: dict[str, dict[str, Tensor]]
    methods: dict[str, MMAdapter]
    notes: list[str]


def is_lavin(names) -> bool:
    """Whether a file with tensors of these names holds LaVIN's adapters."""
    return any(re.search(r"(^|\.)adapter_(attn|mlp|proj|modality_embedding)\.", str(name)) for name in names)


def lavin_to_fastpeft(
    state: dict,
    arguments: dict[str, Any],
    vision: CLIPVisionConfig,
    text: LlamaConfig,
    scale: float | None = None,
    temperature: float | None = None,
) -> Lavin:
    """A file's ``model`` and ``args``, on these image encoder and language model. ``scale`` and ``temperature`` are the file's own, where
    not given, or else those of the published runs. ValueError names every missing, unexpected and misshapen tensor."""
    state = {str(name).replace("module.", ""): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    for pattern, what in _NOT_OURS:
        if any(re.search(pattern, name) for name in state):
            raise ValueError(f"holds {what}: only adapters before attention convert")
    seen = [name for name in state if name.startswith(_BLOCKS["vision"][0])]
    if seen and not any(".conv_D." in name or ".expert_weights." in name for name in seen):
        raise ValueError(
            "its adapters of CLIP have no router (visual_adapter_type normal): the official code then drops the residual around them, "
            "which no method here does; only visual_adapter_type router converts"
        )
    if vision.num_hidden_layers < EVERY:
        raise ValueError(f"CLIP has {vision.num_hidden_layers} layers: LaVIN takes a token after every fourth")
    sizes = {"vision": (vision.num_hidden_layers, vision.hidden_size), "llm": (text.num_hidden_layers, text.hidden_size)}
    wanted: dict[str, tuple[int, ...]] = {}
    shapes = {}
    for part, (layers, width) in sizes.items():
        theirs = _BLOCKS[part][0]
        held = count_layers(state, re.escape(theirs) + r"(\d+)\.", 0)
        held_width = common_size(state, width, *((f"{theirs}{i}.adapter_attn.conv_A.weight", 1) for i in range(held)))
        if held and (held, held_width) != (layers, width):
            name = {"vision": "CLIP", "llm": "LLaMA"}[part]
            raise ValueError(f"made for a {name} of {held} layers of width {held_width}, and the one given has {layers} of {width}")
        shapes[part] = _bottleneck(state, theirs, layers)
        wanted |= _adapter_shapes(theirs, layers, width, *shapes[part])
    middle = common_size(state, 128, ("adapter_proj.conv_A.weight", 0), ("adapter_proj.conv_A.bias", 0), ("adapter_proj.conv_B.weight", 1))
    width = text.hidden_size
    wanted |= dict(zip(_NECK, [(middle, vision.hidden_size), (middle,), (width, middle), (width,), (2, width)]))
    check_tensors(state, wanted)
    scale, temperature, notes = _numbers(arguments, scale, temperature, width)
    new = partial(MMAdapter, scale=scale, temperature=temperature, dropout=DROPOUT)
    config = LavinConfig(
        vision_config=vision,
        text_config=text,
        cls_every=EVERY,
        neck_dim=middle,
        architectures=["LavinForConditionalGeneration"],
        dtype=text.dtype,
    )
    return Lavin(
        config,
        {ours: state[name] for name, ours in _NECK.items()},
        {part: _adapters(state, *_BLOCKS[part], layers) for part, (layers, _) in sizes.items()},
        {part: new(h=h, groups=groups) for part, (h, groups) in shapes.items()},
        notes,
    )


def _bottleneck(state: dict[str, Tensor], layers_name: str, layers: int) -> tuple[int, int]:
    """h and the groups of the projections up."""
    places = [f"{layers_name}{i}.adapter_attn." for i in range(layers)]
    h = common_size(state, 8, *((f"{place}conv_A.{kind}", 0) for place in places for kind in ("weight", "bias")))
    narrow = common_size(state, max(h // 2, 1), *((f"{place}conv_{e}.weight", 1) for place in places for e in "BD"))
    return h, max(h // max(narrow, 1), 1)


def _adapter_shapes(layers_name: str, layers: int, width: int, h: int, groups: int) -> dict[str, tuple[int, ...]]:
    one = {"conv_A.weight": (h, width, 1), "conv_A.bias": (h,), "expert_weights.weight": (2, width), "expert_weights.bias": (2,)}
    for expert in "BD":
        one |= {f"conv_{expert}.weight": (width, h // groups, 1), f"conv_{expert}.bias": (width,)}
    return {f"{layers_name}{i}.adapter_attn.{name}": shape for i in range(layers) for name, shape in one.items()}


def _adapters(state: dict[str, Tensor], theirs: str, ours: str, layers: int) -> dict[str, Tensor]:
    out = {}
    for i in range(layers):
        got = lambda name: state[f"{theirs}{i}.adapter_attn.{name}"]  # noqa: B023, E731
        block = {
            "w_down": got("conv_A.weight").squeeze(-1),
            "b_down": got("conv_A.bias"),
            "w_up": torch.stack([got("conv_B.weight"), got("conv_D.weight")]).squeeze(-1),
            "b_up": torch.stack([got("conv_B.bias"), got("conv_D.bias")]),
            "router_weight": got("expert_weights.weight"),
            "router_bias": got("expert_weights.bias"),
        }
        out |= {f"{ours}{i}.mm_adapter.{name}": tensor for name, tensor in block.items()}
    return out


def _numbers(arguments: dict, scale: float | None, temperature: float | None, width: int) -> tuple[float, float, list[str]]:
    published = {"adapter_scale": 1.0, "temperature": 5.0 if width == 5120 else 10.0}  # the repository's scripts: 5 for 13B
    found, unknown = [], []
    for name, given in (("adapter_scale", scale), ("temperature", temperature)):
        value = given if given is not None else arguments.get(name, published[name])
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"its args give {name} = {value!r}, and a number is needed")
        found.append(float(value))
        if given is None and name not in arguments:
            unknown.append(f"{name} {value:g}")
    return *found, [f"the file does not say {listing(unknown)}: taken from the published runs"] if unknown else []
