"""Attention of the few queries that are read: a forward made of an attention layer's own."""

from __future__ import annotations

import pytest
import torch
import transformers as T
from torch import nn

from fastpeft.fused.attention import tokens as attention_tokens
from fastpeft.fused.layout import LastLayout
from fastpeft.fused.stack import queries
from fastpeft.ops.attention import attention


class Plain(nn.Module):
    """An attention layer as transformers writes them."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        q = self.q_norm(self.q_proj(hidden_states).view(hidden_shape)).transpose(1, 2)
        k = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        v = self.v_proj(hidden_states).view(*input_shape, -1, self.head_dim).transpose(1, 2)
        if self.scales:
            q = q * 2
        attention_interface = sdpa
        out, weights = attention_interface(self, q, k, v, attention_mask, scaling=self.head_dim**-0.5, **kwargs)
        out = out.reshape(*input_shape, -1).contiguous()
        return self.o_proj(out), weights


def sdpa(module, q, k, v, mask, scaling, **kwargs):
    return attention_tokens.of_real_tokens(
        lambda m, q, k, v, mask: (attention(q, k, v, attn_mask=mask, scale=scaling).transpose(1, 2), None), module, q, k, v, mask, **kwargs
    )


class Gated(Plain):
    """Its output has a factor of every token."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        gate = self.gate(hidden_states)
        q = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        k = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        attention_interface = sdpa
        out, weights = attention_interface(self, q, k, k, attention_mask, **kwargs)
        return self.o_proj(out.reshape(*input_shape, -1) * gate), weights


class Scaled(Plain):
    """Its keys depend on its queries."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        q = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        k = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2) - q.mean()
        attention_interface = sdpa
        out, weights = attention_interface(self, q, k, k, attention_mask, **kwargs)
        return self.o_proj(out.reshape(*input_shape, -1)), weights


@pytest.mark.parametrize("column", [0, 3, torch.tensor([2, 0])])
def test_a_forward_of_few_queries(column):
    layer = Plain().double()
    layer.scales, layer.head_dim, layer.is_causal, layer.config = True, 4, False, T.LlamaConfig(attn_implementation="sdpa")
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        setattr(layer, name, nn.Linear(8, 8).double())
    layer.q_norm = nn.LayerNorm(4).double()
    forward = queries.of_queries(Plain)
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    mask = torch.ones(2, 1, 4, 4).tril().bool()
    layout = LastLayout.of_columns(2, 4, column, x.device)
    for given in (None, mask):
        few, _ = forward(layer, x, given, **{attention_tokens.LAYOUT: layout})
        torch.testing.assert_close(few, layout.of_each(layer(x, given)[0]))
    assert queries.of_queries(Gated) is None and queries.of_queries(Scaled) is None
