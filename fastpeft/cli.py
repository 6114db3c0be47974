"""The command line. With ``--json`` the last line printed is one JSON object; bad input ends in one line on stderr and exit code 2."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from safetensors import SafetensorError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Parameter-efficient fine-tuning that is efficient."
)

MODEL_HELP = "a name (miss, llava-med, llama-7b, excitor-7b, lavin-7b, ... or their -tiny), or a local transformers folder"
Model = Annotated[str, typer.Option(help=MODEL_HELP)]
PlanOption = Annotated[str, typer.Option(help="one treatment per part, such as F/LoRA/LoRA, or a YAML file")]
Rank = Annotated[int | None, typer.Option(help="LoRA's rank (default 4)")]
Quantize = Annotated[str | None, typer.Option(help="4bit or 8bit: the frozen base in bitsandbytes' format")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object as the last line")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: CUDA where there is one)")]
DATA_HELP = "folder of a data set: Slake, VQA-RAD, MILE, Alpaca, LLaVA, COCO captions, ScienceQA, image and report lists"
Data = Annotated[str, typer.Option(help=DATA_HELP)]
Split = Annotated[str | None, typer.Option(help="annotation file, or a file of qids; default: by the data set's own file names")]


def emit(values: dict[str, Any], as_json: bool, lines: list[str]) -> None:
    """Print for people, then, if asked, for programs."""
    for line in lines:
        print(line)
    if as_json:
        print(json.dumps(values))


@app.command()
def params(model: Model = "miss", plan: PlanOption = "F/LoRA/LoRA", rank: Rank = None, as_json: Json = False) -> None:
    """Count what a plan trains; allocates nothing."""
    from fastpeft.plan import adapt, build, count
    from fastpeft.train.run import plan_for

    network = build(model, device="meta")
    adapt(network, plan_for(network, plan, r=rank))
    counted = count(network)
    rows = [(name, c) for name, c in counted["parts"].items()] + [("all", counted)]
    lines = [f"{model}  {network.fastpeft_plan}", f"{'part':>10} {'base':>15} {'adapters':>13} {'trainable':>13}"]
    lines += [f"{name:>10} {c['base']:>15,} {c['adapters']:>13,} {c['trainable']:>13,}" for name, c in rows]
    lines.append(f"{counted['percent']:.3f}% of base + adapters, {counted['percent_of_base']:.3f}% of base")
    emit(counted | {"model": model, "plan": str(network.fastpeft_plan)}, as_json, lines)


@app.command()
def train(
    data: Annotated[str | None, typer.Option(help=DATA_HELP)] = None,
    out: Annotated[str | None, typer.Option(help="folder for the run's files")] = None,
    model: Annotated[str | None, typer.Option(help=f"{MODEL_HELP} (default miss-tiny)")] = None,
    plan: Annotated[str | None, typer.Option(help="one treatment per part, or a YAML file (default F/LoRA/LoRA)")] = None,
    config: Annotated[str | None, typer.Option(help="YAML file of any of these options; the command line wins")] = None,
    rank: Rank = None,
    lora_alpha: Annotated[float | None, typer.Option(help="numerator of LoRA's scaling (default 32)")] = None,
    lora_dropout: Annotated[float | None, typer.Option(help="on the input of LoRA's branch (default 0)")] = None,
    steps: Annotated[int | None, typer.Option(help="optimiser steps")] = None,
    epochs: Annotated[float | None, typer.Option(help="passes over the data, where steps are not given (default 1)")] = None,
    batch_size: Annotated[int | None, typer.Option(help="samples per forward (default 20)")] = None,
    gradient_accumulation: Annotated[int | None, typer.Option(help="forwards per step")] = None,
    lr: Annotated[float | None, typer.Option(help="peak learning rate of adapters (default 1e-3)")] = None,
    base_lr: Annotated[float | None, typer.Option(help="peak learning rate of trained base weights (default: a tenth of --lr)")] = None,
    min_lr: Annotated[float | None, typer.Option(help="where the cosine ends (default 0)")] = None,
    weight_decay: Annotated[float | None, typer.Option()] = None,
    warmup: Annotated[float | None, typer.Option(help="steps, or a fraction of them if below 1")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32 or bf16")] = None,
    quantize: Quantize = None,
    seed: Annotated[int | None, typer.Option()] = None,
    questions_per_image: Annotated[int | None, typer.Option(help="group a batch's questions by image")] = None,
    no_feature_cache: Annotated[bool, typer.Option("--no-feature-cache", help="encode a frozen image encoder's images every time")] = False,
    feature_cache_dir: Annotated[str | None, typer.Option(help="folder for a frozen image encoder's features, for later runs too")] = None,
    feature_cache_memory: Annotated[str | None, typer.Option(help="how much memory they may take, such as 2GB")] = None,
    feature_dtype: Annotated[str | None, typer.Option(help="fp32 or bf16, kept so (default: as computed)")] = None,
    memory_budget: Annotated[str | None, typer.Option(help="compute activations again to stay below so much memory, such as 6GB")] = None,
    without: Annotated[str | None, typer.Option(help="savings to switch off: remake, labelled, absorb")] = None,
    split_file: Split = None,
    eval_split_file: Annotated[str | None, typer.Option(help="what to score at the end; default: the data set's test split")] = None,
    hold_out: Annotated[float | None, typer.Option(help="score a fraction of the training images, held out, instead")] = None,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="score nothing at the end")] = False,
    template: Annotated[str | None, typer.Option(help="prompt of a causal model: alpaca, llava, lavin, plain (default: its own)")] = None,
    max_length: Annotated[int | None, typer.Option(help="tokens of a causal model's longest sample (default 512)")] = None,
    no_packing: Annotated[bool, typer.Option("--no-packing", help="pad a causal model's batches")] = False,
    prompt_format: Annotated[str | None, typer.Option(help="of ScienceQA, such as QCM-ALE")] = None,
    use_caption: Annotated[bool, typer.Option("--use-caption", help="ScienceQA's captions for a model that sees no images")] = False,
    instruction: Annotated[str | None, typer.Option(help="what is asked where the data hold captions or reports only")] = None,
    vocab: Annotated[
        str | None, typer.Option(help="vocab.txt or tokenizer folder; default: the model's, else learnt from the data")
    ] = None,
    from_scratch: Annotated[bool, typer.Option("--from-scratch", help="random weights, even where the package ships trained ones")] = False,
    languages: Annotated[str | None, typer.Option(help="comma-separated q_lang values to keep (default en)")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="leave bad entries out and count them")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the checkpoint in --out")] = False,
    save_every: Annotated[int | None, typer.Option(help="steps between checkpoints (default 200)")] = None,
    workers: Annotated[int | None, typer.Option(help="processes that decode images")] = None,
    device: Device = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard")] = False,
    trace: Annotated[bool, typer.Option("--trace", help="torch.profiler trace of three steps")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress bars")] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune on a data set; leaves summary.json, metrics.jsonl, adapter/, checkpoint/ and report.html in --out."""
    said = {name: value for name, value in locals().items() if value is not None and value is not False}
    from fastpeft.train.causal_run import TextOptions
    from fastpeft.train.config import TrainConfig, canonical, read_yaml
    from fastpeft.train.run import DataOptions, train_run

    for name in ("config", "as_json"):
        said.pop(name, None)
    given = (read_yaml(config) if config else {}) | canonical(said)
    for name, what in (("data", "a data folder"), ("out", "a folder for the run")):
        if not given.get(name):
            raise ValueError(f"--{name} is missing: give {what}")
    model, plan = given.pop("model", "miss-tiny"), given.pop("plan", "F/LoRA/LoRA")
    chosen = DataOptions(**{f.name: given.pop(f.name) for f in dataclasses.fields(DataOptions) if f.name in given})
    how = {
        "r": given.pop("rank", None),
        "lora_alpha": given.pop("lora_alpha", None),
        "lora_dropout": given.pop("lora_dropout", None),
        "vocab": given.pop("vocab", None),
        "quantize": given.pop("quantize", None),
        "pretrained": not given.pop("from_scratch", False),
        "evaluate": not given.pop("no_eval", False),
        "text": TextOptions(**{f.name: given.pop(f.name) for f in dataclasses.fields(TextOptions) if f.name in given}),
    }
    if given.pop("no_feature_cache", False):
        given["feature_cache"] = False
    try:
        summary = train_run(model, plan, chosen, TrainConfig.from_dict(given), **how)
    except KeyboardInterrupt as error:  # typer would drop what it says
        _say(str(error) or "interrupted")
        raise typer.Exit(130) from None
    lines = [f"{summary['plan']}: loss {summary['loss_first']:.3f} -> {summary['loss_last']:.3f} in {summary['steps']} steps"]
    lines.append(f"{summary['steady_samples_per_second']:.2f} samples/s, peak memory {summary['peak_memory_bytes'] / 1e9:.2f} GB")
    emit(summary, as_json, lines + _accuracy(summary["eval"]) + [f"everything is in {given['out']} (report.html to look at)"])


def _accuracy(scored: dict | None) -> list[str]:
    if scored is None:
        return []
    shown = ", ".join(f"{k} {scored[k]:.1%}" for k in ("open", "closed", "global") if scored[k] is not None)
    lines = [f"accuracy on {scored['n']} questions: {shown} (most frequent answer: {scored['majority']:.1%})"]
    if scored["closed"] is not None:
        always, verdict = scored["always_no_closed"], "beats" if scored["closed"] > scored["always_no_closed"] else "does NOT beat"
        lines.append(f"on closed questions it {verdict} always answering 'no' ({always:.1%})")
    return lines


@app.command("eval")
def evaluate(
    adapter: Annotated[str, typer.Option(help="adapter folder of a run")],
    data: Data,
    split_file: Split = None,
    model: Annotated[str | None, typer.Option(help="the base, where it is no longer where the adapter says")] = None,
    out: Annotated[str | None, typer.Option(help="where to write the predictions (JSON)")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    num_beams: Annotated[int | None, typer.Option(min=1, help="default: 3 for visual question answering, 1 for responses")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="of a response (default 128)")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="sample from the likeliest tokens of this probability")] = None,
    temperature: Annotated[float | None, typer.Option(help="of sampling")] = None,
    seed: Annotated[int, typer.Option(help="of sampling")] = 0,
    languages: Annotated[str, typer.Option(help="comma-separated q_lang values to keep")] = "en",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="leave bad entries out and count them")] = False,
    device: Device = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress bars")] = False,
    as_json: Json = False,
) -> None:
    """Answer a data set's questions with an adapter and score the answers."""
    from fastpeft.train.run import DataOptions, eval_run

    chosen = DataOptions(data, split_file, languages=tuple(languages.split(",")), skip_bad=skip_bad)
    generation = {"max_new_tokens": max_new_tokens, "top_p": top_p, "temperature": temperature}
    generation = {name: value for name, value in generation.items() if value is not None}
    if "top_p" in generation or "temperature" in generation:
        generation["do_sample"] = True
    torch.manual_seed(seed)
    how = {"device": device, "model": model, "out": out, "progress": not quiet, "batch_size": batch_size, "num_beams": num_beams}
    scored = eval_run(adapter, chosen, **how, **generation)
    emit(scored, as_json, [*scored["notes"], *_accuracy(scored)])


@app.command()
def chat(
    adapter: Annotated[str, typer.Option(help="adapter folder of a run")],
    image: Annotated[str | None, typer.Option(help="what the dialogue is about; /image FILE changes it")] = None,
    model: Annotated[str | None, typer.Option(help="the base, where it is no longer where the adapter says")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="of a response")] = 128,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="sample from the likeliest tokens of this probability")] = None,
    temperature: Annotated[float | None, typer.Option(help="of sampling")] = None,
    seed: Annotated[int, typer.Option(help="of sampling")] = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Talk with a causal model's adapter, one turn a line; /image FILE, /reset and /quit."""
    from fastpeft.checkpoints import describe
    from fastpeft.evaluate.chat import Chat, typed
    from fastpeft.evaluate.decoding import response_settings
    from fastpeft.models import family_of
    from fastpeft.train.causal_run import causal_dataset, options_of
    from fastpeft.train.run import load_run

    network, tokenizer, preprocess = load_run(adapter, device, model)
    if not family_of(network).template:
        raise ValueError("chat is for causal language models, and this adapter's base is none: use eval")
    text, how = options_of(describe(adapter)), {"max_new_tokens": max_new_tokens}
    sampling = {name: value for name, value in (("top_p", top_p), ("temperature", temperature)) if value is not None}
    how |= sampling | ({"do_sample": True} if sampling else {})
    torch.manual_seed(seed)
    talk = Chat(network, lambda samples: causal_dataset(network, samples, tokenizer, preprocess, text, prompts_only=True), image, **how)
    said, typing = [], sys.stdin.isatty()  # a slip at the terminal does not end the dialogue
    tell = (lambda error: typer.echo(f"fastpeft: {error}", err=True)) if typing else None
    for response in talk.follow(typed() if typing else sys.stdin, tell):
        said.append({"question": talk.turns[-1][0], "response": response})
        print(response, flush=True)
    answer = {"turns": said, "image": None if talk.image is None else str(talk.image), "generation": response_settings(tokenizer, **how)}
    emit(answer, as_json, [])


@app.command()
def estimate(
    model: Model = "miss",
    plan: PlanOption = "F/LoRA/LoRA",
    rank: Rank = None,
    batch_size: Annotated[int, typer.Option(help="samples per forward")] = 20,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16")] = "fp32",
    quantize: Quantize = None,
    seq_len: Annotated[int | None, typer.Option(help="tokens of a question (20), or of a causal model's sample (512)")] = None,
    answer_len: Annotated[int | None, typer.Option(help="tokens of an answer (6, or a quarter)")] = None,
    questions_per_image: Annotated[int, typer.Option(help="a batch's questions about one image")] = 1,
    gradient_accumulation: Annotated[int, typer.Option(help="forwards per step")] = 1,
    no_feature_cache: Annotated[bool, typer.Option("--no-feature-cache", help="with a frozen image encoder in the step")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="transformers' own execution, attention eager")] = False,
    gpu_memory: Annotated[str | None, typer.Option(help="of a GPU, such as 24GB: does it fit, and what batch does?")] = None,
    as_json: Json = False,
) -> None:
    """FLOPs and memory of a training step, without running it."""
    from fastpeft.plan import build
    from fastpeft.train.estimate import estimate as run
    from fastpeft.train.run import plan_for

    how = {"batch_size": batch_size, "dtype": dtype, "seq_len": seq_len, "answer_len": answer_len, "gpu_memory": gpu_memory}
    how["quantize"] = quantize
    how |= {"questions_per_image": questions_per_image, "gradient_accumulation": gradient_accumulation}
    found = run(model, plan_for(build(model, device="meta"), plan, r=rank), **how, feature_cache=not no_feature_cache, optimized=not plain)
    rows = [("weights", found.weight_bytes), ("gradients", found.gradient_bytes), ("optimiser", found.optimizer_bytes)]
    rows += [("kept for backward", found.saved_bytes), ("this process", found.process_bytes), ("peak", found.peak_bytes)]
    lines = [f"{model}  {found.plan}  batch {batch_size}  {dtype}: {found.flops_per_sample / 1e9:,.1f} GFLOP per sample"]
    lines += [f"{name:>18} {size / 1e9:>10.3f} GB" for name, size in rows if size]
    if found.fits is not None:
        lines.append(f"{'fits' if found.fits else 'does not fit'} in {gpu_memory}; the largest batch that does: {found.largest_batch_size}")
    emit(found.to_dict(), as_json, lines + [f"  {line}" for line in found.advice] + [f"note: {note}" for note in found.notes])


@app.command()
def convert(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="official MISS/BLIP checkpoint (.pth), a transformers folder of one, LLaMA's original folder (params.json), OpenAI's CLIP "
            "(ViT-L-14.pt), or LaVIN's adapters (.pth)"
        ),
    ],
    out: Annotated[str, typer.Argument(help="transformers folder to write, or .pth for the way back")],
    llama: Annotated[str | None, typer.Option(help="beside CLIP or LaVIN's adapters: LLaMA's folder, original or transformers'")] = None,
    clip: Annotated[str | None, typer.Option(help="beside LaVIN's adapters: OpenAI's CLIP (ViT-L-14.pt)")] = None,
    backbone: Annotated[str | None, typer.Option(help="what CLIP and --llama become: excitor or lavin, not yet adapted")] = None,
    vicuna_delta: Annotated[str | None, typer.Option(help="folder of what LaVIN's code adds to LLaMA for Vicuna")] = None,
    temperature: Annotated[float | None, typer.Option(help="of LaVIN's routers (default: as the file says)")] = None,
    adapter_scale: Annotated[float | None, typer.Option(help="of LaVIN's adapters (default: as the file says)")] = None,
    image_size: Annotated[int | None, typer.Option(help="interpolate position embeddings to this size")] = None,
    text_heads: Annotated[int | None, typer.Option(help="where the checkpoint's width does not tell (default: 64 wide each)")] = None,
    vision_heads: Annotated[int | None, typer.Option(help="likewise, of the image encoder")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite")] = False,
    as_json: Json = False,
) -> None:
    """Official MISS/BLIP VQA checkpoint to a transformers folder, and back; LLaMA's, CLIP's and LaVIN's official files to one."""
    from fastpeft.train.convert_run import convert_run

    how = {"text_heads": text_heads, "vision_heads": vision_heads, "llama": llama, "clip": clip, "backbone": backbone}
    how |= {"vicuna_delta": vicuna_delta, "temperature": temperature, "adapter_scale": adapter_scale}
    report = convert_run(Path(checkpoint), Path(out), image_size, overwrite, **how)
    about = {"direction": report.direction, "n_tensors": report.n_tensors, "notes": list(report.notes), "out": out}
    emit(about, as_json, [f"{report.direction}: {report.n_tensors} tensors -> {out}", *(f"note: {note}" for note in report.notes)])


@app.command()
def merge(
    adapter: Annotated[str, typer.Option(help="adapter folder of a run")],
    out: Annotated[str, typer.Option(help="transformers folder to write")],
    model: Annotated[str | None, typer.Option(help="the base, where it is no longer where the adapter says")] = None,
    modality: Annotated[str | None, typer.Option(help="of MMAdapter: for samples of 'text' or 'image'")] = None,
    as_json: Json = False,
) -> None:
    """Fold LoRA, IA3 and adapters into the base and write a plain transformers folder."""
    from fastpeft.train.run import merge_run

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
    from fastpeft.evaluate.answers import choose_device
    from fastpeft.models import parts_of
    from fastpeft.plan import adapt, build
    from fastpeft.train.run import plan_for
    from fastpeft.verify import DTYPES
    from fastpeft.verify import verify as run

    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    network = build(model, device=choose_device(device), dtype=DTYPES[dtype], seed=seed)
    torch.manual_seed(seed)
    adapt(network, plan_for(network, plan or "/".join("LoRA" for _ in parts_of(network)), r=rank))
    result = run(network, seed=seed)
    verdict = "all within tolerance" if result.ok else "DIFFERENT: " + ", ".join(dict.fromkeys(c.check for c in result.checks if not c.ok))
    lines = [f"{model}  {network.fastpeft_plan}  {dtype}, errors relative to plain PyTorch in float64", *result.lines(), verdict]
    emit(result.to_dict() | {"model": model, "plan": str(network.fastpeft_plan), "dtype": dtype}, as_json, lines)
    if not result.ok:
        raise typer.Exit(1)


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
    from fastpeft.diagnose import diagnose

    about = diagnose()
    lines = [f"{name:>14}: {value}" for name, value in about["environment"].items()] + ["", f"{'operator':>28}  CPU / CUDA"]
    lines += [f"{op:>28}  {by.get('CPU', '-')} / {by.get('CUDA', '-')}" for op, by in about["operators"].items()]
    emit(about, as_json, lines)


def main() -> None:
    """Entry point: usage errors and bad input end with exit code 2 and one line on stderr."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells at import which kernels it does without
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", module="fastpeft")
            warnings.showwarning = lambda message, *where: _say(f"warning: {message}")
        sys.exit(_run())


def _run() -> int:
    try:
        code = app(standalone_mode=False)
    except OSError as error:
        return _complain(f"{error.strerror or error}: {error.filename}" if error.filename else error)
    except (ValueError, TypeError, FloatingPointError, SafetensorError) as error:  # the last: a full disk, under transformers' writers
        return _complain(error)
    except Exception as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
            return _complain(f"out of memory: a smaller batch_size with more gradient_accumulation takes less ({error})")
        if hasattr(error, "format_message"):  # typer's and click's usage errors; without arguments, the help has been shown
            return _complain(error.format_message()) if error.format_message() else 2
        raise
    return code if isinstance(code, int) else 0


def _complain(error) -> int:
    text = str(error)
    if "Original Traceback" in text:  # of a process that loads data: its last line is the error
        text = text.strip().splitlines()[-1].partition(": ")[2] or text
    _say(text)
    return 2


def _say(text) -> None:
    print(f"fastpeft: {' '.join(str(text).split())}", file=sys.stderr)


if __name__ == "__main__":
    main()
