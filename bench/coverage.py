"""Which linear layers of transformers' models run on fastpeft's operators: ``python -m bench.coverage [NAME ...] [--out DIR]``.

Every model is built from its configuration's defaults with two layers, on meta tensors, and optimised. Counted are linear layers (nn.Linear
and Conv1D) and their FLOPs per token; ``inside``: of these layers, the share that a fused block around them computes, jointly with others
or with what comes before and after. Writes coverage.json and coverage.md to DIR, $OUT or bench/results.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto

import fastpeft as fp
from fastpeft.coverage import LINEAR
from fastpeft.registry import is_fused, original_class

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers", "decoder_layers", "num_decoder_layers")
TARGETS = {
    "LLaVA (CLIP + LLaMA)": "LlavaForConditionalGeneration",
    "LLaVA (CLIP + Mistral)": "LlavaForConditionalGeneration MistralConfig",
    "LLaVA-OneVision": "LlavaOnevisionForConditionalGeneration",
    "PaliGemma 2": "PaliGemmaForConditionalGeneration Gemma2Config",
    "Gemma 3": "Gemma3ForConditionalGeneration",
    "Qwen2.5-VL": "Qwen2_5_VLForConditionalGeneration",
    "Qwen3-VL": "Qwen3VLForConditionalGeneration",
    "InternVL": "InternVLForConditionalGeneration",
    "SmolVLM": "SmolVLMForConditionalGeneration",
    "Idefics3": "Idefics3ForConditionalGeneration",
    "BLIP-2": "Blip2ForConditionalGeneration",
    "Florence-2": "Florence2ForConditionalGeneration",
    "BLIP captioning": "BlipForConditionalGeneration",
}
ALONE = (
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM",
    "Phi3ForCausalLM", "SmolLM3ForCausalLM", "Olmo2ForCausalLM", "GPT2LMHeadModel", "BertForMaskedLM", "RobertaForMaskedLM",
    "ViTForImageClassification", "Dinov2ForImageClassification", "SiglipModel", "CLIPModel", "T5ForConditionalGeneration",
    "WhisperForConditionalGeneration",
)  # fmt: skip
TARGETS |= {name: name for name in ALONE}


def causal_models() -> list[str]:
    """Names of transformers' classes with a causal language-model head."""
    names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return sorted({name for entry in names for name in ((entry,) if isinstance(entry, str) else entry)})


def shorten(config: PretrainedConfig, layers: int = 2) -> PretrainedConfig:
    """``config`` with so many layers at most, in every part of it; lists of one entry a layer are cut."""
    was = next((getattr(config, name) for name in LAYERS if isinstance(getattr(config, name, None), int)), None)
    for name in LAYERS:
        if isinstance(getattr(config, name, None), int):
            with suppress(Exception):  # some are computed of others
                setattr(config, name, min(layers, getattr(config, name)))
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            shorten(value, layers)
        elif isinstance(value, list | tuple) and was is not None and len(value) == was > layers:
            with suppress(Exception):
                setattr(config, name, value[:layers])
    return config


def build(spec: str) -> nn.Module:
    """The model of a class's name, and after it of a text configuration's, on meta tensors."""
    name, *text = spec.split()
    cls = getattr(transformers, name)
    options = {"text_config": getattr(transformers, text[0])()} if text else {}
    config = shorten(cls.config_class(**options))
    with torch.device("meta"):
        return cls(config)


def measure(model: nn.Module) -> dict[str, Any]:
    """What ``optimize`` covers of a model; shares of 1."""
    report = fp.optimize(model)
    layers = [(name, m) for name, m in model.named_modules() if original_class(m) in LINEAR or isinstance(m, LINEAR)]
    inside = sum(_is_inside(model, name) for name, _ in layers)
    left = {name: dict(row.left) for name, row in report.classes.items() if row.left}
    return {
        "linear_layers": len(layers),
        "covered": round(report.coverage["layers"], 4),
        "covered_flops": round(report.coverage["linear"], 4),
        "inside": round(inside / max(1, len(layers)), 4),
        "left": left,
    }


def _is_inside(model: nn.Module, name: str) -> bool:
    """Whether the nearest module around a layer that is no container is a fused block."""
    parts = name.split(".")[:-1]
    while parts:
        around = model.get_submodule(".".join(parts))
        if not isinstance(around, nn.ModuleList | nn.Sequential):
            return is_fused(around)
        parts.pop()
    return is_fused(model)


def rows(specs: dict[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for label, spec in specs.items():
        try:
            yield label, measure(build(spec))
        except Exception as error:
            yield label, {"not_built": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"}


def table(found: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| model | linear layers | covered | of FLOPs per token | inside fused blocks |", "|---|---|---|---|---|"]
    for name, row in found.items():
        if "not_built" not in row:
            shares = " | ".join(f"{100 * row[kind]:.0f}%" for kind in ("covered", "covered_flops", "inside"))
            lines.append(f"| {name} | {row['linear_layers']} | {shares} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="classes of transformers; none: the models people tune, and every causal language model")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", Path(__file__).parent / "results")))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    if args.names:
        print("\n".join(table(dict(rows({name: name for name in args.names})))))
        return
    targets, causal = dict(rows(TARGETS)), dict(rows({name: name for name in causal_models()}))
    built = {name: row for name, row in causal.items() if "not_built" not in row}
    most = sum(row["covered"] >= 0.9 for row in built.values())
    for row in built.values():
        del row["left"]
    about = {"transformers": transformers.__version__, "fastpeft": fp.__version__, "targets": targets, "causal": causal}
    about |= {"causal_built": len(built), "causal_at_least_90_percent": most}
    said = [
        "# Linear layers that run on fastpeft's operators",
        "",
        f"`python -m bench.coverage`, transformers {transformers.__version__}. Every model from its configuration's defaults, two layers "
        "of each stack, on meta tensors.",
        "A layer is covered when a fused module computes it: a fused block around it, or the layer's own fused class. Experts that a model "
        "holds as stacked parameters are no linear layers, and not counted.",
        "",
        *table(targets),
        "",
        f"Causal language models: {len(causal)} classes, {len(built)} build so, {most} with at least 90% of their linear layers covered.",
        "",
        *table(built),
        "",
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "coverage.json").write_text(json.dumps(about, indent=1) + "\n")
    (args.out / "coverage.md").write_text("\n".join(said))
    print("\n".join(said[5 : 9 + len(targets)]))


if __name__ == "__main__":
    sys.exit(main())
