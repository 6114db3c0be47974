"""Drawn data sets of a study at tiny scale, in the layouts as published: questions, reports, ScienceQA, instructions, captions, MMLU.

All but the instructions and MMLU are about the demo's phantoms, so that answers depend on the images; equal arguments give equal files.
"""

from __future__ import annotations

import csv
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastpeft.data.images import load_image
from fastpeft.demo.phantom import make_phantoms
from fastpeft.files import atomic_folder

IMAGES = {"train": 40, "validate": 8, "test": 16}
SPLITS = {"train": "train", "validate": "val", "test": "test"}
LETTERS = "ABCDE"


def make(folder: str | Path, how: dict[str, Any]) -> Path:
    """The data set that ``how`` describes, at ``folder`` and only once: made (a kind of :data:`KINDS`), images ({split: number}), seed,
    scanner, questions_per_image, image_size (of phantoms). ValueError names what is unknown."""
    how = dict(how)
    kind, images, seed = how.pop("made"), {**IMAGES, **how.pop("images", {})}, how.pop("seed", 1)
    if kind not in KINDS:
        raise ValueError(f"no made data are called {kind!r}; there are {', '.join(KINDS)}")
    folder = Path(folder)
    try:
        if kind == "phantoms":
            return make_phantoms(folder, how.pop("scanner", "b"), images, seed=seed, progress=False, **how)
        if (folder / "made.json").is_file():
            return folder
        drawn = make_phantoms(
            folder.with_name(f"{folder.name}-phantoms"), how.pop("scanner", "b"), images, seed=seed, progress=False, **how
        )
    except TypeError as error:
        raise ValueError(f"made data {kind!r}: {error}") from None
    splits = {split: json.loads((drawn / f"{split}.json").read_text()) for split in images}
    with atomic_folder(folder, durable=False) as draft:
        KINDS[kind](draft, drawn, splits, random.Random(seed))
        (draft / "made.json").write_text(json.dumps({"made": kind, "images": images, "seed": seed}))
    return folder


def _by_image(rows: list[dict]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(row["img_name"], []).append(row)
    return found


def _findings(rows: list[dict]) -> str:
    """A report: what an image's open questions have as answers."""
    parts = [f"{row['content_type'].lower()}: {row['answer'].lower()}" for row in rows if row["answer_type"] == "OPEN"]
    return f"The study shows {'; '.join(dict.fromkeys(parts)) or 'no finding'}."


def _reports(folder: Path, drawn: Path, splits: dict[str, list[dict]], rng: random.Random) -> None:
    shutil.copytree(drawn / "imgs", folder / "images")
    for split, rows in splits.items():
        listed = [{"image": name, "report": _findings(asked)} for name, asked in _by_image(rows).items()]
        (folder / f"{SPLITS[split]}.json").write_text(json.dumps(listed, indent=1))


def _summaries(folder: Path, drawn: Path, splits: dict[str, list[dict]], rng: random.Random) -> None:
    """XrayGPT's layout: one list, which says nothing of splits, and images by number."""
    (folder / "image").mkdir()
    listed = []
    for rows in splits.values():
        for name, asked in _by_image(rows).items():
            number = len(listed) + 1
            load_image(drawn / "imgs" / name).save(folder / "image" / f"{number}.png")
            listed.append({"image_id": str(number), "caption": _findings(asked)})
    (folder / "filter_cap.json").write_text(json.dumps({"annotations": listed}, indent=1))


def _conversations(folder: Path, drawn: Path, splits: dict[str, list[dict]], rng: random.Random) -> None:
    """LLaVA-Med's layout: dialogues with <image> before or after the first question; to test, questions by themselves with answer_type."""
    shutil.copytree(drawn / "imgs", folder / "images")
    for split, rows in splits.items():
        listed = []
        for name, asked in _by_image(rows).items():
            for talk in [asked[:3]] if split == "train" else [[row] for row in asked]:
                first = talk[0]["question"]
                said = [rng.choice((f"<image>\n{first}", f"{first}\n<image>")), *(row["question"] for row in talk[1:])]
                turns = [t for q, row in zip(said, talk) for t in ({"from": "human", "value": q}, {"from": "gpt", "value": row["answer"]})]
                listed.append({"id": str(len(listed)), "image": name, "domain": {"chest_xray": True}, "conversations": turns})
                listed[-1] |= {} if split == "train" else {"answer_type": talk[0]["answer_type"]}
        (folder / f"{SPLITS[split]}.json").write_text(json.dumps(listed, indent=1))


def _instruction_form(folder: Path, drawn: Path, splits: dict[str, list[dict]], rng: random.Random) -> None:
    """MILE's layout for training (img_name, qid, answer, question_pool); the test split asks in the original words."""
    shutil.copytree(drawn / "imgs", folder / "imgs")
    pools: dict[str, set[str]] = {}
    for row in splits["train"]:
        pools.setdefault(row["content_type"], set()).add(row["answer"])
    listed = []
    for row in splits["train"]:
        others = sorted(answer for answer in pools[row["content_type"]] if answer.lower() != row["answer"].lower())
        options = [row["answer"], *rng.sample(others, min(2, len(others)))]
        rng.shuffle(options)
        said = "; ".join(f"({letter}){option}" for letter, option in zip("abc", options))
        pool = [
            f"Question: {row['question']} Option: {said} {end}" for end in ("The answer to the question is", "Answer:", "Short answer:")
        ]
        listed.append({"img_name": row["img_name"], "qid": row["qid"], "answer": row["answer"], "question_pool": pool})
    (folder / "train.json").write_text(json.dumps(listed, indent=1))
    (folder / "test.json").write_text(json.dumps(splits["test"], indent=1))


def _captions(folder: Path, drawn: Path, splits: dict[str, list[dict]], rng: random.Random) -> None:
    shutil.copytree(drawn / "imgs", folder / "images")
    for split, rows in splits.items():
        listed = [{"image": name, "caption": _findings(asked)} for name, asked in _by_image(rows).items()]
        (folder / f"{SPLITS[split]}.json").write_text(json.dumps(listed, indent=1))


def _scienceqa(folder: Path, drawn: Path, splits: dict[str, list[dict]], rng: random.Random) -> None:
    problems, pids, captions = {}, {}, {}
    answers = {kind: sorted({r["answer"] for rows in splits.values() for r in rows if r["content_type"] == kind}) for kind in
               {r["content_type"] for rows in splits.values() for r in rows}}  # fmt: skip
    for split, rows in splits.items():
        pids[SPLITS[split]] = []
        for name, asked in _by_image(rows).items():
            for row in asked[:2]:
                pid, others = str(len(problems) + 1), [a for a in answers[row["content_type"]] if a != row["answer"]]
                choices = [row["answer"], *rng.sample(others, min(3, len(others)))]
                if len(choices) < 2:
                    continue
                rng.shuffle(choices)
                seen = folder / "images" / SPLITS[split] / pid
                seen.mkdir(parents=True)
                load_image(drawn / "imgs" / name).save(seen / "image.png")
                problems[pid] = _problem(row["question"], choices, row["answer"], split, rng, image="image.png")
                captions[pid] = _findings(asked)
                pids[SPLITS[split]].append(pid)
            pid, a, b = str(len(problems) + 1), rng.randrange(10), rng.randrange(10)
            choices = [str(a + b), str(a + b + 1 + rng.randrange(3))]
            rng.shuffle(choices)
            problems[pid] = _problem(f"What is {a} plus {b}?", choices, str(a + b), split, rng, hint="Add the numbers.")
            pids[SPLITS[split]].append(pid)
    for name, value in (("problems", problems), ("pid_splits", pids), ("captions", {"captions": captions})):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=1))


def _problem(question: str, choices: list[str], answer: str, split: str, rng: random.Random, image=None, hint: str = "") -> dict:
    subject = rng.choice(("natural science", "social science", "language science"))
    return {
        "question": question, "choices": choices, "answer": choices.index(answer), "hint": hint, "image": image, "task": "closed choice",
        "grade": f"grade{rng.randint(1, 12)}", "subject": subject, "topic": "made", "category": "made", "skill": "made",
        "lecture": "Look closely.", "solution": f"It is {answer}.", "split": SPLITS[split],
    }  # fmt: skip


def _instructions(folder: Path, drawn: Path, splits: dict[str, list[dict]], rng: random.Random) -> None:
    """Alpaca's layout: sums and reversed words, without images."""
    for split, rows in splits.items():
        listed = []
        for _ in _by_image(rows):
            a, b = rng.randrange(10), rng.randrange(10)
            listed.append({"instruction": "Add the numbers.", "input": f"{a} and {b}", "output": str(a + b)})
            word = "".join(rng.choice("abcdef") for _ in range(3))
            listed.append({"instruction": f"Spell {word} backwards.", "input": "", "output": word[::-1]})
        (folder / f"{SPLITS[split]}.json").write_text(json.dumps(listed, indent=1))


def _mmlu(folder: Path, drawn: Path, splits: dict[str, list[dict]], rng: random.Random) -> None:
    """MMLU's layout: sums, in a task of each category."""
    for task in ("elementary_mathematics", "formal_logic", "econometrics", "nutrition"):
        for split, count in (("dev", 5), ("test", len(_by_image(splits["test"])))):
            rows = []
            for _ in range(count):
                a, b, at = rng.randrange(10), rng.randrange(10), rng.randrange(4)
                rows.append([f"What is {a} plus {b}?", *(a + b + i - at for i in range(4)), "ABCD"[at]])
            (folder / split).mkdir(exist_ok=True)
            with open(folder / split / f"{task}_{split}.csv", "w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows(rows)


Maker = Callable[[Path, Path, dict[str, list[dict]], random.Random], None]
KINDS: dict[str, Maker | None] = {
    "phantoms": None,
    "instruction_form": _instruction_form,
    "reports": _reports,
    "summaries": _summaries,
    "conversations": _conversations,
    "captions": _captions,
    "scienceqa": _scienceqa,
    "instructions": _instructions,
    "mmlu": _mmlu,
}
