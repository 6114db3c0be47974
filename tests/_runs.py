"""Short training runs on phantoms: shared by the tests of training, evaluation and the command line."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

import fastpeft as fp
from fastpeft.data import Preprocess, VQADataset, load_samples, train_tokenizer
from fastpeft.demo.phantom import make_phantoms

SMALL = {"image_size": 32, "hidden_size": 32, "heads": 2, "vision_layers": 2, "text_layers": 2}
SHALLOW = {"vision_layers": 1, "text_layers": 1}
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "drop_path_rate": 0.1}
SAME = ("step", "loss", "learning_rate", "grad_norm", "samples")  # of metrics.jsonl: what does not depend on the clock


def make_data(folder: Path) -> Path:
    """50 questions on 10 training images, 20 on 4 test images."""
    return make_phantoms(folder / "phantoms", "a", {"train": 10, "test": 4}, 5, progress=False, image_size=32)


@functools.cache
def tokenizer(data: Path):
    return train_tokenizer([text for s in load_samples(data) for text in (s.question, s.answer)], 512)


def trainer(data: Path, plan: str = "F/LoRA/LoRA", *, samples: int | None = None, small=None, evaluate=False, **config) -> fp.Trainer:
    """A trainer of the smallest MISS; ``small``: more fields of its configuration."""
    words = tokenizer(data)
    ids = {"bos_token_id": words.bos_token_id, "sep_token_id": words.sep_token_id, "eos_token_id": words.sep_token_id}
    model = fp.build("miss-tiny", pretrained=False, seed=1, vocab_size=len(words), **SMALL | ids | (small or {}))
    torch.manual_seed(2)
    fp.adapt(model, plan)
    preprocess = Preprocess(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    held = VQADataset(load_samples(data, split="test").samples, preprocess) if evaluate else None
    config = fp.TrainConfig(**{"progress": False, "batch_size": 4, "device": "cpu"} | config)
    return fp.Trainer(model, VQADataset(load_samples(data)[:samples], preprocess, tokenizer=words), config, eval_dataset=held)


def start(data: Path, out: Path, *, small: bool = False, **options) -> fp.Trainer:
    """Six steps of one layer in each stack, with a checkpoint at every second; ``small``: with dropout."""
    return trainer(data, small=SHALLOW | DROPOUT if small else SHALLOW, out=out, **{"steps": 6, "save_every": 2} | options)


def weights(trainer: fp.Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def metrics(out: str | Path) -> list[dict]:
    return [{name: row[name] for name in SAME} for row in map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())]


def assert_same_weights(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """To the bit."""
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []
