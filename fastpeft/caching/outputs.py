"""Outputs of a model as trees of tensors: taken apart by image, put together again, and computed where a caller reads what was not kept.

The output for one image is the pattern. Beside a batch's it tells, for each tensor, how images share it: in rows (image i has a number of
them in proportion to its size), or in lists with one entry for each image.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from fastpeft.fused.head.outputs import READ_EVERYTHING

Path = tuple[Any, ...]
UNREAD = ("last_hidden_state", "hidden_states", "attentions")  # of a tower; beside its pooler_output hardly anybody reads them
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


def children(node: Any) -> list[tuple[Any, Any]] | None:
    """(key, value) of a container; None of a leaf."""
    if isinstance(node, ModelOutput):  # also what a model hangs on it beside its fields, as transformers 5.17's Idefics3 does
        return [*node.items(), *((name, value) for name, value in vars(node).items() if value is not None and name not in node)]
    if isinstance(node, Mapping):
        return list(node.items())
    return list(enumerate(node)) if isinstance(node, (list, tuple)) else None


def leaves(node: Any, path: Path = ()) -> dict[Path, Tensor]:
    """The tensors by path. TypeError for an output that holds anything but tensors, numbers, text and containers of these."""
    if isinstance(node, Tensor):
        return {path: node}
    inside = children(node)
    if inside is None:
        if node is None or isinstance(node, (bool, int, float, str)):
            return {}
        raise TypeError(f"a {type(node).__name__}")
    return {p: t for key, value in inside for p, t in leaves(value, (*path, key)).items()}


def _rebuilt(node: Any, values: list[tuple[Any, Any]]) -> Any:
    if isinstance(node, ModelOutput):
        names = {f.name for f in dataclasses.fields(node)}
        made = type(node)(**{key: value for key, value in values if key in names})
        for key, value in values:  # in the order of ``node``: transformers may set fields later than their class names them
            if key not in names:
                setattr(made, key, value)
            elif value is not None:
                OrderedDict.move_to_end(made, key)
        return made
    if isinstance(node, Mapping):
        return type(node)(values)
    only = [value for _, value in values]
    return type(node)(*only) if hasattr(node, "_fields") else type(node)(only)


def asking_for_gradients(node: Any) -> Any:
    """``node``, its floating tensors as others that require a gradient: reentrant checkpoints look for one in what they get."""
    if isinstance(node, Tensor):
        return node.detach().requires_grad_() if node.is_floating_point() else node
    inside = children(node)
    return node if inside is None else _rebuilt(node, [(key, asking_for_gradients(value)) for key, value in inside])


@dataclass
class Pattern:
    """How one image's output looks. ``output``: its tree, tensors replaced by empty ones of their dtype and device; ``lists``: paths of
    lists with one entry for each image; ``unkept``: fields of the output that are computed when read; ``whole``: why calls are kept as a
    whole, '' where images are kept one by one; ``compared``: whether that was found out, on a batch."""

    output: Any
    unkept: frozenset[str]
    lists: set[Path] = field(default_factory=set)
    compared: bool = False
    whole: str = ""

    @classmethod
    def of(cls, output: Any, read: set[str]) -> Pattern:
        """``read``: fields that callers have read."""
        unkept = set()
        if isinstance(output, ModelOutput) and getattr(output, "pooler_output", None) is not None:
            unkept = {name for name in UNREAD if output.get(name) is not None} - read
        return cls(_emptied(output), frozenset(unkept))

    def kept(self, output: Any) -> dict[Path, Tensor]:
        return {path: t for path, t in leaves(output).items() if not path or path[0] not in self.unkept}

    def without_unkept(self, output: ModelOutput) -> ModelOutput:
        return _rebuilt(output, [(name, value) for name, value in children(output) if name not in self.unkept])

    def compare(self, one: Any, batch: Any, sizes: Sequence[int], tiles: Sequence[int]) -> None:
        """Learn how a batch holds its images from its last one's own output. Sets ``whole`` where it cannot be told, or where an image's
        values depend on the others."""
        self.compared = True
        try:
            self._compare(one, batch, len(sizes), ())
            for path, mine in self.kept(one).items():
                theirs = self.split(batch, sizes, tiles)[-1][path]
                if mine.shape != theirs.shape or not _close(mine, theirs):
                    self.whole = "an image's features depend on the others of its batch"
                    return
        except (KeyError, IndexError, ValueError, RuntimeError, TypeError):
            self.whole = "how a batch's output holds its images is not known"

    def _compare(self, one: Any, batch: Any, count: int, path: Path) -> None:
        inside = children(one)
        if inside is None or (path and path[0] in self.unkept):
            return
        theirs = children(batch)
        if isinstance(one, (list, tuple)) and len(inside) == 1 and len(theirs) == count > 1:
            self.lists.add(path)
            return
        if len(inside) != len(theirs):
            raise ValueError
        for key, mine in inside:
            self._compare(mine, dict(theirs)[key], count, (*path, key))

    def split(self, batch: Any, sizes: Sequence[int], tiles: Sequence[int]) -> list[dict[Path, Tensor]]:
        """What each image has of a batch's output: tensors by the paths of one image's output; views. ``tiles``: how many each
        image uses of those that the batch holds; a tensor's rows can then be told where they are as many. ValueError where they cannot."""
        if len(sizes) == 1:
            return [self.kept(batch)]
        parts: list[dict[Path, Tensor]] = [{} for _ in sizes]
        self._split(self.output, batch, sizes, tiles, (), parts)
        return parts

    def _split(self, one: Any, batch: Any, sizes: Sequence[int], tiles: Sequence[int], path: Path, parts: list[dict[Path, Tensor]]) -> None:
        if path and path[0] in self.unkept:
            return
        if isinstance(one, Tensor):
            if not isinstance(batch, Tensor) or not batch.dim():
                raise ValueError("a batch's output differs from an image's")
            sizes = tiles or sizes
            rows, rest = divmod(len(batch) * sizes[-1], sum(sizes))
            if rest or any(size * rows % sizes[-1] for size in sizes) or (tiles and len(batch) != sum(tiles)):
                raise ValueError("the images' rows cannot be told")
            for part, rows_of_one in zip(parts, batch.split([size * rows // sizes[-1] for size in sizes])):
                part[path] = rows_of_one
        elif path in self.lists:
            for part, value in zip(parts, batch, strict=True):
                part |= leaves(value, (*path, 0))
        else:
            theirs = dict(children(batch) or ())
            for key, mine in children(one) or ():
                if mine is not None:
                    self._split(mine, theirs[key], sizes, tiles, (*path, key), parts)

    def join(self, entries: Sequence[Mapping[Path, Tensor]]) -> Any:
        """The output of a batch of these images, on the device it had; unkept fields are None."""
        return self._join(self.output, entries, ())

    def _join(self, one: Any, entries: Sequence[Mapping[Path, Tensor]], path: Path) -> Any:
        if path and path[0] in self.unkept:
            return None
        if isinstance(one, Tensor):
            parts = [entry[path].to(one.device, non_blocking=True) for entry in entries]
            return torch.cat(parts) if len(parts) > 1 else parts[0].clone() if parts[0] is entries[0][path] else parts[0]
        inside = children(one)
        if inside is None:
            return one
        if path in self.lists and len(entries) > 1:
            return type(one)(self._join(inside[0][1], [entry], (*path, 0)) for entry in entries)
        return _rebuilt(one, [(key, self._join(value, entries, (*path, key))) for key, value in inside])


def _emptied(node: Any) -> Any:
    if isinstance(node, Tensor):
        return torch.empty(0, dtype=node.dtype, device=node.device)
    inside = children(node)
    return node if inside is None else _rebuilt(node, [(key, _emptied(value)) for key, value in inside])


def _close(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point() or not a.numel():
        return torch.equal(a, b)
    limit = TOLERANCE.get(a.dtype, 1e-4) * b.double().abs().max()
    return bool((a.double() - b.double()).abs().max() <= limit)


def computed_when_read(output: ModelOutput, unkept: frozenset[str], compute: Callable[[], ModelOutput], told: Callable) -> ModelOutput:
    """``output`` as one whose ``unkept`` fields are ``compute()``'s at the first read; ``told(names, output)`` learns which were read."""
    own = type(output)
    output.__class__ = _unread(own)
    object.__setattr__(output, "_unread", (unkept, compute, told))
    return output


@functools.cache
def _unread(own: type[ModelOutput]) -> type[ModelOutput]:
    """``own`` while some fields are not computed; an instance becomes one of ``own`` at the first read of one. Under ``own``'s name."""

    def settle(self: ModelOutput, names: set[str] | None) -> ModelOutput:
        if type(self) is not own:
            unkept, compute, told = object.__getattribute__(self, "_unread")
            full = compute()
            object.__setattr__(self, "__class__", own)
            del self.__dict__["_unread"]
            values = {name: full[name] if name in unkept else OrderedDict.get(self, name) for name in full}
            OrderedDict.clear(self)  # in the class's order of fields
            for name, value in values.items():
                setattr(self, name, value)
                OrderedDict.__setitem__(self, name, value)
            told(unkept if names is None else names & unkept, full)
        return self

    def reading(name: str) -> Callable:
        return lambda self, *args, **kwargs: getattr(settle(self, None), name)(*args, **kwargs)

    def get_attribute(self, name):
        if name != "__class__" and type(self) is not own and name in object.__getattribute__(self, "_unread")[0]:
            return getattr(settle(self, {name}), name)
        return vars(settle(self, None)) if name == "__dict__" and type(self) is not own else object.__getattribute__(self, name)

    def get_item(self, key):
        held = isinstance(key, str) and OrderedDict.__contains__(self, key)
        return OrderedDict.__getitem__(self, key) if held else settle(self, {key} if isinstance(key, str) else None)[key]

    def get(self, key, default=None):
        return OrderedDict.__getitem__(self, key) if OrderedDict.__contains__(self, key) else settle(self, {key}).get(key, default)

    everything = (*READ_EVERYTHING, "keys", "__iter__", "__len__", "__contains__", "__setattr__", "__setitem__", "__reversed__")
    body = {name: reading(name) for name in everything if hasattr(own, name)}
    body |= {"__getattribute__": get_attribute, "__getitem__": get_item, "get": get, "__hash__": own.__hash__}
    body["__new__"] = lambda cls, *args, **kwargs: own(*args, **kwargs)
    cls = type(f"Unread{own.__name__}", (own,), body)  # registers itself as a pytree node, under this name
    cls.__name__, cls.__qualname__, cls.__module__ = own.__name__, own.__qualname__, own.__module__
    return cls
