"""excitor_keys against the paper's two score matrices and the merged keys written out, with float64 as the truth."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastpeft import _library
from fastpeft.ops.attention import attention
from fastpeft.ops.excitor_keys import excitor_keys, excitor_keys_reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INTERPRETED = _library.FORCED == "triton"


def make(B=2, H=2, M=5, d=4, r=2, K=3, image=(), dtype=torch.float32, params=None, groups=1):
    C, (V, D) = H * d, image or (0, 0)
    shapes = [(B, H // groups, M, d), (B, M, C), (r, C), (C, r), (K, C), (H,)]
    shapes += [(B, V, D), (r, D), (C, r), (r, D), (C, r)] if image else []
    fan = [1, 1, C, r, 1, 1, 1, D, r, D, r]
    tensors = [torch.randn(shape) * n**-0.5 for shape, n in zip(shapes, fan)]
    return [t.to(dtype if i in (0, 1, 6) else params or dtype) for i, t in enumerate(tensors)]


def ours(*tensors):
    return excitor_keys(*tensors[:6], visual=tensors[6:] or None)


def reference(*tensors):
    return excitor_keys_reference(*tensors[:6], visual=tensors[6:] or None)


def test_backend():
    assert _library.backend_of()["excitor_merge_bwd"]["CPU"].startswith("triton" if INTERPRETED else "composite")


@pytest.mark.parametrize("image", [(), (6, 7)], ids=["text", "image"])
def test_is_the_papers_two_score_matrices(image):
    """softmax(Q K^T + g Q K_x^T) V with both matrices formed (equations 3-9), causal, every gradient, in float64."""
    k, *rest = [t.double().requires_grad_() for t in make(image=image)]
    q, v = (torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    hidden, w_down, w_up, prompt, gate, *visual = rest
    keys = values = prompt.expand(2, -1, -1)
    if visual:
        picture, wk_down, wk_up, wv_down, wv_up = visual
        keys = torch.cat([keys, F.linear(F.linear(picture, wk_down), wk_up)], 1)
        values = torch.cat([values, F.linear(F.linear(picture, wv_down), wv_up)], 1)
    extra = (F.linear(F.linear(hidden, w_down), w_up) @ keys.mT / 8**0.5).softmax(-1) @ values
    extra = extra.view(2, 5, 2, 4).transpose(1, 2)
    scores, more = q @ k.mT / 4**0.5, q @ extra.mT / 4**0.5
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    want = (scores + gate[:, None, None] * more).masked_fill(~mask, -torch.inf).softmax(-1) @ v
    got = attention(q, excitor_keys(k, *rest[:5], visual=tuple(visual) or None), v, causal=True)
    do, leaves = torch.randn_like(got), [q, v, k, *rest]
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, leaves, do), torch.autograd.grad(want, leaves, do)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("image", [(), (6, 7)], ids=["text", "image"])
def test_every_gradient_alone_and_together(check, dtype, image):
    inputs = make(M=33, d=16, r=4, K=5, image=image, dtype=dtype)
    check.no_worse(ours, reference, reference, inputs)
    for i in range(len(inputs)):
        check.no_worse(ours, reference, reference, inputs, [j == i for j in range(len(inputs))])


def test_every_gradient_subset(check):
    inputs = make()
    for needs in list(check.subsets(6))[:: 7 if INTERPRETED else 1]:
        check.no_worse(ours, reference, reference, inputs, needs)


# 130 prompts: more than a program of ours holds the scores of
@pytest.mark.parametrize("H, M, d, r, K", [(1, 1, 1, 1, 1), (3, 7, 84, 16, 30), (1, 65, 257, 5, 17), (2, 70, 16, 3, 130)])
def test_odd_sizes(check, H, M, d, r, K):
    for image in ((), (37, 9)):
        inputs = make(2, H, M, d, r, K, image=image)
        check.no_worse(ours, reference, reference, inputs, [i != 5 for i in range(len(inputs))])
        # each gate's gradient is one sum of B M d terms of either sign: what it comes to is no measure of its error, their number's root is
        check.no_worse(ours, reference, reference, inputs, [i == 5 for i in range(len(inputs))], floor=(2 * M * d) ** 0.5)


@pytest.mark.parametrize("H, M, d, groups", [(4, 35, 6, 2), (3, 5, 4, 3)])
def test_grouped_heads(check, H, M, d, groups):
    """A key for several heads, each with a gate, so keys, of its own; strided, as a slice of one projection's output."""
    for dtype, image in ((torch.float64, (37, 9)), (torch.float32, ()), (torch.bfloat16, ())):
        inputs = make(2, H, M, d, image=image, dtype=dtype, groups=groups)
        inputs[0] = torch.randn(2, M, H // groups, 2 * d).to(dtype)[..., :d].transpose(1, 2)
        check.no_worse(ours, reference, reference, inputs, [i != 5 for i in range(len(inputs))])
    got, want = (check.run(fn, make(2, H, M, d, dtype=torch.float64, groups=groups)) for fn in (ours, reference))
    assert got[0][0].shape == want[0][0].shape == (2, H, M, d) and got[1][0].shape == (2, H // groups, M, d)


def test_strided_and_broadcast(check):
    inputs = make(M=6)
    k = torch.randn(2, 6, 2, 4).transpose(1, 2)  # as projections leave it
    prompt, gate = torch.randn(3, 16)[:, ::2], torch.randn(1).expand(2)
    check.no_worse(ours, reference, reference, [k, torch.randn(1, 6, 8).expand(2, -1, -1), *inputs[2:4], prompt, gate])
    merged = excitor_keys(*inputs)
    assert merged.transpose(1, 2).is_contiguous(), "stored [B, M, H, d], the layout attention's backward answers in"


@pytest.mark.parametrize("image", [(), (6, 7)], ids=["text", "image"])
def test_no_prompts(check, image):
    """An image alone is attended to; without one nothing is added."""
    inputs = make(K=0, image=image)
    check.no_worse(ours, reference, reference, inputs)
    assert image or torch.equal(ours(*inputs), inputs[0])


@pytest.mark.parametrize("B, M", [(0, 5), (2, 0)])
def test_empty(check, B, M):
    (out,), grads = check.run(ours, make(B=B, M=M, image=(6, 7)))
    assert out.shape == (B, 2, M, 4) and all((g == 0).all() for g in grads)


def test_float32_masters_on_a_bfloat16_trunk(check):
    def rounded(*tensors):
        return reference(*(t.bfloat16() for t in tensors))

    (out,), grads = check.no_worse(ours, reference, rounded, make(M=33, d=16, image=(6, 7), dtype=torch.bfloat16, params=torch.float32))
    assert out.dtype == torch.bfloat16 and grads[4].dtype == torch.float32


def test_a_closed_gate_changes_nothing():
    k, hidden, w_down, w_up, prompt, gate = make()
    assert torch.equal(excitor_keys(k, hidden, w_down, w_up, prompt, torch.zeros_like(gate)), k)


def test_saved_bytes(check):
    """r elements a token, and T itself for w_down only; nothing for k alone."""
    B, M, r, K, V = 2, 5, 2, 3, 6
    names = ("k", "hidden", "w_down", "w_up", "prompt", "gate")
    for image in ((), (V, 7)):
        inputs = make(B, 2, M, 4, r, K, image)
        for trained in (("k",), ("gate",), ("k", "gate", "prompt"), names):
            leaves = [t.clone().requires_grad_(i >= 6 or names[i] in trained) if not image or i < 6 else t for i, t in enumerate(inputs)]
            got = check.saved_bytes(ours, leaves, free=[*leaves[2:], *([leaves[1]] if "w_down" not in trained else [])])
            u, n, z = B * M * r, r * (K + V) * B if image else r * K, B * V * r if image else 0
            want = 0 if trained == ("k",) else u + n + z
            small = B * V * r if image and trained == names else 0  # I W_kd, which W_up meets
            assert got == 4 * (want + small + ("w_down" in trained) * B * M * 8), (image, trained)


def test_flops_ten_times_fewer(check):
    """LLaMA-7B's layer at 512 tokens, on meta tensors: the branch against W_up(U), K_x and a second score matrix, forward and backward."""
    for image, least in (((), 10), ((257, 768), 10)):
        meta = [t.to("meta").requires_grad_(i != 6) for i, t in enumerate(make(1, 32, 512, 128, 16, 30, image))]
        q = torch.empty(1, 32, 512, 128, device="meta", requires_grad=True)

        def literal(meta=meta, q=q):
            extra = reference(meta[0] * 0, *meta[1:])
            (q @ extra.mT).sum().backward()

        def branch(meta=meta):
            ours(*meta).sum().backward()

        assert check.flops(literal) / check.flops(branch) >= least


def test_compiles_and_deterministic(check):
    for image in ((), (6, 7)):
        check.compiles(ours, make(image=image))
        check.deterministic(ours, make(M=70, d=33, image=image))


def test_opcheck():
    B, H, M, d, r, K, V = 2, 2, 5, 4, 2, 3, 6
    C, ops = H * d, torch.ops.fastpeft
    k, u, prompt, gate = torch.randn(B, H, M, d), torch.randn(B, M, r), torch.randn(K, C), torch.randn(H)
    torch.library.opcheck(ops.excitor_merge_fwd.default, (k, u, torch.randn(1, r, K), None, prompt, None, gate))
    image = (k, u, torch.randn(B, r, K + V), torch.randn(B, V, r), prompt, torch.randn(C, r), gate)
    torch.library.opcheck(ops.excitor_merge_fwd.default, image)
    g, L, rows = torch.randn(B, M, C), torch.randn(B * M, K + r), torch.randn(K + r, C)
    for flags in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(ops.excitor_merge_bwd.default, (g, L, rows, *flags))


def test_gradcheck():
    inputs = [t.double().requires_grad_() for t in make(1, 2, 3, 2, 2, 2, (3, 2))]
    assert torch.autograd.gradcheck(reference, inputs)
    assert torch.autograd.gradcheck(ours, inputs)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"k": torch.randn(2, 5, 8)}, ValueError, "pass k"),
        ({"gate": torch.randn(3)}, ValueError, "gate has shape"),
        ({"prompt": torch.randn(3, 7)}, ValueError, "prompt has shape"),
        ({"hidden": torch.randn(2, 5, 8).double()}, TypeError, "cast one"),
        ({"visual": (torch.randn(2, 6, 7),)}, ValueError, "pass .image"),
    ],
)
def test_errors(change, error, message):
    names = ("k", "hidden", "w_down", "w_up", "prompt", "gate")
    with pytest.raises(error, match=message):
        excitor_keys(**(dict(zip(names, make())) | change))


@settings(max_examples=6 if INTERPRETED else 25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 40), st.integers(1, 20), st.integers(1, 17), st.integers(1, 33),
    st.integers(0, 40),
)  # fmt: skip
def test_any_shape(check, B, H, M, d, r, K, V):
    torch.manual_seed(M)
    inputs = make(B, H, M, d, r, K, (V, 5) if V else ())
    got, want = check.run(ours, inputs), check.run(reference, [t.double() for t in inputs])
    for value, exact in zip(got[0] + got[1], want[0] + want[1]):
        assert check.error(value, exact, floor=1.0) < 1e-5
