"""Jobs of a study in a process: one job's stages trained in turn, or several jobs of one base in one run; adapters scored, results
written."""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

from fastpeft.documents import parse_json
from fastpeft.files import clear_drafts, locked, write_json
from fastpeft.options import split
from fastpeft.runs.options import RECIPE, DataOptions, GenerationOptions, MetricOptions
from fastpeft.study.jobs import Job

RESULT, FAILED = "result.json", "failed.json"
SUMMED = ("seconds", "steps", "samples")  # of a job's stages
KEPT = ("loss_first", "loss_last", "peak_memory_bytes", "saved_bytes_per_step", "flops_per_sample", "model", "plan", "dtype", "device")
KEPT += ("batch_size", "parameters", "routing", "versions", "notes")


def work(jobs: Sequence[Job], features: str | None) -> None:
    """What a process does: one job, or several that train over one base. It ends with its parent, so that a killed study leaves nobody who
    writes in its folders."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with ExitStack() as held:
        for job in jobs:
            folder = Path(job.folder)
            folder.mkdir(parents=True, exist_ok=True)
            # waits: the process of a study that was killed a moment ago may still be ending
            held.enter_context(locked(folder, wait=True))
            clear_drafts(folder)
        log = held.enter_context(open(log_of(jobs), "a", buffering=1))
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        sys.stdout = sys.stderr = log
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", module="fastpeft")
        try:
            failed = train_side_by_side(jobs, features) if len(jobs) > 1 else {}
            for job in jobs:
                _finish(job, features, failed.get(job.name))
        except KeyboardInterrupt as error:
            print(f"interrupted: {error}")
            os._exit(130)


def log_of(jobs: Sequence[Job]) -> Path:
    """Where the process of these jobs writes what it says."""
    return Path(jobs[0].folder) / "log.txt"


def _finish(job: Job, features: str | None, failure: str | None) -> None:
    """Train what is left of a job, score it, and write its result; or why it failed (``failure``: while it trained beside others)."""
    folder = Path(job.folder)
    try:
        if failure is None:
            result = run_job(job, features)
            (folder / FAILED).unlink(missing_ok=True)
            write_json(folder / RESULT, result)
    except Exception as error:
        traceback.print_exc()
        failure = " ".join(str(error).split()) or type(error).__name__
    if failure is not None:
        write_json(folder / FAILED, {"error": failure})


def _end_with_parent() -> None:
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)


def run_job(job: Job, features: str | None) -> dict[str, Any]:
    """Train what is not trained yet, score, and return the result (JSON-able)."""
    summaries, start = [], None if job.starts_from is None else source_adapter(job)
    for at in range(1, len(job.stages) + 1):
        out = Path(job.folder) / f"stage-{at}"
        if not (out / "summary.json").is_file():  # written last
            _train(job, at, out, start, features)
        summaries.append(parse_json((out / "summary.json").read_text(encoding="utf-8")))
        start = out / "adapter"
    last = summaries[-1]
    scores = scores_of(job, start) if job.score_on or job.generation else {job.data: last["eval"]} if last.get("eval") else {}
    used = [s["features"] for s in summaries if s.get("features")]
    return {
        "job": job.identity(),
        "scores": scores,
        "adapter_bytes": sum(file.stat().st_size for file in start.rglob("*.safetensors")),
        "features": {name: sum(counts[name] for counts in used) for name in ("computed", "loaded", "reused")} if used else None,
        "gates": gates_of(start),
        "similarity": similarity_of(job, start) if job.similarity else None,
        "memory": memory_of(job) if job.memory else None,
        **{name: sum(s[name] for s in summaries) for name in SUMMED},
        **{name: last[name] for name in KEPT if name in last},
    }


def _train(job: Job, at: int, out: Path, start: Path | None, features: str | None) -> None:
    """One stage, from its checkpoint where it has one."""
    from fastpeft.runs.stages import going_on
    from fastpeft.runs.train import train_run

    given = _options(job, at, out, features)
    if at > 1:
        given |= going_on(job.stages, at, lambda stage: Path(job.folder) / f"stage-{stage}" / "adapter")
    elif start is not None:
        given["init_adapter"] = str(start)
    given = {name: value for name, value in given.items() if value is not None}
    run, data, text, metrics, training = split(given, *RECIPE)
    train_run(run.model, run.plan, data, training, text=text, metrics=metrics, **run.arguments(), **run.lora)


def _options(job: Job, at: int, out: Path, features: str | None) -> dict[str, Any]:
    """Of one stage."""
    given = {"feature_cache_dir": features} | job.stages[at - 1] | {"out": str(out), "resume": True, "progress": False}
    if job.score_on or job.generation or at < len(job.stages):
        given["no_eval"] = True
    return given


def base_of(job: Job) -> str | None:
    """The same of jobs that can train over one base in one run; None for a job that goes on from another, or has several stages."""
    from fastpeft.runs.adapters import common

    if job.starts_from is not None or len(job.stages) > 1:
        return None
    return json.dumps(common(_options(job, 1, Path(job.folder), None)), sort_keys=True, default=str)


def train_side_by_side(jobs: Sequence[Job], features: str | None) -> dict[str, str]:
    """Train jobs of one base in one run, those that are not trained yet; returns the error of each that failed."""
    from fastpeft.runs.adapters import train_adapters

    outs = {job.name: Path(job.folder) / "stage-1" for job in jobs}
    left = [job for job in jobs if not (outs[job.name] / "summary.json").is_file()]
    options = {job.name: _options(job, 1, outs[job.name], features) for job in left}
    options = {name: {key: value for key, value in given.items() if value is not None} for name, given in options.items()}
    return train_adapters(options, progress=False).failed if options else {}


def source_adapter(job: Job) -> Path:
    """The adapter of the job that this one starts from."""
    from fastpeft.study.jobs import folder_of

    stages = sorted(Path(folder_of(job, job.starts_from)).glob("stage-*/adapter"), key=lambda path: int(path.parent.name.split("-")[1]))
    return stages[-1]


def scores_of(job: Job, adapter: Path) -> dict[str, dict[str, Any]]:
    """Scores by data set, each kept as soon as it is there."""
    from fastpeft.runs.evaluate import eval_run
    from fastpeft.runs.mmlu import asks_mmlu

    found = {}
    for name, reading in (job.score_on or {job.data: {k: v for k, v in job.stages[-1].items() if k in _READING}}).items():
        kept = Path(job.folder) / f"scores-{name}.json"
        if not kept.is_file():
            import torch

            torch.manual_seed(job.seed)
            data, generation, metrics = split({k: v for k, v in job.stages[-1].items() if k in _METRICS} | reading | job.generation,
                                              DataOptions, GenerationOptions, MetricOptions)  # fmt: skip
            how = {"num_beams": generation.num_beams, "metrics": metrics, **generation.chosen()}
            if asks_mmlu(data):  # the rows of one base share its answers
                how = {"kept": Path(job.folder).parents[2] / "base-answers"}
            write_json(kept, eval_run(adapter, data, device=job.stages[-1].get("device"), progress=False, **how))
        found[name] = parse_json(kept.read_text(encoding="utf-8"))
    return found


_READING = {"data", "languages", "skip_bad"}
_METRICS = {"metrics", "bertscore_model", "bertscore_layer", "bertscore_idf", "bertscore_baseline", "wordnet"}


def gates_of(adapter: Path) -> dict[str, float] | None:
    """By layer, from 0 at the bottom: the mean size of Excitor's gates; None without Excitor."""
    from safetensors import safe_open

    found = {}
    for file in sorted(adapter.rglob("adapter_model.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if name.endswith("excitor_blocks.gate"):
                    layer = name.partition(".layers.")[2].partition(".")[0]
                    found[int(layer)] = float(tensors.get_tensor(name).float().abs().mean())
    return {str(layer): found[layer] for layer in sorted(found)} or None


def similarity_of(job: Job, adapter: Path) -> dict[str, dict[str, float]] | None:
    """By layer, from 0 at the bottom: Excitor's similarity on questions of the job's own test split, else of its training data; None
    without Excitor."""
    from fastpeft.evaluate.similarity import excitor_similarity
    from fastpeft.runs import causal
    from fastpeft.runs.evaluate import load_run

    if gates_of(adapter) is None:
        return None
    _, data, text, _, _ = split(job.stages[-1], *RECIPE)
    data = replace(data, data={k: v for k, v in asdict(data.sources[0]).items() if v is not None and k != "weight"})
    network, tokenizer, preprocess = load_run(adapter, job.stages[-1].get("device"))
    try:
        samples = causal.read(data, text, "test", check_images=False)
    except ValueError:  # they have no such split
        samples = causal.read(data, text, "train", data.split_file, check_images=False)
    chosen = causal.dataset(network, list(samples)[:16], tokenizer, preprocess, text, prompts_only=True)
    return {str(layer): found for layer, found in excitor_similarity(network, chosen).items()}


def memory_of(job: Job) -> dict[str, Any] | None:
    """Bytes of a training step as ``fastpeft estimate`` computes them, of tensors alone: peak and kept for backward. None where it cannot
    tell."""
    from fastpeft.cost.estimate import estimate
    from fastpeft.models import resolve
    from fastpeft.plan import plan_for

    run, _, _, _, config = split(job.stages[-1], *RECIPE)
    source = resolve(run.model, run.image_encoder)
    try:
        step = {"batch_size": config.batch_size, "dtype": config.dtype, "questions_per_image": config.questions_per_image}
        found = estimate(source, plan_for(source.family.parts, run.plan or source.family.plan, **run.lora), **step, quantize=run.quantize)
    except ValueError as error:
        return {"missing": str(error)}
    return {"peak_bytes": found.peak_bytes - found.process_bytes, "saved_bytes": found.saved_bytes}
