"""Runs in stages: adapters that are gone on from, or merged; what a resume does again; what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

from fastpeft.adapters import describe
from fastpeft.cli import app
from fastpeft.data import write_instruction_data
from fastpeft.runs.evaluate import eval_run
from fastpeft.runs.options import DataOptions, read_yaml
from fastpeft.runs.stages import stages_of, train_stages

pytestmark = pytest.mark.usefixtures("one_thread")
SHARED = {"model": "miss-tiny", "from_scratch": True, "batch_size": 8, "steps": 2, "progress": False, "device": "cpu", "seed": 3}


@pytest.fixture(scope="module")
def drawn(phantoms, tmp_path_factory):
    folder = tmp_path_factory.mktemp("instruct") / "made"
    write_instruction_data(phantoms, folder)
    return folder


@pytest.fixture(scope="module")
def finished(phantoms, drawn, tmp_path_factory):
    """Full training, going on with instruction data, then LoRA on what came out: (folder, options, summary)."""
    out = tmp_path_factory.mktemp("stages") / "run"
    stages = ({"plan": "T/T/T"}, {"plan": "T/T/T", "data": str(drawn), "steps": 1}, {"plan": "F/LoRA/LoRA", "rank": 2, "steps": 3})
    given = {**SHARED, "data": str(phantoms), "out": str(out), "stages": stages}
    return out, given, train_stages(given)


def trained(folder):
    return {
        f"{file.parent.name} {name}": t
        for file in sorted((folder / "adapter").rglob("*.safetensors"))
        for name, t in load_file(file).items()
    }


def test_each_stage_goes_on_from_the_one_before(finished):
    out, _, summary = finished
    assert [s["steps"] for s in summary["stages"]] == [2, 1, 3] and [s["plan"] for s in summary["stages"]][:2] == ["T/T/T", "T/T/T"]
    assert [s["eval"] is None for s in summary["stages"]] == [True, True, False]
    first, second = trained(out / "stage-1"), trained(out / "stage-2")
    moved = max((second[name] - first[name]).abs().max() for name in first)
    assert 0 < moved < 0.05  # a step away, not drawn anew
    lineage = describe(out / "stage-2" / "adapter")["started_from"]
    assert lineage["adapter"] == str(out / "stage-1" / "adapter")


def test_another_plan_starts_from_the_merged_model(finished):
    out, _, _ = finished
    assert describe(out / "adapter")["base"]["model"] == str(out / "stage-2" / "merged")
    base = load_file(out / "stage-2" / "merged" / "model.safetensors")
    full = trained(out / "stage-2")
    assert any(torch.equal(t, other) for t in base.values() for other in full.values() if t.shape == other.shape and t.dim() == 2)


def test_the_last_adapter_answers(finished, phantoms):
    out, _, summary = finished
    scores = eval_run(out / "adapter", DataOptions(str(phantoms)), device="cpu", progress=False)
    assert scores["global"] == summary["eval"]["global"]


def test_finished_stages_are_not_run_again_and_an_interrupted_one_goes_on(finished, phantoms, tmp_path):
    out, given, _ = finished
    given = {**given, "out": str(tmp_path / "run"), "save_every": 1}
    for attempt in range(3):
        with pytest.MonkeyPatch.context() as patch:
            kill_after_a_step(patch)
            with pytest.raises(KeyboardInterrupt):
                train_stages({**given, "resume": attempt > 0})
    before = (tmp_path / "run" / "stage-1" / "summary.json").stat().st_mtime_ns
    train_stages({**given, "resume": True})
    assert (tmp_path / "run" / "stage-1" / "summary.json").stat().st_mtime_ns == before
    for folder in ("stage-1", "stage-2", "."):
        whole, again = trained(out / folder), trained(tmp_path / "run" / folder)
        assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


def kill_after_a_step(patch):
    """Ctrl-C where the second step from here would begin."""
    from fastpeft.train.trainer import Trainer

    step, done = Trainer._step, [0]

    def counted(self, *group):
        if done[0] == 1:
            raise KeyboardInterrupt
        done[0] += 1
        return step(self, *group)

    patch.setattr(Trainer, "_step", counted)


def test_changed_stages_are_refused(finished):
    _, given, _ = finished
    changed = [dict(stage) for stage in given["stages"]]
    changed[0]["steps"] = 9
    with pytest.raises(ValueError, match="stage 1 is finished, and its steps changed since"):
        train_stages({**given, "resume": True, "stages": tuple(changed)})
    with pytest.raises(ValueError, match="it had 3 stages, now 2"):
        train_stages({**given, "resume": True, "stages": given["stages"][:2]})
    with pytest.raises(ValueError, match="holds a run in stages already"):
        train_stages(given)


@pytest.mark.parametrize(
    "stages, message",
    [
        (({"epochs": 1}, {"model": "miss"}), "stage 2: model is said by the first stage alone"),
        (({"out": "x"},), "stage 1: out is of all stages"),
        (({"stepz": 1},), "stage 1: unknown option stepz; did you mean steps"),
        (({"steps": "many"},), "stage 1: steps must be a whole number"),
        (({"learning_rate": 0.0},), "stage 1: .*learning_rate must be above 0"),
    ],
)
def test_wrong_stages_are_named(stages, message):
    with pytest.raises(ValueError, match=message):
        stages_of({"data": "d", "stages": stages})


def test_stages_without_data_are_refused():
    with pytest.raises(ValueError, match="stage 2: data is missing"):
        stages_of({"stages": ({"data": "a"}, {})})


def test_one_yaml_trains_them_all(phantoms, drawn, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(
        f"model: miss-tiny\nfrom_scratch: true\nplan: F/LoRA/LoRA\nbatch_size: 8\nquiet: true\n"
        f"stages:\n  - {{data: {phantoms}, steps: 1, lr: 1e-3}}\n  - {{data: {drawn}, steps: 2, max_question: 60}}\n"
    )
    assert len(read_yaml(tmp_path / "r.yaml")["stages"]) == 2
    app(["train", "--config", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run"), "--json"], standalone_mode=False)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [s["steps"] for s in told["stages"]] == [1, 2] and (tmp_path / "run" / "report.html").is_file()
    (tmp_path / "bad.yaml").write_text("stages: [3]\n")
    with pytest.raises(ValueError, match="stages must be a list of stages"):
        read_yaml(tmp_path / "bad.yaml")
