"""A model and its optimised copy: the same values and gradients, whatever is changed on both."""

import copy

import torch

import fastpeft as fp


def run(model, call):
    """(tensors, gradients of their squares' sum) of ``call(model)``."""
    model.zero_grad()
    out = call(model)
    out = [t for t in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(t)]
    sum(t.square().sum() for t in out).backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(model, call, change=None, before=False):
    """``call(model)`` on ``model`` and on its optimised copy; ``change`` is made to both, to the copy after (or ``before``) optimize()."""
    fused = copy.deepcopy(model)
    for network, first in ((model, True), (fused, before)):
        change(network) if change is not None and first else None
    report = fp.optimize(fused)
    assert report.swapped
    change(fused) if change is not None and not before else None
    (want, wanted), (got, gradients) = run(model, call), run(fused, call)
    assert len(got) == len(want) and gradients.keys() == wanted.keys()
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    largest = max(float(t.abs().max()) for t in wanted.values())
    assert max(float((gradients[name] - t).abs().max()) for name, t in wanted.items()) < 1e-10 * largest
    return report


def set_config(part, **values):
    def change(m):
        for name, value in values.items():
            setattr(getattr(m.config, part), name, value)

    return change


def each(kind, **values):
    def change(m):
        for module in m.modules():
            if hasattr(module, kind):
                for name, value in values.items():
                    setattr(module, name, copy.deepcopy(value))

    return change
