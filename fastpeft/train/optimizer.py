"""AdamW with float32 master weights under a half-precision base, and a warm-up and cosine schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from fastpeft.methods import is_adapter
from fastpeft.train.config import TrainConfig


class Optimizer:
    """AdamW in float32. Half-precision parameters get a float32 master that takes the step; the parameter is its rounded image."""

    def __init__(self, model: nn.Module, config: TrainConfig, total_steps: int):
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not trained:
            raise ValueError("nothing to train: the plan freezes every part")
        self.pairs = [(p, p.detach().float().clone() if p.dtype in (torch.bfloat16, torch.float16) else p) for _, p in trained]
        base_rate = config.learning_rate / 10 if config.base_learning_rate is None else config.base_learning_rate
        groups: dict[tuple[float, float], list] = {}
        for (name, p), (_, master) in zip(trained, self.pairs):
            rate = config.learning_rate if is_adapter(name) else base_rate
            groups.setdefault((rate, config.weight_decay if p.dim() > 1 else 0.0), []).append(master)
        self.adamw = torch.optim.AdamW(
            [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()],
            betas=(config.beta1, config.beta2),
        )
        self.peaks = [rate for rate, _ in groups]
        self.config = config
        self.schedule(total_steps)

    def schedule(self, total_steps: int) -> None:
        """Sets the length of warm-up and cosine."""
        warmup, self.total_steps = self.config.warmup, total_steps
        self.warmup_steps = int(warmup if warmup >= 1 else warmup * total_steps)

    def rate(self, peak: float, step: int) -> float:
        """Of a group with this peak, at ``step`` (from 0): a linear rise to the peak, then a cosine to min_learning_rate."""
        if step < self.warmup_steps:
            return peak * (step + 1) / self.warmup_steps
        floor = min(self.config.min_learning_rate, peak)
        left = max(1, self.total_steps - self.warmup_steps)
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - self.warmup_steps) / left)))

    def collect(self) -> None:
        """After each backward: half-precision gradients are added up in float32, on their masters."""
        for p, master in self.pairs:
            if master is not p and p.grad is not None:
                master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
                p.grad = None

    def step(self, step: int) -> tuple[float, float]:
        """One update from the collected gradients; returns (highest learning rate, gradient norm before clipping).

        FloatingPointError, with nothing changed, where that norm is not finite.
        """
        for group, peak in zip(self.adamw.param_groups, self.peaks):
            group["lr"] = self.rate(peak, step)
        limit = self.config.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_([master for _, master in self.pairs], limit))
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm is {norm}")
        self.adamw.step()
        with torch.no_grad():
            for p, master in self.pairs:
                if master is not p:
                    p.copy_(master)
                p.grad = master.grad = None
        return max(group["lr"] for group in self.adamw.param_groups), norm

    def state_dict(self) -> dict:
        return {"adamw": self.adamw.state_dict(), "masters": [master.detach() for p, master in self.pairs if master is not p]}

    def load_state_dict(self, state: dict) -> None:
        """Moments and masters; rates, decay and betas stay this run's. ValueError where they are of other parameters."""
        mine = self.adamw.state_dict()["param_groups"]
        masters = [master for p, master in self.pairs if master is not p]
        if [group["params"] for group in state["adamw"]["param_groups"]] != [group["params"] for group in mine]:
            raise ValueError("it groups its parameters by other learning rates or weight decays")
        if len(masters) != len(state["masters"]):
            raise ValueError("it was saved with another dtype")
        self.adamw.load_state_dict({"state": state["adamw"]["state"], "param_groups": mine})
        with torch.no_grad():
            for mine, saved in zip(masters, state["masters"]):
                mine.copy_(saved)
