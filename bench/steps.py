"""Whole MISS training steps against transformers + PEFT (eager), interleaved in one run on the same batch with the same weights.

    python bench/steps.py [--model miss] [--plans F/LoRA/LoRA T/LoRA/LoRA] [--data FOLDER] [--batch-size 4] [--json FILE]

Losses are compared before anything is timed, on questions of one length (transformers leaks padded questions into the decoder), dropout
off. FLOPs and saved bytes are exact; seconds are medians of interleaved steps, forward, backward and update. "cached" is fastpeft with
the frozen image encoder's features kept, as in training from the second visit of an image on.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from pathlib import Path

import torch

import fastpeft as fp
from fastpeft.data import EpochSampler, Preprocess, VQACollator, VQADataset, load_samples, train_tokenizer
from fastpeft.models import parts_of
from fastpeft.train.profile import measure


def batch_of(model, args) -> dict:
    """A batch of real questions where there is a data folder, else of random tokens and pixels, without padding."""
    vision, text = model.config.vision_config, model.config.text_config
    if args.data:
        samples = load_samples(args.data)
        tokenizer = train_tokenizer([t for s in samples for t in (s.question, s.answer)], vocab_size=4096)
        dataset = VQADataset(samples, Preprocess(vision.image_size, (0.5,) * 3, (0.5,) * 3))
        sampler = EpochSampler(dataset, args.batch_size, questions_per_image=args.questions_per_image)
        batch = VQACollator(tokenizer)(dataset.__getitems__(next(iter(sampler))))
        names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask", "labels", "pixel_values", "image_index")
        return {name: batch[name] for name in names}
    images = -(-args.batch_size // args.questions_per_image)
    tokens = torch.randint(10, text.vocab_size - 10, (args.batch_size, args.question_tokens + args.answer_tokens))
    return {
        "input_ids": tokens[:, : args.question_tokens],
        "attention_mask": torch.ones(args.batch_size, args.question_tokens, dtype=torch.int64),
        "labels": tokens[:, args.question_tokens :],
        "pixel_values": torch.randn(images, 3, vision.image_size, vision.image_size),
        "image_index": torch.arange(args.batch_size) // args.questions_per_image,
    }


def with_peft(model, plan: str, rank: int):
    """The same weights as plain transformers modules, each part wrapped by PEFT; T and F by requires_grad."""
    from peft import IA3Config, LoraConfig, get_peft_model

    twin = copy.deepcopy(model)
    fp.restore(twin)
    twin.requires_grad_(False)
    for part, treatment in zip(parts_of(twin), plan.split("/")):
        root = part.of(twin)
        if treatment == "T":
            root.requires_grad_(True)
        elif treatment == "LoRA":
            setattr(twin, part.path, get_peft_model(root, LoraConfig(r=rank, lora_alpha=32, target_modules=list(part.lora))))
        elif treatment == "IA3":
            config = IA3Config(target_modules=list(part.ia3), feedforward_modules=list(part.ia3_feedforward))
            setattr(twin, part.path, get_peft_model(root, config))
        elif treatment != "F":
            raise SystemExit(f"bench/steps.py compares F, T, LoRA and IA3; not {treatment}")
    return twin


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def step(model, optimizer, inputs) -> float:
    loss = model(**inputs).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def compare(base, plan: str, args) -> list[dict]:
    """Rows of one plan: PEFT first, then ours."""
    ours = copy.deepcopy(base)
    fp.adapt(ours, plan, **({"r": args.rank} if "LoRA" in plan else {}))
    rivals = {"transformers + PEFT": with_peft(base, plan, args.rank), "fastpeft": ours}
    inputs = dict.fromkeys(rivals, batch_of(base, args))
    if plan.startswith("F/"):
        with torch.no_grad():
            embeds = base.encode_images(inputs["fastpeft"]["pixel_values"])
        rivals["fastpeft, cached"] = ours
        inputs["fastpeft, cached"] = {k: v for k, v in inputs["fastpeft"].items() if k != "pixel_values"} | {"image_embeds": embeds}
    rows, optimizers = {}, {}
    for name, model in rivals.items():
        without_dropout(model).eval()
        with measure(model) as cost:
            loss = model(**inputs[name]).loss
            loss.backward()
        rows[name] = {"plan": plan, "what": name, "loss": loss.item(), "saved_bytes": cost.saved_bytes, "seconds": []}
        rows[name]["flops_per_sample"] = cost.flops / args.batch_size
        model.zero_grad(set_to_none=True)
        del loss
        optimizers[name] = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    reference = rows["transformers + PEFT"]
    padded = not bool(inputs["fastpeft"]["attention_mask"].all())
    for row in rows.values():
        if not padded and abs(row["loss"] - reference["loss"]) > 1e-4 * abs(reference["loss"]):
            raise SystemExit(f"{plan}: loss {row['loss']} against {reference['loss']}: not the same computation, nothing is timed")
    for round_ in range(args.rounds + 1):
        for name, model in rivals.items():
            began = time.perf_counter()
            step(model, optimizers[name], inputs[name])
            if round_:  # the first is a warm-up
                rows[name]["seconds"].append(time.perf_counter() - began)
    for row in rows.values():
        row["seconds"] = statistics.median(row["seconds"])
        row["samples_per_second"] = args.batch_size / row["seconds"]
        row["speedup"] = reference["seconds"] / row["seconds"]
        row["flops_ratio"] = reference["flops_per_sample"] / row["flops_per_sample"]
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="miss")
    parser.add_argument("--plans", nargs="+", default=["F/LoRA/LoRA", "T/LoRA/LoRA", "LoRA/LoRA/LoRA"])
    parser.add_argument("--data", help="a VQA folder; default: random tokens and pixels of the sizes below")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--questions-per-image", type=int, default=1)
    parser.add_argument("--question-tokens", type=int, default=20)
    parser.add_argument("--answer-tokens", type=int, default=6)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    base = fp.build(args.model, pretrained=False)
    rows = []
    print("| plan | what | GF/sample | saved MB | s/step | samples/s | speed-up |\n|---|---|---|---|---|---|---|")
    for plan in args.plans:
        for row in compare(base, plan, args):
            rows.append(row)
            figures = f"{row['flops_per_sample'] / 1e9:.1f} | {row['saved_bytes'] / 1e6:.0f} | {row['seconds']:.2f}"
            print(f"| {plan} | {row['what']} | {figures} | {row['samples_per_second']:.2f} | {row['speedup']:.2f}x |", flush=True)
    if args.json:
        about = {"model": args.model, "batch_size": args.batch_size, "questions_per_image": args.questions_per_image}
        about |= {"question_tokens": args.question_tokens, "answer_tokens": args.answer_tokens, "rank": args.rank, "data": bool(args.data)}
        about |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpus": os.cpu_count(), "date": time.strftime("%Y-%m-%d")}
        args.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
