"""Checkpoints of a run: trained parameters as safetensors, optimiser and random state, and the position in the data.

The newest is ``checkpoint/``, older ones ``checkpoint-STEP/``. A manifest in each has the SHA-256 of its files, so that a damaged one is
known, and the newest intact one resumes. Checkpoints of before the manifest are read without.
"""

from __future__ import annotations

import json
import os
import shutil
from glob import escape
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from fastpeft.documents import parse_json
from fastpeft.files import atomic_folder, save_tensors, sha256
from fastpeft.methods.base import check_keys
from fastpeft.tensor_files import check_archive, check_tensors, read_shapes

MANIFEST = "manifest.json"
FORMAT = 2  # of a checkpoint: 0 has no manifest, 1 a manifest without a format


def run_state(
    model: nn.Module, optimizer, progress: dict[str, Any], rng: dict[str, Any] | None = None, *, copy: bool = False
) -> dict[str, Any]:
    """What a checkpoint holds, for :func:`write_state`. ``rng``: as :func:`random_state` gave it (None: now); ``copy``: nothing of it
    changes with the run any more."""
    take = (lambda t: t.detach().cpu().clone(memory_format=torch.contiguous_format)) if copy else (lambda t: t.detach().cpu().contiguous())
    saved = optimizer.state_dict()
    return {
        "trained": {name: take(p) for name, p in model.named_parameters() if p.requires_grad},
        "optimizer": {"optimizer": _copied(saved) if copy else saved} | (random_state() if rng is None else rng),
        "progress": json.dumps(progress, indent=1) + "\n",
    }


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value


def write_state(folder: Path, state: dict[str, Any], keep: int = 1) -> None:
    """Write what :func:`run_state` took into the folder, atomically: a run killed while saving keeps its last checkpoint. ``keep``: how
    many checkpoints are kept, this one among them; older ones are removed once it stands."""
    step = _step_of(folder) if keep > 1 else None
    with atomic_folder(folder, aside=None if step is None else folder.with_name(f"{folder.name}-{step}")) as draft:
        save_tensors(state["trained"], draft / "trained.safetensors")
        try:
            torch.save(state["optimizer"], draft / "optimizer.pt")
        except RuntimeError as error:  # torch's error for a full disk
            raise OSError(f"{folder} cannot be written: {' '.join(str(error).split())[:200]}") from None
        (draft / "progress.json").write_text(state["progress"])
        digests = {path.name: sha256(path) for path in sorted(draft.iterdir())}
        (draft / MANIFEST).write_text(json.dumps({"format": FORMAT, "sha256": digests}, indent=1) + "\n")
    for old in checkpoints(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)


def random_state() -> dict[str, Any]:
    """States of torch's generators: of the CPU, and of every CUDA device."""
    return {"rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_state(rng: dict[str, Any]) -> None:
    """Back to what :func:`random_state` gave. ValueError, with nothing changed, where it is none."""
    mine = random_state()
    try:
        torch.set_rng_state(rng["rng"])
        if rng["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(rng["cuda_rng"][: torch.cuda.device_count()])
    except (RuntimeError, TypeError, AttributeError, KeyError, IndexError) as error:
        torch.set_rng_state(mine["rng"])
        raise ValueError(f"its random state is none: {error}") from None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that stand, ``folder`` and those of older steps beside it, newest first."""
    older = [path for path in folder.parent.glob(f"{escape(folder.name)}-*") if _number(path) is not None and path.is_dir()]
    return [folder] * folder.is_dir() + sorted(older, key=_number, reverse=True)


def newest_intact(folder: Path, fresh: dict[str, Any]) -> tuple[Path | None, dict[str, Any], list[str]]:
    """(checkpoint, its progress, what is wrong with newer ones); (None, {}, []) where there is no checkpoint. ``fresh``: what a fresh run
    has done, as :func:`check_done` takes it. ValueError where there are checkpoints, and all are damaged."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is no folder of a checkpoint: move it away, then --resume")
    damaged: list[str] = []
    for candidate in (found := checkpoints(folder)):
        _check_format(candidate)
        try:
            progress = read_progress(candidate)
            check_done(candidate, progress["done"], fresh)
            _check_digests(candidate)
        except ValueError as error:
            damaged.append(str(error))
            continue
        return candidate, progress, damaged
    if found:
        raise ValueError(damaged[0])
    return None, {}, []


def promote(chosen: Path, folder: Path) -> None:
    """Make ``chosen`` the run's newest checkpoint, ``folder``: what newer ones hold is damaged, and is kept under ``damaged-...``."""
    for newer in checkpoints(folder):
        if newer == chosen:
            break
        target = newer.with_name(f"damaged-{newer.name}")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(newer, target)
    if chosen != folder:
        os.replace(chosen, folder)


def _number(path: Path) -> int | None:
    tail = path.name.rpartition("-")[2]
    return int(tail) if tail.isascii() and tail.isdigit() else None


def _step_of(folder: Path) -> int | None:
    """The step of a checkpoint; None where there is none, or it cannot be read."""
    try:
        step = read_progress(folder)["done"].get("step")
    except ValueError:
        return None
    return step if isinstance(step, int) and step >= 0 else None


def _check_format(folder: Path) -> None:
    """ValueError for a checkpoint of a later version: going on from an older one would throw it away."""
    try:
        found = parse_json((folder / MANIFEST).read_text())["format"]
    except (OSError, ValueError, KeyError, TypeError):  # of an older version, or damaged
        return
    if isinstance(found, int) and found > FORMAT:
        raise ValueError(f"{folder} is of format {found}, and this fastpeft reads up to {FORMAT}: resume it with a newer one")


def _check_digests(folder: Path) -> None:
    """ValueError where a file is not what the manifest says."""
    if not (folder / MANIFEST).exists():  # of an older version
        return
    try:
        digests = parse_json((folder / MANIFEST).read_text())["sha256"]
        if missing := sorted(name for name in digests if not (folder / name).is_file()):
            raise ValueError(f"{', '.join(missing)} is missing")
        if changed := sorted(name for name, digest in digests.items() if sha256(folder / name) != digest):
            raise ValueError(f"{', '.join(changed)} is not what was saved")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, error) from None


def read_progress(folder: Path) -> dict[str, Any]:
    """What :func:`run_state` was given. ValueError if it cannot be read."""
    try:
        progress = parse_json((folder / "progress.json").read_text())
        if not (isinstance(progress, dict) and isinstance(progress.get("done"), dict) and isinstance(progress.get("identity"), dict)):
            raise ValueError("progress.json is not a run's")
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from None
    return progress


def check_done(folder: Path, done: dict[str, Any], fresh: dict[str, Any]) -> None:
    """ValueError where what a run has done is not of the kinds that a fresh run starts with."""
    for name, first in fresh.items():
        value = done.get(name, first)
        if first is None:  # the cost of the first batch
            good = value is None or (isinstance(value, dict) and {"flops", "saved_bytes", "samples"} <= value.keys())
        elif name == "sources":
            good = isinstance(value, dict) and all(isinstance(v, dict) and {"samples", "losses"} <= v.keys() for v in value.values())
        elif name == "validation":
            good = isinstance(value, dict) and all(isinstance(v, int | float) for v in value.values())
        elif isinstance(first, list):
            good = isinstance(value, list) and all(isinstance(v, int | float) for v in value)
        else:
            good = isinstance(value, int | float if isinstance(first, float) else int) and not isinstance(value, bool) and value >= 0
        if not good:
            raise _damaged(folder, ValueError(f"progress.json says {name} is {value!r}"))


def differences(name: str, was: Any, now: Any) -> list[str]:
    """What changed, in words, as deep as both have the same fields: "plan vit LoRA r was 4, now 8"."""
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now) == 1:
        was, now = was[0], now[0]
    if isinstance(was, dict) and isinstance(now, dict):
        if was.keys() == now.keys():
            return [text for key in was for text in differences(f"{name} {key}", was[key], now[key])]
        was, now = "+".join(was), "+".join(now)
    return [] if was == now else [f"{name} was {was!r}, now {now!r}"]


def load_state(folder: Path, model: nn.Module, optimizer) -> None:
    """Put parameters, optimiser and random state back. ValueError names what is missing, damaged or does not fit; then nothing changes."""
    mine = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    try:
        check_keys(mine, read_shapes(folder / "trained.safetensors"), str(folder))
        check_archive(folder / "optimizer.pt")
        trained = load_file(folder / "trained.safetensors")
        rest = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
        state, rng = rest["optimizer"], {name: rest[name] for name in ("rng", "cuda_rng")}
        check_tensors(rest)
    except ValueError as error:
        raise error if "does not fit this model" in str(error) else _damaged(folder, error) from None
    except Exception as error:  # torch and pickle raise a dozen types on a broken file
        raise _damaged(folder, error) from None
    check_keys(mine, trained, str(folder))
    if wrong := sorted(name for name, tensor in trained.items() if not (tensor.is_floating_point() and tensor.isfinite().all())):
        raise _damaged(folder, ValueError(f"trained.safetensors: {wrong[0]} holds what is no finite number"))
    try:
        _check_moments(optimizer, state)
    except ValueError as error:
        raise ValueError(f"the checkpoint in {folder} does not fit this run's optimiser: {error}") from None
    before = random_state()
    try:
        set_random_state(rng)
        optimizer.load_state_dict(state)
    except (ValueError, KeyError) as error:
        set_random_state(before)
        raise ValueError(f"the checkpoint in {folder} does not fit this run's optimiser: {error}") from None
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(trained[name])


def _check_moments(optimizer, state: Any) -> None:
    """ValueError names what is no state of AdamW for these parameters: groups, moments and masters of other shapes, or not finite."""
    try:
        groups, moments, masters = state["adamw"]["param_groups"], state["adamw"]["state"], state["masters"]
        numbers = [list(group["params"]) for group in groups] if isinstance(groups, list) else []
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"optimizer.pt is of another form ({error})") from None
    wanted = [group["params"] for group in optimizer.adamw.state_dict()["param_groups"]]
    if not all(type(number) is int for group in numbers for number in group) or numbers != wanted:
        raise ValueError("it groups its parameters by other learning rates or weight decays")
    if not isinstance(moments, dict) or not isinstance(masters, list):
        raise ValueError("optimizer.pt holds another thing than moments and masters")
    owned = [p for group in optimizer.adamw.param_groups for p in group["params"]]
    for number, held in moments.items():
        if type(number) is not int or not 0 <= number < len(owned) or not isinstance(held, dict):
            raise ValueError(f"it has moments of parameter {number!r}, and there are {len(owned)}")
        _check_moment(number, held, owned[number])
    mine = [master for p, master in optimizer.pairs if master is not p]
    if len(mine) != len(masters):
        raise ValueError("it was saved with another dtype")
    if not all(map(_alike, masters, mine)):
        raise ValueError("its masters are of other shapes, or not finite")


def _check_moment(number: int, held: dict, parameter: torch.Tensor) -> None:
    if missing := {"step", "exp_avg", "exp_avg_sq"} - held.keys():
        raise ValueError(f"it has no {', '.join(sorted(missing))} of parameter {number}")
    for name, value in held.items():
        if not (_is_count(value) if name == "step" else _alike(value, parameter)):
            told = f"{list(value.shape)} of {value.dtype}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
            needed = "a count" if name == "step" else f"{list(parameter.shape)} of finite numbers"
            raise ValueError(f"its {name} of parameter {number} is {told}, and {needed} is needed")


def _is_count(value: Any) -> bool:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = float(value)
    return isinstance(value, int | float) and 0 <= value < 2**53  # a whole number may be larger than any float


def _alike(value: Any, mine: torch.Tensor) -> bool:
    """A tensor of the same shape whose values are finite."""
    return isinstance(value, torch.Tensor) and value.shape == mine.shape and bool(value.isfinite().all())


def _damaged(folder: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:300] or repr(error)
    return ValueError(f"the checkpoint in {folder} is damaged ({reason}): remove the folder to start afresh")
