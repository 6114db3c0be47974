"""Backbones: what :func:`build` can make, and where methods attach in it. Architectures and weights come from transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import BlipConfig, BlipForQuestionAnswering, LlamaConfig, LlamaForCausalLM, LlavaConfig, PretrainedConfig

from fastpeft.methods import Part
from fastpeft.models import excitor, lavin, llama, llava, miss

ASSETS = Path(__file__).resolve().parents[1] / "assets"


@dataclass(frozen=True)
class Family:
    """Backbones of one class: ``known`` is what has these parts, ``model`` what is built, ``configs`` makes a configuration by name.

    Of a causal language model, ``template`` is the prompt it was trained with, and ``image_tokens(config)`` the number of places that an
    image takes among its tokens; without a template it is a model of visual question answering.
    """

    known: type[nn.Module]
    model: type[nn.Module]
    config: type[PretrainedConfig]
    parts: tuple[Part, ...]
    configs: dict[str, Callable[..., PretrainedConfig]]
    template: str = ""
    image_tokens: Callable[[PretrainedConfig], int] = lambda config: 0


FAMILIES = (
    Family(
        BlipForQuestionAnswering,
        miss.MissForQuestionAnswering,
        BlipConfig,
        miss.PARTS,
        {"miss": miss.miss_config, "miss-tiny": partial(miss.miss_config, tiny=True)},
    ),
    Family(
        LlamaForCausalLM,
        LlamaForCausalLM,
        LlamaConfig,
        llama.PARTS,
        {name: partial(llama.llama_config, name) for name in llama.SIZES},
        template="alpaca",
    ),
    Family(
        llava.LlavaMedForConditionalGeneration,
        llava.LlavaMedForConditionalGeneration,
        LlavaConfig,
        llava.PARTS,
        {name: partial(llava.llava_med_config, name) for name in llava.SIZES},
        template="llava",
        image_tokens=lambda config: config.image_seq_length,
    ),
    Family(
        excitor.ExcitorForConditionalGeneration,
        excitor.ExcitorForConditionalGeneration,
        excitor.ExcitorConfig,
        excitor.PARTS,
        {name: partial(excitor.excitor_config, name) for name in excitor.SIZES},
        template="alpaca",
    ),
    Family(
        lavin.LavinForConditionalGeneration,
        lavin.LavinForConditionalGeneration,
        lavin.LavinConfig,
        lavin.PARTS,
        {name: partial(lavin.lavin_config, name) for name in lavin.SIZES},
        template="lavin",
        image_tokens=lambda config: config.visual_tokens,
    ),
)
NAMES = tuple(name for family in FAMILIES for name in family.configs)


def family_of(model: nn.Module) -> Family:
    """ValueError for a model that fastpeft does not know."""
    for family in FAMILIES:
        if isinstance(model, family.known):
            return family
    known = ", ".join(family.known.__name__ for family in FAMILIES)
    raise ValueError(f"{type(model).__name__} has no parts here; known: {known}; fastpeft.build makes {', '.join(NAMES)}")


def family_named(model: str | Path) -> Family:
    """The family of a name or a local transformers folder."""
    named = [family for family in FAMILIES if str(model) in family.configs]
    return named[0] if named else read_config(pretrained_folder(model))[0]


def parts_of(model: nn.Module) -> tuple[Part, ...]:
    """The parts of a backbone, in the order of the papers' plans; ValueError for a model that fastpeft does not know."""
    return family_of(model).parts


def pretrained_folder(name: str | Path) -> Path | None:
    """The local transformers folder behind a name or path: a user's own, or one that the package ships; None for a bare name."""
    if str(name) in NAMES:
        shipped = ASSETS / str(name)
        return shipped if (shipped / "model.safetensors").is_file() else None
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{str(name)!r} is neither a model name ({', '.join(NAMES)}) nor a folder; nothing is downloaded")
    return folder


def new_model(name: str, *, device: torch.device, seed: int, **overrides) -> nn.Module:
    """A named backbone with random weights that depend on ``seed`` alone; on ``meta`` it costs nothing."""
    family = family_named(name)
    with torch.random.fork_rng(devices=[]), torch.device("meta" if device.type == "meta" else "cpu"):
        torch.manual_seed(seed)
        return family.model(family.configs[name](**overrides))


def load_model(folder: Path, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A folder of transformers (config.json and safetensors, sharded or not). ValueError names missing, unexpected or misshapen keys."""
    family, config = read_config(folder)
    if device.type == "meta":
        with torch.device("meta"):
            return family.model(config)
    try:
        model, info = family.model.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, by name
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} did not load as {family.known.__name__}: {' '.join(str(error).split())[:600]}") from None
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if wrong:
        raise ValueError(f"{folder} does not hold this model: " + "; ".join(f"{k}: {', '.join(v[:8])}" for k, v in wrong.items()))
    return model


def read_config(folder: Path) -> tuple[Family, PretrainedConfig]:
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text())
        kind, classes = content.get("model_type"), content.get("architectures") or ()
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder} is not a transformers folder: cannot read config.json ({error})") from None
    found = [family for family in FAMILIES if family.config.model_type == kind]
    if not found:
        known = ", ".join(f"{family.config.model_type!r} ({family.known.__name__})" for family in FAMILIES)
        raise ValueError(f"{path}: model_type {kind!r} is not supported; supported: {known}")
    family = next((family for family in found if family.known.__name__ in classes), found[0])
    config = family.config.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    for each in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        attention = getattr(each, "_attn_implementation", None)
        if isinstance(attention, str) and "/" in attention:  # transformers would fetch that repository's code and run it
            raise ValueError(f"{path}: attn_implementation {attention!r} is code from elsewhere, which is not run: leave it out")
    return family, config
