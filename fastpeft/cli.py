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
from fastpeft.cli_answers import EVAL, ask, chat, evaluate
from fastpeft.cli_files import READING, convert, instruct, judge
from fastpeft.cli_options import (
    Adapter,
    Device,
    ImageEncoder,
    Json,
    Model,
    MovedBase,
    PlanOption,
    Rank,
    emit,
    example,
    flag,
    other_names,
    say,
)
from fastpeft.cli_study import study
from fastpeft.cli_train import estimate, train
from fastpeft.options import OptionError, fields
from fastpeft.runs.options import RECIPE, GenerationOptions

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def _version(asked: bool) -> None:
    if asked:
        from fastpeft import __version__

        print(f"fastpeft {__version__}")
        raise typer.Exit


@app.callback()
def fastpeft(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")] = False,
) -> None:
    """Parameter-efficient fine-tuning that is efficient."""


@app.command(epilog=example("fastpeft params --model miss --plan F/LoRA/LoRA --rank 8"))
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


TRAIN = (
    "fastpeft train --model miss-tiny --plan LoRA/LoRA/LoRA --data my-data --hold-out 0.2 --steps 100 --batch-size 64 --out my-run",
    "fastpeft train --config recipes/mile.yaml --data SLAKE --out my-run --resume",
    "fastpeft train --adapters recipes/adapters/ranks.yaml --model my-miss --data my-data --steps 1000 --out my-runs",
)
app.command(context_settings=other_names(*RECIPE), epilog=example(*TRAIN))(train)
app.command(
    "eval", context_settings=other_names(*EVAL), epilog=example("fastpeft eval --adapter my-run --data my-data --out predictions.json")
)(evaluate)
app.command(context_settings=other_names(GenerationOptions), epilog=example("fastpeft chat --adapter my-run --image scan.png"))(chat)
ASK = 'fastpeft ask --adapter my-run --image scan.png "Is there a fracture?" "Which side?"'
app.command(context_settings=other_names(GenerationOptions), epilog=example(ASK))(ask)
ESTIMATE = (
    "fastpeft estimate --model miss --plan LoRA/LoRA/LoRA --batch-size 20 --gpu-memory 24GB",
    "fastpeft estimate --model llava-med --data my-data --world 8 --shard base",
    "fastpeft estimate --adapters recipes/adapters/ranks.yaml --gpu-memory 24GB",
)
app.command(epilog=example(*ESTIMATE))(estimate)
app.command(context_settings=other_names(*READING), epilog=example("fastpeft instruct SLAKE my-instructions --style released"))(instruct)
CONVERT = (
    "fastpeft convert model_base_vqa_capfilt_large.pth my-blip --preprocess blip",
    "fastpeft convert llama7B-15.pth my-lavin --llama LLAMA/7B --clip ViT-L-14.pt",
)
app.command(epilog=example(*CONVERT))(convert)
JUDGE = ("fastpeft judge ours.json theirs.json --out pairs.jsonl", "fastpeft judge ours.json theirs.json --judgments judged.jsonl")
app.command(epilog=example(*JUDGE))(judge)


@app.command(epilog=example("fastpeft merge --adapter my-run --out my-model"))
def merge(
    adapter: Adapter,
    out: Annotated[str, typer.Option(help="Transformers folder to write.")],
    model: MovedBase = None,
    modality: Annotated[str | None, typer.Option(help="Merge MMAdapter for samples of this modality: text or image.")] = None,
    as_json: Json = False,
) -> None:
    """Fold LoRA, IA3 and adapters into the base and write a plain transformers folder."""
    from fastpeft.runs.merge import merge_run

    written = merge_run(adapter, out, model, modality)
    emit({"out": str(written)}, as_json, [f"merged model in {written}"])


@app.command(epilog=example("fastpeft verify --model miss-tiny --plan LoRA/IA3/Prefix --dtype fp64"))
def verify(
    model: Model = "miss-tiny",
    plan: Annotated[str | None, typer.Option(help="A plan such as F/LoRA/LoRA, or a YAML file (default: LoRA in each part).")] = None,
    dtype: Annotated[str, typer.Option(help="Dtype to compare in: fp64, fp32 or bf16.")] = "fp32",
    rank: Rank = None,
    seed: Annotated[int, typer.Option(help="Seed of adapters and of the batch.")] = 0,
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


STUDY = (
    "fastpeft study recipes/studies/mile_1.yaml --scale tiny --out runs/mile_1",
    "fastpeft study recipes/studies/mile_1.yaml --data slake=SLAKE --out runs/mile_1",
)
app.command(epilog=example(*STUDY))(study)


@app.command(epilog=example("fastpeft report my-run other-run --out comparison.html"))
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN [RUN ...]", help="Folders that fastpeft train wrote.")],
    out: Annotated[str | None, typer.Option(help="Page to write (default: RUN/report.html; of several runs comparison.html).")] = None,
    data: Annotated[list[str] | None, typer.Option(help="Folder whose images the page may show, beside those in RUN; repeatable.")] = None,
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


@app.command(epilog=example("fastpeft doctor"))
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
    except KeyboardInterrupt:  # before typer, which ends commands so, is there
        return 130
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
