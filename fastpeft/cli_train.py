"""Commands that train, one adapter or several, and that tell before what training costs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fastpeft.cli_options import ImageEncoder, Json, Model, PlanOption, Quantize, Rank, emit, say, with_options
from fastpeft.cli_scores import accuracy_lines, ranks_lines
from fastpeft.options import bytes_of, canonical, split
from fastpeft.runs.options import RECIPE, DataOptions, TextOptions, read_yaml

ADAPTERS = "YAML file of a study, whose rows and seeds are adapters of one base in one run"


@with_options(*RECIPE, without=("stages",))
def train(
    config: Annotated[str | None, typer.Option(help="YAML file of any of these options; the command line wins.")] = None,
    adapters: Annotated[str | None, typer.Option(help=f"{ADAPTERS}; each one's files are in --out/NAME.")] = None,
    as_json: Json = False,
    **given,
) -> None:
    """Fine-tune on a data set; leaves summary.json, metrics.jsonl, adapter/, checkpoint/ and report.html in --out."""
    given = (read_yaml(config) if config else {}) | canonical(given, *RECIPE)
    if adapters is not None:
        return _train_several(adapters, given, as_json)
    for name, what in (("data", "a data folder"), ("out", "a folder for the run")):
        if not given.get(name) and not (name == "data" and given.get("stages")):
            raise ValueError(f"--{name} is missing: give {what}")
    if not given.get("stages"):
        split(given, *RECIPE)  # wrong options are told before torch is loaded
    from fastpeft.ranks import one_voice
    from fastpeft.runs.stages import train_recipe

    try:
        with one_voice() as ranks:
            summary = train_recipe(given)
    except KeyboardInterrupt as error:  # typer would drop what it says
        say(str(error) or "interrupted")
        raise typer.Exit(getattr(error, "exit_status", 130)) from None
    if not ranks.first:
        return
    lines = [_told(summary)]
    lines.append(f"{summary['steady_samples_per_second']:.2f} samples/s, peak memory {summary['peak_memory_bytes'] / 1e9:.2f} GB")
    lines += accuracy_lines(summary["eval"]) + [f"note: {note}" for note in summary.get("notes", ())]
    emit(summary, as_json, [*lines, f"everything is in {given['out']} (report.html to look at)"])


def _told(summary: dict[str, Any]) -> str:
    return f"{summary['plan']}: loss {summary['loss_first']:.3f} -> {summary['loss_last']:.3f} in {summary['steps']} steps"


def _train_several(file: str, given: dict[str, Any], as_json: bool) -> None:
    """The adapters of a study's file; exit code 1 where one failed and the others went on."""
    from fastpeft.study.adapters import adapters_of

    if not given.get("out"):
        raise ValueError("--out is missing: give a folder for the runs")
    if given.get("stages"):
        raise ValueError("stages go on from each other: leave --adapters out, or the stages")
    adapters_of(file, given)  # wrong options are told before torch is loaded
    from fastpeft.study.adapters import train_file

    try:
        done = train_file(file, given)
    except KeyboardInterrupt as error:
        say(str(error) or "interrupted")
        raise typer.Exit(getattr(error, "exit_status", 130)) from None
    lines = []
    for name, summary in done["adapters"].items():
        lines += [f"{name}: {_told(summary)}", *(f"  {line}" for line in accuracy_lines(summary["eval"]))]
    lines += [f"{name} failed: {error}" for name, error in done["failed"].items()]
    emit(done, as_json, [*lines, f"everything is in {done['out']}, a folder for each (comparison.html to look at)"])
    if done["failed"]:
        raise typer.Exit(1)


@with_options(DataOptions, TextOptions, without=("data", "eval_split_file"))
def estimate(
    model: Model = "miss",
    plan: PlanOption = None,
    rank: Rank = None,
    batch_size: Annotated[int, typer.Option(help="Samples per forward.")] = 20,
    dtype: Annotated[str, typer.Option(help="Dtype of the base: fp32, bf16 or fp16.")] = "fp32",
    quantize: Quantize = None,
    image_encoder: ImageEncoder = None,
    data: Annotated[str | None, typer.Option(help="Folder of a data set, whose lengths and images the batches have.")] = None,
    vocab: Annotated[str | None, typer.Option(help="With --data: tokenizer (default: the model's, or learnt from the data).")] = None,
    steps: Annotated[int | None, typer.Option(help="With --data: steps whose time is told (default: one epoch's).")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of a question (default 20) or a causal sample (default 512).")] = None,
    answer_len: Annotated[int | None, typer.Option(help="Tokens of an answer (default 6, or a quarter of the sample).")] = None,
    questions_per_image: Annotated[int, typer.Option(help="A batch's questions about one image.")] = 1,
    gradient_accumulation: Annotated[int, typer.Option(help="Forwards per step.")] = 1,
    no_feature_cache: Annotated[bool, typer.Option("--no-feature-cache", help="Compute a frozen image encoder in every step.")] = False,
    cache_layers: Annotated[bool, typer.Option("--cache-layers", help="Leave out a language model's lowest, frozen layers.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="The same model and plan without fastpeft, attention eager.")] = False,
    gpu_memory: Annotated[str | None, typer.Option(help="A GPU's memory, such as 24GB: does the step fit, and what batch does?")] = None,
    world: Annotated[int, typer.Option(help="Ranks, a device each, of this batch size each.")] = 1,
    nodes: Annotated[int, typer.Option(help="Machines that the ranks are on.")] = 1,
    shard: Annotated[str | None, typer.Option(help="What is in pieces over the ranks: base, the frozen weights.")] = None,
    link: Annotated[str | None, typer.Option(help="Bytes a second between a machine's devices, such as 300GB.")] = None,
    network: Annotated[str | None, typer.Option(help="Bytes a second of a machine's network, such as 25GB.")] = None,
    latency: Annotated[float, typer.Option(help="Microseconds to start a message.")] = 10.0,
    tflops: Annotated[float | None, typer.Option(help="TFLOP/s that a device sustains in such a step.")] = None,
    adapters: Annotated[str | None, typer.Option(help=f"{ADAPTERS}; it wins over these options.")] = None,
    as_json: Json = False,
    **reading,
) -> None:
    """FLOPs and memory of a training step, without running it; with --data, of a step on these data, and how long a run takes here; on
    several devices (--world) also what travels; of several adapters in one run (--adapters) the memory of one base and each one's own."""
    if gpu_memory is not None:
        bytes_of(gpu_memory)
    from fastpeft.cost.several_devices import Links
    from fastpeft.models import resolve
    from fastpeft.plan import plan_for
    from fastpeft.runs.estimate import estimate_command

    step = {"batch_size": batch_size, "dtype": dtype, "gradient_accumulation": gradient_accumulation, "quantize": quantize}
    step |= {"seq_len": seq_len, "answer_len": answer_len, "questions_per_image": questions_per_image}
    step |= {"feature_cache": not no_feature_cache, "cache_layers": cache_layers, "optimized": not plain, "gpu_memory": gpu_memory}
    step |= {"world": world, "nodes": nodes, "shard": shard, "flops_per_second": None if tflops is None else tflops * 1e12}
    if link is not None:
        step["links"] = Links(bytes_of(link), None if network is None else bytes_of(network), latency * 1e-6)
    reading = {"data": data, "vocab": vocab, "steps": steps, "reading": reading}
    if adapters is not None:
        given = {"model": model, "image_encoder": image_encoder, "plan": plan, "rank": rank, "lora_alpha": None, "lora_dropout": None}
        return _estimate_several(adapters, given | step, reading, as_json)
    source = resolve(model, image_encoder)
    chosen = plan_for(source.family.parts, plan or source.family.plan, r=rank)
    found, run = estimate_command(source, chosen, step, **reading)
    rows = [("weights", found.weight_bytes), ("gradients", found.gradient_bytes), ("optimiser", found.optimizer_bytes)]
    rows += [("kept for backward", found.saved_bytes), ("this process", found.process_bytes), ("peak", found.peak_bytes)]
    lines = [f"{model}  {found.plan}  batch {batch_size}  {dtype}: {found.flops_per_sample / 1e9:,.2f} GFLOP per sample"]
    lines += [f"{name:>18} {size / 1e9:>10.3f} GB" for name, size in rows if size]
    if found.fits is not None:
        lines.append(f"{'fits' if found.fits else 'does not fit'} in {gpu_memory}; the largest batch that does: {found.largest_batch_size}")
    lines += ranks_lines(found.ranks)
    lines += [f"  {line}" for line in found.advice] + [f"note: {note}" for note in [*found.notes, *run.pop("notes", [])]]
    emit(found.to_dict() | run, as_json, lines)


def _estimate_several(file: str, given: dict[str, Any], reading: dict[str, Any], as_json: bool) -> None:
    """Of the adapters of a study's file; ``given``: options of all."""
    from fastpeft.runs.adapters import estimate_adapters
    from fastpeft.study.adapters import shapes_of

    found = estimate_adapters(shapes_of(file, given), **reading)
    flops = f"{found.flops_per_sample / 1e9:,.2f} GFLOP per sample of all"
    lines = [f"{len(found.adapters)} adapters on one base, a step of each in turn: {flops}"]
    for name, one in found.adapters.items():
        its_own = f"{one['flops_per_sample'] / 1e9:,.2f} GFLOP per sample, {one['own_bytes'] / 1e6:,.1f} MB of its own"
        lines.append(f"  {name}: {one['plan']}, {its_own}")
    rows = [("base, once", found.base_bytes), ("adapters' own", found.own_bytes), ("kept for backward", found.saved_bytes)]
    rows += [("this process", found.process_bytes), ("peak", found.peak_bytes), ("peak of runs apart", found.apart_bytes)]
    lines += [f"{name:>18} {size / 1e9:>10.3f} GB" for name, size in rows if size]
    if found.fits is not None:
        lines.append(f"{'fits' if found.fits else 'does not fit'} in {given['gpu_memory']}")
    emit(found.to_dict(), as_json, lines)
