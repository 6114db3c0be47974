"""Training steps of others' models, as they are and after ``fastpeft.optimize``: FLOPs, bytes kept for backward, seconds.

    python bench/dropin.py [--cases llama-padded vit ...] [--rounds 5]

Every model has PEFT's LoRA (r = 8) on all its linear layers ("blip": on those of its text models) and random weights, in float32. Decoders
have C = 1024, 8 layers, a vocabulary of 32,000 and 4 rows of 256 tokens: "padded", rows of 35 to 100% real tokens of which the last quarter
is labelled, or "full", every token real and labelled; nobody reads their logits (``lean_logits=True``). The models start equal and take the
same batch, interleaved; their losses are compared at every step. One CPU thread and its CPU time, the least of the rounds. Writes
dropin_cpu.json and .md to $OUT, or bench/results.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import os
import platform
import sys
import time
from pathlib import Path

import peft
import torch
import transformers as tf

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fastpeft as fp
from bench.pieces import say
from fastpeft.cost.profile import measure
from fastpeft.files import write_json, write_text

TEXT = {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 8, "num_attention_heads": 16, "vocab_size": 32_000}
GROUPED = TEXT | {"num_key_value_heads": 8, "head_dim": 64}
ROWS, TOKENS = 4, 256
DECODERS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**GROUPED)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**GROUPED)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**GROUPED, query_pre_attn_scalar=64)),
}
LANGUAGE_BATCHES = ("padded", "full")


def decoder(kind: str, batch: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    ids = torch.randint(3, TEXT["vocab_size"], (ROWS, TOKENS))
    if batch == "full":
        return DECODERS[kind](), {"input_ids": ids, "labels": ids}
    lengths = torch.linspace(0.35, 1.0, ROWS).mul(TOKENS).long()[:, None]
    at = torch.arange(TOKENS)
    labelled = (at < lengths) & (at >= lengths * 3 // 4)
    return DECODERS[kind](), {"input_ids": ids, "attention_mask": (at < lengths).long(), "labels": ids.masked_fill(~labelled, -100)}


def vit() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    model = tf.ViTForImageClassification(tf.ViTConfig(num_labels=10))
    return model, {"pixel_values": torch.randn(4, 3, 224, 224), "labels": torch.arange(4)}


def bert() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = tf.BertForSequenceClassification(tf.BertConfig(**off, num_labels=3))
    mask = (torch.arange(128) < torch.linspace(0.35, 1.0, 8).mul(128).long()[:, None]).long()
    return model, {"input_ids": torch.randint(1000, 30_000, (8, 128)), "attention_mask": mask, "labels": torch.arange(8) % 3}


def blip() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = tf.BlipForQuestionAnswering(tf.BlipConfig(text_config=off))
    asked, answer = torch.randint(1000, 30_000, (4, 16)), torch.randint(1000, 30_000, (4, 6))
    return model, {"input_ids": asked, "pixel_values": torch.randn(4, 3, 384, 384), "labels": answer}


CASES = {f"{kind}-{batch}": (lambda kind=kind, batch=batch: decoder(kind, batch)) for kind in DECODERS for batch in LANGUAGE_BATCHES}
CASES |= {"vit": vit, "bert": bert, "blip": blip}


def adapted(case: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model, batch = CASES[case]()
    layers = r"text_.*\.(query|key|value|dense)" if case == "blip" else "all-linear"
    return peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=layers)).train(), batch


def step(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return float(loss.detach())


def one_case(case: str, rounds: int) -> dict:
    plain, batch = adapted(case)
    ours = copy.deepcopy(plain)
    report = fp.optimize(ours, lean_logits=True if case.partition("-")[0] in DECODERS else None)
    row, models = {"covered": report.coverage["layers"]}, {"peft": plain, "fastpeft": ours}
    losses = {name: step(model, batch) for name, model in models.items()}
    row["loss"] = losses["peft"]
    assert abs(losses["fastpeft"] - losses["peft"]) <= 2e-5 * abs(losses["peft"]), losses
    for name, model in models.items():
        with measure(model) as cost:
            step(model, batch)
        row[name] = {"flops": cost.flops, "saved_bytes": cost.saved_bytes, "seconds": float("inf")}
    for _ in range(rounds):
        for name, model in models.items():
            gc.collect()
            began = time.thread_time()
            loss = step(model, batch)
            row[name]["seconds"] = min(row[name]["seconds"], time.thread_time() - began)
            assert abs(loss - losses["peft"]) <= 2e-5 * abs(losses["peft"]), (name, loss, losses)
    row["ratios"] = {what: row["fastpeft"][what] / row["peft"][what] for what in ("flops", "saved_bytes")}
    row["ratios"]["speed"] = row["peft"]["seconds"] / row["fastpeft"]["seconds"]
    return row


def table(told: dict) -> str:
    versions = ", ".join(f"{name} {told[name]}" for name in ("torch", "transformers", "peft"))
    lines = [
        "# Others' models, before and after `fastpeft.optimize`",
        "",
        f"`{told['command']}`, {told['date']}, {told['cpu']}, one thread, {versions}. PEFT's LoRA (r = 8) on all linear layers (BLIP: its",
        "text models), float32, dropout off; equal losses at every step; CPU seconds, the least of",
        f"{told['rounds']} interleaved rounds. Shapes: `bench/dropin.py`.",
        "",
        "| model | FLOPs | kept for backward | PEFT s | fastpeft s | speed |",
        "|---|---|---|---|---|---|",
    ]
    for case, row in told["cases"].items():
        before, after = (row[name]["saved_bytes"] / 1e6 for name in ("peft", "fastpeft"))
        kept = f"{before:,.0f} -> {after:,.0f} MB ({row['ratios']['saved_bytes']:.2f})"
        seconds = f"{row['peft']['seconds']:.2f} | {row['fastpeft']['seconds']:.2f}"
        lines.append(f"| {case} | {row['ratios']['flops']:.2f} | {kept} | {seconds} | {row['ratios']['speed']:.2f}x |")
    return "\n".join(lines) + "\n"


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(": ")[2] for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    out = Path(os.environ.get("OUT") or Path(__file__).parent / "results")
    versions = {"torch": torch.__version__, "transformers": tf.__version__, "peft": peft.__version__}
    about = {"date": datetime.date.today().isoformat(), "cpu": cpu(), "command": " ".join(["python bench/dropin.py", *sys.argv[1:]])}
    told = about | versions | {"rounds": args.rounds, "cases": {}}
    for case in args.cases:
        told["cases"][case] = row = one_case(case, args.rounds)
        say(f"{case}: {row['ratios']}")
        write_json(out / "dropin_cpu.json", told)
        write_text(out / "dropin_cpu.md", table(told))


if __name__ == "__main__":
    main()
