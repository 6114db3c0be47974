"""A study of two jobs in one process, so that each of their file operations is one of a :class:`crash_disk.Disk`'s."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import sys
import warnings
from pathlib import Path

from fastpeft.study import runner
from fastpeft.study.table import CLOCK

TEXTS = [{"instruction": f"Spell {word}.", "input": "", "output": " ".join(word)} for word in ("bone", "lung", "skull", "liver")]
STUDY = """
title: two jobs
options: {model: llama-tiny, batch_size: 2, steps: 2, save_every: 1, learning_rate: 1.0e-2, metrics: [tokens]}
generation: {max_new_tokens: 2}
columns: [loss, global]
figures: [loss]
data: {texts: {}}
rows:
  - {name: further, plan: LoRA, rank: 2, from: first}
  - {name: first, plan: LoRA, rank: 2}
"""


class Here:
    """Where ``multiprocessing`` would start a job's process: it runs in this one."""

    exitcode = 0

    def __init__(self, target, args):
        self.target, self.args = target, args

    def start(self) -> None:
        kept, said = [os.dup(1), os.dup(2)], (sys.stdout, sys.stderr)
        try:
            with warnings.catch_warnings(record=True):  # a job's own filters go to its log, which is closed
                self.target(*self.args)
        finally:
            sys.stdout, sys.stderr = said
            for stream, number in zip((1, 2), kept):
                os.dup2(number, stream)
                os.close(number)
        self.sentinel, writing = os.pipe()
        os.close(writing)  # which makes it ready: ended

    def join(self) -> None:
        os.close(self.sentinel)


def study_ends_with(path: Path, out: Path) -> dict:
    """Run the study, or go on with it, in this process; what it ends with but for what the clock says."""
    data = path.with_name("texts")
    if not data.is_dir():
        data.mkdir()
        for split in ("train", "test"):
            (data / f"{split}.json").write_text(json.dumps(TEXTS))
    runner.job_context = lambda: type("Context", (), {"Process": Here})
    found = runner.run_study(path, out, data={"texts": str(data)}, device="cpu", say=lambda line: None)
    if found["failed"]:
        raise OSError(f"failed: {found['failed']}")
    digest = hashlib.sha256()
    for file in sorted(out.glob("rows/**/adapter/**/*.safetensors")):
        digest.update(str(file.relative_to(out)).encode() + file.read_bytes())
    rows = [json.loads(line) for file in sorted(out.glob("rows/**/metrics.jsonl")) for line in file.read_text().splitlines()]
    rows = [{name: row[name] for name in ("step", "loss", "learning_rate", "grad_norm", "samples")} for row in rows]
    table = [
        {k: v for k, v in line.items() if not k.startswith(CLOCK)} for line in csv.DictReader(io.StringIO((out / "table.csv").read_text()))
    ]
    return {"weights": digest.hexdigest(), "rows": rows, "summary": table}
