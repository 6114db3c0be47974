"""Estimate of a training step's cost, without running it: the step's own code on tensors that have shapes and no data.

Everything large (weights, activations, gradients) is fake; token ids, masks and indices, which decide what is computed, are real. So FLOPs
and saved bytes are those of the step that the trainer measures, and the peak is followed storage by storage through forward and backward.
"""

from __future__ import annotations

import gc
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from fastpeft.caching.attach import lower_layers_known
from fastpeft.cost.batches import DTYPES, AskedStep, inputs_for, inputs_of
from fastpeft.cost.graphs import in_graphs
from fastpeft.cost.largest import largest
from fastpeft.cost.profile import measure
from fastpeft.cost.several_devices import Links, on_several_devices
from fastpeft.fused.head.outputs import lean_logits
from fastpeft.models import ModelSource, family_of, parts_of, resolve
from fastpeft.models.quantize import quantizable, quantized_bytes
from fastpeft.ops._private import FakeTensor, FakeTensorMode, storage_id, tree_iter, tree_map_only, without_dispatch_modes
from fastpeft.optimize import optimize
from fastpeft.options import bytes_of
from fastpeft.plan import Plan, adapt, build
from fastpeft.verify.baseline import plain

RESERVE = 1.0e9  # bytes of a GPU that no tensor gets: the CUDA context, libraries' workspaces, the allocator's fragments


@dataclass
class Estimate:
    """One training step of ``batch_size`` samples. flops_per_sample: forward and backward, two per multiply-add. saved_bytes: kept from
    forward to backward. peak_bytes: the most that tensors hold at once, optimiser included, and on a CPU the process around them
    (process_bytes). trained_bytes: of weight_bytes, those that the plan trains. ranks: of several devices
    (:class:`SeveralDevices`). fits, largest_batch_size: into a GPU's memory, less RESERVE. advice: what would make it smaller, with its
    peak. graph_bytes: on a GPU, what the trainer's CUDA graphs take beside peak_bytes where there is room (0: the step is not one)."""

    model: str
    plan: str
    batch_size: int
    dtype: str
    flops_per_sample: float
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    saved_bytes: int
    peak_bytes: int
    process_bytes: int
    flops_by_part: dict[str, int] = field(default_factory=dict)
    trained_bytes: int = 0
    fits: bool | None = None
    largest_batch_size: int | None = None
    advice: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ranks: dict[str, Any] | None = None
    graph_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; what was not asked for is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class _Tracker(FakeTensorMode):
    """Fake tensors, except where all operands of an operator are real; knows the bytes that fake storages hold, and the most so far."""

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.building, self.depth, self.live, self.peak, self.sizes = True, 0, 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
        # but not inside another: what an operator is made of, when it has fake operands, is fake
        if not self.building and self.depth == 0 and not any(isinstance(t, FakeTensor) for t in given):
            with without_dispatch_modes():
                return func(*args, **kwargs)
        if not self.building:
            args, kwargs = tree_map_only(Tensor, self._faked, (args, kwargs))
        self.depth += 1
        try:
            out = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self.depth -= 1
        if self.depth == 0:  # what an operator makes inside itself is its fake form's, not its kernel's
            for leaf in tree_iter(out):
                if isinstance(leaf, FakeTensor):
                    self._follow(leaf.untyped_storage())
        return out

    def _faked(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.from_tensor(tensor.detach())

    def _follow(self, storage) -> None:
        key, size = storage_id(storage), storage.nbytes()
        if key in self.sizes:
            return
        self.sizes[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)


def estimate(
    model: str | Path | ModelSource | nn.Module,
    plan: str | Plan,
    *,
    batch_size: int = 20,
    seq_len: int | None = None,
    answer_len: int | None = None,
    dtype: str | torch.dtype = "fp32",
    questions_per_image: int = 1,
    feature_cache: bool = True,
    cache_layers: bool = False,
    gradient_accumulation: int = 1,
    optimized: bool = True,
    gpu_memory: str | None = None,
    quantize: str | None = None,
    world: int = 1,
    nodes: int = 1,
    shard: str | None = None,
    links: Links | None = None,
    flops_per_second: float | None = None,
    batch: Mapping[str, Any] | None = None,
    **options,
) -> Estimate:
    """FLOPs, saved bytes and peak memory of one training step; allocates nothing.

    model: a name, a local transformers folder, or a model (whose configuration is taken). plan, ``options`` (r=8): as
    :func:`fastpeft.adapt`. seq_len: tokens of a question (20), or of a causal language model's sample (512); answer_len: of its answer
    (6; a quarter). No padding. questions_per_image: so many of a batch are about one image, which is computed once for them.
    feature_cache: what frozen stages compute is kept, so it is not in the step. cache_layers: neither is what lower layers of a language
    model compute that train nothing, as after a first epoch. optimized=False: the same model and plan without fastpeft
    (:func:`fastpeft.verify.baseline.plain`), attention forming its probabilities. gpu_memory ("24GB"): whether it fits, the largest batch
    that does, and what would help. quantize: as :func:`fastpeft.build` (None: a model's own); weight_bytes are then those of that format,
    and the peak has room for the weights of the block that is largest when written
    out. batch: what a data set's collator made of ``batch_size`` samples; the step is then of this batch, its lengths, padding, labels and
    images, and seq_len, answer_len and questions_per_image say what other batches are like. world, nodes, shard, links, flops_per_second:
    of several devices, as :func:`on_several_devices`. ValueError names what cannot be.
    """
    step = AskedStep(
        batch_size=batch_size,
        seq_len=seq_len,
        answer_len=answer_len,
        dtype={v: k for k, v in DTYPES.items()}.get(dtype, dtype),
        questions_per_image=questions_per_image,
        feature_cache=feature_cache,
        cache_layers=cache_layers,
        gradient_accumulation=gradient_accumulation,
        optimized=optimized,
        quantize=quantize or getattr(model, "fastpeft_source", {}).get("quantize"),
    )
    model = model if isinstance(model, nn.Module) else resolve(model)

    def run(**change) -> Estimate:
        alike = batch if not change.keys() & {"batch_size", "questions_per_image"} else None
        how = {"on_cpu": gpu_memory is None, "batch": alike, "graphed": gpu_memory is not None and not change}
        return _estimate_step(model, plan, replace(step, **change), options, **how)

    result = run()
    if world != 1 or nodes != 1 or shard is not None:
        network = adapt(_meta_model(model, DTYPES[step.dtype], step.quantize)[0], plan, **options)
        how = {"shard": shard, "links": links, "flops_per_second": flops_per_second}
        result.ranks = on_several_devices(network, result, world, nodes, **how).to_dict()
    if gpu_memory is None:
        return result
    room = bytes_of(str(gpu_memory)) - int(RESERVE)
    result.fits = result.peak_bytes <= room
    held = result.weight_bytes + result.gradient_bytes + result.optimizer_bytes

    def peak(n: int) -> float:
        if batch is None:
            return run(batch_size=n).peak_bytes
        return held + (result.peak_bytes - held) * n / batch_size  # of samples like these; other batches than the data's have other lengths

    result.largest_batch_size = largest(peak, batch_size, result.peak_bytes, room)
    if not result.fits:
        result.advice = _advice(run, step, room)
    if result.graph_bytes:
        result.notes.append(f"CUDA graphs take {result.graph_bytes / 1e9:.2f} GB more; where there is no room, steps run without")
    result.notes.append(f"{RESERVE / 1e9:.0f} GB of the GPU is left for the CUDA context, workspaces and fragmentation")
    return result


def _advice(run: Callable[..., Estimate], step: AskedStep, room: int) -> list[str]:
    """Options that cost least first, each with its own peak."""
    batch = step.batch_size
    options = [
        ("keep what the frozen image encoder, or it and the question encoder, computes (feature_cache)", {"feature_cache": True}),
        ("5 questions per image (questions_per_image)", {"questions_per_image": min(5, batch)}),
        ("bf16 weights and activations (dtype)", {"dtype": "bf16"}),
    ]
    parts, n = 2, batch
    while n > 1:
        n = -(-batch // parts)
        options.append((f"{parts} batches of {n} per step (gradient_accumulation)", {"batch_size": n, "gradient_accumulation": parts}))
        parts *= 2
    advice = []
    for what, change in options:
        if replace(step, **change | {"batch_size": batch}) == step:
            continue
        peak = run(**change).peak_bytes
        advice.append(f"{what}: {peak / 1e9:.2f} GB, {'fits' if peak <= room else 'does not fit'}")
        if peak <= room:
            break
    return advice


def _estimate_step(
    model: ModelSource | nn.Module,
    plan: str | Plan,
    step: AskedStep,
    options: dict[str, Any],
    *,
    on_cpu: bool,
    batch: Mapping[str, Any] | None,
    graphed: bool,
) -> Estimate:
    """The estimate of one step, of ``batch`` if there is one; ``on_cpu``: with the process around it; ``graphed``: in CUDA graphs, too."""
    dtype = DTYPES[step.dtype]
    tracker, (network, name) = _Tracker(), _meta_model(model, dtype, step.quantize)
    adapt(network, plan, **options)
    less, written = _quantized(network, step.quantize, dtype) if step.quantize else (0, 0)
    if not step.optimized:
        network = plain(network, attention="eager")
    with tracker:
        _fill(network)
        network.train()
        weights = sum(p.untyped_storage().nbytes() for p in {id(t): t for t in (*network.parameters(), *network.buffers())}.values()) - less
        trained = [p for p in network.parameters() if p.requires_grad]
        if not trained:
            raise ValueError("nothing to train: the plan freezes every part")
        before = tracker.live
        inputs = inputs_of(network, batch, step.feature_cache, dtype) if batch is not None else inputs_for(network, step, dtype)
        tracker.building = False
        with _no_collection():
            tracker.peak = tracker.live
            known = lower_layers_known(network) if step.cache_layers else nullcontext([])
            with known as left_out, measure(network) as cost, lean_logits(network):
                network(**inputs).loss.backward()
        most = tracker.peak
        inside = _in_graphs(network, inputs, batch, step, tracker, graphed)
    halves = [p for p in trained if p.dtype in (torch.bfloat16, torch.float16)]
    # AdamW's two moments, and a float32 master (with its float32 gradient) of every half-precision parameter
    optimizer = sum(8 * p.numel() for p in trained) + sum(4 * p.numel() for p in halves)
    gradients = sum(p.numel() * max(4, p.element_size()) for p in trained)
    held = gradients if step.gradient_accumulation > 1 else 0
    peak = max(weights + optimizer + held + most - before + written, weights + optimizer + gradients)
    process = psutil.Process().memory_info().rss if on_cpu else 0
    notes = ["peak_bytes includes this process as it is, interpreter and libraries (process_bytes)"] if on_cpu else []
    if step.cache_layers:
        notes += left_out or ["cache_layers changes nothing: a language model's lowest layers are trained, or there is no language model"]
    return Estimate(
        name, str(network.fastpeft_plan), step.batch_size, step.dtype, cost.flops / step.batch_size, weights, gradients, optimizer,
        cost.saved_bytes, peak + process, process, cost.flops_by_part, sum(p.nbytes for p in trained), notes=notes,
        graph_bytes=max(0, weights + optimizer + gradients + inside - peak) * (inside > 0),
    )  # fmt: skip


def _in_graphs(network: nn.Module, inputs: dict[str, Tensor], batch: Mapping[str, Any] | None, step, tracker: _Tracker, asked: bool) -> int:
    """Bytes of inputs that stay, of the pool of the graphs' activations, and of those of an eager batch; 0 where the step is no graph."""
    if not asked or not step.optimized or step.cache_layers or step.quantize:
        return 0
    with _no_collection(), lean_logits(network):
        graphs = in_graphs(network, inputs, batch or {}, step.batch_size, tracker)
    return 0 if graphs is None else graphs.inputs + 2 * graphs.activations


@contextmanager
def _no_collection() -> Iterator[None]:
    """What building left in cycles goes away before, and nothing half way through: an estimate depends on no chance."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _quantized(network: nn.Module, quantize: str, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes that a quantised base takes less, bytes of the block of layers that takes most when written out)."""
    less, blocks = 0, defaultdict(int)
    for name, layer in quantizable(network, parts_of(network)):
        if layer.weight.requires_grad:
            raise ValueError(f"{name}.weight is to be trained, and a quantised base stays as it is: train adapters, or do not quantise")
        dense = layer.weight.numel() * dtype.itemsize
        less += dense - quantized_bytes(layer.weight.shape, quantize)
        blocks[name.rpartition(".")[0]] += dense
    return less, max(blocks.values())


def _meta_model(model: ModelSource | nn.Module, dtype: torch.dtype, quantize: str | None) -> tuple[nn.Module, str]:
    """The backbone without data, and what to call it."""
    if not isinstance(model, nn.Module):
        network, name = build(model, device="meta", dtype=dtype, quantize=quantize), str(model)
    else:
        with torch.device("meta"):
            network, name = family_of(model).model(model.config).to(dtype), type(model).__name__
        optimize(network)
    return network, name


def _fill(network: nn.Module) -> None:
    """Parameters and buffers from meta to the CPU, tied ones tied; called under fake tensors."""
    made: dict[int, tuple[Any, Any]] = {}  # both, so that no id is another's later
    for module in network.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    filled = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
                    made[id(tensor)] = tensor, filled
                table[name] = made[id(tensor)][1]
