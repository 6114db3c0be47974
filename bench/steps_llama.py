"""Training steps of a LLaMA-shaped model: LoRA against PEFT's, and each method over the frozen model's forward and dx.

    python bench/steps_llama.py [--tokens 256] [--batch 4] [--layers 8] [--rounds 5] [--device cuda --dtype bf16 --size 7b]

C = 1024, 16 heads, FFN 2752 (7b: LLaMA-7B's 4096, 32, 11008), the last quarter of each sample labelled: rows of equal length and, on a
GPU, rows of 35 to 100 % of it. Whole steps: forward, backward, AdamW. On the CPU one thread and its CPU time, the least of the rounds; on
CUDA as bench/inside.py has it. Losses and gradients are compared before a step is timed. PEFT's model has transformers' sdpa attention,
and attention_mask only where there is padding. Rivals:

    peft        adapters in float32, as PEFT makes them        peft16     adapters in the base's dtype
    compile     peft through torch.compile (--patience each), its layers, then all of it as a whole
    liger       peft with Liger's kernels, where they are installed
    lora        fastpeft, its logits read by nobody            readable   fastpeft as a drop-in: logits can be read
    graphed     lora as CUDA graphs
    methods     frozen (the model trains nothing and hands the gradient down), Excitor, IA3, LayerNorm, MMAdapter, Excitor as its paper
                writes it (literal), transformers' frozen model

Writes steps_llama_DEVICE_TOKENS.json to $OUT, or bench/results; --lines tells every rival's line at once instead.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
from concurrent.futures import Executor, Future
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bench import inside
from bench.frame import Rival
from bench.pieces import say
from bench.rivals_llama import FULL, PADDED, SIZES, GraphedLlamaStep, LlamaStep, base_of, batch_of
from fastpeft.files import write_json

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FROZEN = "frozen"
# key: [(name, runner, form, plan, what else is told to the runner)]
RIVALS = {
    "peft": [("LoRA, PEFT", LlamaStep, "theirs", "LoRA", {})],
    "lora": [("LoRA, logits unread", LlamaStep, "ours", "LoRA", {"lean": True})],
    "graphed": [("LoRA, CUDA graphs", GraphedLlamaStep, "ours", "LoRA", {"lean": True})],
    "readable": [("LoRA", LlamaStep, "ours", "LoRA", {})],
    "peft16": [("LoRA, PEFT, adapters in 16 bit", LlamaStep, "theirs_in_16_bit", "LoRA", {})],
    "liger": [("LoRA, PEFT, Liger", LlamaStep, "liger", "LoRA", {})],
    "compile": [
        (f"LoRA, PEFT, torch.compile of {'its ' * (how == 'layers')}{how}", LlamaStep, "theirs", "LoRA", {"compiled": how})
        for how in ("layers", "whole")
    ],
    "methods": [
        (FROZEN, LlamaStep, "ours", "", {}),
        *((plan, LlamaStep, "ours", plan, {}) for plan in ("Excitor", "IA3", "LayerNorm", "MMAdapter")),
        ("Excitor, literal", LlamaStep, "literal", "Excitor", {}),
        ("frozen, transformers", LlamaStep, "theirs", "", {}),
    ],
}
TWINS = {"Excitor, literal": "Excitor", "frozen, transformers": FROZEN}  # and those that compute the same loss
METHODS = "methods"


def rivals_of(key: str, base: nn.Module, batches: dict[str, dict[str, Tensor]], args) -> list[Rival]:
    patience = args.patience if key == "compile" else 900.0
    return [
        Rival(name, make, {"base": base, "form": form, "plan": plan, "batches": batches} | more, key != METHODS, patience)
        for name, make, form, plan, more in RIVALS[key]
    ]


def guesses_of(pool: Executor, rivals: list[Rival], batches: dict[str, dict[str, Tensor]], args) -> dict[tuple[str, str], Future]:
    """The peaks that ``fastpeft estimate`` gives for our own steps, by name and case."""
    make, how = partial(shape_of, args.size, args.layers), {"batch_size": args.batch, "dtype": args.dtype}
    return {
        (rival.name, case): pool.submit(inside.estimated, make, rival.options["plan"], batch=batch, **how)
        for rival in rivals
        for case, batch in batches.items()
        if rival.options["form"] == "ours" and rival.options["plan"] not in ("", "MMAdapter") and rival.options.get("lean", not rival.same)
    }


def shape_of(size: str, layers: int) -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**SIZES[size], num_hidden_layers=layers))


def measured(base: nn.Module, args, tell) -> tuple[list[inside.CaseRow], dict[str, str]]:
    """Lines of all rivals that are asked for, and why others have none."""
    on_gpu = args.device == "cuda"
    cases = (FULL, PADDED) if on_gpu else (FULL,)
    batches = {case: batch_of(base.config.vocab_size, args.batch, args.tokens, case) for case in cases}
    how = {"samples": args.batch, "rounds": args.rounds, "device": args.device, "least": not on_gpu, "tell": tell}
    how |= {"tolerance": 1e-4 if args.dtype == "fp32" else 2e-2}
    one = {FULL: batches[FULL]}
    groups = [([rival for key in args.rivals if key not in (METHODS, "compile") for rival in rivals_of(key, base, batches, args)], batches)]
    groups += [(rivals_of(METHODS, base, one, args), one)] if METHODS in args.rivals else []
    if "compile" in args.rivals:  # last: it may take all the time there is
        groups += [(rivals_of("compile", base, one, args), one)]
    rows, failed = [], {}
    with inside.meanwhile() as pool:
        found = {}
        if on_gpu:
            for rivals, cases in groups:
                found |= guesses_of(pool, rivals, cases, args)
        for rivals, cases in groups:
            if rivals:
                more, wrong = inside.run(rivals, tuple(cases), **how, baselines=rows)
                rows, failed = rows + more, failed | wrong
        return inside.with_estimates(rows, found), failed


def compared(rows: list[inside.CaseRow], tolerance: float) -> str:
    """'' or which of the TWINS has another loss."""
    loss = {row.what: row.loss for row in rows if row.case == FULL}
    for name, other in TWINS.items():
        if {name, other} <= loss.keys() and not abs(loss[name] - loss[other]) <= tolerance * abs(loss[other]):
            return f"{name} and {other} differ: {loss[name]} and {loss[other]}"
    return ""


def about_run(args) -> dict[str, Any]:
    """What every result is told with."""
    gpu = {"gpu": torch.cuda.get_device_name()} if args.device == "cuda" else {}
    about = {"date": str(datetime.date.today()), "cpu": platform.processor() or platform.machine(), "threads": 1} | gpu
    about |= {"shape": SIZES[args.size] | {"num_hidden_layers": args.layers}, "torch": torch.__version__}
    return about | {"batch": args.batch, "tokens": args.tokens, "dtype": args.dtype}


def with_frozen(rows: list[inside.CaseRow]) -> list[dict[str, Any]]:
    """Lines, with their time over the frozen model's."""
    frozen = next((row.seconds for row in rows if row.what == FROZEN), None)
    return [row.to_dict() | ({"over_frozen": row.seconds / frozen} if frozen and row.case == FULL else {}) for row in rows]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 256), ("batch", 4), ("layers", 8), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, metavar="RIVAL", help="default: all that need no GPU but compile")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds that torch.compile may take")
    parser.add_argument("--lines", action="store_true", help="tell each row as a line of JSON, and write no file")
    args = parser.parse_args(argv)
    args.rivals = args.rivals or [key for key in RIVALS if args.device == "cuda" or key not in ("graphed", "compile", "liger")]
    torch.set_num_threads(1)
    base = base_of(args.size, args.layers, args.device, DTYPES[args.dtype])
    about = about_run(args)
    if args.lines:
        say({"case": "about"} | about)
    rows, failed = measured(base, args, (lambda case: say(case)) if args.lines else (lambda case: None))
    wrong = compared(rows, 1e-4 if args.dtype == "fp32" else 2e-2)
    told = with_frozen(rows)
    print(inside.markdown(rows), *(f"- left out: {name}: {why}" for name, why in failed.items()), wrong, sep="\n", flush=True)
    if args.lines:
        say({"case": "table", "rows": told, "left_out": failed} | ({"failed": wrong} if wrong else {}))
    elif not wrong:
        folder = Path(os.environ.get("OUT") or Path(__file__).parent / "results")
        write_json(folder / f"steps_llama_{args.device}_{args.tokens}.json", about | {"rows": {row["what"]: row for row in told}})
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
