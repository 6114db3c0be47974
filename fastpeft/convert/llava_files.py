"""Conversion of LLaVA's and LLaVA-Med's published folders and connectors, with LLaMA and CLIP, to a folder of fastpeft's LLaVA-Med."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from transformers import CLIPVisionConfig, PretrainedConfig

from fastpeft.convert.clip_files import clip_preprocessing
from fastpeft.convert.clip_names import clip_to_transformers
from fastpeft.convert.llama_files import OpenedLlama, Weights, open_llama
from fastpeft.convert.llava_names import (
    TOKENS,
    connector_names,
    is_llava_config,
    kind_of_connector,
    llava_config,
    names_of,
    text_config,
    undelta,
)  # fmt: skip
from fastpeft.convert.reading import Contents, naming, read_file
from fastpeft.convert.tensors import check_tensors
from fastpeft.convert.writing import ConversionReport, besides_weights, write_model
from fastpeft.data.causal_tokenizer import add_tokens, load_causal_tokenizer
from fastpeft.data.tokenizer import save_tokenizer
from fastpeft.documents import parse_json
from fastpeft.files import atomic_folder
from fastpeft.models.llava import LlavaMedForConditionalGeneration

Tensors = dict[str, Tensor]
BIOMED = ("BiomedCLIP", "biomed_clip")


def is_llava(path: Path) -> bool:
    """Whether a folder is one that LLaVA's or LLaVA-Med's own code wrote."""
    try:
        return is_llava_config(parse_json((path / "config.json").read_text()))
    except (OSError, ValueError):
        return False


def write_llava_folder(
    out: Path, source: Path, contents: None, llama=None, clip=None, mm_projector=None, vision_heads=None, template=None
) -> ConversionReport:
    """A folder of LLaVA's own layout. ``llama``: the folder of what a delta is added to; without it the weights are whole. ``clip``:
    OpenAI's file or transformers' folder of the image encoder, where the folder's own or config.json's mm_vision_tower should not be taken.
    ``mm_projector``: a file with the connector. ``template``: the prompts, where the release should not say."""
    base = None if llama is None else open_llama(Path(llama).expanduser())
    with naming(source):
        values = parse_json((source / "config.json").read_text()) | ({"prompt_template": template} if template else {})
        weights = Weights(source)
        names = names_of(list(weights))
        projector, kind = _projector(source, weights, names.projector, mm_projector, values)
        values = {"mm_projector_type": kind} | values
        text = text_config(values)
        text.vocab_size = len(weights.like(_of(names.text, "model.embed_tokens.weight")))
        text.dtype = weights[_of(names.text, "model.embed_tokens.weight")].dtype
        tower = {inner: weights[name] for inner, name in names.tower.items()}
    vision, seen, notes = _image_encoder(source, values.get("mm_vision_tower"), tower, clip, vision_heads)
    with naming(source):
        tokenizer = _tokenizer(source, base, text.vocab_size)
        config = llava_config(values, text, vision, _id_of(tokenizer, "<im_patch>"))
        connector = {ours: projector[theirs] for ours, theirs in connector_names(kind, projector).items()}
        shapes = {name: weights.like(theirs) for name, theirs in names.text.items()}
        _check(config, shapes, seen, connector)
    # a base's tensors are read once, in its own order
    texts = ((name, weights[theirs]) for name, theirs in names.text.items())
    if base is not None:
        texts = _added(weights, names.text, base)
        notes.append("a delta: LLaMA's weights are added to it")
    else:
        notes.append("whole weights; of a delta, give llama (the LLaMA's folder that it is added to)")
    notes.append(f"asked with the template {config.prompt_template}; train and eval take another with --template")
    return _write(out, config, texts, seen, connector, tokenizer, notes, "LLaVA -> llava-med")


def write_projector_folder(out: Path, source: Path, contents: Contents, llama=None, clip=None, vision_heads=None, template=None):
    """A connector's file (mm_projector.bin) with a LLaMA (``llama``) and CLIP (``clip``): LLaVA after its first stage."""
    if llama is None or clip is None:
        raise ValueError(f"{source}: a connector alone: give llama (LLaMA's or Vicuna's folder) and clip (CLIP's file or folder), too")
    base = open_llama(Path(llama).expanduser())
    vision, seen, notes = _image_encoder(source, None, {}, clip, vision_heads)
    with naming(source):
        names = names_of([name for name in contents.state if not str(name).endswith("embed_tokens.weight")])
        held = {inner: contents.state[name] for inner, name in names.projector.items()}
        kind = kind_of_connector(held)
        connector = {ours: held[theirs] for ours, theirs in connector_names(kind, held).items()}
        new = next((tensor for name, tensor in contents.state.items() if str(name).endswith("embed_tokens.weight")), None)
        text, tokenizer = base.config, load_causal_tokenizer(base.tokenizer[0].parent) if base.tokenizer else None
        grown, start_end = 0, None
        if new is not None:
            if tokenizer is None:
                raise ValueError("it has embeddings of <im_start> and <im_end>: the LLaMA's folder needs its tokenizer, to add them")
            if tuple(new.shape[1:]) != (text.hidden_size,) or len(new) < 2:
                raise ValueError(f"its embeddings are {tuple(new.shape)}, and LLaMA's are {text.hidden_size} wide")
            add_tokens(tokenizer, [token for token in TOKENS if _id_of(tokenizer, token) is None])
            grown, start_end = len(tokenizer) - text.vocab_size, new[-2:]
            text.vocab_size = max(text.vocab_size, len(tokenizer))
        values = {"model_type": "llava", "mm_projector_type": kind, "mm_vision_select_layer": -2, "mm_use_im_start_end": new is not None}
        config = llava_config(values | {"prompt_template": template}, text, vision, _id_of(tokenizer, "<im_patch>"))
        _check(config, None, seen, connector)
    texts = ((name, _with_tokens(name, tensor, grown, start_end)) for name, tensor in base.tensors)
    return _write(out, config, texts, seen, connector, tokenizer, notes, "mm_projector + LLaMA + CLIP -> llava-med")


def _with_tokens(name: str, tensor: Tensor, grown: int, start_end: Tensor | None) -> Tensor:
    """Embedding and head with rows for new tokens: the mean of the others, the last two embeddings as trained."""
    if grown <= 0 or name not in ("model.embed_tokens.weight", "lm_head.weight"):
        return tensor
    rows = tensor.float().mean(0, keepdim=True).to(tensor.dtype).expand(grown, -1).clone()
    if name.startswith("model.") and start_end is not None:
        rows[-2:] = start_end.to(rows.dtype)
    return torch.cat([tensor, rows])


def _projector(source: Path, weights: Weights, names: dict[str, str], given, values: dict[str, Any]) -> tuple[Tensors, str]:
    """(the connector's tensors by their names in it, its kind): of a file that was given, else the weights', else mm_projector.bin's."""
    beside = source / "mm_projector.bin"
    if given is not None or (not names and beside.is_file()):
        file = beside if given is None else Path(given).expanduser()
        with naming(file):
            if not file.is_file():
                raise ValueError("no such file: give the connector, such as mm_projector.bin")
            state = read_file(file).state
            held = names_of([name for name in state if not str(name).endswith("embed_tokens.weight")]).projector
            found = {inner: state[name] for inner, name in held.items()}
    else:
        found = {inner: weights[name] for inner, name in names.items()}
    if not found:
        raise ValueError("no connector in the weights, and no mm_projector.bin beside them: give mm_projector")
    return found, values.get("mm_projector_type") or kind_of_connector(found)


def _image_encoder(source: Path, named: str | None, held: Tensors, given, vision_heads) -> tuple[CLIPVisionConfig, Tensors, list[str]]:
    """(configuration, tensors by CLIPVisionModel's names, notes): what was given, else the checkpoint's own, else where config.json
    says."""
    place = None if given is None else Path(given).expanduser()
    if place is None and named is None:
        raise ValueError(f"{source}: config.json names no mm_vision_tower: give clip (OpenAI's file, or transformers' folder of CLIP)")
    if place is None:
        if any(word in str(named) for word in BIOMED):
            raise ValueError(f"{source}: its image encoder is {named}, a ViT of timm's: only CLIP's converts")
        place = _local(source, str(named))
        if place is None:
            raise ValueError(
                f"{source}: its image encoder {named} is not on this machine, and nothing is downloaded: give clip (OpenAI's file, or a "
                "copy of that folder)"
            )
    with naming(place):
        vision, tensors = open_clip(place, vision_heads)
        if not held or given is not None:
            left = ["left out the checkpoint's own image encoder, as clip is given"] if held else []
            return vision, tensors, [*left, f"image encoder of {place}"]
        check_tensors(held, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    return vision, held, ["image encoder of the checkpoint"]


def _local(source: Path, named: str) -> Path | None:
    """Where the image encoder that config.json names lies on this machine: a path, or a repository in Hugging Face's cache."""
    for place in (Path(named).expanduser(), source / named):
        if place.exists():
            return place
    try:
        return Path(snapshot_download(named, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError, ValueError):
        return None


def open_clip(place: Path, vision_heads: int | None = None) -> tuple[CLIPVisionConfig, Tensors]:
    """CLIP's image encoder by CLIPVisionModel's names, from OpenAI's file or from transformers' folder of a CLIP. ValueError for
    neither."""
    if not place.exists():
        raise ValueError("no such file or folder: give OpenAI's CLIP, such as ViT-L-14.pt, or transformers' folder of one")
    if place.is_file():
        config, state, _ = clip_to_transformers(read_file(place).state, vision_heads)
    else:
        if vision_heads is not None:
            raise ValueError("vision_heads is of OpenAI's file; a folder's config.json says it")
        try:
            values = parse_json((place / "config.json").read_text())
            values = values.get("vision_config", values) if values.get("model_type") == "clip" else values
            if (kind := values.get("model_type", "clip_vision_model")) != "clip_vision_model":
                raise ValueError(f"a {kind!r} model, not CLIP")
            config = CLIPVisionConfig.from_dict(values)
        except (OSError, AttributeError, ValueError) as error:
            raise ValueError(f"no transformers folder of CLIP: {' '.join(str(error).split())}") from None
        weights = Weights(place)
        text = ("text_model.", "text_projection.", "logit_scale")
        state = {name: weights[name] for name in weights if not name.startswith(text) and not name.endswith("position_ids")}
    state = {name.removeprefix("vision_model."): tensor for name, tensor in state.items() if not name.startswith("visual_projection.")}
    from transformers.models.clip.modeling_clip import CLIPVisionModel

    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in CLIPVisionModel(config).state_dict().items()}
    wanted = {name.removeprefix("vision_model."): shape for name, shape in wanted.items() if not name.endswith("position_ids")}
    check_tensors(state, wanted)
    return config, state


def _tokenizer(source: Path, base: OpenedLlama | None, vocabulary: int):
    """The folder's own tokenizer; else LLaMA's with the first release's tokens, where they make this vocabulary; else None."""
    if any((source / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        tokenizer = load_causal_tokenizer(source)
    elif base is not None and base.tokenizer:
        tokenizer = load_causal_tokenizer(base.tokenizer[0].parent)
    else:
        return None
    missing = [token for token in TOKENS if _id_of(tokenizer, token) is None]
    if missing and len(tokenizer) + len(missing) == vocabulary:
        add_tokens(tokenizer, missing)
    return tokenizer


def _of(names: dict[str, str], name: str) -> str:
    if name not in names:
        raise ValueError(f"no {name} in the weights: no LLaVA's, or not all of one")
    return names[name]


def _id_of(tokenizer, token: str) -> int | None:
    return None if tokenizer is None else tokenizer.get_vocab().get(token)


def _added(weights: Weights, names: dict[str, str], base: OpenedLlama) -> Iterator[tuple[str, Tensor]]:
    held = set(names)
    for name, tensor in base.tensors:
        if name not in held:
            raise ValueError(f"the delta has no {name}, and the LLaMA has: made for another LLaMA")
        held.discard(name)
        try:
            whole = undelta(weights[names[name]], tensor)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        yield name, whole
    if held:
        raise ValueError(f"the LLaMA has no {sorted(held)[0]}, and the delta has: made for another LLaMA")


def _check(config: PretrainedConfig, texts: Tensors | None, seen: Tensors, connector: Tensors) -> None:
    """ValueError names every missing, unexpected and misshapen tensor. ``texts``: by LlamaForCausalLM's names; None: checked already."""
    with torch.device("meta"):
        wanted = {name: tuple(t.shape) for name, t in LlavaMedForConditionalGeneration(config).state_dict().items()}
    held = _named(iter(() if texts is None else texts.items()), seen, connector)
    if texts is None:
        wanted = {name: shape for name, shape in wanted.items() if not name.startswith(("model.language_model.", "lm_head."))}
    check_tensors(dict(held), wanted)


def _named(texts: Iterator[tuple[str, Tensor]], seen: Tensors, connector: Tensors) -> Iterator[tuple[str, Tensor]]:
    """All tensors by LlavaMedForConditionalGeneration's names."""
    return chain(
        ((f"model.vision_tower.{name}", tensor) for name, tensor in seen.items()),
        ((f"model.multi_modal_projector.{name}", tensor) for name, tensor in connector.items()),
        ((name if name == "lm_head.weight" else f"model.language_model.{name.removeprefix('model.')}", t) for name, t in texts),
    )


def _write(out: Path, config, texts, seen: Tensors, connector: Tensors, tokenizer, notes: list[str], direction: str) -> ConversionReport:
    with atomic_folder(out, keep=besides_weights) as draft:
        count = write_model(draft, config, _named(texts, seen, connector))
        (draft / "preprocessor_config.json").write_text(json.dumps(clip_preprocessing(config), indent=1) + "\n")
        if tokenizer is not None:
            save_tokenizer(tokenizer, draft)
    if tokenizer is None:
        notes = [*notes, "no tokenizer in the source: put tokenizer.model or tokenizer.json into the folder"]
    return ConversionReport(direction, count, notes)
