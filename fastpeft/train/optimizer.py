"""AdamW with float32 master weights under a half-precision base, and a warm-up and cosine schedule."""

from __future__ import annotations

import functools
import math

import torch
from torch import nn

from fastpeft.methods import is_adapter
from fastpeft.methods.quantized import is_quantized
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
        # on a GPU in one kernel that a graph can hold: rates and numbers of steps lie on the device
        on_gpu = trained[0][1].device.type == "cuda"
        rates = [torch.tensor(rate, device=trained[0][1].device) if on_gpu else rate for rate, _ in groups]
        self.adamw = torch.optim.AdamW(
            [{"params": params, "lr": rate, "weight_decay": decay} for rate, ((_, decay), params) in zip(rates, groups.items())],
            betas=(config.beta1, config.beta2),
            **({"fused": True, "capturable": True} if on_gpu else {}),
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
        rate = self.set_rates(step)
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
        return rate, norm

    def set_rates(self, step: int) -> float:
        """Give each group its learning rate at ``step``; returns the highest."""
        rates = [self.rate(peak, step) for peak in self.peaks]
        for group, rate in zip(self.adamw.param_groups, rates):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        return max(rates)

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


class KeptGradients:
    """The update of an :class:`Optimizer` in tensors that stay where they are, without a wait of the host: what a graph can hold.

    Gradients are added up in buffers, zero between updates; float32 parameters have theirs as ``grad``, those under a master are added to
    it as they come. A step whose loss or gradient's norm is not finite changes no parameter, and nor does any after it.
    """

    def __init__(self, optimizer: Optimizer):
        self.optimizer, self.pairs = optimizer, optimizer.pairs
        self.buffers = [torch.zeros_like(master) for _, master in self.pairs]
        self.loss, self.failed = (torch.zeros((), device=self.buffers[0].device) for _ in range(2))
        self.result = self.loss.new_zeros(2)  # (loss, gradient's norm before clipping) of the last update
        self.arrived: set[int] = set()
        self.hooks = [p.register_post_accumulate_grad_hook(functools.partial(self._arrive, i)) for i, (p, _) in enumerate(self.pairs)]
        self.lay_out()

    def _arrive(self, i: int, p: nn.Parameter) -> None:
        self.arrived.add(i)
        if self.pairs[i][1] is not p:
            self.buffers[i].add_(p.grad)
            p.grad = None

    def lay_out(self) -> None:
        """Where backward adds, whatever a caller has made of the gradients."""
        for (p, master), buffer in zip(self.pairs, self.buffers):
            p.grad = buffer if master is p else None

    @torch.no_grad()
    def update(self, reached: frozenset[int]) -> None:
        """Clipping and AdamW for the parameters ``reached`` by backward, by their places in the optimiser's pairs."""
        masters = [self.pairs[i][1] for i in sorted(reached)]
        buffers = [self.buffers[i] for i in sorted(reached)]
        for p, master in self.pairs:
            p.grad = master.grad = None
        for master, buffer in zip(masters, buffers):
            master.grad = buffer
        norm = torch.nn.utils.clip_grad_norm_(masters, self.optimizer.config.max_grad_norm or math.inf)
        self.failed.copy_(torch.maximum(self.failed, (~(norm.isfinite() & self.loss.isfinite())).float()))
        adamw = self.optimizer.adamw
        adamw.found_inf = self.failed  # as GradScaler tells a fused optimiser to leave everything as it is
        adamw.step()
        halves = [(p, master) for i, (p, master) in enumerate(self.pairs) if i in reached and master is not p]
        for p, master in halves:
            master.grad = None
            p.copy_(master)
        self.result.copy_(torch.stack([self.loss, norm]))
        torch._foreach_zero_([*buffers, self.loss])
        self.lay_out()

    def reset(self) -> None:
        """Forget what was added up since the last update."""
        torch._foreach_zero_([*self.buffers, self.loss])
        self.arrived.clear()

    def release(self) -> None:
        """Leave gradients to autograd again."""
        for hook in self.hooks:
            hook.remove()
        for p, master in self.pairs:
            p.grad = master.grad = None
        self.optimizer.adamw.found_inf = None


def base_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Put the base's weights into ``dtype``, in place; adapters stay as they are, and so do quantised weights."""
    for name, parameter in model.named_parameters():
        if not is_adapter(name) and not is_quantized(parameter) and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
    if hasattr(model, "fastpeft_source") and "quantize" not in model.fastpeft_source:  # it was quantised from weights in its dtype
        model.fastpeft_source["dtype"] = str(dtype).removeprefix("torch.")  # the adapter's answers are those of this base
