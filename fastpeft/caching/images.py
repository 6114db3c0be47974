"""Cache of image features in any transformers model: what a frozen image encoder makes of an image is computed once.

A model's ``get_image_features`` (or, where something it uses is trained, the image encoder's ``forward``) is called through an
:class:`ImageCache`, an attribute of that module: classes, parameters, names and state dicts stay. A call is taken apart by image; each is
known by the digest of its pixels as they are given and of every other argument that enters. Images that were met before are not computed.

- Only constants are kept: at each call nothing below may be trained, adapted, hooked or random. Otherwise the model's own method runs.
- A change of a weight (load_state_dict, in-place edits, another dtype or device, other modules, the configuration) empties the cache.
  Edits through ``.data`` raise no version: on the host, bytes at the start, middle and end of each tensor are compared as well; on a
  device call ``optimize(model, cache_images=...)`` again.
- Kept features are bits of the model's own results, in the batch in which an image first came: another batch size rounds differently.
- The first batch shows whether an image's features depend on the others: its last image is computed alone too. If they do, or if a model's
  arguments cannot be taken apart, whole calls are kept.
- Pickles hold no cache and load without fastpeft; a copy of a model has an empty cache of its own.
"""

from __future__ import annotations

import hashlib
import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import update_wrapper
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from torch import Tensor, nn
from torch._C._functorch import get_interpreter_stack
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from fastpeft.caching.digest import digest_of_weights, row_digests
from fastpeft.caching.frozen import (
    NotUnderstood,
    Wrapper,
    calls,
    delegates,
    names_below,
    state_of,
    tensors_below,
    why_not_constant,
)
from fastpeft.caching.memory import Entry, Kept
from fastpeft.caching.outputs import Pattern, computed_when_read, leaves
from fastpeft.caching.store import FeatureStore
from fastpeft.fused.loss import OF_THE_LOSS
from fastpeft.options import bytes_of

FEATURES = "get_image_features"
GRIDS = ("image_grid_thw", "grid_thw")  # of flat patches: time, height, width of each image
OF_AN_IMAGE = ("image_sizes", "pixel_attention_mask", "pixel_mask", "patch_attention_mask", "spatial_shapes")  # [N, ...] beside pixels
NOT_READ = (*OF_THE_LOSS, "labels", "logits_to_keep", "use_cache")  # handed down by models, of the text


@dataclass
class Call:
    """One call, by image. ``values``: arguments by name; ``rows``: names of those that hold an entry for each image; ``sizes``: rows of
    the flat patches that each image has, or ones; ``tiled``: see :meth:`Pattern.split`; ``whole``: kept as one."""

    values: dict[str, Any]
    pixels: str
    rows: tuple[str, ...]
    sizes: list[int]
    flat: bool = False
    tiled: bool = False
    whole: bool = False

    @classmethod
    def of(cls, values: dict[str, Any]) -> Call | None:
        """None where there is nothing to cache."""
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor) and name not in NOT_READ}
        name = next((name for name in values if name.startswith("pixel_values")), next(iter(tensors), None))
        if name is None or any(t.requires_grad and torch.is_grad_enabled() for t in tensors.values()):
            return None
        whole = cls(values, name, (), [1], whole=True)
        pixels, grid = values[name], next((values[grid] for grid in GRIDS if isinstance(values.get(grid), Tensor)), None)
        if name not in tensors:  # a list of images, say
            return whole
        others = tensors.keys() - {name}
        if grid is not None and grid.dim() == 2 and others <= set(GRIDS):
            sizes = grid.prod(-1).tolist()
            return cls(values, name, (name, *others), sizes, flat=True) if sum(sizes) == len(pixels) and min(sizes) > 0 else whole
        one_each = {"batch_num_images"} & others if bool((tensors.get("batch_num_images", pixels[:0]) == 1).all()) else set()
        aligned = all(tensors[other].dim() > 0 and len(tensors[other]) == len(pixels) for other in others)
        if pixels.dim() < 3 or not len(pixels) or not aligned or not others <= {*OF_AN_IMAGE, *one_each}:
            return whole
        return cls(values, name, (name, *sorted(others)), [1] * len(pixels), tiled=pixels.dim() == 5)

    def constants(self) -> str | None:
        """What enters beside the images' own tensors. None where something cannot be told."""
        told = []
        for name, value in sorted(self.values.items()):
            if name in self.rows or name in NOT_READ:
                continue
            if (text := _told(value)) is None:
                return None
            told.append(f"{name}={text}")
        kind = "cuda" if self._device().type == "cuda" else self._device().type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return f"{told} {cast} {self.pixels if self.whole else ''}"

    def _device(self) -> torch.device:
        return next((value.device for value in self.values.values() if isinstance(value, Tensor)), torch.device("cpu"))

    def keys(self, constants: str) -> list[str]:
        """One for each image. The host waits for the digests, if a device computes them."""
        if self.whole:
            return [_hash(constants)]
        drop = 2 if self.tiled else 1
        parts = []
        for name in self.rows:
            value, grids = self.values[name], name in GRIDS
            about = f"{name} {value.dtype} {tuple(value.shape[1 if self.flat or grids else min(drop, value.dim()) :])}"
            digests = row_digests(value if grids or not self.flat else self._by_image(value))
            parts.append([about.encode() + digest for digest in digests])
        return [_hash(constants, *parts_of_one) for parts_of_one in zip(*parts)]

    def _by_image(self, patches: Tensor) -> Tensor:
        """[images, most patches, ...]: zeros at the end enter no digest, sizes do."""
        return nn.utils.rnn.pad_sequence(patches.split(self.sizes), batch_first=True)

    def only(self, images: list[int]) -> tuple[dict[str, Any], list[int]]:
        """(the arguments, the sizes) for some of the images."""
        index = torch.tensor(images)
        values = dict(self.values)
        for name in self.rows:
            value = values[name]
            if self.flat and name == self.pixels:
                pieces = value.split(self.sizes)
                values[name] = torch.cat([pieces[i] for i in images])
            else:
                values[name] = value[index.to(value.device)]
        return values, [self.sizes[i] for i in images]


def _told(value: Any) -> str | None:
    """Text that tells ``value``; None where no text does."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {row_digests(value.reshape(1, -1))[0].hex()}"
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        parts = [_told(part) for part in value]
        return None if None in parts else f"{type(value).__name__}{parts}"
    return None


def _hash(text: str, *more: bytes) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=20)
    for part in more:
        digest.update(part)
    return digest.hexdigest()


class _Filled(BaseException):  # noqa: N818  not an error: a forward that went far enough
    """The images of a batch are kept."""


class ImageCache(Wrapper):
    """Stands over ``owner``'s ``method`` and keeps what it returns, by image. ``computed``, ``reused`` and ``loaded`` (from files) count
    images (or calls, where these are kept as a whole); ``passed``: calls that the model's own method served, by reason."""

    def __init__(self, owner: nn.Module, method: str, below: list[str], limit_bytes: int, folder: Path | None):
        self.owner, self.method, self.below, self.limit_bytes, self.folder = owner, method, below, limit_bytes, folder
        self.computed = self.reused = 0
        self.passed: Counter[str] = Counter()
        self.filling = self._varies = False
        self.kept = Kept(limit_bytes)
        self._loaded_before = 0
        self._read: set[str] = set()
        self._state: tuple | None = None
        self._lock = threading.RLock()
        update_wrapper(self, getattr(type(owner), method))

    @property
    def loaded(self) -> int:
        return self._loaded_before + self.kept.loaded

    def __deepcopy__(self, memo) -> ImageCache:
        return ImageCache(deepcopy(self.owner, memo), self.method, list(self.below), self.limit_bytes, self.folder)

    def __reduce__(self):  # the class's own method: unpickled before the module's state is, by names that Python knows
        return getattr, (self.owner, self.method)

    def __call__(self, *args, **kwargs):
        own = getattr(type(self.owner), self.method).__get__(self.owner)
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or get_interpreter_stack():
            return own(*args, **kwargs)
        with self._lock:
            reason = why_not_constant(self.owner, self.below)
            call = None if reason else Call.of(self._bound(own, args, kwargs))
            if call is None or (constants := call.constants()) is None:
                self.passed[reason or "its arguments cannot be told apart"] += 1
                return own(*args, **kwargs)
            self._renew()
            names = list(inspect.signature(own).parameters)[: len(args)]

            def run(values: Mapping[str, Any]) -> Any:
                positional = [values[name] for name in names]
                return own(*positional, **{name: value for name, value in values.items() if name not in names})

            output = self._serve(call, constants, run)
            if self.filling:
                raise _Filled
            return output

    @staticmethod
    def _bound(own: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        names = list(inspect.signature(own).parameters)
        return dict(zip(names, args)) | kwargs if len(args) <= len(names) else {}

    def _renew(self) -> None:
        """Empty the cache if anything below changed."""
        state = state_of(self.owner, self.below)
        if state != self._state:
            self._state, self._patterns = state, {}
            store = None if self.folder is None else FeatureStore(self.folder, self._identity())
            self._loaded_before += self.kept.loaded
            self.kept.flush()
            self.kept = Kept(self.limit_bytes, store)

    def _identity(self) -> dict[str, Any]:
        cls = type(self.owner)
        config = getattr(self.owner, "config", None)
        return {
            "weights": digest_of_weights(sorted(tensors_below(self.owner, self.below), key=lambda named: named[0])),
            "code": [cls.__module__, cls.__qualname__, self.method, transformers.__version__, torch.__version__],
            "config": _hash(str(config.to_dict() if hasattr(config, "to_dict") else "")),
        }

    def _serve(self, call: Call, constants: str, run: Callable[[Mapping[str, Any]], Any]) -> Any:
        pattern = self._patterns.get(constants)
        if pattern is not None and pattern.whole and not call.whole:
            call = Call(call.values, call.pixels, (), [1], whole=True)
            if (constants := call.constants()) is None:
                return run(call.values)
            pattern = self._patterns.get(constants)
        keys = call.keys(constants)
        paths = None if pattern is None else list(pattern.kept(pattern.output))
        entries = [None if paths is None else self.kept.get(key, paths) for key in keys]
        missing = [i for i, entry in enumerate(entries) if entry is None]
        first = list({keys[i]: i for i in reversed(missing)}.values())[::-1]  # an image that a batch holds twice is computed once
        known = pattern is not None and (len(keys) == 1 or pattern.compared)
        if not known or len(missing) == len(keys) == len(first):
            output = self._run(run, call.values)
            if not self._varies:
                self._learn(call, constants, keys, output, run)
            return output
        if missing:
            values, sizes = call.only(first)
            part = self._run(run, values)
            try:
                fresh = pattern.split(part, sizes, call.tiled)
            except (ValueError, TypeError, KeyError):
                fresh = []
            if self._varies or len(fresh) != len(first):
                return run(call.values)
            made = {keys[i]: entry for i, entry in zip(first, fresh)}
            self._put(made)
            entries = [made[key] if entry is None else entry for key, entry in zip(keys, entries)]
        self.computed += len(first)
        self.reused += len(keys) - len(first)
        return self._output(pattern, entries, call, run)

    def _run(self, run: Callable[[Mapping[str, Any]], Any], values: Mapping[str, Any]) -> Any:
        """Compute, and see whether random numbers were drawn or a gradient would flow: then nothing is kept."""
        before = torch.get_rng_state()
        output = run(values)
        drew = not torch.equal(before, torch.get_rng_state())
        try:
            why = "something it uses is trained" if any(tensor.requires_grad for tensor in leaves(output).values()) else ""
        except TypeError as error:
            why = f"its output holds {error}"
        if why := "it draws random numbers" if drew else why:
            self.passed[why] += 1
        self._varies = bool(why)
        return output

    def _learn(self, call: Call, constants: str, keys: list[str], output: Any, run: Callable[[Mapping[str, Any]], Any]) -> None:
        """Keep what was computed, image by image where that can be."""
        pattern = self._patterns.get(constants)
        if pattern is None or (len(keys) > 1 and not pattern.compared):
            one = output
            if len(keys) > 1:
                try:
                    one = run(call.only([len(keys) - 1])[0])
                except (RuntimeError, ValueError, IndexError, TypeError) as error:
                    pattern = Pattern(None, frozenset(), compared=True, whole=f"an image alone is refused ({error})")
            if pattern is None or not pattern.whole:
                pattern = Pattern.of(one, self._read)
            if len(keys) > 1 and not pattern.whole:
                pattern.compare(one, output, call.sizes, call.tiled)
            self._patterns[constants] = pattern
        if pattern.whole and not call.whole:
            self.passed[f"kept by call, not by image: {pattern.whole}"] += 1
            whole = Call(call.values, call.pixels, (), [1], whole=True)
            if (constants := whole.constants()) is not None:
                self._learn(whole, constants, whole.keys(constants), output, run)
            return
        try:
            parts = pattern.split(output, call.sizes, call.tiled)
        except (ValueError, TypeError, KeyError):
            pattern.whole = "how a batch's output holds its images is not known"
            return
        self.computed += len(keys)
        self._put(dict(zip(keys, parts)))

    def _put(self, made: Mapping[str, Entry]) -> None:
        for key, entry in made.items():
            self.kept.put(key, entry)

    def _output(self, pattern: Pattern, entries: list[Entry], call: Call, run: Callable) -> Any:
        output = pattern.join(entries)
        if not pattern.unkept or not isinstance(output, ModelOutput):
            return output
        state, grad = self._state, torch.is_grad_enabled()
        kind = call._device().type
        cast = {"enabled": torch.is_autocast_enabled(kind), "dtype": torch.get_autocast_dtype(kind)}

        def compute() -> ModelOutput:
            if state_of(self.owner, self.below) != state:
                raise RuntimeError("the image encoder was changed since this output was made: read it before that")
            with torch.inference_mode(False), torch.set_grad_enabled(grad), torch.autocast(kind, **cast):
                return run(call.values)

        return computed_when_read(output, pattern.unkept, compute, self._keep_too)

    def _keep_too(self, names: Iterable[str]) -> None:
        """Somebody reads these fields: from now on they are kept."""
        if not self._read.issuperset(names):
            self._read.update(names)
            self._patterns = {}

    def flush(self) -> None:
        """Write what waits, so that other processes see it."""
        self.kept.flush()

    def note(self) -> str:
        """What it did."""
        where = f"{type(self.owner).__name__}.{self.method}"
        held = f"{len(self.kept)} kept, {self.kept.bytes / 1e6:.0f} MB in memory"
        others = "".join(f"; {count} calls: {reason}" for reason, count in self.passed.items())
        return f"image features of {where}: {held}; computed {self.computed} times, reused {self.reused} times{others}"


def image_caches(model: nn.Module) -> list[ImageCache]:
    """The caches in ``model``."""
    return [value for module in model.modules() for value in list(module.__dict__.values()) if isinstance(value, ImageCache)]


def forget_images(model: nn.Module) -> None:
    """Take the caches in ``model`` away."""
    for cache in image_caches(model):
        cache.flush()
        cache.owner.__dict__.pop(cache.method, None)


def place_of(where: str | Path) -> tuple[int, Path | None]:
    """(bytes of host memory, folder) of "4GB" or of a folder, which gets a third of the free memory. ValueError or TypeError for others."""
    if not isinstance(where, (str, Path)) or not str(where).strip():
        raise TypeError(f"optimize: cache_images must be a size such as '4GB', or a folder, not {where!r}")
    text = str(where).strip()
    if isinstance(where, str) and text[0] in "0123456789.-+" and "/" not in text and text not in (".", "..") and not Path(text).is_dir():
        try:
            return bytes_of(text), None
        except ValueError as error:
            raise ValueError(f"optimize: cache_images: {error}; or give a folder that exists, or a path with a slash") from None
    folder = Path(text).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"optimize: cache_images={text!r} is a file: give a folder, or a size such as '4GB'")
    return psutil.virtual_memory().available // 3, folder


def keep_images(model: nn.Module, limit: int, folder: Path | None) -> list[str]:
    """Put caches where ``model``, which has none, computes features of images; notes for the report. ``limit``: bytes, of all together."""
    points, reasons = _points(model)
    names = {module: name for name, module in model.named_modules()}
    for owner, method, below in points:
        owner.__dict__[method] = ImageCache(owner, method, below, limit // len(points), folder)
    notes = [f"image features: what {'.'.join(filter(None, (names[owner], method)))} returns is kept" for owner, method, _ in points]
    if not points and not reasons:
        reasons = ["no module here encodes images"]
    return notes + [f"image features are not kept: {reason}" for reason in reasons]


def _points(model: nn.Module) -> tuple[list[tuple[nn.Module, str, list[str]]], list[str]]:
    """(module, method, names below) of what is kept, and the reasons for what is not: get_image_features where all below it is constant and
    the model's forward calls it, else image encoders."""
    points, reasons, covered = [], [], set()
    for name, owner in model.named_modules():
        if not callable(getattr(type(owner), FEATURES, None)) or delegates(owner, FEATURES) or not calls(owner, "forward", FEATURES):
            continue
        try:
            below = names_below(owner, FEATURES)
            reason = why_not_constant(owner, below)
        except NotUnderstood as error:
            reason = str(error)
        if reason:
            reasons.append(f"{'.'.join(filter(None, (name, FEATURES)))}: {reason}")
            continue
        points.append((owner, FEATURES, below))
        covered |= {id(module) for part in below for root in [getattr(owner, part)] if isinstance(root, nn.Module) for module in root.modules()}
    for name, module in model.named_modules():
        if id(module) in covered or not _encodes_images(module, model):
            continue
        covered |= {id(inside) for inside in module.modules()}
        if reason := why_not_constant(module, [""]):
            reasons.append(f"{name}: {reason}")
        else:
            points.append((module, "forward", [""]))
    return points, reasons


def _encodes_images(module: nn.Module, model: nn.Module) -> bool:
    """Whether ``module``, inside ``model``, is an image encoder."""
    if not isinstance(module, PreTrainedModel) or module is model or not any(True for _ in module.parameters()):
        return False
    config = getattr(module, "config", None)
    if any(getattr(config, name, None) is not None for name in ("text_config", "vision_config", "qformer_config")):
        return False
    modalities = getattr(module, "input_modalities", ())
    named = getattr(type(config), "base_config_key", "") == "vision_config"
    return named or (module.main_input_name == "pixel_values" and "text" not in modalities)


def fill(model: nn.Module, batches: Iterable[Mapping[str, Any]], progress: bool = True) -> int:
    """Compute the features of all images in ``batches`` (a DataLoader of the model's arguments) before training, with a progress bar.
    Each forward stops where the images' features are made. Returns how many images were computed now. ValueError without a cache."""
    caches = image_caches(model)
    if not caches:
        raise ValueError("there is no cache to fill: call fastpeft.optimize(model, cache_images='4GB') first, and read its report")
    device = next(model.parameters()).device
    before = sum(cache.computed for cache in caches)
    caches[0].filling = len(caches) == 1
    try:
        for batch in tqdm(batches, desc="image features", unit="batch", disable=not progress, leave=False):
            inputs = {name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for name, value in batch.items()}
            with torch.no_grad(), torch.random.fork_rng(devices=[]), suppress(_Filled):
                model(**inputs)
    finally:
        caches[0].filling = False
    for cache in caches:
        cache.flush()
    return sum(cache.computed for cache in caches) - before
