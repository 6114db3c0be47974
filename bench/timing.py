"""Measuring, the same way for every op: rivals interleaved in one run, quantiles, GB/s or TFLOP/s, peak memory on CUDA.

Interleaving matters more than repetition: on a shared machine a rival measured a minute later meets another machine. Nothing is timed
before its results were seen to be finite. Before each call a buffer larger than most caches is written, so that inputs come from memory.
The roofline, a copy and a square product of random numbers, is measured in the same run. On one CPU thread the clock is the thread's own:
other processes do not count.

On CUDA each rival has two times. ``ms``, eager: events around the Python call, so that a small operator's is its host's. ``graph_ms``: the
call captured once in a CUDA graph and replayed, so that nothing but the GPU's own work counts; ratios and rooflines are of these where
there are some. A call that cannot be captured says why in the note.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib
import importlib.metadata
import importlib.util
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from bench.pieces import say
from fastpeft.ops._gemm import LACKING
from fastpeft.train.capture import capture_or_leave_all_as_it_was

QUANTILES = (0.2, 0.5, 0.8)


@dataclass
class Row:
    """One line of a table: what was measured, of whom, on which shape, and how much data or arithmetic it stands for."""

    op: str
    shape: str
    dtype: str
    provider: str
    ms: tuple[float, float, float] = (0.0, 0.0, 0.0)  # 20, 50, 80 percent
    graph_ms: tuple[float, float, float] | None = None  # CUDA only: replay of the call as a captured graph
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    ratio: float | None = None  # baseline's median over ours: above 1, ours is faster
    peak_mb: float | None = None  # CUDA only
    roofline: float | None = None  # fraction of what copy bandwidth or a large product's rate allows, whichever is nearer
    note: str = ""


@dataclass
class Settings:
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    seconds: float = 1.0  # for all rivals of a case together
    quick: bool = False
    dtypes: list[torch.dtype] = field(default_factory=lambda: [torch.float32, torch.bfloat16])
    lines: bool = False  # tell each case's rows as a line of JSON, at once


def environment() -> dict:
    cuda = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "lacks": " and ".join(str(dtype).removeprefix("torch.") for dtype in LACKING) or "nothing",
        "liger": liger_missing() or importlib.metadata.version("liger_kernel"),
        "peft": importlib.metadata.version("peft") if importlib.util.find_spec("peft") else "not installed",
    }


def liger_missing() -> str:
    """Why Liger's kernels are no rivals here, "" where they are."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "not installed"
    return "" if torch.cuda.is_available() else "needs CUDA"


def liger(name: str, settings: Settings, **how) -> dict[str, Callable]:
    """``liger_kernel.transformers.functional.<name>`` as one more rival, on CUDA where it is installed."""
    if settings.device != "cuda" or liger_missing():
        return {}
    return {"liger": functools.partial(getattr(importlib.import_module("liger_kernel.transformers.functional"), name), **how)}


def _once(fn: Callable, device: str) -> float:
    """Milliseconds of one call."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        fn()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    fn()
    return (clock() - begin) * 1e3


@functools.cache
def _eviction(device: str) -> torch.Tensor:
    return torch.empty((256 if device == "cuda" else 32) << 20, dtype=torch.uint8, device=device)


@functools.cache
def roofline(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """(GB/s of a copy, read and write counted; TFLOP/s of a square product), medians. On CUDA a copy of 1 GB and a side of 8192, on the CPU
    32 MB and 2048. Random numbers: a GPU multiplies constant ones faster, for it draws less power. Of a dtype that the CPU lacks the
    product is float32's: its own takes 17 seconds."""
    size, side = (1 << 30, 8192) if device == "cuda" else (32 << 20, 2048)
    source = torch.randn(size // dtype.itemsize, device=device, dtype=dtype)
    wide = torch.float32 if device == "cpu" and dtype in LACKING else dtype
    target, (a, b) = torch.empty_like(source), torch.randn(2, side, side, device=device, dtype=wide).unbind(0)
    out = torch.empty_like(a)
    seconds = []
    for fn in (lambda: target.copy_(source), lambda: torch.mm(a, b, out=out)):
        fn()
        seconds.append(sorted(_once(fn, device) for _ in range(9))[4] / 1e3)
    return 2 * source.nbytes / seconds[0] / 1e9, 2 * side**3 / seconds[1] / 1e12


def captured(fn: Callable) -> Callable:
    """``fn`` as a CUDA graph's replay; it has been called before, on the current stream, which is not the default one: backward runs on its
    forward's stream, and the default one cannot be captured. RuntimeError where ``fn`` waits for the device."""
    graph, device, pool = torch.cuda.CUDAGraph(), torch.device("cuda"), torch.cuda.graph_pool_handle()
    with capture_or_leave_all_as_it_was(device, pool), torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
        result = fn()

    def replay():
        graph.replay()
        return result

    return replay


def _check_finite(what: str, result) -> None:
    for value in result if isinstance(result, (tuple, list)) else (result,):
        if isinstance(value, torch.Tensor) and not value.isfinite().all():
            raise ValueError(f"{what} gives nan or infinity: not timed")


def under(fn: Callable, module: str, **rules) -> Callable:
    """``fn``, run with a module's rules set to these: a form that its rule would not choose here."""

    @functools.wraps(fn)
    def run(*args):
        found = importlib.import_module(module)
        before = {name: getattr(found, name) for name in rules}
        vars(found).update(rules)
        try:
            return fn(*args)
        finally:
            vars(found).update(before)

    return run


def attention_alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, flash: bool = False) -> torch.Tensor:
    """Attention with nothing added, PyTorch's SDPA: on the kernel that it takes by itself, or on its flash kernel."""
    gqa = {} if q.shape[1] == k.shape[1] else {"enable_gqa": True}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION) if flash else contextlib.nullcontext():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, **gqa)


def compiled(fn: Callable, settings: Settings) -> dict[str, Callable]:
    """``fn`` through torch.compile as one more rival; none in a quick run, where compiling would take most of the time."""
    if settings.quick:
        return {}
    torch._dynamo.reset()  # each case is compiled for its own shapes
    torch._functorch.config.donated_buffer = False  # backward_of runs one backward many times
    return {"torch.compile": torch.compile(fn, fullgraph=True, dynamic=False)}


def copy_of(nbytes: float, device: str) -> Callable:
    """A copy that moves so many bytes, those it reads and those it writes: what an operator that only moves memory is held against."""
    source = torch.zeros(int(nbytes) // 2, dtype=torch.uint8, device=device)
    return functools.partial(torch.empty_like(source).copy_, source)


def compare(
    op: str,
    shape: str,
    dtype: torch.dtype,
    rivals: dict[str, Callable],
    settings: Settings,
    *,
    bytes_moved: float | None = None,
    flops: float | None = None,
    note: str = "",
) -> list[Row]:
    """A row per rival. The last one is the baseline of the ratios; ``bytes_moved`` and ``flops`` are what the work needs, not what a
    rival does, so that GB/s and TFLOP/s compare as the times do. A rival that fails, but the first and the last, is left out and named;
    an error of these is raised or, where lines are told, told: the next case is then measured. On CUDA a copy of ``bytes_moved`` runs among
    them."""
    ours, baseline = next(iter(rivals)), list(rivals)[-1]
    if bytes_moved and settings.device == "cuda" and ours != baseline:
        rivals = {ours: rivals[ours], "copy": copy_of(bytes_moved, settings.device), **rivals}
    case = f"{op} {shape} {dtype}"
    try:
        rivals, peaks, told = _warmed_up(case, rivals, settings, needed=(ours, baseline))
    except Exception as error:
        if not settings.lines:
            raise
        say({"case": case, "failed": " ".join(f"{getattr(error, 'rival', '')}: {type(error).__name__}: {error}".split())[:400]})
        return []
    replays, untaken = _captured_all(rivals) if settings.device == "cuda" else ({}, [])
    note = "; ".join(filter(None, (note, *told, *untaken)))
    times, graph_times = _interleaved(rivals, replays, settings, ours)
    rows, (bandwidth, rate) = [], roofline(settings.device, dtype)
    for name, samples in times.items():
        replayed = _quantiles(graph_times[name]) if name in graph_times else None
        row = Row(op, shape, str(dtype).removeprefix("torch."), name, _quantiles(samples), replayed, note=note)
        seconds = (replayed or row.ms)[1] / 1e3
        row.gb_per_s = bytes_moved / seconds / 1e9 if bytes_moved else None
        row.tflop_per_s = flops / seconds / 1e12 if flops else None
        row.peak_mb = peaks.get(name)
        row.roofline = max((row.gb_per_s or 0) / bandwidth, (row.tflop_per_s or 0) / rate) or None
        rows.append(row)
    for row in rows:
        both = row.graph_ms and rows[-1].graph_ms
        row.ratio = rows[-1].graph_ms[1] / row.graph_ms[1] if both else rows[-1].ms[1] / row.ms[1]
    if settings.lines:
        say({"case": case, "rows": [dataclasses.asdict(row) for row in rows]})
    return rows


def _told(name: str, what: str, error: Exception) -> str:
    return f"{name} {what}: {type(error).__name__}: {str(error).splitlines()[0][:120]}"


def _warmed_up(
    case: str, rivals: dict[str, Callable], settings: Settings, needed: tuple[str, ...]
) -> tuple[dict[str, Callable], dict[str, float], list[str]]:
    """(the rivals that run, the MB each allocates on CUDA, why others do not); an error of one of ``needed`` is raised."""
    running, peaks, told = {}, {}, []
    for name, fn in rivals.items():
        try:
            for _ in range(1 if settings.quick else 2):  # compilation, caches, allocator
                _check_finite(f"{case}: {name}", fn())
        except Exception as error:  # a compiler that is not there, a kernel that does not take the shape
            if name in needed:
                error.rival = name
                raise
            told.append(_told(name, "left out", error))
            continue
        running[name] = fn
        if settings.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            fn()
            torch.cuda.synchronize()
            peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return running, peaks, told


def _captured_all(rivals: dict[str, Callable]) -> tuple[dict[str, Callable], list[str]]:
    """(replays of the rivals' CUDA graphs, why others were not captured)."""
    replays, told = {}, []
    for name, fn in rivals.items():
        try:
            replays[name] = captured(fn)
        except Exception as error:
            torch.cuda.synchronize()
            told.append(_told(name, "not captured", error))
    return replays, told


def _interleaved(
    rivals: dict[str, Callable], replays: dict[str, Callable], settings: Settings, ours: str
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Milliseconds of every call, one rival after the other, eager and replayed, until the time is over."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    graph_times: dict[str, list[float]] = {name: [] for name in replays}
    gc.collect()
    gc.disable()
    try:
        stop = time.perf_counter() + settings.seconds * (0.2 if settings.quick else 1.0)
        while time.perf_counter() < stop or len(times[ours]) < (3 if settings.quick else 5):
            for calls, into in ((rivals, times), (replays, graph_times)):
                for name, fn in calls.items():
                    _eviction(settings.device).zero_()
                    into[name].append(_once(fn, settings.device))
    finally:
        gc.enable()
    return times, graph_times


def _quantiles(samples: list[float]) -> tuple[float, float, float]:
    return tuple(torch.tensor(samples).quantile(torch.tensor(QUANTILES)).tolist())


def _leaves(inputs) -> list[torch.Tensor]:
    return [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]


def backward_of(fn: Callable, inputs, cotangent=None) -> Callable:
    """A callable that runs ``fn``'s backward alone, for the inputs that require gradients, as often as it is called."""
    out, leaves = fn(*inputs), _leaves(inputs)
    return lambda: torch.autograd.grad(out, leaves, cotangent, retain_graph=True)


def step_of(fn: Callable, inputs, cotangent=None) -> Callable:
    """Forward and backward."""
    leaves = _leaves(inputs)
    return lambda: torch.autograd.grad(fn(*inputs), leaves, cotangent)


def measure(
    op: str,
    shape: str,
    dtype: torch.dtype,
    fns: dict[str, Callable | tuple[Callable, list]],
    inputs,
    settings: Settings,
    *,
    cotangent=None,
    bytes_moved: tuple[float, float] | float | None = None,
    flops: tuple[float, float] | float | None = None,
    phases: tuple[str, ...] = ("fwd", "bwd", "fwd+bwd"),
) -> list[Row]:
    """Forward as in training, backward alone, and both, of every rival; as :func:`compare` otherwise.

    ``fns``: a function of ``inputs``, or (function, its own inputs). ``bytes_moved``, ``flops``: of forward and of backward; one number
    for both where rivals share the work out differently.
    """
    calls = {name: fn if isinstance(fn, tuple) else (fn, inputs) for name, fn in fns.items()}

    def of(pair, phase):
        if not isinstance(pair, tuple):
            return pair if phase == "fwd+bwd" else None
        return sum(pair) if phase == "fwd+bwd" else pair[phase == "bwd"]

    forms = {
        "fwd": lambda fn, given: lambda: fn(*given),
        "bwd": lambda fn, given: _later(backward_of, fn, given, cotangent),
        "fwd+bwd": lambda fn, given: step_of(fn, given, cotangent),
    }
    rows = []
    for phase in phases:
        rivals = {name: forms[phase](*call) for name, call in calls.items()}
        counts = {"bytes_moved": of(bytes_moved, phase), "flops": of(flops, phase)}
        rows += compare(f"{op} {phase}", shape, dtype, rivals, settings, **counts)
    return rows


def _later(make: Callable, *args) -> Callable:
    """What ``make`` returns, made at the first call: a rival that fails does so where :func:`compare` expects it."""
    made = functools.cache(lambda: make(*args))
    return lambda: made()()


def markdown(rows: list[Row]) -> str:
    def number(value, digits=2):
        return "" if value is None else f"{value:.{digits}f}"

    head = (
        "| op | shape | dtype | provider | ms 20% | ms 50% | ms 80% | graph ms 50% | GB/s | TFLOP/s | roofline | ratio | peak MB |\n|"
        + "---|" * 13
    )
    lines = [
        f"| {r.op} | {r.shape} | {r.dtype} | {r.provider} | {' | '.join(number(m, 3) for m in r.ms)} |"
        f" {number(r.graph_ms and r.graph_ms[1], 3)} | {number(r.gb_per_s, 1)} |"
        f" {number(r.tflop_per_s, 3)} | {number(r.roofline)} | {number(r.ratio)} | {number(r.peak_mb, 1)} |"
        for r in rows
    ]
    notes = [f"\n{r.op}, {r.shape}, {r.dtype}: {r.note}" for r in rows if r.note and r.provider == "fastpeft"]
    return "\n".join([head, *lines, *notes])
