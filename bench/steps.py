"""Whole MISS training steps, any plan: fastpeft against transformers + PEFT and others, interleaved in one run on the same batch.

    python -m bench steps [--model miss] [--plans F/LoRA/LoRA T/LoRA/LoRA] [--data FOLDER] [--batch-size 20] [--out FILE.json]

Losses and lengths of gradients are compared before anything is timed, without dropout; steps are timed with each rate of --dropout. FLOPs
and saved bytes are exact; seconds are medians of forward, backward and update. Rivals (--rivals, the first is the baseline of all ratios):

    peft       transformers' own modules wrapped by PEFT, eager: what BLIP has. Its lost cross-attention mask is put right, at no cost, so
               that padded questions give everyone the same loss
    sdpa       the same with scaled_dot_product_attention, which transformers' BLIP does not offer: put in by hand
    compile    the same as peft, through torch.compile (within --patience seconds)
    layers     the same as peft, each of its layers through torch.compile
    full       full tuning (T in every part), transformers, eager
    fastpeft   fastpeft: each image once; where the image encoder is frozen, on features (or question states) kept from an earlier visit
    graphed    the same as fastpeft, as the trainer runs it on CUDA: batches padded to sizes that many share, a step as two CUDA graphs
    uncached   fastpeft without kept features (the plans with a frozen encoder)
    ungrouped  fastpeft, the image (or its features) once per question (--questions-per-image above 1)
    off        fastpeft with both switched off
    frozen     the frozen model on fastpeft: forward and the gradient of activations alone

A rival whose step would take more than --memory runs the batch in micro-batches, which the table says; loss and gradients are the same.
On a GPU all rivals run in one process (bench/inside.py), one after another, each told at once, and what a trace shows is in the table.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from concurrent.futures import Executor, Future
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

import fastpeft as fp
from bench import frame, inside
from bench.pieces import say
from bench.rivals import GraphedMissStep, MissStep, at_rate
from fastpeft.data import EpochSampler, Preprocess, VQACollator, VQADataset, load_samples, train_tokenizer
from fastpeft.features.frozen_stages import QuestionStates, longest_frozen_stages
from fastpeft.models import parts_of
from fastpeft.plan import plan_for
from fastpeft.verify.baseline import scatter_adapters, without_dropout

INPUTS = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask", "labels", "pixel_values", "image_index")
TOLERANCES = {"fp32": 1e-4, "bf16": 3e-2}
# key: name, form, cached, grouped, compiled, computes what the plan does
RIVALS = {
    "peft": ("transformers + PEFT", "peft", False, False, "", True),
    "sdpa": ("transformers + PEFT, SDPA put in by hand", "peft_sdpa", False, False, "", True),
    "compile": ("transformers + PEFT, torch.compile", "peft", False, False, "whole", True),
    "layers": ("transformers + PEFT, torch.compile of its layers", "peft", False, False, "layers", True),
    "full": ("full tuning, transformers", "full", False, False, "", False),
    "fastpeft": ("fastpeft", "ours", True, True, "", True),
    "graphed": ("fastpeft, CUDA graphs", "graphed", True, True, "", True),
    "uncached": ("fastpeft, no features kept", "ours", False, True, "", True),
    "ungrouped": ("fastpeft, images not grouped", "ours", True, False, "", True),
    "off": ("fastpeft, all switched off", "ours", False, False, "", True),
    "frozen": ("frozen, forward + dx", "frozen", True, True, "", False),
}


def batch_of(model: nn.Module, args) -> dict[str, torch.Tensor]:
    """A batch of real questions where there is a data folder, else of random tokens and pixels, without padding."""
    vision, text = model.config.vision_config, model.config.text_config
    if args.data:
        samples = load_samples(args.data)
        tokenizer = train_tokenizer([t for s in samples for t in (s.question, s.answer)], vocab_size=min(4096, text.vocab_size))
        dataset = VQADataset(samples, Preprocess(vision.image_size, (0.5,) * 3, (0.5,) * 3))
        sampler = EpochSampler(dataset, args.batch_size, questions_per_image=args.questions_per_image)
        batch = VQACollator(tokenizer)(dataset.__getitems__(next(iter(sampler))))
        return {name: batch[name] for name in INPUTS}
    images = -(-args.batch_size // args.questions_per_image)
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch_size, args.question_tokens + args.answer_tokens)
    tokens = torch.randint(10, text.vocab_size - 10, shape, generator=generator)
    return {
        "input_ids": tokens[:, : args.question_tokens],
        "attention_mask": torch.ones(args.batch_size, args.question_tokens, dtype=torch.int64),
        "labels": tokens[:, args.question_tokens :],
        "pixel_values": torch.randn(images, 3, vision.image_size, vision.image_size, generator=generator),
        "image_index": torch.arange(args.batch_size) // args.questions_per_image,
    }


def chosen(plan: str, batch: dict[str, torch.Tensor], args, held, dropout: float = 0.0) -> tuple[list[frame.Rival], dict[str, str]]:
    """The rivals that make sense for a plan and a batch, and why the others do not."""
    cachable, groupable = plan.startswith("F/"), len(batch["pixel_values"]) < len(batch["image_index"])
    useless = {}
    if not cachable:
        useless["uncached"] = "the image encoder is trained: no features are kept anyway"
    if not groupable:
        useless["ungrouped"] = "every question has an image of its own"
    if cachable != groupable:
        useless["uncached" if cachable else "ungrouped"] = f"there is one saving to switch off: see {RIVALS['off'][0]!r}"
    elif not cachable:
        useless["off"] = "there is nothing to switch off"
    if torch.device(args.device).type != "cuda":
        useless["graphed"] = f"there are no CUDA graphs on {args.device}"
    rivals, left_out = [], {}
    for key in args.rivals:
        name, form, cached, grouped, compiled, same = RIVALS[key]
        if key in useless:
            left_out[name] = useless[key]
            continue
        make = GraphedMissStep if form == "graphed" else MissStep
        options = {"form": "ours" if form == "graphed" else form, "cached": cached and cachable, "grouped": grouped, "compiled": compiled}
        options |= {"device": args.device, "dropout": dropout}
        patience = args.patience if compiled else 1800.0
        rivals.append(frame.Rival(name, make, options | {"held": held, "memory": args.memory * 1e9}, same, patience))
    return rivals, left_out


def kept_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What stands in for the work of frozen stages: the images' features, or the questions' states."""
    features = torch.cat([model.encode_images(image[None]) for image in batch["pixel_values"]])
    if longest_frozen_stages(model) is not QuestionStates:
        return {"image_embeds": features}
    return {"question_states": model.encode_questions(batch["input_ids"], batch["attention_mask"], features, batch["image_index"])}


def prepared(base: nn.Module, plan: str, args) -> tuple[nn.Module, dict[str, Any]]:
    """The adapted model, without dropout, its adapters where they change something, and its batch."""
    torch.manual_seed(0)
    model = fp.adapt(base, plan_for(parts_of(base), plan, r=args.rank))
    scatter_adapters(without_dropout(model), 0.01)
    batch = batch_of(model, args)
    return model, batch | {"pixel_values": batch["pixel_values"].to(next(base.vision_model.parameters()).dtype)}


def compare(base: nn.Module, plan: str, args, dropout: float = 0.0) -> tuple[list[frame.Row], dict[str, str]]:
    """Rows of one plan, its steps timed with ``dropout``."""
    model, batch = prepared(base, plan, args)
    held = {"model": model, "batch": batch}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "step.pt"
        rivals, left_out = chosen(plan, batch, args, file, dropout)
        if any(rival.options["cached"] for rival in rivals):
            with torch.no_grad():
                held["kept"] = kept_of(model, batch)
        torch.save(held, file)
        held.clear()
        run = {"samples": args.batch_size, "rounds": args.rounds, "device": args.device, "memory": args.memory * 1e9}
        rows, failed = frame.run(rivals, tolerance=TOLERANCES[args.dtype], **run)
    return rows, left_out | failed


def compare_inside(base: nn.Module, plan: str, args, pool: Executor) -> tuple[list[inside.CaseRow], dict[str, str]]:
    """Rows of one plan with each rate of dropout; the model lies on the GPU."""
    model, batch = prepared(base, plan, args)
    held = {"model": model, "batch": {name: t.to(args.device) for name, t in batch.items()}}
    rivals, left_out = chosen(plan, batch, args, held)
    guesses = {rival.name: found for rival in rivals if (found := guess(pool, plan, args, rival)) is not None}
    if any(rival.options["cached"] for rival in rivals):
        with torch.no_grad():
            held["kept"] = kept_of(model, held["batch"])
    how = {"samples": args.batch_size, "rounds": args.rounds, "device": args.device, "tolerance": TOLERANCES[args.dtype]}
    rows, failed = inside.run(rivals, tuple(map(at_rate, args.dropout)), **how, tell=lambda case: args.lines and say({"plan": plan} | case))
    return inside.with_estimates(rows, guesses), left_out | failed


def guess(pool: Executor, plan: str, args, rival: frame.Rival) -> Future | None:
    """The peak that ``fastpeft estimate`` gives for a rival's step; None where it does not say."""
    form, cached, grouped = (rival.options[name] for name in ("form", "cached", "grouped"))
    if form not in ("ours", "peft") or rival.options["compiled"] or args.data:
        return None
    how = {"batch_size": args.batch_size, "seq_len": args.question_tokens, "answer_len": args.answer_tokens, "dtype": args.dtype}
    how |= {"questions_per_image": args.questions_per_image if grouped else 1, "feature_cache": cached, "optimized": form == "ours"}
    make = partial(fp.build, args.model, pretrained=False, device="meta", **overrides(args))
    return pool.submit(inside.estimated, make, plan, r=args.rank, **how)


def overrides(args) -> dict[str, Any]:
    """What of the model's configuration is not its own."""
    return {} if args.image_size is None else {"image_size": args.image_size}


def table(plan: str, dropout: float | None, rows: list[frame.Row], left_out: dict[str, str], args) -> str:
    """Markdown; ``dropout`` None: the rows say theirs."""
    notes = [f"- left out: {name}: {why}" for name, why in left_out.items()]
    title = f"**{args.model}, {plan}**, {args.batch_size} questions, {args.questions_per_image} per image, {args.dtype}"
    title += f", dropout {dropout:g}" if dropout else ""
    return "\n".join([title, "", (inside if dropout is None else frame).markdown(rows), "", *notes])


def main(argv: list[str] | None = None) -> int:
    doc = __doc__.split("\n\n    python")[0]
    about = __doc__.partition("Rivals (")[2]
    parser = argparse.ArgumentParser(
        prog="python -m bench steps", description=doc, epilog=f"Rivals ({about}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="miss", help="miss or miss-tiny")
    parser.add_argument("--image-size", type=int, help="in place of the model's own")
    parser.add_argument("--plans", nargs="+", default=["F/LoRA/LoRA", "T/LoRA/LoRA", "LoRA/LoRA/LoRA"])
    uncompiled = [key for key, rival in RIVALS.items() if not rival[4]]
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=uncompiled, metavar="RIVAL")
    parser.add_argument("--data", help="a VQA folder; default: random tokens and pixels of the sizes below")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--questions-per-image", type=int, default=1)
    parser.add_argument("--question-tokens", type=int, default=20)
    parser.add_argument("--answer-tokens", type=int, default=6)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0], help="rates of the steps that are timed, one table each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each rival")
    parser.add_argument("--threads", type=int, help="of torch; its own choice by default")
    free = "GB a step may take before it runs in micro-batches (default: half of what is free; on a GPU it never does)"
    parser.add_argument("--memory", type=float, help=free)
    parser.add_argument("--patience", type=float, default=300.0, help="seconds that torch.compile may take")
    parser.add_argument("--out", type=Path, help="JSON file to write; a Markdown file of the same name beside it")
    parser.add_argument("--lines", action="store_true", help="tell each plan's rows as a line of JSON at once")
    parser.add_argument("--json", action="store_true", help="print the JSON object as the last line")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    on_gpu = torch.device(args.device).type == "cuda"
    args.memory = args.memory or (math.inf if on_gpu else psutil.virtual_memory().available / 2e9)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    hidden = ("out", "json", "lines")
    told = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items() if name not in hidden}
    report, tables = {"options": told, "machine": frame.about_machine(), "rows": [], "left_out": {}}, []
    try:
        with inside.meanwhile() as pool:
            for plan, dropout in product(args.plans, [None] if on_gpu else args.dropout):
                began = time.perf_counter()
                base = fp.build(args.model, pretrained=False, dtype=dtype, device=args.device, **overrides(args))
                rows, left_out = compare_inside(base, plan, args, pool) if on_gpu else compare(base, plan, args, dropout)
                found = [{"plan": plan} | row.to_dict() | ({} if on_gpu else {"dropout": dropout}) for row in rows]
                report["rows"] += found
                report["left_out"][plan] = left_out
                if args.lines:
                    say({"case": f"{plan}, table", "rows": found, "left_out": left_out})
                tables.append(table(plan, dropout, rows, left_out, args))
                print(f"{tables[-1]}\n({time.perf_counter() - began:.0f} s)\n", flush=True)
    except ValueError as error:
        print(f"bench steps: {error}", file=sys.stderr)
        return 2
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        args.out.with_suffix(".md").write_text("\n\n".join(tables) + "\n")
    if args.json:
        print(json.dumps(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
