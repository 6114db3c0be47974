"""Drawn models, adapters, batches and settings with and without ``fp.optimize``: ``python tests/fuzz/fuzz_dropin.py --cases 1000``.

A case is a model of transformers with switches of its configuration drawn (dropin_models.py), what is trained of it, PEFT's adapters among
that (dropin_adapters.py), and several calls (dropin_batches.py), weights changing in between, or generation. Outputs, loss and every
gradient of the optimised copy (as it is, with lean logits, with what is constant kept) must be those of the untouched one, in float64.
What transformers or PEFT refuse themselves is not counted. A case is drawn from its number alone: ``--only NUMBER`` runs it again;
``--model NAME`` draws cases of one class.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import sys
import time
import traceback
import warnings
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "shared"), str(HERE.parents[1])]
os.environ |= {"TRANSFORMERS_VERBOSITY": "critical", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

import torch  # noqa: E402
from double import Double  # noqa: E402
from dropin_adapters import adapt  # noqa: E402
from dropin_batches import draw_call  # noqa: E402
from dropin_models import draw_model  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import fastpeft as fp  # noqa: E402

CLOSE = 1e-8


class Refused(Exception):
    """transformers or PEFT do not run the case themselves."""


class Difference(Exception):
    pass


class Case(NamedTuple):
    model: nn.Module
    what: str
    calls: list[dict[str, Any]]
    settings: dict[str, Any]


def make(number: int, seed: int = 0, only: str | None = None) -> Case:
    draw = random.Random(f"{seed} {number} {only or ''}")
    try:
        kind, what, model, batches = draw_model(draw, only)
        model, adapter = adapt(model, draw)
        calls = [draw_call(kind, model, batches, draw) for _ in range(draw.choice((1, 2)))]
    except Exception as error:
        raise Refused(f"{type(error).__name__}: {error}") from error
    settings = {
        "train": draw.random() < 0.85,
        "checkpointing": draw.choice((None, None, None, None, True, False)),  # use_reentrant
        "autocast": draw.random() < 0.05,
        "inputs_require_grad": draw.random() < 0.1,
        "generate": kind in ("causal", "seq2seq") and draw.random() < 0.3,
        "restore": draw.random() < 0.1,
        "update": draw.random() < 0.5,
    }
    return Case(model, f"{what}\n  adapter: {adapter}\n  settings: {settings}\n  calls: {[_brief(c) for c in calls]}", calls, settings)


def _brief(call: dict[str, Any]) -> dict[str, Any]:
    return {
        name: tuple(v.shape) if isinstance(v, Tensor) and v.numel() > 60 else v.tolist() if isinstance(v, Tensor) else v
        for name, v in call.items()
    }


def prepared(model: nn.Module, settings: dict[str, Any]) -> nn.Module:
    model.train(settings["train"])
    if settings["checkpointing"] is not None:
        model.gradient_checkpointing_enable({"use_reentrant": settings["checkpointing"]})
    if settings["inputs_require_grad"] or settings["checkpointing"]:
        model.enable_input_require_grads()
    return model


def run(model: nn.Module, case: Case) -> list[dict[str, Tensor]]:
    """Values by name of each call: loss, gradients, what the output holds."""
    found = []
    for call in case.calls:
        found.append(one_call(model, call, case.settings))
        if case.settings["update"]:
            _update(model)
    if case.settings["generate"]:
        given = {name: value for name, value in case.calls[0].items() if name in ("input_ids", "attention_mask")}
        with torch.no_grad(), Double():
            model.eval()
            options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 1 + len(case.calls) % 2, "use_cache": len(case.what) % 3 > 0}
            found.append({"generated": model.generate(**given, **options, pad_token_id=0)})
    return found


def _update(model: nn.Module) -> None:
    """What an optimiser does between steps: weights change in place."""
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None and bool(p.grad.isfinite().all()):
                p -= 0.05 * p.grad / (1 + p.grad.abs().max())


def one_call(model: nn.Module, call: dict[str, Any], settings: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    call = {name: value.clone() if isinstance(value, Tensor) else value for name, value in call.items()}
    inputs = [value.requires_grad_() for name, value in call.items() if name == "inputs_embeds"]
    torch.manual_seed(5)
    islands = Double if settings["checkpointing"] is None else nullcontext  # what backward runs again is out of sight of Double
    with islands(), torch.autocast("cpu", torch.bfloat16) if settings["autocast"] else nullcontext():
        output = model(**call)
        loss = output[0] if isinstance(output, tuple) else output.loss
        values = {} if loss is None else {"loss": loss}
        named = enumerate(output) if isinstance(output, tuple) else output.items()
        values |= {f"output {name}": value for name, raw in named for name, value in flat(str(name), raw)}
        score = loss
        if loss is None:
            score = sum(
                (v.double() * torch.arange(1, v.numel() + 1).view_as(v).double().cos()).sum() for v in values.values() if v.requires_grad
            )
    if isinstance(score, Tensor) and score.requires_grad:
        with islands():
            score.backward()
    values |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    values |= {f"gradient of an input {at}": value.grad for at, value in enumerate(inputs) if value.grad is not None}
    return {name: value.detach().clone() for name, value in values.items()}


def flat(name: str, value: Any) -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [(name, value)] if value.is_floating_point() else []
    if isinstance(value, list | tuple):
        return [pair for at, one in enumerate(value) for pair in flat(f"{name}[{at}]", one)]
    layers = getattr(value, "layers", None)
    if layers is not None and not isinstance(value, nn.Module):  # a cache
        both = ((f"{name}[{at}].{part}", getattr(one, part, None)) for at, one in enumerate(layers) for part in ("keys", "values"))
        return [pair for pair in both if isinstance(pair[1], Tensor)]
    return []


def compare(mine: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]], lean: bool, close: float) -> None:
    for at, (found, wanted) in enumerate(zip(mine, theirs)):
        wanted = {name: v for name, v in wanted.items() if name in found or not _keys_or_values(name)}  # cache_layers leaves these out
        if lean:  # logits of a training step are not there, and what only unlabelled positions hold neither
            found, wanted = ({name: v for name, v in one.items() if not name.startswith("output ")} for one in (found, wanted))
        if found.keys() != wanted.keys():
            raise Difference(f"call {at}: only one has {sorted(found.keys() ^ wanted.keys())[:6]}")
        scale = max(
            [float(v.nan_to_num(0, 0, 0).abs().max()) for n, v in wanted.items() if n.startswith("gradient") and v.numel()], default=0.0
        )
        for name, want in wanted.items():
            got = found[name]
            if got.shape != want.shape:
                raise Difference(f"call {at}, {name}: shape {tuple(got.shape)}, not {tuple(want.shape)}")
            if not want.is_floating_point():
                if not torch.equal(got, want):
                    raise Difference(f"call {at}, {name}: {got.tolist()} not {want.tolist()}")
                continue
            size = max(
                scale if name.startswith("gradient") else 0.0,
                float(want[want.isfinite()].abs().max()) if want.isfinite().any() else 0.0,
                1e-3,
            )
            if not torch.allclose(got.double(), want.double(), rtol=close, atol=close * size, equal_nan=True):
                off = (got.double() - want.double()).abs()
                raise Difference(f"call {at}, {name}: off by {float(off.nan_to_num(float('inf')).max()):.3g} of {size:.3g}")


def _keys_or_values(name: str) -> bool:
    return name.endswith((".keys", ".values"))


def check(case: Case) -> None:
    """Raises :class:`Difference`, or what the optimised copy raises."""
    plain = copy.deepcopy(case.model)
    try:
        theirs = run(prepared(plain, case.settings), case)
        again = run(prepared(copy.deepcopy(case.model), case.settings), case)
        single = case.settings["checkpointing"] is not None or case.what.startswith("Beam")  # our backward runs Beam's activation again
        close = 0.1 if case.settings["autocast"] else 2e-5 if single else CLOSE
        compare(again, theirs, False, close)
        if single and any(bool(v.isnan().any()) for one in theirs for v in one.values()):
            raise ValueError("a masked row is NaN in float32, which its softmax is in")
    except Exception as error:
        raise Refused(f"{type(error).__name__}: {error}") from error
    for lean, kept in ((False, None), (True, None), (None, "100MB")):
        fused = copy.deepcopy(case.model)
        fp.optimize(fused, lean_logits=lean, cache_images=kept, cache_layers=kept)
        if lean is False and case.settings["restore"]:
            fp.restore(fused)
        mine = run(prepared(fused, case.settings), case)
        if kept and any(call.get("return_dict") is False for call in case.calls):
            continue  # outputs have no names to leave keys and values out by
        compare(mine, theirs, lean and case.settings["train"], close)
        if kept and not case.settings["update"]:  # from what is kept
            compare(run(prepared(fused, case.settings), case), theirs, False, close)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--model")
    parser.add_argument("--seconds", type=float, default=1e9, help="end after so many")
    parser.add_argument("--refused", action="store_true", help="say what transformers refused")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    done, refused, failed, began = Counter(), Counter(), [], time.time()
    numbers = range(given.first, given.first + given.cases) if given.only is None else [given.only]
    for number in numbers:
        if time.time() - began > given.seconds:
            break
        what, at = "?", time.time()
        try:
            case = make(number, given.seed, given.model)
            what = case.what
            check(case)
            done[what.split("(")[0].split("\n")[0]] += 1
        except Refused as error:
            refused[str(error).splitlines()[0][:100]] += 1
            if given.refused:
                print(f"refused {number}: {what.split('(')[0]} {str(error)[:300]}", flush=True)
        except Exception as error:
            failed.append(number)
            said = str(error) if isinstance(error, Difference) else traceback.format_exc()[-1800:]
            print(f"FAILED case {number}: {said}\n  {what[:6000]}", flush=True)
        if time.time() - at > 8:
            print(f"slow: case {number}, {time.time() - at:.0f} s, {what[:200]}", flush=True)
    print("; ".join(f"{n} x {said}" for said, n in refused.most_common(15)))
    counts = f"{len(failed)} not, {sum(refused.values())} refused"
    print(f"{sum(done.values())} cases of {len(done)} classes alike, {counts}; {time.time() - began:.0f} s")
    print("failed:", *failed)
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
