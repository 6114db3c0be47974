"""Training steps whose samples share an image: its tokens once in the row, against each sample with its own.

    python -m bench shared [--stacks llava lavin] [--tokens 256 576] [--questions 1 2 5 10] [--text 40] [--data VQA-RAD] [--layers 8]

Stacks of C = 1024, 16 heads, FFN 2752, and a vocabulary of 2,000, so that the head is 2% of 8 layers' weights as it is of LLaMA-7B's:
LLaVA-Med-shaped (LoRA r = 4 on all seven linears) and LaVIN-shaped (MM-Adapter in each layer). A batch: so many questions about one image
of so many tokens, with ``--text`` tokens of question and answer behind it, a quarter of them labelled. With ``--data``, instead, batches
as EpochSampler draws them from the real VQA-RAD, in LLaVA's template, with their own lengths (a tokenizer learnt from the texts). Rivals,
interleaved in one run on the same samples:

    separate   fastpeft without sharing, a padded batch: the baseline of all ratios
    shared     fastpeft, what the samples begin with once
    packed     fastpeft, the samples end to end in one row, nothing shared
    peft       transformers + PEFT, the padded batch (where PEFT has the method)

Losses and lengths of gradients are compared before anything is timed. FLOPs and saved bytes are exact; seconds are the least of the rounds:
one thread and its CPU time, or on CUDA until the device is done. Writes shared_DEVICE.json and .md to $OUT, or bench/results.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import platform
import time
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fastpeft as fp
from fastpeft.cost.profile import measure
from fastpeft.data import CausalCollator, CausalDataset, EpochSampler, Instruction, load_instructions, train_causal_tokenizer
from fastpeft.files import write_json
from fastpeft.fused.head.outputs import lean_logits
from fastpeft.labels import IGNORE_INDEX
from fastpeft.verify.baseline import scatter_adapters, with_peft, without_dropout

SHAPE = {"hidden_size": 1024, "intermediate_size": 2752, "num_attention_heads": 16, "vocab_size": 2000, "use_cache": False}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STACKS = {"llava": lambda: fp.LoRA(r=4, target_modules=LINEARS), "lavin": lambda: fp.MMAdapter(dropout=0.0)}
RIVALS = ("separate", "shared", "packed", "peft")


def model_of(stack: str, layers: int, device: str) -> nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=layers)).to(device)
    fp.optimize(model)
    fp.adapt(model, llm=STACKS[stack]())
    return scatter_adapters(without_dropout(model), scale=0.02)


def drawn_items(tokens: int, text: int, questions: int) -> list[dict]:
    """Questions about one image, the image's tokens as ids of their own."""
    image = torch.randint(3, SHAPE["vocab_size"], (tokens,))
    sample = Instruction((("", ""),), Path("image"), "drawn", "", 0, Path())
    items = []
    for _ in range(questions):
        ids = torch.cat([image, torch.randint(3, SHAPE["vocab_size"], (text,))])
        labels = ids.masked_fill(torch.arange(len(ids)) < tokens + text - text // 4, IGNORE_INDEX)
        items.append({"sample": sample, "input_ids": ids, "labels": labels})
    return items


def real_batches(folder: str, tokens: int, questions: int, batch_size: int, batches: int) -> list[list[dict]]:
    """VQA-RAD's own, as ``--questions-per-image`` groups them; an image's tokens are ids that no other image has."""
    samples = load_instructions(folder, "vqa", "train")
    tokenizer = train_causal_tokenizer([text for sample in samples for text in sample.turns[0]], SHAPE["vocab_size"])
    data = CausalDataset(samples, tokenizer, "llava", 2048, image_tokens=tokens)
    found, known = [], {}
    for indices in islice(EpochSampler(data, batch_size, questions_per_image=questions), batches):
        items = [data.text_item(i) for i in indices]
        for item in items:
            number = known.setdefault(item["sample"].image, len(known))
            image = torch.randint(3, SHAPE["vocab_size"], (tokens,), generator=torch.Generator().manual_seed(number))
            item["input_ids"] = item["input_ids"].masked_scatter(item["image_mask"], image)
        found.append(items)
    return found


def batch_of(items: list[dict], rival: str, model: nn.Module, stack: str, device: str) -> dict[str, Tensor]:
    """The rival's batch of the items."""
    collate = CausalCollator(0, packed=rival == "packed", share=rival == "shared")
    names = ("input_ids", "labels", "attention_mask", "position_ids", "prefix_lengths")
    stay = () if rival == "peft" else ("labels", "attention_mask", "position_ids", "prefix_lengths")
    batch = {n: t if n in stay else t.to(device) for n, t in collate(items).items() if n in names}
    if stack == "lavin":
        batch["modality"] = torch.ones(len(items), dtype=torch.int64)
        batch["modality_embeds"] = tuple(model.model.embed_tokens.weight[:2].detach())
    return batch


def clock(device: str) -> float:
    if device == "cpu":
        return time.thread_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def step(model: nn.Module, batch: dict[str, Tensor]) -> float:
    model.zero_grad(set_to_none=True)
    with contextlib.nullcontext() if "peft" in type(model).__module__ else lean_logits(model):
        loss = model(**batch).loss
        loss.backward()
    return float(loss.detach())


def case(stack: str, items: list[dict], layers: int, rounds: int, rivals: list[str], device: str) -> dict[str, dict]:
    """Rows by rival."""
    ours = model_of(stack, layers, device)
    models = {name: ours for name in rivals if name != "peft"}
    if "peft" in rivals and stack == "llava":
        models["peft"] = with_peft(ours)[0]
    batches = {name: batch_of(items, name, ours, stack, device) for name in models}
    rows: dict[str, dict] = {}
    for name, model in models.items():
        with measure(model) as cost:
            loss = step(model, batches[name])
        norm = float(torch.stack([p.grad.double().norm() for p in model.parameters() if p.grad is not None]).norm())
        rows[name] = {"loss": loss, "grad_norm": norm, "flops": cost.flops, "saved_bytes": cost.saved_bytes, "seconds_all": []}
        rows[name]["tokens"] = batches[name]["input_ids"].numel()
    first = rows[next(iter(rows))]
    for name, row in rows.items():
        for what in ("loss", "grad_norm"):
            if abs(row[what] - first[what]) > 1e-4 * abs(first[what]):
                raise SystemExit(f"{stack}: {name}'s {what} is {row[what]}, not {first[what]}; nothing was timed")
    for _ in range(rounds):
        for name, model in models.items():
            began = clock(device)
            step(model, batches[name])
            rows[name]["seconds_all"].append(clock(device) - began)
    for row in rows.values():
        row["seconds"] = min(row["seconds_all"])
        row |= {f"{what}_ratio": first[what] / row[what] for what in ("flops", "saved_bytes", "seconds")}
    return rows


def table(cases: list[dict]) -> str:
    lines = ["| case | rival | tokens | GFLOP | fewer | saved MB | fewer | seconds | fewer |", "|---|---|--:|--:|--:|--:|--:|--:|--:|"]
    for one in cases:
        for name, row in one["rows"].items():
            cells = f"{row['flops'] / 1e9:.0f} | {row['flops_ratio']:.2f}x | {row['saved_bytes'] / 1e6:.0f}"
            cells += f" | {row['saved_bytes_ratio']:.2f}x"
            lines.append(f"| {one['case']} | {name} | {row['tokens']} | {cells} | {row['seconds']:.2f} | {row['seconds_ratio']:.2f}x |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    how = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="python -m bench shared", **how)
    parser.add_argument("--stacks", nargs="+", default=list(STACKS), choices=STACKS)
    parser.add_argument("--rivals", nargs="+", default=list(RIVALS), choices=RIVALS)
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 576], help="of an image")
    parser.add_argument("--questions", nargs="+", type=int, default=[1, 2, 5, 10], help="about an image")
    parser.add_argument("--text", type=int, default=40, help="tokens of question and answer")
    parser.add_argument("--data", help="the VQA-RAD folder: its own batches and lengths")
    parser.add_argument("--batch-size", type=int, default=10, help="samples of a batch, with --data")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--name", default="shared", help="of the files")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    about = {"date": str(datetime.date.today()), "cpu": platform.processor() or platform.machine(), "threads": 1}
    about |= {"torch": torch.__version__}
    about |= {"gpu": torch.cuda.get_device_name()} if args.device == "cuda" else {}
    about |= {"shape": SHAPE | {"layers": args.layers}, "rounds": args.rounds, "cases": []}
    folder = Path(os.environ.get("OUT") or Path(__file__).parent / "results")
    for stack in args.stacks:
        for tokens in args.tokens:
            for questions in args.questions:
                torch.manual_seed(1)
                if args.data:
                    (items,), what = real_batches(args.data, tokens, questions, args.batch_size, 1), "VQA-RAD's own"
                else:
                    items, what = drawn_items(tokens, args.text, questions), str(args.text)
                name = f"{stack}, {tokens} + {what} tokens, {questions} per image"
                rows = case(stack, items, args.layers, args.rounds, args.rivals, args.device)
                about["cases"].append({"case": name, "stack": stack, "tokens": tokens, "questions": questions, "rows": rows})
                print(table(about["cases"][-1:]), flush=True)
                write_json(folder / f"{args.name}_{args.device}.json", about)
                (folder / f"{args.name}_{args.device}.md").write_text(table(about["cases"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
