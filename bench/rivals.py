"""The rivals of a MISS step: the same adapted model and the same batch, executed in different ways (see bench/frame.py).

A file holds the model, its batch and, where the image encoder is frozen, what it computed. Each rival maps it into its own process, where
frozen weights stay shared pages of one file. On a GPU all rivals live in one process (bench/inside.py), which holds these itself.
"""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.blip.modeling_blip import BlipAttention
from transformers.models.blip.modeling_blip_text import BlipTextSelfAttention

import fastpeft as fp
from fastpeft.cost.profile import measure
from fastpeft.models import parts_of
from fastpeft.plan import detach
from fastpeft.train.config import TrainConfig
from fastpeft.train.graph import READS_EVERY, GraphedStep
from fastpeft.train.optimizer import Optimizer
from fastpeft.verify.baseline import plain, with_peft

FEATURES = ("image_embeds", "question_states")  # of a step: they stay on the device, as do pixels
ROOM = 1.3  # a step's peak over what it keeps for backward: temporaries of its widest operator


class VisionSDPA(BlipAttention):
    """transformers' BLIP has eager attention only; this is what its SDPA would be."""

    def forward(self, hidden_states: Tensor, **kwargs) -> tuple[Tensor, None]:
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        p = self.dropout.p if self.training else 0.0
        return self.projection(F.scaled_dot_product_attention(q, k, v, None, p, scale=self.scale).transpose(1, 2).flatten(2)), None


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
        p = self.dropout.p if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, mask, p).transpose(1, 2).flatten(2), None


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
        if isinstance(dropouts := getattr(module, "lora_dropout", None), nn.ModuleDict):  # PEFT's, an identity where there was none
            dropouts.update({name: nn.Dropout(p).train(module.training) for name in dropouts})


def compiled(model: nn.Module, how: str) -> nn.Module:
    """``model`` through torch.compile: as a "whole", or its "layers", which are compiled once for all that are alike."""
    if how == "whole":
        return torch.compile(getattr(model, "_orig_mod", model))
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile()
    return model


def at_rate(p: float) -> str:
    """The case of steps with dropout at the rate ``p``."""
    return f"dropout {p:g}"


class MissStep:
    """One rival's runner. held: what the file holds, or the file; form: of FORMS; cached: features in place of pixels; grouped: each image
    once, with an index, instead of once per question; memory: bytes a step may take, micro-batches otherwise (the same loss and gradients,
    summed over them); compiled: "", or how (:func:`compiled`). dropout: in the steps that are timed; those that are compared have none."""

    shared_bytes = 0

    def __init__(
        self,
        held: Path | dict[str, Any],
        form: str,
        *,
        cached: bool,
        grouped: bool,
        memory: float,
        compiled: str = "",
        device: str = "cpu",
        dropout: float = 0.0,
    ):
        held = torch.load(held, mmap=True, weights_only=False) if isinstance(held, Path) else held | {"model": copy.deepcopy(held["model"])}
        self.model, self.grouped, self.memory, self.compiled = FORMS[form](held["model"]).to(device), grouped, memory, compiled
        batch = dict(held["batch"])
        if cached:
            del batch["pixel_values"]
            batch |= held["kept"]
        self.images = next((name for name in ("pixel_values", "image_embeds") if name in batch), None)  # None: question states instead
        self.batch = {name: t.to(device) for name, t in batch.items()}
        self.samples, self.dropout = len(batch["labels"]), dropout
        self.rate, self.told = 0.0, {}  # of dropout, now
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        fused = {"fused": True} if torch.device(device).type == "cuda" else {}  # the fastest there, and transformers' default
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6, **fused) if self.trained else None

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

    def backward(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        loss = model(**inputs).loss * (len(inputs["labels"]) / self.samples)
        loss.backward()
        return loss.detach()

    def measure(self) -> dict[str, Any]:
        return self.enter(at_rate(self.dropout))

    def enter(self, case: str) -> dict[str, Any]:
        """Cases are :func:`at_rate`'s (see bench/inside.py); what a step computes is told of one without dropout."""
        if not self.told:
            self.told = self.compared()
            self.ready()
        if at_rate(self.rate) != case:
            self.rate = float(case.removeprefix("dropout "))
            with_dropout(getattr(self.model, "_orig_mod", self.model), self.rate)
            self.ready()
        return dict(self.told)

    def ready(self) -> None:
        """What comes before the first step that is timed, and again where dropout has changed."""
        if self.compiled:
            self.model = compiled(self.model, self.compiled)
            self.step()

    def compared(self) -> dict[str, Any]:
        """What a step computes and costs."""
        count = self.micro_batches()
        edges = [round(i * self.samples / count) for i in range(count + 1)]
        self.pieces = [self.piece(start, stop) for start, stop in pairwise(edges)]
        told = {"loss": 0.0, "flops": 0, "saved_bytes": 0, "weight_bytes": sum(p.nbytes for p in self.model.parameters())}
        for piece in self.pieces:
            with measure(self.model) as cost:
                told["loss"] += float(self.backward(self.model, piece))
            told["flops"] += cost.flops
            told["saved_bytes"] += cost.saved_bytes
        told["grad_norm"] = math.hypot(*(float(p.grad.double().norm()) for p in self.trained if p.grad is not None))
        self.model.zero_grad(set_to_none=True)
        return told | {"note": f"in {count} micro-batches: 1/{count} is kept at a time" if count > 1 else ""}

    def micro_batches(self) -> int:
        """How many a step needs, by what one with the fewest samples keeps for backward."""
        if math.isinf(self.memory):
            return 1
        few = int((self.batch["image_index"] == self.batch["image_index"][0]).sum()) if self.grouped else 1
        with measure(self.model) as cost:
            self.backward(self.model, self.piece(0, few))
        self.model.zero_grad(set_to_none=True)
        room = self.memory - 3 * sum(p.nbytes for p in self.trained)  # gradients and AdamW's two moments
        most = min(self.samples, max(few, int(room / (ROOM * max(1, cost.saved_bytes) / few))))
        return math.ceil(self.samples / most)

    def step(self) -> None:
        for piece in self.pieces:
            self.backward(self.model, piece)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


def promise_to_read_no_logits(model: nn.Module) -> None:
    """As the trainer's ``lean_logits``, for good."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.lean_logits = True


class Graphed:
    """fastpeft's step as CUDA graphs, as the trainer runs it: padded, replayed. A mixin of a runner with ``model`` and ``whole``, its batch
    as a collator leaves it."""

    model: nn.Module
    whole: dict[str, Any]
    graphed: GraphedStep | None = None

    def capture(self, dataset) -> tuple[float, float]:
        """Graphs of the model as it is now; (loss, gradient's length) of the first step that is replayed. ``dataset`` weights batches.
        RuntimeError with the reason where it cannot be captured."""
        promise_to_read_no_logits(self.model)
        if self.graphed is not None:  # another has the gradients
            self.graphed.gradients.release()
        parameter = next(self.model.parameters())
        config = TrainConfig(steps=1000, learning_rate=1e-6, base_learning_rate=1e-6, warmup=0, max_grad_norm=0)
        names = tuple(name for name in self.whole if name != "samples")
        known = (self.model, dataset, Optimizer(self.model, config, 1000), names, parameter.device, parameter.dtype)
        how = {"features": None, "budget": None, "mixed": False, "samples": len(self.whole["samples"]), "seed": config.seed}
        self.graphed = GraphedStep(*known, **how)
        self.graphed.most_tokens = math.inf  # long batches, too, which the trainer leaves to the host
        self.replay()  # fills caches
        self.replay()
        if not self.graphed.replayed:
            raise RuntimeError(self.graphed.said())
        return self.graphed.read()[-1]

    def replay(self) -> None:
        self.graphed.passes([self.whole], measured=False)
        self.graphed.update(0, None)
        if self.graphed.note:
            raise RuntimeError(self.graphed.note)
        del self.graphed.unread[:-READS_EVERY]  # the trainer reads them then


class GraphedMissStep(Graphed, MissStep):
    """In whole batches."""

    def compared(self) -> dict[str, Any]:
        told = super().compared()
        labels = self.batch["labels"]
        whole = self.piece(0, self.samples) | {"samples": [None] * self.samples}
        whole |= {"decoder_input_ids": labels.clamp(min=0), "decoder_attention_mask": (labels != -100).long()}
        self.whole = {name: t.cpu() if isinstance(t, Tensor) and name not in FEATURES else t for name, t in whole.items()}
        return told

    def ready(self) -> None:
        found = self.capture(_Samples())
        if not self.rate:
            self.told["loss"], self.told["grad_norm"] = found

    def step(self) -> None:
        self.replay()


class _Samples:
    """What the loss of a step is a mean over."""

    @staticmethod
    def weight(batch: dict[str, Any]) -> int:
        return len(batch["samples"])
