"""Cache of image features in any transformers model: what a frozen image encoder makes of an image is computed once.

A model's ``get_image_features`` and ``get_video_features`` (or, where something they use is trained, the image encoder's ``forward``) are
called through an :class:`ImageCache`, an attribute of that module: classes, parameters, names and state dicts stay. A call is taken apart
by image, or by video; each is known by the digest of its pixels as they are given and of every other argument that enters. Images that
were met before are not computed.

- Only constants are kept: at each call nothing below may be trained, adapted, hooked or random. Otherwise the model's own method runs.
- A change of a weight (load_state_dict, in-place edits, another dtype or device, other modules, the configuration) empties the cache.
  Edits through ``.data`` raise no version: on the host, bytes at the start, middle and end of each tensor are compared as well; on a
  device call ``optimize(model, cache_images=...)`` again.
- Kept features are bits of the model's own results, in the batch in which an image first came: another batch size rounds differently.
- The first call in a process, and the first of several images, are computed whatever is kept: they show how an output looks and how images
  share it. The last image of a batch is then computed alone too: if its features depend on the others, or if a model's arguments cannot be
  taken apart, whole calls are kept.
- The host waits once a call for the digests (32 bytes an image), nowhere else; what fills the cache is copied beside the device's work.
- torch.compile, torch.func, inference mode and steps of static shapes (CUDA graphs) run the model's own method. Compile the language
  model alone to have both.
- DataParallel's replicas run the model's own method.
- Pickles hold no cache and load without fastpeft; a copy of a model has an empty cache of its own.
"""

from __future__ import annotations

import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from copy import deepcopy
from functools import update_wrapper
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._C._functorch import get_interpreter_stack
from transformers.utils import ModelOutput

from fastpeft.caching.calls import Call, digest_of_text
from fastpeft.caching.digest import digest_of_weights
from fastpeft.caching.frozen import Wrapper, asks_for_gradients, configuration_of, state_of, tensors_below, why_not_constant
from fastpeft.caching.memory import Entry, Kept
from fastpeft.caching.outputs import Pattern, asking_for_gradients, computed_when_read, leaves
from fastpeft.caching.store import FeatureStore
from fastpeft.progress import progress_bar
from fastpeft.static_shapes import sizes

REPLICATE = "_replicate_for_data_parallel"


class _Filled(BaseException):
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
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or get_interpreter_stack() or sizes() is not None:
            return getattr(type(self.owner), self.method)(self.owner, *args, **kwargs)  # Dynamo takes a bound method for this attribute
        own = getattr(type(self.owner), self.method).__get__(self.owner)
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
        return {
            "weights": digest_of_weights(sorted(tensors_below(self.owner, self.below), key=lambda named: named[0])),
            "code": [cls.__module__, cls.__qualname__, self.method, transformers.__version__, torch.__version__],
            "config": digest_of_text(configuration_of(self.owner)),
        }

    def _serve(self, call: Call, constants: str, run: Callable[[Mapping[str, Any]], Any]) -> Any:
        pattern = self._patterns.get(constants)
        if pattern is not None and pattern.whole and not call.whole:
            call = call.as_whole()
            if (constants := call.constants()) is None:
                return run(call.values)
            pattern = self._patterns.get(constants)
        keys = call.keys(constants)
        paths = None if pattern is None else list(pattern.kept(pattern.output))
        found = {key: None if paths is None else self.kept.get(key, paths) for key in keys}
        missing = [key for key, entry in found.items() if entry is None]  # an image that a batch holds twice is computed once
        if pattern is None or len(missing) == len(keys) or (len(keys) > 1 and not pattern.compared):
            output = self._run(run, call.values)
            if self._varies:
                return output
            self._learn(call, constants, keys, output, run)
            return self._watched(self._as_asked(output), call, constants, keys, run)
        if missing:
            made = self._made(pattern, call, keys, missing, run)
            if made is None:
                return run(call.values)
            found |= made
        self.computed += len(missing)
        self.reused += len(keys) - len(missing)
        return self._output(pattern, [found[key] for key in keys], call, constants, keys, run)

    def _as_asked(self, output: Any) -> Any:
        """``output``; where a hook below makes it require a gradient that no parameter needs, it does."""
        return asking_for_gradients(output) if torch.is_grad_enabled() and asks_for_gradients(self.owner, self.below) else output

    def _made(self, pattern: Pattern, call: Call, keys: list[str], missing: list[str], run: Callable) -> dict[str, Entry] | None:
        """The entries of some of the images, computed and kept; None where nothing can be kept after all."""
        call = call.only([keys.index(key) for key in missing])
        part = self._run(run, call.values)
        if self._varies:
            return None
        try:
            made = dict(zip(missing, pattern.split(part, call.sizes, call.tiles)))
        except (ValueError, TypeError, KeyError):
            return None
        self._put(made)
        return made

    def _run(self, run: Callable[[Mapping[str, Any]], Any], values: Mapping[str, Any]) -> Any:
        """Compute, and see whether random numbers were drawn or a gradient would flow: then nothing is kept."""
        before = torch.get_rng_state()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not asks_for_gradients(self.owner, self.below)):
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
                    one = run(call.only([len(keys) - 1]).values)
                except (RuntimeError, ValueError, IndexError, TypeError) as error:
                    pattern = Pattern(None, frozenset(), compared=True, whole=f"an image alone is refused ({error})")
            if pattern is None or not pattern.whole:
                pattern = Pattern.of(one, self._read)
            if len(keys) > 1 and not pattern.whole:
                pattern.compare(one, output, call.sizes, call.tiles)
            self._patterns[constants] = pattern
        if pattern.whole and not call.whole:
            self.passed[f"kept by call, not by image: {pattern.whole}"] += 1
            whole = call.as_whole()
            if (constants := whole.constants()) is not None:
                self._learn(whole, constants, whole.keys(constants), output, run)
            return
        try:
            parts = pattern.split(output, call.sizes, call.tiles)
        except (ValueError, TypeError, KeyError):
            pattern.whole = "how a batch's output holds its images is not known"
            return
        self.computed += len(keys)
        self._put(dict(zip(keys, parts)))

    def _put(self, made: Mapping[str, Entry]) -> None:
        for key, entry in made.items():
            self.kept.put(key, entry)

    def _watched(self, output: Any, call: Call, constants: str, keys: list[str], run: Callable) -> Any:
        """``output``; if a field that is not kept is read, it will be."""
        pattern = self._patterns.get(constants)
        if pattern is None or pattern.whole or not pattern.unkept or not isinstance(output, ModelOutput):
            return output
        shell = pattern.without_unkept(output)
        return computed_when_read(shell, pattern.unkept, lambda: output, self._keeper(call, constants, keys, run))

    def _output(self, pattern: Pattern, entries: list[Entry], call: Call, constants: str, keys: list[str], run: Callable) -> Any:
        """What is kept, put together; other fields are computed when they are read, and kept from then on."""
        output = self._as_asked(pattern.join(entries))
        if not pattern.unkept or not isinstance(output, ModelOutput):
            return output
        state, grad, kind = self._state, torch.is_grad_enabled(), call.device.type
        cast = {"enabled": torch.is_autocast_enabled(kind), "dtype": torch.get_autocast_dtype(kind)}

        def compute() -> ModelOutput:
            if state_of(self.owner, self.below) != state:
                raise RuntimeError("the image encoder was changed since this output was made: read it before that")
            with torch.inference_mode(False), torch.set_grad_enabled(grad), torch.autocast(kind, **cast):
                return run(call.values)

        return computed_when_read(output, pattern.unkept, compute, self._keeper(call, constants, keys, run))

    def _keeper(self, call: Call, constants: str, keys: list[str], run: Callable) -> Callable[[Iterable[str], ModelOutput], None]:
        state = self._state

        def keep(names: Iterable[str], output: ModelOutput) -> None:
            """These fields of ``output`` were read: keep them too."""
            with self._lock:
                if state is self._state and not self._read.issuperset(names):
                    self._read.update(names)
                    self._patterns = {}
                    self.computed -= len(keys)
                    self._learn(call, constants, keys, output, run)

        return keep

    def serves(self, given: Mapping[str, Any]) -> bool:
        """Whether a model with these arguments may call this cache: those of images or of videos are arguments of the model, too."""
        first = next(iter(inspect.signature(getattr(type(self.owner), self.method).__get__(self.owner)).parameters))
        return self.method == "forward" or given.get(first) is not None

    def flush(self) -> None:
        """Write what waits, so that other processes see it."""
        self.kept.flush()

    def note(self) -> str:
        """What it did."""
        where = f"{type(self.owner).__name__}.{self.method}"
        held = f"{len(self.kept)} kept, {self.kept.bytes / 1e6:.0f} MB in memory"
        others = "".join(f"; {count} calls: {reason}" for reason, count in self.passed.items())
        return f"image features of {where}: {held}; computed {self.computed} times, reused {self.reused} times{others}"


class Replicas(Wrapper):
    """Stands over ``owner``'s method that makes DataParallel's replicas, which have tensors of their own and run their own ``method``."""

    def __init__(self, owner: nn.Module, method: str):
        self.owner, self.method = owner, method

    def __call__(self) -> nn.Module:
        replica = getattr(type(self.owner), REPLICATE)(self.owner)
        for name in (REPLICATE, self.method):
            replica.__dict__.pop(name, None)
        return replica

    def __deepcopy__(self, memo) -> Replicas:
        return Replicas(deepcopy(self.owner, memo), self.method)

    def __reduce__(self):
        return getattr, (self.owner, REPLICATE)


def image_caches(model: nn.Module) -> list[ImageCache]:
    """The caches in ``model``."""
    return [value for module in model.modules() for value in list(module.__dict__.values()) if isinstance(value, ImageCache)]


def fill(model: nn.Module, batches: Iterable[Mapping[str, Any]], progress: bool = True) -> int:
    """Compute the features of all images in ``batches`` (a DataLoader of the model's arguments) before training, with a progress bar.
    Each forward stops where the images' features are made. Returns how many images were computed now. ValueError without a cache."""
    caches = image_caches(model)
    if not caches:
        raise ValueError("there is no cache to fill: call fastpeft.optimize(model, cache_images='4GB') first, and read its report")
    device = next(model.parameters()).device
    before = sum(cache.computed for cache in caches)
    try:
        for batch in progress_bar(batches, desc="image features", unit="batch", disable=not progress, leave=False):
            inputs = {name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for name, value in batch.items()}
            serving = [cache for cache in caches if cache.serves(inputs)]
            for cache in caches:
                cache.filling = serving == [cache]
            with torch.no_grad(), torch.random.fork_rng(devices=[]), suppress(_Filled):
                model(**inputs)
    finally:
        for cache in caches:
            cache.filling = False
    for cache in caches:
        cache.flush()
    return sum(cache.computed for cache in caches) - before
