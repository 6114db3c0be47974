"""Cache of hidden states in any stack of decoder layers: what its lower layers, which train nothing, make of a sample is computed once.

Where layers 0 .. j-1 of a stack are constant (PEFT's ``layers_to_transform``, Excitor's and LLaMA-Adapter's upper layers), their last
output is one too, of each sequence (:mod:`fastpeft.caching.spans`). It is found by the content of what enters the first layer: hidden
states, so token ids and image features, positions and masks.

- Only constants are kept: at each call nothing in these layers, nor what the stack computes before them, may be trained, adapted, hooked
  or random, and what enters may not need a gradient. Otherwise the model's own layers run, and :meth:`LayerCache.note` says why.
- A change of a weight, of the configuration, of dtype or device empties the cache (see :mod:`fastpeft.caching.images`).
- Kept states are bits of the model's own results, in the batch in which a sequence first came: another batch size rounds differently.
- A training step is served, and any other call that keeps no keys and values; a step then returns no ``past_key_values``. Generation,
  ``output_hidden_states`` and ``output_attentions`` run the model's own layers.
- The first call in a process is computed whatever is kept, and rows with a sequence that was not met before are.
- Where reading takes longer than computing, both measured, the cache switches itself off. Host and device meet once a call, for digests.
- Pickles hold no cache; a copy of a model has an empty one of its own.
"""

from __future__ import annotations

import ast
import functools
import threading
from collections import Counter, defaultdict
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from fastpeft.caching.calls import digest_of_text
from fastpeft.caching.digest import digest_of_weights
from fastpeft.caching.frozen import configuration_of, source_of, state_of, tensors_below, why_not_constant
from fastpeft.caching.layer_calls import TIMED, LayerCall
from fastpeft.caching.memory import Kept
from fastpeft.caching.spans import Cut
from fastpeft.caching.store import FeatureStore, digest_of
from fastpeft.fused.stack.any_stack import asked_for
from fastpeft.fused.stack.flatten import why_not_flat
from fastpeft.fused.stack.lower import LAYER_CACHE
from fastpeft.registry import original_class
from fastpeft.static_shapes import sizes

STATES, TAIL = ("states",), ("tail",)


def before_layers(stack: nn.Module) -> list[str]:
    """Names of the modules, parameters and buffers of ``stack`` that its forward may use before its layers are through."""
    own = [*stack._modules, *stack._parameters, *stack._buffers]
    tree = source_of(original_class(stack), "forward")
    loops = [] if tree is None else [n for n in ast.walk(tree) if isinstance(n, ast.For) and "self.layers" in ast.unparse(n.iter)]
    after: set[str] = set()
    if len(loops) == 1:
        used = [(n.attr, n.lineno) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "self"]
        after = {name for name, _ in used} - {name for name, line in used if line <= loops[0].end_lineno}
    return [name for name in own if name != "layers" and name not in after]


class LayerCache:
    """Keeps the output of layer ``count`` - 1 of ``stack``. ``computed``, ``reused`` and ``loaded`` (from files) count tokens' sequences;
    ``passed``: calls that the model's own layers served, by reason; ``off``: why none is served any more.
    ``shelf``: where stacks with the same constants keep states for each other."""

    def __init__(self, stack: nn.Module, count: int, limit_bytes: int, folder: Path | None, shelf: dict[str, Any] | None = None):
        self.stack, self.count, self.limit_bytes, self.folder, self.shelf = stack, count, limit_bytes, folder, shelf
        self.layers = list(map(str, range(count)))
        self.computed = self.reused = 0
        self.passed: Counter[str] = Counter()
        self.off = ""
        self.tails = True
        self.kept = Kept(limit_bytes)
        self.longest: dict[str, int] = {}  # of each tail, by its key
        self.shapes: dict[str, tuple[torch.dtype, int]] = {}  # by constants: dtype, and how many values a layer returns (0: no tuple)
        self.seconds: dict[str, list[float]] = defaultdict(list)  # per token, of computing and of reading
        self._loaded_before, self._state, self.mixing = 0, None, ""
        self.lock = threading.RLock()

    @functools.cached_property
    def before(self) -> list[str]:
        """Names of what the stack uses before its layers are through."""
        return before_layers(self.stack)

    @property
    def loaded(self) -> int:
        return self._loaded_before + self.kept.loaded

    def __deepcopy__(self, memo) -> LayerCache:
        return LayerCache(deepcopy(self.stack, memo), self.count, self.limit_bytes, self.folder)

    def __reduce__(self):
        return type(None), ()

    def call(self, stack: nn.Module, given: dict[str, Any]) -> LayerCall | None:
        """What stands for the layers of ``stack`` in one call; None where its own run."""
        if reason := self.off or self._why_not(stack, given):
            self.passed[reason] += 1
            return None
        self._renew()
        if self.mixing:
            self.passed[self.mixing] += 1
            return None
        return LayerCall(self, given)

    def _why_not(self, stack: nn.Module, given: dict[str, Any]) -> str:
        if stack is not self.stack:
            return "a replica of the model runs"
        if torch.is_inference_mode_enabled():
            return "inference mode"
        if sizes() is not None:
            return "steps of static shapes, which a graph repeats, read nothing on the host"
        if given.get("prefix_lengths") is not None:
            return "samples of a row share what they begin with"
        layers, config = stack._modules["layers"], stack.config
        told = config.num_hidden_layers if not hasattr(config, "decoder_layers") else len(layers)  # BART's are the encoder's, whoever asks
        if self.count >= min(len(layers), told):
            return "it has fewer layers than it had"
        keeps_keys = given.get("use_cache")
        if keeps_keys is None:
            keeps_keys = _fills_a_cache(stack) and not (stack.training and torch.is_grad_enabled())
        if given.get("past_key_values") is not None or keeps_keys:
            return "keys and values are kept: train with use_cache=False, in the call or the configuration"
        if _packed_only_without_cache(stack, given):
            return "position_ids start again in a row, which marks packed samples only where use_cache=False"
        if what := next((what for what in ("attentions", "hidden_states", "router_logits") if asked_for(stack, what, given)), ""):
            return f"output_{what} is asked for"
        return why_not_constant(stack._modules["layers"], self.layers) or why_not_constant(stack, self.before)

    def _renew(self) -> None:
        """Empty the cache if anything below changed."""
        state = (state_of(self.stack._modules["layers"], self.layers), state_of(self.stack, self.before))
        if state != self._state:
            self._state, self.shapes, self.longest = state, {}, {}
            layers = self.stack._modules["layers"]
            self.mixing = why_not_flat(layers, *layers[: self.count], by_code=True)
            store = None if self.folder is None else FeatureStore(self.folder, self._identity())
            self._loaded_before += self.kept.loaded
            self.kept.flush()
            self.kept = Kept(self.limit_bytes, store)
            if self.shelf is not None:
                known = self.shelf.setdefault(digest_of(self._identity()), (self.kept, self.shapes, self.longest))
                self.kept, self.shapes, self.longest = known
            for name in () if store is None else store.keys():
                key, _, rest = name.partition("~")
                if rest:
                    self._longer(key, int(rest.partition("/")[0]))

    def _identity(self) -> dict[str, Any]:
        cls = original_class(self.stack)
        below = [*tensors_below(self.stack._modules["layers"], self.layers), *tensors_below(self.stack, self.before)]
        return {
            "weights": digest_of_weights(sorted(below, key=lambda named: named[0])),
            "code": [cls.__module__, cls.__qualname__, self.count, transformers.__version__, torch.__version__],
            "config": digest_of_text(configuration_of(self.stack)),
        }

    def refused(self, reason: str) -> None:
        self.passed[reason] += 1

    def find(self, made: Cut) -> list[list[Tensor] | None]:
        """What is kept of each span and its tail, one after the other; None where something is missing."""
        found = []
        for span, key, tail in zip(made.spans, made.keys, made.tails):
            entry, pieces = self.kept.get(key, [STATES]), []
            if entry is not None:
                pieces = [entry[STATES]]
                if span.tail:
                    longest = self.longest.get(key + tail, 0)
                    behind = self.kept.get(f"{key}{tail}~{longest}", [TAIL]) if longest >= span.tail else None
                    pieces = [] if behind is None else [*pieces, behind[TAIL][: span.tail]]
            found.append(pieces or None)
        return found

    def keep(self, made: Cut, number: int, states: Tensor) -> None:
        """``states`` [tokens, C] of a span and its tail."""
        span, key, tail = made.spans[number], made.keys[number], made.keys[number] + made.tails[number]
        self.computed += 1
        if self.kept.get(key, [STATES]) is None:
            self.kept.put(key, {STATES: states[: span.end - span.begin]})
        if span.tail > self.longest.get(tail, 0):
            self.kept.forget(f"{tail}~{self.longest.get(tail)}")
            self.kept.put(f"{tail}~{span.tail}", {TAIL: states[span.end - span.begin :]})
            self._longer(tail, span.tail)

    def _longer(self, tail: str, length: int) -> None:
        self.longest[tail] = max(length, self.longest.get(tail, 0))

    def timed(self, what: str, seconds: float, tokens: int) -> None:
        """Switch off where reading takes longer."""
        self.seconds[what].append(seconds / max(1, tokens))
        read, computed = self.seconds["reading"], self.seconds["computing"]
        if len(read) == TIMED and computed and min(read) > min(computed):
            self.off = f"reading takes {1e6 * min(read):.2f} us a token, computing {1e6 * min(computed):.2f}"
            self.kept = Kept(0)

    def flush(self) -> None:
        """Write what waits, so that other processes see it."""
        self.kept.flush()

    def note(self) -> str:
        """What it did."""
        held = f"{len(self.kept)} kept, {self.kept.bytes / 1e6:.0f} MB in memory"
        held += f", {self.kept.evicted} evicted" if self.kept.evicted else ""
        held += f", {self.kept.refused} times no room" if self.kept.refused else ""
        others = "".join(f"; {count} calls: {reason}" for reason, count in self.passed.items())
        name = f"hidden states after layer {self.count - 1} of {type(self.stack).__name__}"
        return f"{name}: {held}; computed {self.computed} times, reused {self.reused} times{others}"


def _fills_a_cache(stack: nn.Module) -> bool:
    """Whether a stack keeps keys and values unless told otherwise; an image encoder never does."""
    return bool(getattr(stack.config, "use_cache", False))


def _packed_only_without_cache(stack: nn.Module, given: dict[str, Any]) -> bool:
    """Whether without a cache of keys and values, which a call served has not, positions would say more than they do with it."""
    positions = given.get("position_ids")
    if given.get("use_cache") is False or not _fills_a_cache(stack) or getattr(stack, "alone", False):
        return False
    if positions is None or given.get("attention_mask") is not None:
        return False
    positions = positions[0] if positions.dim() == 3 else positions
    return bool((positions.diff(dim=-1) != 1).any())


class Known:
    """Stands for a cache that has every state, of what a step costs: hidden states pass its layers as they are."""

    def __init__(self, count: int):
        self.count = count

    def call(self, stack: nn.Module, given: dict[str, Any]) -> Known:
        self.layers = [_Passed(layer) if i < self.count else layer for i, layer in enumerate(stack._modules["layers"])]
        return self

    def refused(self, reason: str) -> None:
        raise RuntimeError(reason)


class _Passed:
    """Returns what a layer is given."""

    def __init__(self, layer: nn.Module):
        self.layer = layer

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


def layer_caches(model: nn.Module) -> list[LayerCache]:
    """The caches in ``model``."""
    return [cache for module in model.modules() if isinstance(cache := module.__dict__.get(LAYER_CACHE), LayerCache)]
