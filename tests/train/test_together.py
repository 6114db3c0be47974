"""Several runs on one base: each ends with the numbers of its own run alone, whatever happens to the others."""

import gc
import os
import signal
import weakref
from dataclasses import replace

import pytest
import torch

import fastpeft as fp
from fastpeft.data import Preprocess, VQADataset, load_samples
from fastpeft.features.cache import FeatureCache
from fastpeft.models.shared_base import on_base_of, own_what_is_trained
from fastpeft.train.caches import Caches
from fastpeft.train.interrupts import Interrupted, StopBetweenSteps
from fastpeft.train.state import random_state
from fastpeft.train.together import Together, own_bytes
from fastpeft.train.trainer import Trainer
from fastpeft.train.validation import ValidationData

pytestmark = pytest.mark.usefixtures("one_thread")

RUNS = {  # plan, options: other ranks, seeds, rates, methods, batches, lengths
    "small": ("F/LoRA/LoRA", {}),
    "seed": ("F/LoRA/LoRA", {"seed": 3, "learning_rate": 4e-3}),
    "whole": ("T/LoRA/IA3", {"batch_size": 5, "steps": 2}),
    "states": ("F/F/Prefix", {"gradient_accumulation": 2, "steps": 2}),
}


@pytest.fixture
def made(runs, phantoms):
    """A function: trainers by name, on one base or (``alone``) each on a base of its own; dropout is on."""
    words = runs.tokenizer(phantoms)
    preprocess = Preprocess(32, (0.5,) * 3, (0.5,) * 3)
    samples, held = load_samples(phantoms), load_samples(phantoms, split="test").samples

    def base():
        ids = {"bos_token_id": words.bos_token_id, "sep_token_id": words.sep_token_id, "eos_token_id": words.sep_token_id}
        return fp.build("miss-tiny", pretrained=False, seed=1, vocab_size=len(words), **runs.SMALL, **ids, **runs.DROPOUT)

    def make(chosen, folder=None, *, alone=False, **options):
        shared, caches, trainers = None if alone else base(), Caches(), {}
        for name in chosen:
            plan, own = RUNS[name]
            model = base() if alone else on_base_of(shared)
            config = {"steps": 3, "batch_size": 4, "save_every": 2, "keep_checkpoints": 1, "device": "cpu", "progress": False}
            config = fp.TrainConfig(**config | options | own | ({} if folder is None else {"out": folder / name}))
            torch.manual_seed(config.seed)
            fp.adapt(model, plan)
            own_what_is_trained(model)
            dataset = VQADataset(samples, preprocess, config.seed, tokenizer=words)
            validation = ValidationData(VQADataset(held, preprocess, tokenizer=words)) if config.eval_every else None
            trainers[name] = Trainer(model, dataset, config, validation=validation, caches=None if alone else caches)
        return trainers

    return make


@pytest.fixture(scope="module")
def alone():
    """Folders of runs that were trained alone, by name and options."""
    return {}


@pytest.fixture
def same(runs, made, alone, tmp_path_factory):
    """A function: asserts that folders hold what the runs leave alone, to the bit: metrics, trained tensors, moments, random state."""

    def check(folder, names, **options):
        for name in names:
            key = (name, str(options))
            if key not in alone:
                made([name], tmp_path_factory.mktemp("alone"), alone=True, **options)[name].fit()
                alone[key] = tmp_path_factory.getbasetemp() / f"alone{len(alone)}" / name
            theirs = alone[key]
            assert runs.metrics(folder / name) == runs.metrics(theirs), name
            assert sorted(p.name for p in (folder / name).iterdir()) == sorted(p.name for p in theirs.iterdir())
            kept = [p.relative_to(theirs) for p in theirs.rglob("*") if p.suffix in (".safetensors", ".pt")]
            assert len(kept) >= 3 and [p for p in kept if (folder / name / p).read_bytes() != (theirs / p).read_bytes()] == []

    return check


def test_each_ends_as_it_does_alone(made, same, tmp_path):
    """Dropout and orders of samples of its own; frozen and trained encoders; the base stays as it is."""
    trainers = made(RUNS, tmp_path)
    frozen = {n: p for n, p in trainers["small"].model.named_parameters() if not p.requires_grad}
    before = {name: p.detach().clone() for name, p in frozen.items()}
    together = Together(trainers)
    together.fit(progress=False)
    assert together.failed == {} and together.summaries.keys() == RUNS.keys() and together.trainers == {}
    assert all(torch.equal(p, before[name]) for name, p in frozen.items())
    same(tmp_path, RUNS)


def test_one_base_in_memory(made):
    trainers = made(RUNS)
    held, own = {}, 0
    for trainer in trainers.values():
        storages = [t.untyped_storage() for t in (*trainer.model.parameters(), *trainer.model.buffers())]
        held |= {storage.data_ptr(): storage.nbytes() for storage in storages}
        own += sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
    alone = made(["states"], alone=True)["states"].model
    base = sum(p.nbytes for n, p in (*alone.named_parameters(), *alone.named_buffers()) if not p.requires_grad)
    assert sum(held.values()) <= base + own + 1024 and len(trainers) == 4
    assert own_bytes(trainers["small"]) == 12 * sum(p.numel() for p in trainers["small"].model.parameters() if p.requires_grad)


def test_images_are_encoded_once_for_all(made, monkeypatch):
    """Over an epoch or more; what a shorter run encodes as it comes is shared by runs of the same batches alone."""
    encoded, encode = [], FeatureCache._encode

    def counted(self, items):
        encoded.extend(items)
        return encode(self, items)

    monkeypatch.setattr(FeatureCache, "_encode", counted)
    together = Together(made(["small", "seed"], steps=2, batch_size=25))  # an epoch
    together.fit(progress=False)
    assert len(encoded) == len(set(encoded)) == 10
    counts = [together.summaries[name]["features"] for name in ("small", "seed")]
    assert [count["computed"] for count in counts] == [10, 0] and min(count["reused"] for count in counts) > 10
    encoded.clear()
    trainers = made(["small", "seed"], steps=2)
    assert trainers["small"].features is not trainers["seed"].features
    twice = made(["small"]) | {"again": made(["small"])["small"]}
    caches = Caches()
    assert caches.features_of(twice["small"]) is caches.features_of(twice["again"])


def test_the_same_batch_is_encoded_once_where_no_memory_holds_it(made):
    trainer = made(["small"], alone=True)["small"]
    cache = FeatureCache(trainer.model, trainer.dataset, limit_bytes=0)
    cache.readers, items = 2, [sample.image for sample in trainer.dataset.samples[:4]]
    first, second, computed = cache.read(items), cache.read(items), cache.computed
    assert computed == len(set(items)) and all(map(torch.equal, first, second))
    cache.read(items[:1])
    assert cache.computed == computed + 1  # another batch rounds in its own way


def test_validation_and_the_best_adapter_are_each_ones_own(made, same, tmp_path):
    options = {"eval_every": 1, "steps": 2, "eval_scores": False}
    Together(made(["small", "seed"], tmp_path, **options)).fit(progress=False)
    same(tmp_path, ["seed"], **options)


def test_one_that_fails_ends_alone(made, same, tmp_path):
    """One has numbers that are not finite, one no memory in its last step, with a checkpoint of the one before."""
    trainers = made(["small", "seed", "states"], tmp_path)
    next(p for p in trainers["seed"].model.parameters() if p.requires_grad).data.fill_(torch.nan)
    reference, step, passes = weakref.ref(trainers["seed"]), trainers["states"].step, trainers["states"].step.passes

    def full(batches, **options):
        if step.optimizer.adamw.state:
            raise torch.OutOfMemoryError("out of memory")
        return passes(batches, **options)

    step.passes = full
    together = Together(trainers)
    del trainers
    with pytest.warns(UserWarning, match=r"seed ended at step 1, the others go on: FloatingPointError: the loss is nan at step 1 in"):
        together.fit(progress=False)
    assert together.failed["states"] == "OutOfMemoryError: out of memory"
    assert together.failed.keys() == {"seed", "states"} and together.summaries.keys() == {"small"}
    gc.collect()
    assert reference() is None  # its memory is given back
    same(tmp_path, ["small"])
    Together(made(["states"], tmp_path, resume=True)).fit(progress=False)  # with more memory
    same(tmp_path, ["states"])


@pytest.mark.parametrize("at", ["where it halts", "between the runs' turns"])
def test_a_signal_ends_all_and_they_go_on_as_if_nothing_had_been(made, same, tmp_path, monkeypatch, at):
    """Those that stand at other steps catch up."""
    names = ["small", "seed"]
    trainers = made(names, tmp_path)
    seed, turn = trainers["seed"], Together._turn
    if at == "where it halts":
        monkeypatch.setattr("fastpeft.train.interrupts.random_state", lambda: (_signal_at(seed, 1), random_state())[1])
    else:
        monkeypatch.setattr(Together, "_turn", lambda *given: (turn(*given), _signal_at(seed, 1)))
    with pytest.raises(Interrupted, match=r"stopped: small after step \d, seed after step 1; --resume goes on") as stop:
        Together(trainers).fit(progress=False)
    assert stop.value.exit_status == 143
    monkeypatch.undo()
    Together(made(names, tmp_path, resume=True)).fit(progress=False)
    same(tmp_path, names)


def _signal_at(trainer, step):
    if trainer.done["step"] == step:
        os.kill(os.getpid(), signal.SIGTERM)


def test_killed_at_different_steps_they_catch_up(made, same, tmp_path):
    """Nothing is saved at the end of a killed process: each goes on from its own last checkpoint."""
    names = ["small", "seed"]
    for name, step in (("small", 2), ("seed", 1)):
        turns = made([name], tmp_path)[name].turns(StopBetweenSteps())
        for _ in range(step + 1):
            next(turns)
        turns.close()
    with pytest.warns(UserWarning, match="nothing is resumed: the run starts at step 0"):
        Together(made(names, tmp_path, resume=True)).fit(progress=False)
    same(tmp_path, names)
    finished = made(names, tmp_path, resume=True)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    together = Together(finished)
    together.fit(progress=False)
    assert together.summaries.keys() == set(names) and all(path.stat().st_mtime_ns == was for path, was in before.items())


def test_what_is_wrong_before_the_first_step_is_told_of_all(made, tmp_path):
    Together(made(["seed"], tmp_path)).fit(progress=False)
    trainers = made(["small", "seed"], tmp_path)
    with pytest.raises(ValueError, match=r"seed: .*holds a run already"):
        Together(trainers).fit(progress=False)
    assert trainers["small"].done["step"] == 0 and not (tmp_path / "small" / "summary.json").exists()
    Together(made(["small"], tmp_path)).fit(progress=False)  # nobody holds its folder
    one = made(["small"], tmp_path)["small"]
    with pytest.raises(ValueError, match="a and b would write into one folder"):
        Together({"a": one, "b": one})
    for option in ({"trace": True}, {"track": ("wandb",)}):
        one.config = replace(one.config, **{"trace": False} | option)
        with pytest.raises(ValueError, match=f"a: {next(iter(option))}.* follows one run of a process"):
            Together({"a": one})


def test_a_memory_budget_knows_of_the_others(made):
    trainers = made(["small", "whole"], memory_budget="1GB")
    alone = trainers["small"].budget
    Together(trainers)
    assert alone.others == own_bytes(trainers["whole"]) > 0
