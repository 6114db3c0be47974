"""optimize() on transformers' CLIP: what users set or replace counts as in the model itself, values and gradients to 1e-10."""

import pytest
import torch
from dropin import assert_equal, each, set_config
from torch import nn
from transformers import AttentionInterface, CLIPVisionModel

from fastpeft.models.clip import vision_config


def doubled(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """An attention of one's own."""
    weights = (2 * scaling * query @ key.transpose(-1, -2)).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


CLIP_CHANGES = {
    "implementation": set_config("vision_config", _attn_implementation="doubled"),
    "activation": each("fc1", activation_fn=nn.Tanh()),
    "scale": each("q_proj", scale=0.01),
    "is_causal": each("q_proj", is_causal=True),
    "output_attentions": None,
}


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("change", CLIP_CHANGES)
def test_clip_as_it_is_set(change, before):
    AttentionInterface.register("doubled", doubled)
    torch.manual_seed(0)
    eager = {"attn_implementation": "eager"} if change == "output_attentions" else {}
    model = CLIPVisionModel._from_config(vision_config("tiny", num_hidden_layers=1), **eager)
    model = model.double()
    pixel_values = torch.randn(2, 3, 32, 32, dtype=torch.float64)

    def set_own(m):
        if change == "implementation":
            m.config._attn_implementation = "doubled"
        elif CLIP_CHANGES[change] is not None:
            CLIP_CHANGES[change](m)

    def call(m):
        out = m(pixel_values, output_attentions=change == "output_attentions")
        return (out.last_hidden_state, *(out.attentions or ()))

    assert_equal(model, call, set_own, before)
