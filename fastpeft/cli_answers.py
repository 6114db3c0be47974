"""Commands that answer: a data set's questions with their scores, one image's, a dialogue's."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from fastpeft.cli_options import Adapter, Device, Json, MovedBase, Quiet, Seed, emit, printable, with_options
from fastpeft.cli_scores import accuracy_lines, mmlu_lines
from fastpeft.options import fields, split
from fastpeft.runs.options import DataOptions, GenerationOptions, MetricOptions, MMLUOptions

EVAL = (DataOptions, GenerationOptions, MetricOptions, MMLUOptions)


@with_options(*EVAL, without=("data", "eval_split_file", "hold_out"))
def evaluate(
    adapter: Adapter,
    data: Annotated[str, typer.Option(help=fields(DataOptions)[0].description)],
    model: MovedBase = None,
    out: Annotated[str | None, typer.Option(help="File to write the predictions to (JSON).")] = None,
    outputs: Annotated[str | None, typer.Option(help="File to write responses to, as AlpacaEval's, for `fastpeft judge`.")] = None,
    generator: Annotated[str, typer.Option(help="The model's name in --outputs.")] = "fastpeft",
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at once.")] = 32,
    prompt_format: Annotated[str | None, typer.Option(help="ScienceQA's prompt format, instead of the one trained with.")] = None,
    template: Annotated[str | None, typer.Option(help="Template of prompts, instead of the one trained with.")] = None,
    draw_unparsed: Annotated[bool, typer.Option("--draw-unparsed", help="Draw a choice where a response to ScienceQA names none.")] = False,
    seed: Seed = 0,
    device: Device = None,
    quiet: Quiet = False,
    as_json: Json = False,
    **given,
) -> None:
    """Answer a data set's questions with an adapter, or with a model's folder alone, and score the answers."""
    chosen, generation, metrics, mmlu = split({"data": data, **given}, *EVAL)
    import torch

    from fastpeft.runs.evaluate import eval_run

    torch.manual_seed(seed)
    decoding = {"num_beams": generation.num_beams, "metrics": metrics, **generation.chosen(), "prompt_format": prompt_format}
    decoding |= {"template": template, "draw_unparsed": seed if draw_unparsed else None, "mmlu": mmlu}
    decoding |= {"outputs": outputs, "generator": generator}
    scored = eval_run(adapter, chosen, device=device, model=model, out=out, progress=not quiet, batch_size=batch_size, **decoding)
    emit(scored, as_json, [*scored["notes"], *accuracy_lines(scored), *mmlu_lines(scored.get("mmlu"))])


@with_options(GenerationOptions, without=("num_beams",))
def chat(
    adapter: Adapter,
    image: Annotated[str | None, typer.Option(help="Image that the dialogue is about; /image FILE changes it.")] = None,
    model: MovedBase = None,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
    **given,
) -> None:
    """Talk with a causal model's adapter, one turn a line; /image FILE, /reset and /quit."""
    (generation,) = split(given, GenerationOptions)
    import torch

    from fastpeft.runs.chat import chat_run

    torch.manual_seed(seed)
    talk, settings = chat_run(adapter, image, device, model, **generation.chosen())
    typing = sys.stdin.isatty()  # a slip at the terminal does not end the dialogue
    tell = (lambda error: typer.echo(printable(f"fastpeft: {error}"), err=True)) if typing else None
    said = []
    for response in talk.follow(None if typing else sys.stdin, tell):
        said.append({"question": talk.turns[-1][0], "response": response})
        print(printable(response), flush=True)
    shown = None if talk.image is None else str(talk.image)
    emit({"turns": said, "image": shown, "generation": settings}, as_json, [])


@with_options(GenerationOptions)
def ask(
    question: Annotated[list[str], typer.Argument(help="One question or several, each in quotes.")],
    adapter: Annotated[str, typer.Option(help="Folder of a run, of an adapter, or of a merged model.")],
    image: Annotated[str | None, typer.Option(help="Image that the questions are about.")] = None,
    model: MovedBase = None,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
    **given,
) -> None:
    """Answer questions about an image."""
    (generation,) = split(given, GenerationOptions)
    import torch

    from fastpeft.runs.ask import load

    torch.manual_seed(seed)
    beams = {} if generation.num_beams is None else {"num_beams": generation.num_beams}
    answers = load(adapter, device, model).ask(image, question, **beams, **generation.chosen())
    emit({"image": image, "questions": question, "answers": answers}, as_json, answers)
