"""Does training with grouping and kept features reach what plain training reaches? Accuracy on the demo's phantoms, over several seeds.

    python -m bench convergence [--plan F/LoRA/LoRA] [--seeds 0 1 2] [--images 150] [--epochs 4] [--out FILE.json]

"plain": each question of a batch has an image of its own, every image is encoded at every visit. "grouped and kept": questions grouped by
image, features of the frozen image encoder kept. Same data, steps, optimiser and seeds. The difference of the means is told with its 95%
interval (Student's t over seeds, which are paired: a seed draws the same adapters in both); exit code 1 where that leaves out zero.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from bench.frame import about_machine
from fastpeft.demo.phantom import make_phantoms
from fastpeft.runs.options import DataOptions
from fastpeft.runs.train import train_run
from fastpeft.train.config import TrainConfig

T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}  # by degrees of freedom
QUESTIONS = 4  # of a group
ARMS = {
    "plain": {"questions_per_image": 1, "feature_cache": False},
    "grouped and kept": {"questions_per_image": QUESTIONS, "feature_cache": True},
}


def trained(data: Path, plan: str, seed: int, args, **how) -> dict:
    """One run's accuracy, last loss and seconds of training."""
    config = TrainConfig(
        epochs=args.epochs, batch_size=args.batch_size, learning_rate=4e-3, base_learning_rate=5e-4, seed=seed, progress=False, **how
    )
    summary = train_run("miss-tiny", plan, DataOptions(str(data)), config)
    kept = {name: summary[name] for name in ("steps", "loss_last", "seconds", "flops_per_sample")}
    return {"seed": seed, "accuracy": summary["eval"]["global"]} | kept


def difference(ours: list[float], plain: list[float]) -> tuple[float, float]:
    """(mean of ours - plain, half of its 95% interval), paired."""
    deltas = [a - b for a, b in zip(ours, plain, strict=True)]
    return statistics.fmean(deltas), T95[len(deltas) - 1] * statistics.stdev(deltas) / len(deltas) ** 0.5


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench convergence", description=__doc__.splitlines()[0])
    parser.add_argument("--plan", default="F/LoRA/LoRA")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="two to ten")
    parser.add_argument("--images", type=int, default=150, help="to train on")
    parser.add_argument("--test-images", type=int, default=50)
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", type=Path, help="JSON file to write; a Markdown file of the same name beside it")
    parser.add_argument("--json", action="store_true", help="print the JSON object as the last line")
    args = parser.parse_args(argv)
    if len(args.seeds) - 1 not in T95:
        parser.error("give two to ten seeds")
    runs: dict[str, list[dict]] = {arm: [] for arm in ARMS}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        data = make_phantoms(Path(folder) / "b", "b", {"train": args.images, "validate": 1, "test": args.test_images}, seed=1)
        for seed in args.seeds:
            for arm, how in ARMS.items():
                runs[arm].append(trained(data, args.plan, seed, args, **how))
                told = runs[arm][-1]
                print(f"{arm}, seed {seed}: {told['accuracy']:.1%} in {told['seconds']:.0f} s of training", flush=True)
    delta, half = difference(*([run["accuracy"] for run in runs[arm]] for arm in ("grouped and kept", "plain")))
    within = abs(delta) <= half
    lines = [f"| {args.plan}, {args.images} images, {args.epochs:g} epochs | accuracy, mean (each) | training, s |", "|---|---|---|"]
    for arm, of in runs.items():
        each = ", ".join(f"{run['accuracy']:.1%}" for run in of)
        mean, seconds = (statistics.fmean(run[name] for run in of) for name in ("accuracy", "seconds"))
        lines.append(f"| {arm} | {mean:.1%} ({each}) | {seconds:.1f} |")
    verdict = "within noise" if within else "NOT within noise"
    lines += [
        "",
        f"Difference {100 * delta:+.1f} points, 95% interval +-{100 * half:.1f}: {verdict}. {time.perf_counter() - began:.0f} s in all.",
    ]
    print("\n" + "\n".join(lines))
    report = {"plan": args.plan, "images": args.images, "epochs": args.epochs, "batch_size": args.batch_size, "machine": about_machine()}
    report |= {"runs": runs, "difference": delta, "interval": half, "within_noise": within}
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        args.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    if args.json:
        print(json.dumps(report))
    return 0 if within else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(main())
