"""Hidden states of a stack cut into sequences that attend to no others, each known by a digest of all that enters it.

A *span* is one sequence: the tokens of one row without the padding behind them, or one of several that are packed in a row. Its states
depend on its own tokens, positions and mask alone, so they are the same in any batch. Padding behind a span (its *tail*) attends to the
span and to nothing else: what a position of the tail holds depends on the span, on what stands for padding, and on its position, so the
states of a longer tail serve a shorter one. Padding elsewhere is part of the span.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpeft.caching.calls import as_text, digest_of_text
from fastpeft.caching.digest import row_digests
from fastpeft.fused.attention.masks import read_mask
from fastpeft.fused.layout import Layout

POSITIONS = ("position_ids", "cache_position")
TOKENS = ("input_ids", "inputs_embeds")  # what they hold is in the hidden states


class NotCut(Exception):
    """The reason why the tokens of a call cannot be told apart."""


class Span(NamedTuple):
    """Tokens ``begin`` to ``end`` of a call's [N, C], in ``row``; ``tail``: tokens of padding behind them."""

    row: int
    begin: int
    end: int
    tail: int = 0


@dataclass
class Cut:
    """The spans of a call in order, together all of its tokens. ``keys``: one of each span; ``tails``: of its tail, '' without one.
    ``whole``: every row is one span with its padding, whatever masks say."""

    spans: list[Span]
    keys: list[str]
    tails: list[str]
    whole: bool
    shape: tuple[int, int]  # of the table that masks are over
    layout: Layout | None = None  # where tokens lie in it; None: all, in order

    def fits(self, mask: Tensor | None) -> bool:
        """Whether spans attend to themselves alone under ``mask``, a layer's; None: causality alone."""
        several = len({span.row for span in self.spans}) < len(self.spans)
        if self.whole or (mask is None and not several):
            return True
        if mask is None:
            return False
        if mask.dim() != 4:
            return not several
        content = read_mask(mask)
        if content.causal and not several:
            return all(span.tail == 0 for span in self.spans) or content.padding is not None
        if content.allowed is None:
            return False
        rows, columns = self.shape
        cells, keys = _cells(self.layout, rows * columns), torch.full((rows * columns,), -1)
        for number, span in enumerate(self.spans):
            keys[cells[span.begin : span.end]] = number
        queries = keys.clone()
        for number, span in enumerate(self.spans):
            queries[cells[span.end : span.end + span.tail]] = number
        keys, queries = keys.view(rows, 1, 1, columns).to(mask.device), queries.view(rows, 1, columns, 1).to(mask.device)
        return not bool((content.allowed & (keys != queries) & (queries >= 0)).any())


def cut(hidden: Tensor, options: dict[str, Any], given: dict[str, Any], layout: Layout | None, whole: bool, about: str) -> Cut:
    """The spans of ``hidden`` ([B, L, C], or [.., T, C] laid out by ``layout``), which the first layer gets with ``options`` in a call
    of its stack with arguments ``given``. ``whole``: padding belongs to spans; ``about`` is told in every key. :class:`NotCut` says why
    not."""
    if layout is not None:
        spans, shape = _laid_out(layout), (layout.rows, layout.columns)
    else:
        shape = tuple(hidden.shape[:2])
        found = None if whole else _spans(options.get("attention_mask"), *shape)
        whole = found is None
        spans = found or [Span(b, b * shape[1], (b + 1) * shape[1]) for b in range(shape[0])]
    made = Cut(spans, [], [""] * len(spans), whole, shape, layout)
    parts, told_of_rows, text = _parts(hidden, options, given, layout, shape)
    if any(span.tail for span in spans) and not _tails(made, hidden, parts):
        return cut(hidden, options, given, layout, True, about)
    if told_of_rows and len({span.row for span in spans}) < len(spans):
        return cut(hidden, options, given, layout, True, about)
    blocks = [[] for _ in spans]
    for mask in _given_masks(given.get("attention_mask")):
        if not _blocks(made, mask, layout, blocks):
            return cut(hidden, options, given, layout, True, about)
    digests = [_of_spans(name, part, spans) for name, part in parts.items()]
    about = f"{about} {text} {whole}"
    for number, span in enumerate(spans):
        own = [digest[number] for digest in digests] + [rows[span.row] for rows in told_of_rows] + blocks[number]
        made.keys.append(digest_of_text(f"{about} {span.end - span.begin}", *own))
    return made


def _cells(layout: Layout | None, count: int) -> Tensor:
    return torch.arange(count) if layout is None else layout.cells


def _laid_out(layout: Layout) -> list[Span]:
    if layout.order is not None:
        raise NotCut("tokens lie in another order than their rows")
    counts = [layout.columns] * layout.rows if layout.place is None else layout.counts
    ends = torch.tensor(counts).cumsum(0).tolist()
    return [Span(row, end - count, end) for row, (count, end) in enumerate(zip(counts, ends)) if count]


def _given_masks(mask: Any) -> list[Tensor]:
    """Masks over queries and keys that the caller of a stack made."""
    values = list(mask.values()) if isinstance(mask, dict) else [mask]
    if not all(value is None or isinstance(value, Tensor) for value in values):
        raise NotCut("its attention mask is of an unknown kind")
    return [value for value in values if value is not None and value.dim() == 4]


def _blocks(made: Cut, mask: Tensor, layout: Layout | None, blocks: list[list[bytes]]) -> bool:
    """Add what ``mask`` [B or 1, H, L, L] of a caller says of each span. False where tails differ in more than their length."""
    rows, columns = made.shape
    if mask.shape[0] not in (1, rows) or mask.shape[-2:] != made.shape[1:] * 2:
        raise NotCut("its attention mask is of another shape than the batch")
    cells = _cells(layout, rows * columns)
    mask = mask.expand(rows, *mask.shape[1:])
    for number, span in enumerate(made.spans):
        first, last = int(cells[span.begin]) - span.row * columns, int(cells[span.end - 1]) - span.row * columns
        own = slice(first, last + 1) if last - first == span.end - span.begin - 1 else slice(None)
        block = mask[span.row, :, own, own]
        blocks[number].append(f"{mask.dtype} {tuple(block.shape)}".encode() + row_digests(block.reshape(1, -1))[0])
        if span.tail:
            behind = mask[span.row, :, last + 1 :, : last + 1]
            if not bool((behind == behind[:, :1]).all()):
                return False
            made.tails[number] = digest_of_text(made.tails[number], row_digests(behind[:, 0].reshape(1, -1))[0])
    return True


def _spans(mask: Tensor | None, rows: int, columns: int) -> list[Span] | None:
    """What a mask of the first layer says; None where rows are to be taken whole."""
    if mask is None:
        return [Span(b, b * columns, (b + 1) * columns) for b in range(rows)]
    if mask.dim() == 2 and mask.shape == (rows, columns):
        return _before_padding(mask.cpu() != 0)
    if mask.dim() != 4 or mask.shape[-2:] != (columns, columns) or mask.shape[0] not in (1, rows):
        return None
    content = read_mask(mask)
    if content.causal:
        ones = torch.ones(rows, columns, dtype=torch.bool)
        return _before_padding(ones if content.padding is None else content.padding.cpu().expand(rows, columns))
    if content.allowed is None or content.dead or content.allowed.shape[1] != 1:
        return None
    spans = []
    for b, allowed in enumerate(content.allowed[:, 0].expand(rows, -1, -1).cpu()):
        real = allowed.any(0)
        n = int(real.sum())
        if not bool(real[:n].all()):
            return None
        starts = [0, *((~allowed.diagonal(-1)[: n - 1]).nonzero().flatten() + 1).tolist()]
        if n < columns and len(starts) > 1:
            return None
        begin = b * columns
        ends = [*starts[1:], n]
        spans += [Span(b, begin + s, begin + e, columns - n if e == n else 0) for s, e in zip(starts, ends)]
    return spans


def _before_padding(real: Tensor) -> list[Span] | None:
    """real [B, L] bool, on the CPU; None where a row has padding elsewhere than behind its tokens, or nothing else."""
    columns, counts = real.shape[1], real.sum(1)
    if not bool((counts > 0).all()) or not bool((real == (torch.arange(columns) < counts[:, None])).all()):
        return None
    return [Span(b, b * columns, b * columns + n, columns - n) for b, n in enumerate(counts.tolist())]


def _parts(hidden: Tensor, options: dict[str, Any], given: dict[str, Any], layout: Layout | None, shape: tuple[int, int]):
    """({name: [N, k]} of every token, digests of every row, text about everything else) of all that enters. ``given`` is read first: names
    of what the first layer gets start with a dot."""
    parts = {"hidden": hidden.reshape(-1, hidden.shape[-1])}
    text, of_rows = [], []
    if (deep := given.get("deepstack_visual_embeds")) is not None:
        of_rows = _deepstack(deep, given.get("visual_pos_masks"), shape)
    for name, value in given.items():
        if name in (*TOKENS, "deepstack_visual_embeds") or value is None or (name == "attention_mask" and _given_masks(value)):
            continue
        if layout is not None and name in ("attention_mask", "position_ids"):
            continue  # of these two the layout and the first layer's own arguments tell
        if (table := _per_token(name, value, *shape)) is None:
            text.append(_of_batch(name, value, shape[0], of_rows))
        elif layout is None:
            parts[name] = table
        elif shape == tuple(value.shape[:2]):
            parts[name] = layout.unpad(table.view(*shape, -1))
        else:
            raise NotCut(f"{name} is of another shape than the batch")
    told = _of_first_layer(parts, options, shape, hidden[..., 0].numel(), layout, of_rows)
    return parts, of_rows, " ".join(text + told)


def _of_first_layer(parts, options: dict[str, Any], shape: tuple[int, int], tokens: int, layout: Layout | None, of_rows) -> list[str]:
    """Add to ``parts`` what the first layer gets by token, and to ``of_rows`` what it gets by row; text about the rest."""
    text = []
    table_shape = shape if layout is None else (1, tokens)
    for name, value in options.items():
        if name == "attention_mask" or value is None:
            continue
        for number, one in enumerate(value if isinstance(value, tuple) else (value,)):
            if (table := _per_token(name, one, *table_shape)) is not None:
                parts[f".{name}.{number}"] = table
            elif layout is None or name != "position_ids":
                text.append("." + _of_batch(name, one, shape[0], of_rows))
    return text


def _of_batch(name: str, value: Any, rows: int, of_rows: list[list[bytes]]) -> str:
    """Text about ``value``, which has no entry for each token. What an encoder hands on [rows, ...] goes to ``of_rows``, by row. Any other
    tensor that may be of the rows is told as a whole, and the row beside it: a row's own part of it is not known."""
    if name.startswith("encoder_") and isinstance(value, Tensor) and value.dim() and len(value) == rows:
        of_rows.append(_rows(row_digests(value.detach().reshape(rows, -1)), f"{name} {value.dtype} {tuple(value.shape[1:])}"))
        return name
    if rows > 1 and any(rows in one.shape for one in tensors_in(value)):
        of_rows.append([f"{name} {row}".encode() for row in range(rows)])
    return f"{name}={_told(name, value)}"


def tensors_in(value: Any) -> list[Tensor]:
    """Those of an argument, in its lists and mappings too."""
    if isinstance(value, Tensor):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for one in inside for tensor in tensors_in(one)]


def _told(name: str, value: Any) -> str:
    if (text := as_text(value)) is None:
        raise NotCut(f"{name} is a {type(value).__name__}")
    return text


def _per_token(name: str, value: Any, rows: int, columns: int) -> Tensor | None:
    """[rows * columns, k] of [rows or 1, columns, ...], of positions [k, rows, columns], or of [columns]; None of anything else."""
    if not isinstance(value, Tensor) or name.startswith("encoder_"):  # an encoder's are no decoder's tokens, as many as they may be
        return None
    if name == "cache_position" and value.shape == (columns,):
        value = value[None]
    if name in POSITIONS and value.dim() == 3:
        value = value.permute(1, 2, 0)
    if value.dim() < 2 or value.shape[0] not in (1, rows) or value.shape[1] != columns:
        return value.reshape(columns, -1) if rows == 1 and value.dim() == 2 and len(value) == columns else None
    return value.expand(rows, *value.shape[1:]).reshape(rows * columns, -1)


def _deepstack(deep: Any, at: Tensor | None, shape: tuple[int, int]) -> list[list[bytes]]:
    """Digests, by row, of features [visual tokens, C] that a stack adds between its first layers (Qwen3-VL)."""
    if at is None or tuple(at.shape[:2]) != shape or not all(isinstance(one, Tensor) for one in deep):
        raise NotCut("deepstack_visual_embeds without a mask of their tokens")
    counts = at.reshape(*shape, -1)[..., 0].sum(1).tolist()
    if any(len(one) != sum(counts) for one in deep):
        raise NotCut("deepstack_visual_embeds of another number than their tokens")
    return [_rows(row_digests(nn.utils.rnn.pad_sequence(one.detach().split(counts), batch_first=True)), str(one.dtype)) for one in deep]


def _rows(digests: list[bytes], text: str) -> list[bytes]:
    return [text.encode() + digest for digest in digests]


def _of_spans(name: str, part: Tensor, spans: list[Span]) -> list[bytes]:
    pieces = [part[span.begin : span.end].detach().reshape(-1) for span in spans]
    return _rows(row_digests(nn.utils.rnn.pad_sequence(pieces, batch_first=True)), f"{name} {part.dtype} {part.shape[1]}")


def _tails(made: Cut, hidden: Tensor, parts: dict[str, Tensor]) -> bool:
    """Name every tail, if in each all tokens are alike and positions stand still or go on by one. Otherwise False."""
    checks, firsts = [], []
    with_tail = [number for number, span in enumerate(made.spans) if span.tail]
    read = {name: part for name, part in parts.items() if not name.startswith(".position_embeddings")}
    for number in with_tail:
        span, firsts_of_one = made.spans[number], []
        for name, part in read.items():
            tail = part[span.end : span.end + span.tail].detach()
            alike = (tail == tail[:1]).all()
            goes_on = alike
            if name.lstrip(".").split(".")[0] in POSITIONS:
                goes_on = (tail == tail[:1] + torch.arange(span.tail, device=tail.device)[:, None]).all()
            checks += [alike, goes_on]
            firsts_of_one.append((name, tail[:1]))
        firsts.append(firsts_of_one)
    answers = torch.stack(checks).view(len(with_tail), len(read), 2).cpu()
    if not bool(answers.any(-1).all()):
        return False
    for number, answer, first in zip(with_tail, answers.tolist(), firsts):
        digests = [row_digests(value)[0] for _, value in first]
        made.tails[number] = digest_of_text(f"tail {answer} {[name for name, _ in first]}", *digests)
    return True
