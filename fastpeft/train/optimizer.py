"""AdamW over what a plan trains, with float32 masters under a bfloat16 base, and a warm-up and cosine schedule."""

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
        self.rates = [rate for rate, _ in groups]
        self.config, self.total_steps = config, total_steps
        self.warmup_steps = int(config.warmup if config.warmup >= 1 else config.warmup * total_steps)

    def factor(self, step: int) -> float:
        """Of the peak rate, at ``step`` (from 0): linear warm-up, then a cosine to zero (the floor is min_learning_rate)."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        left = max(1, self.total_steps - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - self.warmup_steps) / left)))

    def step(self, step: int) -> tuple[float, float]:
        """One update from the parameters' gradients; returns (learning rate of the first group, gradient norm before clipping)."""
        floor = self.config.min_learning_rate
        for group, rate in zip(self.adamw.param_groups, self.rates):
            group["lr"] = floor + max(0.0, rate - floor) * self.factor(step)
        for p, master in self.pairs:
            if master is not p:
                master.grad = None if p.grad is None else p.grad.float()
        limit = self.config.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_([master for _, master in self.pairs], limit)
        self.adamw.step()
        with torch.no_grad():
            for p, master in self.pairs:
                if master is not p:
                    p.copy_(master)
                p.grad = master.grad = None
        return self.adamw.param_groups[0]["lr"], float(norm)

    def state_dict(self) -> dict:
        return {"adamw": self.adamw.state_dict(), "masters": [master.detach() for p, master in self.pairs if master is not p]}

    def load_state_dict(self, state: dict) -> None:
        self.adamw.load_state_dict(state["adamw"])
        masters = [master for p, master in self.pairs if master is not p]
        if len(masters) != len(state["masters"]):
            raise ValueError("it was saved with another dtype")
        with torch.no_grad():
            for mine, saved in zip(masters, state["masters"]):
                mine.copy_(saved)
