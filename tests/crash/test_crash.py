"""Runs that end at any file operation resume to the bit; what the harness itself would not miss."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from crash_disk import ENDED, Disk, Names
from crash_harness import SETTINGS, Harness

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.skipif(sys.platform != "linux", reason="the same in every mode")]
POINTS = [
    ("dropout and accumulation", "kill", 0.55),
    ("saved beside training", "torn", 0.5),
    ("two ranks", "full", 0.6),
    ("a study", "torn", 0.47),
]


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    return Harness(tmp_path_factory.mktemp("crash"))


@pytest.mark.parametrize("setting, mode, where", POINTS)
def test_a_run_that_ends_anywhere_resumes_to_the_bit(harness, setting, mode, where):
    count = harness.reference(setting)[1]
    assert harness.point(setting, mode, int(where * count), seed=1) == ""


@pytest.mark.slow
def test_forty_points(harness):
    assert {point: problem for point in harness.points(40) if (problem := harness.point(*point))} == {}


def test_the_harness_sees_a_run_that_resumes_to_another_end(harness, monkeypatch):
    """A loader that forgets Adam's moments."""
    monkeypatch.setattr("fastpeft.train.optimizer.Optimizer.load_state_dict", lambda self, state: None)
    setting = "dropout and accumulation"
    count = harness.reference(setting)[1]
    assert harness.point(setting, "kill", int(0.7 * count), seed=1).startswith("resumed to other weights")


# the disk ----------------------------------------------------------------------------------------------------------------------------


def in_a_process(root: Path, mode: str, at: int, body, seed: int = 0) -> int:
    """Exit status of ``body`` in a forked process on a Disk."""
    child = os.fork()
    if not child:
        try:
            Disk(root, mode, at, seed).install()
            body()
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def careless(root: Path):
    (root / "new").write_text("new" * 100)
    os.replace(root / "new", root / "file")


def test_power_that_goes_takes_what_was_not_synced(tmp_path):
    """A file renamed without fsync may be empty; one that was synced, and its folder, may not."""
    seen = set()
    for seed in range(20):
        (tmp_path / "file").write_text("old")
        assert in_a_process(tmp_path, "power", 3, lambda: (careless(tmp_path), (tmp_path / "other").write_text("")), seed) == ENDED
        seen.add((tmp_path / "file").read_text() if (tmp_path / "file").exists() else None)
    assert "old" in seen and "" in seen and len(seen) > 3

    def careful():
        from fastpeft.files import write_text

        write_text(tmp_path / "file", "new" * 100)
        (tmp_path / "other").write_text("")

    for seed in range(4):
        (tmp_path / "file").write_text("old")
        assert in_a_process(tmp_path, "power", 5, careful, seed) == ENDED
        assert (tmp_path / "file").read_text() == "new" * 100
        assert in_a_process(tmp_path, "power", 4, careful, seed) == ENDED
        assert (tmp_path / "file").read_text() == "new" * 100  # one after the other: the first stands


@pytest.mark.parametrize("mode, status, there", [("kill", ENDED, None), ("torn", ENDED, 150), ("full", 1, None), ("signal", -15, None)])
def test_what_a_point_does(tmp_path, mode, status, there):
    assert in_a_process(tmp_path, mode, 1, lambda: careless(tmp_path)) == status
    assert (len((tmp_path / "new").read_text()) if (tmp_path / "new").exists() else None) == there


def test_names_follow_operations():
    names = Names({"a": 1, "b": None, "b/c": 2})
    names.apply("exchange", "b", "a")
    assert names.at == {"b": 1, "a": None, "a/c": 2}
    names.apply("rename", "a", "d")
    names.apply("create", "d/e", 3)
    names.apply("link", "d/e", "f")
    names.apply("remove", "d/c")
    assert names.at == {"b": 1, "d": None, "d/e": 3, "f": 3}


# the same trajectory -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["dropout and accumulation", "base weights, bfloat16"])
def test_the_first_step_after_a_resumption_is_that_of_a_run_that_went_on(runs, phantoms, tmp_path, setting):
    """Weights, moments, masters, random state and the position in the data, right after the step."""

    def run(out, steps, **more):
        options = {"save_every": 0, "batch_size": 3, "out": tmp_path / out} | SETTINGS[setting] | more
        small = runs.SHALLOW | (runs.DROPOUT if options.pop("small", False) else {})
        trainer = runs.trainer(
            phantoms, options.pop("plan", "F/LoRA/LoRA"), small=small, samples=20, steps=steps, learning_rate=1e-3, **options
        )
        trainer.optimizer.schedule(8)  # of the longer run
        after = {}
        take = trainer._step

        def step(batches, whole):
            row = take(batches, whole)
            saved = trainer.optimizer.state_dict()
            after[trainer.done["step"]] = {
                "weights": runs.weights(trainer),
                "moments": [v.clone() for held in saved["adamw"]["state"].values() for v in held.values()],
                "masters": [m.clone() for m in saved["masters"]],
                "random": torch.get_rng_state(),
                "samples": [s.qid for batch in batches for s in batch["samples"]],
            }
            return row

        trainer._step = step
        return trainer, after

    whole, want = run("whole", 8)
    whole.fit()
    stopped, _ = run("run", 8)
    update = stopped.optimizer.step
    stopped.optimizer.step = lambda n: (update(n), os.kill(os.getpid(), 2) if n == 4 else None)[0]
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    torch.rand(3)
    resumed, got = run("run", 8, resume=True)
    resumed.fit()
    assert min(got) == 6
    runs.assert_same_weights(got[6]["weights"], want[6]["weights"])
    for name in ("moments", "masters"):
        assert len(got[6][name]) == len(want[6][name]) and all(map(torch.equal, got[6][name], want[6][name]))
    assert torch.equal(got[6]["random"], want[6]["random"]) and got[6]["samples"] == want[6]["samples"]
