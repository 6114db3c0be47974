"""Excitor's similarity by layer: the scores S of attention, what Excitor adds to them, g S_extra, and how much that changes attention.

For looking at a trained adapter (equations 2-5 of Zou et al., 2024); training and answering never form these matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from fastpeft.data import CausalDataset
from fastpeft.device import to_device
from fastpeft.evaluate.responses import model_inputs


@torch.no_grad()
def excitor_similarity(model: nn.Module, dataset: CausalDataset, samples: int = 16, batch_size: int = 4) -> dict[int, dict[str, float]]:
    """By layer with an Excitor, from 0 at the bottom: {"base": mean |S|, "extra": mean |g S_extra|, "change": mean over queries of
    (1/2) sum |softmax(S + g S_extra) - softmax(S)|, from 0 to 1}.

    Means are over the first ``samples`` of ``dataset`` (with ``prompts_only``), their real tokens, all heads, and the keys that a query may
    see; S as attention scales it. {} for a model without Excitor."""
    found = {name: m for name, m in model.named_modules() if getattr(m, "excitor", None) is not None and hasattr(m, "q_proj")}
    if not found:
        return {}
    was, first, names = model.training, next(model.parameters()), model_inputs(model, dataset)
    sums: dict[int, Tensor] = {}
    model.eval()
    try:
        chosen = list(range(min(samples, len(dataset))))
        for batch in DataLoader(dataset, batch_size, sampler=chosen, collate_fn=dataset.collator()):
            mask = batch["attention_mask"].bool().to(first.device)
            with _watching(found.values(), mask, sums):
                model(**to_device(batch, names, first.device, first.dtype), use_cache=False)
    finally:
        model.train(was)
    means = {layer: total[:3] / total[3:] for layer, total in sums.items()}
    return {layer: dict(zip(("base", "extra", "change"), means[layer].tolist())) for layer in sorted(means)}


@contextmanager
def _watching(attentions, mask: Tensor, sums: dict[int, Tensor]):
    """While the model runs a batch of ``mask`` [B, M], each attention adds to its layer's sums: of |S|, |g S_extra| and the change, and how
    many numbers each of the three is of."""

    def watch(attention: nn.Module, args: tuple, given: Mapping[str, Any]) -> None:
        hidden = args[0] if args else given["hidden_states"]
        sums[attention.layer_idx] = sums.get(attention.layer_idx, 0) + _measured(attention, hidden, given, mask)

    handles = [attention.register_forward_pre_hook(watch, with_kwargs=True) for attention in attentions]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _measured(attention: nn.Module, hidden: Tensor, given: Mapping[str, Any], mask: Tensor) -> Tensor:
    """float64 [6]: the sums, and the numbers of terms."""
    cos, sin = given["position_embeddings"]
    q, k = (linear(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for linear in (attention.q_proj, attention.k_proj))
    q, k = apply_rotary_pos_emb(q, k, cos.to(q.dtype), sin.to(q.dtype))
    k = k.repeat_interleave(attention.num_key_value_groups, 1)
    tables = tuple(t.unsqueeze(-2) for t in (cos, sin))
    excited = attention.excitor(k, hidden, None, given.get("visual"), tables)
    base, both = ((q @ keys.mT).double() * attention.scaling for keys in (k, excited))
    M = hidden.shape[1]
    seen = (mask[:, None, :, None] & mask[:, None, None, :] & torch.ones(M, M, dtype=torch.bool, device=mask.device).tril()).expand_as(base)
    change = sum(sign * scores.masked_fill(~seen, -torch.inf).softmax(-1) for sign, scores in ((1, both), (-1, base)))
    asked = mask[:, None, :].expand(base.shape[:3])
    terms = (base.abs()[seen], (both - base).abs()[seen], change.abs().sum(-1)[asked] / 2)
    return torch.stack([*(t.sum() for t in terms), *(t.new_tensor(float(t.numel())) for t in terms)]).cpu()
