"""Reader of LLaMA folders: Meta's files (params.json, consolidated.NN.pth) or transformers' own, a tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fastpeft.convert.llama_names import llama_to_transformers
from fastpeft.convert.reading import naming, read_file
from fastpeft.convert.tensors import check_tensors
from fastpeft.convert.writing import ConversionReport, besides_weights, write_model
from fastpeft.documents import parse_json
from fastpeft.files import atomic_folder
from fastpeft.models.untrusted import check_config, naming_config

_TOKENIZER = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True)
class OpenedLlama:
    """``tensors``, by LlamaForCausalLM's names, are read as they are asked for, once. ``tokenizer``: its files."""

    config: LlamaConfig
    tensors: Iterator[tuple[str, Tensor]]
    tokenizer: list[Path]


def is_original(folder: Path) -> bool:
    """Whether a folder holds LLaMA's files as Meta publishes them."""
    return (folder / "params.json").is_file()


def open_llama(folder: Path, vicuna_delta: Path | None = None) -> OpenedLlama:
    """ValueError, naming the folder, for what is missing or does not fit. vicuna_delta: a transformers folder of what is added."""
    with naming(folder):
        if not folder.is_dir():
            raise ValueError("no such folder: give LLaMA's, with params.json or config.json")
        if not is_original(folder):
            if vicuna_delta is not None:
                raise ValueError("vicuna_delta is added to LLaMA's original files (params.json), and these are transformers'")
            return _from_transformers(folder)
        files = sorted(folder.glob("consolidated.*.pth"))
        for number in range(max(1, len(files))):
            if not (folder / (name := f"consolidated.{number:02d}.pth")).is_file():
                raise ValueError(f"{name} is missing beside params.json")
        try:
            params = parse_json((folder / "params.json").read_text())
        except ValueError as error:
            raise ValueError(f"params.json is not JSON: {error}") from None
        if not isinstance(params, dict):
            raise ValueError("params.json must hold an object")
        delta = None
        if vicuna_delta is not None:
            with naming(vicuna_delta):
                delta = Weights(vicuna_delta)
        shards = []
        for file in files:
            with naming(Path(file.name)):
                shards.append(read_file(file).state)
        config, tensors = llama_to_transformers(shards, params, delta)
    tokenizer = next((f for f in (folder / "tokenizer.model", folder.parent / "tokenizer.model") if f.is_file()), None)
    return OpenedLlama(config, tensors, [] if tokenizer is None else [tokenizer])


def write_llama_folder(out: Path, source: Path, contents: None, vicuna_delta: str | Path | None = None) -> ConversionReport:
    """Meta's folder as a transformers folder, a shard in memory at a time."""
    llama = open_llama(source, None if vicuna_delta is None else Path(vicuna_delta).expanduser())
    with atomic_folder(out, keep=besides_weights) as draft:
        count = write_model(draft, llama.config, llama.tensors, llama.tokenizer)
    return ConversionReport("LLaMA -> transformers", count, no_tokenizer(llama.tokenizer))


def no_tokenizer(files: list[Path]) -> list[str]:
    """A note where there are no tokenizer files."""
    return [] if files else ["no tokenizer.model here or in the parent folder"]


def _from_transformers(folder: Path) -> OpenedLlama:
    try:
        values = parse_json((folder / "config.json").read_text())
        if (kind := values.get("model_type")) != "llama":
            raise ValueError(f"a {kind!r} model, not a LLaMA")
        config = LlamaConfig.from_dict(values)
    except (OSError, ValueError, AttributeError, StrictDataclassError) as error:
        raise ValueError(f"no LLaMA: neither params.json nor transformers' files ({' '.join(str(error).split())})") from None
    weights = Weights(folder)
    check_config(config, "config.json", len(weights))
    with naming_config("config.json"), torch.device("meta"):
        wanted = {name: tuple(t.shape) for name, t in LlamaForCausalLM(config).state_dict().items()}
    names = [name for name in weights if not name.endswith("rotary_emb.inv_freq")]  # older versions saved it
    if config.tie_word_embeddings and "lm_head.weight" not in names:
        del wanted["lm_head.weight"]
    check_tensors({name: weights.like(name) for name in names}, wanted)
    config.architectures, config.dtype = ["LlamaForCausalLM"], weights["model.embed_tokens.weight"].dtype
    tokenizer = [folder / name for name in _TOKENIZER if (folder / name).is_file()]
    # LLaMA's own file says all: transformers' copies of it cut leading spaces otherwise than Meta's code
    tokenizer = tokenizer[:1] if tokenizer and tokenizer[0].suffix == ".model" else tokenizer
    return OpenedLlama(config, ((name, weights[name]) for name in wanted), tokenizer)


class Weights(Mapping[str, Tensor]):
    """The tensors of a transformers folder, safetensors or .bin, sharded or not, mapped from their files."""

    def __init__(self, folder: Path):
        found = next((folder / name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).is_file()), None)
        indices = [folder / f"{name}.index.json" for name in ("model.safetensors", "pytorch_model.bin")]
        if found is None and (index := next((path for path in indices if path.is_file()), None)) is not None:
            try:
                files = [folder / Path(name).name for name in sorted(set(parse_json(index.read_text())["weight_map"].values()))]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{index.name} is damaged: {error!r}") from None
        elif found is not None:
            files = [found]
        else:
            raise ValueError("no weights: neither model.safetensors nor pytorch_model.bin, nor an index of their shards")
        self._where: dict[str, object] = {}
        for file in files:
            if not file.is_file():
                raise ValueError(f"{file.name} is missing")
            if file.suffix == ".safetensors":
                try:
                    opened = safe_open(file, "pt")
                except (SafetensorError, OSError) as error:
                    raise ValueError(f"{file.name} is no safetensors file, or a truncated one: {error}") from None
                self._where |= dict.fromkeys(opened.keys(), opened)
            else:
                self._where |= read_file(file).state

    def __getitem__(self, name: str) -> Tensor:
        where = self._where[name]
        return where if isinstance(where, Tensor) else where.get_tensor(name)

    def like(self, name: str) -> Tensor:
        """Its shape, as a tensor without memory."""
        where = self._where[name]
        return torch.empty(where.shape if isinstance(where, Tensor) else where.get_slice(name).get_shape(), device="meta")

    def __iter__(self):
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)
