"""Training in stages, each going on from the one before (`stages:` in the YAML of `fastpeft train`).

    plan: T/T/T
    data: slake
    stages:
      - {epochs: 130}
      - {data: slake-instruct, epochs: 10}                    # the same plan: goes on from the adapter
      - {plan: F/LoRA/LoRA, data: slake-instruct}             # another plan: the adapter is merged, and the result is the base

A stage's options are the file's and the command line's with its own in their place. The last stage's files are in OUT, the others' in
OUT/stage-1, OUT/stage-2, ...; what a stage is merged into is in its folder's merged/.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastpeft.documents import parse_json
from fastpeft.files import clear_drafts, recover_folder, write_json
from fastpeft.options import as_command, checked, split
from fastpeft.ranks import ranks_here
from fastpeft.runs import train as one_run
from fastpeft.runs.merge import merge_run
from fastpeft.runs.options import RECIPE

FILE = "stages.json"
OF_THE_RUN = ("out", "resume", "stages", "device", "progress")  # not a stage's own
OF_THE_FIRST = ("model", "init_adapter", "from_scratch", "vocab", "quantize")  # later ones have what the stage before has
OF_A_PLAN = ("plan", "rank", "lora_alpha")


def stages_of(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The options of each stage, checked, without ``out``. ValueError names the stage and what is wrong."""
    shared = {name: value for name, value in given.items() if name != "stages"}
    made = []
    for number, own in enumerate(given["stages"], 1):
        try:
            own = checked(own, f"stage {number}", *RECIPE)
            if misplaced := [name for name in own if name in OF_THE_RUN or (number > 1 and name in OF_THE_FIRST)]:
                where = "of all stages, and stands beside them" if misplaced[0] in OF_THE_RUN else "said by the first stage alone"
                raise ValueError(f"{misplaced[0]} is {where}")
            made.append(shared | ({"no_eval": True} if number < len(given["stages"]) else {}) | own)
            if not made[-1].get("data"):
                raise ValueError("data is missing: give a data folder")
            split(made[-1], *RECIPE)
        except ValueError as error:
            raise ValueError(f"stage {number}: {str(error).removeprefix(f'stage {number}: ')}") from None
    return made


def train_recipe(given: Mapping[str, Any]) -> dict[str, Any]:
    """Train what options of RECIPE say, in stages or in one run; returns the summary."""
    if given.get("stages"):
        return train_stages(given)
    run, data, text, metrics, training = split(given, *RECIPE)
    more = run.arguments() | run.lora | {"command": as_command("train", given, *RECIPE)}
    return one_run.train_run(run.model, run.plan, data, training, text=text, metrics=metrics, **more)


def train_stages(given: Mapping[str, Any]) -> dict[str, Any]:
    """Train one stage after the other; returns the last one's summary with ``stages``, a few fields of each.

    With ``resume``, stages that are finished are not run again, and the one that was interrupted goes on. ValueError where a finished
    stage's options have changed since."""
    stages, out = stages_of(given), Path(given["out"])
    ranks = ranks_here()
    ranks.first_does(lambda: _check_finished(stages, out, bool(given.get("resume"))))
    told = []
    for number, options in enumerate(stages, 1):
        folder = out if number == len(stages) else out / f"stage-{number}"
        options = options | {"out": str(folder)}
        if number > 1:
            options |= ranks.first_does(functools.partial(going_on, stages, number, lambda stage: out / f"stage-{stage}" / "adapter"))
        if number < len(stages) and (folder / "summary.json").is_file():  # written last
            summary = parse_json((folder / "summary.json").read_text(encoding="utf-8"))
        else:
            summary = train_recipe({name: value for name, value in options.items() if value is not None})
        told.append(
            {"out": str(folder)} | {name: summary[name] for name in ("plan", "steps", "samples", "loss_first", "loss_last", "eval")}
        )
    return summary | {"stages": told}


def going_on(stages: Sequence[Mapping[str, Any]], number: int, adapter: Callable[[int], Path]) -> dict[str, Any]:
    """What a stage but the first (``number``, from 1) starts from, as options over its own: the adapter of the one before, and where the
    plan changed, there or earlier, what the adapter before that was merged into. ``adapter``: a stage's adapter folder, by its number."""
    plans = [_plan(stage) for stage in stages[:number]]
    changes = [at for at in range(2, number + 1) if plans[at - 1] != plans[at - 2]]
    found: dict[str, Any] = {"init_adapter": None if number in changes else str(adapter(number - 1))}
    if changes:
        found |= {"model": str(_merged(adapter(changes[-1] - 1))), "from_scratch": False, "image_encoder": None}
    if number in changes:
        found |= {"vocab": None, "quantize": None}
    return found


def _plan(options: Mapping[str, Any]) -> tuple:
    run = split({name: options[name] for name in OF_A_PLAN if name in options}, RECIPE[0])[0]
    return tuple(getattr(run, name) for name in OF_A_PLAN)


def _merged(adapter: Path) -> Path:
    folder = adapter.parent / "merged"
    recover_folder(folder)
    return folder if (folder / "config.json").is_file() else merge_run(adapter, folder)


def _check_finished(stages: list[dict[str, Any]], out: Path, resume: bool) -> None:
    now = [{k: v for k, v in stage.items() if k not in OF_THE_RUN} for stage in stages]
    now, file = json.loads(json.dumps(now, default=str)), out / FILE
    if file.is_file():
        if not resume:
            raise ValueError(f"{out} holds a run in stages already: resume it (--resume), or choose another --out")
        clear_drafts(out)
        try:
            was = parse_json(file.read_text(encoding="utf-8"))
        except ValueError:
            raise ValueError(f"{file} is damaged: remove {out} to start afresh") from None
        if len(was) != len(now):
            raise ValueError(f"cannot resume {out}: it had {len(was)} stages, now {len(now)}")
        for number, (a, b) in enumerate(zip(was, now), 1):
            done = number < len(was) and (out / f"stage-{number}" / "summary.json").is_file()
            if done and a != b:
                changed = sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))
                raise ValueError(f"cannot resume {out}: stage {number} is finished, and its {', '.join(changed)} changed since")
    write_json(file, now)
