"""Base class of methods: parameters marked or attached inside one part of a backbone, named on disk as PEFT names them.

A method knows operators and module types, never a particular backbone: where it attaches comes from a :class:`Part`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import regex
import torch
from torch import nn

from fastpeft._when_imported import loaded
from fastpeft.methods.peft_config import Refused

# Names of the modules that methods attach to the base's own, and of every parameter they add; whatever else a model holds is its base.
# Registered methods bring theirs (``Method.adapter_modules``).
ADAPTER_MODULES = ["prefix_encoder", "excitor", "adaption", "mm_adapter", "mm_adapter_mlp"]
_ADAPTER_PARAMETERS = ("lora_A", "lora_B", "ia3_l")
MATCHING = 0.5  # seconds for one expression and one name; a real one takes microseconds


@dataclass(frozen=True)
class Part:
    """One part of a backbone and where methods attach in it.

    Module names are relative to the part. ``lora``, ``ia3`` and ``ia3_feedforward`` are PEFT's ``target_modules`` (see :func:`matches`);
    ``attention`` and ``ffn`` name the modules whose parameters those treatments train. ``prefix_host`` is the module that runs the layers
    and hands prefixes to their self-attention (it has ``prefix_encoder`` and ``prefix_shape = (layers, heads, head_dim)``), and
    ``prefix_tokens`` the papers' number of them.
    ``norms_left_out`` are norms that LayerNorm skips. Two parts may share a path: ``excludes`` are modules there that belong to another
    part, ``only`` the modules that alone belong to this one.
    """

    name: str
    path: str
    lora: tuple[str, ...] = ()
    ia3: tuple[str, ...] = ()
    ia3_feedforward: tuple[str, ...] = ()
    attention: tuple[str, ...] | str = ()
    ffn: tuple[str, ...] | str = ()
    prefix_host: str | None = None
    prefix_tokens: int = 10
    norms_left_out: tuple[str, ...] = ()
    peft_task: str | None = None
    excludes: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def holds(self, name: str) -> bool:
        """Whether what has this name below ``path`` belongs to the part."""
        return not _inside(name, self.excludes) and (not self.only or _inside(name, self.only))

    def of(self, model: nn.Module) -> nn.Module:
        """The part's module."""
        return model.get_submodule(self.path) if self.path else model


def _inside(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def matches(name: str, targets: Sequence[str] | str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole name; a sequence holds names or their endings."""
    if isinstance(targets, str):
        return matched(targets, name, whole=True)
    return any(name == target or name.endswith("." + target) for target in targets)


def matched(expression: str, name: str, whole: bool = False) -> bool:
    """Whether a regular expression matches from the start of ``name``, or (``whole``) all of it. ValueError for one that takes too long:
    some grow exponentially with the name."""
    try:
        return bool((regex.fullmatch if whole else regex.match)(expression, name, timeout=MATCHING))
    except TimeoutError:
        wrong = f"the regular expression {expression[:200]!r} takes too long to match {name!r}: write it without nested repeats"
        raise ValueError(wrong) from None
    except (regex.error, RecursionError) as error:
        raise ValueError(f"{expression[:200]!r} is no regular expression ({error})") from None


def check_targets(method: str, targets: Any) -> tuple[str, ...] | str | None:
    """Module names as a method keeps them (a list becomes a tuple); ValueError for what :func:`matches` cannot take."""
    if targets is None:
        return None
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise ValueError(f"{method}: {targets!r} is no regular expression ({error}); or give a list of names") from None
        return targets
    if not isinstance(targets, list | tuple | set) or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"{method}: {targets!r} names no modules; give a list of names or a regular expression")
    return tuple(sorted(targets) if isinstance(targets, set) else targets)


def as_json(targets: Sequence[str] | str | None) -> list[str] | str | None:
    """Module names as an ``adapter_config.json`` has them."""
    return list(targets) if isinstance(targets, tuple) else targets


def targets_read(method: str, targets: Any) -> tuple[str, ...] | str:
    """Module names of a PEFT configuration, where PEFT has resolved them; ValueError for none."""
    found = check_targets(method, targets)
    if not found:
        raise ValueError(f"{method} adapter: target_modules={targets!r} names no modules; give PEFT's list of names or regular expression")
    return found if isinstance(found, str) else tuple(sorted(found))


def check_layers(method: str, layers: Any) -> tuple[int, ...] | None:
    """Numbers of layers as a method keeps them: an integer is one layer, none are all. ValueError for anything else."""
    numbers = (layers,) if isinstance(layers, int) else layers
    if numbers is None or numbers in ([], ()):
        return None
    if not isinstance(numbers, list | tuple) or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise ValueError(f"{method}: layers_to_transform={layers!r} names no layers; give a number, or a list of numbers, from 0")
    return tuple(sorted(numbers))


def in_layers(name: str, layers: Sequence[int], patterns: Sequence[str]) -> bool:
    """PEFT's ``layers_to_transform`` and ``layers_pattern``: whether the first number in ``name`` that follows one of the names
    ``patterns`` (none given: any name but the first) is one of ``layers``."""
    heads = [rf"(?:^|.*?\.){pattern}" for pattern in patterns] or [r".*?\.[^.]*"]
    for head in heads:
        try:
            if found := regex.match(rf"{head}\.(\d+)\.", name, timeout=MATCHING):
                return int(found.group(1)) in layers
        except (TimeoutError, regex.error, IndexError) as error:
            raise ValueError(f"layers_pattern: {head!r} is no usable regular expression ({error})") from None
    return False


def find(root: nn.Module, targets: Sequence[str] | str, kinds: tuple[type, ...] = (nn.Module,)) -> Iterator[tuple[str, nn.Module]]:
    """Modules of ``root`` whose names match ``targets``, of one of ``kinds``."""
    for name, module in root.named_modules():
        if name and matches(name, targets) and isinstance(module, kinds):
            yield name, module


def has_hooks(module: nn.Module) -> bool:
    """True if the module has hooks (pruning and spectral norms are some) or its own forward (accelerate's offloading): call it, do not
    reconstruct it from its parameters."""
    if "forward" in module.__dict__:
        return True
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(any(map(sees_values, hooks.values())) for hooks in kinds if hooks) or watched_globally()


def watched_globally() -> bool:
    """Whether a hook on every module there is (torch.nn.modules.module.register_module_forward_hook and its like) sees values."""
    every = torch.nn.modules.module
    kinds = (every._global_forward_hooks, every._global_forward_pre_hooks, every._global_backward_hooks, every._global_backward_pre_hooks)
    return any(any(map(sees_values, hooks.values())) for hooks in kinds if hooks)


def sees_no_values(hook: Callable) -> Callable:
    """Mark a hook that reads no tensor's shape or values and changes nothing: a module with such hooks alone is not watched."""
    hook.sees_no_values = True
    return hook


def _collects(hook: Callable) -> str | None:
    """Under which name one of transformers' capturing hooks collects; None where that cannot be told. Nothing is collected when
    checkpointing runs a layer again: a hook that sleeps must not decide in the forward pass either."""
    cells = zip(hook.__code__.co_freevars, hook.__closure__ or ()) if hasattr(hook, "__code__") else ()
    return next((cell.cell_contents for name, cell in cells if name == "key"), None)


FSDP = "torch.distributed.fsdp._fully_shard._fsdp_state"


def sees_values(hook: Callable) -> bool:
    """Whether a hook may read or change what its module computes."""
    where = getattr(hook, "__module__", None)
    if where == "transformers.utils.output_capturing":  # once installed they stay, and sleep while nobody asks for what they collect
        collector = getattr(loaded(where), "_active_collector", None)
        asked = None if collector is None else collector.get()
        return collector is None or (bool(asked) and _collects(hook) in {None, *asked})
    # the tracker follows names, for FlopCounterMode; FSDP's gather the weights of a module that is called, and let them go
    return where not in ("torch.utils.module_tracker", FSDP) and not getattr(hook, "sees_no_values", False)


def must_be_called(module: nn.Module) -> bool:
    """Whether something that sees no values is done around each call of ``module``, so that no other function can take the place of its
    forward: FSDP gathers its weights there."""
    kinds = (module._forward_hooks, module._forward_pre_hooks)
    return any(getattr(hook, "__module__", None) == FSDP for hooks in kinds if hooks for hook in hooks.values())


@functools.lru_cache(maxsize=1 << 16)  # the image cache asks of every name at every call
def is_adapter(name: str) -> bool:
    """Whether the parameter of this name was added by a method (as opposed to belonging to the base)."""
    return any(piece in _ADAPTER_PARAMETERS or piece in ADAPTER_MODULES for piece in name.split("."))


@dataclass(frozen=True)
class Method:
    """A treatment of one part; the fields of a subclass are its options."""

    name: ClassVar[str]
    peft_type: ClassVar[str | None] = None  # PEFT's name of the method, where PEFT has it
    peft_fields: ClassVar[dict[str, str | Refused]] = {}  # PEFT's configuration: field -> READ, NEUTRAL or Refused
    old_file: ClassVar[str | None] = None  # what its tensors were saved in before it had PEFT's format
    mergeable: ClassVar[bool] = True  # whether weights of the base can take its parameters in
    merge_order: ClassVar[int] = 0  # lower first: IA3 rescales what LoRA adds, and an adapter's output is the input of both
    by_modality: ClassVar[bool] = False  # whether what it computes depends on a sample's modality
    needs_fused_attention: ClassVar[bool] = False  # whether it reaches attention through fastpeft's own modules alone
    adapter_modules: ClassVar[tuple[str, ...]] = ()  # of a registered method: attributes of the base's modules under which it adds its own

    def attach(self, root: nn.Module, part: Part) -> None:
        """Attach or mark this method's parameters in ``root``, all of whose base parameters are frozen on entry."""
        raise NotImplementedError(f"{type(self).__name__} must say how it attaches")

    def trains(self, root: nn.Module, part: Part) -> dict[str, nn.Parameter]:
        """The base's own parameters that this method trains, by their names in ``root``."""
        return {}

    def tensors(self, root: nn.Module, part: Part) -> dict[str, torch.Tensor]:
        """What must be saved, as views of the parameters, under PEFT's names where PEFT has the method."""
        return {name: p.detach() for name, p in self.trains(root, part).items()}

    def check(self, root: nn.Module, part: Part, tensors: dict[str, torch.Tensor], where: str) -> None:
        """ValueError naming every key of ``tensors`` that does not fit the attached part."""
        check_keys(self.tensors(root, part), tensors, where)

    def load(self, root: nn.Module, part: Part, tensors: dict[str, torch.Tensor]) -> None:
        """Copy ``tensors``, checked and named as :meth:`tensors` names them, into an attached part."""
        with torch.no_grad():
            for name, mine in self.tensors(root, part).items():
                mine.copy_(tensors[name])

    def merge(self, root: nn.Module, part: Part, mixtures: Mapping[nn.Module, torch.Tensor]) -> bool:
        """Fold this method's parameters into the base weights of an attached part and remove them. A method that trains the base's own
        parameters has nothing to fold.

        mixtures: the weights [2] of the two experts of each layer that mixes them alike for every sample. Returns False where some
        parameters stay, because no weight can hold them. ValueError where the method as a whole is not ``mergeable``.
        """
        if not self.mergeable:
            raise ValueError(f"no weight can take in {self}; keep the adapter beside the base")
        return True

    def peft_config(self, root: nn.Module, part: Part) -> dict[str, Any]:
        """The part's ``adapter_config.json``."""
        return {}

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> Method:
        """The method that a PEFT ``adapter_config.json`` describes; ValueError for fields that change outputs in another way."""
        raise NotImplementedError(f"{cls.__name__} must say how it reads PEFT's configuration")

    def check_config(self, root: nn.Module, part: Part, config: dict[str, Any]) -> None:
        """ValueError where ``config``, the ``adapter_config.json`` beside the tensors, is not of this method, attached to ``root``."""
        if config.get("peft_type") != self.peft_type:
            raise ValueError(f"peft_type is {config.get('peft_type')!r}, and the plan has {self}")
        mine, theirs = self.from_peft(self.peft_config(root, part)), self.from_peft(config)
        if not mine.equivalent(theirs, part):
            raise ValueError(f"it describes {theirs!r}, and the plan has {mine!r}")

    def equivalent(self, other: Method, part: Part) -> bool:
        """Whether ``other`` computes the same on this part (options that only matter while training aside)."""
        return self == other

    def options(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __str__(self) -> str:
        return self.name


def check_keys(expected: dict[str, torch.Tensor], got: dict[str, torch.Tensor], where: str) -> None:
    """Raise one ValueError that names every missing, unexpected and misshapen key of ``got``, and every one too large for its dtype."""
    wrong = []
    for kind, keys in (("missing", expected.keys() - got.keys()), ("unexpected", got.keys() - expected.keys())):
        if keys:
            wrong.append(f"{len(keys)} {kind}: {shorten(sorted(keys))}")
    both = sorted(expected.keys() & got.keys())
    shapes = [
        f"{key} is {list(got[key].shape)}, expected {list(expected[key].shape)}" for key in both if got[key].shape != expected[key].shape
    ]
    if shapes:
        wrong.append(f"{len(shapes)} misshapen: {shorten(shapes)}")
    large = [f"{key} in {expected[key].dtype}" for key in both if not _fits(got[key], expected[key].dtype)]
    if large:
        wrong.append(f"{len(large)} too large for the model's dtype: {shorten(large)}")
    if wrong:
        raise ValueError(f"{where} does not fit this model and plan; nothing was loaded. " + "; ".join(wrong))


def _fits(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether finite values stay finite in ``dtype``; of a tensor without values, yes."""
    if tensor.is_meta or not tensor.is_floating_point() or torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max:
        return True
    return bool(tensor.to(dtype).isfinite().all())


def shorten(items: Sequence[str], most: int = 8) -> str:
    return ", ".join(items[:most]) + (f", ... and {len(items) - most} more" if len(items) > most else "")
