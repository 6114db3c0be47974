"""The loss of a causal language model, and its logits: at labelled positions only where nobody reads the others."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from fastpeft import ops
from fastpeft.methods.base import watched
from fastpeft.methods.quantized import is_quantized
from fastpeft.models.layout import IGNORED, next_labels
from fastpeft.models.outputs import can_defer
from fastpeft.ops._common import accumulator, sent

try:
    from transformers.modeling_utils import slice_logits_to_keep
except ImportError:  # before 5.18, where 2-D tensors are no different

    def slice_logits_to_keep(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
        """Of hidden [B, L, C] the last ``logits_to_keep`` positions (0: all), or those a tensor names."""
        return hidden[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]


OF_THE_LOSS = ("num_items_in_batch", "ignore_index", "shift_labels")


class Labelled(NamedTuple):
    """Labels of every position: ``targets`` [B, L], ``ignore_index`` where there is none; ``items``: what divides their losses' sum, None:
    their number."""

    targets: Tensor
    ignore_index: int = IGNORED
    items: Tensor | int | None = None
    shifted_here: bool = False  # the last position then has none

    @classmethod
    def of(cls, labels: Tensor | None, shape: tuple[int, int], logits_to_keep: int | Tensor, options: dict) -> Labelled | None:
        """None where labels do not fit the positions one by one; options: the keywords of transformers' loss."""
        shifted, ignore_index = options.get("shift_labels"), options.get("ignore_index", IGNORED)
        if labels is None or not isinstance(logits_to_keep, int) or logits_to_keep:
            return None
        if shifted is not None:
            return cls(shifted.view(shape), ignore_index, options.get("num_items_in_batch")) if shifted.numel() == shape.numel() else None
        if labels.shape != shape:
            return None
        return cls(next_labels(labels, ignore_index=ignore_index), ignore_index, options.get("num_items_in_batch"), True)

    def loss(self, head: nn.Module, hidden: Tensor) -> Tensor:
        """Of last hidden states [B, L, C] under ``head``."""
        targets = self.targets
        if self.shifted_here:
            hidden, targets = hidden[:, :-1], targets[:, :-1]
        return loss_of(head, hidden, targets, self.items, self.ignore_index)


def causal_loss(
    model: PreTrainedModel,
    hidden: Tensor,
    labels: Tensor | None,
    asked: Labelled | None,
    lean: bool,
    logits_to_keep: int | Tensor,
    options: dict[str, Any],
) -> tuple[Tensor | None, Tensor | None, partial[Tensor] | None]:
    """(loss, logits, later) of a language model's last hidden states [B, L, C] under its ``lm_head``: logits are None where ``lean``; later
    is a function that computes them, where they can wait for a reader. ``asked``: the labels, in a step whose loss needs no others."""
    head = model.lm_head
    if lean:
        return asked.loss(head, hidden), None, None
    if asked is not None and type(head) is nn.Linear and not is_quantized(head.weight) and can_defer(head):
        return asked.loss(head, hidden), hidden.new_empty(0), partial(F.linear, hidden, head.weight, head.bias)
    logits, loss = head(slice_logits_to_keep(hidden, logits_to_keep)), None
    if labels is not None and model.loss_function is ForCausalLMLoss:
        loss = loss_of_logits(logits, labels, **options)
    elif labels is not None:
        loss = model.loss_function(logits=logits, labels=labels, vocab_size=model.config.get_text_config().vocab_size, **options)
    return loss, logits, None


def loss_of_logits(logits: Tensor, labels: Tensor, *, shift_labels=None, num_items_in_batch=None, ignore_index=IGNORED, **_) -> Tensor:
    """transformers' ForCausalLMLoss, in float64 where logits are."""
    targets = F.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels
    targets = sent(targets, logits.device).reshape(-1)
    logits = logits.to(accumulator(logits.dtype)).view(-1, logits.shape[-1])
    loss = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="mean" if num_items_in_batch is None else "sum")
    return loss if num_items_in_batch is None else loss / _on(num_items_in_batch, loss)


def loss_of(head: nn.Module, hidden: Tensor, targets: Tensor, items: Tensor | int | None = None, ignore_index: int = IGNORED) -> Tensor:
    """Cross entropy of hidden [B, L, C] under ``head`` with targets [B, L], ignore_index for none: the mean over labelled tokens, or their
    sum over ``items``. Logits exist at labelled positions only."""
    reduction = "mean" if items is None else "sum"
    if type(head) is nn.Linear and not is_quantized(head.weight) and not watched(head):
        loss = ops.linear_cross_entropy(hidden, head.weight, head.bias, targets, ignore_index=ignore_index, reduction=reduction)
    else:  # an adapter on the head, ours or PEFT's, or a quantised head: the weight alone is not what it computes
        targets = sent(targets, hidden.device).flatten()
        rows = targets != ignore_index
        logits = head(hidden.flatten(0, 1)[rows])
        loss = F.cross_entropy(logits.to(accumulator(logits.dtype)), targets[rows], reduction=reduction)
    return loss if items is None else loss / _on(items, loss)


def _on(items: Tensor | int, loss: Tensor) -> Tensor | int:
    return items.to(loss.device) if isinstance(items, Tensor) else items
