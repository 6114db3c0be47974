"""Official MISS and BLIP VQA checkpoints <-> folders that transformers' BlipForQuestionAnswering loads.

Source of names and shapes: vit.py and med.py of https://github.com/TIMMY-CHAN/MISS and https://github.com/salesforce/BLIP. An
official state dict holds ``visual_encoder.*`` (a timm ViT), ``text_encoder.*``, ``text_decoder.*`` (BERT with cross-attention).
The text names are transformers' own; those of the vision tower differ by ``_VISION_NAMES``. Both sides tie the head to the
decoder's word embedding. So a conversion renames and never computes, but for position embeddings wanted in another size.

What a tensor cannot tell (heads, eps, dropout) is the official code's: 64 channels a head and `miss_config`'s numbers.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import shutil
import uuid
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import BlipConfig, BlipForQuestionAnswering

from fastpeft.models.miss import miss_config

_VISION_NAMES = (  # transformers, official
    ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
    ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
    ("vision_model.embeddings.patch_embedding.", "visual_encoder.patch_embed.proj."),
    ("vision_model.encoder.layers.", "visual_encoder.blocks."),
    ("vision_model.post_layernorm.", "visual_encoder.norm."),
    (".self_attn.qkv.", ".attn.qkv."),
    (".self_attn.projection.", ".attn.proj."),
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
)
_TIED = {  # the same tensor under two names, in both formats; transformers' files keep the second only
    "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
}
_POSITIONS = "vision_model.embeddings.position_embedding"
_PARTS = ("visual_encoder.", "text_encoder.", "text_decoder.")
_EXTRAS = (  # what official files carry that answering a question does not need
    ("position_ids buffers", r"(^|\.)position_ids$"),
    ("momentum copies", r"^(visual_encoder|text_encoder|text_decoder|vision_proj|text_proj)_m\."),
    ("queues", r"^((image|text|idx)_queue|queue_ptr|ptr_queue)$"),
    ("pretraining heads", r"^(itm_head|vision_proj|text_proj)\.|^temp$"),
    ("poolers", r"^(text_encoder|text_decoder\.bert)\.pooler\."),
)
# PEFT's names around a base module (its prompt methods have no inner "model"), and those of its own tensors.
_WRAPPER = re.compile(r"^(visual_encoder|text_encoder|text_decoder)\.base_model\.(model\.)?")
_ADAPTER = re.compile(r"\.(lora_\w+|ia3_l|modules_to_save|prompt_encoder)(\.|$)|^text_(encoder|decoder)\.word_embeddings\.")


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` did. n_tensors: tensors written, a tied one counted once; notes: what was left out or altered."""

    direction: str
    n_tensors: int
    notes: list[str] = field(default_factory=list)


def official_to_transformers(
    state: dict, image_size: int | None = 480, *, text_heads: int | None = None, vision_heads: int | None = None
) -> tuple[dict[str, Tensor], BlipConfig]:
    """An official state dict as BlipForQuestionAnswering's (tied names included) and the config it needs.

    Sizes come from the tensors' shapes; heads are width / 64 unless given. ``image_size`` None keeps the checkpoint's; another
    one resizes the position embeddings as the official ``interpolate_pos_embed`` does. Tensors keep their dtype, uncopied.
    ValueError names every missing, unexpected, misshapen or untied tensor.
    """
    return _from_official(state, image_size, text_heads, vision_heads)[:2]


def transformers_to_official(state: dict, config: BlipConfig) -> dict[str, Tensor]:
    """BlipForQuestionAnswering's state dict under the official names, with official files' tied names and position_ids."""
    state = _tie({k: v for k, v in state.items() if not k.endswith("position_ids")})
    wanted = _shapes(config)
    _check(state, wanted)
    out = {_official_name(name): state[name] for name in wanted}
    for part in ("text_encoder", "text_decoder.bert"):
        out[f"{part}.embeddings.position_ids"] = torch.arange(config.text_config.max_position_embeddings)[None]
    return out


def convert(
    source: str | Path,
    out: str | Path,
    image_size: int | None = None,
    overwrite: bool = False,
    *,
    text_heads: int | None = None,
    vision_heads: int | None = None,
) -> ConversionReport:
    """An official checkpoint file -> a transformers folder, or such a folder -> an official file (its tensors under ``model``).

    ``out`` appears whole or not at all. An existing one is refused unless ``overwrite``; other files in it then stay.
    A new folder also gets ``fastpeft_preprocess.json``, the official MISS preprocessing. ValueError says what is wrong.
    """
    source, out = Path(source).expanduser(), Path(out).expanduser().resolve()
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    _check_out(out, source.is_dir(), overwrite)
    try:
        if not source.is_dir():
            return _write_folder(out, *_read_file(source), image_size, text_heads, vision_heads)
        if (image_size, text_heads, vision_heads) != (None, None, None):
            raise ValueError("a folder's config fixes image size and heads: leave them out")
        return _write_official(out, *_read_folder(source))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _write_folder(out, state, notes, image_size, text_heads, vision_heads) -> ConversionReport:
    state, config, more = _from_official(state, image_size, text_heads, vision_heads)
    state = _owned({k: v for k, v in state.items() if k not in _TIED})
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


def _write_official(out, state, config) -> ConversionReport:
    official = transformers_to_official(state, config)
    official |= _owned({k: v for k, v in official.items() if k not in _TIED})
    official |= {tied: official[kept] for tied, kept in _TIED.items()}
    with _staged(out) as stage:
        torch.save({"model": official}, stage)
    return ConversionReport("transformers -> official", len(official) - len(_TIED), _lost(config))


def _official_name(name: str) -> str:
    if name.startswith("vision_model."):
        for ours, theirs in _VISION_NAMES:
            name = name.replace(ours, theirs)
    return name


def _shapes(config: BlipConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes BlipForQuestionAnswering has: asked of the class itself, without memory."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in BlipForQuestionAnswering(config).state_dict().items()}


def _from_official(state, image_size, text_heads, vision_heads) -> tuple[dict[str, Tensor], BlipConfig, list[str]]:
    state, notes = _bare(state)
    config = _infer_config(state, text_heads, vision_heads)
    wanted, vision = _shapes(config), config.vision_config
    _check(_tie(state), {_official_name(name): shape for name, shape in wanted.items()})
    out = {name: state[_official_name(name)] for name in wanted}
    if image_size not in (None, vision.image_size):
        if image_size < 1 or image_size % vision.patch_size:
            raise ValueError(f"image_size={image_size}: use a multiple of the patch size, {vision.patch_size}")
        out[_POSITIONS] = _resize_positions(out[_POSITIONS], image_size // vision.patch_size)
        notes.append(f"position embeddings resized (bicubic) from {vision.image_size} to {image_size} pixels")
        vision.image_size = image_size
    return out, config, notes


def _bare(state: dict) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict without wrappers and known extras, and a note on each kind left out."""
    out, left = {}, Counter()
    for key, value in state.items():
        name = _WRAPPER.sub(r"\1.", str(key).removeprefix("module."))
        if _ADAPTER.search(name):
            kind = "PEFT adapter tensors (only the base weights convert)"
        elif not isinstance(value, Tensor):
            kind = "entries that are not tensors"
        else:
            kind = next((label for label, pattern in _EXTRAS if re.search(pattern, name)), None)
        if kind is None:
            out[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = value
        else:
            left[kind] += 1
    if not any(name.startswith(_PARTS) for name in out):
        stems = _listing(sorted({str(name).split(".")[0] for name in state})) or "nothing"
        hint = "; these are transformers' names: give the folder" if "vision_model" in stems else ""
        raise ValueError(f"no MISS or BLIP VQA checkpoint: no {'*, '.join(_PARTS)}* tensors, but {stems}{hint}")
    return out, [f"left out {count} {kind}" for kind, count in left.items()]


def _infer_config(state: dict[str, Tensor], text_heads: int | None, vision_heads: int | None) -> BlipConfig:
    """Sizes by majority among tensors that share them, so that one broken tensor is reported alone."""

    def size(default: int, *places: tuple[str, int]) -> int:
        found = Counter(state[name].shape[dim] for name, dim in places if name in state and state[name].dim() > dim)
        return found.most_common(1)[0][0] if found else default

    def layers(pattern: str) -> int:
        return max((int(m[1]) + 1 for name in state if (m := re.match(pattern, name))), default=12)

    def heads(width: int, given: int | None, argument: str) -> int:
        if width % (given or 64) or (given is not None and given < 1):
            raise ValueError(f"width {width} is not {f'a multiple of {given}' if given else 'made of heads of 64'}: give {argument}")
        return given or width // 64

    texts = ("text_encoder", "text_decoder.bert")
    norms = [(f"{text}.embeddings.LayerNorm.weight", 0) for text in texts]
    words = [f"{text}.embeddings.word_embeddings.weight" for text in texts]
    width = size(768, *norms, *((word, 1) for word in words))
    patches = "visual_encoder.patch_embed.proj.weight"
    vision_width = size(768, ("visual_encoder.cls_token", 2), ("visual_encoder.norm.weight", 0), (patches, 0))
    if vision_width != width:
        raise ValueError(
            f"vision width {vision_width} and text width {width} differ (ViT-L): BlipForQuestionAnswering would give its decoder "
            f"keys for question states of width {vision_width}, and could not run; only equal widths (ViT-B) convert"
        )
    patch = size(16, (patches, 2), (patches, 3))
    grid = math.isqrt(max(size(901, ("visual_encoder.pos_embed", 1)) - 1, 1))
    config = miss_config(
        image_size=grid * patch,
        vocab_size=size(30_524, *((word, 0) for word in words), ("text_decoder.cls.predictions.bias", 0)),
        hidden_size=width,
        layers=layers(r"text_(?:encoder|decoder\.bert)\.encoder\.layer\.(\d+)\."),
        heads=heads(width, text_heads, "text_heads"),
        intermediate_size=size(4 * width, *((f"{text}.encoder.layer.0.intermediate.dense.weight", 0) for text in texts)),
        max_position_embeddings=size(512, *((f"{text}.embeddings.position_embeddings.weight", 0) for text in texts)),
    )
    vision = config.vision_config
    vision.patch_size, vision.num_hidden_layers = patch, layers(r"visual_encoder\.blocks\.(\d+)\.")
    vision.num_attention_heads = heads(vision_width, vision_heads, "vision_heads")
    vision.intermediate_size = size(4 * width, *((f"visual_encoder.blocks.0.mlp.fc1.{p}", 0) for p in ("weight", "bias")))
    return config


def _tie(state: dict) -> dict:
    """Fill in a tied name that a file omits, in place."""
    for pair in _TIED.items():
        for absent, present in (pair, pair[::-1]):
            if absent not in state and present in state:
                state[absent] = state[present]
    return state


def _check(state: dict[str, Tensor], wanted: dict[str, tuple[int, ...]]) -> None:
    faults = {
        "missing": [name for name in wanted if name not in state],
        "unexpected": [name for name in state if name not in wanted],
        "misshapen": [
            f"{name} {tuple(state[name].shape)} instead of {shape}"
            for name, shape in wanted.items()
            if name in state and tuple(state[name].shape) != shape
        ],
        "untied": [a for a, b in _TIED.items() if a in state and b in state and not torch.equal(state[a], state[b])],
    }
    if any(faults.values()):
        raise ValueError("; ".join(f"{len(names)} {kind}: {_listing(names)}" for kind, names in faults.items() if names))


def _listing(names: list[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _resize_positions(positions: Tensor, grid: int) -> Tensor:
    """[1, 1 + g * g, C] -> [1, 1 + grid * grid, C]; the class token's stays. Computed in fp32 at least."""
    first, patches = positions[:, :1], positions[:, 1:]
    side = math.isqrt(patches.shape[1])
    image = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2).to(torch.promote_types(positions.dtype, torch.float32))
    image = F.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([first, image.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)], dim=1)


def _lost(config: BlipConfig) -> list[str]:
    """What the official file format cannot say and the official code would get wrong."""
    text, vision = config.text_config, config.vision_config
    facts = (
        ("text heads", text.num_attention_heads, text.hidden_size // 64),
        ("vision heads", vision.num_attention_heads, vision.hidden_size // 64),
        ("text norm eps", text.layer_norm_eps, 1e-12),
        ("vision norm eps", vision.layer_norm_eps, 1e-6),
    )
    return [f"{name}: {ours}; the file cannot say so, and official code uses {theirs}" for name, ours, theirs in facts if ours != theirs]


# ---- files -----------------------------------------------------------------------------------------------------------


class _Inert:
    """Stands for an object of ruamel.yaml while unpickling: takes anything, keeps and does nothing."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    __setstate__ = __setitem__ = append = extend = __init__


class _TensorsAndYaml(pickle.Unpickler):
    """MISS and MILE save their ruamel.yaml config beside the tensors, which weights_only refuses. Here tensors load, the config
    becomes `_Inert`, and any other name is refused: nothing is imported or called for it."""

    allowed = {  # noqa: RUF012
        ("collections", "OrderedDict"): OrderedDict,
        ("__builtin__", "set"): set,  # protocol 2's name for it, inside CommentedMap
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    }

    def find_class(self, module: str, name: str):
        if module.startswith("ruamel.yaml."):
            return _Inert
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {module}.{name}")
        return self.allowed[module, name]


def _load_pickle(path: Path):
    mmap = zipfile.is_zipfile(path)  # the format before PyTorch 1.6 is no zip and cannot be mapped
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            if not (mmap and "GLOBAL ruamel.yaml." in str(error)):
                raise
            reader = SimpleNamespace(__name__="pickle", Unpickler=_TensorsAndYaml)
            return torch.load(path, map_location="cpu", weights_only=False, mmap=True, pickle_module=reader)
    except Exception as error:  # torch and pickle raise a dozen types on a broken file
        reason = next(iter(str(error).splitlines()), repr(error))
        if foreign := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(f"holds {foreign[1]}, not only tensors: refused, as loading it could run code") from None
        raise ValueError(f"no PyTorch checkpoint, or a truncated one: {reason[:200]}") from None


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
            notes = [f"left out what lies beside {key!r}: {_listing(beside)}"] if beside else []
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
