"""The loss at labelled positions against PyTorch's over all of them, in float64: plain heads, and heads that must be called."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastpeft.fused.head.loss import labelled_loss
from fastpeft.labels import IGNORE_INDEX


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("ignore_index", [IGNORE_INDEX, 3])
@pytest.mark.parametrize("items, reduction", [(None, "mean"), (None, "sum"), (None, "none"), (5, "mean"), (torch.tensor(5), "mean")])
def test_labelled_loss(hooked, ignore_index, items, reduction):
    torch.manual_seed(0)
    head = nn.Linear(6, 11).double()
    if hooked:
        head.register_forward_hook(lambda module, args, output: output * 1.5)
    hidden = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[1, ignore_index, 10, 2], [ignore_index, ignore_index, 7, ignore_index]])
    wide = "none" if reduction == "none" else "mean" if items is None and reduction == "mean" else "sum"
    truth = F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten(), ignore_index=ignore_index, label_smoothing=0.1, reduction=wide)
    truth = truth if items is None else truth / 5
    loss = labelled_loss(head, hidden, targets, items, ignore_index=ignore_index, reduction=reduction, label_smoothing=0.1)
    torch.testing.assert_close(loss.flatten(), truth.flatten(), rtol=1e-12, atol=1e-14)
    leaves = (hidden, *head.parameters())
    for got, want in zip(torch.autograd.grad(loss.sum(), leaves), torch.autograd.grad(truth.sum(), leaves)):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-14)
