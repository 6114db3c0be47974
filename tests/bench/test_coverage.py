"""bench/coverage on some models, and the committed figures."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench import coverage  # noqa: E402

CAUSAL = ("MistralForCausalLM", "Gemma3ForCausalLM", "Phi3ForCausalLM", "GPT2LMHeadModel", "FalconForCausalLM")


OTHERS = (coverage.TARGETS["LLaVA (CLIP + Mistral)"], "T5ForConditionalGeneration", "ViTForImageClassification")


@pytest.mark.parametrize("spec", [*CAUSAL, *OTHERS])
def test_some_models(spec):
    row = coverage.measure(coverage.build(spec))
    assert row["covered"] == row["covered_flops"] == 1 and row["linear_layers"] < 80
    # of Falcon its layers alone, and its head where the loss is at labelled positions
    assert (row["inside"] > 1 / row["linear_layers"]) == (spec != "FalconForCausalLM")
    assert f"| {spec} | {row['linear_layers']} | 100% | 100% |" in "\n".join(coverage.table({spec: row}))


def test_what_does_not_build_is_told():
    ((name, row),) = coverage.rows({"nothing": "NoSuchModel"})
    assert name == "nothing" and row["not_built"].startswith("AttributeError") and len(coverage.table({name: row})) == 2


def test_the_committed_figures():
    told = json.loads((ROOT / "bench" / "results" / "coverage.json").read_text())
    assert set(told["targets"]) == set(coverage.TARGETS) and all(row["covered"] >= 0.9 for row in told["targets"].values())
    built = [row for row in told["causal"].values() if "not_built" not in row]
    assert len(built) == told["causal_built"] and sum(row["covered"] >= 0.9 for row in built) == told["causal_at_least_90_percent"] >= 100
