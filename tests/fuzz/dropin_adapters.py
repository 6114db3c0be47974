"""What is trained in fuzz_dropin.py: everything, a subset of the parameters, or PEFT's adapters, drawn."""

from __future__ import annotations

import random
from typing import Any

import peft
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

TASKS = {"ForCausalLM": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM", "LMHeadModel": "CAUSAL_LM"}


OTHERS = (
    ("LoHaConfig", {"r": 2}),
    ("LoKrConfig", {"r": 2}),
    ("VeraConfig", {"r": 4}),
    ("OFTConfig", {"oft_block_size": 4}),
    ("LNTuningConfig", {}),
    ("AdaptionPromptConfig", {"adapter_len": 3, "adapter_layers": 1}),
)


def adapt(model: nn.Module, draw: random.Random) -> tuple[nn.Module, str]:
    """(model, what it trains)."""
    kind = draw.choice(
        ("all", "some", "norms", "heads", "lora", "lora", "lora", "lora", "lora", "ia3", "prompt", "other", "several", "merged")
    )
    names = [name for name, _ in model.named_parameters()]
    if kind == "all":
        return model, kind
    if kind in ("some", "norms", "heads"):
        share = draw.choice((0.05, 0.3, 0.7))
        words = {"norms": ("norm", "ln"), "heads": ("embed", "head", "wte", "score", "classifier")}.get(kind)
        kept = {n for n in names if (any(w in n.lower() for w in words) if words else draw.random() < share)} or {names[-1]}
        for name, p in model.named_parameters():
            p.requires_grad_(name in kept)
        return model, f"{kind} {sorted(kept)[:12]}"
    config = prompt(model, draw) if kind == "prompt" else ia3(model, draw) if kind == "ia3" else lora(model, draw)
    if kind == "other":
        cls, more = draw.choice(OTHERS)
        more = dict(more)
        if "AdaptionPrompt" in cls:
            more["task_type"] = "CAUSAL_LM"
        elif "LN" in cls:
            more["target_modules"] = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if "norm" in type(m).__name__.lower()})
        else:
            more["target_modules"] = targets(model, draw)
        config = getattr(peft, cls)(**more)
    wrapped = peft.get_peft_model(model, config)
    what = str({k: v for k, v in vars(config).items() if v not in (None, False, [], {}, set()) and k in SHOWN})
    if kind in ("several", "merged"):
        wrapped.add_adapter("second", lora(model, draw))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        for p in wrapped.parameters():
            if p.requires_grad:
                p.data = p.data.double() + 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    wrapped = wrapped.double()
    if kind == "several":
        active = draw.choice(("second", ["default", "second"], None))
        if active is None:
            wrapped.base_model.disable_adapter_layers()
        else:
            (wrapped.set_adapter if isinstance(active, str) else wrapped.base_model.set_adapter)(active)
        what += f" and a second, active: {active}"
    elif kind == "merged":
        wrapped.merge_adapter(draw.choice((["default"], ["default", "second"])))
        what += " merged"
    return wrapped, f"{type(config).__name__} {what}"


SHOWN = {
    "r", "lora_alpha", "target_modules", "use_dora", "use_rslora", "bias", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save",
    "layers_to_transform", "trainable_token_indices", "target_parameters", "feedforward_modules", "num_virtual_tokens", "prefix_projection",
}  # fmt: skip


def linear_names(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D | nn.Conv2d)]


def targets(model: nn.Module, draw: random.Random) -> Any:
    last = sorted(
        {name.rsplit(".", 1)[-1] for name in linear_names(model)} - {"lm_head", "classifier", "score", "gate", "router", "0", "1", "2"}
    )
    if draw.random() < 0.25:
        return "all-linear"
    chosen = draw.sample(last, min(len(last), draw.choice((1, 2, 3, 5))))
    embeddings = [name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Embedding)]
    if draw.random() < 0.1 and embeddings:
        chosen.append(draw.choice(embeddings))
    if draw.random() < 0.1 and any(n.endswith("lm_head") for n in linear_names(model)):
        chosen.append("lm_head")
    if draw.random() < 0.15:  # these very layers
        full = [name for name in linear_names(model) if name.rsplit(".", 1)[-1] in chosen]
        chosen = draw.sample(full, max(1, len(full) // 2)) if full else chosen
    return chosen


def lora(model: nn.Module, draw: random.Random) -> peft.LoraConfig:
    chosen = targets(model, draw)
    options: dict[str, Any] = {
        "r": draw.choice((1, 2, 4, 8)),
        "lora_alpha": draw.choice((1, 4, 16)),
        "init_lora_weights": draw.choice((True, False)),
    }
    for name, share in (("use_dora", 0.2), ("use_rslora", 0.2), ("lora_bias", 0.1)):
        options[name] = draw.random() < share
    options["bias"] = draw.choice(("none", "none", "none", "all", "lora_only"))
    if options["lora_bias"] and options["bias"] != "none":
        options["lora_bias"] = False
    if isinstance(chosen, list):
        if draw.random() < 0.2:
            options["rank_pattern"] = {chosen[0]: 3}
        if draw.random() < 0.2:
            options["alpha_pattern"] = {chosen[-1]: 7}
    if draw.random() < 0.1:
        options["layers_to_transform"] = [0]
    if draw.random() < 0.1:
        options["trainable_token_indices"] = [3, 5, 9]
    if draw.random() < 0.15:
        saved = [
            n.rsplit(".", 1)[-1]
            for n, m in model.named_modules()
            if n.endswith(("lm_head", "embed_tokens", "classifier", "score", "wte", "norm"))
        ]
        if saved:
            options["modules_to_save"] = [draw.choice(saved)]
    if draw.random() < 0.1:
        weights = sorted(
            {
                n.rsplit(".", 2)[-2] + "." + n.rsplit(".", 1)[-1]
                for n, p in model.named_parameters()
                if p.dim() in (2, 3) and n.count(".") > 2
            }
        )
        options["target_parameters"] = [draw.choice(weights)]
    return peft.LoraConfig(target_modules=chosen, **options)


def ia3(model: nn.Module, draw: random.Random) -> peft.IA3Config:
    chosen = targets(model, draw)
    if not isinstance(chosen, list):
        chosen = sorted({n.rsplit(".", 1)[-1] for n in linear_names(model)} - {"lm_head"})
    chosen = [name for name in chosen if "embed" not in name and name not in ("wte", "wpe")] or ["o_proj"]
    inside = [name for name in chosen if draw.random() < 0.4]
    return peft.IA3Config(target_modules=chosen, feedforward_modules=inside)


def prompt(model: nn.Module, draw: random.Random) -> peft.PeftConfig:
    name = type(model).__name__
    task = next(
        (task for end, task in TASKS.items() if name.endswith(end)),
        "SEQ_CLS" if "Sequence" in name else "TOKEN_CLS" if "Token" in name else "CAUSAL_LM",
    )
    kind = draw.choice(("PrefixTuningConfig", "PromptEncoderConfig", "PromptTuningConfig", "PrefixTuningConfig"))
    more = {"prefix_projection": draw.random() < 0.3} if "Prefix" in kind else {}
    if more.get("prefix_projection") or "Encoder" in kind:
        more["encoder_hidden_size"] = 16
    return getattr(peft, kind)(task_type=task, num_virtual_tokens=draw.choice((1, 3)), **more)
