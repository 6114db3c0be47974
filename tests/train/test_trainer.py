"""The loop: AdamW by its definition, accumulation equal to one batch, equal runs from equal seeds, and the files a run leaves."""

import json
import math
import threading
from collections import Counter

import pytest
import torch

import fastpeft as fp
from fastpeft.data import VQADataset
from fastpeft.methods import is_adapter

pytestmark = pytest.mark.usefixtures("one_thread")


def gradients(trainer, monkeypatch):
    """What the optimiser is given at each step."""
    seen, step = [], trainer.optimizer.step

    def record(number):
        named = zip((n for n, p in trainer.model.named_parameters() if p.requires_grad), trainer.optimizer.pairs)
        seen.append({name: master.grad.clone() for name, (_, master) in named})
        return step(number)

    monkeypatch.setattr(trainer.optimizer, "step", record)
    return seen


def test_steps_are_adamw_with_clipping_warmup_and_cosine(runs, phantoms, tmp_path, monkeypatch):
    options = {"steps": 6, "learning_rate": 1e-2, "base_learning_rate": 2e-3, "min_learning_rate": 4e-3, "warmup": 2}
    trainer = runs.trainer(phantoms, "T/LoRA/LoRA", **options, weight_decay=0.1, max_grad_norm=0.5, beta2=0.98, out=tmp_path / "run")
    mine = {name: w.double() for name, w in runs.weights(trainer).items()}
    seen = gradients(trainer, monkeypatch)
    trainer.fit()
    rows = runs.metrics(tmp_path / "run")
    mean, square = ({name: torch.zeros_like(w) for name, w in mine.items()} for _ in range(2))
    for t, (grads, row) in enumerate(zip(seen, rows), 1):
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-5)
        for name, g in grads.items():
            peak = 1e-2 if is_adapter(name) else 2e-3
            floor = min(4e-3, peak)
            rate = peak * t / 2 if t <= 2 else floor + (peak - floor) * (1 + math.cos(math.pi * (t - 3) / 4)) / 2
            if is_adapter(name):
                assert row["learning_rate"] == pytest.approx(rate)
            g = g.double() * min(1, 0.5 / (norm + 1e-6))
            mean[name] = 0.9 * mean[name] + 0.1 * g
            square[name] = 0.98 * square[name] + 0.02 * g.square()
            w = mine[name] * (1 - rate * (0.1 if mine[name].dim() > 1 else 0))
            mine[name] = w - rate * (mean[name] / (1 - 0.9**t)) / ((square[name] / (1 - 0.98**t)).sqrt() + 1e-8)
    for name, w in runs.weights(trainer).items():
        torch.testing.assert_close(w.double(), mine[name], rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("plan", ["F/LoRA/LoRA", "T/T/T"])
def test_accumulation_equals_one_batch(runs, phantoms, monkeypatch, plan):
    """10 samples as 4 + 4 + 2, whose forwards pad to lengths of their own, against all at once."""
    seen, losses = [], []
    for size, forwards in ((10, 1), (4, 3)):
        trainer = runs.trainer(phantoms, plan, samples=10, batch_size=size, gradient_accumulation=forwards, steps=1)
        taken = gradients(trainer, monkeypatch)
        losses.append(trainer.fit()["loss_first"])
        seen.append(taken[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    largest = max(float(g.abs().max()) for g in seen[0].values())
    for name, g in seen[0].items():
        assert float((seen[1][name] - g).abs().max()) < 2e-6 * largest, name


def test_bfloat16_gradients_accumulate_in_float32(runs, phantoms, monkeypatch):
    """The sum of three bfloat16 gradients holds more digits than bfloat16 has."""
    trainer = runs.trainer(phantoms, "T/F/F", batch_size=4, gradient_accumulation=3, steps=1, dtype="bf16")
    seen = gradients(trainer, monkeypatch)
    trainer.fit()
    grad = torch.cat([g.flatten() for g in seen[0].values()])
    assert grad.dtype == torch.float32 and not torch.equal(grad, grad.bfloat16().float())


def test_epochs_count_every_batch(runs, phantoms):
    """10 samples in 3 batches, of which 2 make a step: two epochs are 3 steps and 20 samples."""
    trainer = runs.trainer(phantoms, samples=10, gradient_accumulation=2, epochs=2)
    assert trainer.total_steps == 3
    assert trainer.fit()["samples"] == 20


@pytest.mark.parametrize(
    "samples, want, config",
    [  # samples of each step
        (12, [12], {"batch_size": 12, "gradient_accumulation": 8}),
        (10, [8, 2], {"gradient_accumulation": 2}),
        (10, [10, 10], {"gradient_accumulation": 3, "epochs": 2.0}),
        (10, [18, 2], {"gradient_accumulation": 5, "epochs": 2.0}),  # the first group ends in the second epoch
        (10, [8], {"gradient_accumulation": 8, "epochs": 0.5}),  # two batches of three
        (13, [12, 1], {"gradient_accumulation": 3, "questions_per_image": 4}),
        (13, [12, 1], {"gradient_accumulation": 3, "num_workers": 2}),
        (10, [18, 16], {"gradient_accumulation": 5, "steps": 2}),  # steps are full groups, whatever the epochs
    ],
)
def test_epochs_train_each_sample_as_often_as_they_say(runs, phantoms, tmp_path, monkeypatch, samples, want, config):
    seen, step = [], fp.Trainer._step

    def recorded(self, batches, whole):
        seen.append([sample for batch in batches for sample in batch["samples"]])
        return step(self, batches, whole)

    monkeypatch.setattr(fp.Trainer, "_step", recorded)
    trainer = runs.trainer(phantoms, samples=samples, out=tmp_path / "run", **config)
    summary = trainer.fit()
    assert [len(group) for group in seen] == want == [row["samples"] for row in runs.metrics(tmp_path / "run")]
    assert (summary["steps"], summary["samples"]) == (trainer.total_steps, sum(want)) == (len(want), sum(want))
    if config.get("epochs", 1.0) in (1.0, 2.0) and "steps" not in config:
        asked = Counter(sample.qid for group in seen for sample in group)
        assert len(asked) == samples and set(asked.values()) == {int(config.get("epochs", 1))}


def test_a_short_last_group_is_a_mean_over_its_own_samples(runs, phantoms, monkeypatch):
    """10 samples as 4 + 4 + 2 where a step may take eight batches, against all at once; at the rate of a run's only step."""
    seen, losses = [], []
    for size, forwards in ((10, 1), (4, 8)):
        trainer = runs.trainer(phantoms, "F/LoRA/LoRA", samples=10, batch_size=size, gradient_accumulation=forwards, epochs=1.0)
        taken = gradients(trainer, monkeypatch)
        losses.append(trainer.fit()["loss_last"])
        seen += taken
    assert len(seen) == 2 and losses[1] == pytest.approx(losses[0], rel=1e-6)
    largest = max(float(g.abs().max()) for g in seen[0].values())
    for name, g in seen[0].items():
        assert float((seen[1][name] - g).abs().max()) < 2e-6 * largest, name


@pytest.mark.parametrize("epochs, batches", [(0.1, 3), (0.7, 21), (1.1, 33), (0.05, 2)])
def test_fractions_of_epochs_are_counted_as_they_are_written(runs, phantoms, epochs, batches):
    """30 batches an epoch; 1.1 x 30 is 33.000000000000004 in floating point."""
    trainer = runs.trainer(phantoms, samples=30, batch_size=1, epochs=epochs)
    assert trainer.total_steps == batches


def test_equal_seeds_give_equal_runs(runs, phantoms):
    final = []
    for seed in (0, 0, 1):
        torch.rand(3)  # whatever was drawn before
        trainer = runs.trainer(phantoms, small=runs.DROPOUT, steps=3, seed=seed)
        summary = trainer.fit()
        final.append((runs.weights(trainer), summary["loss_last"]))
    runs.assert_same_weights(final[1][0], final[0][0])
    assert final[0][1] == final[1][1] != final[2][1]


def test_worker_processes_change_nothing(runs, phantoms):
    final = []
    for workers in (0, 2):
        trainer = runs.trainer(phantoms, small=runs.DROPOUT, samples=12, steps=5, num_workers=workers)
        trainer.fit()
        final.append(runs.weights(trainer))
    runs.assert_same_weights(final[1], final[0])


def test_bfloat16_keeps_masters_and_adapters_in_float32(runs, phantoms):
    trainer = runs.trainer(phantoms, "T/LoRA/F", steps=2, dtype="bf16", base_learning_rate=1e-7, warmup=0)
    dtypes = {is_adapter(name): p.dtype for name, p in trainer.model.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    before = [master.clone() for p, master in trainer.optimizer.pairs if p.dtype == torch.bfloat16]
    trainer.fit()
    pairs = [(p, master) for p, master in trainer.optimizer.pairs if p.dtype == torch.bfloat16]
    assert all(master.dtype == torch.float32 and torch.equal(p, master.bfloat16()) for p, master in pairs)
    moved = sum(int((master != was).sum()) for (_, master), was in zip(pairs, before))
    assert moved > 0.9 * sum(was.numel() for was in before)  # steps far below bfloat16's resolution are not lost


def test_a_run_leaves_its_files(runs, phantoms, tmp_path):
    out = tmp_path / "run"
    trainer = runs.trainer(phantoms, steps=5, out=out, evaluate=True, trace=True, tensorboard=True)
    summary = trainer.fit()
    names = ("summary.json", "metrics.jsonl", "adapter", "checkpoint", "report.html", "predictions.json", "trace.json", "tensorboard")
    assert {path.name for path in out.iterdir()} == set(names)
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert (summary["loss_first"], summary["loss_last"]) == (rows[0]["loss"], rows[-1]["loss"])
    assert summary["steps"] == 5 and summary["samples"] == sum(row["samples"] for row in rows) == 20
    assert summary["seconds"] == pytest.approx(sum(row["seconds"] for row in rows))
    assert summary["samples_per_second"] == pytest.approx(20 / summary["seconds"])
    steady = [row for row in rows if row["step"] > 2]
    assert summary["steady_samples_per_second"] == pytest.approx(12 / sum(row["seconds"] for row in steady))
    assert summary["tokens_per_second"] > summary["samples_per_second"] and summary["peak_memory_bytes"] >= rows[-1]["memory_bytes"]
    assert {"open", "closed", "global"} <= summary["eval"].keys()
    parts = summary["parts"]
    assert sum(part["flops_per_sample"] for part in parts.values()) == pytest.approx(summary["flops_per_sample"])
    assert sum(part["saved_bytes"] for part in parts.values()) == summary["saved_bytes_per_step"] > 0
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    assert len({e["name"] for e in events if str(e.get("name")).startswith("ProfilerStep#")}) == 3
    predictions = json.loads((out / "predictions.json").read_text())
    assert len(predictions) == 20 and all((phantoms / "imgs" / row["img_name"]).samefile(row["image"]) for row in predictions)
    page = (out / "report.html").read_text()
    assert "data:image/jpeg;base64," in page and "F/LoRA/LoRA" in page


def test_without_out_nothing_is_written(runs, phantoms, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = runs.trainer(phantoms, steps=2)
    assert trainer.fit()["steps"] == 2 and list(tmp_path.iterdir()) == []


def test_the_python_door(runs, phantoms, capsys):
    made = runs.trainer(phantoms)
    summary = fp.Trainer(made.model, made.dataset, fp.TrainConfig(steps=2, batch_size=2)).fit()
    assert summary["steps"] == 2 and "training" in capsys.readouterr().err


def test_fit_runs_outside_the_main_thread(runs, phantoms):
    trainer, got = runs.trainer(phantoms, steps=2), []
    thread = threading.Thread(target=lambda: got.append(trainer.fit()["steps"]))
    thread.start()
    thread.join()
    assert got == [2]


def test_what_cannot_train_is_refused(runs, phantoms):
    made = runs.trainer(phantoms)
    with pytest.raises(ValueError, match="no tokenizer"):
        fp.Trainer(made.model, VQADataset(made.dataset.samples, made.dataset.preprocess))
    with pytest.raises(ValueError, match="freezes every part"):
        runs.trainer(phantoms, "F/F/F")
    made.model.fastpeft_plan = None
    with pytest.raises(ValueError, match="has no plan"):
        fp.Trainer(made.model, made.dataset)
    for device in ("cuda:99", "meta", "toaster"):
        with pytest.raises(ValueError, match=f"device '{device}' cannot be used here"):
            runs.trainer(phantoms, device=device)


def test_a_loss_that_is_not_finite_is_a_clear_error(runs, phantoms, tmp_path):
    trainer = runs.trainer(phantoms, steps=9, learning_rate=1e30, warmup=0, save_every=1, out=tmp_path / "run")
    said = r"(loss|norm) is (nan|inf) at step \d.*: lower learning_rate.*stopped after step \d+; --resume goes on"
    with pytest.raises(FloatingPointError, match=said):
        trainer.fit()


def test_gradients_that_are_not_finite_change_nothing(runs, phantoms, monkeypatch):
    trainer = runs.trainer(phantoms, steps=2)
    before = runs.weights(trainer)
    next(p for p, _ in trainer.optimizer.pairs).register_hook(lambda grad: grad * math.inf)
    with pytest.raises(FloatingPointError, match=r"gradient's norm is (nan|inf) at step 1"):
        trainer.fit()
    runs.assert_same_weights(runs.weights(trainer), before)


def test_first_and_last_loss_are_means_over_a_fifth_of_a_short_run(runs, phantoms, tmp_path):
    out = tmp_path / "run"
    summary = runs.trainer(phantoms, steps=10, out=out).fit()
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert summary["loss_first"] == pytest.approx(sum(losses[:2]) / 2)
    assert summary["loss_last"] == pytest.approx(sum(losses[-2:]) / 2)
