"""Checkpoint formats that convert to and from transformers folders: MISS and BLIP VQA both ways, LLaMA, CLIP, LLaVA.

`convert` recognises the format of a source. ``*_names.py`` map names and shapes, ``*_files.py`` read and write files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from fastpeft.convert.blip_files import write_blip_checkpoint, write_blip_folder
from fastpeft.convert.blip_names import blip_to_transformers, transformers_to_blip
from fastpeft.convert.clip_files import write_clip_folder
from fastpeft.convert.clip_names import is_clip
from fastpeft.convert.llama_files import is_original, write_llama_folder
from fastpeft.convert.llava_files import is_llava, write_llava_folder, write_projector_folder
from fastpeft.convert.llava_names import has_projector
from fastpeft.convert.reading import naming, read_file
from fastpeft.convert.writing import ConversionReport, check_out

__all__ = ["FORMATS", "CheckpointFormat", "ConversionReport", "blip_to_transformers", "convert", "transformers_to_blip"]


@dataclass(frozen=True)
class CheckpointFormat:
    """A published format. ``knows``: whether a source is one, by its path and, of a file, its tensors' names; ``takes``: which of
    `convert`'s options; ``write``: (out, path, contents or None of a folder, options given) -> report, errors about the source named."""

    name: str
    knows: Callable[[Path, Collection[str]], bool]
    takes: tuple[str, ...]
    write: Callable[..., ConversionReport]


def convert(
    source: str | Path,
    out: str | Path,
    image_size: int | None = None,
    overwrite: bool = False,
    *,
    text_heads: int | None = None,
    vision_heads: int | None = None,
    formats: tuple[CheckpointFormat, ...] | None = None,
    **companions,
) -> ConversionReport:
    """A MISS or BLIP checkpoint file -> a transformers folder, or such a folder -> a checkpoint file (its tensors under
    ``model``); a folder of LLaMA's original files (params.json, consolidated.NN.pth) -> a transformers folder; OpenAI's CLIP ->
    a folder of CLIPVisionModelWithProjection, or with ``llama=`` (a LLaMA's folder) and ``backbone=`` ("excitor" or "lavin") -> one
    of fastpeft's own models, not yet adapted; a folder of LLaVA's or LLaVA-Med's own layout, or a connector's file (mm_projector.bin),
    with ``llama=`` (what a delta is added to) and ``clip=`` -> a folder of LLaVA-Med.

    ``out`` appears whole or not at all. An existing one is refused unless ``overwrite``; other files in it then stay.
    A new folder also gets its images' preprocessing: ``fastpeft_preprocess.json`` of MISS or, with ``preprocess="blip"``, of BLIP; CLIP's
    ``preprocessor_config.json``.
    ValueError says what is wrong.
    """
    source, out = Path(source).expanduser(), Path(out).expanduser().resolve()
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    given = {"image_size": image_size, "text_heads": text_heads, "vision_heads": vision_heads} | companions
    given = {name: value for name, value in given.items() if value is not None}
    known = FORMATS if formats is None else formats
    check_out(out, source.is_dir() and not is_original(source) and not is_llava(source), overwrite)
    with naming(source):
        contents = None if source.is_dir() else read_file(source)
        names = () if contents is None else contents.state.keys()
        kind = next(kind for kind in known if kind.knows(source, names))
        if refused := [name for name in given if name not in kind.takes]:
            if contents is None and {*refused} & {"image_size", "text_heads", "vision_heads"}:
                raise ValueError("a folder's config fixes image size and heads: leave them out")
            takes = f"it takes {', '.join(kind.takes)}" if kind.takes else "it takes none"
            raise ValueError(f"{', '.join(refused)} is no option of {kind.name}: {takes}")
    return kind.write(out, source, contents, **given)


LLAVA = ("llama", "clip", "vision_heads", "template")
FORMATS = (  # the first that knows a source
    CheckpointFormat("LLaVA's folder", lambda path, names: path.is_dir() and is_llava(path), (*LLAVA, "mm_projector"), write_llava_folder),
    CheckpointFormat("LLaVA's connector", lambda path, names: has_projector(names), LLAVA, write_projector_folder),
    CheckpointFormat("LLaMA's original files", lambda path, names: is_original(path), ("vicuna_delta",), write_llama_folder),
    CheckpointFormat("a transformers folder", lambda path, names: path.is_dir(), (), write_blip_checkpoint),
    CheckpointFormat(
        "OpenAI's CLIP", lambda path, names: is_clip(names), ("vision_heads", "llama", "backbone", "vicuna_delta"), write_clip_folder
    ),
    CheckpointFormat(
        "a MISS or BLIP checkpoint", lambda path, names: True, ("image_size", "text_heads", "vision_heads", "preprocess"), write_blip_folder
    ),
)
