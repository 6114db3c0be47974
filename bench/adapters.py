"""Eight LoRA adapters over a frozen image encoder: `fastpeft train --adapters`, against eight runs of `fastpeft train`.

    python -m bench adapters [--images 24] [--epochs 3] [--adapters 8] [--width 384]

A MISS-shaped model (224 px, 12 layers of image encoder, 4 of question encoder and of decoder) on drawn phantoms, five questions an image,
plan F/LoRA/LoRA: ranks 2, 4, 8, 16 and two seeds. Whole commands, each a process of its own on one thread, cold (every run encodes its
images) and warm (features in files from before). Their losses are compared first, to the bit. Seconds are a process's CPU time, start and
imports included; wall seconds stand beside them and, where the machine has other work, say little. Memory is its largest resident set.

What a run of several saves is all but one start, load and pass over the images; its steps are those of the runs apart. So the ratio rises
with the number of epochs: the table has what an adapter saves and what its steps take, and the encoder's work beside the steps' (of MISS
itself on VQA-RAD 49 TFLOP for all 315 images, and 59 for an epoch).
Writes adapters_cpu.json and .md to $OUT, or bench/results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

import fastpeft as fp
from fastpeft.data import Preprocess, load_samples, save_tokenizer, train_tokenizer
from fastpeft.demo.phantom import make_phantoms
from fastpeft.files import write_json, write_text
from fastpeft.runs.vqa import PREPROCESS, vocabulary_of

ROOT = Path(__file__).resolve().parents[1]
RANKS, SEEDS = (2, 4, 8, 16), (0, 1)
SAME = ("step", "loss", "learning_rate", "grad_norm", "samples")


def base_in(folder: Path, data: Path, width: int) -> None:
    """A folder of weights, as every seed has to have the same."""
    tokenizer = train_tokenizer([text for s in load_samples(data) for text in (s.question, s.answer)], 512)
    size = {"image_size": 224, "hidden_size": width, "heads": width // 64, "vision_layers": 12, "text_layers": 4}
    model = fp.build("miss", pretrained=False, seed=0, **size, **vocabulary_of(tokenizer))
    fp.restore(model)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    write_json(folder / PREPROCESS, Preprocess(224, (0.5,) * 3, (0.5,) * 3).to_dict())


def run(*words: Any) -> dict[str, float]:
    """A command of fastpeft on one thread: its seconds of CPU and of the clock, its largest resident set."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "fastpeft", *map(str, words)], env=env, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"fastpeft {' '.join(map(str, words))} ended with {os.waitstatus_to_exitcode(status)}")
    kilo = 1 if sys.platform == "darwin" else 1024
    return {"cpu": used.ru_utime + used.ru_stime, "wall": time.perf_counter() - began, "peak_bytes": used.ru_maxrss * kilo}


def rows(folder: Path) -> list[dict[str, float]]:
    return [{name: row[name] for name in SAME} for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]


def measured(images: int, epochs: float, count: int, width: int) -> dict[str, Any]:
    names = [(f"rank-{rank}-seed-{seed}", rank, seed) for rank in RANKS for seed in SEEDS][:count]
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        data = make_phantoms(work / "data", "a", {"train": images, "test": 1}, 5, progress=False, image_size=224)
        base_in(work / "base", data, width)
        rows_of = [{"name": name, "plan": "F/LoRA/LoRA", "rank": rank, "seeds": [seed]} for name, rank, seed in names]
        (work / "study.yaml").write_text(yaml.safe_dump({"rows": rows_of}))
        given = ["--model", work / "base", "--data", data, "--epochs", epochs, "--batch-size", 12, "--device", "cpu"]
        given += ["--quiet", "--no-eval"]
        kept = ["--feature-cache-dir", work / "features"]
        found: dict[str, Any] = {}
        for state, more in (("cold", []), ("warm", kept)):
            if more:
                run("train", *given, *more, "--plan", "F/LoRA/LoRA", "--out", work / "fill")
            several = run("train", "--adapters", work / "study.yaml", *given, *more, "--out", work / f"many-{state}")
            apart = []
            for name, rank, seed in names:
                own = ["--plan", "F/LoRA/LoRA", "--rank", rank, "--seed", seed, "--out", work / f"{state}-{name}"]
                apart.append(run("train", *given, *more, *own))
                if rows(work / f"many-{state}" / name) != rows(work / f"{state}-{name}"):
                    raise SystemExit(f"{name}, {state}: the losses of the run of several differ from its own run's")
            found[state] = {"several": several, "apart": apart}
        summary = json.loads((work / "many-cold" / names[0][0] / "summary.json").read_text())
        encoder = fp.build(str(work / "base"), device="meta").vision_model
        tokens = (224 // 16) ** 2 + 1
        found["encoder_flops"] = 2.0 * tokens * sum(p.numel() for p in encoder.encoder.parameters()) * images
        found["step_flops"] = summary["flops_per_sample"] * summary["samples"]
        found["steps"], found["samples"] = summary["steps"], summary["samples"]
        found["base_bytes"] = sum(p.nbytes for p in fp.build(str(work / "base"), device="meta").parameters())
    return found


def table(found: dict[str, Any], options: dict[str, Any]) -> str:
    told = [
        f"# {options['adapters']} LoRA adapters over a frozen encoder, in one run and apart",
        "",
        " ".join(str(__doc__).split("\n\n")[2].split()),
        "",
        f"{options['images']} images, {found['samples']} samples in {found['steps']} steps each; the encoder's work "
        f"{found['encoder_flops'] / 1e9:,.0f} GFLOP, a run's steps {found['step_flops'] / 1e9:,.0f}. {options['cpu']}, "
        f"torch {options['torch']}, {options['date']}.",
        "",
        "| features | one run: CPU s | apart: CPU s | ratio | one run: s | apart: s | ratio | one run: peak | one apart: peak |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for state in ("cold", "warm"):
        several, apart = found[state]["several"], found[state]["apart"]
        whole = {name: sum(one[name] for one in apart) for name in ("cpu", "wall")}
        cells = [f"{v:.1f}" for v in (several["cpu"], whole["cpu"])] + [f"{several['cpu'] / whole['cpu']:.2f}"]
        cells += [f"{v:.1f}" for v in (several["wall"], whole["wall"])] + [f"{several['wall'] / whole['wall']:.2f}"]
        cells += [f"{v / 1e6:,.0f} MB" for v in (several["peak_bytes"], max(one["peak_bytes"] for one in apart))]
        told.append(f"| {state} | " + " | ".join(cells) + " |")
    for state in ("cold", "warm"):
        several, apart = found[state]["several"]["cpu"], [one["cpu"] for one in found[state]["apart"]]
        saved = (sum(apart) - several) / (len(apart) - 1)
        steps = sum(apart) / len(apart) - saved
        told += ["", f"{state.title()}, each adapter but the first saves {saved:.1f} s of CPU time; its steps take {steps:.1f} s."]
    told += ["", f"The base has {found['base_bytes'] / 1e6:,.0f} MB. Losses of every adapter: those of its own run, to the bit."]
    return "\n".join(told) + "\n"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench adapters", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--adapters", type=int, default=8, choices=range(2, 9))
    parser.add_argument("--width", type=int, default=384)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    options = vars(args) | {"cpu": _processor(), "torch": torch.__version__, "date": f"{datetime.date.today()}"}
    found = measured(args.images, args.epochs, args.adapters, args.width)
    folder = Path(os.environ.get("OUT") or ROOT / "bench/results")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "adapters_cpu.json", {"options": options} | found)
    text = table(found, options)
    write_text(folder / "adapters_cpu.md", text)
    print(text)
    return 0


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(": ")[2] for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()
