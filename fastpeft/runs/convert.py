"""LaVIN's published adapters with their LLaMA and CLIP -> one folder that `build`, `train`, `eval` and `chat` take.

The folder is a LaVIN base (transformers' layout, the trained neck in it) and in ``adapter/`` what `save_adapter` writes, its tokenizer and
preprocessing with it. The base is on disk alone: here it is on the meta device.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

from fastpeft.adapters import fingerprint, save_adapter
from fastpeft.convert.clip_files import lavin_vision
from fastpeft.convert.clip_names import clip_from_official
from fastpeft.convert.lavin_names import SEQUENCE, Lavin, is_lavin, lavin_from_official
from fastpeft.convert.layouts import LAYOUTS, Layout, convert
from fastpeft.convert.llama_files import Weights, no_tokenizer, open_llama
from fastpeft.convert.reading import Contents, naming, read_file
from fastpeft.convert.writing import ConversionReport, besides_weights, write_model
from fastpeft.data import load_causal_tokenizer, save_tokenizer
from fastpeft.data.causal import describe_prompts
from fastpeft.files import atomic_folder
from fastpeft.plan import adapt, build
from fastpeft.runs.causal import clip_preprocess
from fastpeft.runs.options import TextOptions


def convert_run(source: str | Path, out: str | Path, image_size: int | None = None, overwrite: bool = False, **options) -> ConversionReport:
    """`fastpeft.convert.layouts.convert`, and: a LaVIN adapter file, with ``llama=`` (LLaMA's original folder, or transformers' of one)
    and ``clip=`` (OpenAI's ViT-L-14.pt) -> a complete LaVIN. ``temperature=`` and ``adapter_scale=`` overrule what the file says of
    its adapters; ``vicuna_delta=`` is the folder of what the official code adds to LLaMA where the file says use_vicuna."""
    return convert(source, out, image_size, overwrite, layouts=(LAVIN, *LAYOUTS), **options)


def _write_lavin(
    out: Path,
    source: Path,
    contents: Contents,
    llama: str | Path | None = None,
    clip: str | Path | None = None,
    vicuna_delta: str | Path | None = None,
    vision_heads: int | None = None,
    adapter_scale: float | None = None,
    temperature: float | None = None,
) -> ConversionReport:
    arguments = _arguments(contents)
    with naming(source):
        if llama is None or clip is None:
            raise ValueError("LaVIN's adapters alone: give llama (LLaMA's folder) and clip (OpenAI's ViT-L-14.pt), too")
        if bool(arguments.get("use_vicuna")) != (vicuna_delta is not None):
            trained = "trained on Vicuna (use_vicuna): give LLaMA's original folder, and as vicuna_delta the folder of what is added to it"
            raise ValueError(trained if vicuna_delta is None else "not trained on Vicuna (no use_vicuna): leave vicuna_delta out")
    clip = Path(clip).expanduser()
    with naming(clip):
        if not clip.is_file():
            raise ValueError("no such file: give OpenAI's CLIP, such as ViT-L-14.pt")
        vision, seen, _ = clip_from_official(read_file(clip).state, vision_heads)
    opened = open_llama(Path(llama).expanduser(), None if vicuna_delta is None else Path(vicuna_delta).expanduser())
    with naming(source):
        lavin = lavin_from_official(contents.state, arguments, vision, opened.config, adapter_scale, temperature)
        text = _text_options(arguments)
    # the tokenizer is read before gigabytes are written
    tokenizer = load_causal_tokenizer(opened.tokenizer[0].parent) if opened.tokenizer else None
    llm = ((f"llm.{name}", tensor) for name, tensor in opened.tensors)
    with atomic_folder(out, keep=besides_weights) as draft:
        count = write_model(draft, lavin.config, chain(lavin_vision(seen), lavin.base.items(), llm), opened.tokenizer)
        model = _adapted(draft, lavin)
        about = {
            "base": {"model": str(out), "dtype": str(opened.config.dtype).removeprefix("torch.")},
            "base_fingerprint": fingerprint(model, Weights(draft)),
        }
        if tokenizer is not None:
            about |= describe_prompts("lavin", text.max_length, lavin.config.visual_tokens, clip_preprocess(None, model), text.reading())
        write_more = None if tokenizer is None else (lambda folder: save_tokenizer(tokenizer, folder / "tokenizer"))
        save_adapter(model, draft / "adapter", description=about, write_more=write_more)
    count += sum(map(len, lavin.adapters.values()))
    notes = [*contents.notes("args"), *lavin.notes, *no_tokenizer(opened.tokenizer)]
    method = lavin.methods["llm"]
    notes.append(f"adapters of scale {method.scale:g}, routed at temperature {method.temperature:g}, in {out / 'adapter'}")
    return ConversionReport("LaVIN + CLIP + LLaMA -> lavin", count, notes)


def _arguments(contents: Contents) -> dict[str, Any]:
    given = contents.beside.get("args")
    return given if isinstance(given, dict) else dict(getattr(given, "__dict__", {}))


def _text_options(arguments: dict[str, Any]) -> TextOptions:
    """Of the run's arguments, how it read ScienceQA; its sequences count the modality token, ours do not."""
    length = arguments.get("max_seq_len", SEQUENCE)
    if not isinstance(length, int) or length < 3:
        raise ValueError(f"its args give max_seq_len = {length!r}, and 3 or more is needed")
    said = {name: arguments[name] for name in ("prompt_format", "use_caption") if isinstance(arguments.get(name), str | bool)}
    return TextOptions(max_length=length - 1, **said)


def _adapted(folder: Path, lavin: Lavin) -> nn.Module:
    """The folder's model on the meta device, with the file's adapters and neck in memory."""
    model = adapt(build(folder, device="meta"), {"neck": "T", **lavin.methods})
    held = lavin.base | {name: tensor for part in lavin.adapters.values() for name, tensor in part.items()}
    parameters = dict(model.named_parameters())
    for name, tensor in held.items():
        owner, _, leaf = name.rpartition(".")
        assert parameters[name].shape == tensor.shape, name
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor.detach(), requires_grad=True))
    assert all(p.is_meta == (name not in held) for name, p in model.named_parameters())
    return model


LAVIN = Layout(
    "LaVIN's adapters",
    lambda path, names: is_lavin(names),
    ("llama", "clip", "vicuna_delta", "vision_heads", "adapter_scale", "temperature"),
    _write_lavin,
)
