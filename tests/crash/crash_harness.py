"""Kills runs at file operations, resumes them, and compares what they end with: ``python tests/crash/crash_harness.py --points 500``.

Each point is a run in a forked process that ends at one operation in one of :data:`crash_disk.MODES`, and a run that resumes it in
another; or a run of two ranks, the first of which so ends; or a study of two jobs. Held against a run that nothing happened to: the weights
and the rows of metrics.jsonl to the bit, and the summary. After the end, before the resumption, adapters that stand are whole. Afterwards
no draft lies about, and no process was left for a minute.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402
from crash_disk import ENDED, MODES, Disk  # noqa: E402
from crash_study import STUDY, study_ends_with  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import fastpeft as fp  # noqa: E402
from fastpeft.adapters import CHECKSUM, describe  # noqa: E402
from fastpeft.files import tensor_digest  # noqa: E402
from fastpeft.train.validation import ValidationData  # noqa: E402

SETTINGS = {
    "dropout and accumulation": {"small": True, "gradient_accumulation": 2},
    "a feature cache on disk": {"feature_cache_dir": "features", "keep_checkpoints": 1},
    "saved beside training": {"small": True, "async_save": True, "keep_checkpoints": 3},
    "data workers": {"small": True, "num_workers": 1, "feature_cache": False},
    "validation and its best": {"small": True, "eval_every": 2, "eval_scores": False},
    "base weights, bfloat16": {"plan": "F/LayerNorm/LayerNorm", "dtype": "bf16"},
    "two ranks": {"small": True, "world": 2},
    "a study": {"study": True},
}
SIGNALLED = {False: (-signal.SIGTERM, 130), True: (130,)}  # before a run listens; within a study's job, which exits
LONGEST = 60  # seconds of a run, and of a rank that has lost the other
SAME = ("steps", "samples", "loss_first", "loss_last")


def _runs():
    spec = importlib.util.spec_from_file_location("_runs", HERE.parent / "_runs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Harness:
    """Runs in one folder, which is emptied between points, on one data set. Trainers are made once: each forked process has its copy."""

    def __init__(self, work: Path):
        torch.set_num_threads(1)
        self.runs, self.folder = _runs(), work / "point"
        self.data = self.runs.make_data(work)
        self.whole: dict[str, tuple[dict, int]] = {}
        self.ready: dict[tuple[str, bool], fp.Trainer] = {}
        self.clear()
        (work / "study.yaml").write_text(STUDY)
        for setting in ("dropout and accumulation", "a study"):  # what is imported here, no forked process imports again
            self.clear()
            self.fit(setting, False)
        self.ready.clear()
        gc.collect()
        gc.freeze()  # nor does it copy what it only looks at for garbage

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "run").mkdir(parents=True)

    def trainer(self, setting: str, resume: bool) -> fp.Trainer:
        options = {"steps": 5, "save_every": 2, "batch_size": 3, "out": str(self.folder / "run"), "resume": resume} | SETTINGS[setting]
        small = self.runs.SHALLOW | (self.runs.DROPOUT if options.pop("small", False) else {})
        options.pop("world", None)
        if "feature_cache_dir" in options:
            options["feature_cache_dir"] = str(self.folder / "features")
        return _trainer(self.runs, self.data, options.pop("plan", "F/LoRA/LoRA"), small, options)

    def made(self, setting: str, resume: bool) -> fp.Trainer:
        """A trainer that did nothing yet."""
        if {"feature_cache_dir", "world"} & SETTINGS[setting].keys():  # it looks into the folder, or for the others, when it is made
            return self.trainer(setting, resume)
        if (setting, resume) not in self.ready:
            self.ready[setting, resume] = self.trainer(setting, resume)
        return self.ready[setting, resume]

    def fit(self, setting: str, resume: bool) -> dict:
        """A run to its end; what it is held against."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if "study" in SETTINGS[setting]:
                return study_ends_with(self.folder.parent / "study.yaml", self.folder / "run")
            trainer = self.made(setting, resume)
            summary = trainer.fit()
        digest = hashlib.sha256()
        for name, weight in sorted(self.runs.weights(trainer).items()):
            digest.update(name.encode() + weight.view(torch.uint8).numpy().tobytes())
        rows = self.runs.metrics(self.folder / "run")
        return {"weights": digest.hexdigest(), "rows": rows, "summary": [summary[name] for name in SAME]}

    def reference(self, setting: str) -> tuple[dict, int]:
        """(what a run that nothing happened to ends with, how many file operations it makes)"""
        if setting not in self.whole:
            self.clear()
            disk = Disk(self.folder)
            if not {"study", "world"} & SETTINGS[setting].keys():
                for resume in (False, True):
                    self.made(setting, resume)
            status, said = self.forked(setting, False, disk)
            if status:
                raise RuntimeError(f"{setting}: a run that nothing happens to fails\n{said}")
            found = json.loads(said)
            self.whole[setting] = found, found.pop("count")
        return self.whole[setting]

    def forked(self, setting: str, resume: bool, disk: Disk) -> tuple[int, str]:
        """(exit status, what a run on that disk ends with as JSON, or a traceback), in a process of its own. Of several ranks it is the
        first; all have ended."""
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (1, 2):
                os.dup2(null, stream)
            status, said = 0, ""
            try:
                self.join(setting, resume)
                disk.install()
                said = json.dumps(self.fit(setting, resume) | {"count": disk.count})
            except BaseException as error:
                status, said = 1, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
            with os.fdopen(writing, "w") as file:
                file.write(said)
            os._exit(status)
        os.close(writing)
        with os.fdopen(reading) as file:
            said = file.read()  # to the end of all who hold the other end
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said

    def join(self, setting: str, resume: bool) -> None:
        """This process becomes rank 0 of those that the setting asks for; it forks the others."""
        signal.alarm(LONGEST)
        world = SETTINGS[setting].get("world", 1)
        if world == 1:
            return
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0"}
        for rank in range(1, world):
            if not os.fork():
                os.environ["RANK"] = str(rank)
                signal.alarm(LONGEST)
                with suppress(BaseException):
                    self.fit(setting, resume)
                os._exit(0)

    def point(self, setting: str, mode: str, at: int, seed: int) -> str:
        """What went wrong at one point; '' for nothing."""
        want, _ = self.reference(setting)
        self.clear()
        began = time.monotonic()
        status, said = self.forked(setting, False, Disk(self.folder, mode, at, seed))
        if time.monotonic() - began > LONGEST:
            return f"took {LONGEST} s to end"
        begun = any((self.folder / "run").rglob("metrics.jsonl"))
        if status not in (0, 1, ENDED, *SIGNALLED[begun] * (mode == "signal")):
            return f"ended with status {status}: {said[-300:]}"
        if status == 1 and not said.startswith(("OSError", "Interrupted")):
            return f"ended by another error than the disk's: {said}"
        if problem := self.torn_adapter():
            return f"after the end: {problem}"
        status, said = self.forked(setting, True, Disk(self.folder))
        if status:
            return f"did not resume: {status} {said}"
        got = json.loads(said)
        if different := [name for name in want if got[name] != want[name]]:
            return f"resumed to other {', '.join(different)}: {[(got[n], want[n]) for n in different if n != 'weights']}"
        if left := [str(path.relative_to(self.folder)) for kind in ("new", "old") for path in self.folder.rglob(f".*-{kind}-*")]:
            return f"left {left}"
        return self.torn_adapter() if any(self.folder.glob("run/**/adapter")) else "no adapter"

    def torn_adapter(self) -> str:
        """What is wrong with the adapters that stand; '' also where none does."""
        return next(filter(None, map(self.torn, self.folder.glob("run/**/adapter"))), "")

    def torn(self, folder: Path) -> str:
        try:
            for part, methods in describe(folder)["treatments"].items():
                if list(methods[0]) == ["F"]:
                    continue
                (file,) = (folder / part).glob("*.safetensors")
                with safe_open(file, "pt") as opened:
                    checksum = opened.metadata()[CHECKSUM]
                if checksum != tensor_digest(load_file(file)):
                    return f"{file} is not what was saved"
        except (ValueError, OSError, KeyError) as error:
            return f"the adapter is not whole: {error!r}"
        return ""

    def points(self, many: int, seed: int = 0) -> list[tuple[str, str, int, int]]:
        """So many points (setting, mode, operation, seed): every setting and mode in turn, operations spread over the run."""
        draw = random.Random(seed)
        pairs = [(setting, mode) for mode in MODES for setting in SETTINGS]
        chosen, each = [], -(-many // len(pairs))
        for setting, mode in pairs:
            count = self.reference(setting)[1]
            spread = [1 + int((i + draw.random()) * count / each) for i in range(each)]
            chosen += [(setting, mode, at, draw.randrange(10**6)) for at in spread]
        draw.shuffle(chosen)
        return chosen[:many]


def _trainer(runs, data: Path, plan: str, small, options: dict) -> fp.Trainer:
    if "eval_every" not in options:
        return runs.trainer(data, plan, small=small, samples=20, **options)
    made = runs.trainer(data, plan, small=small, samples=20)
    config = fp.TrainConfig(**{"progress": False, "device": "cpu"} | options)
    held = type(made.dataset)(made.dataset.samples[:6], made.dataset.preprocess, tokenizer=made.dataset.tokenizer)
    return fp.Trainer(made.model, made.dataset, config, validation=ValidationData(held, None))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many, and say how many points that were")
    given = parser.parse_args()
    began, bad, done = time.time(), [], Counter()
    with tempfile.TemporaryDirectory() as work:
        harness = Harness(Path(work))
        for number, point in enumerate(harness.points(given.points, given.seed), 1):
            if time.time() - began > 60 * given.minutes:
                break
            done[point[1]] += 1
            if problem := harness.point(*point):
                bad.append((point, problem))
                print(f"FAILED {point}: {problem}", flush=True)
            if number % 25 == 0:
                print(f"{number} points, {len(bad)} failed, {time.time() - began:.0f} s", flush=True)
    total = sum(done.values())
    gc.unfreeze()
    print(f"{total - len(bad)} of {total} points resumed to the bit ({', '.join(f'{n} {mode}' for mode, n in done.items())})")
    return bool(bad)


if __name__ == "__main__":
    raise SystemExit(main())
