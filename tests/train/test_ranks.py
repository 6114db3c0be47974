"""Several ranks: the same run as a single process with the same samples a step, whoever holds them; ended together; resumed by others."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastpeft.data import EpochSampler, VQADataset, load_samples
from fastpeft.data.samples import Sample
from fastpeft.ranks import Ranks
from fastpeft.runs.options import DataOptions, TextOptions
from fastpeft.runs.train import train_run
from fastpeft.train import TrainConfig, Trainer
from fastpeft.train.shares import Shares
from fastpeft.train.validation import ValidationData

pytestmark = pytest.mark.usefixtures("one_thread")
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.0}


@pytest.fixture(scope="module", autouse=True)
def imported(runs, phantoms):
    """What a run imports when it needs it: here, so that no forked process does."""
    runs.trainer(phantoms, steps=1, evaluate=True).fit()


def same_losses(got, want, names=("loss", "grad_norm", "learning_rate")):
    assert [row["samples"] for row in got] == [row["samples"] for row in want]
    for name in names:
        assert [row[name] for row in got] == pytest.approx([row[name] for row in want], rel=2e-5)


def rows(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


# shares -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world, size, n, q", [(2, 4, 50, 3), (4, 2, 50, 1), (4, 3, 13, 2), (3, 5, 7, 1), (8, 1, 9, 4)])
def test_each_sample_comes_once_over_all_ranks(world, size, n, q):
    samples = [Sample(Path(f"{i // 3}.png"), "why", "so") for i in range(n)]
    sampler = EpochSampler(samples, world * size, 3, q)
    whole = list(sampler)
    ranks = [Ranks(rank, world) for rank in range(world)]
    for together in (False, True):
        found = []
        for rank in ranks:
            shares = Shares(sampler, rank, size, together)
            pieces, own = iter(shares), []
            for number in range(len(sampler)):
                every, counted = shares.forwards(number)
                taken = [next(pieces) for _ in range(every)]
                assert all(0 < len(piece) <= size for piece in taken)
                own.append([i for piece in taken[:counted] for i in piece])
                assert not together or every == -(-len(whole[number]) // (world * size))
            assert next(pieces, None) is None
            found.append(own)
        assert [[i for own in found for i in own[number]] for number in range(len(sampler))] == whole
        assert all(max(map(len, step)) - min(map(len, step)) <= 1 for step in zip(*found))


# the same run -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "world, plan, more", [(2, "F/LoRA/LoRA", {"gradient_accumulation": 2}), (4, "T/IA3/LoRA", {"questions_per_image": 3})]
)
def test_ranks_equal_a_single_process(runs, ranks, phantoms, tmp_path, world, plan, more):
    """19 samples in batches of 8: the last of an epoch has 3, so that ranks have two samples, one or none."""
    options = {"samples": 19, "epochs": 1.5, "small": STILL | runs.SHALLOW, "evaluate": True, **more}
    alone = runs.trainer(phantoms, plan, batch_size=8, out=tmp_path / "alone", **options)
    want = alone.fit()

    def work(rank):
        trainer = runs.trainer(phantoms, plan, batch_size=8 // world, out=tmp_path / "ranks", **options)
        return trainer.fit(), runs.weights(trainer), [p.grad for p in trainer.model.parameters() if p.grad is not None]

    found = ranks.run(world, work, tmp_path / "found")
    same_losses(rows(tmp_path / "ranks"), rows(tmp_path / "alone"))
    for summary, weights, left in found:
        runs.assert_same_weights(weights, found[0][1])  # to the bit
        assert summary == found[0][0] and left == []
    summary, weights, _ = found[0]
    for name, weight in runs.weights(alone).items():
        assert float((weights[name] - weight).abs().max()) < 1e-5, name
    assert {name: summary[name] for name in ("steps", "samples", "eval")} == {name: want[name] for name in ("steps", "samples", "eval")}
    adapters = sum(4 * weight.numel() for weight in weights.values())
    assert summary["ranks"]["world"] == world and adapters < summary["ranks"]["bytes_sent_per_step"] <= 1.05 * adapters
    if plan.startswith("F"):
        assert summary["features"]["computed"] == want["features"]["computed"]  # each image once, whichever rank needs it


def test_labelled_tokens_weigh_alike_on_every_rank(ranks, tmp_path):
    """Responses of 1 to 40 words, packed: ranks have unequal numbers of labels, and a data set of several has losses of each."""
    counts = (1, 40, 2, 3, 25, 1, 1, 30, 4, 2, 9)
    texts = [{"instruction": f"Count to {n}.", "input": "", "output": " ".join(map(str, range(n)))} for n in counts]
    for name, part in (("some", texts[:6]), ("more", texts[6:])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "alpaca_data.json").write_text(json.dumps(part))
    data = DataOptions([f"{tmp_path / 'some'},weight=1", f"{tmp_path / 'more'},weight=2"])

    def work(out, batch_size):
        config = TrainConfig(out=str(tmp_path / out), batch_size=batch_size, steps=4, progress=False, device="cpu", learning_rate=1e-2)
        return train_run("llama-tiny", "LoRA", data, config, text=TextOptions(template="plain", max_length=300), evaluate=False)

    want = work("alone", 6)
    found = ranks.run(3, lambda rank: work("ranks", 2), tmp_path / "found")
    got = rows(tmp_path / "ranks")
    same_losses(got, rows(tmp_path / "alone"))
    for mine, theirs in zip(got, rows(tmp_path / "alone")):
        assert mine["loss_by_source"] == pytest.approx(theirs["loss_by_source"], rel=2e-5)
    assert found[0]["sources"] == {k: v | {"loss_last": pytest.approx(v["loss_last"], rel=2e-5)} for k, v in want["sources"].items()}
    assert found[0]["tokens_per_second"] > 0 and found[0]["samples"] == want["samples"]


# the command line ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path):
    said = [{"instruction": f"Spell {word}.", "input": "", "output": " ".join(word)} for word in ("bone", "lung", "skull", "liver")]
    (tmp_path / "train.json").write_text(json.dumps(said))
    return tmp_path


def command(data, out, batch_size, *more):
    """Of a run of two steps: what follows "fastpeft"."""
    told = {"model": "llama-tiny", "plan": "LoRA", "data": data, "out": out, "steps": 2, "batch-size": batch_size, "device": "cpu"}
    return ["train", *(word for name, value in told.items() for word in (f"--{name}", str(value))), "--no-eval", "--json", *more]


def run_command(words):
    """(exit status, the JSON it printed) of the command line in this process."""
    from fastpeft import cli

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr("sys.argv", ["fastpeft", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    lines = printed.getvalue().splitlines()
    return ended.value.code, json.loads(lines[-1]) if lines else None


def assert_same_adapters(got, want):
    (mine,), (theirs,) = ([load_file(file) for file in (out / "adapter").rglob("*.safetensors")] for out in (got, want))
    assert mine.keys() == theirs.keys() and max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < 1e-5


def test_the_command_on_two_ranks_is_that_of_one_process(ranks, texts):
    """Started as torchrun does it; the first rank alone prints."""
    status, want = run_command(command(texts, texts / "alone", 4))
    found = ranks.run(2, lambda rank: run_command(command(texts, texts / "ranks", 2)), texts / "found")
    assert status == 0 and [code for code, _ in found] == [0, 0] and found[1][1] is None
    summary = found[0][1]
    assert summary["samples"] == want["samples"] == 8 and summary["ranks"]["world"] == 2
    for name in ("loss_first", "loss_last"):
        assert summary[name] == pytest.approx(want[name], rel=2e-5)
    assert_same_adapters(texts / "ranks", texts / "alone")


@pytest.mark.slow
def test_torchrun(texts):
    """The command as the documentation has it: a run, the refusal of another into its folder, and a signal."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "fastpeft"]

    def torchrun(words):
        return subprocess.run([*start, *words], capture_output=True, text=True, timeout=120)

    assert run_command(command(texts, texts / "alone", 4))[0] == 0
    done = torchrun(command(texts, texts / "ranks", 2))
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])["ranks"]["world"] == 2, done.stderr
    assert_same_adapters(texts / "ranks", texts / "alone")
    again = torchrun(command(texts, texts / "ranks", 2))
    assert again.returncode != 0 and again.stderr.count("holds a run already") == 1
    wrong = torchrun(command(texts, texts / "wrong", 2, "--plan", "F/LoRA"))
    assert wrong.returncode != 0 and wrong.stderr.count("fastpeft: ") == 1 and not (texts / "wrong").exists()

    running = subprocess.Popen([*start, *command(texts, texts / "long", 2, "--steps", "100000")], stderr=subprocess.PIPE, text=True)
    metrics = texts / "long" / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert running.poll() is None
        time.sleep(0.1)
    running.terminate()
    said = running.communicate(timeout=60)[1]
    assert running.returncode != 0 and "--resume goes on from there" in said
    stopped = len(rows(texts / "long"))
    resumed = torchrun(command(texts, texts / "long", 2, "--steps", str(stopped + 2), "--resume"))
    assert resumed.returncode == 0 and len(rows(texts / "long")) == stopped + 2, resumed.stderr


# ends and resumes ---------------------------------------------------------------------------------------------------------------


def trainer_of(runs, phantoms, out, **more):
    options = {"batch_size": 3, "steps": 4, "save_every": 2, "learning_rate": 1e-2, "small": {"hidden_dropout_prob": 0.1} | runs.SHALLOW}
    return runs.trainer(phantoms, out=out, **options, **more)


def weights_after(runs, trainer):
    trainer.fit()
    return runs.weights(trainer)


def fit_until(trainer, step, do):
    """``do`` within that step, before its update."""
    passes = trainer.step.passes

    def counted(*args, **kwargs):
        if trainer.done["step"] == step:
            do()
        return passes(*args, **kwargs)

    trainer.step.passes = counted
    return trainer.fit()


def test_a_signal_to_one_rank_ends_all_after_the_same_step_and_they_resume_to_the_bit(runs, ranks, phantoms, tmp_path):
    whole = ranks.run(2, lambda rank: weights_after(runs, trainer_of(runs, phantoms, tmp_path / "whole")), tmp_path / "a")

    def stopped(rank):
        trainer = trainer_of(runs, phantoms, tmp_path / "run")
        fit_until(trainer, 2, lambda: rank == 1 and os.kill(os.getpid(), signal.SIGTERM))

    ended = ranks.finish(ranks.start(2, stopped, tmp_path / "b"), tmp_path / "b")
    assert [(kind, status) for kind, _, status, _ in ended] == [("Interrupted", 143)] * 2
    assert ended[0][1] == "stopped after step 3; --resume goes on from there"
    resumed = ranks.run(2, lambda rank: weights_after(runs, trainer_of(runs, phantoms, tmp_path / "run", resume=True)), tmp_path / "c")
    runs.assert_same_weights(resumed[1], whole[0])
    assert runs.metrics(tmp_path / "run") == runs.metrics(tmp_path / "whole")


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_all_and_fewer_resume(runs, ranks, phantoms, tmp_path, killed):
    def work(rank):
        trainer = trainer_of(runs, phantoms, tmp_path / "run")
        fit_until(trainer, 3, lambda: rank == killed and os.kill(os.getpid(), signal.SIGKILL))

    found = ranks.finish(ranks.start(2, work, tmp_path / "a"), tmp_path / "a", within=30)
    assert found[killed] is None and found[1 - killed][0] == "RankLost"
    assert killed == 0 or found[0][1].endswith("stopped after step 3; --resume goes on from there"), found[0][1]
    with pytest.raises(ValueError, match="world was 2, now 1; --allow-change"):
        trainer_of(runs, phantoms, tmp_path / "run", resume=True).fit()
    alone = trainer_of(runs, phantoms, tmp_path / "run", resume=True, allow_change=("world",))
    summary = alone.fit()
    assert (summary["steps"], summary["samples"]) == (4, 24)  # two forwards of 3 for each of the two ranks' batches of 6
    assert any("world was 2, now 1" in note for note in summary["notes"])
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4]


def test_an_error_of_one_rank_is_said_and_ends_the_others(runs, ranks, phantoms, tmp_path):
    def work(rank):
        trainer = trainer_of(runs, phantoms, tmp_path / "run")

        def fail():
            if rank == 1:
                raise ValueError("its image cannot be read")

        fit_until(trainer, 3, fail)

    found = ranks.finish(ranks.start(2, work, tmp_path / "a"), tmp_path / "a", within=30)
    assert found[1][:2] == ("ValueError", "its image cannot be read")
    assert found[0][0] == "RankLost" and found[0][1].endswith("stopped after step 3; --resume goes on from there")


def test_ranks_with_other_data_or_options_are_refused(runs, ranks, phantoms, tmp_path):
    def work(rank):
        runs.trainer(phantoms, samples=10 - rank, steps=1, learning_rate=1e-3 * (1 + rank)).fit()

    found = ranks.finish(ranks.start(2, work, tmp_path / "a"), tmp_path / "a")
    for kind, message, *_ in found:
        assert kind == "ValueError" and "rank 1 has not what rank 0 has" in message
        assert "learning_rate was 0.001, now 0.002" in message and "n was 10, now 9" in message


def test_validation_and_the_best_adapter_are_those_of_a_single_process(runs, ranks, phantoms, tmp_path):
    def work(out, size):
        plain = runs.trainer(phantoms, small=STILL | runs.SHALLOW, learning_rate=3e-2)
        samples = load_samples(phantoms, split="test").samples
        labelled = VQADataset(samples, plain.dataset.preprocess, tokenizer=plain.dataset.tokenizer)
        options = {"out": str(tmp_path / out), "batch_size": size, "steps": 4, "eval_every": 2, "progress": False, "device": "cpu"}
        data = ValidationData(labelled, VQADataset(samples, plain.dataset.preprocess))
        trainer = Trainer(plain.model, plain.dataset, TrainConfig(learning_rate=3e-2, **options), validation=data)
        return trainer.fit(), runs.weights(trainer)

    want, _ = work("alone", 4)
    found = ranks.run(2, lambda rank: work("ranks", 2), tmp_path / "found")
    runs.assert_same_weights(found[1][1], found[0][1])
    assert found[0][0]["validation"]["best_step"] == want["validation"]["best_step"]
    assert found[0][0]["validation"]["best"] == pytest.approx(want["validation"]["best"], rel=1e-4)
    mine, theirs = ([row for row in rows(tmp_path / out) if "validation_loss" in row] for out in ("ranks", "alone"))
    assert [row["validation_loss"] for row in mine] == pytest.approx([row["validation_loss"] for row in theirs], rel=1e-4)
    assert [row["eval"] for row in mine] == [row["eval"] for row in theirs]


def test_gradients_that_are_on_no_rank_stay_none(ranks, tmp_path):
    from fastpeft.ranks import ranks_here
    from fastpeft.train.gradients import GradientSum

    def work(rank):
        masters = [torch.zeros(3) for _ in range(3)]
        summed = GradientSum(masters, ranks_here())
        for step in (1, 2):
            masters[0].grad = torch.full((3,), float(step + rank))
            masters[1].grad = torch.ones(3) if rank else None
            masters[2].grad = None
            summed.start()
            summed.finish()
        return [m.grad for m in masters]

    for first, second, third in ranks.run(2, work, tmp_path):
        assert first.tolist() == [5.0] * 3 and second.tolist() == [1.0] * 3 and third is None


# a base in pieces ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan, more",
    [
        ("F/LoRA/LoRA", {"questions_per_image": 3, "evaluate": True}),
        ("LoRA/F/LayerNorm", {"gradient_accumulation": 2, "memory_budget": "1.22MB"}),
        pytest.param("LoRA/LoRA/LoRA", {"without": "remake"}, marks=pytest.mark.slow),
    ],
)
def test_a_base_in_pieces_takes_the_same_steps(runs, ranks, phantoms, tmp_path, plan, more):
    """9 samples in batches of 8: in the second, one rank has nothing, and runs the same layers all the same."""
    options = {"samples": 9, "epochs": 2, "batch_size": 4, "small": STILL, **more}
    budget = {"memory_budget": options.pop("memory_budget", None)}

    def work(out, **shard):
        trainer = runs.trainer(phantoms, plan, out=tmp_path / out, **options, **shard)
        summary, frozen = trainer.fit(), [p for p in trainer.model.parameters() if not p.requires_grad]
        held = sum(getattr(p, "to_local", lambda p=p: p)().nbytes for p in frozen)
        return summary, runs.weights(trainer), (held, sum(p.nbytes for p in frozen))

    whole = ranks.run(2, lambda rank: work("whole"), tmp_path / "a")
    found = ranks.run(2, lambda rank: work("pieces", shard="base", **budget), tmp_path / "b")
    same_losses(rows(tmp_path / "pieces"), rows(tmp_path / "whole"))
    if "memory_budget" not in more:  # which recomputes, and so rounds
        assert runs.metrics(tmp_path / "pieces") == runs.metrics(tmp_path / "whole")
    for summary, weights, (held, _) in found:
        runs.assert_same_weights(weights, found[0][1])
        assert held <= 1.1 / 2 * whole[0][2][1]
        assert summary["eval"] == whole[0][0]["eval"]
        (kept, flops), (before, least) = ([of[k] for k in ("saved_bytes_per_step", "flops_per_sample")] for of in (summary, whole[0][0]))
        assert (kept < before and flops > least) if "memory_budget" in more else (kept <= 1.03 * before and flops == least)
