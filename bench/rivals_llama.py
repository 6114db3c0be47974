"""The rivals of a LLaMA-shaped step: one base, whose frozen matrices they share, and the same adapters on it, executed in different ways.

Each is a runner of bench/inside.py. Its cases are batches as a collator leaves them, on the host: "full rows" of one length, the last
quarter labelled, and "padded" rows of 35 to 100 % of it, the last quarter of each labelled.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import fastpeft as fp
from bench.rivals import Graphed, compiled, promise_to_read_no_logits
from fastpeft.cost.profile import measure
from fastpeft.data.causal import CausalDataset
from fastpeft.device import to_device
from fastpeft.verify.baseline import scatter_adapters, with_peft

FULL, PADDED = "full rows", "padded"
SIZES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 4, "vocab_size": 512},
    "small": {"hidden_size": 1024, "intermediate_size": 2752, "num_attention_heads": 16, "vocab_size": 1000},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000},
}


def base_of(size: str, layers: int, device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """A frozen model of random weights; a deep copy of it shares its matrices, and has norms of its own."""
    config = LlamaConfig(**SIZES[size], num_hidden_layers=layers, use_cache=False)
    with torch.device(device):
        base = LlamaForCausalLM(config).to(dtype).requires_grad_(False)
    for p in base.parameters():
        if p.dim() > 1:
            p.__deepcopy__ = lambda memo, p=p: p
    return base


def batch_of(vocabulary: int, samples: int, tokens: int, case: str) -> dict[str, Tensor]:
    """input_ids, attention_mask, labels [samples, tokens], int64."""
    ids = torch.randint(0, vocabulary, (samples, tokens), generator=torch.Generator().manual_seed(1))
    lengths = torch.linspace(0.35 if case == PADDED and samples > 1 else 1.0, 1.0, samples).mul(tokens).round().clamp(min=2)[:, None]
    at = torch.arange(tokens)
    real, answer = at < lengths, at >= (lengths * 3 / 4).floor()
    return {"input_ids": ids * real, "attention_mask": real.long(), "labels": torch.where(real & answer, ids, -100)}


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


def ours(base: nn.Module, plan: str) -> nn.Module:
    model = copy.deepcopy(base)
    fp.optimize(model)
    if not plan:
        return model
    torch.manual_seed(0)
    fp.adapt(model, plan)
    return scatter_adapters(model, 0.01)


def theirs(base: nn.Module, plan: str) -> nn.Module:
    """transformers' own modules, with PEFT's around them; its adapters are float32 beside a base in 16 bit, as PEFT makes them."""
    return with_peft(ours(base, plan))[0] if plan else copy.deepcopy(base)


def theirs_in_16_bit(base: nn.Module, plan: str) -> nn.Module:
    """The same with adapters in the base's dtype (autocast_adapter_dtype=False)."""
    model = theirs(base, plan)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(next(base.parameters()).dtype)
    return model


def liger(base: nn.Module, plan: str) -> nn.Module:
    """The same with Liger's kernels and its loss. ImportError without Liger."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    model = theirs(base, plan)
    apply_liger_kernel_to_llama(model=model.get_base_model())
    return model


def literal(base: nn.Module, plan: str) -> nn.Module:
    """Excitor as its paper writes it: a second score matrix added to the first."""
    excited, model = ours(base, plan), copy.deepcopy(base)
    for mine, layer in zip(excited.model.layers, model.model.layers):
        layer.self_attn = LiteralAttention(layer.self_attn, copy.deepcopy(getattr(mine.self_attn, "excitor", None)))
    return model


FORMS: dict[str, Callable[[nn.Module, str], nn.Module]] = {f.__name__: f for f in (ours, theirs, theirs_in_16_bit, liger, literal)}


class LlamaStep:
    """One rival's runner. form: of FORMS; plan: '' for a model that trains nothing, and hands the gradient down to its embeddings; lean:
    nobody reads its logits; compiled: as :class:`bench.rivals.MissStep` has it; batches: by case."""

    def __init__(
        self, base: nn.Module, form: str, plan: str, *, batches: dict[str, dict[str, Tensor]], lean: bool = False, compiled: str = ""
    ):
        self.model = FORMS[form](base, plan).train()
        self.batches, self.compiled, self.mine = batches, compiled, form == "ours"
        if lean:
            promise_to_read_no_logits(self.model)
        self.shared_bytes = sum(p.nbytes for p in base.parameters() if p.dim() > 1)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        weight = base.model.embed_tokens.weight
        self.device, self.dtype, self.routed = weight.device, weight.dtype, plan == "MMAdapter"
        fused = {"fused": True} if self.device.type == "cuda" else {}  # the fastest there, and transformers' default
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6, **fused) if self.trained else None

    def enter(self, case: str) -> dict[str, Any]:
        batch = self.batches[case]
        names = [name for name in batch if name != "attention_mask" or case == PADDED]  # rows that are full need no mask
        self.inputs = to_device(batch, names, self.device, self.dtype, self.model if self.mine else None)
        if not self.trained:
            ids = self.inputs.pop("input_ids")
            self.inputs["inputs_embeds"] = self.model.get_input_embeddings()(ids).detach().requires_grad_(True)
        if self.routed:
            seed = torch.Generator().manual_seed(2)
            modalities = torch.randn(2, self.model.config.hidden_size, generator=seed).to(self.device, self.dtype)
            self.inputs |= {"modality": torch.arange(len(batch["labels"])) % 2, "modality_embeds": tuple(modalities)}
        told = self.compared()
        self.ready(told, batch)
        return told

    def compared(self) -> dict[str, Any]:
        """What a step computes and costs."""
        model = getattr(self.model, "_orig_mod", self.model)
        with measure(model) as cost:
            loss = model(**self.inputs).loss
            loss.backward()
        norms = [float(p.grad.double().norm()) for p in self.trained if p.grad is not None]
        model.zero_grad(set_to_none=True)
        told = {"loss": float(loss.detach()), "grad_norm": math.hypot(*norms), "flops": cost.flops, "saved_bytes": cost.saved_bytes}
        return told | {"weight_bytes": sum(p.nbytes for p in model.parameters())}

    def ready(self, told: dict[str, Any], batch: dict[str, Tensor]) -> None:
        """What comes before the first step that is timed."""
        if self.compiled:
            self.model = compiled(self.model, self.compiled)
            self.step()

    def step(self) -> None:
        self.model(**self.inputs).loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


class GraphedLlamaStep(Graphed, LlamaStep):
    def ready(self, told: dict[str, Any], batch: dict[str, Tensor]) -> None:
        self.whole = batch | {"samples": [None] * len(batch["labels"])}
        told["loss"], told["grad_norm"] = self.capture(CausalDataset)

    def step(self) -> None:
        self.replay()
