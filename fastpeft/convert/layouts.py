"""Official checkpoint files <-> folders that transformers and `fastpeft.build` load: MISS and BLIP VQA both ways, LLaMA, CLIP.

Here a source is recognised. Names and shapes are the ``official*`` files'; ``_*_files.py`` read and write.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from fastpeft.convert.blip_files import write_blip, write_official
from fastpeft.convert.blip_names import official_to_transformers, transformers_to_official
from fastpeft.convert.clip_files import write_clip
from fastpeft.convert.clip_names import is_clip
from fastpeft.convert.llama_files import is_original, write_llama
from fastpeft.convert.reading import naming, read_file
from fastpeft.convert.writing import ConversionReport, check_out

__all__ = ["FORMATS", "CheckpointFormat", "ConversionReport", "convert", "official_to_transformers", "transformers_to_official"]


@dataclass(frozen=True)
class CheckpointFormat:
    """An official form. ``knows``: whether a source is one, by its path and, of a file, its tensors' names; ``takes``: which of
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
    """An official MISS or BLIP checkpoint file -> a transformers folder, or such a folder -> an official file (its tensors under
    ``model``); a folder of LLaMA's original files (params.json, consolidated.NN.pth) -> a transformers folder; OpenAI's CLIP ->
    a folder of CLIPVisionModelWithProjection, or with ``llama=`` (a LLaMA's folder) and ``backbone=`` ("excitor" or "lavin") -> one
    of fastpeft's own models, not yet adapted.

    ``out`` appears whole or not at all. An existing one is refused unless ``overwrite``; other files in it then stay.
    A new folder also gets its images' preprocessing: ``fastpeft_preprocess.json`` of MISS, CLIP's ``preprocessor_config.json``.
    ValueError says what is wrong.
    """
    source, out = Path(source).expanduser(), Path(out).expanduser().resolve()
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    given = {"image_size": image_size, "text_heads": text_heads, "vision_heads": vision_heads} | companions
    given = {name: value for name, value in given.items() if value is not None}
    known = FORMATS if formats is None else formats
    check_out(out, source.is_dir() and not is_original(source), overwrite)
    with naming(source):
        contents = None if source.is_dir() else read_file(source)
        names = () if contents is None else contents.state.keys()
        layout = next(layout for layout in known if layout.knows(source, names))
        if refused := [name for name in given if name not in layout.takes]:
            if contents is None and {*refused} & {"image_size", "text_heads", "vision_heads"}:
                raise ValueError("a folder's config fixes image size and heads: leave them out")
            takes = f"it takes {', '.join(layout.takes)}" if layout.takes else "it takes none"
            raise ValueError(f"{', '.join(refused)} is no option of {layout.name}: {takes}")
    return layout.write(out, source, contents, **given)


FORMATS = (  # the first that knows a source
    CheckpointFormat("LLaMA's original files", lambda path, names: is_original(path), ("vicuna_delta",), write_llama),
    CheckpointFormat("a transformers folder", lambda path, names: path.is_dir(), (), write_official),
    CheckpointFormat(
        "OpenAI's CLIP", lambda path, names: is_clip(names), ("vision_heads", "llama", "backbone", "vicuna_delta"), write_clip
    ),
    CheckpointFormat("a MISS or BLIP checkpoint", lambda path, names: True, ("image_size", "text_heads", "vision_heads"), write_blip),
)
