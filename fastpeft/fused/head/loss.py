"""The loss of a causal language model, and its logits: at labelled positions only where nobody reads the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from fastpeft import ops
from fastpeft.fused.head.outputs import can_defer
from fastpeft.fused.layers.projections import project_one
from fastpeft.labels import IGNORE_INDEX, next_labels
from fastpeft.methods.base import has_hooks
from fastpeft.methods.quantized import is_quantized
from fastpeft.ops._common import accumulator, to_device_async
from fastpeft.registry import original_class
from fastpeft.static_shapes import NotStatic, first_rows, sizes

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
    ignore_index: int = IGNORE_INDEX
    items: Tensor | int | None = None
    shifted_here: bool = False  # the last position then has none

    @classmethod
    def of(cls, labels: Tensor | None, shape: tuple[int, int], logits_to_keep: int | Tensor, options: dict) -> Labelled | None:
        """None where labels do not fit the positions one by one; options: the keywords of transformers' loss."""
        shifted, ignore_index = options.get("shift_labels"), options.get("ignore_index", IGNORE_INDEX)
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
        return labelled_loss(head, hidden, targets, self.items, ignore_index=self.ignore_index)


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
    if asked is not None and original_class(head) is nn.Linear and not is_quantized(head.weight) and can_defer(head):
        return asked.loss(head, hidden), hidden.new_empty(0), partial(project_one, head, hidden)
    logits, loss = project_one(head, slice_logits_to_keep(hidden, logits_to_keep)), None
    if labels is not None and model.loss_function is ForCausalLMLoss:
        ignore_index, shifted = options.get("ignore_index", IGNORE_INDEX), options.get("shift_labels")
        targets = F.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shifted is None else shifted
        loss = loss_of_logits(logits, targets, options.get("num_items_in_batch"), ignore_index=ignore_index)
    elif labels is not None:
        loss = model.loss_function(logits=logits, labels=labels, vocab_size=model.config.get_text_config().vocab_size, **options)
    return loss, logits, None


_recorded: ContextVar[list[Tensor] | None] = ContextVar("token losses", default=None)


def _recording_into() -> list[Tensor] | None:
    """The list of a ``with`` above that is open; compiled code, which knows no context variables, records nothing."""
    return None if torch.compiler.is_compiling() else _recorded.get()


@contextmanager
def token_losses() -> Iterator[list[Tensor]]:
    """Inside, each loss leaves the losses of its labelled tokens in the list: detached, [labelled tokens], in their order. The loss itself
    then adds them up."""
    token = _recorded.set(found := [])
    try:
        yield found
    finally:
        _recorded.reset(token)


def labelled_loss(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    items: Tensor | int | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy of hidden [..., C] under ``head`` with targets [...], ignore_index for none: the mean over labelled tokens, or their
    sum over ``items``; reduction "none": of each of N tokens. Logits exist at labelled positions only."""
    reduced, options = _reduced(reduction, items), {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    if (static := sizes()) is not None and targets.numel() > static.labelled:
        if reduction == "none":
            raise NotStatic("the loss of every token is asked for")
        rows = first_rows(targets.flatten() != ignore_index, static.labelled)
        hidden, targets = hidden.flatten(0, -2).index_select(0, rows), targets.flatten()[rows]
    if (recorded := _recording_into()) is not None and reduction != "none":
        losses = labelled_loss(head, hidden, targets, reduction="none", **options)
        return _over(items, reduction, _recording(recorded, losses, targets, ignore_index, reduced))
    if original_class(head) is nn.Linear and not is_quantized(head.weight) and not has_hooks(head):
        loss = ops.linear_cross_entropy(hidden, head.weight, head.bias, targets, reduction=reduced, **options)
        return _over(items, reduction, loss)
    # an adapter on the head, ours or PEFT's, or a quantised head: the weight alone is not what it computes
    targets = to_device_async(targets, hidden.device).flatten()
    if static is not None:  # rows without a label count nothing in the loss of logits
        return loss_of_logits(project_one(head, hidden.flatten(0, -2)), targets, items, reduction=reduction, **options)
    rows = targets != ignore_index
    logits = project_one(head, hidden.flatten(0, -2)[rows])
    loss = loss_of_logits(logits, targets[rows], items, reduction=reduction, **options)
    return loss if reduction != "none" else loss.new_zeros(len(targets)).masked_scatter_(rows, loss)


def loss_of_logits(
    logits: Tensor,
    targets: Tensor,
    items: Tensor | int | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """As :func:`labelled_loss`, of logits [..., V] that are there: in float32, in float64 where they are."""
    targets = to_device_async(targets, logits.device).reshape(-1)
    logits = logits.to(accumulator(logits.dtype)).reshape(-1, logits.shape[-1])
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    if (recorded := _recording_into()) is not None and reduction != "none":
        losses = F.cross_entropy(logits, targets, reduction="none", **options)
        return _over(items, reduction, _recording(recorded, losses, targets, ignore_index, _reduced(reduction, items)))
    return _over(items, reduction, F.cross_entropy(logits, targets, reduction=_reduced(reduction, items), **options))


def _recording(recorded: list[Tensor], losses: Tensor, targets: Tensor, ignore_index: int, reduced: str) -> Tensor:
    """The sum or mean of losses, which are recorded."""
    losses, labelled = losses.flatten(), to_device_async(targets, losses.device).flatten() != ignore_index
    recorded.append(losses.detach()[labelled])
    return losses.sum() if reduced == "sum" else losses.sum() / labelled.sum()


def _reduced(reduction: str, items: Tensor | int | None) -> str:
    return "sum" if items is not None and reduction == "mean" else reduction


def _over(items: Tensor | int | None, reduction: str, loss: Tensor) -> Tensor:
    """The sum over ``items``, where these stand in for the mean's own count."""
    if items is None or reduction != "mean":
        return loss
    return loss / (items.to(loss.device) if isinstance(items, Tensor) else items)
