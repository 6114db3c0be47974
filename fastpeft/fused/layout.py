"""Token layouts: batches without padding between attentions, and rows of queries that share their keys inside an attention.

T = real tokens of a batch, B = samples, L = tokens of the longest, U = distinct images, Q = query tokens of the image with the most.
Linear layers, norms and activations see [T, C]: no padding is computed. Self-attention sees [B, L, C]; attention to images sees
[U, Q, C], all the questions on one image as queries of one attention, so that the image's keys and values are projected once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastpeft.ops._common import to_device_async
from fastpeft.ops._recompute import mark_recomputable, recipe_of
from fastpeft.ops.tree_attention import PrefixTree, tree_of
from fastpeft.static_shapes import first_rows, sizes

FULL = 0.95  # of a batch's tokens: to leave fewer out costs what they save


class _Placed(Function):
    """x [T, ...] in the rows ``place`` [T] of a table of ``cells`` rows, zero elsewhere. Keeps ``place`` alone, where autograd's own
    ``index_copy_`` keeps x too."""

    @staticmethod
    def forward(ctx, x, place, cells):
        ctx.save_for_backward(place)
        return x.new_zeros(cells, *x.shape[1:]).index_copy_(0, place, x)  # in place: else zeros are copied first

    @staticmethod
    def backward(ctx, grad):
        (place,) = ctx.saved_tensors
        return grad.index_select(0, place), None, None


@dataclass(frozen=True)
class Layout:
    """Token t lies in cell ``place[t]`` of a table [rows, columns]; ``place`` None: in cell t, with none left over.

    Without the table: ``counts`` are the tokens of each row (None: columns each), ``order`` [T] names the tokens row by row (None: they
    lie so). ``host``: place on the CPU, where it is known there, so that laying out again does not wait for the device. ``source``: where
    the tokens of an encoder lie that these attend to, too."""

    rows: int
    columns: int
    place: Tensor | None
    counts: tuple[int, ...] | None = None
    order: Tensor | None = None
    host: Tensor | None = None
    source: Layout | None = field(default=None, kw_only=True)

    @property
    def cells(self) -> Tensor:
        """[T], on the CPU: what ``place`` says."""
        if self.place is None:
            return torch.arange(self.rows * self.columns)
        return self.place.cpu() if self.host is None else self.host

    @property
    def row(self) -> Tensor:
        """[T], on the CPU: the row of each token."""
        return self.cells // self.columns

    @property
    def tokens(self) -> int:
        return self.rows * self.columns if self.place is None else len(self.place)

    @property
    def per_row(self) -> float:
        """Tokens of a row, on average; the row's cells where they are not counted."""
        return self.columns if self.counts is None else self.tokens / max(1, self.rows)

    def cells_on(self, device: torch.device) -> Tensor:
        """[T], on the device: what ``place`` says."""
        return torch.arange(self.rows * self.columns, device=device) if self.place is None else self.place

    def pad(self, x: Tensor) -> Tensor:
        """[T, C] (or any shape of T rows) -> [rows, columns, C], zero where no token lies."""
        x = x.reshape(-1, x.shape[-1])
        if self.place is not None:
            x = _Placed.apply(x, self.place, self.rows * self.columns)
        return x.view(self.rows, self.columns, -1)

    def unpad(self, table: Tensor) -> Tensor:
        """[rows, columns, C] -> [T, C]."""
        flat = table.reshape(self.rows * self.columns, -1)
        return flat if self.place is None else flat.index_select(0, self.place)

    @property
    def is_uncounted(self) -> bool:
        """Whether the tokens of each row are known on the device alone: in steps of static shapes."""
        return self.place is not None and self.counts is None

    def by_row(self, x: Tensor) -> Tensor:
        """[T, C] -> the same tokens, row by row; where they are not counted all cells, those without a token zero."""
        if self.is_uncounted:
            return self.pad(x).flatten(0, 1)
        return x if self.order is None else x.index_select(0, self.order)

    def from_rows(self, x: Tensor) -> Tensor:
        """What :meth:`by_row` lays row by row -> as the tokens lie."""
        if self.is_uncounted:
            return self.unpad(x.view(self.rows, self.columns, -1))
        return x if self.order is None else _Placed.apply(x, self.order, len(x))


@dataclass(frozen=True)
class TreeLayout(Layout):
    """Samples that share prefixes, one after the other in one row: attention reads it as ``tree`` says."""

    tree: PrefixTree | None = None

    @classmethod
    def of(cls, tree: PrefixTree) -> TreeLayout:
        return cls(1, tree.tokens if tree.queries is None else len(tree.queries), None, tree=tree)

    @property
    def row(self) -> Tensor:
        """[T], on the CPU: the sample whose own each token is."""
        return self.tree.sample

    @cached_property
    def by_root(self) -> Layout:
        """Its trees, each in a row of its own."""
        ends = torch.tensor([*(self.tree.starts[s] for s in self.tree.roots), self.tree.tokens])
        return rows_layout(ends.diff(), self.tree.device)


@dataclass(frozen=True)
class LastLayout(Layout):
    """Of a last layer's tokens, outputs are read at ``read`` [T'] alone, and lie in the batch as ``outputs`` says. ``column``: that of the
    one row of each sample that is read, of all or [rows] int64; None where others are read. ``flat``: the layer gets tokens [1, T, C]; else
    [rows, columns, C]."""

    read: Tensor | None = None
    outputs: Layout | None = None
    column: int | Tensor | None = None
    flat: bool = True

    @classmethod
    def of_columns(cls, rows: int, columns: int, column: int | Tensor, device: torch.device, tokens: Layout | None = None) -> LastLayout:
        """One row of each sample is read; ``tokens``: of these the layer gets all (None: [rows, columns])."""
        cells = torch.arange(rows, device=device) * columns + column
        layout = Layout(rows, columns, None) if tokens is None else tokens
        read = cells if layout.place is None else torch.searchsorted(layout.place, cells)
        place = (layout.place, layout.counts, layout.order, layout.host)
        return cls(rows, columns, *place, read, Layout(rows, 1, None), column, tokens is not None)

    def of_each(self, x: Tensor) -> Tensor:
        """[rows or 1, columns, ...] -> [rows or 1, 1, ...]: what is at ``column`` of each sample."""
        if isinstance(self.column, int):
            return x.narrow(1, self.column, 1)
        return x.expand(self.rows, *x.shape[1:])[torch.arange(self.rows, device=x.device), self.column][:, None]

    @classmethod
    def of(cls, layout: Layout, wanted: Tensor, device: torch.device) -> LastLayout | None:
        """``wanted`` [rows, columns] bool; None where it is every token, or none."""
        cells = layout.cells
        hit = wanted.cpu().flatten()[cells]
        if bool(hit.all()) or not bool(hit.any()):
            return None
        at, read = cells[hit], to_device_async(hit.nonzero().squeeze(1), device)
        outputs = Layout(layout.rows, layout.columns, to_device_async(at, device), host=at)
        return cls(**{**vars(layout), "read": read, "outputs": outputs})


class CrossLayout(NamedTuple):
    """Of attention whose queries lie in one batch, its keys and values in another."""

    queries: Layout
    keys: Layout


def _laid(rows: int, columns: int, row: Tensor, column: Tensor, device: torch.device) -> Layout:
    """Each token in its row and column, int64 [T] on the CPU: the device is not waited for."""
    cells, T = row * columns + column, rows * columns
    if len(cells) == T and bool((cells == torch.arange(T)).all()):
        return Layout(rows, columns, None)
    sorted_already = bool((row[1:] >= row[:-1]).all())
    counts = tuple(torch.bincount(row, minlength=rows).tolist())
    order = None if sorted_already else to_device_async(row.argsort(stable=True), device)
    return Layout(rows, columns, to_device_async(cells, device), counts, order, cells)


def sub_layout(layout: Layout, rows: Tensor, tokens: Tensor, device: torch.device) -> Layout:
    """The tokens of some ``rows`` alone, which are ``tokens`` in reading order, both int64 and sorted, on the CPU."""
    cells = layout.cells[tokens]
    return _laid(len(rows), layout.columns, torch.searchsorted(rows, cells // layout.columns), cells % layout.columns, device)


def self_layout(shape: tuple[int, int], mask: Tensor | None, device: torch.device, static: int | None = None) -> Layout:
    """Tokens in reading order; mask [B, L] bool, on the CPU if the device is not to be waited for. ``static``: so many tokens are laid out,
    those beyond the mask's are padding."""
    if mask is None or (static is not None and static >= mask.numel()):
        return Layout(*shape, None)
    if static is not None:
        return Layout(*shape, first_rows(mask.flatten(), static))
    return _laid(*shape, *mask.cpu().nonzero().unbind(1), device)


def image_layout(tokens: Layout, image_index: Tensor, images: int, device: torch.device) -> Layout:
    """The same tokens, by the image they ask about: image_index [B] gives each sample's image, of ``images``."""
    if (static := sizes()) is not None:
        return _static_image_layout(tokens, image_index, images, static.questions_per_image)
    owner = image_index.cpu()[tokens.row]  # [T], the image of each token
    counts = torch.bincount(owner, minlength=images)
    return _laid(images, int(counts.max()), owner, _slots(owner, counts), device)


def _static_image_layout(tokens: Layout, image_index: Tensor, images: int, per_image: int) -> Layout:
    """Each image's row has room for ``per_image`` samples of as many columns as ``tokens`` has."""
    if per_image == 1:
        return tokens
    same = image_index[:, None] == image_index
    slot = same.tril(-1).sum(1)  # [B], samples before that share the image
    cells = tokens.cells_on(image_index.device)
    row, column = cells // tokens.columns, cells % tokens.columns
    columns = per_image * tokens.columns
    return Layout(images, columns, image_index[row] * columns + slot[row] * tokens.columns + column)


def _slots(row: Tensor, counts: Tensor) -> Tensor:
    """[T]: how many tokens of the same row come before each."""
    order, slot = row.argsort(stable=True), torch.empty_like(row)
    slot[order] = torch.arange(len(row)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return slot


def rows_layout(lengths: Tensor, device: torch.device) -> Layout:
    """Samples of ``lengths`` [B] one after the other, laid each in a row of its own from the row's start on: causal attention over such
    rows needs no mask, as what fills a row up lies behind every token of it."""
    lengths = lengths.cpu()
    columns = int(lengths.max()) if len(lengths) else 0
    rows = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return _laid(len(lengths), columns, rows, _slots(rows, lengths), device)


def packed_rows(position_ids: Tensor, hidden: Tensor) -> Layout | None:
    """Where position_ids do not go on by one from token to token, another sample begins (transformers' rule): each in a row of its own, or
    None where no row of the batch holds more than one."""
    ids = position_ids.expand(hidden.shape[0], -1).cpu()
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1] + 1
    first = starts.flatten().nonzero().squeeze(1)
    if len(first) <= hidden.shape[0]:
        return None
    return rows_layout(torch.diff(first, append=first.new_tensor([ids.numel()])), hidden.device)


def tree_layout(position_ids: Tensor | None, prefix_lengths: Tensor, tokens: Tensor) -> TreeLayout:
    """The layout of tokens [1, T, ...] whose samples share prefixes. ValueError where position_ids [1, T] or prefix_lengths [S] do not
    fit."""
    if position_ids is None or position_ids.shape != tokens.shape[:2] or len(tokens) != 1:
        given = None if position_ids is None else tuple(position_ids.shape)
        raise ValueError(f"prefix_lengths are of one row of tokens with position_ids [1, T]; these are {given}, in {len(tokens)} rows")
    return TreeLayout.of(tree_of(position_ids[0], prefix_lengths, tokens.device))


class TokenPlan(NamedTuple):
    """Layout of a call's tokens. ``tokens``: where in the batch those lie that layers see flattened (None: layers see [B, L, C]);
    ``layout``: where they lie in attention (None: as in the batch), a :class:`TreeLayout` where samples share
    prefixes; ``mask`` [B, N] bool over keys; ``causal`` None: attention gets
    transformers' own mask; ``output_mask`` [B, L] bool: the only outputs that are read (None: all)."""

    tokens: Layout | None = None
    layout: Layout | None = None
    mask: Tensor | None = None
    causal: bool | None = True
    output_mask: Tensor | None = None


@dataclass(frozen=True)
class LabelledQueries:
    """Queries of a last layer whose outputs are read at few positions: ``tokens`` [T'] are those of the T states that the layer gets,
    ``seen`` [S] those whose keys and values the T' attend to (None: all). ``queries`` lays out the T', ``keys`` the S, ``outputs`` the T'
    where the batch has them."""

    tokens: Tensor
    seen: Tensor | None
    queries: Layout
    keys: Layout
    outputs: Layout


def queries_at(
    tokens: Layout, output_mask: Tensor, causal: bool, device: torch.device, attended: Layout | None = None
) -> LabelledQueries | None:
    """The last layer's queries at ``output_mask`` [rows, columns] bool. ``tokens`` says where tokens lie in the batch, ``attended`` where
    in attention (None: in the same cells). None where nothing is saved, or no output is read.

    Under causality the table of queries runs from the first column that is read to the last, and the table of keys ends with it:
    causality stays aligned at both tables' last columns.
    """
    layout = tokens if attended is None else attended
    if (static := sizes()) is not None:
        return _static_queries_at(tokens, layout, output_mask, static.labelled)
    if isinstance(layout, TreeLayout):
        return _queries_in_tree(tokens, output_mask, layout, device)
    at, place = tokens.cells, layout.cells
    hit = output_mask.cpu().flatten()[at]
    if not 0 < int(hit.sum()) <= FULL * len(hit):
        return None
    rows, columns = place // layout.columns, place % layout.columns
    first, last = (int(columns[hit].min()), int(columns[hit].max())) if causal else (0, layout.columns - 1)
    seen = columns <= last
    return LabelledQueries(
        tokens=to_device_async(hit.nonzero().squeeze(1), device),
        seen=None if bool(seen.all()) else to_device_async(seen.nonzero().squeeze(1), device),
        queries=_laid(layout.rows, last - first + 1, rows[hit], columns[hit] - first, device),
        keys=_laid(layout.rows, last + 1, rows[seen], columns[seen], device),
        outputs=Layout(tokens.rows, tokens.columns, to_device_async(at[hit], device), host=at[hit]),
    )


def _static_queries_at(tokens: Layout, layout: Layout, output_mask: Tensor, labelled: int) -> LabelledQueries | None:
    """So many queries, those of ``output_mask`` first; their table has all columns, as where the labels lie is not known here."""
    if labelled >= tokens.tokens:
        return None
    at = tokens.cells_on(output_mask.device)
    index = first_rows(output_mask.flatten()[at], labelled)
    queries = Layout(layout.rows, layout.columns, layout.cells_on(at.device)[index])
    return LabelledQueries(index, None, queries, layout, Layout(tokens.rows, tokens.columns, at[index]))


def _queries_in_tree(tokens: Layout, output_mask: Tensor, layout: TreeLayout, device: torch.device) -> LabelledQueries | None:
    """Likewise; all keys stay."""
    at = tokens.cells
    hit = output_mask.cpu().flatten()[at]
    if bool(hit.all()) or not bool(hit.any()):
        return None
    asked = hit.nonzero().squeeze(1)
    return LabelledQueries(
        tokens=to_device_async(asked, device),
        seen=None,
        queries=TreeLayout.of(layout.tree.at(asked)),
        keys=layout,
        outputs=Layout(tokens.rows, tokens.columns, to_device_async(at[hit], device), host=at[hit]),
    )


def rows_of(x: Tensor, index: Tensor | None) -> Tensor:
    """Rows of x [T, C]; what backward can form again, it can also take rows of."""
    if index is None:
        return x
    rows = x.index_select(0, index)
    return rows if recipe_of(x) is None else mark_recomputable(rows, _select, x, index)


def _select(x: Tensor, index: Tensor) -> Tensor:
    return x.index_select(0, index)
