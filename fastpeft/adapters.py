"""Adapters on disk, in PEFT's formats: one folder per part, ``adapter_config.json`` and ``adapter_model.safetensors`` in each.

Plain ``peft`` loads a part's folder into the corresponding transformers module where PEFT has the method (LoRA, IA3, Prefix and PTv2,
LayerNorm; Excitor once fastpeft.peft is imported); F leaves no folder; T, Attention and FFN, which PEFT does not have, leave
``model.safetensors`` under the base's own names.
``fastpeft.json`` beside them says the plan and the base. Unlike PEFT, loading raises when a key is missing, unexpected or misshapen.
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from fastpeft.adapter_description import checked
from fastpeft.documents import parse_json
from fastpeft.files import atomic_folder, is_folder, save_tensors, tensor_digest
from fastpeft.methods import Frozen, Method, Part, from_peft, is_adapter
from fastpeft.methods.adapted import Adapted, without_memory
from fastpeft.methods.base import shorten
from fastpeft.methods.quantized import dequantize, is_quantized
from fastpeft.models import parts_of
from fastpeft.plan import Plan, adapt, detach, parse, undone_on_error
from fastpeft.tensor_files import read_shapes

FORMAT = 1
DESCRIPTION = "fastpeft.json"
PEFT_CONFIG = "adapter_config.json"
CHECKSUM = "fastpeft_sha256"  # in a file's metadata, which PEFT ignores
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    description: dict[str, Any] | None = None,
    write_more: Callable[[Path], None] | None = None,
) -> Path:
    """Write what the plan trained, atomically. ``description`` joins ``fastpeft.json``; ``write_more(folder)`` adds files.

    An adapter that stands at ``folder`` is replaced; ValueError for a folder that holds anything else.
    """
    return write_adapter(adapter_state(model, description), folder, write_more)


def adapter_state(model: nn.Module, description: dict[str, Any] | None = None, *, copy: bool = False) -> dict[str, Any]:
    """What :func:`save_adapter` writes, for :func:`write_adapter`: by folder its files' contents. ``copy``: tensors of their own, so that
    training may go on meanwhile."""
    plan, saved = _plan_of(model), {}
    for part in parts_of(model):
        for method, name in zip(plan.treatments[part.name], _folders(plan, part)):
            root = part.of(model)
            if tensors := {key: t.cpu().contiguous() for key, t in method.tensors(root, part).items()}:
                config = None if method.peft_type is None else method.peft_config(root, part)
                saved[name] = ({key: t.clone() for key, t in tensors.items()} if copy else tensors, config)
    about = {
        "format": FORMAT,
        "plan": str(plan),
        "treatments": plan.to_dict(),
        "base": dict(getattr(model, "fastpeft_source", {})),
        "base_fingerprint": fingerprint(model),
    }
    return {"about": about | (description or {}), "parts": saved}


def write_adapter(state: dict[str, Any], folder: str | Path, write_more: Callable[[Path], None] | None = None) -> Path:
    """Write what :func:`adapter_state` took, as :func:`save_adapter` does."""
    folder = Path(folder)
    if folder.exists() and not (folder / DESCRIPTION).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} is not an adapter, and one would replace it; give a new or an empty folder")
    with atomic_folder(folder) as draft:
        for name, (tensors, config) in state["parts"].items():
            (draft / name).mkdir()
            checksum = {CHECKSUM: tensor_digest(tensors)}
            if config is None:
                save_tensors(tensors, draft / name / "model.safetensors", metadata=checksum)
                continue
            config = config | {"inference_mode": True, "base_model_name_or_path": None}
            (draft / name / PEFT_CONFIG).write_text(json.dumps(config, indent=1) + "\n")
            save_tensors(tensors, draft / name / "adapter_model.safetensors", metadata={"format": "pt"} | checksum)
        (draft / DESCRIPTION).write_text(json.dumps(state["about"], indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if write_more is not None:
            write_more(draft)
    return folder


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Load an adapter that :func:`save_adapter` wrote, or part folders that PEFT wrote, into ``model`` (adapting it if it is not). Of a
    model of one part, such as LLaMA, the folder may also be what PEFT wrote itself. A run's folder serves too.

    Everything is checked before anything is copied, and shapes against the files' headers before memory is taken.
    ValueError names a missing file; every missing, unexpected or misshapen key; every tensor that is not of floating point, or holds NaN
    or an infinity; every field of a PEFT configuration that would change the outputs and is not known here
    (see ``peft_fields`` of each method); and a folder of tensors that the plan has no place for.
    """
    folder = adapter_in(folder)
    if not is_folder(folder):
        raise ValueError(f"no adapter folder at {folder}")
    plan = read_plan(model, folder)
    mine = getattr(model, "fastpeft_plan", None)
    if mine is not None and (other := _differences(mine, plan, parts_of(model))):
        said = f"{folder} holds {plan}, and the model is adapted with {mine}, options included: {'; '.join(other)}"
        raise ValueError(f"{said}. Give the same plan and options, or load it into a fresh base")
    if mine is None:
        _check_shapes(model, plan, folder)
    with undone_on_error(model) if mine is None else nullcontext():
        if mine is None:
            adapt(model, plan)
        else:
            _warn_of_another_base(model, folder)
        found = []
        for method, root, part, where in _saved(model, plan, folder):
            _check_config(where, method, root, part)
            found.append((method, root, part, _read_tensors(where, method), str(where)))
        if not _is_peft_folder(folder, parts_of(model)):
            _refuse_unread(folder, {Path(where).name for *_, where in found}, plan)
        for method, root, part, tensors, where in found:
            method.check(root, part, tensors, where)
        for method, root, part, tensors, _ in found:
            method.load(root, part, tensors)
    return model


def _saved(model: nn.Module, plan: Plan, folder: Path) -> Iterator[tuple[Method, nn.Module, Part, Path]]:
    """What an adapted model has tensors of in ``folder``: (method, the part's module, part, where)."""
    whole = _is_peft_folder(folder, parts_of(model))
    for part in parts_of(model):
        for method, name in zip(model.fastpeft_plan.treatments[part.name], _folders(plan, part)):
            if method.tensors(part.of(model), part):
                yield method, part.of(model), part, folder if whole else folder / name


def _check_shapes(model: nn.Module, plan: Plan, folder: Path) -> None:
    """ValueError where the plan's tensors are not those of the files' headers. Takes no memory, whatever the plan says, and leaves the
    model as it was."""
    trainable = [(p, p.requires_grad) for p in model.parameters()]
    with without_memory(), undone_on_error(model):
        adapt(model, plan)
        _warn_of_another_base(model, folder)
        for method, root, part, where in _saved(model, plan, folder):
            _check_config(where, method, root, part)
            method.check(root, part, read_shapes(_tensor_file(where, method)), str(where))
    detach(model)
    for parameter, required in trainable:
        parameter.requires_grad_(required)


def _warn_of_another_base(model: nn.Module, folder: Path) -> None:
    if describe(folder).get("base_fingerprint") not in (None, fingerprint(model)):
        warnings.warn(f"{folder} was trained on other base weights than this model's", stacklevel=4)


def _differences(mine: Plan, theirs: Plan, parts: tuple[Part, ...]) -> list[str]:
    """What a folder's plan does otherwise than a model's, a text for each part and method; none where both compute the same."""
    found = []
    for part in parts:
        here, there = mine.treatments[part.name], theirs.treatments[part.name]
        if [type(m) for m in here] != [type(n) for n in there]:
            found.append(f"{part.name} has {'+'.join(map(str, there))} in the folder, {'+'.join(map(str, here))} in the model")
            continue
        for m, n in zip(here, there):
            if not m.equivalent(n, part):
                options = [f"{o}={v!r} not {m.options()[o]!r}" for o, v in n.options().items() if v != m.options()[o]]
                found.append(f"{part.name}'s {m} has {', '.join(options)} in the folder")
    return found


def adapter_in(folder: str | Path) -> Path:
    """The adapter's folder, where ``folder`` is a run's; any other as it is."""
    folder = Path(folder)
    inside = folder / "adapter"
    return inside if not (folder / DESCRIPTION).is_file() and (inside / DESCRIPTION).is_file() else folder


def describe(folder: str | Path) -> dict[str, Any]:
    """``fastpeft.json`` of an adapter folder, or {} where PEFT wrote it."""
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        return {}
    try:
        about = parse_json(path.read_text(encoding="utf-8"))
        if isinstance(about, dict) and isinstance(about.get("format"), int) and about["format"] > FORMAT:
            raise ValueError(f"format {about['format']} is newer than this fastpeft reads ({FORMAT})")
        return checked(about)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged or not ours: {error}") from None


def read_plan(model: nn.Module, folder: Path) -> Plan:
    """The plan of an adapter folder; part folders written by PEFT are read by their configs, other parts are F."""
    parts = parts_of(model)
    if about := describe(folder):
        try:
            return parse(about["treatments"], parts)
        except ValueError as error:
            raise ValueError(f"{folder / DESCRIPTION}: {error}") from None
    treatments = {}
    for part in parts:
        config = (folder if _is_peft_folder(folder, parts) else folder / part.name) / PEFT_CONFIG
        if config.is_file():
            with _reading(config):
                treatments[part.name] = (from_peft(parse_json(config.read_text(encoding="utf-8"))),)
        else:
            treatments[part.name] = (Frozen(),)
    if all(methods == (Frozen(),) for methods in treatments.values()):
        names = ", ".join(f"{part.name}/" for part in parts)
        raise ValueError(f"{folder} holds no adapter: no {DESCRIPTION}, and no {PEFT_CONFIG} in {names}")
    return Plan(treatments)


@contextmanager
def _reading(config: Path) -> Iterator[None]:
    """An error from within names the configuration that it is about."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"{config}: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{config} is no configuration of a PEFT adapter: {type(error).__name__} {error}") from None


def _check_config(folder: Path, method: Method, root: nn.Module, part: Part) -> None:
    """ValueError where PEFT's configuration in ``folder``, which PEFT may have written over ours, is of another method than the plan's."""
    config = folder / PEFT_CONFIG
    if method.peft_type is not None and config.is_file():
        with _reading(config):
            method.check_config(root, part, parse_json(config.read_text(encoding="utf-8")))


def _refuse_unread(folder: Path, read: set[str], plan: Plan) -> None:
    """ValueError for an adapter that nothing reads: of a part by another name, of one that the plan freezes, or a folder deeper, where
    PEFT saves adapters by name."""
    marks = (PEFT_CONFIG, "adapter_model.safetensors", "adapter_model.bin")
    found = [path.parent.relative_to(folder) for mark in marks for path in folder.glob(f"*/**/{mark}")]
    if left := sorted({str(path) for path in found if path.parts[0] not in read}):
        raise ValueError(f"{folder} holds adapters in {shorten(left)} that no part of the plan {plan} reads; rename or remove them")


def _is_peft_folder(folder: Path, parts: tuple[Part, ...]) -> bool:
    """Whether it is the one part's own folder."""
    return len(parts) == 1 and (folder / PEFT_CONFIG).is_file() and not (folder / DESCRIPTION).is_file()


def _tensor_file(folder: Path, method: Method) -> Path:
    path = folder / ("model.safetensors" if method.peft_type is None else "adapter_model.safetensors")
    if method.old_file is not None and not path.is_file() and (folder / method.old_file).is_file():
        path = folder / method.old_file
    if not path.is_file():
        raise ValueError(f"the adapter is incomplete: {path} is missing")
    return path


def _read_tensors(folder: Path, method: Method) -> dict[str, torch.Tensor]:
    path = _tensor_file(folder, method)
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            checksum = (file.metadata() or {}).get(CHECKSUM)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if checksum is not None and checksum != tensor_digest(tensors):  # PEFT writes none
        raise ValueError(f"{path} is damaged: its tensors are not those that were saved; nothing was loaded: take another copy")
    if wrong := sorted(f"{name} is {t.dtype}" for name, t in tensors.items() if t.dtype not in DTYPES):
        raise ValueError(f"{path}: adapters are float64, float32, bfloat16 or float16, and {shorten(wrong)}; nothing was loaded")
    if wrong := sorted(name for name, t in tensors.items() if not t.isfinite().all()):
        raise ValueError(f"{path}: NaN or an infinity in {shorten(wrong)}; nothing was loaded: take an earlier checkpoint")
    return tensors


def _folders(plan: Plan, part: Part) -> list[str]:
    """One folder for a part, or one per method where it has several."""
    methods = plan.treatments[part.name]
    return [part.name] if len(methods) == 1 else [f"{part.name}-{m.name}" for m in methods]


def _plan_of(model: nn.Module) -> Plan:
    plan = getattr(model, "fastpeft_plan", None)
    if plan is None:
        parts_of(model)  # a wrapper hides the plan, and is told
        raise ValueError("the model is not adapted: call fastpeft.adapt(model, plan) first")
    return plan


def fingerprint(model: nn.Module, weights: Mapping[str, torch.Tensor] | None = None) -> str | None:
    """A short identity of the base weights that the plan leaves alone, the same in float32 and bfloat16, and of quantised ones their
    format; None if there are none, or on meta, unless ``weights`` has the tensors by their names."""
    crc, seen, plan = 0, False, _plan_of(model)
    if weights is None and (known := getattr(model, "fastpeft_fingerprint", None)) is not None:
        return known  # of a base in pieces
    trained = {
        id(p) for part in parts_of(model) for method in plan.treatments[part.name] for p in method.trains(part.of(model), part).values()
    }
    for name, p in sorted(model.named_parameters()):
        if id(p) in trained or is_adapter(name) or (p.is_meta and weights is None):
            continue
        if is_quantized(p):  # the format alone: codes may differ from device to device
            crc, seen = zlib.crc32(f"{name} {type(p).__name__}".encode(), crc), True
            continue
        sample = (weights[name] if p.is_meta else p.detach()).flatten()[:: max(1, p.numel() // 64)].to(torch.bfloat16).contiguous().cpu()
        crc, seen = zlib.crc32(name.encode() + sample.view(torch.uint8).numpy().tobytes(), crc), True
    return f"{crc:08x}" if seen else None


@torch.no_grad()
def merge(model: nn.Module, modality: str | None = None) -> nn.Module:
    """Fold LoRA, IA3 and adapters into the base weights, in place: the same outputs, no adapter left.

    MMAdapter has a mixture for each modality: ``modality`` ("text" or "image") says for which samples the merged model is, and it refuses
    others. In CLIP every token has a mixture of its own, which no weight can hold: merged for images, these adapters alone stay, frozen,
    and the plan says so. A quantised base is written out first, in the dtype of its other weights: quantising again would round the
    adapters away. ValueError for Prefix, PTv2 and Excitor, whose keys and values no weight can hold.
    """
    plan = _plan_of(model)
    found = [(method, part) for part in parts_of(model) for method in plan.treatments[part.name]]
    if stuck := [f"{method} of {part.name}" for method, part in found if not method.mergeable]:
        raise ValueError(f"no weight can take in {', '.join(stuck)}; keep the adapter beside the base")
    _refuse_shared(model)
    dequantize(model)
    mixtures = _mixtures(model, modality, any(method.by_modality for method, _ in found))
    found.sort(key=lambda pair: pair[0].merge_order)
    stay = [(method, part.name) for method, part in found if not method.merge(part.of(model), part, mixtures)]
    if not stay or modality != "image":  # a model of text alone never runs what its image encoder holds
        detach(model)
        return model
    for module in list(model.modules()):
        if isinstance(module, Adapted):
            module.remove()
    model.fastpeft_plan = Plan({name: tuple(m for m, part in stay if part == name) or (Frozen(),) for name in plan.treatments})
    model.requires_grad_(False)
    return model


def _refuse_shared(model: nn.Module) -> None:
    """ValueError where merging would change a weight that another module uses too."""
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    if shared := [name for name, m in model.named_modules() if isinstance(m, Adapted) and owners[id(m.weight)] > 1]:
        raise ValueError(f"{', '.join(shared)} shares its weight with another module, which merging would change too; untie it first")


def _mixtures(model: nn.Module, modality: str | None, routed: bool) -> dict[nn.Module, torch.Tensor]:
    """The mixture [2] of each layer whose router reads the modality's token alone."""
    if not routed:
        if modality is not None:
            raise ValueError("modality= is for MMAdapter, which this model does not have: leave it out")
        return {}
    if not hasattr(model, "specialise"):
        raise ValueError(f"a {type(model).__name__} has no modality tokens, so MMAdapter's mixture is unknown: keep the adapter")
    return model.specialise(modality)
