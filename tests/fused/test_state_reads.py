"""Which rows of a last hidden state are read, as code tells it."""

from __future__ import annotations

import torch
import transformers as T
from torch import nn

from fastpeft.fused.code import state_reads


class Inner(nn.Module):
    def forward(self, x, **kwargs):
        outputs = self.encoder(x, **kwargs)
        state = outputs.last_hidden_state
        return T.modeling_outputs.BaseModelOutputWithPooling(last_hidden_state=state, pooler_output=self.pooler(state))


class Head(nn.Module):
    def forward(self, x, **kwargs):
        outputs = self.model(x, **kwargs)
        return self.head(self.dropout(outputs[0])[:, 0]), outputs.hidden_states


class HeadOfAMean(Head):
    def forward(self, x, **kwargs):
        outputs = self.model(x, **kwargs)
        return self.head(outputs[0][:, 0] + outputs[0].mean(1))


class HeadOfTheSecond(Head):
    def forward(self, x, **kwargs):
        outputs = self.model(x, **kwargs)
        return self.head(outputs[0][:, 1])


class HeadThatReadsTwice(Head):
    def forward(self, x, **kwargs):
        outputs = self.model(x, **kwargs)
        state = outputs.last_hidden_state
        first = state[:, 0]
        if x is None:
            first = state
        return self.head(first)


class HeadOfALastToken(Head):
    def forward(self, input_ids, **kwargs):
        outputs = self.model(input_ids, **kwargs)
        logits = self.score(outputs[0])
        last_non_pad_token = (input_ids != 7).sum(-1)
        return logits[torch.arange(len(input_ids)), last_non_pad_token]


class Stack(nn.Module):
    def forward(self, x, **kwargs):
        for layer in self.layers:
            x = layer(x, **kwargs)
        return T.modeling_outputs.BaseModelOutput(last_hidden_state=self.norm(x))


class StackThatReadsBetween(Stack):
    def forward(self, x, **kwargs):
        for layer in self.layers:
            x = layer(x, **kwargs)
            x = x - x.mean(1, keepdim=True)
        return T.modeling_outputs.BaseModelOutput(last_hidden_state=x)


class StackThatStops(Stack):
    def forward(self, x, **kwargs):
        for layer in self.layers:
            x = layer(x, **kwargs)
            if x.dim() == 2:
                break
        return T.modeling_outputs.BaseModelOutput(last_hidden_state=x)


def test_what_is_found_in_code():
    assert state_reads.may_pool(Head) and not state_reads.may_pool(Inner)
    for cls in (HeadOfAMean, HeadOfTheSecond, HeadThatReadsTwice, HeadOfALastToken):
        assert not state_reads.may_pool(cls) or any(use.uses is None for use in state_reads.state_of(cls).uses), cls
    assert state_reads.state_of(Stack).layers == "layers"
    assert state_reads.state_of(StackThatReadsBetween) is None and state_reads.state_of(StackThatStops) is None
