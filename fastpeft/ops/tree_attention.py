"""Causal attention over samples that share prefixes: each token of a prefix lies in the row once, whoever goes on from it.

    row        [prefix, branch 1, branch 2, ...], depth first; a sample's own tokens lie together, after those that it goes on from
    own        each sample's own tokens attend to themselves, causally                         (O_s, lse_s), samples of like length together
    shared     what a sample goes on from, it sees whole: no mask. All who see the same keys
               lie next to each other: one product for all of them                             (O_p, lse_p)
    together   O = O_s + sigmoid(lse_p - lse_s) (O_p - O_s)      lse = logaddexp(lse_s, lse_p)
    backward   each product once more with the joint O and lse (_flash.py); gradients into shared keys are sums over branches

Keys and values are read where they lie: none is repeated, and no mask of T x T exists. A learnt prefix (P_k, P_v), which all tokens see, is
one more set of shared keys.
Sources: Dao, "FlashAttention-2" (2023), 3.1; Juravsky et al., "Hydragen" (2024), which decodes so.
Shapes: q [1, H, M, d]; k, v [1, H_kv, T, d], H a multiple of H_kv; T tokens of a row, M of them ask (all, or those that
:meth:`PrefixTree.at` names); P_k, P_v [H_kv, n, d]. Parts meet in float32 (float64 for float64).

| gradient needed for | saved                      |
|---------------------|----------------------------|
| any                 | q, k, v, o, lse (P_k, P_v) |

Where no kernel gives a log-sum-exp (float64 on CUDA), or with dropout on the probabilities, ``attention`` runs under a mask.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function

from fastpeft.ops._autocast import first_order, under_autocast
from fastpeft.ops._common import accumulator, check_floating, no_view, to_device_async, wants_grad
from fastpeft.ops._flash import flash, flash_bwd, kernel_of
from fastpeft.ops._recompute import recompute_all, to_save_all
from fastpeft.ops.attention import attention

Where = slice | Tensor  # tokens next to each other, or a table [n, M] of them


class Own(NamedTuple):
    """Samples' own tokens attending to themselves: ``queries`` and ``keys`` of one sample, or tables of several, each row filled up with
    its last token. ``real``, ``real_keys``: a table's cells that are no filling; ``tokens``, ``key_tokens``: what lies there. ``allowed``
    [n, 1, M, N]: where not all of the keys' tokens ask; else causality, aligned at the first."""

    queries: Where
    keys: Where
    real: Tensor | None = None
    tokens: Tensor | None = None
    real_keys: Tensor | None = None
    key_tokens: Tensor | None = None
    allowed: Tensor | None = None


@dataclass(frozen=True)
class PrefixTree:
    """How the samples of a row share prefixes. Sample s has its own tokens ``starts[s]`` to ``starts[s + 1]`` [S + 1], and before them the
    first ``shared[s]`` [S] of all tokens of sample s - 1 (its own, and what it goes on from). ``queries`` (sorted): the tokens that ask;
    None: all. ``device``: of the tensors that attend. ValueError where a sample shares more than the one before has."""

    starts: tuple[int, ...]
    shared: tuple[int, ...]
    queries: Tensor | None = None
    device: torch.device | str = "cpu"

    def __post_init__(self):
        if len(self.starts) != len(self.shared) + 1 or any(b <= a for a, b in zip(self.starts, self.starts[1:])):
            raise ValueError(f"a tree of prefixes: starts {self.starts} must rise, one more than there are samples ({len(self.shared)})")
        asked = torch.arange(self.tokens) if self.queries is None else self.queries.cpu()
        object.__setattr__(self, "parts", tuple(_within(part, asked) for part in _shared_parts(self.starts, self.shared)))
        object.__setattr__(self, "parts", tuple(p for p in self.parts if p[0].start < p[0].stop))
        object.__setattr__(self, "own", tuple(_own(self.starts, asked, self.queries is None, torch.device(self.device))))

    @property
    def tokens(self) -> int:
        return self.starts[-1]

    def at(self, queries: Tensor) -> PrefixTree:
        """The same row, of which the tokens ``queries`` [M] ask."""
        return PrefixTree(self.starts, self.shared, queries, self.device)

    @property
    def sample(self) -> Tensor:
        """[T] int64: the sample whose own each token is."""
        return torch.repeat_interleave(torch.arange(len(self.shared)), torch.tensor(self.starts).diff())

    @property
    def roots(self) -> list[int]:
        """The samples that share nothing with the one before: each begins a tree of its own."""
        return [s for s, n in enumerate(self.shared) if n == 0]

    def mask(self) -> Tensor:
        """[M, T] bool on the CPU, True = attend."""
        sees = torch.zeros(self.tokens, self.tokens, dtype=torch.bool)
        for start, end, n in zip(self.starts, self.starts[1:], self.shared):
            if n:
                before = sees[start - 1].clone()
                before[before.nonzero()[n:]] = False
                sees[start:end] = before
            sees[start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        return sees if self.queries is None else sees[self.queries.cpu()]


def tree_of(position_ids: Tensor, shared: Sequence[int] | Tensor, device: torch.device) -> PrefixTree:
    """The tree of a row of tokens, position_ids [T], where each sample's own begin at its entry of ``shared`` [S]. ValueError where the two
    do not fit."""
    ids, shared = position_ids.cpu(), tuple(map(int, shared))
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[1:] = ids[1:] != ids[:-1] + 1
    starts = begins.nonzero().squeeze(1)
    if tuple(ids[starts].tolist()) != shared:
        found = ids[starts].tolist()
        raise ValueError(f"prefix_lengths {list(shared)} and position_ids, whose samples begin at {found}, do not say the same")
    return PrefixTree((*starts.tolist(), len(ids)), shared, device=device)


def _shared_parts(starts: Sequence[int], shared: Sequence[int]) -> list[tuple[slice, slice]]:
    """(queries, keys): tokens that see the same keys of others, whole."""
    parts: list[tuple[slice, slice]] = []
    path: list[tuple[int, int, int, int]] = []  # first key, last key, what comes before them, first token that goes on from them

    def close(first: int, last: int, since: int, now: int) -> None:
        if since < now and first < last:
            parts.append((slice(since, now), slice(first, last)))

    for start, end, n in zip(starts, starts[1:], shared):
        while path and path[-1][2] >= n:
            first, last, _, since = path.pop()
            close(first, last, since, start)
        if path:
            first, last, depth, since = path[-1]
            cut = first + n - depth
            if cut < last:
                close(cut, last, since, start)
                path[-1] = (first, cut, depth, since)
        if n > (path[-1][2] + path[-1][1] - path[-1][0] if path else 0):
            raise ValueError(f"a tree of prefixes: the sample at token {start} shares {n} tokens, more than the one before it has")
        path.append((start, end, n, end))
    for first, last, _, since in reversed(path):
        close(first, last, since, starts[-1])
    return parts


def _within(part: tuple[slice, slice], asked: Tensor) -> tuple[slice, slice]:
    """A part whose queries are counted among those that ask."""
    queries, keys = part
    ends = torch.searchsorted(asked, torch.tensor([queries.start, queries.stop])).tolist()
    return slice(*ends), keys


def _own(starts: Sequence[int], asked: Tensor, all_ask: bool, device: torch.device) -> list[Own]:
    """Samples of like length in one table: as many products as lengths double."""
    bounds = torch.searchsorted(asked, torch.tensor(starts)).tolist()
    alike = defaultdict(list)
    for s in range(len(starts) - 1):
        if (count := bounds[s + 1] - bounds[s]) > 0:
            last = starts[s + 1] if all_ask else int(asked[bounds[s + 1] - 1]) + 1
            alike[(count - 1).bit_length(), (last - starts[s] - 1).bit_length()].append((bounds[s], bounds[s + 1], starts[s], last))
    found = []
    for rows in alike.values():
        first, end, start, last = zip(*rows)
        if len(rows) == 1:
            queries, keys, where = slice(first[0], end[0]), slice(start[0], last[0]), ()
        else:
            (queries, real), (keys, real_keys) = _table(first, end), _table(start, last)
            where = (real, queries.flatten()[real], real_keys, keys.flatten()[real_keys])
        allowed = None
        if not all_ask:
            tokens, seen = (torch.arange(w.start, w.stop)[None] if isinstance(w, slice) else w for w in (queries, keys))
            filling = torch.arange(seen.shape[1]) >= (torch.tensor(last) - torch.tensor(start))[:, None]
            allowed = ((seen[:, None] <= asked[tokens][..., None]) & ~filling[:, None])[:, None]
        found.append(Own(*(t if isinstance(t, slice) else to_device_async(t, device) for t in (queries, keys, *where))))
        found[-1] = found[-1]._replace(allowed=None if allowed is None else to_device_async(allowed, device))
    return found


def _table(first: Sequence[int], end: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Tokens first to end of each row [n, columns], filled up with the last, and which cells [cells] are no filling."""
    first, end = torch.tensor(first)[:, None], torch.tensor(end)[:, None]
    tokens = first + torch.arange(int((end - first).max()))
    return torch.minimum(tokens, end - 1), (tokens < end).flatten().nonzero().squeeze(1)


def _take(x: Tensor, where: Where) -> Tensor:
    """x [1, H, T, ...] -> [n, H, M, ...]: a view of tokens next to each other."""
    if isinstance(where, slice):
        return x[:, :, where]
    return x[0].transpose(0, 1).index_select(0, where.flatten()).unflatten(0, where.shape).transpose(1, 2)


def _put(x: Tensor, where: Where, real: Tensor | None, tokens: Tensor | None, value: Tensor) -> None:
    """``value`` [n, H, M, ...] where :func:`_take` takes it from."""
    if isinstance(where, slice):
        x[:, :, where] = value
    else:
        x[0].transpose(0, 1).index_copy_(0, tokens, value.transpose(1, 2).flatten(0, 1).index_select(0, real).to(x.dtype))


def _additive(allowed: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if allowed is None else torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, -torch.inf)


def _parts_of(tree: PrefixTree, k: Tensor, v: Tensor, pk: Tensor | None, pv: Tensor | None):
    """(queries, keys, values) of what is seen whole."""
    for queries, keys in tree.parts:
        yield queries, k[:, :, keys], v[:, :, keys]
    if pk is not None:
        yield slice(None), pk[None].to(k.dtype), pv[None].to(v.dtype)


def _new(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros of [1, H, T, d], laid out by token."""
    _, H, T, d = like.shape
    return torch.zeros(1, T, H, d, dtype=dtype, device=like.device).transpose(1, 2)


def _forward(tree: PrefixTree, scale: float, q, k, v, pk, pv) -> tuple[Tensor, Tensor]:
    acc = accumulator(q.dtype)
    parted = bool(tree.parts) or pk is not None
    o = _new(q, acc if parted else q.dtype)
    lse = torch.empty(1, *q.shape[1:3], dtype=acc, device=q.device)
    for own in tree.own:
        tensors = _take(q, own.queries), _take(k, own.keys), _take(v, own.keys)
        part, lp = flash(*tensors, causal=own.allowed is None, mask=_additive(own.allowed, q.dtype), scale=scale)
        for whole, value in ((o, part), (lse, lp)):
            _put(whole, own.queries, own.real, own.tokens, value)
    for queries, keys, values in _parts_of(tree, k, v, pk, pv):
        part, lp = flash(q[:, :, queries], keys, values, scale=scale)
        mine, ls = o[:, :, queries], lse[:, :, queries]
        mine.lerp_(part.to(acc), torch.sigmoid(lp - ls).to(acc)[..., None])
        ls.copy_(torch.logaddexp(ls, lp))
    return o.to(q.dtype), lse


class _Tree(Function):
    @staticmethod
    def forward(ctx, tree, scale, q, k, v, pk, pv):
        o, lse = _forward(tree, scale, q, k, v, pk, pv)
        ctx.tree, ctx.scale = tree, scale
        ctx.recipe, kept = to_save_all(q, k, v)
        ctx.save_for_backward(o, lse, pk, pv, *kept)
        return no_view(o)

    @staticmethod
    @first_order
    def backward(ctx, do):
        o, lse, pk, pv, *kept = ctx.saved_tensors
        q, k, v = recompute_all(ctx.recipe, kept)
        tree, scale, acc = ctx.tree, ctx.scale, accumulator(q.dtype)
        dq, dk, dv = (_new(t, acc) for t in (q, k, v))
        for own in tree.own:
            asked = [_take(t, own.queries) for t in (do, q, o, lse)]
            if own.real is not None:  # what fills rows up has no gradient
                filling = torch.ones(own.queries.numel(), dtype=torch.bool, device=q.device).index_fill(0, own.real, False)
                asked[0] = asked[0].masked_fill(filling.view(own.queries.shape)[:, None, :, None], 0.0)
            g, x, y, l = asked
            mask = _additive(own.allowed, q.dtype)
            tensors = g, x, _take(k, own.keys), _take(v, own.keys), y, l.contiguous()
            gq, gk, gv = flash_bwd(*tensors, causal=mask is None, mask=mask, scale=scale)
            _put(dq, own.queries, own.real, own.tokens, gq)
            for whole, value in ((dk, gk), (dv, gv)):
                _put(whole, own.keys, own.real_keys, own.key_tokens, value)
        shared = [keys for _, keys in tree.parts]
        dpk = dpv = None
        for i, (queries, keys, values) in enumerate(_parts_of(tree, k, v, pk, pv)):
            g, x, y, l = (t[:, :, queries] for t in (do, q, o, lse))
            gq, gk, gv = flash_bwd(g, x, keys, values, y, l.contiguous(), scale=scale)
            dq[:, :, queries] += gq
            if i < len(shared):
                dk[:, :, shared[i]] += gk
                dv[:, :, shared[i]] += gv
            else:
                dpk, dpv = gk[0].to(pk.dtype), gv[0].to(pv.dtype)
        return None, None, *(g.to(t.dtype) for g, t in ((dq, q), (dk, k), (dv, v))), dpk, dpv


def tree_attention_reference(q, k, v, tree: PrefixTree, *, scale=None, prefix=None) -> Tensor:
    """The definition, every matrix computed in full."""
    allowed, groups = tree.mask().to(q.device), q.shape[1] // k.shape[1]
    if prefix is not None:
        k, v = (torch.cat([p[None].to(t.dtype), t], 2) for p, t in zip(prefix, (k, v)))
        allowed = torch.nn.functional.pad(allowed, (prefix[0].shape[1], 0), value=True)
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v


def _under_a_mask(q, k, v, tree: PrefixTree, scale: float, prefix, dropout_p: float) -> Tensor:
    allowed = to_device_async(tree.mask(), q.device)
    if prefix is not None:
        k, v = (torch.cat([p[None].to(t.dtype), t], 2) for p, t in zip(prefix, (k, v)))
        allowed = torch.nn.functional.pad(allowed, (prefix[0].shape[1], 0), value=True)
    return attention(q, k, v, scale=scale, attn_mask=allowed[None, None], dropout_p=dropout_p)


def _check(q, k, v, tree: PrefixTree, prefix) -> None:
    check_floating("tree_attention", q=q, k=k, v=v)
    asked = tree.tokens if tree.queries is None else len(tree.queries)
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != 1 or k.shape[0] != 1 or q.shape[3] != k.shape[3]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"tree_attention: {shapes} do not fit; pass q [1, H, M, d] and k, v [1, H_kv, T, d]")
    if q.shape[2] != asked or k.shape[2] != tree.tokens:
        raise ValueError(
            f"tree_attention: {q.shape[2]} queries and {k.shape[2]} keys for a tree of {tree.tokens} tokens, of which {asked} ask"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"tree_attention: {q.shape[1]} query heads cannot share {k.shape[1]} key heads; H must be a multiple of H_kv")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"tree_attention: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; cast them to one dtype")
    if prefix is not None and any(p.dim() != 3 or p.shape[::2] != k.shape[1::2] or p.shape != prefix[0].shape for p in prefix):
        raise ValueError(f"tree_attention: prefix shapes {[tuple(p.shape) for p in prefix]}; pass (P_k, P_v), each [H_kv, n, d]")


@under_autocast("lower")
def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: PrefixTree,
    *,
    scale: float | None = None,
    prefix: tuple[Tensor, Tensor] | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Softmax attention of q [1, H, M, d] to k, v [1, H_kv, T, d] as ``tree`` says; returns [1, H, M, d].

    Each of T tokens sees the tokens of its own sample up to itself: those that the sample shares with others, and its own. M = T, or the
    tokens of ``tree.queries``. ``scale``: 1/sqrt(d). ``prefix`` = (P_k, P_v) [H_kv, n, d]: keys and values every query sees, before the
    others. ``dropout_p`` falls on the probabilities. Raises ValueError or TypeError where shapes or dtypes do not fit.
    """
    _check(q, k, v, tree, prefix)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    pk, pv = prefix if prefix is not None and prefix[0].shape[1] else (None, None)
    q, k, v, pk, pv = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, pk, pv))
    masked = any(own.allowed is not None for own in tree.own)
    if dropout_p > 0.0 or scale <= 0.0 or q.numel() == 0 or kernel_of(q, k, v, True, masked) == "":
        return _under_a_mask(q, k, v, tree, scale, None if pk is None else (pk, pv), dropout_p)
    if wants_grad(q, k, v, pk, pv):
        return _Tree.apply(tree, scale, q, k, v, pk, pv)
    return _forward(tree, scale, q, k, v, pk, pv)[0]
