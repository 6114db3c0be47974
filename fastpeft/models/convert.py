"""Official MISS and BLIP VQA checkpoint files <-> folders that transformers and `fastpeft.build` load.

Names and shapes are ``official.py``'s; here files are read and written. A pickle is read by ``torch.load(weights_only=True)`` alone,
and what is written appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals
from transformers import BlipConfig

from fastpeft.models.official import TIED, from_official, listing, lost, official_to_transformers, transformers_to_official
from fastpeft.models.official_llama import llama_from_official

__all__ = ["ConversionReport", "convert", "official_to_transformers", "transformers_to_official"]


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` did. n_tensors: tensors written, a tied one counted once; notes: what was left out or altered."""

    direction: str
    n_tensors: int
    notes: list[str] = field(default_factory=list)


def convert(
    source: str | Path,
    out: str | Path,
    image_size: int | None = None,
    overwrite: bool = False,
    *,
    text_heads: int | None = None,
    vision_heads: int | None = None,
) -> ConversionReport:
    """An official checkpoint file -> a transformers folder, or such a folder -> an official file (its tensors under ``model``);
    a folder of LLaMA's original files (params.json, consolidated.NN.pth) -> a transformers folder.

    ``out`` appears whole or not at all. An existing one is refused unless ``overwrite``; other files in it then stay.
    A new folder also gets ``fastpeft_preprocess.json``, the official MISS preprocessing. ValueError says what is wrong.
    """
    source, out = Path(source).expanduser(), Path(out).expanduser().resolve()
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    llama = (source / "params.json").is_file()
    _check_out(out, source.is_dir() and not llama, overwrite)
    try:
        if not source.is_dir():
            return _write_folder(out, *_read_file(source), image_size, text_heads, vision_heads)
        if (image_size, text_heads, vision_heads) != (None, None, None):
            raise ValueError("a folder's config fixes image size and heads: leave them out")
        if llama:
            return _write_llama(out, source)
        return _write_official(out, *_read_folder(source))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _write_folder(out, state, notes, image_size, text_heads, vision_heads) -> ConversionReport:
    state, config, more = from_official(state, image_size, text_heads, vision_heads)
    state = _owned({k: v for k, v in state.items() if k not in TIED})
    dtypes = {v.dtype for v in state.values()}
    config.dtype = dtypes.pop() if len(dtypes) == 1 else None
    config.architectures = ["BlipForQuestionAnswering"]
    preprocess = {"image_size": config.vision_config.image_size, "mean": None, "std": None, "extra_255": True}
    with _staged(out) as stage:
        stage.mkdir()
        config.save_pretrained(stage)
        save_file(state, stage / "model.safetensors", metadata={"format": "pt"})
        (stage / "fastpeft_preprocess.json").write_text(json.dumps(preprocess) + "\n")
    more.append("fastpeft_preprocess.json holds MISS's preprocessing (divided by 255 twice, not normalised): edit it for BLIP's own")
    return ConversionReport("official -> transformers", len(state), [*notes, *more])


def _write_llama(out: Path, source: Path) -> ConversionReport:
    files = sorted(source.glob("consolidated.*.pth"))
    for number in range(max(1, len(files))):
        if not (source / (name := f"consolidated.{number:02d}.pth")).is_file():
            raise ValueError(f"{name} is missing beside params.json")
    try:
        params = json.loads((source / "params.json").read_text())
    except ValueError as error:
        raise ValueError(f"params.json is not JSON: {error}") from None
    if not isinstance(params, dict):
        raise ValueError("params.json must hold an object")
    state, config = llama_from_official([_read_file(file)[0] for file in files], params)
    state = _owned(state)
    config.dtype, config.architectures = state["lm_head.weight"].dtype, ["LlamaForCausalLM"]
    tokenizer = next((f for f in (source / "tokenizer.model", source.parent / "tokenizer.model") if f.is_file()), None)
    with _staged(out) as stage:
        stage.mkdir()
        config.save_pretrained(stage)
        save_file(state, stage / "model.safetensors", metadata={"format": "pt"})
        if tokenizer is not None:
            shutil.copyfile(tokenizer, stage / tokenizer.name)
    return ConversionReport("LLaMA -> transformers", len(state), [] if tokenizer else ["no tokenizer.model here or in the parent folder"])


def _write_official(out, state, config) -> ConversionReport:
    official = transformers_to_official(state, config)
    official |= _owned({k: v for k, v in official.items() if k not in TIED})
    official |= {tied: official[kept] for tied, kept in TIED.items()}
    with _staged(out) as stage:
        torch.save({"model": official}, stage)
    return ConversionReport("transformers -> official", len(official) - len(TIED), lost(config))


class _Inert:
    """Stands for an object of ruamel.yaml while unpickling: takes anything, keeps and does nothing."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    __setstate__ = __init__


# weights_only sets items on exactly dict, OrderedDict and Counter, and of these only a Counter takes any state
_MAPPINGS = ("CommentedMap", "CommentedOrderedMap", "ordereddict")


def _load_pickle(path: Path):
    """MISS and MILE save the ruamel.yaml objects of their config beside the tensors: for these names the unpickler gets classes that
    do nothing, whether ruamel.yaml is installed or not. Any other name that weights_only refuses is an error."""
    zipped = zipfile.is_zipfile(path)  # the format before PyTorch 1.6 is no zip: it cannot be mapped, nor its names listed
    try:
        names = sorted(get_unsafe_globals_in_checkpoint(path)) if zipped else []
        refused = [name for name in names if not name.startswith("ruamel.yaml.")]
        if not refused:
            with safe_globals([(Counter if name.endswith(_MAPPINGS) else _Inert, name) for name in names]):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch and pickle raise a dozen types on a broken file
        if re.search("Can only (append to|extend) lists", str(error)):
            raise ValueError(
                "its ruamel.yaml config holds a list, which weights_only cannot read: if you trust the file, keep its tensors alone, with "
                f"torch.save({{'model': torch.load({path.name!r}, weights_only=False)['model']}}, 'tensors.pth'), and convert that"
            ) from None
        refused = re.findall(r"GLOBAL (\S+)", str(error))
        if not refused:
            reason = next(iter(str(error).splitlines()), repr(error))
            raise ValueError(f"no PyTorch checkpoint, or a truncated one: {reason[:200]}") from None
    raise ValueError(f"holds {listing(refused)}, not only tensors: refused, as loading it could run code")


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path.name} is no safetensors file, or a truncated one: {error}") from None


def _read_file(path: Path) -> tuple[dict, list[str]]:
    content, notes = _load_safetensors(path) if path.suffix == ".safetensors" else _load_pickle(path), []
    if not isinstance(content, dict):
        raise ValueError(f"holds a {type(content).__name__}, not a state dict")
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), dict):
            beside = sorted(str(k) for k in content if k != key)
            notes = [f"left out what lies beside {key!r}: {listing(beside)}"] if beside else []
            return content[key], notes
    return content, notes


def _read_folder(folder: Path) -> tuple[dict[str, Tensor], BlipConfig]:
    try:
        values = json.loads((folder / "config.json").read_text())
        if (kind := values.get("model_type")) != "blip":
            raise ValueError(f"a {kind!r} model, and only 'blip' (BlipForQuestionAnswering) has an official form")
        config = BlipConfig.from_dict(values)
        index, shards = folder / "model.safetensors.index.json", ["model.safetensors"]
        if index.exists() and not (folder / shards[0]).exists():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
        raise ValueError(f"no transformers folder to convert: {' '.join(str(error).split())}") from None
    if not (folder / shards[0]).exists() and (folder / "pytorch_model.bin").exists():
        return _read_file(folder / "pytorch_model.bin")[0], config
    state = {}
    for shard in shards:
        state |= _load_safetensors(folder / shard)
    return state, config


def _owned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor contiguous and alone in its storage: safetensors refuses shared memory, and torch.save keeps a view's whole."""
    out, seen = {}, set()
    for name, tensor in state.items():
        storage, tensor = tensor.untyped_storage(), tensor.detach()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes or not tensor.is_contiguous():
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(storage.data_ptr())
        out[name] = tensor
    return out


def _check_out(out: Path, to_official: bool, overwrite: bool) -> None:
    if out.is_dir() and to_official:
        raise ValueError(f"{out} is a folder: name the file to write, such as {out / 'official.pth'}")
    if out.is_file() and not to_official:
        raise ValueError(f"{out} is a file: name the folder to write")
    if not overwrite and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
        raise ValueError(f"{out} exists{' and is not empty' if out.is_dir() else ''}: choose another place, or overwrite")


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A sibling path to write to, which takes ``out``'s name when the block ends well and vanishes when it does not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    stage = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")
    before = stage.with_name(stage.name + ".before")
    try:
        yield stage
        if not out.is_dir():
            os.replace(stage, out)
            return
        os.replace(out, before)
        try:
            os.replace(stage, out)
        except BaseException:
            os.replace(before, out)
            raise
        for other in before.iterdir():
            if not (out / other.name).exists():
                os.replace(other, out / other.name)
        shutil.rmtree(before)
    finally:
        if stage.is_dir():
            shutil.rmtree(stage, ignore_errors=True)
        else:
            stage.unlink(missing_ok=True)
