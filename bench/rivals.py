"""The rivals of a MISS step: the same adapted model and the same batch, executed in different ways (see bench/frame.py).

A file holds the model, its batch and, where the image encoder is frozen, what it computed. Each rival maps it into its own process, where
frozen weights stay shared pages of one file.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.blip.modeling_blip import BlipAttention
from transformers.models.blip.modeling_blip_text import BlipTextSelfAttention

import fastpeft as fp
from fastpeft.cost.profile import measure
from fastpeft.fused.outputs import lean_logits
from fastpeft.models import parts_of
from fastpeft.plan import detach
from fastpeft.train.config import TrainConfig
from fastpeft.train.graph import GraphedStep
from fastpeft.train.optimizer import Optimizer
from fastpeft.verify.baseline import plain, with_peft, without_dropout

FEATURES = ("image_embeds", "question_states")  # of a step: they stay on the device, as do pixels
ROOM = 1.3  # a step's peak over what it keeps for backward: temporaries of its widest operator


class VisionSDPA(BlipAttention):
    """transformers' BLIP has eager attention only; this is what its SDPA would be."""

    def forward(self, hidden_states: Tensor, **kwargs) -> tuple[Tensor, None]:
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self.projection(F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2)), None


class TextSDPA(BlipTextSelfAttention):
    """Likewise, without a cache."""

    def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None, **kwargs):
        states, mask = hidden_states, attention_mask
        if encoder_hidden_states is not None:
            states, mask = encoder_hidden_states, encoder_attention_mask
        shape = (self.num_attention_heads, self.attention_head_size)
        q, k, v = (
            linear(x).unflatten(-1, shape).transpose(1, 2)
            for linear, x in ((self.query, hidden_states), (self.key, states), (self.value, states))
        )
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2), None


SDPA = {BlipAttention: VisionSDPA, BlipTextSelfAttention: TextSDPA}


def ours(model: nn.Module) -> nn.Module:
    return model


def peft(model: nn.Module) -> nn.Module:
    return with_peft(model)[0]


def peft_sdpa(model: nn.Module) -> nn.Module:
    twin = peft(model)
    for module in twin.modules():
        module.__class__ = SDPA.get(type(module), type(module))
    return twin


def full(model: nn.Module) -> nn.Module:
    """T in every part, on transformers' own modules."""
    detach(model)
    return plain(model.train().requires_grad_(True))


def frozen(model: nn.Module) -> nn.Module:
    """Nothing is trained, but every part that the plan trains hands the gradient down to its embeddings: the floor of any method."""
    treatments = model.fastpeft_plan.treatments
    trained = [part for part in parts_of(model) if treatments[part.name] != (fp.Frozen(),)]
    detach(model)
    for part in trained:
        root = part.of(model)
        embeddings = next(module for name, module in root.named_modules() if name.rpartition(".")[2] == "embeddings")
        embeddings.register_forward_hook(lambda module, args, output: output.detach().requires_grad_(True))
    return model.train()


FORMS = {form.__name__: form for form in (ours, peft, peft_sdpa, full, frozen)}


def with_dropout(model: nn.Module, p: float) -> None:
    """Every dropout of the model at the rate ``p``, those of its attentions and adapters too; parts that evaluate draw nothing."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
        for name in ("lora_dropout", "attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, p)


class MissStep:
    """One rival's runner. form: of FORMS; cached: features in place of pixels; grouped: each image once, with an index, instead of once
    per question; memory: bytes a step may take, micro-batches otherwise (the same loss and gradients, summed over them).
    dropout: in the steps that are timed; those that are compared have none."""

    def __init__(
        self,
        file: Path,
        form: str,
        *,
        cached: bool,
        grouped: bool,
        memory: float,
        compiled: bool = False,
        device: str = "cpu",
        dropout: float = 0.0,
    ):
        held = torch.load(file, mmap=True, weights_only=False)
        self.model, self.grouped, self.memory, self.compiled = FORMS[form](held["model"]).to(device), grouped, memory, compiled
        batch = dict(held["batch"])
        if cached:
            del batch["pixel_values"]
            batch |= held["kept"]
        self.images = next((name for name in ("pixel_values", "image_embeds") if name in batch), None)  # None: question states instead
        self.batch = {name: t.to(device) for name, t in batch.items()}
        self.samples, self.dropout = len(batch["labels"]), dropout
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6) if self.trained else None

    def piece(self, start: int, stop: int) -> dict[str, Tensor]:
        """Samples of the batch, with the images they ask about."""
        cut = {name: t[start:stop] for name, t in self.batch.items() if name != self.images}
        index = cut.pop("image_index")
        if self.images is None:
            del cut["input_ids"]
            return cut
        if not self.grouped:
            return cut | {self.images: self.batch[self.images][index]}
        used, index = index.unique(return_inverse=True)
        return cut | {self.images: self.batch[self.images][used], "image_index": index}

    def backward(self, model: nn.Module, inputs: dict[str, Tensor]) -> float:
        loss = model(**inputs).loss * (len(inputs["labels"]) / self.samples)
        loss.backward()
        return loss.item()

    def measure(self) -> dict[str, Any]:
        few = int((self.batch["image_index"] == self.batch["image_index"][0]).sum()) if self.grouped else 1
        with measure(self.model) as cost:
            self.backward(self.model, self.piece(0, few))
        self.model.zero_grad(set_to_none=True)
        room = self.memory - 3 * sum(p.nbytes for p in self.trained)  # gradients and AdamW's two moments
        most = min(self.samples, max(few, int(room / (ROOM * max(1, cost.saved_bytes) / few))))
        count = math.ceil(self.samples / most)
        edges = [round(i * self.samples / count) for i in range(count + 1)]
        self.pieces = [self.piece(start, stop) for start, stop in pairwise(edges)]
        told = {"loss": 0.0, "flops": 0, "saved_bytes": 0, "weight_bytes": sum(p.nbytes for p in self.model.parameters())}
        for piece in self.pieces:
            with measure(self.model) as cost:
                told["loss"] += self.backward(self.model, piece)
            told["flops"] += cost.flops
            told["saved_bytes"] += cost.saved_bytes
        told["grad_norm"] = math.hypot(*(float(p.grad.double().norm()) for p in self.trained if p.grad is not None))
        self.model.zero_grad(set_to_none=True)
        if self.dropout:
            with_dropout(self.model, self.dropout)
        if self.compiled:
            self.model = torch.compile(self.model)
            self.step()
        return told | {"note": f"in {count} micro-batches: 1/{count} is kept at a time" if count > 1 else ""}

    def step(self) -> None:
        for piece in self.pieces:
            self.backward(self.model, piece)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


class GraphedMissStep(MissStep):
    """fastpeft's step as CUDA graphs, in whole batches: padded, replayed, its loss read with every step."""

    def measure(self) -> dict[str, Any]:
        told = super().measure()
        names = tuple(self.pieces[0])
        labels = self.batch["labels"]
        self.whole = self.piece(0, self.samples) | {"samples": [None] * self.samples}
        self.whole |= {"decoder_input_ids": labels.clamp(min=0), "decoder_attention_mask": (labels != -100).long()}
        self.whole = {name: t.cpu() if isinstance(t, Tensor) and name not in FEATURES else t for name, t in self.whole.items()}
        optimizer, config = self._optimizer()
        names = (*names, "decoder_input_ids", "decoder_attention_mask")
        device, dtype = self.batch["labels"].device, next(self.model.parameters()).dtype
        known = (self.model, _Weights(), optimizer, names, device, dtype)
        self.graphed = GraphedStep(*known, features=None, budget=None, mixed=False, samples=self.samples, seed=config.seed)
        if self.dropout:
            without_dropout(self.model)
        told["loss"], told["grad_norm"] = self._step()
        if self.dropout:
            with_dropout(self.model, self.dropout)
        self._step()
        if self.graphed.note:
            raise RuntimeError(self.graphed.note)
        return told

    def _optimizer(self) -> tuple[Optimizer, TrainConfig]:
        config = TrainConfig(steps=1000, learning_rate=1e-6, base_learning_rate=1e-6, warmup=0, max_grad_norm=0)
        return Optimizer(self.model, config, 1000), config

    def _step(self) -> tuple[float, float]:
        with lean_logits(self.model):
            self.graphed.passes([self.whole], measured=False)
            self.graphed.update(0, None)
        return self.graphed.read()[0]

    def step(self) -> None:
        self._step()


class _Weights:
    @staticmethod
    def weight(batch: dict[str, Any]) -> int:
        return len(batch["samples"])
