"""CLIP's fused encoder against transformers' own, in float64."""

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel
from transformers.models.clip.modeling_clip import CLIPVisionModel

import fastpeft as fp
from fastpeft.models.clip import vision_config
from fastpeft.train.profile import measure


def gradients(model, pixels):
    model.zero_grad()
    out = model(pixel_values=pixels)
    (out.last_hidden_state.square().mean() + out.pooler_output.sum()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("act", ["quick_gelu", "gelu", "relu"])
def test_values_and_gradients_equal_transformers(act):
    torch.manual_seed(0)
    model = CLIPVisionModel(vision_config("tiny", hidden_act=act)).double()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    want, wanted = model(pixels, output_hidden_states=True), gradients(model, pixels)
    report = fp.optimize(model)
    assert len([cls for _, cls in report.swapped if cls == "CLIPEncoderLayer"]) == 4
    got = model(pixels, output_hidden_states=True)
    for a, b in zip((got.pooler_output, *got.hidden_states), (want.pooler_output, *want.hidden_states), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    for name, mine in gradients(model, pixels).items():
        torch.testing.assert_close(mine, wanted[name], rtol=1e-8, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_text_encoder_stays_causal_and_masked():
    torch.manual_seed(0)
    shape = {"vocab_size": 30, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = CLIPTextModel(CLIPTextConfig(**shape, max_position_embeddings=12)).double().eval()
    ids, mask = torch.randint(0, 30, (2, 6)), torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    for options in ({}, {"attention_mask": mask}):
        fp.restore(model)
        want = model(ids, **options).last_hidden_state
        fp.optimize(model)
        torch.testing.assert_close(model(ids, **options).last_hidden_state[mask.bool()], want[mask.bool()])


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_a_trained_layer_saves_its_floor(act):
    """x, q, k, v, o, h (6 C per token) and the activation's input; two statistics per norm and attention's one per head."""

    def saved(layers):
        model = CLIPVisionModel(vision_config("tiny", hidden_act=act, num_hidden_layers=layers))
        fp.optimize(model)
        with measure(model) as cost:
            model(torch.randn(2, 3, 32, 32)).last_hidden_state.sum().backward()
        return cost.saved_bytes

    width, hidden, heads = 64, 128, 2
    assert saved(3) - saved(2) == 4 * 2 * 17 * (6 * width + hidden + 4 + heads)
