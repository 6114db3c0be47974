"""Every recipe against the numbers that its paper prints, or its authors' code has (STUDIES: base rates, betas, clipping)."""

from pathlib import Path

import pytest

import fastpeft as fp
from fastpeft.models import resolve
from fastpeft.options import split
from fastpeft.plan import adapt, build, count, plan_for
from fastpeft.runs.options import RECIPE, read_yaml

RECIPES = Path(__file__).parents[1] / "recipes"
MILE = {"model": "miss", "epochs": 130, "batch_size": 20, "learning_rate": 2e-5, "base_learning_rate": 2e-5, "min_learning_rate": 0,
        "weight_decay": 0.05, "max_grad_norm": 0, "warmup": 0}  # fmt: skip
LAVIN = {"batch_size": 32, "weight_decay": 0.02, "learning_rate": 9e-3 * 32 / 256, "beta1": 0.9, "beta2": 0.95, "max_grad_norm": 0,
         "min_learning_rate": 0, "template": "lavin", "max_length": 511, "dtype": "bf16"}  # fmt: skip
EXCITOR = {"epochs": 5, "batch_size": 64, "weight_decay": 0.02, "learning_rate": 9e-3 * 64 / 256, "beta1": 0.9, "beta2": 0.95,
           "max_grad_norm": 0, "warmup": 2 / 5, "min_learning_rate": 0, "dtype": "bf16"}  # fmt: skip
MED = {"weight_decay": 0, "warmup": 0.03, "min_learning_rate": 0, "dtype": "bf16", "max_length": 2048, "batch_size": 128}  # its README
WHOLE_7B = 6_738_415_616 + 2 * 4 * 4096 + 4_198_400  # LLaMA, four more tokens, the connector
MED |= {"learning_rate": 2e-5, "base_learning_rate": 2e-5, "epochs": 3}
# options (of any class), and what the plan trains: the papers' number where they print one
PAPERS: dict[str, tuple[dict, int | None]] = {
    "mile": (MILE | {"plan": "F/LoRA/LoRA", "rank": 4, "lora_alpha": 32, "lora_dropout": 0.1}, 589_824),
    "mile_instruction": (MILE | {"plan": "F/LoRA/LoRA", "rank": 4, "max_question": 35}, 589_824),
    "mile_full_then_instruction": (MILE, None),
    "layernorm": ({"plan": "T/LayerNorm/T", "model": "miss",
                   "epochs": 120, "batch_size": 16, "learning_rate": 2e-5, "base_learning_rate": 2e-5,
                   "weight_decay": 0.05, "warmup": 0, "max_grad_norm": 0}, 224_277_308),
    "llava_med": ({"model": "llava-med", "learning_rate": 2e-5, "base_learning_rate": 2e-5, "warmup": 0.03}, 262_144),
    "llava_med_align": (MED | {"model": "llava-med", "template": "v0_train", "plan": "F/T/F/F", "epochs": 1, "learning_rate": 2e-3,
                               "base_learning_rate": 2e-3}, 1024 * 4096 + 4096),
    "llava_med_instruct": (MED | {"model": "llava-med", "template": "v0_train", "plan": "F/T/T/T"}, WHOLE_7B),
    "llava_med_vqa": (MED | {"model": "llava-med", "template": "v0_train", "plan": "F/T/T/T"}, WHOLE_7B),
    "llava_med_v1_5": (MED | {"model": "llava-med-v1.5", "template": "mistral_instruct", "plan": "F/T/LoRA/F"}, 31_465_472),
    "llava_med_reports": ({"model": "llava-med", "learning_rate": 2e-5, "base_learning_rate": 2e-5, "warmup": 0.03, "weight_decay": 0},
                          262_144),
    "excitor": (EXCITOR | {"model": "llama-7b", "template": "alpaca"}, 7_619_520),
    "excitor_scienceqa": (EXCITOR | {"model": "excitor-7b", "image_encoder": "L/14@336", "prompt_format": ("QCM-LEA", "QCM-A")},
                          14_386_112),
    "lavin": (LAVIN | {"model": "lavin-7b", "epochs": 20, "warmup": 2 / 20, "prompt_format": "QCM-ALE", "base_learning_rate": 1.125e-3},
              3_781_296),
    "lavin_13b": (LAVIN | {"model": "lavin-13b", "epochs": 20, "warmup": 2 / 20, "prompt_format": "QCM-ALE",
                           "base_learning_rate": 1.125e-3}, 5_390_080),
    "lavin_text": (LAVIN | {"model": "llama-7b", "epochs": 20, "warmup": 2 / 20, "use_caption": True}, 1_704_192),  # printed 1.8M
    "lavin_chatbot": (LAVIN | {"model": "lavin-7b", "epochs": 15, "warmup": 0.2 / 15, "base_learning_rate": 1.125e-3}, 3_781_296),
    "lavin_chatbot_13b": (LAVIN | {"model": "lavin-13b", "epochs": 15, "warmup": 0.2 / 15, "base_learning_rate": 1.125e-3}, 5_390_080),
}  # fmt: skip
TEMPERATURES = {"lavin": 10, "lavin_13b": 5, "lavin_chatbot": 10, "lavin_chatbot_13b": 5}


def test_every_recipe_is_in_the_table():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == PAPERS.keys()


@pytest.mark.parametrize("name", PAPERS)
def test_recipe(name):
    want, trainable = PAPERS[name]
    made = split(read_yaml(RECIPES / f"{name}.yaml") | {"data": "x", "out": "y"}, *RECIPE)
    found = {field: getattr(options, field) for options in made for field in want if hasattr(options, field)}
    assert found.keys() == want.keys()
    for field, value in want.items():
        assert found[field] == (pytest.approx(value, rel=1e-3) if isinstance(value, int | float) else value), field
    if trainable is None:  # its stages have the plans
        return
    run = made[0]
    source = resolve(run.model, run.image_encoder)
    plan = plan_for(source.family.parts, run.plan, **run.lora)
    assert count(adapt(build(source, device="meta"), plan))["trainable"] == trainable
    temperatures = {method.temperature for methods in plan.treatments.values() for method in methods if isinstance(method, fp.MMAdapter)}
    assert temperatures == ({TEMPERATURES[name]} if name in TEMPERATURES else set())
