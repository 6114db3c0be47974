"""Command line. With ``--json`` the last line printed is one JSON object; bad input ends in one line on stderr and exit code 2.

Options of a run or a recipe are declared once, in dataclasses (fastpeft.runs.options); the others are declared here. A command imports
what it runs when it runs: help and usage errors need no torch.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated

import typer

from fastpeft._when_imported import when_imported
from fastpeft.cli_files import READING, convert, instruct, judge
from fastpeft.cli_options import ImageEncoder, Json, Model, PlanOption, Rank, emit, flag, other_names, printable, say, with_options
from fastpeft.cli_scores import accuracy_lines, mmlu_lines
from fastpeft.cli_study import study
from fastpeft.cli_train import estimate, train
from fastpeft.options import OptionError, fields, split
from fastpeft.runs.options import RECIPE, DataOptions, GenerationOptions, MetricOptions, MMLUOptions

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

Quiet = Annotated[bool, typer.Option("--quiet", help="no progress bars")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: CUDA where there is one)")]
Adapter = Annotated[str, typer.Option(help="adapter folder of a run")]
MovedBase = Annotated[str | None, typer.Option(help="the base, where it is no longer where the adapter says")]
Seed = Annotated[int, typer.Option(help="of sampling")]


def _version(asked: bool) -> None:
    if asked:
        from fastpeft import __version__

        print(f"fastpeft {__version__}")
        raise typer.Exit


@app.callback()
def fastpeft(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and end")] = False,
) -> None:
    """Parameter-efficient fine-tuning that is efficient."""


@app.command()
def params(
    model: Model = "miss", plan: PlanOption = None, rank: Rank = None, image_encoder: ImageEncoder = None, as_json: Json = False
) -> None:
    """Count what a plan trains; allocates nothing."""
    from fastpeft.models import resolve
    from fastpeft.plan import adapt, build, count, plan_for

    source = resolve(model, image_encoder)
    network = adapt(build(source, device="meta"), plan_for(source.family.parts, plan or source.family.plan, r=rank))
    counted = count(network)
    rows = [(name, c) for name, c in counted["parts"].items()] + [("all", counted)]
    lines = [f"{model}  {network.fastpeft_plan}", f"{'part':>10} {'base':>15} {'adapters':>13} {'trainable':>13}"]
    lines += [f"{name:>10} {c['base']:>15,} {c['adapters']:>13,} {c['trainable']:>13,}" for name, c in rows]
    lines.append(f"{counted['percent']:.3f}% of base + adapters, {counted['percent_of_base']:.3f}% of base")
    emit(counted | {"model": model, "plan": str(network.fastpeft_plan)}, as_json, lines)


app.command(context_settings=other_names(*RECIPE))(train)

EVAL = (DataOptions, GenerationOptions, MetricOptions, MMLUOptions)


@app.command("eval", context_settings=other_names(*EVAL))
@with_options(*EVAL, without=("data", "eval_split_file", "hold_out"))
def evaluate(
    adapter: Adapter,
    data: Annotated[str, typer.Option(help=fields(DataOptions)[0].description)],
    model: MovedBase = None,
    out: Annotated[str | None, typer.Option(help="where to write the predictions (JSON)")] = None,
    outputs: Annotated[str | None, typer.Option(help="where to write the responses as AlpacaEval's outputs, for `fastpeft judge`")] = None,
    generator: Annotated[str, typer.Option(help="the model's name in --outputs")] = "fastpeft",
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    prompt_format: Annotated[str | None, typer.Option(help="of ScienceQA, instead of the one trained with")] = None,
    template: Annotated[str | None, typer.Option(help="of prompts, instead of the one trained with")] = None,
    draw_unparsed: Annotated[bool, typer.Option("--draw-unparsed", help="draw a choice where a response to ScienceQA names none")] = False,
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


@app.command(context_settings=other_names(GenerationOptions))
@with_options(GenerationOptions, without=("num_beams",))
def chat(
    adapter: Adapter,
    image: Annotated[str | None, typer.Option(help="what the dialogue is about; /image FILE changes it")] = None,
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


@app.command(context_settings=other_names(GenerationOptions))
@with_options(GenerationOptions)
def ask(
    question: Annotated[list[str], typer.Argument(help="one or several, each in quotes")],
    adapter: Annotated[str, typer.Option(help="folder of a run, an adapter, or a merged model")],
    image: Annotated[str | None, typer.Option(help="what the questions are about")] = None,
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


app.command()(estimate)
app.command(context_settings=other_names(*READING))(instruct)
app.command()(convert)
app.command()(judge)


@app.command()
def merge(
    adapter: Adapter,
    out: Annotated[str, typer.Option(help="transformers folder to write")],
    model: MovedBase = None,
    modality: Annotated[str | None, typer.Option(help="of MMAdapter: for samples of 'text' or 'image'")] = None,
    as_json: Json = False,
) -> None:
    """Fold LoRA, IA3 and adapters into the base and write a plain transformers folder."""
    from fastpeft.runs.merge import merge_run

    written = merge_run(adapter, out, model, modality)
    emit({"out": str(written)}, as_json, [f"merged model in {written}"])


@app.command()
def verify(
    model: Model = "miss-tiny",
    plan: Annotated[str | None, typer.Option(help="one treatment per part (default: LoRA in each), or a YAML file")] = None,
    dtype: Annotated[str, typer.Option(help="fp64, fp32 or bf16")] = "fp32",
    rank: Rank = None,
    seed: Annotated[int, typer.Option(help="of adapters and of the batch")] = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Compare fused losses and gradients with plain PyTorch and PEFT; exit code 1 where they differ."""
    from fastpeft.runs.verify import verify_run

    result, applied = verify_run(model, plan, dtype=dtype, rank=rank, seed=seed, device=device)
    verdict = "all within tolerance" if result.ok else "DIFFERENT: " + ", ".join(dict.fromkeys(c.check for c in result.checks if not c.ok))
    lines = [f"{model}  {applied}  {dtype}, errors relative to plain PyTorch in float64", *result.lines(), verdict]
    emit(result.to_dict() | {"model": model, "plan": str(applied), "dtype": dtype}, as_json, lines)
    if not result.ok:
        raise typer.Exit(1)


app.command()(study)


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN [RUN ...]", help="folders that fastpeft train wrote")],
    out: Annotated[str | None, typer.Option(help="page to write (default: RUN/report.html; of several runs comparison.html)")] = None,
    data: Annotated[list[str] | None, typer.Option(help="folder whose images the page may show, beside those in RUN; repeats")] = None,
    as_json: Json = False,
) -> None:
    """Write a run's report again from its files, or a page that compares several runs."""
    from fastpeft.report.compare import write_reports

    written = str(write_reports(runs, out, data or ()))
    emit({"out": written}, as_json, [f"report in {written}"])


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """The benchmark suite of a checkout: `fastpeft bench ops ...`, `fastpeft bench steps ...`."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "bench" / "__main__.py").is_file():
        raise ValueError("the benchmark suite is not part of an installed package: run this from a checkout of the repository")
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    done = subprocess.run([sys.executable, "-m", "bench", *context.args], env=os.environ | {"PYTHONPATH": path})
    raise typer.Exit(done.returncode)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Which backend serves each operator here, and why."""
    from fastpeft.runs.doctor import diagnose

    about = diagnose()
    lines = [f"{name:>14}: {value}" for name, value in about["environment"].items()] + ["", f"{'operator':>28}  CPU / CUDA"]
    lines += [f"{op:>28}  {by.get('CPU', '-')} / {by.get('CUDA', '-')}" for op, by in about["operators"].items()]
    emit(about, as_json, lines)


def main() -> None:
    """Entry point: usage errors and bad input end with exit code 2 and one line on stderr."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells at import which kernels it does without
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    when_imported("transformers", _quiet_transformers)
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", module="fastpeft")
            warnings.showwarning = lambda message, *where: say(f"warning: {message}")
        sys.exit(_run())


def _quiet_transformers() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _run() -> int:
    try:
        code = app(standalone_mode=False)
    except OSError as error:
        return _complain(f"{error.strerror or error}: {error.filename}" if error.filename else error)
    except OptionError as error:
        return _complain(f"{error} (option '{_flag_of(error.option)}')")
    except (ValueError, FloatingPointError) as error:
        return _complain(error)
    except Exception as error:
        kind = type(error).__name__  # by name: these classes are torch's and safetensors', which may not be loaded
        if kind == "SafetensorError":  # a full disk, under transformers' writers
            return _complain(error)
        if kind in ("MemoryError", "OutOfMemoryError") or "allocate memory" in str(error):
            return _complain(f"out of memory: a smaller batch_size with more gradient_accumulation takes less ({error})")
        if hasattr(error, "format_message"):  # typer's and click's usage errors; without arguments, the help has been shown
            return _complain(error.format_message()) if error.format_message() else 2
        raise
    return code if isinstance(code, int) else 0


def _flag_of(option: str) -> str:
    return next((flag(f) for cls in (*RECIPE, GenerationOptions) for f in fields(cls) if f.name == option), f"--{option}")


def _complain(error) -> int:
    if os.environ.get("RANK", "0") != "0" and "fastpeft.ranks" not in sys.modules:
        time.sleep(10)  # torchrun gave every rank the same wrong options: the first one says so, and its end ends this process
    text = str(error)
    if "Original Traceback" in text:  # of a process that loads data: its last line is the error
        text = text.strip().splitlines()[-1].partition(": ")[2] or text
    say(text)
    return 2


if __name__ == "__main__":
    main()
