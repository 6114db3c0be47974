"""Calls for fuzz_dropin.py: batches, masks, positions, labels and flags, drawn."""

from __future__ import annotations

import inspect
import random
from typing import Any

import torch
from tiny_models import PAD, V
from torch import Tensor, nn


def draw_call(kind: str, model: nn.Module, batches: Any, draw: random.Random) -> dict[str, Any]:
    """Keywords of one call of the model's forward."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = inspect.signature(inner.forward).parameters
    generator = torch.Generator().manual_seed(draw.randrange(10**6))
    if kind == "vision-language":
        call = dict(batches(draw.choice(("full", "padded", "left"))))
        return call | flags(known, draw)
    rows, length = draw.choice((1, 2, 3, 4)), draw.choice((2, 3, 5, 9, 12))
    if kind == "image":
        size = getattr(inner.config, "image_size", 16)
        size = size if isinstance(size, int) else 16
        call = {
            "pixel_values": torch.randn(
                rows, getattr(inner.config, "num_channels", 3), size, size, generator=generator, dtype=torch.float64
            )
        }
        return call | {"labels": torch.arange(rows) % 3} | flags(known, draw)
    ids = torch.randint(3, V, (rows, length), generator=generator)
    mask = padding(rows, length, draw, generator)
    call: dict[str, Any] = {"input_ids": ids.masked_fill(mask == 0, PAD) if draw.random() < 0.7 else ids}
    form = draw.choice(("long", "long", "long", "bool", "none", "float", "4d", "packed"))
    positions = None
    if form == "packed" and kind == "causal":
        starts = (torch.rand(rows, length, generator=generator) < 0.3).long()
        starts[:, 0] = 1
        at = torch.arange(length).expand(rows, length)
        positions = at - (at * starts).cummax(1).values
        mask = torch.ones_like(mask)
        if draw.random() < 0.3:
            call["attention_mask"] = mask
    elif form == "4d" and kind == "causal":
        causal = torch.ones(length, length).tril().bool() & mask[:, None, None].bool() | torch.eye(length).bool()
        call["attention_mask"] = (
            causal
            if draw.random() < 0.5
            else torch.zeros(causal.shape, dtype=torch.float64).masked_fill(~causal, torch.finfo(torch.float64).min)
        )
    elif form != "none":
        call["attention_mask"] = {"bool": mask.bool(), "float": mask.double()}.get(form, mask)
    if "position_ids" in known and positions is None and draw.random() < 0.15:
        positions = draw.choice(
            (mask.cumsum(1).sub(1).clamp(min=0), torch.arange(length)[None], torch.randint(0, 40, (rows, length), generator=generator))
        )
    if positions is not None and "position_ids" in known:
        call["position_ids"] = positions
    call |= labels(kind, ids, mask, draw, generator)
    if kind == "seq2seq" and draw.random() < 0.3:
        call["decoder_attention_mask"] = padding(rows, call["labels"].shape[1], draw, generator)
    if "inputs_embeds" in known and draw.random() < 0.15 and kind != "seq2seq":
        width = inner.get_input_embeddings().weight.shape[1]
        call["inputs_embeds"] = torch.randn(rows, length, width, generator=generator, dtype=torch.float64)
        del call["input_ids"]
    if "token_type_ids" in known and draw.random() < 0.3:
        call["token_type_ids"] = torch.randint(0, 2, (rows, length), generator=generator)
    if "num_items_in_batch" not in known and "kwargs" in known and kind == "causal" and draw.random() < 0.15:
        call["num_items_in_batch"] = draw.choice((7, torch.tensor(11)))
    if "logits_to_keep" in known and "labels" not in call:
        call["logits_to_keep"] = draw.choice((0, 1, 2))
    return call | flags(known, draw)


def padding(rows: int, length: int, draw: random.Random, generator: torch.Generator) -> Tensor:
    kind = draw.choice(("none", "right", "left", "middle", "random", "row"))
    at, gone = torch.arange(length), torch.randint(0, length, (rows, 1), generator=generator)
    mask = torch.ones(rows, length, dtype=torch.long)
    if kind == "right":
        mask = (at < length - gone).long()
    elif kind == "left":
        mask = (at >= gone).long()
    elif kind == "middle":
        mask = ((at < gone) | (at > gone + 1)).long()
    elif kind == "random":
        mask = (torch.rand(rows, length, generator=generator) < 0.6).long()
    elif kind == "row":
        mask[draw.randrange(rows)] = 0
    return mask


def labels(kind: str, ids: Tensor, mask: Tensor, draw: random.Random, generator: torch.Generator) -> dict[str, Tensor]:
    rows = len(ids)
    if draw.random() < 0.08:
        return {} if kind != "seq2seq" else {"labels": torch.randint(3, V, (rows, 4), generator=generator)}
    if kind == "sequence":
        return {"labels": torch.randint(0, 3, (rows,), generator=generator)}
    made = torch.randint(0, 3, ids.shape, generator=generator) if kind == "token" else ids.clone()
    if kind == "seq2seq":
        made = torch.randint(3, V, (rows, draw.choice((1, 3, 6))), generator=generator)
        mask = torch.ones_like(made)
    layout = draw.choice(("all", "real", "real", "tail", "random", "one", "row", "none", "padding too", "last"))
    keep = torch.ones_like(made, dtype=torch.bool)
    if layout == "real":
        keep = mask.bool()
    elif layout == "tail":
        keep = mask.bool() & (torch.arange(made.shape[1]) >= made.shape[1] // 2)
    elif layout == "random":
        keep = torch.rand(made.shape, generator=generator) < 0.4
    elif layout == "one":
        keep = torch.zeros_like(keep)
        keep[0, -1] = True
    elif layout == "row":
        keep[draw.randrange(rows)] = False
    elif layout == "none":
        keep = torch.zeros_like(keep)
    elif layout == "last":
        keep = torch.zeros_like(keep)
        keep[:, -1] = True
    return {"labels": made.masked_fill(~keep, -100)}


def flags(known: Any, draw: random.Random) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, share in (("output_hidden_states", 0.15), ("output_attentions", 0.1), ("output_router_logits", 0.1)):
        if draw.random() < share and (name in known or "kwargs" in known):
            made[name] = True
    if draw.random() < 0.15:
        made["return_dict"] = False
    if ("use_cache" in known or "kwargs" in known) and draw.random() < 0.3:
        made["use_cache"] = draw.random() < 0.5
    return made
