"""Commands from files to files: data sets in another form, checkpoints in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastpeft.cli_options import Json, emit, with_options
from fastpeft.options import split
from fastpeft.runs.options import DataOptions

READING = (DataOptions,)


@with_options(*READING, only=("split_file", "languages", "skip_bad"))
def instruct(
    data: Annotated[str, typer.Argument(help="Folder of a data set of questions about images: Slake, VQA-RAD.")],
    out: Annotated[str, typer.Argument(help="Folder to write: a data set for `train --data`.")],
    style: Annotated[str, typer.Option(help="Phrasings: paper, as MILE's figure 4, or released, as its authors' file.")] = "paper",
    seed: Annotated[int, typer.Option(help="Seed of the options.")] = 0,
    as_json: Json = False,
    **given,
) -> None:
    """Questions about images in instruction format, with answer options in several phrasings; test questions stay as they are."""
    (chosen,) = split({"data": data, **given}, *READING)
    from fastpeft.data import write_instruction_data

    reading = {"split_file": chosen.split_file, "languages": chosen.languages, "skip_bad": chosen.skip_bad}
    made = write_instruction_data(data, out, style=style, seed=seed, **reading)
    counts = ", ".join(f"{made[name]} {name}" for name in ("train", "validate", "test") if made[name])
    lines = [f"{out}: {counts} questions; {made['phrasings'] / made['train']:.1f} phrasings of a training question"]
    lines += [f"{made['without_options']} have no options: there is no other answer"] if made["without_options"] else []
    emit(made | {"out": out, "style": style, "seed": seed}, as_json, lines + made["notes"])


def judge(
    ours: Annotated[str, typer.Argument(help="Our outputs, as `eval --outputs` writes them: AlpacaEval's JSON.")],
    theirs: Annotated[str, typer.Argument(help="Another model's outputs on the same instructions.")],
    out: Annotated[str | None, typer.Option(help="JSON lines to write: each pair in both orders, with messages for a judge.")] = None,
    judgments: Annotated[str | None, typer.Option(help="What the judge said: JSON lines with id, or AlpacaEval's annotations.")] = None,
    as_json: Json = False,
) -> None:
    """Two models' responses as pairs for a judge, in both orders; and the judge's answers as wins, ties and losses."""
    from fastpeft.evaluate.judge import read_judgments, read_outputs, write_pairs

    if (out is None) == (judgments is None):
        raise ValueError("give --out FILE to write the pairs, or --judgments FILE to read what a judge said of them")
    a, b = read_outputs(ours), read_outputs(theirs)
    if out is not None:
        count = write_pairs(out, a, b)
        left = len(a.responses) + len(b.responses) - count
        lines = [f"{out}: {count // 2} pairs of {a.generator} and {b.generator}, each in both orders"]
        emit({"out": out, "pairs": count // 2, "lines": count}, as_json, lines + [f"{left} outputs have no counterpart"] * bool(left))
        return
    found = read_judgments(judgments, a, b)
    lines = [f"{a.generator} against {b.generator}: {found['wins']} won, {found['ties']} tied, {found['losses']} lost of {found['n']}"]
    if found["first_preferred"] is not None:
        lines.append(f"the judge favoured the response it read first in {found['first_preferred']:.0%} of its judgments that are no ties")
    lines += [f"{found[name]} {told}" for name, told in _JUDGED if found[name]]
    emit(found, as_json, lines)


_JUDGED = (
    ("one_order", "pairs were judged in one order alone"),
    ("unread", "judgments have no scores to be read"),
    ("unjudged", "pairs have no judgment"),
)


def convert(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Official MISS/BLIP checkpoint (.pth), a transformers folder of one, LLaMA's original folder (params.json), OpenAI's CLIP "
            "(ViT-L-14.pt), LLaVA-Med's folder or connector (mm_projector.bin), or LaVIN's adapters (.pth)."
        ),
    ],
    out: Annotated[str, typer.Argument(help="Transformers folder to write, or .pth for the way back.")],
    llama: Annotated[
        str | None, typer.Option(help="Beside CLIP, a LLaVA's delta or LaVIN's adapters: LLaMA's folder, original or transformers'.")
    ] = None,
    clip: Annotated[str | None, typer.Option(help="Beside LaVIN's adapters or LLaVA's: OpenAI's CLIP (ViT-L-14.pt).")] = None,
    mm_projector: Annotated[str | None, typer.Option(help="Beside a LLaVA's folder: its connector, where it is a file of its own.")] = None,
    template: Annotated[str | None, typer.Option(help="Template of a LLaVA's prompts (default: that of its release).")] = None,
    backbone: Annotated[str | None, typer.Option(help="What CLIP and --llama become: excitor or lavin, not yet adapted.")] = None,
    vicuna_delta: Annotated[str | None, typer.Option(help="Folder of what LaVIN's code adds to LLaMA for Vicuna.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Temperature of LaVIN's routers (default: as the file says).")] = None,
    adapter_scale: Annotated[float | None, typer.Option(help="Scale of LaVIN's adapters (default: as the file says).")] = None,
    image_size: Annotated[int | None, typer.Option(help="Interpolate position embeddings to images of this size.")] = None,
    text_heads: Annotated[int | None, typer.Option(help="Heads of the text models (default: by their width, or 64 wide).")] = None,
    vision_heads: Annotated[int | None, typer.Option(help="Heads of the image encoder, likewise.")] = None,
    preprocess: Annotated[str | None, typer.Option(help="Whose images a MISS or BLIP checkpoint saw: miss (default), blip.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder to write.")] = False,
    as_json: Json = False,
) -> None:
    """Official MISS/BLIP VQA checkpoint to a transformers folder, and back; official files of LLaMA, CLIP, LLaVA-Med and LaVIN to one."""
    from fastpeft.runs.convert import convert_run

    heads = {"text_heads": text_heads, "vision_heads": vision_heads}
    companions = {"llama": llama, "clip": clip, "backbone": backbone, "vicuna_delta": vicuna_delta}
    companions |= {"mm_projector": mm_projector, "template": template, "preprocess": preprocess}
    router = {"temperature": temperature, "adapter_scale": adapter_scale}
    report = convert_run(Path(checkpoint), Path(out), image_size, overwrite, **heads, **companions, **router)
    about = {"direction": report.direction, "n_tensors": report.n_tensors, "notes": list(report.notes), "out": out}
    emit(about, as_json, [f"{report.direction}: {report.n_tensors} tensors -> {out}", *(f"note: {note}" for note in report.notes)])
