"""Training steps of a LLaMA-shaped model: each method over the frozen model's forward and dx, and against what is used today.

    python bench/steps_llama.py [--tokens 256] [--batch 4] [--layers 8] [--rounds 5] [--device cuda --dtype bf16 --size 7b]

C = 1024, 16 heads, FFN 2752 (7b: LLaMA-7B's 4096, 32, 11008), rows of equal length, the last quarter labelled; interleaved, the least of
the rounds. On the CPU one thread and its CPU time, on CUDA until the device is done. ``literal``: Excitor as its paper writes it, a second
score matrix added to the first. Losses are compared first. Writes steps_llama_DEVICE_TOKENS.json to $OUT, or bench/results.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import os
import platform
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import fastpeft as fp
from bench.pieces import say
from fastpeft.cost.profile import measure
from fastpeft.files import write_json

SIZES = {
    "small": {"hidden_size": 1024, "intermediate_size": 2752, "num_attention_heads": 16, "vocab_size": 1000},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class LiteralAttention(nn.Module):
    """Equations 1-9 with both score matrices formed; ``block`` has Excitor's parameters (None: plain attention)."""

    def __init__(self, theirs: nn.Module, block: nn.Module | None):
        super().__init__()
        self.theirs, self.block = theirs, block

    def forward(self, hidden_states: Tensor, position_embeddings=None, attention_mask=None, **kwargs):
        a, heads = self.theirs, lambda t: t.unflatten(-1, (-1, self.theirs.head_dim)).transpose(1, 2)
        q, k, v = (heads(linear(hidden_states)) for linear in (a.q_proj, a.k_proj, a.v_proj))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        scores = q @ k.mT * a.scaling
        if (b := self.block) is not None:
            w_down, w_up, prompt, gate = (p.to(q.dtype) for p in (b.w_down, b.w_up, b.prompt, b.gate))
            s = (hidden_states @ w_down.T @ w_up.T) @ prompt.T * b.scale
            scores = scores + gate.view(1, -1, 1, 1) * (q @ heads(s.softmax(-1) @ prompt).mT * a.scaling)
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
        return a.o_proj((weights @ v).transpose(1, 2).flatten(2)), None


def literal(base: nn.Module, excited: nn.Module) -> nn.Module:
    model = copy.deepcopy(base).requires_grad_(False)
    for mine, layer in zip(excited.model.layers, model.model.layers):
        layer.self_attn = LiteralAttention(layer.self_attn, copy.deepcopy(getattr(mine.self_attn, "excitor", None)))
    return model


def models(base: nn.Module) -> dict[str, nn.Module]:
    """By name; each trains what it says, "frozen" nothing."""
    found = {"frozen": copy.deepcopy(base).requires_grad_(False)}
    fp.optimize(found["frozen"])
    for plan in ("Excitor", "LoRA", "IA3", "LayerNorm", "MMAdapter"):
        found[plan] = copy.deepcopy(base)
        fp.optimize(found[plan])
        fp.adapt(found[plan], plan)
    found["Excitor, literal"] = literal(base, found["Excitor"])
    found["frozen, transformers"] = copy.deepcopy(base).requires_grad_(False)
    try:
        import peft
    except ImportError:
        return found
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    found["LoRA, PEFT"] = peft.get_peft_model(copy.deepcopy(base), config)
    return found


def clock(device: str) -> float:
    if device == "cpu":
        return time.thread_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 256), ("batch", 4), ("layers", 8), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--lines", action="store_true", help="tell each row as a line of JSON, and write no file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = SIZES[args.size] | {"num_hidden_layers": args.layers}
    with torch.device(args.device):
        base = LlamaForCausalLM(LlamaConfig(**shape, use_cache=False)).to(DTYPES[args.dtype])
    ids = torch.randint(0, shape["vocab_size"], (args.batch, args.tokens))
    # labels stay on the host, as a collator leaves them
    labels = torch.where(torch.arange(args.tokens) >= args.tokens * 3 // 4, ids, -100)
    inputs = {"input_ids": ids.to(args.device)}
    ids = inputs["input_ids"]
    embeds = {"inputs_embeds": base.model.embed_tokens(ids).detach().requires_grad_(True)}
    modalities = tuple(torch.randn(2, shape["hidden_size"]).to(base.model.embed_tokens.weight))
    routed = inputs | {"modality": torch.arange(args.batch) % 2, "modality_embeds": modalities}
    theirs = {"labels": labels.to(args.device)}
    given = {"frozen": embeds, "frozen, transformers": embeds, "MMAdapter": routed}
    ours = ("frozen", "Excitor", "LoRA", "IA3", "LayerNorm", "MMAdapter")
    runs = {
        name: (model.train(), given.get(name, inputs) | ({"labels": labels} if name in ours else theirs))
        for name, model in models(base).items()
    }
    tolerance = 1e-4 if args.dtype == "fp32" else 2e-2
    rows = {}
    for name, (model, given) in runs.items():
        with measure(model) as cost:
            loss = model(**given).loss
            loss.backward()
        rows[name] = {"loss": float(loss.detach()), "flops": cost.flops, "saved_bytes": cost.saved_bytes, "seconds": []}
    for mine, theirs in (("Excitor", "Excitor, literal"), ("frozen", "frozen, transformers"), ("LoRA", "LoRA, PEFT")):
        if theirs in rows and abs(rows[mine]["loss"] - rows[theirs]["loss"]) > tolerance * rows[theirs]["loss"]:
            raise SystemExit(f"{mine} and {theirs} differ: {rows[mine]['loss']} and {rows[theirs]['loss']}; nothing was timed")
    for _ in range(args.rounds):
        for name, (model, given) in runs.items():
            model.zero_grad(set_to_none=True)
            began = clock(args.device)
            model(**given).loss.backward()
            rows[name]["seconds"].append(clock(args.device) - began)
    frozen = min(rows["frozen"]["seconds"])
    print(f"{'':>22} {'s':>7} {'over frozen':>12} {'GFLOP':>9} {'kept, MB':>9}")
    for name, row in rows.items():
        row["over_frozen"] = min(row["seconds"]) / frozen
        told = f"{min(row['seconds']):7.2f} {row['over_frozen']:12.3f} {row['flops'] / 1e9:9.1f} {row['saved_bytes'] / 1e6:9.1f}"
        print(f"{name:>22} {told}")
        if args.lines:
            say({"case": name, **row})
    about = {"date": str(datetime.date.today()), "cpu": platform.processor() or platform.machine(), "threads": 1, "shape": shape}
    about |= {"gpu": torch.cuda.get_device_name()} if args.device == "cuda" else {}
    about |= {"batch": args.batch, "tokens": args.tokens, "dtype": args.dtype, "torch": torch.__version__, "rows": rows}
    if args.lines:
        return say({"case": "about", **{name: value for name, value in about.items() if name != "rows"}})
    folder = Path(os.environ.get("OUT") or Path(__file__).parent / "results")
    write_json(folder / f"steps_llama_{args.device}_{args.tokens}.json", about)


if __name__ == "__main__":
    main()
