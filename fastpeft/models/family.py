"""The backbones that fastpeft knows: found by name, by a transformers folder, or by a model; each imported when it is asked for."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn

from fastpeft.documents import parse_json
from fastpeft.files import is_folder
from fastpeft.methods import Part
from fastpeft.models.untrusted import check_config, check_memory, check_size, naming_config, tensors_in

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ASSETS = Path(__file__).resolve().parents[1] / "assets"
Kind = Literal["vqa", "causal"]


@dataclass(frozen=True)
class Family:
    """Backbones of one class: ``known`` is what has these parts, ``model`` what is built, ``configs`` makes a configuration by name.

    kind: "vqa", answers of an encoder and decoder to questions about images; "causal", a causal language model. Of the latter ``template``
    is the prompt it was trained with, where its configuration names none (``prompt_template``), and ``image_tokens(config)`` the number of
    places an image takes among its tokens. ``image_encoder(fields)``: overrides of a configuration for CLIP of these fields; None where the
    encoder is no CLIP. ``plan``: of its paper, used where a run names none. ``renamed``: names of weights in files of others, as regular
    expressions, and the model's.
    """

    kind: Kind
    known: type[nn.Module]
    model: type[nn.Module]
    config: type[PretrainedConfig]
    parts: tuple[Part, ...]
    configs: Mapping[str, Callable[..., PretrainedConfig]]
    template: str = ""
    image_tokens: Callable[[PretrainedConfig], int] = lambda config: 0
    image_encoder: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    plan: str = ""
    renamed: Mapping[str, str] | None = None


@dataclass(frozen=True)
class _Entry:
    """What is known of a family without importing it: its module, transformers' model_type, the known class, and the names."""

    module: str
    model_type: str
    architecture: str
    names: tuple[str, ...]

    def family(self) -> Family:
        return importlib.import_module(f"fastpeft.models.{self.module}").FAMILY


_ENTRIES = (
    _Entry("miss", "blip", "BlipForQuestionAnswering", ("miss", "miss-tiny")),
    _Entry("llama", "llama", "LlamaForCausalLM", ("llama-7b", "llama-13b", "llama-tiny")),
    _Entry("llava", "llava", "LlavaMedForConditionalGeneration", ("llava-med", "llava-med-v1.5", "llava-med-tiny", "llava-med-v1.5-tiny")),
    _Entry("excitor", "fastpeft-excitor", "ExcitorForConditionalGeneration", ("excitor-7b", "excitor-13b", "excitor-tiny")),
    _Entry("lavin", "fastpeft-lavin", "LavinForConditionalGeneration", ("lavin-7b", "lavin-13b", "lavin-tiny")),
)
NAMES = tuple(name for entry in _ENTRIES for name in entry.names)


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, resolved once: ``name`` as it was given; ``folder`` of its weights, None where they are random.
    ``overrides``: what differs from the name's configuration. ``on_hub``: the name is a hub's, the folder in its local cache. ``build``,
    runs and estimates take one in place of a name."""

    name: str
    folder: Path | None
    family: Family
    overrides: Mapping[str, Any] = field(default_factory=dict)
    on_hub: bool = False

    @property
    def kind(self) -> Kind:
        return self.family.kind

    @property
    def named(self) -> bool:
        """Whether it is a name of :data:`NAMES`, not somebody's folder."""
        return self.name in NAMES

    @cached_property
    def config(self) -> PretrainedConfig:
        """The folder's configuration, or that of the name."""
        return _named_config(self, self.overrides) if self.folder is None else _read_config(self.folder, self.family)

    def without_weights(self) -> ModelSource:
        """The same name with random weights; a folder stays what it is."""
        return ModelSource(self.name, None, self.family, self.overrides) if self.named else self

    def __str__(self) -> str:
        return self.name


def resolve(model: str | Path | ModelSource, image_encoder: str | None = None) -> ModelSource:
    """A name of :data:`NAMES`, or a local transformers folder. ValueError for anything else; nothing is downloaded.

    image_encoder: CLIP's size in a named model that sees through CLIP: B/16, L/14, L/14@336, tiny (:data:`fastpeft.models.clip.
    VISION_SIZES`); None: the name's own."""
    source = _resolve(model)
    return source if image_encoder is None else _with_image_encoder(source, image_encoder)


def _with_image_encoder(source: ModelSource, size: str) -> ModelSource:
    from fastpeft.models.clip import VISION_SIZES

    if size not in VISION_SIZES:
        raise ValueError(f"image_encoder must be one of {', '.join(VISION_SIZES)}, not {size!r}")
    if not source.named:
        raise ValueError(f"{source} is a folder; its image encoder is in its config.json, so image_encoder={size!r} cannot change it")
    if source.family.image_encoder is None:
        raise ValueError(f"{source} has no choice of image encoder; models that see through CLIP have (excitor, lavin, llava-med)")
    return replace(source, folder=None, overrides=source.family.image_encoder(VISION_SIZES[size]))


def _resolve(model: str | Path | ModelSource) -> ModelSource:
    if isinstance(model, ModelSource):
        return model
    if not isinstance(model, str | Path):
        raise ValueError(f"{model!r} is no model: give a name ({', '.join(NAMES)}) or a folder")
    name = str(model)
    if entry := next((entry for entry in _ENTRIES if name in entry.names), None):
        shipped = ASSETS / name
        return ModelSource(name, shipped if (shipped / "model.safetensors").is_file() else None, entry.family())
    folder = Path(name).expanduser()
    if is_folder(folder):
        return ModelSource(name, folder, _family_of_folder(folder))
    if (cached := _in_hub_cache(name)) is not None:
        return ModelSource(name, cached, _family_of_folder(cached), on_hub=True)
    near = "".join(f"; did you mean {known}?" for known in get_close_matches(name, NAMES, 1))
    if not near and _HUB_NAME.fullmatch(name) and not folder.parent.is_dir():
        near = f", and the local Hugging Face cache has no such model. Where downloads are allowed: `hf download {name}`, then it is found "
        near += f"by this name; or `hf download {name} --local-dir DIR`, then give DIR"
    raise ValueError(f"{name!r} is neither a model name ({', '.join(NAMES)}) nor a folder; nothing is downloaded{near}")


_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # of a repository: owner/name


def _in_hub_cache(name: str) -> Path | None:
    """The folder of a repository that `hf download` has put into the local cache, newest revision of its main branch; None where there is
    none. Reads the disk alone."""
    if not _HUB_NAME.fullmatch(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def family_of(model: nn.Module) -> Family:
    """ValueError for a model that fastpeft does not know."""
    classes = {cls.__name__ for cls in type(model).__mro__}
    for entry in _ENTRIES:
        if entry.architecture in classes and isinstance(model, entry.family().known):
            return entry.family()
    inside = next((name for name in ("module", "_orig_mod") if isinstance(getattr(model, name, None), nn.Module)), None)  # DDP's, compile's
    if inside is not None:
        raise ValueError(f"{type(model).__name__} wraps a model: give the one inside, model.{inside}")
    known = ", ".join(entry.architecture for entry in _ENTRIES)
    raise ValueError(f"{type(model).__name__} has no parts here; known: {known}; fastpeft.build makes {', '.join(NAMES)}")


def parts_of(model: nn.Module) -> tuple[Part, ...]:
    """The parts of a backbone, in the order of the papers' plans; ValueError for a model that fastpeft does not know."""
    return family_of(model).parts


def new_model(source: ModelSource, *, device: torch.device, seed: int, **overrides) -> nn.Module:
    """A named backbone with random weights that depend on ``seed`` alone; on ``meta`` it costs nothing. ValueError where no model can be
    made of the overrides, or it does not fit the machine's memory."""
    make, config = source.family.model, _named_config(source, overrides)
    if overrides or device.type == "meta":
        with naming_config(source), torch.device("meta"):
            shapes = make(config)
        if device.type == "meta":
            return shapes
        check_memory(shapes, source)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        return make(config)


def _named_config(source: ModelSource, overrides: Mapping[str, Any]) -> PretrainedConfig:
    with naming_config(source):
        config = source.family.configs[source.name](**overrides)
        check_config(config, source)
    return config


def load_model(source: ModelSource, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A folder of transformers (config.json and safetensors, sharded or not). ValueError names missing, unexpected or misshapen keys, and
    what config.json says that no model can be made of, or not of these files."""
    family, folder = source.family, source.folder
    with naming_config(folder / "config.json"), torch.device("meta"):
        shapes = family.model(source.config)
    if device.type == "meta":
        return shapes
    check_size(shapes, folder / "config.json", tensors_in(folder)[1], hasattr(source.config, "quantization_config"))
    try:
        model, info = family.model.from_pretrained(
            folder,
            config=source.config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, by name
            key_mapping=family.renamed,
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} did not load as {family.known.__name__}: {' '.join(str(error).split())[:600]}") from None
    if family.renamed is not None:
        vars(model).pop("_weight_conversions", None)  # by which transformers would save it under the other names
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if wrong:
        raise ValueError(f"{folder} does not hold this model: " + "; ".join(f"{k}: {', '.join(v[:8])}" for k, v in wrong.items()))
    return model


def _content(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        content = parse_json(path.read_text())
        content.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        said = f"{folder} is not a transformers folder: cannot read config.json ({error})"
        if any((folder / place / "fastpeft.json").is_file() for place in (".", "adapter")):
            said = f"{folder} holds an adapter, not a model: "
            said += "give its base as the model, and this folder as --init-adapter or to fp.load_adapter"
        raise ValueError(said) from None
    return content


def _family_of_folder(folder: Path) -> Family:
    content = _content(folder)
    kind, classes = content.get("model_type"), content.get("architectures")
    classes = classes if isinstance(classes, list) else ()
    found = [entry for entry in _ENTRIES if entry.model_type == kind]
    if not found:
        known = ", ".join(f"{entry.model_type!r} ({entry.architecture})" for entry in _ENTRIES)
        raise ValueError(f"{folder / 'config.json'}: model_type {kind!r} is not supported; supported: {known}")
    return next((entry for entry in found if entry.architecture in classes), found[0]).family()


def _read_config(folder: Path, family: Family) -> PretrainedConfig:
    where = folder / "config.json"
    with naming_config(where):
        config = family.config.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        check_config(config, where, tensors_in(folder)[0])
    for each in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        attention = getattr(each, "_attn_implementation", None)
        if isinstance(attention, str) and "/" in attention:  # transformers would fetch that repository's code and run it
            raise ValueError(
                f"{folder / 'config.json'}: attn_implementation {attention!r} is code from elsewhere, which is not run: leave it out"
            )
    return config
