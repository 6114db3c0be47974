"""Steps as CUDA graphs: a replayed step is an eager one, to the bit. On a GPU, and on tests/cuda/lookalike.py, where recordings of a step
at two times show what a graph would not know to be stale."""

import json
import math
import os
import signal
import sys
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from static_batches import PLANS, Data, batch_of, model_of, names_of, with_features

import fastpeft as fp
from fastpeft.fused.head.outputs import lean_logits
from fastpeft.static_shapes import Seeds
from fastpeft.train import graph
from fastpeft.train.graph import GraphedStep
from fastpeft.train.interrupts import Interrupted
from fastpeft.train.optimizer import Optimizer

pytestmark = pytest.mark.gpu
capture = sys.modules.get("capture")  # of the lookalike
KINDS = ("some", "every", "none")
LIGHTER = {"miss-tiny": "F/LoRA/LoRA", "lavin-tiny": "F/T/MMAdapter"}  # what is frozen stays outside, as features that were kept


def step_of(name, *, drops=False, plan=None, dtype=torch.float32):
    model = model_of(name, drops, plan or LIGHTER.get(name), device="cuda", dtype=dtype)
    torch.manual_seed(0)
    data = Data(model, names_of(model))
    config = fp.TrainConfig(steps=40, learning_rate=1e-2, base_learning_rate=1e-2, warmup=2)
    known = (model, data, Optimizer(model, config, 40), data.inputs, torch.device("cuda"), dtype)
    return GraphedStep(*known, features=None, budget=None, mixed=False, samples=4, seed=5)


def run(step, name, groups):
    """(loss, norm) of each step; ``groups``: of the numbers of their batches, whose content differs from step to step."""
    losses = []
    with lean_logits(step.model):
        for done, numbers in enumerate(groups):
            batches = []
            for n in numbers:
                how = {"packed": n % 2 == 1, "images": KINDS[n % 3], "samples": 4 - (n == 6)}
                batches.append(with_features(step.model, batch_of(name, step.model, n, content=done, **how)))
            loss = step.passes(batches, measured=False).loss
            losses.append((loss, step.update(done, loss)[1]))
    return step.read() or losses


def weights(step):
    return {name: p.detach().cpu() for name, p in step.model.named_parameters() if p.requires_grad}


def stale(step) -> list[str]:
    """What in a step's graphs is not the same when their functions run again, now."""
    graphs = [*step.graphs.values(), *filter(None, step.updates.values())]
    with lean_logits(step.model):
        return [told for found in graphs for told in capture.differences(found.captured.recording, capture.record(found.function))]


def assert_same(step, twin):
    want = weights(twin)
    assert [name for name, weight in weights(step).items() if not torch.equal(weight, want[name])] == []


def eager_twin(monkeypatch, name, groups, **how):
    monkeypatch.setattr(graph, "MOST", 0)
    twin = step_of(name, **how)
    losses = run(twin, name, groups)
    assert not twin.graphs and not any(twin.updates.values()) and twin.replayed == 0
    return twin, losses


@pytest.mark.parametrize("name", PLANS)
def test_replayed_steps_are_eager_ones(name, monkeypatch):
    """With dropout, of two sizes, full and short batches, padded and packed, with images and without."""
    groups = [[0], [1], [0], [0]]
    step = step_of(name, drops=True)
    losses = run(step, name, groups)
    assert step.note == "" and step.replayed == 2 and len(step.graphs) == 1, step.said()
    assert capture is None or stale(step) == []
    twin, expected = eager_twin(monkeypatch, name, groups, drops=True)
    assert losses == expected and len(set(losses)) == 4 and all(map(math.isfinite, sum(losses, ())))
    assert_same(step, twin)


@pytest.mark.parametrize(
    ("plan", "dtype"), [pytest.param("F/LoRA/LoRA", torch.float32, marks=pytest.mark.slow), ("F/IA3/T", torch.bfloat16)]
)
def test_accumulated_batches_and_short_ones(plan, dtype, monkeypatch):
    groups = [[0, 6], [6, 0]]
    step = step_of("miss-tiny", plan=plan, dtype=dtype)
    losses = run(step, "miss-tiny", groups)
    assert step.note == "" and step.replayed == 2 and any(step.updates.values())
    twin, expected = eager_twin(monkeypatch, "miss-tiny", groups, plan=plan, dtype=dtype)
    assert losses == expected
    assert_same(step, twin)


def test_a_loss_that_is_not_finite_stops_every_update(monkeypatch):
    step = step_of("llama-tiny")
    run(step, "llama-tiny", [[0], [0]])
    before = weights(step)
    head = step.model.lm_head.weight.detach()
    kept, head[5] = head[5].clone(), math.nan
    losses = run(step, "llama-tiny", [[0]])
    head[5] = kept
    losses += run(step, "llama-tiny", [[0], [3]])
    assert math.isnan(losses[0][0]) and all(math.isfinite(loss) for loss, _ in losses[1:])
    assert {name for name, weight in weights(step).items() if not torch.equal(weight, before[name])} == set()


GROUPS = [[0], [0], [0]]


def seeds_of_the_host(monkeypatch):
    for module in ("lora_linear", "dropout"):
        monkeypatch.setattr(import_module(f"fastpeft.ops.{module}"), "new_seed", lambda: torch.randint(0, 2**31, (1,)))


def a_loss_read(monkeypatch):
    monkeypatch.setattr(GraphedStep, "_backward", lambda self, loss: (loss.backward(), self.gradients.loss.add_(loss.item())))


def rows_counted(monkeypatch):
    for module in ("head.loss", "layout"):
        monkeypatch.setattr(import_module(f"fastpeft.fused.{module}"), "first_rows", lambda wanted, n: wanted.nonzero()[:n, 0])


def labels_of_the_host(monkeypatch):
    kept = GraphedStep._moved
    monkeypatch.setattr(GraphedStep, "_moved", lambda self, name, t, keep: t if name == "labels" else kept(self, name, t, keep))


def inputs_let_go(monkeypatch):
    monkeypatch.setattr(GraphedStep, "_moved", lambda self, name, t, keep: t.to(self.device))
    made = graph.Graph.__init__
    monkeypatch.setattr(graph.Graph, "__init__", lambda self, function, pool: (made(self, function, pool), delattr(self, "function"))[0])


@pytest.mark.parametrize("fault", [seeds_of_the_host, a_loss_read, rows_counted, labels_of_the_host, inputs_let_go])
def test_what_cannot_be_captured_runs_as_before(fault, monkeypatch):
    if fault is inputs_let_go and capture is None:
        pytest.skip("needs tests/cuda/lookalike.py: a GPU reads freed memory without a word")
    fault(monkeypatch)
    step, stream = step_of("llama-tiny", drops=True), torch.cuda.current_stream()
    losses = run(step, "llama-tiny", GROUPS)
    assert torch.cuda.current_stream() == stream and torch.rand(3, device="cuda").isfinite().all()  # as if nothing had been captured
    assert step.note.startswith("no CUDA graphs: ") and step.said() == step.note
    assert len(step.note) > 30 and all(p.grad is None for p in step.model.parameters())
    assert all(loss is None or math.isfinite(loss) for loss, _ in losses)


def a_rate_of_python(monkeypatch):
    def set_rates(self, step):
        for group, peak in zip(self.adamw.param_groups, self.peaks):
            group["lr"] = self.rate(peak, step)

    monkeypatch.setattr(Optimizer, "set_rates", set_rates)


def terms_of_python(monkeypatch):
    passes = GraphedStep._passes

    def counted(self, batches, measured):
        self.number = getattr(self, "number", 3.0) + 1
        return passes(self, batches, measured)

    backward = GraphedStep._backward
    monkeypatch.setattr(GraphedStep, "_passes", counted)
    monkeypatch.setattr(GraphedStep, "_backward", lambda self, loss: backward(self, loss * self.number))


def a_counter_of_python(monkeypatch):
    def advance(self):
        self.seed, self.drawn, self.used = self.seed + 1, None, 0  # as a graph's launches would have it

    monkeypatch.setattr(Seeds, "advance", advance)


@pytest.mark.skipif(capture is None, reason="needs tests/cuda/lookalike.py: a GPU keeps no record of a graph's arguments")
def test_what_is_stale_in_a_graph_shows(monkeypatch):
    for fault in (a_rate_of_python, terms_of_python, a_counter_of_python):
        fault(monkeypatch)
    step = step_of("llama-tiny", drops=True)
    run(step, "llama-tiny", [[0]] * 4)
    told = stale(step)
    assert step.note == "" and [sum(operator in line for line in told) > 0 for operator in ("_fused_adamw_", "mul", "add")] == [True] * 3


def change_p(step):
    step.model.model.layers[0].self_attn.q_proj.lora_dropout = 0.7


def change_place(step):
    weight = step.model.lm_head.weight
    weight.data = weight.detach() * 2


def change_betas(step):
    step.optimizer.adamw.param_groups[0]["betas"] = (0.5, 0.5)


def change_moments(step):
    step.optimizer.load_state_dict(step.optimizer.state_dict() | {"masters": []})
    for state in step.optimizer.adamw.state.values():
        state["exp_avg"] = torch.zeros_like(state["exp_avg"])


def change_clipping(step):
    step.optimizer.config = replace(step.optimizer.config, max_grad_norm=1e-3)


def change_nothing(step):
    step.optimizer.adamw.zero_grad()  # sets them to None: a step adds to its own


LONG = [pytest.param(change, marks=pytest.mark.slow) for change in (change_moments, change_clipping, change_nothing)]


@pytest.mark.parametrize("change", [change_p, change_place, change_betas, *LONG])
def test_what_changes_between_steps_counts(change, monkeypatch):
    """A graph of before is not replayed; others are, and new ones are made."""

    def steps(step):
        losses = run(step, "llama-tiny", [[0]] * 3)
        change(step)
        step.start(3)
        return losses + run(step, "llama-tiny", [[0]] * 3)

    step = step_of("llama-tiny", drops=True)
    losses = steps(step)
    assert step.note == "" and step.replayed == (4 if change in (change_p, change_place) else 5)
    assert step.changes == (change in (change_p, change_place)) and any(step.updates.values())
    monkeypatch.setattr(graph, "MOST", 0)
    twin = step_of("llama-tiny", drops=True)
    assert steps(twin) == losses
    assert_same(step, twin)


def hooked_gradient(step):
    step.model.model.layers[0].self_attn.q_proj.lora_A.register_hook(lambda grad: grad * 2)


def hooked_everywhere(step):
    return torch.nn.modules.module.register_module_forward_hook(lambda *args: None)


def hooked_optimizer(step):
    step.optimizer.adamw.register_step_post_hook(lambda *args: None)


def own_forward(step):
    norm = step.model.model.norm
    norm.forward = norm.forward


@pytest.mark.parametrize("change", [hooked_gradient, hooked_everywhere, hooked_optimizer, own_forward])
def test_what_a_graph_would_leave_out_ends_them(change):
    """Hooks that come in the middle of a run are called in every step from then on."""
    step = step_of("llama-tiny")
    run(step, "llama-tiny", [[0]] * 3)
    assert step.note == "" and step.replayed == 2
    handle = change(step)
    try:
        run(step, "llama-tiny", [[0]] * 3)
    finally:
        if handle is not None:
            handle.remove()
    told = {hooked_gradient: "lora_A", hooked_everywhere: "every module", hooked_optimizer: "optimiser", own_forward: "of its own"}
    assert step.note.startswith("no CUDA graphs: ") and told[change] in step.note and not step.graphs


def test_graphs_of_a_device_that_is_not_the_current_one():
    """Theirs are the stream, the generator and the pool: on the current device's stream nothing of it would be captured."""
    if capture is None and torch.cuda.device_count() < 2:
        pytest.skip("needs tests/cuda/lookalike.py: or a second GPU, where the current one is to be another")
    model = step_of("llama-tiny").model
    config = fp.TrainConfig(steps=9)
    known = (model, Data(model, names_of(model)), Optimizer(model, config, 9), names_of(model), torch.device("cuda", 0), torch.float32)
    with torch.cuda.device(1):
        step = GraphedStep(*known, features=None, budget=None, mixed=False, samples=4, seed=5)
        run(step, "llama-tiny", [[0]] * 3)
        assert step.note == "" and step.replayed == 2 and torch.cuda.current_device() == 1


def test_a_capture_that_the_driver_ends(monkeypatch):
    """The allocator is told, and frees memory again; the pool is given back."""
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)  # else a wait is an error before it is the driver's
    a_loss_read(monkeypatch)
    step, stream = step_of("llama-tiny"), torch.cuda.current_stream()
    losses = run(step, "llama-tiny", [[0]] * 3)
    assert step.note.startswith("no CUDA graphs: ") and torch.cuda.current_stream() == stream
    torch.cuda.empty_cache()
    assert all(math.isfinite(loss) for loss, _ in losses if loss is not None)
    assert capture is None or capture.allocator.graphs[step.captures.pool] == 0


def test_a_loss_that_is_not_finite_ends_the_run_where_it_was(runs, phantoms, tmp_path, monkeypatch):
    """Losses are read steps later: what is said and saved is what a run without graphs says and saves."""
    told, rows, saved = {}, {}, {}
    for graphs in (True, False):
        out = tmp_path / str(graphs)
        run = runs.trainer(phantoms, device="cuda", small=runs.SHALLOW, samples=21, steps=12, seed=0, out=str(out), cuda_graph=graphs)
        alone, pixels = run.dataset.samples[-1].image, run.dataset.pixels
        shown = {sample.image: pixels(sample.image) for sample in run.dataset.samples} | {alone: pixels(alone) * math.nan}
        monkeypatch.setattr(run.dataset, "pixels", shown.__getitem__)
        with pytest.raises(FloatingPointError) as error:
            run.fit()
        told[graphs], rows[graphs] = str(error.value), runs.metrics(out)
        saved[graphs] = json.loads((out / "checkpoint" / "progress.json").read_text())["done"]
        if graphs:
            assert run.step.replayed
    assert told[True] == told[False] and "at step 5 in the batch of" in told[True] and "after step 4; --resume" in told[True]
    assert [row["step"] for row in rows[True]] == [row["step"] for row in rows[False]] == [1, 2, 3, 4]
    assert all(saved[True][name] == saved[False][name] for name in ("step", "batches", "samples", "tokens", "skipped"))


def test_a_run_stopped_by_a_signal_and_resumed(runs, phantoms, tmp_path, monkeypatch):
    """In the middle of a step, whose loss is read later: rows, weights and optimiser are those of an uninterrupted run, with dropout."""
    how = {"device": "cuda", "small": runs.SHALLOW | runs.DROPOUT, "samples": 8, "batch_size": 4, "seed": 3}
    whole = runs.trainer(phantoms, steps=5, out=str(tmp_path / "whole"), **how)
    summary = whole.fit()
    assert any("CUDA graphs of batches" in note for note in summary["notes"]) and whole.step.replayed and not whole.step.changes
    part = runs.trainer(phantoms, steps=5, save_every=2, out=str(tmp_path / "part"), **how)
    update = GraphedStep.update

    def stopped(step, number, loss):
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(step, number, loss)

    monkeypatch.setattr(GraphedStep, "update", stopped)
    with pytest.raises(Interrupted, match="after step 3"):
        part.fit()
    monkeypatch.undo()
    assert [row["step"] for row in runs.metrics(tmp_path / "part")] == [1, 2, 3]
    rest = runs.trainer(phantoms, steps=5, resume=True, out=str(tmp_path / "part"), **how)
    assert rest.fit()["steps"] == 5
    assert runs.metrics(tmp_path / "part") == runs.metrics(tmp_path / "whole")
    runs.assert_same_weights(runs.weights(rest), runs.weights(whole))
