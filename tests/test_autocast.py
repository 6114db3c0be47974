"""The fused model under ``torch.autocast``, as HF Trainer's ``bf16=True`` runs it."""

import pytest
import torch

import fastpeft as fp

PLANS = ["LoRA/LoRA/LoRA", "T/T/T", "IA3/Prefix/PTv2"]


def gradients(miss, model, inputs, enabled):
    """Loss, and gradients by name, without dropout."""
    for module in model.modules():
        if isinstance(module, (torch.nn.Dropout, miss.DropPath)):
            module.eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        loss = model(**inputs).loss
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return loss.detach(), {name: grad for name, grad in zip(trained, grads) if grad is not None}


def distance(grads, truth):
    return (sum((grads[name].double() - g.double()).square().sum() for name, g in truth.items()) ** 0.5).item()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("plan", PLANS)
def test_loss_and_gradients(miss, plan):
    """In float32, and over a few batches no further from float32's than transformers' own modules are under autocast."""
    ours, theirs = [], []
    for seed in range(4):
        model, inputs = miss.build(plan, dtype=torch.float32).train(), miss.batch(dtype=torch.float32, seed=seed)
        exact, truth = gradients(miss, model, inputs, enabled=False)
        loss, grads = gradients(miss, model, inputs, enabled=True)
        assert {g.dtype for g in grads.values()} == {torch.float32} and loss.dtype == torch.float32
        assert grads.keys() == truth.keys()
        assert abs(loss - exact) <= 0.03 * exact
        fp.restore(model)
        _, plain = gradients(miss, model, inputs, enabled=True)
        ours.append(distance(grads, truth))
        theirs.append(distance(plain, truth))
    assert sum(ours) <= 1.5 * sum(theirs)


@pytest.mark.usefixtures("one_thread")
def test_a_step_of_an_optimiser(miss):
    """Backward inside autocast as well: what PyTorch advises against, and users write."""
    model, inputs = miss.build("LoRA/LoRA/LoRA", dtype=torch.float32).train(), miss.batch(padded=True, dtype=torch.float32)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs).loss
        loss.backward()
    optimizer.step()
    assert torch.isfinite(loss) and all(torch.isfinite(p).all() for p in model.parameters())
