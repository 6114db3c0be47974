"""transformers' float32 islands (norms, rotary tables, softmax, losses) in float64, without a change to its code; and steps so compared."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode


class Double(TorchFunctionMode):
    """While it is active, what asks for float32 by name gets float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return func(*args, **{name: torch.float64 if a is torch.float32 else a for name, a in (kwargs or {}).items()})


def step(model, batch):
    """(output, gradients), in float64 throughout."""
    model.zero_grad()
    with Double():
        output = model(**batch)
        output.loss.backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(mine, theirs, what=""):
    """Two steps of :func:`step`."""
    (output, gradients), (want, wanted) = mine, theirs
    torch.testing.assert_close(output.loss, want.loss, rtol=1e-11, atol=0, msg=lambda m: f"{what}: {m}")
    assert gradients.keys() == wanted.keys()
    scale = max(float(g.abs().max()) for g in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-10 * scale, msg=lambda m, n=name: f"{what}, {n}: {m}")
