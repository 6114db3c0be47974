"""torch.autocast around every public op, and gradients that refuse to be differentiated twice."""

import pytest
import torch

from fastpeft import ops
from fastpeft.ops._recompute import recipe_of

LOW = torch.bfloat16
C, H = 16, 2


def draw(*shape):
    return torch.randn(shape)


def projection(lora=True):
    return ops.Projection(draw(C, C), draw(C), *((draw(3, C), draw(C, 3)) if lora else (None, None)), 0.5)


def heads(tokens=5):
    return draw(2, H, tokens, C // H)


LABELS = torch.tensor([3, -100, 7, 0])
# op, its float32 arguments, and whether it is one that autocast lowers
CASES = {
    "layer_norm": (ops.layer_norm, lambda: (draw(4, C), draw(C), draw(C)), False),
    "add_layer_norm": (ops.add_layer_norm, lambda: (draw(4, C).to(LOW), draw(4, C), draw(C), draw(C)), False),
    "rms_norm": (ops.rms_norm, lambda: (draw(4, C).to(LOW), draw(C)), False),
    "add_rms_norm": (ops.add_rms_norm, lambda: (draw(4, C), draw(4, C).to(LOW), draw(C)), False),
    "gelu": (ops.gelu, lambda: (draw(4, C).to(LOW), draw(C)), False),
    "swiglu": (ops.swiglu, lambda: (draw(4, C).to(LOW), draw(4, C)), False),
    "geglu": (ops.geglu, lambda: (draw(4, C).to(LOW), draw(4, C)), False),
    "rescale": (ops.rescale, lambda: (draw(4, C).to(LOW), draw(C)), False),
    "rotary": (lambda x, t: ops.rotary(x, *t), lambda: (heads().to(LOW), (draw(5, C // H), draw(5, C // H))), False),
    "mm_adapter": (ops.mm_adapter, lambda: (draw(2, 3, C).to(LOW), *adapter()), False),
    "norm_mm_adapter": (ops.norm_mm_adapter, lambda: (draw(2, 3, C), draw(C).to(LOW), 1e-6, *adapter()), False),
    "lora_linear": (ops.lora_linear, lambda: (draw(4, C), *projection()), True),
    "lora_linears": (ops.lora_linears, lambda: (draw(4, C).to(LOW), [projection(), projection(lora=False)]), True),
    "attention": (lambda q, k, v, p: ops.attention(q, k, v, prefix=p), lambda: (*qkv(), (draw(H, 3, 8), draw(H, 3, 8))), True),
    "absorbed_attention": (
        ops.absorbed_attention,
        lambda: (heads().transpose(1, 2).flatten(0, 1), draw(2, 9, C).to(LOW), projection(), projection(lora=False), 0.3),
        True,
    ),
    "excitor_keys": (ops.excitor_keys, lambda: (heads(), draw(2, 5, C).to(LOW), draw(3, C), draw(C, 3), draw(4, C), draw(H)), True),
    "linear_cross_entropy": (ops.linear_cross_entropy, lambda: (draw(4, C).to(LOW), draw(9, C), draw(9), LABELS), True),
}


def adapter():
    return draw(4, C), draw(4), draw(2, C, 2), draw(2, C), torch.rand(2, 2)


def qkv():
    return heads(), heads().to(LOW), heads()


def walk(value, fn):
    """``value`` with fn applied to every floating tensor in it."""
    if isinstance(value, torch.Tensor):
        return fn(value) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        items = [walk(item, fn) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def leaves_of(args, wanted):
    leaves = []

    def leaf(t):
        leaves.append(t.detach().requires_grad_(wanted))
        return leaves[-1]

    return walk(args, leaf), leaves


def run(op, args, wanted, inside):
    """Outputs and gradients; ``inside``: backward is under autocast too."""
    with torch.autocast("cpu", LOW):
        out = op(*args)
    outs = [out] if isinstance(out, torch.Tensor) else list(out)
    total = sum(o.float().square().sum() for o in outs)
    with torch.autocast("cpu", LOW, enabled=inside):
        return outs, torch.autograd.grad(total, wanted)


@pytest.mark.parametrize("name", CASES)
def test_is_the_op_on_cast_inputs(name):
    op, make, lowers = CASES[name]
    constants = 1 if name == "rotary" else None  # its tables take no gradient
    args = make()
    dtype = LOW if lowers else torch.float32
    plain_args, leaves = leaves_of(args[:constants], True)
    plain_args += args[constants:] if constants else ()
    want = op(*walk(plain_args, lambda t: t.to(dtype)))
    want = [want] if isinstance(want, torch.Tensor) else list(want)
    want_grads = torch.autograd.grad(sum(o.float().square().sum() for o in want), leaves)
    for inside in (False, True):
        again, ours = leaves_of(args[:constants], True)
        again += args[constants:] if constants else ()
        got, grads = run(op, again, ours, inside)
        for a, b in zip(got, want):
            assert a.dtype == b.dtype and torch.equal(a, b)
        for given, a, b in zip(ours, grads, want_grads):
            assert a.dtype == given.dtype and torch.equal(a, b)


def test_float64_stays_and_autocast_outside_is_not_touched():
    x, weight = torch.randn(3, C, dtype=torch.float64), torch.randn(C, C, dtype=torch.float64)
    with torch.autocast("cpu", LOW):
        assert ops.lora_linear(x, weight, None, None, None).dtype == torch.float64
        assert torch.is_autocast_enabled("cpu")
        assert torch.nn.functional.linear(draw(3, C), draw(C, C)).dtype == LOW


def test_a_cast_activation_is_still_formed_again_in_backward(check):
    """A linear layer after a norm saves nothing of its own under autocast either, and gradients are those with the activation kept."""
    x, gamma, beta, weight = draw(64, C), draw(C), draw(C), draw(C, C).requires_grad_()
    gamma.requires_grad_()
    with torch.autocast("cpu", LOW):
        y = ops.layer_norm(x, gamma, beta)
        assert recipe_of(y) is not None
        kept = check.saved_bytes(lambda: ops.lora_linear(y, weight, None, None, None), (), free=(x, gamma, beta, weight))
        z = ops.lora_linear(y, weight, None, None, None)
    assert kept <= 2 * 64 * 4 + 2 * weight.numel()  # statistics of the norm's rows, and the weight's own cast
    (grad,) = torch.autograd.grad(z.float().sum(), weight)
    torch.testing.assert_close(grad, (torch.ones(C, 64, dtype=LOW) @ y.detach().to(LOW)).float())


@pytest.mark.parametrize("name", ["layer_norm", "lora_linears", "attention", "linear_cross_entropy", "mm_adapter"])
def test_compiles_under_autocast(name):
    op, make, _ = CASES[name]
    args, leaves = leaves_of(make(), True)
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    want, want_grads = run(op, args, leaves, False)
    got, grads = run(compiled, args, leaves, False)
    for a, b in zip((*got, *grads), (*want, *want_grads)):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_are_refused(name):
    op, make, _ = CASES[name]
    args = walk(make(), lambda t: t.float())
    x = args[0].requires_grad_()
    if name == "excitor_keys":  # its k passes through: the gradient is dK' itself
        x = args[1].requires_grad_()
    out = op(*args)
    loss = sum(o.square().sum() for o in (out if isinstance(out, tuple) else (out,)))
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)  # the first is fine
    plain = torch.autograd.grad(sum(o.square().sum() for o in _tuple(op(*args))), x)[0]
    assert torch.equal(grad.detach(), plain)
    with pytest.raises(RuntimeError, match=r"no second derivative|derivative for aten::.* is not implemented"):  # ours, or SDPA's own
        (grad.square().sum() + loss).backward()
    again = op(*args)
    again = sum(o.square().sum() for o in (again if isinstance(again, tuple) else (again,)))
    (grad,) = torch.autograd.grad(again, x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative|derivative for aten::.* is not implemented"):
        torch.autograd.grad(grad.square().sum(), x)  # which visits only what leads to x


def _tuple(out):
    return out if isinstance(out, tuple) else (out,)


def test_dropout_is_differentiated_twice():
    """Linear in x, its backward is made of PyTorch's own ops: nothing to refuse."""
    x = draw(50).requires_grad_()
    (grad,) = torch.autograd.grad(ops.dropout(x, 0.5).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert set(second.unique().tolist()) == {0.0, 8.0}
