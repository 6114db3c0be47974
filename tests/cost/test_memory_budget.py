"""A memory budget: what is chosen, that it fits, what it costs, and that no gradient changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastpeft as fp
from fastpeft.cost.activations import RANDOM_STATE, profile_activations
from fastpeft.cost.memory_budget import MemoryBudget, apply, choose, fixed_bytes
from fastpeft.cost.profile import measure
from fastpeft.fused.layers.projections import Recomputes
from fastpeft.options import bytes_of
from fastpeft.train.optimizer import Optimizer

PLANS = ("T/T/T", "F/LoRA/LoRA", "LoRA/LoRA/LoRA", "IA3/IA3/IA3", "F/Prefix/PTv2", "T/Attention/FFN", "LoRA+LayerNorm/LoRA+IA3/IA3+Prefix")


def trained(miss, plan):
    """In training, with every kind of randomness there is."""
    model = miss.build(plan)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
        if getattr(module, "lora_A", None) is not None:
            module.lora_dropout = 0.2
    return model.train()


def step(miss, model, inputs):
    torch.manual_seed(0)
    with measure(model) as cost:
        loss, gradients = miss.step(model, inputs)
    return loss, gradients, cost


@pytest.mark.parametrize("plan", PLANS)
def test_whatever_is_computed_again_gradients_stay_and_the_survey_is_right(miss, plan):
    model, inputs = trained(miss, plan), miss.batch(padded=True)
    want, wanted, cost = step(miss, model, inputs)
    found = profile_activations(model, lambda: model(**inputs).loss)
    assert found.saved == pytest.approx(cost.saved_bytes, rel=1e-3)
    fixed = fixed_bytes(model)
    most = choose(found, fixed, 10**12).peak
    seen = set()
    for percent in range(100, 0, -5):
        try:
            chosen = choose(found, fixed, fixed + (most - fixed) * percent // 100)
        except ValueError:
            break
        if (chosen.modules, chosen.layers) in seen:
            continue
        seen.add((chosen.modules, chosen.layers))
        apply(model, chosen.modules, chosen.layers)
        loss, gradients, now = step(miss, model, inputs)
        apply(model)
        assert loss == pytest.approx(want, rel=1e-12)
        miss.assert_same(gradients, wanted, 1e-11)
        # the random state that a layer keeps is no saved tensor; a prefix's keys and images' states are kept by those who share them
        assert chosen.saved == pytest.approx(now.saved_bytes, abs=(RANDOM_STATE + 9000) * len(chosen.layers) + 1000)
        assert 0.8 * chosen.flops <= now.flops - cost.flops <= chosen.flops  # a layer is left where the last thing it keeps is made again
    assert len(seen) > 2


@pytest.mark.parametrize("plan", ["T", "LoRA", "IA3", "IA3+PTv2", "Excitor", "AdaptionPrompt"])
def test_llama_under_a_budget(miss, plan):
    """Gates, keys and queries after their rotation; adapters' dropout drawn again."""
    shape = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    model = fp.build("llama-tiny", pretrained=False, dtype=torch.float64, num_key_value_heads=2, **shape)
    fp.adapt(model, plan, **({"lora_dropout": 0.2} if "LoRA" in plan else {}))
    miss.scatter_trained(model)
    model.train()
    model.lean_logits = True  # as the trainer runs it
    torch.manual_seed(3)
    ids = torch.randint(3, 50, (3, 8))
    inputs = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][1, 5:], inputs["labels"][:, :3], inputs["labels"][1, 5:] = 0, -100, -100
    want, wanted, cost = step(miss, model, inputs)
    found, fixed = profile_activations(model, lambda: model(**inputs).loss), fixed_bytes(model)
    normed = int(inputs["attention_mask"].sum()) * 32 * 8  # the lowest layer's, which counts where nothing remakes it
    assert cost.saved_bytes <= found.saved <= 1.01 * cost.saved_bytes + normed
    for modules, layers in (
        ([name for layer in found.layers.values() for name in layer.pieces], []),
        ([], list(found.layers)),
        (["model.layers.0.mlp"], ["model.layers.1"]),
    ):
        apply(model, modules, layers)
        loss, gradients, now = step(miss, model, inputs)
        assert loss == pytest.approx(want, rel=1e-12) and now.saved_bytes < 0.9 * cost.saved_bytes
        miss.assert_same(gradients, wanted, 1e-11)
    most = choose(found, fixed, 10**12).peak
    if plan in ("Excitor", "AdaptionPrompt"):  # of two layers they adapt one, whose own peak no recomputation lowers
        with pytest.raises(ValueError, match="at least"):
            choose(found, fixed, most - 1)
    else:
        chosen = choose(found, fixed, fixed + (most - fixed) * 19 // 20)
        assert chosen.modules or chosen.layers


def test_cheapest_first(miss):
    """What is computed again costs no more FLOPs per byte than anything that is not."""
    model, inputs = trained(miss, "T/T/T"), miss.batch()
    found, fixed = profile_activations(model, lambda: model(**inputs).loss), fixed_bytes(model)
    prices = {name: p.flops / p.freed for layer in found.layers.values() for name, p in layer.pieces.items()}
    prices |= {name: layer.flops / (layer.saved - layer.input) for name, layer in found.layers.items()}
    most = choose(found, fixed, 10**12).peak
    chosen = choose(found, fixed, fixed + int(0.97 * (most - fixed)))
    picked = {*chosen.modules, *chosen.layers}
    assert picked and chosen == choose(found, fixed, fixed + int(0.97 * (most - fixed)))
    assert max(prices[name] for name in picked) <= min(price for name, price in prices.items() if name not in picked)


def test_least_possible_is_named(miss):
    model, inputs = trained(miss, "T/T/T"), miss.batch()
    found, fixed = profile_activations(model, lambda: model(**inputs).loss), fixed_bytes(model)
    with pytest.raises(
        ValueError, match=r"takes at least (\S+) MB \(\S+ MB of it weights, gradients and optimiser state\): lower batch_size"
    ) as error:
        choose(found, fixed, fixed)
    least = bytes_of(str(error.value).split("at least ")[1].split(" (")[0])
    assert choose(found, fixed, int(least * 1.001)).layers


def test_fixed_bytes_are_those_of_a_step(miss):
    """Weights, and for what is trained a gradient and AdamW's two moments, as the optimiser really holds them."""
    for dtype in (torch.float32, torch.bfloat16):
        model = miss.build("F/T/LoRA", dtype=dtype)
        optimizer = Optimizer(model, fp.TrainConfig(steps=1, progress=False), 1)
        for _, master in optimizer.pairs:
            master.grad = torch.zeros_like(master)
        optimizer.adamw.step()
        state = sum(t.nbytes for s in optimizer.adamw.state.values() for t in s.values() if t.dim())
        masters = sum(master.nbytes for p, master in optimizer.pairs if master is not p)
        gradients = sum(p.nbytes if master is p else p.nbytes + master.nbytes for p, master in optimizer.pairs)
        weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        assert fixed_bytes(model) == weights + state + masters + gradients


def test_a_survey_leaves_no_trace(miss):
    model, inputs = trained(miss, "LoRA/LoRA/LoRA"), miss.batch()
    torch.manual_seed(5)
    state, kept = torch.get_rng_state(), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({id(t): t}) or t, lambda t: t):
        profile_activations(model, lambda: model(**inputs).loss)
    assert not kept and torch.equal(torch.get_rng_state(), state)
    assert not any(m.recompute or "projected" in vars(m) for m in model.modules() if isinstance(m, Recomputes))
    assert all(p.grad is None for p in model.parameters())


def test_a_larger_batch_is_surveyed_anew(miss, monkeypatch):
    model, small, large = trained(miss, "LoRA/LoRA/LoRA"), miss.batch(2), miss.batch(6)
    found = {n: profile_activations(model, lambda n=n: model(**miss.batch(n)).loss) for n in (2, 6)}
    limit = choose(found[2], fixed_bytes(model), 10**12).peak
    budget, calls = MemoryBudget(model, limit), []
    monkeypatch.setattr("fastpeft.cost.memory_budget.profile_activations", lambda *args: calls.append(1) or profile_activations(*args))
    budget.fit(small), budget.fit(small)
    assert len(calls) == 1 and not budget.chosen.modules + budget.chosen.layers
    with pytest.raises(ValueError, match="at least"):
        budget.fit(large)
    budget.limit = int(0.8 * choose(found[6], fixed_bytes(model), 10**12).peak)
    budget.fit(large)
    assert budget.chosen.peak <= budget.limit and budget.chosen.modules + budget.chosen.layers
    calls.clear()
    budget.fit(small), budget.fit(large)
    assert not calls


def test_training_under_a_budget_is_training(runs, phantoms, tmp_path):
    """The same weights, resumed or not; less kept; the summary says what was chosen and at what price."""
    free = runs.trainer(phantoms, "LoRA/LoRA/LoRA", steps=4, out=tmp_path / "free")
    summary = free.fit()
    limit = fixed_bytes(free.model) + summary["saved_bytes_per_step"]  # less than with what forward and backward hold meanwhile
    tight = runs.trainer(phantoms, "LoRA/LoRA/LoRA", steps=4, memory_budget=str(limit), out=tmp_path / "tight")
    less = tight.fit()
    assert less["saved_bytes_per_step"] < 0.8 * summary["saved_bytes_per_step"] and less["flops_per_sample"] > summary["flops_per_sample"]
    assert any(note.startswith("memory budget") and "again; estimated peak" in note for note in less["notes"])
    for name, w in runs.weights(free).items():
        torch.testing.assert_close(runs.weights(tight)[name], w, rtol=0, atol=1e-5)


def test_a_budget_below_the_least_ends_the_run(runs, phantoms):
    with pytest.raises(ValueError, match=r"memory budget 0\.10 MB: this batch's step takes at least"):
        runs.trainer(phantoms, "F/LoRA/LoRA", steps=1, memory_budget="100kB").fit()


def test_sizes():
    assert [bytes_of(s) for s in ("6GB", "800 MB", "5.5GiB", "1000", "2kib")] == [6 * 10**9, 8 * 10**8, int(5.5 * 2**30), 1000, 2048]
    for bad in ("", "GB", "6 apples", "-1GB", "0GB", "1e9"):
        with pytest.raises(ValueError, match="no size in bytes"):
            fp.TrainConfig(memory_budget=bad)
    with pytest.raises(ValueError, match="no saving is called speed"):
        fp.TrainConfig(without="speed")
    assert fp.TrainConfig(without="remake, labelled").savings_off == ("remake", "labelled")
