"""torch.compile of optimised models, with its default backend, which builds kernels: minutes, so apart from the quick tests."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import kinds, tiny

import fastpeft as fp

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("lean", [None, True], ids=["logits", "lean"])
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "bert", "vit", "t5"])
def test_the_model_as_it_was(name, lean):
    """Two steps: the second with gradients from what the first compiled."""
    peft = pytest.importorskip("peft")
    model, batch = tiny(name, torch.float32)
    plain = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).train()
    ours = copy.deepcopy(plain)
    fp.optimize(ours, lean_logits=lean)
    torch._dynamo.reset()
    compiled = torch.compile(ours)
    for kind in ({"padded", "left", "full"} & set(kinds(name))) - ({"full"} if name != "vit" else set()):
        given = batch(kind)
        for _ in range(2):
            losses = []
            for each in (plain, compiled):
                each.zero_grad()
                losses.append(each(**given).loss)
                losses[-1].backward()
            torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
            wanted = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
            got = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
            assert got.keys() == wanted.keys()
            scale = max(float(g.abs().max()) for g in wanted.values())
            for parameter, gradient in wanted.items():
                torch.testing.assert_close(got[parameter], gradient, rtol=1e-3, atol=1e-4 * scale)
