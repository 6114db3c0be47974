"""Demo (`make demo`): adapts a small medical-VQA model from one scanner to another, and compares plans by cost and accuracy.

    python -m fastpeft.demo [--plan LoRA/LoRA/LoRA] [--steps 120] [--out demo-run]

No network and no GPU: the images are drawn (fastpeft.demo.phantom), and `miss-tiny`, pretrained on scanner "a", ships with the package.
Every training is an ordinary `fastpeft train` in a process of its own, so its peak memory is its own; the command is printed.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from fastpeft.data import VQADataset, load_samples, load_tokenizer
from fastpeft.demo.phantom import make_phantoms
from fastpeft.evaluate import answer_questions, score
from fastpeft.files import write_json, write_text
from fastpeft.models import resolve
from fastpeft.plan import build, count
from fastpeft.runs.vqa import preprocess_for

MODEL, FULL = "miss-tiny", "T/T/T"
IMAGES = {"train": 800, "validate": 20, "test": 100}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--plan", default="LoRA/LoRA/LoRA", help="what to train, one treatment per part: image encoder/text encoder/decoder"
    )
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--out", type=Path, default=Path("demo-run"))
    args = parser.parse_args(argv)
    began = time.perf_counter()

    print("Drawing phantoms of scanner b ...")
    data = make_phantoms(args.out / "phantoms-b", "b", IMAGES, seed=1)
    rows = [frozen(data)]
    for plan in dict.fromkeys((args.plan, FULL)):
        rows.append(trained(plan, data, args.steps, args.out / plan.replace("/", "-").replace("+", "_")))
    table = render(rows)
    seconds = time.perf_counter() - began
    write_json(args.out / "results.json", rows)
    write_text(args.out / "results.md", page(rows, args.steps, seconds))
    print(f"\n{MODEL}, pretrained on scanner a, asked {rows[0]['n']} questions on unseen images of scanner b; {args.steps} steps of 64:\n")
    print(table)
    print(f"\nAlways the most frequent answer: {rows[0]['majority']:.1%}. Done in {seconds:.0f} s.")
    for row in rows[1:]:
        print(f"{row['plan']}: {row['out']}/report.html")


def frozen(data: Path) -> dict:
    """Accuracy of the shipped model as it is."""
    print("Asking the pretrained model ...")
    transformers_logging.disable_progress_bar()  # of the milliseconds in which weights are read
    model, folder = build(MODEL), resolve(MODEL).folder
    samples = load_samples(data, split="test")
    answers = answer_questions(model, VQADataset(samples, preprocess_for(folder, model)), load_tokenizer(folder))
    return {"plan": "frozen", "trainable": 0, "total": count(model)["total"], **score(answers, samples)}


def trained(plan: str, data: Path, steps: int, out: Path) -> dict:
    """One `fastpeft train`, and what its summary says."""
    if (out / "metrics.jsonl").is_file():
        shutil.rmtree(out)  # an earlier demo's
    command = ["train", "--model", MODEL, "--plan", plan, "--data", str(data), "--out", str(out), "--steps", str(steps)]
    command += ["--batch-size", "64", "--questions-per-image", "4", "--lr", "4e-3", "--base-lr", "5e-4", "--json"]
    print(f"\n$ fastpeft {' '.join(command)}")
    done = subprocess.run([sys.executable, "-m", "fastpeft.cli", *command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    summary = json.loads(done.stdout.splitlines()[-1])
    counted = summary["parameters"]
    kept = ("seconds", "peak_memory_bytes", "saved_bytes_per_step", "flops_per_sample", "steady_samples_per_second")
    costs = {name: summary[name] for name in kept}
    return {"plan": plan, "out": str(out), "trainable": counted["trainable"], "total": counted["total"], **costs, **summary["eval"]}


def page(rows: list[dict], steps: int, seconds: float) -> str:
    """The rows as Markdown, with what they were measured on."""
    about = f"`make demo`, {time.strftime('%Y-%m-%d')}, {processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    asked = f"{MODEL}, pretrained on scanner a, asked {rows[0]['n']} questions on unseen images of scanner b"
    lines = ["# The demo: one scanner's model adapted to another", "", f"{about}: {seconds:.0f} s in all."]
    lines += [f"{asked}; {steps} steps of 64.", ""]
    lines += ["| plan | trained | open | closed | global | train s | peak memory |", "|---|---|---|---|---|---|---|"]
    lines.append(f"| always the most frequent answer | | | | {rows[0]['majority']:.1%} | | |")
    for row in rows:
        costs = f"{row['seconds']:.0f} | {row['peak_memory_bytes'] / 1e9:.2f} GB" if "seconds" in row else "|"
        lines.append(f"| {row['plan']} | {row['trainable']:,} | {row['open']:.1%} | {row['closed']:.1%} | {row['global']:.1%} | {costs} |")
    return "\n".join(lines) + "\n"


def processor() -> str:
    """The CPU's name, as Linux knows it."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(": ")[2] for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.machine()


def render(rows: list[dict]) -> str:
    """The rows as a table for a terminal."""
    heads = [f"{'plan':<16} {'trained':>10}", *(f"{name:>7}" for name in ("open", "closed", "global"))]
    lines = [" ".join([*heads, f"{'train s':>8} {'peak GB':>8} {'saved MB':>9} {'MF/sample':>10}"])]
    for row in rows:
        line = f"{row['plan']:<16} {row['trainable']:>10,} {row['open']:>7.1%} {row['closed']:>7.1%} {row['global']:>7.1%}"
        if "seconds" in row:
            line += f" {row['seconds']:>8.0f} {row['peak_memory_bytes'] / 1e9:>8.2f} {row['saved_bytes_per_step'] / 1e6:>9.1f}"
            line += f" {row['flops_per_sample'] / 1e6:>10.0f}"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
