"""Training steps of others' models, as they are and after ``fastpeft.optimize``: FLOPs, bytes kept for backward, seconds.

    python bench/dropin.py [--cases llama-padded vit gpt2 ...] [--rounds 5] [--seconds 40]

Every model has PEFT's LoRA (r = 8) on all its linear layers, random weights, float32 and no dropout; "blip" on the queries and values of
its text models, as MISS has it, and "blip-cached" the same with ``cache_images``, every image seen before.
LLaMA, Qwen3 and Gemma 3 have C = 1024, 8 layers, a vocabulary of 32,000 and 4 rows of 256 tokens: "padded", rows of 35 to 100% real
tokens of which the last quarter is labelled, or "full", every token real and labelled; nobody reads their logits (``lean_logits=True``).
Their rivals are PEFT eager and PEFT under torch.compile. The other models are a matrix of shapes where a fused path could lose: C = 768,
4 layers, short batches, every token real and labelled, and the bare ``fp.optimize(model)``.

The models start equal and take the same batch, interleaved, in turns of the order; losses are compared before anything is timed and at
every step. One CPU thread and its CPU time, the median of the rounds. Writes dropin.json and dropin.md to $OUT, or bench/results; with
``--counts``, FLOPs and bytes alone, which are the same on any machine, to dropin_counts.json and .md.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers as tf
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fastpeft as fp
from bench.pieces import say
from fastpeft.cost.profile import measure
from fastpeft.files import write_json, write_text

Case = tuple[nn.Module, dict[str, Tensor]]
VOCABULARY, ROWS, TOKENS = 32_000, 4, 256
TEXT = {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 8, "num_attention_heads": 16, "vocab_size": VOCABULARY}
GROUPED = TEXT | {"num_key_value_heads": 8, "head_dim": 64}
DECODERS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**GROUPED)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**GROUPED, query_pre_attn_scalar=64)),
}
LAYERS, FEW = 4, 8_000  # of the matrix: layers, and the vocabulary
SMALL = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": LAYERS, "num_attention_heads": 12, "vocab_size": FEW}
SMALL |= {"num_key_value_heads": 4, "pad_token_id": 0}
SPARSE = {"intermediate_size": 768, "head_dim": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
GPTJ = {"n_embd": 768, "n_layer": LAYERS, "n_head": 12, "vocab_size": FEW, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
OPT = {"hidden_size": 768, "word_embed_proj_dim": 768, "ffn_dim": 3072, "num_hidden_layers": LAYERS, "num_attention_heads": 12}
OPT |= {"vocab_size": FEW, "dropout": 0.0}
OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MATRIX_DECODERS: dict[str, Callable[[], nn.Module]] = {
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**SMALL)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SMALL)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**SMALL, head_dim=64)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**SMALL)),
    "olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**SMALL)),
    "smollm3": lambda: tf.SmolLM3ForCausalLM(tf.SmolLM3Config(**SMALL)),
    "opt": lambda: tf.OPTForCausalLM(tf.OPTConfig(**OPT)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SMALL, num_local_experts=4)),
    "gpt-oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**SMALL | SPARSE)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_layer=LAYERS, vocab_size=FEW, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)),
}
WIDE = {"hidden_size": 768, "vocab_size": FEW, "hidden_dropout": 0.0, "attention_dropout": 0.0}
MIXING_DECODERS: dict[str, Callable[[], nn.Module]] = {
    "falcon": lambda: tf.FalconForCausalLM(tf.FalconConfig(**WIDE, num_hidden_layers=LAYERS, num_attention_heads=12)),
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(**WIDE, n_layer=LAYERS, n_head=12)),
    "gptj": lambda: tf.GPTJForCausalLM(tf.GPTJConfig(**GPTJ)),
    "qwen3.5": lambda: tf.Qwen3_5ForCausalLM(tf.Qwen3_5TextConfig(**SMALL, head_dim=64)),
}
MATRIX_VISION: dict[str, Callable[[], nn.Module]] = {
    "dinov2": lambda: tf.Dinov2ForImageClassification(tf.Dinov2Config(num_hidden_layers=LAYERS, num_labels=10, image_size=224)),
    "siglip": lambda: tf.SiglipForImageClassification(tf.SiglipConfig(vision_config={"num_hidden_layers": LAYERS}, num_labels=10)),
    "clip": lambda: tf.CLIPForImageClassification(
        tf.CLIPConfig(vision_config={"num_hidden_layers": LAYERS, "patch_size": 16}, num_labels=10)
    ),
}
# what these must reach: of bytes kept at most, of speed over PEFT eager and over PEFT compiled at least
PADDED, FULL = (0.6, 1.5, 1.4), (0.6, 1.10, 1.05)
TARGETS = {f"{kind}-{batch}": targets for kind in DECODERS for batch, targets in (("padded", PADDED), ("full", FULL))}
TARGETS |= {"vit": (0.7, 1.12, None), "bert": (0.7, 1.1, None), "blip": (0.7, 1.5, None), "blip-cached": (0.7, 2.0, None)}
NEVER_BELOW = 0.98
EQUAL = 2e-5  # of losses, relative: float32 in another order


def decoder(model: nn.Module, batch: str, rows: int = ROWS, tokens: int = TOKENS, vocabulary: int = VOCABULARY) -> Case:
    ids = torch.randint(3, vocabulary, (rows, tokens))
    if batch == "full":
        return model, {"input_ids": ids, "labels": ids}
    lengths = torch.linspace(0.35, 1.0, rows).mul(tokens).long()[:, None]
    at = torch.arange(tokens)
    labelled = (at < lengths) & (at >= lengths * 3 // 4)
    return model, {"input_ids": ids, "attention_mask": (at < lengths).long(), "labels": ids.masked_fill(~labelled, -100)}


def images(model: nn.Module) -> Case:
    return model, {"pixel_values": torch.randn(4, 3, 224, 224), "labels": torch.arange(4)}


def sentences(model: nn.Module) -> Case:
    mask = (torch.arange(128) < torch.linspace(0.35, 1.0, 8).mul(128).long()[:, None]).long()
    return model, {"input_ids": torch.randint(1000, FEW, (8, 128)), "attention_mask": mask, "labels": torch.arange(8) % 3}


def tagged(model: nn.Module, share: float, classes: int) -> Case:
    """Of the real tokens so many have a label: first pieces of words of token classification, masked tokens of a language model."""
    _, batch = sentences(model)
    labels = torch.randint(0, classes, batch["input_ids"].shape)
    unlabelled = (batch["attention_mask"] == 0) | (torch.rand(labels.shape) > share)
    return model, batch | {"labels": labels.masked_fill(unlabelled, -100)}


def llava() -> Case:
    """Images of 16 x 16 patches before 32 tokens of text; the tower's last layer but one is read."""
    seen = tf.CLIPVisionConfig(num_hidden_layers=LAYERS, hidden_size=768, intermediate_size=3072, num_attention_heads=12, patch_size=14)
    config = tf.LlavaConfig(vision_config=seen, text_config=tf.LlamaConfig(**SMALL), image_token_index=FEW - 1)
    ids = torch.randint(3, FEW - 1, (2, 288))
    ids[:, :256] = FEW - 1
    labels = ids.masked_fill(ids == FEW - 1, -100)
    return tf.LlavaForConditionalGeneration(config), {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(2, 3, 224, 224)}


def blip() -> Case:
    model = tf.BlipForQuestionAnswering(tf.BlipConfig(text_config=OFF))
    asked, answer = torch.randint(1000, 30_000, (4, 16)), torch.randint(1000, 30_000, (4, 6))
    return model, {"input_ids": asked, "pixel_values": torch.randn(4, 3, 384, 384), "labels": answer}


def blip2() -> Case:
    """Images of 14 x 14 patches, 32 tokens each before 32 of text."""
    seen = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 2, "num_attention_heads": 12, "image_size": 196}
    asked = OFF | {"num_hidden_layers": 2, "encoder_hidden_size": 768, "vocab_size": FEW}
    config = tf.Blip2Config(
        vision_config=seen, qformer_config=asked, text_config=tf.OPTConfig(**OPT), num_query_tokens=32, image_token_index=FEW - 1
    )
    ids = torch.randint(3, FEW - 1, (4, 64))
    ids[:, :32] = FEW - 1
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(ids == FEW - 1, -100)}
    return tf.Blip2ForConditionalGeneration(config), batch | {"pixel_values": torch.randn(4, 3, 196, 196)}


def bart() -> Case:
    sizes = {"d_model": 768, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072, "dropout": 0.0}
    heads = {"encoder_attention_heads": 12, "decoder_attention_heads": 12}
    model = tf.BartForConditionalGeneration(tf.BartConfig(**sizes, **heads, vocab_size=FEW))
    ids = torch.randint(3, FEW, (4, 128))
    return model, {"input_ids": ids, "labels": ids[:, :64].clone()}


def in_pairs(make: Callable[[], Case]) -> Case:
    """The same model on texts and answers of 35 to 100% of a row."""
    model, batch = make()
    parts = torch.linspace(0.35, 1.0, 4)[:, None]
    ids, labels = batch["input_ids"], batch["labels"]
    mask = (torch.arange(ids.shape[1]) < parts * ids.shape[1]).long()
    answered = torch.arange(labels.shape[1]) < parts * labels.shape[1]
    return model, {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(~answered, -100)}


def t5() -> Case:
    size = {"d_model": 768, "d_kv": 64, "num_heads": 12, "d_ff": 2048, "num_layers": LAYERS}
    config = tf.T5Config(**size, vocab_size=FEW, dropout_rate=0.0, decoder_start_token_id=0)
    ids = torch.randint(3, FEW, (4, 128))
    return tf.T5ForConditionalGeneration(config), {"input_ids": ids, "labels": ids[:, :64].clone()}


def whisper() -> Case:
    sizes = {"d_model": 768, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048}
    heads = {"encoder_attention_heads": 12, "decoder_attention_heads": 12, "max_source_positions": 250}
    config = tf.WhisperConfig(**sizes, **heads, vocab_size=FEW, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    return tf.WhisperForConditionalGeneration(config), {"input_features": torch.randn(4, 80, 500), "labels": torch.randint(3, FEW, (4, 64))}


def short(cls: type[nn.Module], config: type) -> Callable[[], Case]:
    return lambda: sentences(cls(config(**OFF, num_labels=3, num_hidden_layers=LAYERS, vocab_size=FEW)))


CASES: dict[str, Callable[[], Case]] = {
    f"{kind}-{batch}": (lambda kind=kind, batch=batch: decoder(DECODERS[kind](), batch))
    for kind in DECODERS
    for batch in ("padded", "full")
}
CASES |= {
    "vit": lambda: images(tf.ViTForImageClassification(tf.ViTConfig(num_labels=10))),
    "bert": lambda: sentences(tf.BertForSequenceClassification(tf.BertConfig(**OFF, num_labels=3))),
    "blip": blip,
    "blip-cached": blip,
}
CASES |= {name: (lambda make=make: decoder(make(), "full", 4, 128, FEW)) for name, make in MATRIX_DECODERS.items()}
CASES |= {name: (lambda make=make: images(make())) for name, make in MATRIX_VISION.items()}
CASES |= {
    "roberta": short(tf.RobertaForSequenceClassification, tf.RobertaConfig),
    "electra": short(tf.ElectraForSequenceClassification, tf.ElectraConfig),
    "blip2": blip2,
    "bart": bart,
    "t5": t5,
    "bart-padded": lambda: in_pairs(bart),
    "t5-padded": lambda: in_pairs(t5),
    "whisper": whisper,
    "llava": llava,
}
SHORT = OFF | {"num_hidden_layers": LAYERS, "vocab_size": FEW, "classifier_dropout": 0.0}
CASES |= {  # "-padded": nobody reads the logits
    "bert-tokens-padded": lambda: tagged(tf.BertForTokenClassification(tf.BertConfig(**SHORT, num_labels=9)), 0.7, 9),
    "bert-masked-padded": lambda: tagged(tf.BertForMaskedLM(tf.BertConfig(**SHORT)), 0.15, FEW),
    "roberta-tokens-padded": lambda: tagged(tf.RobertaForTokenClassification(tf.RobertaConfig(**SHORT, num_labels=9)), 0.7, 9),
    "roberta-masked-padded": lambda: tagged(tf.RobertaForMaskedLM(tf.RobertaConfig(**SHORT)), 0.15, FEW),
}
CASES |= {f"{name}-padded": (lambda make=make: decoder(make(), "padded", 4, 128, FEW)) for name, make in MIXING_DECODERS.items()}


def adapted(case: str) -> Case:
    torch.manual_seed(0)
    model, batch = CASES[case]()
    layers = r"text_.*\.(query|value)" if case in ("blip", "blip-cached") else "all-linear"
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=layers)).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first: losses would not show what the adapters do
                parameter.normal_(std=0.01)
    return model, batch


def step(model: nn.Module, batch: dict[str, Tensor]) -> float:
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return float(loss.detach())


def one_case(case: str, rounds: int, seconds: float) -> dict:
    """``rounds`` 0: nothing is timed."""
    plain, batch = adapted(case)
    decodes, lean = case.partition("-")[0] in DECODERS, case.endswith("-padded")
    models = {"peft": plain, "fastpeft": copy.deepcopy(plain)}
    if decodes and rounds:
        models["compiled"] = torch.compile(copy.deepcopy(plain))
    cache = "1GB" if case.endswith("cached") else None
    report = fp.optimize(models["fastpeft"], lean_logits=True if decodes or lean else None, cache_images=cache)
    row, expected = {"covered": report.coverage["layers"]}, step(plain, batch)

    def equal(name: str) -> float:
        began = time.thread_time()
        loss = step(models[name], batch)
        took = time.thread_time() - began
        if not abs(loss - expected) <= EQUAL * abs(expected):
            raise SystemExit(f"{case}: {name}'s loss is {loss}, PEFT's {expected}; nothing of this case was kept")
        return took

    row["loss"] = expected
    for name, model in models.items():
        row[name] = {"seconds": []}
        equal(name)
        if name != "compiled":  # FLOPs are those of "peft"; what a compiled graph keeps passes no hook
            with measure(model) as cost:
                step(model, batch)
            row[name] |= {"flops": cost.flops, "saved_bytes": cost.saved_bytes}
    names, began = list(models), time.perf_counter()
    row["ratios"] = {what: row["fastpeft"][what] / row["peft"][what] for what in ("flops", "saved_bytes")}
    if not rounds:
        return row | {"below": below(case, row["ratios"])}
    while len(row["peft"]["seconds"]) < rounds and (time.perf_counter() - began < seconds or len(row["peft"]["seconds"]) < 3):
        for name in names:
            gc.collect()
            row[name]["seconds"].append(equal(name))
        names.reverse()
    for name in names:
        row[name]["median"] = statistics.median(row[name]["seconds"])
    row["ratios"] |= {f"over_{name}": row[name]["median"] / row["fastpeft"]["median"] for name in names if name != "fastpeft"}
    row["below"] = below(case, row["ratios"])
    return row


def below(case: str, ratios: dict[str, float]) -> list[str]:
    """What a case does not reach, in words."""
    kept, eager, compiled = TARGETS.get(case, (None, NEVER_BELOW, None))
    found = [f"{ratios['saved_bytes']:.2f} kept, not {kept}"] if kept and ratios["saved_bytes"] > kept else []
    for name, least in (("over_peft", eager), ("over_compiled", compiled)):
        if least and name in ratios and ratios[name] < least:
            found.append(f"{ratios[name]:.2f}x {name.replace('_', ' ')}, not {least}x")
    return found


def counts_table(told: dict) -> str:
    lines = [
        "# What others' models keep and compute, before and after `fastpeft.optimize`",
        "",
        f"`{told['command']}`, {told['date']}, " + ", ".join(f"{name} {told[name]}" for name in ("torch", "transformers", "peft")) + ".",
        "PEFT's LoRA (r = 8) on all linear layers and experts (BLIP: queries and values of its text models), float32, dropout off, weights",
        "as drawn; equal losses. Counted, not timed: bytes that autograd keeps of a step, FLOPs of its matrix products.",
        "",
        "| model | layers covered | FLOPs | kept for backward | below target |",
        "|---|---|---|---|---|",
    ]
    for case, row in told["cases"].items():
        before, after = (row[name]["saved_bytes"] / 1e6 for name in ("peft", "fastpeft"))
        kept = f"{before:,.0f} -> {after:,.0f} MB (**{row['ratios']['saved_bytes']:.2f}x**)"
        lines.append(f"| {case} | {100 * row['covered']:.0f}% | {row['ratios']['flops']:.2f}x | {kept} | {'; '.join(row['below'])} |")
    return "\n".join(lines) + "\n"


def table(told: dict) -> str:
    versions = ", ".join(f"{name} {told[name]}" for name in ("torch", "transformers", "peft"))
    lines = [
        "# Others' models, before and after `fastpeft.optimize`",
        "",
        f"`{told['command']}`, {told['date']}, {told['cpu']}, {told['threads']} thread, {versions}.",
        "PEFT's LoRA (r = 8) on all linear layers (BLIP: queries and values of its text models), float32, dropout off; equal losses at",
        "every step; CPU seconds, the median of interleaved rounds. Shapes and targets: `bench/dropin.py`; every round's seconds are in",
        "the JSON file beside this one.",
        "",
        "| model | layers covered | FLOPs | kept for backward | PEFT s | PEFT compiled s | fastpeft s | over PEFT | over compiled "
        "| below target |",
        "|" + "---|" * 10,
    ]
    for case, row in told["cases"].items():
        before, after = (row[name]["saved_bytes"] / 1e6 for name in ("peft", "fastpeft"))
        compiled = row.get("compiled")
        cells = [
            case,
            f"{100 * row['covered']:.0f}%",
            f"{row['ratios']['flops']:.2f}x",
            f"{before:,.0f} -> {after:,.0f} MB ({row['ratios']['saved_bytes']:.2f}x)",
            f"{row['peft']['median']:.2f}",
            f"{compiled['median']:.2f}" if compiled else "",
            f"{row['fastpeft']['median']:.2f}",
            f"**{row['ratios']['over_peft']:.2f}x**",
            f"{row['ratios']['over_compiled']:.2f}x" if compiled else "",
            "; ".join(row["below"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(": ")[2] for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=5, help="at most")
    parser.add_argument("--seconds", type=float, default=60.0, help="for the rounds of one case; three rounds at least")
    parser.add_argument("--counts", action="store_true", help="FLOPs and bytes alone")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    tf.logging.set_verbosity_error()
    torch.set_num_threads(1)
    out = Path(os.environ.get("OUT") or Path(__file__).parent / "results")
    about = {"date": datetime.date.today().isoformat(), "cpu": cpu(), "threads": torch.get_num_threads()}
    about |= {"command": " ".join(["python bench/dropin.py", *sys.argv[1:]])}
    told = about | {"torch": torch.__version__, "transformers": tf.__version__, "peft": peft.__version__, "cases": {}}
    for case in args.cases:
        told["cases"][case] = row = one_case(case, 0 if args.counts else args.rounds, args.seconds)
        say({"case": case, **row["ratios"], "below": row["below"]})
        name, page = ("dropin_counts", counts_table) if args.counts else ("dropin", table)
        write_json(out / f"{name}.json", told)
        write_text(out / f"{name}.md", page(told))


if __name__ == "__main__":
    main()
