"""Our own methods in a LLaMA that somebody watches: [B, L, C] everywhere, the same loss and gradients."""

import pytest
import torch

import fastpeft as fp
from fastpeft.fused.head.outputs import lean_logits

CASES = [("llama-tiny", plan) for plan in ("LoRA", "PTv2", "Excitor", "AdaptionPrompt", "RepAdapter")]
CASES += [("lavin-tiny", "MMAdapter/T/MMAdapter"), ("excitor-tiny", "F/Excitor")]
PLACES = ("layers.1", "layers.2.self_attn", "layers.3.mlp", "layers.3.input_layernorm", "layers.3.self_attn.v_proj", "norm")


def batch_of(name, model, form):
    torch.manual_seed(1)
    ids = torch.randint(3, 400, (3, 12))
    if form == "packed":
        positions = torch.cat([torch.arange(n) for n in (12, 9, 15)])[None]
        given = {"input_ids": ids.view(1, -1), "labels": ids.view(1, -1).clone(), "position_ids": positions}
        given["labels"][:, ::3] = given["labels"][positions == 0] = -100
    else:
        mask = torch.ones_like(ids)
        mask[1, 9:] = 0
        mask = mask if form == "right" else mask.flip(1)
        labels = torch.where((mask.cumsum(1) > 1) & mask.bool() & (torch.arange(12) % 3 > 0), ids, -100)
        given = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    if name != "llama-tiny":
        given |= {"pixel_values": torch.randn(1, 3, 32, 32, dtype=torch.float64), "image_index": torch.tensor([0, -1, 0])}
    if name == "lavin-tiny":
        places = torch.zeros_like(given["input_ids"], dtype=torch.bool)
        n = model.config.visual_tokens
        starts = [(0, 0), (0, 21)] if form == "packed" else [(0, 0), (2, 0)]
        for row, column in starts:
            places[row, column + 1 : column + 1 + n] = True
        given["image_mask"] = places
    return given


def step(model, given):
    model.zero_grad()
    loss = model(**given).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("form", ["right", "left", "packed"])
@pytest.mark.parametrize(("name", "plan"), CASES)
def test_the_same_on_three_ways(name, plan, form):
    """Lean on flattened tokens, with readable logits, and watched."""
    model = fp.adapt(fp.build(name, dtype=torch.float64), plan).train()
    torch.manual_seed(2)
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p) * p.requires_grad
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    given = batch_of(name, model, form)
    with lean_logits(model):
        want, wanted = step(model, given)
    found = [step(model, given)]
    stack, seen = getattr(model, "llm", model).model, []
    for place in PLACES:
        stack.get_submodule(place).register_forward_hook(lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    found.append(step(model, given))
    rows = {tuple(t.shape[:-1]) for t in seen}
    assert tuple(given["input_ids"].shape) in rows and all(len(shape) == 2 or shape == (2,) for shape in rows)  # (2,): modality tokens
    for loss, gradients in found:
        torch.testing.assert_close(loss, want, rtol=1e-10, atol=0)
        assert gradients.keys() == wanted.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient, wanted[key], rtol=1e-8, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")
