"""The training step as CUDA graphs: forward and backward of each size of batch, and the update, each one launch of the host.

A batch is padded to a :class:`fastpeft.data.buckets.Bucket`, copied into buffers that stay, and computed in static shapes. A bucket's
first batch runs eagerly, which fills every cache; its second is captured; later ones are replayed. Gradients are added to buffers that
stay, so that batches are accumulated by replaying. The update (clipping, AdamW, masters) is a graph of
its own for each set of parameters that got a gradient. An eager step and a replayed one compute the same, to the bit. Losses and norms of
gradients are read every few steps. What a graph has read of Python (where weights lie, a dropout's p, betas) is compared whenever others
have had their turn, and the graph dropped where it is not the same. Where a step cannot be captured, steps run as :class:`Step` runs them,
and ``note`` says why.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

from fastpeft.cost.graphs import longest_text, most_tokens
from fastpeft.cost.memory_budget import MemoryBudget
from fastpeft.cost.profile import StepCost, measure
from fastpeft.data.buckets import Bucket, measured_batch, padded
from fastpeft.models import family_of
from fastpeft.ops._common import to_device_async
from fastpeft.static_shapes import NotStatic, Seeds, static_shapes
from fastpeft.train.capturable import Surroundings, read_by_update, why_not, why_not_updated
from fastpeft.train.capture import Captures, Graph
from fastpeft.train.config import TrainConfig
from fastpeft.train.optimizer import KeptGradients
from fastpeft.train.sources import SourceLosses
from fastpeft.train.step import Passed, Step, cost_of

MOST = 32  # graphs of batches: activations share their memory, the nodes of a graph of MISS take some MB
READS_EVERY = 10  # steps


def step_for(config: TrainConfig, reason: str, model: nn.Module, *known, budget: MemoryBudget | None, mixed: bool, **parts) -> Step:
    """The step of a run, in graphs unless there is a ``reason`` against it (:func:`fastpeft.train.capturable.why_not_for`), which on a GPU
    is its note."""
    parts |= {"budget": budget, "mixed": mixed}
    if not reason:
        return GraphedStep(model, *known, **parts, samples=config.batch_size, seed=config.seed)
    step = Step(model, *known, **parts)
    step.note = f"no CUDA graphs: {reason}" if config.cuda_graph and next(model.parameters()).device.type == "cuda" else ""
    return step


class GraphedStep(Step):
    """As :class:`Step`, in graphs. ``samples``: of a full batch; ``seed``: of dropout."""

    def __init__(self, *parts, samples: int, seed: int, **options):
        super().__init__(*parts, **options)
        family = family_of(self.model)
        self.samples, self.image_tokens = samples, family.image_tokens(self.model.config)
        self.longest = longest_text(self.model) if family.kind == "vqa" else 1 << 30
        self.most_tokens = most_tokens(self.model)
        self.seeds, self.terms = Seeds(seed, self.device), torch.zeros((), device=self.device)
        self.captures, self.gradients = Captures(self.device), KeptGradients(self.optimizer)
        self.surroundings = Surroundings(self.model)
        self.read_of_python: list = []  # what ``graphs`` have
        self.buffers: dict[Hashable, Tensor] = {}
        self.graphs: dict[Bucket, Graph] = {}
        self.updates: dict[frozenset[int], Graph | None] = {}  # by the parameters that it changes; None: it ran once
        self.read_by_updates: dict[frozenset[int], list] = {}
        self.reached: dict[Bucket, frozenset[int]] = {}  # the parameters that the backward of a bucket that ran gives a gradient
        self.now: set[int] = set()  # those of the step so far
        self.number = 0  # of the step, from 0
        self.left = True  # whether others have had their turn since what graphs have read was looked at: callbacks, validation, other runs
        self.unread, self.reads_every = [], READS_EVERY
        self.replayed, self.eager, self.changes, self.unlike = 0, 0, 0, ""

    def passes(self, batches: list[dict], *, measured: bool) -> Passed:
        if not self.note:
            try:
                return self._passes(batches, measured)
            except Exception as error:  # an error of the batch itself comes again below
                reason = _said(error)
            self.give_up(reason)  # out here: the error's frames hold what it had made
        return super().passes(batches, measured=measured)

    def update(self, number: int, loss: float | None) -> tuple[float, float | None]:
        if self.note:
            return super().update(number, loss)
        rate, reached, failed = self.optimizer.set_rates(number), frozenset(self.now), ""
        self.now.clear()
        self.number = number + 1
        if self.left:
            for each in [each for each, read in self.read_by_updates.items() if read != self._read_by_update(each)]:
                self.updates.pop(each, None)
        self.left = False
        update, graph = functools.partial(self.gradients.update, reached), self.updates.get(reached)
        if graph is None and reached in self.updates and len(self.updates) <= MOST:
            try:
                graph = self._captured(update, why_not_updated(self.optimizer))
            except Exception as error:
                failed = _said(error)
        self.updates[reached] = graph
        if graph is not None:
            graph.replay()
        else:
            update()
            self.read_by_updates[reached] = self._read_by_update(reached)  # it may have made the moments
        self.unread.append(self.gradients.result.clone())
        if failed:
            self.give_up(failed)
        return rate, None

    def read(self) -> list[tuple[float, float]]:
        """(loss, norm of the gradient) of each step since the last call; waits for the device."""
        self.left = True
        unread, self.unread = self.unread, []
        return [tuple(row) for row in torch.stack(unread).tolist()] if unread else []

    def start(self, step: int) -> None:
        """Go on from where ``step`` steps are done: dropout is then that of an uninterrupted run."""
        self.number, self.left = step, True

    def said(self) -> str:
        """What it did, for the summary."""
        told = f"{len(self.graphs)} CUDA graphs of batches; {self.replayed} batches were replayed, {self.eager} were not"
        told += f", {self.changes} times what graphs were made of was changed" if self.changes else ""
        return self.note or told + (f" ({self.unlike})" if self.unlike else "")

    def give_up(self, reason: str) -> None:
        if self.note:
            return
        self._let_go(self.graphs, self.updates, self.read_by_updates, self.buffers, self.reached)
        self.gradients.release()
        self.note = f"no CUDA graphs: {reason}"

    def _let_go(self, *held: dict) -> None:
        """Of graphs that may still be running."""
        if self.graphs or any(self.updates.values()):
            torch.cuda.synchronize(self.device)
        for each in held:
            each.clear()

    def _captured(self, function: Callable[[], None], reason: str) -> Graph:
        if reason:
            raise RuntimeError(reason)
        return self.captures.capture(function)

    def _read_by_update(self, reached: frozenset[int]) -> list:
        return read_by_update(self.optimizer, [self.gradients.pairs[i][1] for i in sorted(reached)])

    def _passes(self, batches: list[dict], measured: bool) -> Passed:
        if self.left:
            self._drop_what_is_stale()
        terms, cost = sum(map(self.dataset.weight, batches)), None
        self.terms.fill_(terms)
        self.seeds.start(self.number)
        self.gradients.lay_out()
        for batch in batches:
            counted = StepCost() if measured and cost is None else None
            self._pass(batch, terms, counted)
            cost = cost or cost_of(counted, batch)
        return Passed(None, SourceLosses(), cost)

    def _drop_what_is_stale(self) -> None:
        """Graphs of a model that has changed. RuntimeError where it cannot be captured any more."""
        now = self.surroundings.now()
        if now == self.read_of_python:
            return
        if self.reached:
            self.changes += 1
            self._let_go(self.graphs, self.reached)
            self.surroundings = Surroundings(self.model)
            now = self.surroundings.now()
        if reason := why_not(self.model, self.device):
            raise RuntimeError(reason)
        self.read_of_python = now

    def _pass(self, batch: dict, terms: int, counted: StepCost | None) -> None:
        """Adds a batch's loss and gradients to the step's. ``counted`` takes what it costs: a run's first batch, which is not replayed."""
        inputs = {name: batch[name] for name in self.inputs if batch.get(name) is not None}
        inputs = {name: t.to(self.dtype) if t.is_floating_point() else t for name, t in inputs.items()}
        if self.features is not None:
            inputs = self.features.put_in(inputs, batch)
        try:
            own = measured_batch(inputs, batch, self.samples, self.image_tokens)
        except NotStatic as error:
            self.unlike = str(error)
            self.seeds.advance()  # it counts batches
            inputs = self._inputs(batch)
            self._eagerly(lambda: self._backward(self.model(**inputs).loss * (self.dataset.weight(batch) / terms)), counted)
            return
        bucket = own.bucket
        launches_most = bucket.tokens + bucket.answers <= self.most_tokens
        bucket = bucket.rounded(self.longest) if launches_most else bucket
        kept = launches_most and (bucket in self.graphs or len(self.graphs) < MOST)
        inputs = {name: self._moved(name, t, kept) for name, t in padded(own, bucket).items()}
        run = functools.partial(self._forward_backward, inputs, bucket)
        if not (kept and bucket in self.reached):
            reached = self._eagerly(run, counted)
            if kept and counted is None:  # being measured, it may have taken other kernels than a captured one takes
                self.reached[bucket] = reached
            return
        if bucket not in self.graphs:
            self.graphs[bucket] = self._captured(run, "")
        self.graphs[bucket].replay()
        self.replayed += 1
        self.now |= self.reached[bucket]

    def _eagerly(self, run: Callable[[], None], counted: StepCost | None) -> frozenset[int]:
        """Runs a pass; returns the parameters that got a gradient."""
        self.gradients.arrived.clear()
        if counted is None:
            run()
        else:
            with measure(self.model) as cost:
                run()
            vars(counted).update(vars(cost))
        self.eager += 1
        self.now |= self.gradients.arrived
        return frozenset(self.gradients.arrived)

    def _forward_backward(self, inputs: dict[str, Tensor], bucket: Bucket) -> None:
        self.seeds.advance()
        with static_shapes(bucket.sizes, self.seeds):
            self._backward(self.model(**inputs, num_items_in_batch=self.terms).loss)

    def _backward(self, loss: Tensor) -> None:
        loss.backward()
        self.gradients.loss.add_(loss.detach())

    def _moved(self, name: str, t: Tensor, kept: bool) -> Tensor:
        """``t`` on the device; where it is ``kept`` in the buffer of its name and shape, which its bucket's graph reads."""
        if not kept:
            return to_device_async(t, self.device)
        key = (name, t.shape, t.dtype)
        if key not in self.buffers:
            self.buffers[key] = torch.empty(t.shape, dtype=t.dtype, device=self.device)
        return self.buffers[key].copy_(t.pin_memory() if t.device.type == "cpu" else t, non_blocking=True)


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
