"""Attention over samples that share prefixes, against its definition in float64, and against each sample alone."""

import random

import pytest
import torch

from fastpeft.ops import PrefixTree, attention, tree_attention
from fastpeft.ops.tree_attention import tree_attention_reference, tree_of

TREES = {
    "one sample": ((0, 7), (0,)),
    "three branches": ((0, 9, 12, 15), (0, 6, 6)),
    "no prefix": ((0, 4, 9, 10), (0, 0, 0)),
    "branches of branches, two trees": ((0, 5, 9, 12, 14, 20, 22), (0, 4, 7, 3, 0, 2)),
    "all but the last token": ((0, 6, 7, 8, 11), (0, 5, 5, 6)),
}


def drawn(T, M=None, H=4, G=2, d=8, n=0, dtype=torch.float64, grad=True):
    """q, k, v as projections leave them, [1, T, H, d] in memory; (P_k, P_v), None for n = 0."""
    q, k, v = (torch.randn(1, m, h, d).to(dtype).transpose(1, 2) for m, h in ((T if M is None else M, H), (T, G), (T, G)))
    prefix = [torch.randn(G, n, d).to(dtype) for _ in range(2 if n else 0)]
    return [t.requires_grad_(grad) for t in (q, k, v, *prefix)]


def run(fn, tensors, tree, do, needs=None):
    """(output, gradients of those needed)"""
    leaves = [t.detach().requires_grad_(needs is None or needs[i]) for i, t in enumerate(tensors)]
    o = fn(*leaves[:3], tree, prefix=tuple(leaves[3:]) or None)
    wanted = [t for t in leaves if t.requires_grad]
    return o.detach(), torch.autograd.grad(o, wanted, do) if wanted else ()


def random_tree(seed):
    draw = random.Random(seed)
    starts, shared, whole = [0], [], 0
    for _ in range(draw.randint(1, 7)):
        n = draw.randint(0, max(0, whole - 1)) if draw.random() < 0.8 else 0
        own = draw.randint(1, 6)
        shared.append(n if shared else 0)
        starts.append(starts[-1] + own)
        whole = shared[-1] + own
    return PrefixTree(tuple(starts), tuple(shared))


@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("name", TREES)
def test_against_the_definition(check, name, few, n):
    """Every token asking or some, grouped heads, a learnt prefix or none: outputs and all gradients."""
    tree = PrefixTree(*TREES[name])
    if few:
        tree = tree.at(torch.randperm(tree.tokens)[: (tree.tokens + 1) // 2].sort()[0])
    for groups in (4, 2, 1):
        tensors = drawn(tree.tokens, None if tree.queries is None else len(tree.queries), G=groups, n=n)
        do = torch.randn_like(tensors[0])
        (o, got), (want, exact) = (run(fn, tensors, tree, do) for fn in (tree_attention, tree_attention_reference))
        for value, truth in zip((o, *got), (want, *exact)):
            assert check.error(value, truth) <= 1e-13


@pytest.mark.parametrize("seed", range(30))
def test_each_sample_as_it_is_alone(check, seed):
    """Any tree, by attention of each sample's whole sequence, its prefix repeated; gradients of shared tokens are the sums."""
    tree = random_tree(seed)
    tensors, whole = drawn(tree.tokens), []
    for start, end, n in zip(tree.starts, tree.starts[1:], tree.shared):
        whole.append(((whole[-1][0][:n] if whole else []) + list(range(start, end)), end - start))
    do = torch.randn_like(tensors[0])
    o, got = run(tree_attention, tensors, tree, do)

    def alone(q, k, v, tree, prefix):
        parts = [attention(q[:, :, rows], k[:, :, rows], v[:, :, rows], causal=True)[:, :, -own:] for rows, own in whole]
        return torch.cat(parts, 2)

    want, exact = run(alone, tensors, tree, do)
    for value, truth in zip((o, *got), (want, *exact)):
        assert check.error(value, truth) <= 1e-13
    seen = torch.zeros(tree.tokens, tree.tokens, dtype=torch.bool)
    for rows, own in whole:
        for i, token in enumerate(rows[-own:]):
            seen[token, rows[: len(rows) - own + i + 1]] = True
    assert torch.equal(tree.mask(), seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_worse_than_pytorch(check, dtype):
    """Outputs and gradients in each dtype, against float64, beside SDPA under the same mask."""
    tree = PrefixTree((0, 140, 160, 185, 200), (0, 120, 120, 120))
    tensors = drawn(200, d=32, G=4, dtype=dtype)
    do = torch.randn_like(tensors[0])

    def sdpa(q, k, v, tree, prefix):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=tree.mask())

    truth, exact = run(tree_attention_reference, [t.double() for t in tensors], tree, do.double())
    ours, theirs = (run(fn, tensors, tree, do) for fn in (tree_attention, sdpa))
    for mine, other, want in zip((ours[0], *ours[1]), (theirs[0], *theirs[1]), (truth, *exact)):
        assert mine.dtype == dtype
        assert float((mine.double() - want).detach().norm()) <= 1.2 * float((other.double() - want).detach().norm())


def test_any_gradients(check):
    tree = PrefixTree(*TREES["branches of branches, two trees"])
    tensors = drawn(tree.tokens, n=3)
    do = torch.randn_like(tensors[0])
    for needs in [tuple(i == j for i in range(5)) for j in range(6)]:
        (o, got), (want, exact) = (run(fn, tensors, tree, do, needs) for fn in (tree_attention, tree_attention_reference))
        assert check.error(o, want) <= 1e-13
        assert all(check.error(a, b) <= 1e-13 for a, b in zip(got, exact))


def test_strides_and_outputs_changed_in_place(check):
    """Every second element of wider storage gives the numbers of dense tensors; an output that backward needs is changed with an error."""
    tree = PrefixTree(*TREES["three branches"])
    tensors = drawn(tree.tokens, n=3)
    do = torch.randn_like(tensors[0])
    want, exact = run(tree_attention, tensors, tree, do)
    got, grads = run(tree_attention, [torch.stack([t, t], -1).flatten(-2)[..., ::2] for t in tensors], tree, do)
    assert all(check.error(a, b) <= 1e-14 for a, b in zip((got, *grads), (want, *exact)))
    o = tree_attention(*tensors[:3], tree)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.mul_(2.0).sum().backward()


def test_what_is_kept_and_what_is_computed(check):
    """q, k, v, o and lse of the row's tokens, whatever branches there are; products of what is seen alone."""
    P, R, k, H, d = 64, 8, 4, 2, 16
    tree = PrefixTree((0, P, *(P + R * i for i in range(1, k + 1))), (0, *(P - 1,) * k))
    T = tree.tokens
    tensors = drawn(T, H=H, G=H, d=d, dtype=torch.float32)
    kept = {}

    def pack(t):
        kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        o = tree_attention(*tensors, tree)
    assert sum(kept.values()) == T * H * (4 * d + 1)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        tree_attention(*tensors, tree)
    assert counter.get_total_flops() == 4 * H * d * (P * P + k * R * R + k * R * (P - 1))
    o.sum().backward()


def test_with_dropout_and_other_scales(check):
    """Under a mask: dropout on the probabilities falls on those of the definition; a scale of 0 weighs all alike."""
    tree = PrefixTree(*TREES["three branches"])
    q, k, v, *prefix = drawn(tree.tokens, n=2)
    torch.manual_seed(3)
    dropped = tree_attention(q, k, v, tree, dropout_p=0.4, prefix=tuple(prefix))
    torch.manual_seed(3)
    keys, values = (torch.cat([p[None], t], 2) for p, t in zip(prefix, (k, v)))
    allowed = torch.nn.functional.pad(tree.mask(), (2, 0), value=True)[None, None]
    assert check.error(dropped.detach(), attention(q, keys, values, attn_mask=allowed, dropout_p=0.4).detach()) <= 1e-14
    whole = tree_attention_reference(q, k, v, tree, prefix=tuple(prefix))
    assert check.error(dropped.detach(), whole.detach()) > 0.1
    for scale in (0.0, -0.5, 0.3):
        got, want = (fn(q, k, v, tree, scale=scale) for fn in (tree_attention, tree_attention_reference))
        assert check.error(got.detach(), want.detach()) <= 1e-13


def test_errors():
    with pytest.raises(ValueError, match="shares 5 tokens, more than the one before it has"):
        PrefixTree((0, 4, 6), (0, 5))
    with pytest.raises(ValueError, match="must rise, one more"):
        PrefixTree((0, 4, 4), (0, 2))
    tree = PrefixTree((0, 4, 6), (0, 2))
    q, k, v = drawn(6)
    for given, error, said in (
        ((q[:, :, :5], k, v), ValueError, "5 queries and 6 keys for a tree of 6 tokens, of which 6 ask"),
        ((q, k[:, :, :5], v[:, :, :5]), ValueError, "6 queries and 5 keys"),
        ((q.expand(2, -1, -1, -1), k, v), ValueError, "do not fit"),
        ((q[:, :3], k, v), ValueError, "3 query heads cannot share 2 key heads"),
        ((q.float(), k, v), TypeError, "cast them to one dtype"),
        ((q.long(), k, v), TypeError, "int64"),
    ):
        with pytest.raises(error, match=said):
            tree_attention(*given, tree)
    with pytest.raises(ValueError, match="P_k, P_v"):
        tree_attention(q, k, v, tree, prefix=(k[0, :1], v[0, :1]))
    with pytest.raises(ValueError, match="do not say the same"):
        tree_of(torch.tensor([0, 1, 2, 1, 2]), [0, 2], torch.device("cpu"))
