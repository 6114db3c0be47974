"""Drawn models, adapters and batches with and without optimize; and that the comparison sees what it is for."""

import sys
from pathlib import Path

import peft
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import fuzz_dropin
from fuzz_dropin import Case, Difference, Refused, check, make
from small_steps import llama, scattered, text

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
SETTINGS = {"train": True, "checkpointing": None, "autocast": False, "inputs_require_grad": False}
SETTINGS |= {"generate": False, "restore": False, "update": True}


@pytest.mark.slow
def test_three_hundred_cases():
    done = refused = 0
    for number in range(300):
        try:
            check(make(number))
            done += 1
        except Refused:
            refused += 1
    assert done > 100 and refused > 50


def case() -> Case:
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    return Case(scattered(model), "llama", [text(), text(seed=2)], SETTINGS)


def test_one_case():
    check(case())


@pytest.mark.parametrize("fault", ["a weight", "a parameter without a gradient"])
def test_a_difference_is_seen(monkeypatch, fault):
    def optimize(model, **options):
        trained = [p for p in model.parameters() if p.requires_grad]
        if fault == "a weight":
            trained[-1].data *= 1 + 1e-6
        else:
            trained[-1].requires_grad_(False)

    monkeypatch.setattr(fuzz_dropin.fp, "optimize", optimize)
    with pytest.raises(Difference):
        check(case())


def test_cases_are_drawn_from_their_numbers_alone():
    def drawn(number):
        while True:
            try:
                return make(number)
            except Refused:
                number += 1

    first, again, other = drawn(1), drawn(1), drawn(1000)
    assert first.what == again.what != other.what
    for p, q in zip(first.model.parameters(), again.model.parameters()):
        assert torch.equal(p, q)
