"""bench/gpu_figures.py: the twelve figures find their cases among those that the benches and whole steps tell, and the worst counts."""

import dataclasses

import pytest
import torch
from torch.overrides import TorchFunctionMode

from bench import __main__ as bench
from bench import gpu_figures, timing
from bench.inside import CaseRow

KERNELS = ("layer_norm", "rms_norm", "lora_linear", "attention", "excitor_keys", "mm_adapter")


class NothingHeld(TorchFunctionMode):
    """Tensors made on a GPU are made on the meta device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return func(*args, **kwargs | {"device": "meta"} if kwargs.get("device") == "cuda" else kwargs)


def told_by(name: str) -> list[dict]:
    """The cases that one bench tells on a GPU in a quick run in bfloat16, each rival at 1 ms; its tensors hold nothing."""
    cases = []

    def compare(op, shape, dtype, rivals, settings, *, bytes_moved=None, flops=None, note=""):
        names = [*rivals] + ["copy"] * bool(bytes_moved)
        rows = [timing.Row(op, shape, str(dtype).removeprefix("torch."), p, (1.0,) * 3, (1.0,) * 3) for p in names]
        cases.append({"case": f"{op} {shape} {dtype}", "rows": [dataclasses.asdict(row) for row in rows]})
        return rows

    def measure(op, shape, dtype, fns, inputs, settings, *, bytes_moved=None, phases=("fwd", "bwd", "fwd+bwd"), **how):
        return [row for phase in phases for row in compare(f"{op} {phase}", shape, dtype, fns, settings, bytes_moved=bytes_moved)]

    module = bench.load(bench.found()[name])
    vars(module).update({key: value for key, value in {"compare": compare, "measure": measure}.items() if hasattr(module, key)})
    if name == "lora_linear":
        module.forms = module.extended = lambda *args: []  # of these no figure is told, and they run at once
        module.peft = lambda *args: {}
    with NothingHeld():
        module.run(timing.Settings("cuda", quick=True, dtypes=[torch.bfloat16]))
    return cases


def test_kernels_are_found_where_the_benches_tell_them():
    cases = [case for name in KERNELS for case in told_by(name)]
    told = gpu_figures.figures("kernels", cases)
    assert len(told) == 8 and {figure["figure"]: figure["value"] for figure in told if figure["value"] != 1.0} == {}
    assert all(figure["met"] and figure["case"] for figure in told)
    assert told[2]["case"] == "lora_linear fwd+bwd 8192x4096x4096 r8, graph_ms"


def test_of_several_cases_the_worst_counts_and_none_is_no_figure():
    def case(op, ours, copy, graph=True):
        rows = [
            timing.Row(op, "8192x4096", "bfloat16", p, (9.0, 10.0, 11.0), (t,) * 3 if graph else None)
            for p, t in (("fastpeft", ours), ("copy", copy))
        ]
        return {"case": op, "rows": [dataclasses.asdict(row) for row in rows]}

    cases = [case("layer_norm all fwd", 1.0, 0.95), case("rms_norm all fwd", 1.0, 0.8), case("rms_norm all bwd", 1.0, 0.8, graph=False)]
    forward, backward, *others = gpu_figures.figures("kernels", cases)
    assert forward == {
        "figure": "norms forward, of a copy's speed",
        "value": 0.8,
        "target": ">= 0.9",
        "met": False,
        "case": "rms_norm all fwd 8192x4096, graph_ms",
    }
    assert (backward["value"], backward["met"], backward["case"]) == (1.0, True, "rms_norm all bwd 8192x4096, ms")
    assert [(figure["value"], figure["met"]) for figure in others] == [(None, None)] * 6


def test_whole_steps():
    from bench import steps, steps_llama

    def line(what, case, seconds, **more):
        row = CaseRow(what, 1.0, 1.0, 1.0, 1, 1, case=case, seconds=seconds, speedup=1.0, peak_bytes=100, **more)
        return row.to_dict() | {"case": f"{what}, {case}"}

    llama = {key: [name for name, *_ in rivals] for key, rivals in steps_llama.RIVALS.items()}
    cases = [
        {"plan": "F/LoRA/LoRA"} | line(steps.RIVALS[key][0], "dropout 0", s) for key, s in (("peft", 6.0), ("graphed", 1.5), ("sdpa", 3.0))
    ]
    cases.append({"plan": "LoRA/LoRA/LoRA"} | line(steps.RIVALS["graphed"][0], "dropout 0", 99.0))
    cases.append(
        {
            "case": "F/LoRA/LoRA, table",
            "rows": [{"plan": "F/LoRA/LoRA"} | line(steps.RIVALS["graphed"][0], "dropout 0", 1.0, estimate_bytes=80)],
        }
    )
    lines = [(llama["peft"][0], 3.0), (llama["graphed"][0], 2.0), (llama["liger"][0], 2.5), (llama["compile"][0], 2.2)]
    cases += [line(what, "full rows", seconds) for what, seconds in lines]
    cases += [{"case": llama["peft16"][0], "failed": "RuntimeError: no memory"}]
    told = gpu_figures.figures("steps", cases)
    assert [(figure["value"], figure["met"]) for figure in told] == [(6.0, True), (1.5, True), (1.1, False), (0.25, False)]
    assert told[2]["case"] == f"LoRA, CUDA graphs over {llama['compile'][0]}, full rows"
    assert len(gpu_figures.FIGURES) == 12


@pytest.mark.parametrize("call", ["kernels", "steps"])
def test_nothing_measured(call):
    assert all(figure["value"] is figure["met"] is figure["case"] is None for figure in gpu_figures.figures(call, []))
