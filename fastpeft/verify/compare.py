"""Comparison of a fused training step with plain PyTorch: losses and gradients (`fastpeft verify`).

The truth is the model on transformers' own modules and methods in plain PyTorch (baseline.py), in float64, each sample alone,
without padding, so that nothing can leak. Plain PyTorch in the dtype asked for gives that dtype's own error. Fused execution, in that dtype
and in every form that saves work, must come as near to the truth, up to a factor.

An error is relative: of the loss; of all gradients together, as one vector; and of the worst parameter's gradient, to its own length or
a thousandth of the longest gradient's (a key's bias, say, has no gradient but rounding).
"""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from fastpeft.fused.head.outputs import lean_logits
from fastpeft.verify.baseline import plain, scatter_adapters, with_peft, without_dropout
from fastpeft.verify.cases import Batch, Case, base_dtype, case_of

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
FACTOR = 4  # of plain PyTorch's own error
WORST = "worst gradient"
Step = tuple[float, dict[str, Tensor]]  # loss, gradients by name


@dataclass
class Check:
    """One comparison. ``error`` and ``tolerance`` are relative; ``plain_error``: of plain PyTorch in the same dtype."""

    check: str
    quantity: str
    error: float
    plain_error: float | None
    tolerance: float
    worst: str = ""

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # not where the error is NaN


@dataclass
class Result:
    """All comparisons, and those that this model and plan have no use for: (check, reason)."""

    checks: list[Check] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return bool(self.checks) and all(check.ok for check in self.checks)

    def to_dict(self) -> dict:
        """JSON-able."""
        checks = [asdict(check) | {"ok": check.ok} for check in self.checks]
        return {"ok": self.ok, "checks": checks, "skipped": [{"check": name, "reason": why} for name, why in self.skipped]}

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """A table for a terminal, the worst gradient named."""
        rows = [("check", "quantity", "error", "plain error", "tolerance", "")]
        for c in self.checks:
            plain, verdict = "" if c.plain_error is None else f"{c.plain_error:.1e}", "ok" if c.ok else "FAILED"
            rows.append((c.check, c.quantity, f"{c.error:.1e}", plain, f"{c.tolerance:.1e}", f"{verdict} {c.worst}"))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join(text.ljust(width) for text, width in zip(row, (*widths, 0))).rstrip() for row in rows]
        return lines + [f"not compared: {name} ({why})" for name, why in self.skipped]


def verify(model: nn.Module, *, seed: int = 0, peft: bool = True) -> Result:
    """Compare ``model``, built and adapted, in its own dtype, with plain PyTorch in float64 and, where installed, with PEFT.

    Adapters are moved from their start (where they change nothing) in a copy; dropout is off. ValueError for a model of no known family.
    """
    model = scatter_adapters(without_dropout(copy.deepcopy(model)), seed=seed)
    dtype = base_dtype(model)
    case, result = case_of(model, seed), Result()
    result.skipped += case.skipped
    exact = copy.deepcopy(model).double()
    truth = run_alone(plain(exact), case)
    own = deviation(run_alone(plain(model), case), truth)[0]

    def compare(name: str, step: Step, own: dict[str, float], dtype: torch.dtype) -> None:
        errors, worst = deviation(step, truth)
        for quantity, error in errors.items():
            allowed = max(case.floor, tolerance(own.get(quantity, 0.0), dtype))
            result.checks.append(Check(name, quantity, error, own.get(quantity), allowed, worst if quantity == WORST else ""))

    compare("samples alone", run_alone(model, case), own, dtype)
    for form in case.forms:
        with form.context() if form.context else nullcontext():
            compare(form.name, step_of(model, form.inputs(model)), own, dtype)
    if peft:
        reason = _compare_peft(exact, case, compare)
        result.skipped += [("transformers + PEFT", reason)] if reason else []
    return result


def _compare_peft(exact: nn.Module, case: Case, compare) -> str:
    """Where PEFT has the plan's methods, PEFT in float64 against the truth; '' or why not."""
    if find_spec("peft") is None:
        return "peft is not installed"
    if getattr(exact, "fastpeft_plan", None) is None:
        return "the model has no plan"
    try:
        twin, names = with_peft(exact)
    except ValueError as error:
        return str(error)
    loss, gradients = run_alone(twin.double(), case)
    compare("transformers + PEFT (float64)", (loss, {ours: gradients[name] for name, ours in names.items()}), {}, torch.float64)
    return ""


def tolerance(plain_error: float, dtype: torch.dtype) -> float:
    """``FACTOR`` times plain PyTorch's error, which may be small by chance: at least 4 roundings of ``dtype``, or 1,024 of the dtype it
    sums in (float32 for half precision)."""
    sums_in = torch.promote_types(dtype, torch.float32)
    return max(FACTOR * plain_error, 4 * torch.finfo(dtype).eps, 1024 * torch.finfo(sums_in).eps)


def step_of(model: nn.Module, inputs: Batch) -> Step:
    """Loss and gradients of what is trained (zeros where a parameter got none)."""
    model.zero_grad(set_to_none=True)
    dtype = base_dtype(model)
    with lean_logits(model):  # as the trainer runs it
        loss = model(**{name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}).loss
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return float(loss.detach()), {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in trained.items()}


def run_alone(model: nn.Module, case: Case) -> Step:
    """Loss and gradients of the batch, from its samples run one by one; gradients in float64."""
    total, loss, gradients = sum(case.weights), 0.0, {}
    for sample, weight in zip(case.alone, case.weights):
        one, gradient = step_of(model, sample)
        loss += one * weight / total
        for name, g in gradient.items():
            gradients[name] = gradients.get(name, 0.0) + g.double() * (weight / total)
    return loss, gradients


def deviation(step: Step, truth: Step) -> tuple[dict[str, float], str]:
    """(relative errors of the loss, of all gradients together and of the worst parameter, that parameter's name)."""
    (loss, gradients), (want, wanted) = step, truth
    assert gradients.keys() == wanted.keys(), gradients.keys() ^ wanted.keys()
    lengths = {name: float(t.norm()) for name, t in wanted.items()}
    floor = 1e-3 * max(lengths.values(), default=0.0) or 1.0
    off = {name: float((gradients[name].double().view(t.shape) - t).norm()) for name, t in wanted.items()}
    errors = {name: off[name] / max(lengths[name], floor) for name in off}
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name], default="")
    whole = math.hypot(*off.values()) / (math.hypot(*lengths.values()) or 1.0)
    return {"loss": abs(loss - want) / (abs(want) or 1.0), "gradients": whole, WORST: errors.get(worst, 0.0)}, worst
