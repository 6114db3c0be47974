"""Does LaVIN on fastpeft reach what the straightforward version reaches? Text-only and image-text samples mixed, over several seeds.

    python -m bench mixed [--seeds 0 1 2] [--samples 800] [--epochs 3] [--out FILE.json]

``lavin-tiny`` first learns scanner a's phantoms and written descriptions of them (all weights, once). Then MMAdapter/T/MMAdapter adapts it
to scanner b's, where questions are also put in other words, in two arms: "fastpeft" packs its batches, runs fused and decodes with a
cache; "straightforward" is the same model as its paper writes it (fastpeft/verify/paper_equations.py): transformers' own modules,
adapters formed eagerly, padding, no cache. Same weights, data, batches, seeds and optimiser; dropout off, so that the arms differ by
rounding alone.
Losses of the first steps are compared first: nothing is trained on if they differ. Exit code 1 where accuracies differ beyond noise.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import fastpeft as fp
from bench.convergence import T95, difference
from bench.frame import about_machine
from fastpeft.data import load_instructions
from fastpeft.demo.phantom_images import SCANNERS, Canvas
from fastpeft.demo.phantom_questions import Scene, draw_scene, phrase, questions_of
from fastpeft.device import to_device
from fastpeft.evaluate.metrics import score_responses
from fastpeft.evaluate.responses import model_inputs, respond
from fastpeft.runs.causal import dataset as causal_dataset
from fastpeft.runs.causal import model_for as causal_model_for
from fastpeft.runs.options import TextOptions
from fastpeft.verify.baseline import plain, without_dropout

PLAN = "MMAdapter/T/MMAdapter"
KINDS = ("modality", "plane", "region", "marker", "is marker")
TINTS = {"Red": (1.0, 0.5, 0.5), "Green": (0.5, 1.0, 0.5), "Blue": (0.5, 0.5, 1.0), "Yellow": (1.0, 1.0, 0.4)}  # gains
MODALITIES = ("text", "image", "all")
FIRST, CLOSE = 5, 1e-4  # steps whose losses are compared, and how far apart they may be, relative
SIZE, LENGTH, LONGEST = 32, 96, 8  # pixels of an image, tokens of the longest sample, of an answer


def described(scene: Scene, rng: np.random.Generator) -> str:
    """A scene in words, its facts in one of two orders."""
    facts = [f"{scene.plane} {scene.modality} of the {scene.region.lower()}.", f"Marker: {scene.marker.lower()}, {scene.edge.lower()}."]
    return " ".join(facts if rng.random() < 0.5 else facts[::-1])


def make_mixed(folder: Path, scanner: str, counts: dict[str, int], seed: int) -> Path:
    """LLaVA conversations: about a phantom's image in turn with ones about a description alone. No description is in two splits.

    A picture is tinted in its marker's colour: an image encoder of four layers, trained from nothing, finds no bar of three pixels."""
    about, asked, told = SCANNERS[scanner], 0, set()
    tints = {colour: tuple(gain * own for gain, own in zip(tint, about.tint)) for colour, tint in TINTS.items()}
    canvases = {colour: Canvas(SIZE, replace(about, tint=tint)) for colour, tint in tints.items()}
    folder.mkdir(parents=True)
    for split, count in counts.items():
        rows, mine = [], set()
        while len(rows) < count:
            rng = np.random.default_rng([seed, asked])
            scene, by_image, asked = draw_scene(rng), len(rows) % 2 == 0, asked + 1
            found = [question for question in questions_of(scene) if question[0] in KINDS]
            kind = KINDS[rng.integers(len(KINDS))]
            of_kind = [question for question in found if question[0] == kind]
            yes = [question for question in of_kind if question[2] == ("Yes" if rng.random() < 0.5 else "No")]  # as often as No
            _, named, answer = (yes or of_kind)[rng.integers(len(yes or of_kind))]
            question = phrase(kind, named, rng, about.held_out_phrases)
            row = {"id": f"{split}-{len(rows)}"}
            if by_image:
                row["image"] = f"{split}-{len(rows)}.png"
                Image.fromarray(canvases[scene.marker].draw(scene, rng)).save(folder / row["image"])
            else:
                text = described(scene, rng)
                if text in told:
                    continue
                mine.add(text)
                question = f"{text} {question}"
            row["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            rows.append(row)
        told |= mine
        (folder / f"{split}.json").write_text(json.dumps(rows))
    return folder


def read(folder: Path, split: str):
    return load_instructions(folder / f"{split}.json")


def by_modality(answers: list[str], samples) -> dict[str, float]:
    """Exact matches and the commonest answer's share, of text-only samples, of those with an image, and of all."""
    found = {}
    for name in MODALITIES:
        chosen = [i for i, sample in enumerate(samples) if name == "all" or (sample.image is None) == (name == "text")]
        scored = score_responses([answers[i] for i in chosen], [samples[i] for i in chosen])
        found |= {name: scored["global"], f"majority_{name}": scored["majority"]}
    return found


def blind(train, test) -> float:
    """What the commonest answer to each question's own words would score on samples with an image: more than that, one must see."""
    answers = defaultdict(Counter)
    for sample in train:
        answers[sample.question].update([sample.answer] if sample.image is not None else [])
    asked = [sample for sample in test if sample.image is not None]
    common = [answers[sample.question].most_common(1) for sample in asked]
    return statistics.fmean(bool(found) and found[0][0] == sample.answer for found, sample in zip(common, asked))


@torch.no_grad()
def answered(model, dataset, fused: bool) -> list[str]:
    """Greedy responses: with the cache, in batches, or each token from the whole text again, a sample at a time."""
    if fused:
        return respond(model, dataset, progress=False, max_new_tokens=LONGEST)
    names, found = model_inputs(model, dataset), []
    model.eval()
    for item in dataset:
        given = to_device(dataset.collator()([item]), names, torch.device("cpu"), torch.float32)
        given.pop("attention_mask")
        start = given["input_ids"].shape[1]
        while given["input_ids"].shape[1] < start + LONGEST:
            token = model(**given).logits[:, -1:].argmax(-1)
            if int(token) == dataset.tokenizer.eos_token_id:
                break
            given |= {"input_ids": torch.cat([given["input_ids"], token], 1), "image_mask": F.pad(given["image_mask"], (0, 1))}
        found.append(dataset.tokenizer.decode(given["input_ids"][0, start:], skip_special_tokens=True).strip())
    return found


def trained(model, tokenizer, preprocess, folder: Path, args, *, packed: bool, seed: int, **how) -> dict:
    """One training: accuracy by modality, losses, seconds."""
    text = TextOptions(packed=packed, max_length=LENGTH)
    dataset = causal_dataset(model, read(folder, "train"), tokenizer, preprocess, text, seed=seed)
    held = causal_dataset(model, read(folder, "test"), tokenizer, preprocess, text, prompts_only=True)
    config = fp.TrainConfig(**{"batch_size": args.batch_size, "seed": seed, "progress": False, "device": "cpu"} | how)
    trainer = fp.Trainer(model, dataset, config)
    summary = trainer.fit()
    found = {"seed": seed} | {name: summary[name] for name in ("steps", "seconds", "loss_last", "flops_per_sample")}
    return found | by_modality(answered(model, held, packed), held.samples)


def base_of(folder: Path, args):
    """(model, tokenizer, preprocessing, its training): lavin-tiny, all of it trained on the first scanner."""
    model, tokenizer, preprocess = causal_model_for("lavin-tiny", read(folder, "train"), seed=0)
    fp.adapt(model, "T/T/T")
    how = {"epochs": args.base_epochs, "learning_rate": args.base_lr, "base_learning_rate": args.base_lr}
    told = trained(model, tokenizer, preprocess, folder, args, packed=True, seed=0, **how)
    fp.merge(model)
    return model, tokenizer, preprocess, told


def pair(base, seed: int, dropout: float = 0.0) -> dict[str, torch.nn.Module]:
    """The arms' models, with the same weights."""
    ours = copy.deepcopy(base)
    torch.manual_seed(seed)
    fp.adapt(ours, PLAN, dropout=dropout)
    ours = ours if dropout else without_dropout(ours)
    return {"fastpeft": ours, "straightforward": plain(ours)}


def first_steps(arms: dict[str, torch.nn.Module], tokenizer, preprocess, folder: Path, args, how: dict) -> dict[str, list[float]]:
    """Losses of the arms' first steps, which train them; SystemExit where they differ by more than rounding."""
    found = {}
    for arm, model in arms.items():
        text = TextOptions(packed=arm == "fastpeft", max_length=LENGTH)
        dataset = causal_dataset(model, read(folder, "train"), tokenizer, preprocess, text)
        config = fp.TrainConfig(**{"batch_size": args.batch_size, "progress": False, "device": "cpu", "steps": FIRST} | how)
        trainer = fp.Trainer(model, dataset, config)
        trainer.fit()
        found[arm] = trainer.done["first_losses"]
    ours, theirs = found.values()
    if max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True)) > CLOSE:
        raise SystemExit(f"losses differ: {found}; nothing was trained")
    return found


def told_of(runs: dict[str, list[dict]]) -> tuple[dict, list[str]]:
    """(differences by modality, lines of a table)."""
    lines = ["| | accuracy, text (each) | accuracy, image (each) | all | training, s |", "|---|---|---|---|---|"]
    for arm, of in runs.items():
        cells = []
        for name in MODALITIES:
            each = f" ({', '.join(f'{run[name]:.1%}' for run in of)})" if name != "all" else ""
            cells.append(f"{statistics.fmean(run[name] for run in of):.1%}{each}")
        lines.append(f"| {arm} | {' | '.join(cells)} | {statistics.fmean(run['seconds'] for run in of):.0f} |")
    apart = {}
    for name in MODALITIES:
        delta, half = difference(*([run[name] for run in runs[arm]] for arm in ("fastpeft", "straightforward")))
        apart[name] = {"difference": delta, "interval": half, "within_noise": abs(delta) <= half}
    told = [f"{name} {100 * d['difference']:+.2f} +-{100 * d['interval']:.2f}" for name, d in apart.items()]
    verdict = "within noise" if apart["all"]["within_noise"] else "NOT within noise"
    return apart, [*lines, "", f"fastpeft less straightforward, points with 95% intervals: {', '.join(told)}: {verdict}."]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench mixed", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="two to ten")
    parser.add_argument("--samples", type=int, default=800, help="to adapt on, half of them with an image")
    parser.add_argument("--test-samples", type=int, default=300)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--dropout", type=float, default=0.0, help="of the adapters; above 0 the arms' masks differ")
    parser.add_argument("--base-samples", type=int, default=4000)
    parser.add_argument("--base-epochs", type=float, default=3.0)
    parser.add_argument("--base-lr", type=float, default=1e-3)
    parser.add_argument("--note", default="", help="conditions to write down with the result")
    parser.add_argument("--out", type=Path, help="JSON file to write; a Markdown file of the same name beside it")
    parser.add_argument("--json", action="store_true", help="print the JSON object as the last line")
    args = parser.parse_args(argv)
    if len(args.seeds) - 1 not in T95:
        parser.error("give two to ten seeds")
    began, runs = time.perf_counter(), {"fastpeft": [], "straightforward": []}
    with tempfile.TemporaryDirectory() as folder:
        a = make_mixed(Path(folder) / "a", "a", {"train": args.base_samples, "test": args.test_samples}, seed=1)
        b = make_mixed(Path(folder) / "b", "b", {"train": args.samples, "test": args.test_samples}, seed=2)
        base, *words, learnt = base_of(a, args)
        held = causal_dataset(base, read(b, "test"), *words, TextOptions(max_length=LENGTH), prompts_only=True)
        unseeing = blind(read(b, "train"), read(b, "test"))
        before = by_modality(answered(base, held, True), held.samples)
        print(f"base: on its own scanner {learnt['all']:.1%}, on the other {before['all']:.1%}; {learnt['seconds']:.0f} s", flush=True)
        how = {"epochs": args.epochs, "learning_rate": args.lr, "base_learning_rate": args.lr}
        losses = first_steps(pair(base, args.seeds[0]), *words, b, args, how)
        for seed in args.seeds:
            for arm, model in pair(base, seed, args.dropout).items():
                one = trained(model, *words, b, args, packed=arm == "fastpeft", seed=seed, **how)
                runs[arm].append(one)
                print(f"{arm}, seed {seed}: text {one['text']:.1%}, image {one['image']:.1%}; {one['seconds']:.0f} s", flush=True)
    apart, table = told_of(runs)
    steps, machine = runs["fastpeft"][0]["steps"], about_machine()
    off = max(abs(x - y) / y for x, y in zip(*losses.values()))
    lines = [
        f"lavin-tiny, {PLAN}: {args.samples} samples of scanner b, every other with an image, {steps} steps of {args.batch_size},"
        f" dropout {args.dropout:g}; {args.test_samples} unseen samples.",
        "",
        *table,
        "",
        f"Before adapting: text {before['text']:.1%}, image {before['image']:.1%}. The commonest answer to an image question's words:"
        f" {unseeing:.1%}. Losses of the first {FIRST} steps, dropout off,"
        f" differ by at most {off:.0e}, relative.",
        "",
        f"{machine['date']}, {machine['processor']}, {machine['threads']} thread of {machine['cpus']} CPUs, torch {machine['torch']};"
        f" {time.perf_counter() - began:.0f} s in all. {args.note}".strip(),
    ]
    print("\n" + "\n".join(lines))
    report = {name: value for name, value in vars(args).items() if name not in ("out", "json")} | {"plan": PLAN, "machine": machine}
    report |= {"base": learnt, "before": before, "blind": unseeing, "first_losses": losses, "runs": runs, "apart": apart}
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        args.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    if args.json:
        print(json.dumps(report))
    return 0 if apart["all"]["within_noise"] else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(main())
