"""Training steps of a LLaMA-shaped model: each method over the frozen model's forward and dx, and against what is used today.

    python bench/steps_llama.py [--tokens 256] [--batch 4] [--layers 8] [--rounds 5]

C = 1024, 16 heads, FFN 2752, float32, rows of equal length, the last quarter labelled; one thread, its CPU time, interleaved,
the least of the rounds. ``literal``: Excitor as its paper writes it, a second score matrix added to the first. Losses are compared first.
Writes bench/results/steps_llama_cpu.json.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import platform
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import fastpeft as fp
from fastpeft.files import write_json
from fastpeft.train.profile import measure

RESULTS = Path(__file__).parent / "results" / "steps_llama_cpu.json"


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
            s = (hidden_states @ b.w_down.T @ b.w_up.T) @ b.prompt.T * b.scale
            scores = scores + b.gate.view(1, -1, 1, 1) * (q @ heads(s.softmax(-1) @ b.prompt).mT * a.scaling)
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 256), ("batch", 4), ("layers", 8), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": args.layers, "num_attention_heads": 16}
    base = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=1000, use_cache=False))
    ids = torch.randint(0, 1000, (args.batch, args.tokens))
    labels = torch.where(torch.arange(args.tokens) >= args.tokens * 3 // 4, ids, -100)
    inputs = {"input_ids": ids}
    embeds = {"inputs_embeds": base.model.embed_tokens(ids).detach().requires_grad_(True)}
    routed = inputs | {"modality": torch.arange(args.batch) % 2, "modality_embeds": tuple(torch.randn(2, 1024))}
    given = {"frozen": embeds, "frozen, transformers": embeds, "MMAdapter": routed}
    runs = {name: (model.train(), given.get(name, inputs)) for name, model in models(base).items()}
    rows = {}
    for name, (model, given) in runs.items():
        with measure(model) as cost:
            loss = model(labels=labels, **given).loss
            loss.backward()
        rows[name] = {"loss": float(loss.detach()), "flops": cost.flops, "saved_bytes": cost.saved_bytes, "seconds": []}
    for mine, theirs in (("Excitor", "Excitor, literal"), ("frozen", "frozen, transformers"), ("LoRA", "LoRA, PEFT")):
        if theirs in rows and abs(rows[mine]["loss"] - rows[theirs]["loss"]) > 1e-4 * rows[theirs]["loss"]:
            raise SystemExit(f"{mine} and {theirs} differ: {rows[mine]['loss']} and {rows[theirs]['loss']}; nothing was timed")
    for _ in range(args.rounds):
        for name, (model, given) in runs.items():
            model.zero_grad(set_to_none=True)
            began = time.thread_time()
            model(labels=labels, **given).loss.backward()
            rows[name]["seconds"].append(time.thread_time() - began)
    frozen = min(rows["frozen"]["seconds"])
    print(f"{'':>22} {'s':>7} {'over frozen':>12} {'GFLOP':>9} {'kept, MB':>9}")
    for name, row in rows.items():
        row["over_frozen"] = min(row["seconds"]) / frozen
        told = f"{min(row['seconds']):7.2f} {row['over_frozen']:12.3f} {row['flops'] / 1e9:9.1f} {row['saved_bytes'] / 1e6:9.1f}"
        print(f"{name:>22} {told}")
    about = {"date": str(datetime.date.today()), "cpu": platform.processor() or platform.machine(), "threads": 1, "shape": shape}
    about |= {"batch": args.batch, "tokens": args.tokens, "torch": torch.__version__, "rows": rows}
    write_json(RESULTS.with_stem(f"{RESULTS.stem}_{args.tokens}"), about)


if __name__ == "__main__":
    main()
