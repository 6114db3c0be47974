"""A run's folder at its start: refused where it holds another run, resumed from the newest intact checkpoint where that is asked for."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastpeft.adapters import fingerprint
from fastpeft.data.tokenizer import tokenizer_digest
from fastpeft.device import choose_device
from fastpeft.documents import parse_json
from fastpeft.files import clear_drafts, recover_folder
from fastpeft.models import parts_of
from fastpeft.plan import parse
from fastpeft.train.callbacks import imported
from fastpeft.train.config import FREE, TrainConfig
from fastpeft.train.gradients import trained
from fastpeft.train.metrics import keep_lines
from fastpeft.train.state import checkpoints, differences, load_state, newest_intact, promote

BEST = "best"  # the adapter of the best validation, in a run's folder
DATA = {"n", "samples", "images"}  # without these, the position in the data says nothing


def identity_of(trainer) -> dict[str, Any]:
    """Plan, base, data, tokenizer, preprocessing, validation, and every option of :class:`TrainConfig` that bears on the result."""
    about = {"images": trainer.dataset.image_digest(), "world": trainer.ranks.world}
    return json.loads(json.dumps(_on_every_rank(trainer) | about))


def _on_every_rank(trainer) -> dict[str, Any]:
    """What of it every rank of a run has to agree on: all but the images' contents, which would have to be read by each."""
    config = {name: value for name, value in asdict(trainer.config).items() if name not in FREE}
    about = {
        "plan": trainer.model.fastpeft_plan.to_dict(),
        "base": fingerprint(trainer.model),
        "tokenizer": tokenizer_digest(trainer.dataset.tokenizer),
        "reading": trainer.dataset.describe(),
        **trainer.dataset.identity(),
        **({"validation": trainer.validation.identity()} if trainer.validation else {}),
        **({"started_from": trainer.started_from["tensors"]} if trainer.started_from else {}),
    }
    return config | trainer.sampler.identity() | about


def open_runs(trainer) -> dict[str, Any] | None:
    """As :func:`open_run`, on every rank: rank 0 reads the folder, and the others stand where it does. ValueError, on all, where they do
    not hold the same model, data and options."""
    ranks = trainer.ranks
    if ranks.alone:
        return open_run(trainer) if trainer.out is not None else None
    ranks.check_same(json.loads(json.dumps(_on_every_rank(trainer))), differences)
    finished = open_run(trainer) if trainer.out is not None else None
    where = {name: getattr(trainer, name) for name in ("done", "total_batches", "total_steps", "saved_step")}
    moments = _on_host(trainer.optimizer.state_dict()) if ranks.first else None
    finished, where, batch, moments = ranks.from_first((finished, where, trainer.sampler.batch_size, moments))
    ranks.copy_from_first(trained(trainer.model))
    if not ranks.first:
        vars(trainer).update(where)
        trainer.sample_batches_of(batch)
        trainer.optimizer.schedule(trainer.total_steps)
        trainer.optimizer.load_state_dict(moments)
    return finished


def _on_host(state: Any) -> Any:
    """Nested dicts and lists with their tensors on the CPU: each rank's are on a device of its own."""
    if isinstance(state, torch.Tensor):
        return state.cpu()
    if isinstance(state, dict):
        return {name: _on_host(value) for name, value in state.items()}
    return [_on_host(value) for value in state] if isinstance(state, list | tuple) else state


def check_start(config: TrainConfig) -> None:
    """ValueError for what would end a run at its start, before its model is loaded: a folder that is none, or holds a run that is not to
    be resumed; a tracker that is not installed; a device that cannot be used."""
    if config.out is not None:
        if Path(config.out).exists() and not Path(config.out).is_dir():
            raise ValueError(f"{config.out} is a file: give a folder as out")
        if not config.resume:
            _refuse_another(Path(config.out))
    for tracker in config.trackers:
        imported(tracker)
    choose_device(config.device)


def _refuse_another(out: Path) -> None:
    checkpoint, metrics = out / "checkpoint", out / "metrics.jsonl"
    if checkpoints(checkpoint) or checkpoint.exists() or (metrics.is_file() and metrics.stat().st_size):
        raise ValueError(f"{out} holds a run already: resume it (--resume), or choose another --out")


def open_run(trainer) -> dict[str, Any] | None:
    """Make ``trainer.out`` ready, and put the trainer where the run stands. The summary of a run that is resumed although it is finished,
    else None. ValueError where the folder holds a run that is not to be resumed, or cannot be."""
    checkpoint, metrics = trainer.out / "checkpoint", trainer.out / "metrics.jsonl"
    if not trainer.config.resume:
        _refuse_another(trainer.out)
        metrics.unlink(missing_ok=True)
        return None
    clear_drafts(trainer.out)
    for folder in (checkpoint, trainer.out / "adapter", trainer.out / BEST):
        recover_folder(folder)
    found, progress, damaged = newest_intact(checkpoint, trainer.done)
    if found is None:
        _say(trainer, f"{checkpoint} is not there, so nothing is resumed: the run starts at step 0")
        metrics.unlink(missing_ok=True)  # of a run that ended before its first checkpoint
        return None
    _compare(trainer, {"world": 1} | progress["identity"])  # of before several ranks
    trainer.done |= progress["done"]
    trainer.plan_steps()
    if trainer.validation is not None and trainer.validation.exhausted(trainer.done["validation"]):
        trainer.total_batches, trainer.total_steps = trainer.done["batches"], trainer.done["step"]
    trainer.optimizer.schedule(trainer.total_steps)
    load_state(found, trainer.model, trainer.optimizer)
    trainer.saved_step = trainer.done["step"]
    if trainer.config.progress:
        print(f"resumed from step {trainer.done['step']}", file=sys.stderr)
    if not damaged and (finished := _finished(trainer)) is not None:
        trainer.end_with_best()
        return finished
    for problem in damaged:
        _say(trainer, f"{problem.partition(': remove')[0]}; going on from step {trainer.done['step']}, the newest intact one")
    promote(found, checkpoint)
    if missing := keep_lines(metrics, trainer.done["step"]):
        _say(trainer, f"{metrics} has no line for {missing} of the {trainer.done['step']} steps done; the report leaves them out")
    return None


def _compare(trainer, was: dict[str, Any]) -> None:
    """ValueError where what makes the run is not what it ``was``, unless it may change."""
    allowed = set(trainer.config.allow_change or ())
    if was["world"] != trainer.ranks.world and "batch_size" not in allowed:  # the same samples a step, in more or fewer forwards on each
        trainer.sample_batches_of(was.get("batch_size", trainer.sampler.batch_size))
    mine = trainer.identity
    if unknown := sorted(allowed - mine.keys()):
        raise ValueError(f"allow_change: {', '.join(unknown)} is nothing that a resumed run compares; known: {', '.join(mine)}")
    was = was | ({"plan": _plan_now(trainer, was["plan"])} if "plan" in was else {})
    changed = {name: differences(name, then, mine.get(name)) for name, then in was.items()}
    if refused := {name: said for name, said in changed.items() if said and name not in allowed}:
        how = "" if DATA & refused.keys() else f"; --allow-change {','.join(refused)} goes on all the same"
        raise ValueError(f"cannot resume {trainer.out}: " + "; ".join(text for said in refused.values() for text in said) + how)
    trainer.notes += [f"changed when it was resumed: {text}" for said in changed.values() for text in said]


def _plan_now(trainer, plan: Any) -> Any:
    """A checkpoint's plan with the options that methods have had since, at their defaults."""
    try:
        return json.loads(json.dumps(parse(plan, parts_of(trainer.model)).to_dict()))
    except ValueError:
        return plan


def _finished(trainer) -> dict[str, Any] | None:
    """summary.json of a run that has nothing left to do."""
    if trainer.total_batches > trainer.done["batches"]:
        return None
    try:
        summary = parse_json((trainer.out / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(summary, dict) or summary.get("steps") != trainer.done["step"]:
        return None
    scored = trainer.eval_dataset is None or summary.get("eval") is not None
    return summary if scored and (trainer.out / "report.html").is_file() else None


def _say(trainer, note: str) -> None:
    """A note for the summary, and on the console now."""
    trainer.notes.append(note)
    warnings.warn(note, stacklevel=5)
