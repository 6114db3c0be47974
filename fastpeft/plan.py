"""Plans in the papers' notation, one treatment per part ("F/LoRA/LoRA"): build a model, apply a plan, count what it trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from fastpeft.documents import parse_yaml
from fastpeft.fused.layout_aware import make_room_for_prefix
from fastpeft.fused.stack.llama import FusedLlamaModel
from fastpeft.methods import METHODS, Frozen, LoRA, Method, Part, find_method, is_adapter
from fastpeft.methods.adapted import Adapted
from fastpeft.methods.base import ADAPTER_MODULES
from fastpeft.methods.quantized import size_of
from fastpeft.models import ModelSource, load_model, new_model, parts_of, resolve
from fastpeft.models.quantize import check_quantize, quantize_base
from fastpeft.optimize import optimize
from fastpeft.registry import has_form

Treatment = Method | str | Mapping[str, Any] | None


@dataclass(frozen=True)
class Plan:
    """What is done to each part: ``{part: (method, ...)}``. ``str(plan)`` is the papers' notation."""

    treatments: dict[str, tuple[Method, ...]]

    def __post_init__(self):
        for part, methods in self.treatments.items():
            kinds = [m.peft_type or m.name for m in methods]
            if len(set(kinds)) < max(1, len(kinds)) or ("F" in kinds and len(kinds) > 1):
                given = "+".join(map(str, methods)) or "nothing"
                raise ValueError(f"part {part!r}: {given!r} cannot be combined; F stands alone, and a kind of method comes once")

    def __str__(self) -> str:
        return "/".join("+".join(map(str, methods)) for methods in self.treatments.values())

    def to_dict(self) -> dict[str, list[dict[str, Any]]]:
        """JSON- and YAML-able; :func:`parse` reads it back."""
        return {part: [{m.name: m.options()} for m in methods] for part, methods in self.treatments.items()}


def parse(plan: str | Path | Mapping[str, Treatment], parts: tuple[Part, ...], **options) -> Plan:
    """A plan from "F/LoRA/LoRA", from ``{"vit": "F", "jtm": LoRA(r=8)}`` (parts left out are frozen), or from a YAML file of that form.

    Treatments combine with "+" ("Excitor+LoRA") and take options in brackets ("Excitor(layers=[2, 4], r=8)"). ``options`` (``r=8``) go to
    every method of the plan that has a field of that name. ValueError names what is wrong: an unknown treatment, a wrong number of parts,
    an option nobody takes.
    """
    names = [part.name for part in parts]
    if not isinstance(plan, str | Path | Mapping):
        raise ValueError(f"{plan!r} is no plan; give one treatment per part ({'/'.join(names)}) or a mapping from parts to treatments")
    if isinstance(plan, Path) or (isinstance(plan, str) and plan.endswith((".yaml", ".yml"))):
        plan = _read_yaml(Path(plan))
    if isinstance(plan, str):
        entries = split_outside(plan, "/")
        if len(entries) != len(names):
            raise ValueError(f"plan {plan!r} has {len(entries)} treatments; this model has {len(names)} parts: {'/'.join(names)}")
        plan = dict(zip(names, entries))
    if unknown := [name for name in plan if name not in names]:
        raise ValueError(f"no part called {', '.join(map(repr, unknown))}; this model's parts are {', '.join(names)}")
    used: set[str] = set()
    treatments = {name: _treatment(plan.get(name), options, used, name) for name in names}
    if unused := sorted(set(options) - used):
        raise ValueError(f"no method of this plan takes {', '.join(unused)}")
    return Plan(treatments)


def split_outside(text: str, mark: str) -> list[str]:
    """``text`` taken apart at each ``mark`` outside brackets, without the spaces around it."""
    pieces, depth, begin = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == mark and depth == 0:
            pieces.append(text[begin:at])
            begin = at + 1
    return [piece.strip() for piece in (*pieces, text[begin:])]


def _named(entry: str, part: str) -> tuple[str, dict[str, Any]]:
    """A treatment's name and options of "Excitor(layers=[2, 4], r=8)"; values are YAML's. ValueError for what is written otherwise."""
    name, bracket, rest = entry.partition("(")
    if not bracket:
        return name, {}
    pairs = [pair.partition("=") for pair in split_outside(rest.removesuffix(")"), ",")]
    if not rest.endswith(")") or not all(key.strip() and equals and value.strip() for key, equals, value in pairs):
        raise ValueError(f"part {part!r}: {entry!r} is no treatment with options: write {name.strip()}(option=value, option=value)")
    if len({key.strip() for key, *_ in pairs}) < len(pairs):
        raise ValueError(f"part {part!r}: {entry!r} has an option twice")
    try:
        return name.strip(), {key.strip(): _value(value) for key, _, value in pairs}
    except yaml.YAMLError as error:
        raise ValueError(f"part {part!r}: {entry!r}: {' '.join(str(error).split())}") from None


def _value(text: str) -> Any:
    """A YAML value; 1e-2, which YAML reads as text, is a number."""
    value = parse_yaml(text)
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _read_yaml(path: Path) -> Mapping[str, Treatment] | str:
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the plan {path}: {' '.join(str(error).split())}") from None
    content = content.get("plan", content) if isinstance(content, dict) else content
    if not isinstance(content, dict | str):
        raise ValueError(f"{path} holds no plan; expected 'plan: F/LoRA/LoRA' or a mapping from parts to treatments")
    return content


def _treatment(entry: Treatment | list, options: Mapping[str, Any], used: set[str], part: str) -> tuple[Method, ...]:
    if entry is None:
        return (Frozen(),)
    if isinstance(entry, Method):
        return (entry,)
    if isinstance(entry, str):
        return tuple(_method(*_named(one, part), options, used, part) for one in split_outside(entry, "+"))
    if isinstance(entry, Mapping):
        return tuple(_method(name, own, options, used, part) for name, own in entry.items())
    if isinstance(entry, list | tuple):
        return tuple(m for one in entry for m in _treatment(one, options, used, part))
    raise ValueError(f"part {part!r}: {entry!r} is no treatment; give a name, a method such as LoRA(r=4), or a mapping of options")


def _method(name: str, own: Mapping[str, Any] | None, options: Mapping[str, Any], used: set[str], part: str) -> Method:
    cls = find_method(str(name))
    if cls is None:
        close = get_close_matches(str(name).lower(), [known.lower() for known in METHODS], n=1)
        hint = "".join(f" (did you mean {known}?)" for known in METHODS if [known.lower()] == close)
        raise ValueError(f"part {part!r}: unknown treatment {name!r}{hint}; known: {', '.join(METHODS)}")
    own = {} if own is None else own
    if not isinstance(own, Mapping):
        raise ValueError(f"part {part!r}: {own!r} are no options of {cls.name}; give a mapping, such as {{'r': 4}}")
    fields = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(own) - fields):
        raise ValueError(f"part {part!r}: {cls.name} has no option {', '.join(unknown)}; it has {', '.join(sorted(fields)) or 'none'}")
    shared = {k: v for k, v in options.items() if k in fields}
    used.update(shared)
    return cls(**(shared | dict(own)))


def plan_for(parts: tuple[Part, ...], plan: str | dict, **lora) -> Plan:
    """``plan`` (notation, YAML file or mapping) for these parts. Options in ``lora`` (r=, lora_alpha=, lora_dropout=) that are not None
    replace those of all its LoRA. A plan without LoRA ignores them, as tables print a rank for every row."""
    given = {name: value for name, value in lora.items() if value is not None}
    LoRA(**given)  # bad values are errors in any plan
    parsed = parse(plan, parts)

    def with_options(method):
        return dataclasses.replace(method, **given) if isinstance(method, LoRA) else method

    return Plan({part: tuple(map(with_options, methods)) for part, methods in parsed.treatments.items()})


def build(
    model: str | Path | ModelSource,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    pretrained: bool = True,
    quantize: str | None = None,
    **overrides,
) -> nn.Module:
    """A backbone, ready to run on fastpeft's operators, in evaluation mode.

    model: a name of ``fastpeft.models.NAMES`` (miss, llava-med, llama-7b, excitor-7b, lavin-7b, ..., and their ``-tiny`` siblings), or a
    local transformers folder: BLIP VQA, LLaMA, LLaVA-Med, or an Excitor or LaVIN that `fastpeft convert` or ``save_pretrained`` wrote. A
    name whose weights ship with the package loads them unless ``pretrained=False`` or ``overrides`` change its shape (fields of the
    configuration: ``image_size=224`` of miss, ``num_hidden_layers=8`` of a LLaMA, ``text_config={...}`` of a model of both); otherwise
    weights are random and depend on ``seed`` alone. device "meta" allocates nothing: enough to count, plan and estimate.
    quantize: "4bit" or "8bit" keeps the frozen linear layers of a language model and its image encoder in bitsandbytes' format; adapters
    train on top, T, Attention and FFN cannot. ValueError names what cannot be, and a library that is missing.
    """
    device, source = torch.device(device), resolve(model)
    overrides = dict(source.overrides) | overrides
    if quantize is not None:
        check_quantize(quantize, dtype, source, device.type == "meta")
    if source.named and (source.folder is None or overrides or not pretrained):
        built = new_model(source, device=device, seed=seed, **overrides)
        about = {"model": source.name, "pretrained": False, "seed": seed, "overrides": overrides}
    elif overrides:
        raise ValueError(f"{source} is a folder; its shape is in its config.json, so {', '.join(overrides)}= cannot change it")
    else:
        built = load_model(source, device=device, dtype=dtype)
        about = {"model": source.name if source.named or source.on_hub else str(source.folder.resolve())}
    built.fastpeft_source = about | {"dtype": str(dtype).removeprefix("torch.")} | ({"quantize": quantize} if quantize else {})
    if getattr(built, "is_quantized", False):  # the folder's own doing, by its config.json
        if quantize is not None:
            raise ValueError(f"{model} is quantised already: leave quantize={quantize!r} out")
    else:
        built.to(dtype=dtype)
    if quantize is not None and device.type != "meta":
        quantize_base(built, parts_of(built), quantize, device)
    built.to(device)
    optimize(built)
    return built.eval()


def adapt(model: nn.Module, plan: str | Path | Mapping[str, Treatment] | Plan | None = None, **options) -> nn.Module:
    """Apply a plan to ``model`` in place (and return it): freeze its base, then attach each part's method.

    ``adapt(model, "F/LoRA/LoRA", r=4)``, or by part: ``adapt(model, vit="F", jtm=LoRA(r=4), dec=LoRA(r=4))``; parts left out are frozen.
    """
    if getattr(model, "fastpeft_plan", None) is not None:
        raise ValueError(f"the model is adapted already ({model.fastpeft_plan}); merge it, or build a new one")
    for name, module in model.named_modules():
        if any(getattr(module, kind, None) is not None for kind in ADAPTER_MODULES):
            raise ValueError(f"{name} has an adapter already that is not fastpeft's own, PEFT's perhaps: unload it first")
    parts = parts_of(model)
    plan = _plan_of(plan, parts, options)
    with undone_on_error(model):
        model.requires_grad_(False)
        for part in parts:
            root = part.of(model)
            for method in plan.treatments[part.name]:
                if part.prefix_host is not None and method.needs_fused_attention:
                    make_room_for_prefix(root.get_submodule(part.prefix_host))
                method.attach(root, part)
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.requires_grad_(True)
        for module in model.modules():
            if has_form(module, FusedLlamaModel):
                module.samples_alone = True  # in a batch as alone, whatever fills it up: see fastpeft.fused.stack.llama.FusedLlamaModel
        # a frozen part's output for an input is then a constant: no dropout, no drop-path
        model.evaluation_only = [p.path for p in parts if plan.treatments[p.name] == (Frozen(),) and not p.only]
        model.fastpeft_plan = plan
    return model.train(model.training)


def _plan_of(plan: str | Path | Mapping[str, Treatment] | Plan | None, parts: tuple[Part, ...], options: dict[str, Any]) -> Plan:
    """What :func:`adapt` was given, as a plan; ``options`` hold treatments by part, or options of methods."""
    by_part = {part.name: options.pop(part.name) for part in parts if part.name in options}
    if plan is not None and by_part:
        raise ValueError(f"give a plan or treatments by part ({', '.join(by_part)}=), not both")
    if plan is None and not by_part:
        raise ValueError(f"give a plan such as {'/'.join('LoRA' for _ in parts)!r}, or treatments by part: {[p.name for p in parts]}")
    if not isinstance(plan, Plan):
        return parse(by_part if plan is None else plan, parts, **options)
    if options or list(plan.treatments) != [part.name for part in parts]:
        raise ValueError(f"a Plan holds its options already and must be for {'/'.join(p.name for p in parts)}; got {plan!r}, {options}")
    return plan


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """If what runs inside fails, ``model``, not adapted before, is left without adapters and as trainable as it was."""
    trainable = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    except BaseException:
        detach(model)
        for parameter, required in trainable:
            parameter.requires_grad_(required)
        raise


def detach(model: nn.Module) -> None:
    """Remove every adapter and the plan; base weights stay as they are, all frozen."""
    for module in list(model.modules()):
        if isinstance(module, Adapted):
            module.remove()
        for name in ADAPTER_MODULES:
            if (adapter := getattr(module, name, None)) is not None:
                for handle in getattr(adapter, "handles", ()):
                    handle.remove()
                delattr(module, name)
        module.__dict__.pop("samples_alone", None)
    model.requires_grad_(False)
    model.fastpeft_plan, model.evaluation_only = None, []
    model.train(model.training)


def count(model: nn.Module) -> dict[str, Any]:
    """Numbers of parameters: total, base, adapters, trainable; tied weights count once, in the first part that holds them.

    ``percent`` is 100 * trainable / (base + adapters), MILE's convention; ``percent_of_base`` the LayerNorm paper's.
    """
    whole = _count(list(model.named_parameters()))
    seen: set[int] = set()
    parts = {}
    for part in parts_of(model):
        mine = [(name, p) for name, p in part.of(model).named_parameters() if part.holds(name) and id(p) not in seen]
        seen.update(id(p) for _, p in mine)
        parts[part.name] = _count(mine)
    return whole | {"parts": parts}


def _count(parameters: list[tuple[str, nn.Parameter]]) -> dict[str, float]:
    adapters = sum(p.numel() for name, p in parameters if is_adapter(name))
    total = sum(size_of(p) for _, p in parameters)
    trainable = sum(p.numel() for _, p in parameters if p.requires_grad)
    base = total - adapters
    return {
        "total": total,
        "base": base,
        "adapters": adapters,
        "trainable": trainable,
        "percent": 100 * trainable / max(1, total),
        "percent_of_base": 100 * trainable / max(1, base),
    }
