"""Inputs of the mm_adapter operators, and the paper's module: two RepAdapters of grouped convolutions."""

import torch
import torch.nn.functional as F

EPS, SCALE = 1e-6, 0.7


def paper(x, w_down, b_down, w_up, b_up, routing, scale=SCALE, groups=2):
    """Sequence last, convolutions of width 1, both adapters in full."""
    t = x.transpose(1, 2)
    a = F.conv1d(t, w_down[:, :, None], b_down)
    out = t
    for i in range(2):
        branch = F.conv1d(a, w_up[i][:, :, None], b_up[i], groups=groups)
        weight = routing[:, i, None, None] if routing.dim() == 2 else routing[..., i][:, None]
        out = out + scale * weight * branch
    return out.transpose(1, 2)


def make(B=2, M=5, C=12, h=4, groups=2, per_token=False, dtype=torch.float32, params=None):
    shapes = [(B, M, C), (C,), (h, C), (h,), (2, C, h // groups), (2, C), (B, M, 2) if per_token else (B, 2)]
    tensors = [torch.randn(shape) * (C**-0.5 if i == 2 else 1.0) for i, shape in enumerate(shapes)]
    return [t.to(params or dtype) if i else t.to(dtype) for i, t in enumerate(tensors)]


def plain(tensors):
    return [tensors[0], *tensors[2:]]


def same_under_dropout(with_dropout, inputs, normalised, p=0.4):
    """``with_dropout(p)(*inputs)``, B 2, M 200, C 12, h 8, against the formula with the operator's own mask on a, gradients included.

    ``normalised(*inputs)`` is what the adapter reads. The mask is that of ``mm_adapter_fwd`` with the seed the operator draws."""
    leaves = [t.requires_grad_() for t in inputs]
    w_down, b_down, w_up, b_up, routing = params = leaves[-5:]
    torch.manual_seed(5)
    out = with_dropout(p)(*leaves)
    torch.manual_seed(5)
    seed = torch.randint(0, 2**31, (1,))
    with torch.no_grad():
        a = torch.ops.fastpeft.mm_adapter_fwd(leaves[0], *params, SCALE, 2, p, seed)[1]
    kept = a != 0
    assert abs(float(kept.float().mean()) - (1 - p)) < 4 * (p * (1 - p) / kept.numel()) ** 0.5
    y = normalised(*leaves)
    a = F.linear(y, w_down, b_down) * kept.view(2, 200, 8) / (1 - p)
    want = y
    for i in range(2):
        expanded = torch.einsum("bmgj,gcj->bmgc", a.unflatten(-1, (2, 4)), w_up[i].unflatten(0, (2, 6))).flatten(2)
        want = want + SCALE * routing[:, i, None, None] * (expanded + b_up[i])
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    dout = torch.randn_like(out)
    for got, exact in zip(torch.autograd.grad(out, leaves, dout), torch.autograd.grad(want, leaves, dout)):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)
