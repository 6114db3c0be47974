"""More of what reads files, as in fuzz_targets.py: ScienceQA, MMLU, split files, judgments, LLaMA's tokenizer.model and folder, metrics."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import fuzz_mutations as mutate
import torch
from PIL import Image

from fastpeft.convert.formats import convert
from fastpeft.data import load_causal_tokenizer, load_samples, load_scienceqa
from fastpeft.data.mmlu import load_mmlu
from fastpeft.evaluate.judge import common, read_judgments, read_outputs
from fastpeft.train.metrics import keep_lines

PROBLEM = {
    "question": "Which?", "choices": ["red", "green"], "answer": 0, "hint": "It is red.", "image": None, "task": "closed choice",
    "grade": "grade2", "subject": "natural science", "topic": "biology", "category": "c", "skill": "s", "lecture": "l", "solution": "so",
    "split": "train",
}  # fmt: skip
MMLU = 'What is it?,a,b,c,d,A\n"A, or B?",1,2,3,4,D\n'
RAD = [{"image_name": "a.png", "question": f"Is it {n}?", "answer": "Yes", "answer_type": "CLOSED", "qid": n} for n in range(3)]
OUTPUTS = [{"dataset": "d", "instruction": text, "output": "o", "generator": "ours"} for text in ("Name it.", "Say it.")]
JUDGED = [
    {"id": "0-ab", "scores": [8, 7]},
    {"id": "0-ba", "judgment": "7 8\nBoth are good."},
    {"id": "1-ab", "preference": 1.5},
    {"instruction": "Say it.", "output_1": "p", "output_2": "o", "generator_1": "theirs", "generator_2": "ours", "preference": 2},
]
PARAMS = {"dim": 32, "multiple_of": 16, "n_heads": 2, "n_layers": 1, "norm_eps": 1e-6, "vocab_size": -1}


def readers(corpus) -> dict[str, tuple[int, Callable[[random.Random], None]]]:
    """name -> (weight, case), as ``fuzz_targets.targets`` has them."""
    _make_llama(corpus.work / "original")
    cases = {
        "scienceqa": (4, _scienceqa), "mmlu": (3, _mmlu), "split file": (3, _split_file), "judgments": (4, _judgments),
        "sentencepiece": (4, _sentencepiece), "original llama": (2, _original_llama), "metrics": (3, _metrics),
    }  # fmt: skip
    return {name: (weight, lambda draw, case=case: case(corpus, draw)) for name, (weight, case) in cases.items()}


def _make_llama(folder: Path) -> None:
    from fastpeft.models import resolve

    place = Path(__file__).parents[1] / "shared" / "sentencepiece_model.py"
    spec = importlib.util.spec_from_file_location("sentencepiece_model", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write_sentencepiece(folder / "tokenizer.model")
    (folder / "params.json").write_text(json.dumps(PARAMS))
    sizes = {"vocab_size": 270, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    family = resolve("llama-tiny").family
    state = family.model(family.configs["llama-tiny"](**sizes | {"num_key_value_heads": 2})).state_dict()
    own = {"tok_embeddings.weight": "model.embed_tokens", "norm.weight": "model.norm", "output.weight": "lm_head"}
    of_layer = {"attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
                "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
                "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}  # fmt: skip
    own |= {f"layers.0.{name}.weight": f"model.layers.0.{theirs}" for name, theirs in of_layer.items()}
    torch.save({name: state[f"{theirs}.weight"] for name, theirs in own.items()}, folder / "consolidated.00.pth")


def _written(path: Path, value, draw: random.Random, *, lines: bool = False) -> None:
    """JSON with changes in it, or in its bytes; ``lines``: a list as a line each."""
    value = mutate.document(value, draw)
    text = "\n".join(map(mutate.text_of, value)) if lines and isinstance(value, list) else mutate.text_of(value)
    path.write_bytes(mutate.data(text.encode(), draw) if draw.random() < 0.2 else text.encode())


def _scienceqa(corpus, draw: random.Random) -> None:
    folder = corpus.empty()
    files = {"problems.json": {"1": PROBLEM, "2": PROBLEM | {"answer": 1}}, "pid_splits.json": {"train": ["1", "2"]}}
    files |= {"captions.json": {"captions": {"1": "a cat"}}}
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    name = draw.choice(sorted(files))
    _written(folder / name, files[name], draw)
    load_scienceqa(folder, prompt_format=draw.choice(("QCM-ALE", ("QCM-LEA", "QCM-A"))), use_caption=True, skip_bad=draw.random() < 0.3)


def _mmlu(corpus, draw: random.Random) -> None:
    folder = corpus.empty()
    for split in ("dev", "test"):
        (folder / split).mkdir()
        whole = mutate.data(MMLU.encode(), draw) if draw.random() < 0.6 else MMLU.encode()
        (folder / split / f"anatomy_{split}.csv").write_bytes(whole)
    load_mmlu(folder, shots=draw.choice((0, 1, 2)))


def _split_file(corpus, draw: random.Random) -> None:
    folder = corpus.empty()
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    (folder / "trainset.json").write_text(json.dumps(RAD))
    path = folder / draw.choice(("chosen.json", "chosen.txt", "chosen.jsonl"))
    if path.suffix == ".txt":
        path.write_bytes(mutate.data(b"0\n# none\n2\n", draw))
    else:
        _written(path, draw.choice(([0, 1], ["0", "2"], RAD)), draw, lines=path.suffix == ".jsonl")
    load_samples(folder, split_file=str(path))


def _judgments(corpus, draw: random.Random) -> None:
    folder = corpus.empty()
    theirs = [row | {"output": "p", "generator": "theirs"} for row in OUTPUTS]
    files = {"ours.json": OUTPUTS, "theirs.json": theirs, "judged.jsonl": JUDGED}
    for name, value in files.items():
        (folder / name).write_text("\n".join(map(json.dumps, value)) if name.endswith("l") else json.dumps(value))
    name = draw.choice((*files, "judged.jsonl"))
    _written(folder / name, files[name], draw, lines=name.endswith("l"))
    ours, theirs = (read_outputs(folder / name) for name in ("ours.json", "theirs.json"))
    common(ours, theirs)
    read_judgments(folder / "judged.jsonl", ours, theirs)


def _sentencepiece(corpus, draw: random.Random) -> None:
    path = corpus.empty() / "tokenizer.model"
    path.write_bytes(mutate.data((corpus.work / "original" / "tokenizer.model").read_bytes(), draw))
    load_causal_tokenizer(path)


def _original_llama(corpus, draw: random.Random) -> None:
    folder = corpus.copy(corpus.work / "original")
    name = draw.choice(("params.json", "params.json", "consolidated.00.pth", "tokenizer.model"))
    if name == "params.json":
        _written(folder / name, PARAMS, draw)
    else:
        (folder / name).write_bytes(mutate.data((folder / name).read_bytes(), draw))
    out = corpus.work / "converted"
    try:
        convert(folder, out)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _metrics(corpus, draw: random.Random) -> None:
    """What is kept is what a resumed run goes on from: each step once."""
    path = corpus.empty() / "metrics.jsonl"
    _written(path, [{"step": n, "loss": 1.0, "samples": 2} for n in (1, 2, 3)], draw, lines=True)
    missing = keep_lines(path, 2)
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert len(set(steps)) == len(steps) == 2 - missing and set(steps) <= {1, 2}, steps
