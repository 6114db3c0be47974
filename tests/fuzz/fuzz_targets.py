"""What reads files and command lines, each as a function of one drawn case. A case may be accepted, or refused in one line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import fuzz_mutations as mutate
import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import fastpeft as fp
from fastpeft.adapters import describe, load_adapter
from fastpeft.caching.store import read_header, read_tensor
from fastpeft.convert.reading import read_file
from fastpeft.data import (
    load_causal_tokenizer,
    load_image,
    load_instructions,
    load_samples,
    load_tokenizer,
    save_tokenizer,
    train_causal_tokenizer,
    train_tokenizer,
)
from fastpeft.documents import parse_json, parse_yaml
from fastpeft.models import resolve
from fastpeft.plan import build, detach, parse
from fastpeft.report.report import write_report
from fastpeft.runs.options import read_yaml
from fastpeft.study.file import read_study
from fastpeft.train.state import load_state, newest_intact, run_state, write_state

Case = Callable[[random.Random], None]
TINY = {"image_size": 32, "hidden_size": 32, "heads": 2, "vision_layers": 1, "text_layers": 1, "vocab_size": 64}


class Corpus:
    """Valid files, made once below ``work``, and a place for the changed ones."""

    def __init__(self, work: Path):
        self.work, self.place = work, work / "case"
        self.model = fp.build("miss-tiny", pretrained=False, **TINY)
        trained = fp.adapt(fp.build("miss-tiny", pretrained=False, **TINY), "F/LoRA/IA3", r=2)
        self.adapter = fp.save_adapter(trained, work / "adapter")
        self.trained, self.optimizer = trained, self._optimizer(trained)
        self.checkpoint = work / "run" / "checkpoint"
        done = {"step": 1, "samples": 2, "cost": None, "sources": {}, "validation": {}, "seconds": 0.5, "first_losses": [1.0], "batches": 1}
        self.fresh = done | {"first_losses": [], "seconds": 0.0}
        progress = {"done": done, "identity": {"seed": 0, "plan": {"vit": [{"F": {}}]}}, "config": {}}
        write_state(self.checkpoint, run_state(trained, self.optimizer, progress))
        self.tokenizers = {}
        words = ["what is in the picture", "a red liver", "yes", "no"]
        for name, made, load in (
            ("wordpiece", train_tokenizer(words, 200), load_tokenizer),
            ("bytes", train_causal_tokenizer(words, 300), load_causal_tokenizer),
        ):
            save_tokenizer(made, work / name)
            self.tokenizers[name] = load
        llama = resolve("llama-tiny").family
        small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
        llama.model(llama.configs["llama-tiny"](**small)).save_pretrained(work / "llama")
        self.model.save_pretrained(work / "blip")
        self.images = self._images()
        tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.int64)}
        torch.save({"model": tensors, "config": {"x": 1}}, work / "a.pth")
        torch.save(tensors, work / "old.pth", _use_new_zipfile_serialization=False)
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), work / "script.pt")
        save_file(tensors, work / "a.safetensors")
        sums = {"crc32": json.dumps({"a": 1, "b": 2})}
        save_file(tensors, work / "features.safetensors", metadata=sums)

    @staticmethod
    def _optimizer(model):
        from fastpeft.train.config import TrainConfig
        from fastpeft.train.optimizer import Optimizer

        optimizer = Optimizer(model, TrainConfig(steps=3), 3)
        for parameter, _ in optimizer.pairs:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(0)
        return optimizer

    def _images(self) -> dict[str, bytes]:
        pixels, found = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8), {}
        for name, image, kind in (
            *((kind, Image.fromarray(pixels), kind) for kind in ("png", "jpeg", "gif", "webp", "bmp", "tiff")),
            ("png of 16 bits", Image.fromarray(pixels[..., 0].astype(np.uint16) * 255), "png"),
            ("tiff of floats", Image.fromarray(pixels[..., 0].astype(np.float32)), "tiff"),
            ("palette", Image.fromarray(pixels).quantize(16), "png"),
        ):
            out = io.BytesIO()
            image.save(out, kind)
            found[name] = out.getvalue()
        return found

    def empty(self) -> Path:
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        return self.place

    def copy(self, folder: Path) -> Path:
        shutil.rmtree(self.place, ignore_errors=True)
        return Path(shutil.copytree(folder, self.place))


def changed_json(path: Path, draw: random.Random) -> None:
    """One JSON file, changed as a document or, now and then, as bytes."""
    whole = path.read_bytes()
    path.write_bytes(mutate.data(whole, draw) if draw.random() < 0.2 else mutate.text_of(mutate.document(json.loads(whole), draw)).encode())


def changed_bytes(path: Path, draw: random.Random) -> None:
    path.write_bytes(mutate.data(path.read_bytes(), draw))


def targets(corpus: Corpus) -> dict[str, tuple[int, Case]]:
    """name -> (weight, case)"""
    return {
        "json": (15, lambda draw: parse_json(mutate.data(b'{"a": [1, 2, {"b": null}], "c": "d"}', draw))),
        "yaml": (10, lambda draw: _yaml(draw)),
        "recipe": (3, lambda draw: _recipe(corpus, draw)),
        "study": (4, lambda draw: _study(corpus, draw)),
        "plan": (12, lambda draw: _plan(corpus, draw)),
        "samples": (14, lambda draw: _samples(corpus, draw)),
        "instructions": (14, lambda draw: _instructions(corpus, draw)),
        "description": (8, lambda draw: _described(corpus, draw)),
        "adapter": (2, lambda draw: _adapter(corpus, draw)),
        "model": (2, lambda draw: _model(corpus, draw)),
        "checkpoint": (8, lambda draw: _checkpoint(corpus, draw)),
        "state": (2, lambda draw: _state(corpus, draw)),
        "image": (24, lambda draw: _image(corpus, draw)),
        "tensors": (8, lambda draw: _tensors(corpus, draw)),
        "features": (10, lambda draw: _features(corpus, draw)),
        "tokenizer": (2, lambda draw: _tokenizer(corpus, draw)),
        "report": (2, lambda draw: _report(corpus, draw)),
        "command line": (2, lambda draw: _command(corpus, draw)),
    }


RECIPE = {
    "model": "miss-tiny", "plan": "F/LoRA/LoRA", "data": "slake", "steps": 3, "batch_size": 2, "learning_rate": 1e-3, "rank": 4,
    "languages": ["en"], "out": "run", "hold_out": 0.1, "memory_budget": "6GB", "metrics": ["rouge"], "on_nan": "skip",
    "stages": [{"epochs": 1.0}, {"plan": "F/F/LoRA", "data": "b"}],
}  # fmt: skip
STUDY = {
    "title": "t", "options": {"model": "miss-tiny", "steps": 2}, "data": {"a": {"made": "phantoms"}, "b": {}}, "seeds": [0, 1],
    "rows": [{"plan": "F/LoRA/LoRA", "rank": 4}, {"name": "full", "plan": "T/T/T"}, {"plan": "T/T/T", "from": "full", "data": "b"}],
    "score_on": ["a"], "columns": ["rank", "open"], "figures": ["loss"],
    "tiny": {"options": {"steps": 1}, "data": {"a": {"made": "phantoms"}}},
}  # fmt: skip
PLAN = {
    "vit": "F",
    "jtm": [{"LoRA": {"r": 4, "target_modules": "query|value", "rank_pattern": {"query": 2}}}],
    "dec": {"PTv2": {"num_virtual_tokens": 3}},
}
BOMB = "a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]\n"


def _as_yaml(value, draw: random.Random) -> str:
    text = yaml.safe_dump(json.loads(json.dumps(mutate.document(value, draw))), allow_unicode=True)
    return mutate.data(text.encode(), draw).decode("utf-8", "replace") if draw.random() < 0.3 else text


def _yaml(draw: random.Random) -> None:
    with contextlib.suppress(yaml.YAMLError):
        parse_yaml(mutate.data(BOMB.encode(), draw).decode("utf-8", "replace") if draw.random() < 0.5 else _as_yaml(RECIPE, draw))


def _recipe(corpus: Corpus, draw: random.Random) -> None:
    from fastpeft.options import split
    from fastpeft.runs.options import RECIPE as CLASSES
    from fastpeft.runs.stages import stages_of

    path = corpus.empty() / "recipe.yaml"
    path.write_text(_as_yaml(RECIPE, draw), encoding="utf-8")
    given = read_yaml(path)
    if given.get("stages"):
        stages_of(given)
    else:
        split(given, *CLASSES)


def _study(corpus: Corpus, draw: random.Random) -> None:
    path = corpus.empty() / "study.yaml"
    path.write_text(_as_yaml(STUDY, draw), encoding="utf-8")
    read_study(path)


def _plan(corpus: Corpus, draw: random.Random) -> None:
    from fastpeft.models import parts_of

    parse(
        mutate.document(PLAN, draw) if draw.random() < 0.8 else draw.choice(("F/LoRA", "a/b/c", "LoRA+LoRA/F/F", "//", "F+F/F/F", "")),
        parts_of(corpus.model),
    )


def _images_of(folder: Path) -> None:
    (folder / "imgs").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "imgs" / "a.png")


SLAKE = [
    {"img_name": "a.png", "question": "What?", "answer": "Liver", "q_lang": "en", "answer_type": "OPEN", "content_type": "Organ", "qid": 1}
] * 2
RAD = [{"image_name": "a.png", "question": "Is it?", "answer": "Yes", "answer_type": "CLOSED ", "qid": 1}]
MILE = [{"img_name": "a.png", "qid": 3, "answer": "no", "question_pool": ["Is it?", "Is it so?"]}]
INSTRUCTIONS = (
    [{"instruction": "Name it.", "input": "", "output": "red"}] * 2,
    [{"id": "1", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A liver."}]}],
    {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": "a cat", "id": 2}]},
    [{"image": "a.png", "report": "No finding.", "id": "x", "split": "train"}],
)


def _samples(corpus: Corpus, draw: random.Random) -> None:
    folder = corpus.empty()
    _images_of(folder)
    path = folder / draw.choice(("train.json", "trainset.json"))
    path.write_text(json.dumps(draw.choice((SLAKE, RAD, MILE))))
    changed_json(path, draw)
    load_samples(folder, skip_bad=draw.random() < 0.3)


def _instructions(corpus: Corpus, draw: random.Random) -> None:
    folder = corpus.empty()
    _images_of(folder)
    path = folder / "train.json"
    path.write_text(json.dumps(draw.choice(INSTRUCTIONS)))
    changed_json(path, draw)
    load_instructions(folder, skip_bad=draw.random() < 0.3, instruction="Describe it.")


def _described(corpus: Corpus, draw: random.Random) -> None:
    folder = corpus.empty()
    shutil.copyfile(corpus.adapter / "fastpeft.json", folder / "fastpeft.json")
    changed_json(folder / "fastpeft.json", draw)
    describe(folder)


def _adapter(corpus: Corpus, draw: random.Random) -> None:
    folder = corpus.copy(corpus.adapter)
    path = draw.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    (changed_bytes if path.suffix == ".safetensors" else changed_json)(path, draw)
    if draw.random() < 0.2 and path.name != "fastpeft.json":
        (folder / "fastpeft.json").unlink()
    try:
        load_adapter(corpus.model, folder)
    finally:
        if getattr(corpus.model, "fastpeft_plan", None) is not None:
            detach(corpus.model)


def _model(corpus: Corpus, draw: random.Random) -> None:
    folder = corpus.copy(corpus.work / draw.choice(("llama", "blip")))
    changed_json(folder / "config.json", draw)
    build(folder)


def _checkpoint(corpus: Corpus, draw: random.Random) -> None:
    folder = corpus.copy(corpus.checkpoint)
    changed_json(folder / draw.choice(("progress.json", "manifest.json")), draw)
    if draw.random() < 0.5:
        (folder / "manifest.json").unlink()
    newest_intact(folder, corpus.fresh)


def _state(corpus: Corpus, draw: random.Random) -> None:
    """Values of other kinds as well as torn bytes."""
    folder = corpus.copy(corpus.checkpoint)
    how = draw.randrange(3)
    if how == 0:
        changed_bytes(folder / draw.choice(("optimizer.pt", "trained.safetensors")), draw)
    elif how == 1:
        held = load_file(folder / "trained.safetensors")
        name = draw.choice(sorted(held))
        odd = [torch.zeros(3), torch.full_like(held[name], float("nan")), held[name].to(torch.int8), held[name][..., :1].clone()]
        save_file(held | {name: draw.choice(odd)}, folder / "trained.safetensors")
    else:
        held = torch.load(folder / "optimizer.pt", weights_only=True)
        *way, key = draw.choice(mutate.places(held))
        parent = held
        for step in way:
            parent = parent[step]
        odd = [torch.zeros(3), torch.zeros(2, 2).to_sparse(), torch.empty(3, device="meta"), torch.zeros(1).expand(10**12), None, "x", -1]
        parent[key] = draw.choice([*odd, [], {}, 1e400, 10**400, torch.tensor(float("nan"))])
        torch.save(held, folder / "optimizer.pt")
    load_state(folder, corpus.trained, corpus.optimizer)


def _image(corpus: Corpus, draw: random.Random) -> None:
    path = corpus.empty() / "a.png"
    path.write_bytes(mutate.data(draw.choice(sorted(corpus.images.values())), draw))
    load_image(path, max_pixels=4_000_000)


def _tensors(corpus: Corpus, draw: random.Random) -> None:
    name = draw.choice(("a.pth", "old.pth", "script.pt", "a.safetensors"))
    path = corpus.empty() / name
    path.write_bytes(mutate.data((corpus.work / name).read_bytes(), draw))
    read_file(path)


def _features(corpus: Corpus, draw: random.Random) -> None:
    """The header as an attacker writes it: what it says of itself holds."""
    whole = (corpus.work / "features.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    crafted = json.dumps(mutate.document(header, draw)).encode() if draw.random() < 0.8 else mutate.data(whole[8 : 8 + length], draw)
    path = corpus.empty() / "a.safetensors"
    path.write_bytes(struct.pack("<Q", draw.choice((len(crafted), len(crafted), len(crafted), 2**63))) + crafted + whole[8 + length :])
    try:
        _, places = read_header(path)
    except (KeyError, TypeError, AttributeError):  # the store takes these for damage too
        return
    for place in places.values():
        read_tensor(path, place, check=False)


def _tokenizer(corpus: Corpus, draw: random.Random) -> None:
    name = draw.choice(sorted(corpus.tokenizers))
    folder = corpus.copy(corpus.work / name)
    changed_json(folder / draw.choice(("tokenizer.json", "tokenizer_config.json")), draw)
    corpus.tokenizers[name](folder)


SUMMARY = {
    "steps": 2, "samples": 4, "samples_per_second": 1.0, "loss_first": 2.0, "loss_last": 1.0, "plan": "F/LoRA/LoRA", "notes": ["n"],
    "eval": {"open": 0.5, "closed": 0.5, "global": 0.5, "n": 2}, "parameters": {"parts": {"vit": {"trainable": 1}}},
    "versions": {"torch": "2"},
    "parts": {"vit": {"saved_bytes": 1, "flops_per_sample": 2.0}}, "routing": {"text": [[0.5, 0.5]]}, "sources": {"a": {"samples": 1}},
}  # fmt: skip


def _report(corpus: Corpus, draw: random.Random) -> None:
    folder = corpus.empty()
    rows = [{"step": n, "loss": 1.0 / n, "samples_per_second": 2.0, "memory_bytes": 10} for n in (1, 2, 3)]
    asked = [
        {
            "qid": "1",
            "question": "q",
            "answer": "a",
            "prediction": "b",
            "correct": True,
            "image": str(corpus.work / "x.png"),
            "answer_type": "OPEN",
        }
    ]
    (folder / "summary.json").write_text(mutate.text_of(mutate.document(SUMMARY, draw)))
    (folder / "metrics.jsonl").write_text("\n".join(mutate.text_of(mutate.document(row, draw)) for row in rows))
    (folder / "predictions.json").write_text(mutate.text_of(mutate.document(asked, draw)))
    write_report(folder)


COMMANDS = ("train", "eval", "params", "merge", "convert", "ask", "study", "instruct", "bench-", "--version", "--help", "")
OPTIONS = (
    "--model", "--plan", "--data", "--out", "--adapter", "--steps", "--batch-size", "--rank", "--json", "--resume", "--config", "--seed",
    "--image", "--dtype", "--quantize", "--lr", "--languages", "--metrics", "--memory-budget", "--on-nan", "--max-pixels", "--hold-out",
    "-x",
    "--gpu-memory", "--seq-len", "--help",
)  # fmt: skip
WORDS = (
    "miss-tiny", "llama-tiny", "nowhere", "F/LoRA/LoRA", "LoRA", "F/F", "/dev/null", "0", "-1", "1e9", "nan", "6GB", "\x1b[31m", "a" * 500,
    "", "--", "9" * 400, "é\udcff", "fp32", "skip", "4bit", "3", "F/LoRA/LoRA/", "T/T/T", "what is it?",
)  # fmt: skip


def _command(corpus: Corpus, draw: random.Random) -> None:
    """A line of the command line, as its entry point takes it: status 0 or 2, and at most one line on stderr."""
    from fastpeft import cli

    given = [draw.choice(COMMANDS)]
    for _ in range(draw.randint(0, 5)):
        given += draw.choice(([draw.choice(OPTIONS), draw.choice(WORDS)], [draw.choice(WORDS)], [draw.choice(OPTIONS)]))
    here, before, err = os.getcwd(), sys.argv, io.StringIO()
    os.chdir(corpus.empty())
    sys.argv = ["fastpeft", *given]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            status = cli._run()
    except SystemExit as error:
        status = error.code or 0
    finally:
        sys.argv = before
        os.chdir(here)
    if status not in (0, 2) or (status == 2 and err.getvalue().count("\n") > 1):
        raise AssertionError(f"{given}: status {status}: {err.getvalue()!r}")
