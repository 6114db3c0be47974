"""Models that classify every token, in training steps whose logits nobody reads (:mod:`fastpeft.fused.head.token_heads`)."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from fastpeft.forms import is_of_transformers
from fastpeft.fused.head.any_head import arguments_of, leave_out, may_have_output_head, may_leave_out_cache
from fastpeft.fused.head.outputs import returns_names
from fastpeft.fused.head.token_heads import labelled_call, token_head, token_path
from fastpeft.fused.stack.rows import standing_in
from fastpeft.registry import fuses, signature_of_replaced


def classifies_tokens(cls: type[nn.Module]) -> bool:
    """Whether models of ``cls``, as transformers wrote it, have a head over tokens and labels, and make no logits of a vocabulary."""
    if not issubclass(cls, PreTrainedModel) or not is_of_transformers(cls):
        return False
    return not may_have_output_head(cls) and token_head(cls) is not None


@fuses(rule=classifies_tokens, applies=lambda module: token_path(module) is not None)
class FusedTokenClassifier:
    """transformers' own forward; where ``lean_logits``, of a training step's tokens those with a label are computed in the last layer and
    the head, and logits are None."""

    lean_logits = False
    computes_only = staticmethod(lambda module: None)  # its layers compute

    @signature_of_replaced
    def forward(self, *args, **kwargs):
        given = arguments_of(self, args, kwargs)
        lean = self.lean_logits and self.training and given.get("labels") is not None and returns_names(self, given)
        call = labelled_call(self, given) if lean else None
        # without a mask, position_ids may mark packed samples, but only where there is no cache
        packed = given.get("attention_mask") is None and given.get("position_ids") is not None
        if call is not None and not args and not packed and may_leave_out_cache(self, given):
            kwargs["use_cache"] = False
        with standing_in(self, call) as standing:
            output = super().forward(*args, **kwargs)
        if standing and isinstance(output, ModelOutput) and "logits" in output:
            leave_out(output, "logits")
        return output
