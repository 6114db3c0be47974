"""Epochs of a vision-language model with a frozen image encoder, with and without the caches of images and of lower layers.

    python bench/cached.py [--images 4] [--batch 2] [--epochs 2] [--size 512] [--text 60] [--lowest 20] [--device cuda --dtype bf16]

SmolVLM-256M's shape with random weights: SigLIP-B/16 on 512 x 512 pixels (1024 patches), 64 tokens an image, 30 layers of C = 576; LoRA
(r = 8) on the text model's query and value projections, in all layers, and (--lowest) from layer 20 on. With adapters in all layers the
model without caches is compared with one that keeps image features; with adapters in the upper layers only, with one that also keeps the
hidden states below them. All models of a comparison start equal and take the same batches, each epoch in another order, one after the
other within each epoch; losses are compared at every step. FLOPs are PyTorch's count of one epoch more, forward and
backward; its counter reads every field of an encoder's output, so that the bytes told after it are of all fields. On the CPU one
thread and its CPU time. Writes cached_DEVICE.json to $OUT, or bench/results.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import os
import platform
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as tf
from torch.utils.flop_counter import FlopCounterMode

import fastpeft as fp
from bench.pieces import say
from fastpeft.caching.layers import layer_caches
from fastpeft.features import image_caches
from fastpeft.files import write_json

IMAGE = 49_190


LAYERS = 30


def build(size: int, lowest: int) -> torch.nn.Module:
    """``lowest``: the first layer with adapters."""
    seen = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 16}
    read = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": LAYERS, "num_attention_heads": 9, "num_key_value_heads": 3}
    text = tf.LlamaConfig(**read, vocab_size=49_280, pad_token_id=2, tie_word_embeddings=True)
    config = tf.SmolVLMConfig(vision_config=seen | {"image_size": size}, text_config=text, image_token_id=IMAGE, scale_factor=4)
    torch.manual_seed(0)
    layers = "|".join(map(str, range(lowest, LAYERS)))
    lora = peft.LoraConfig(r=8, target_modules=rf".*text_model.layers.({layers})\..*(q_proj|v_proj)")
    model = peft.get_peft_model(tf.SmolVLMForConditionalGeneration(config), lora)
    model.config.use_cache = False
    return model


def batches(args: argparse.Namespace, epoch: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(args.images, 1, 3, args.size, args.size, generator=generator)
    tokens = (args.size // 16) ** 2 // 16
    ids = torch.randint(3, 49_000, (args.images, tokens + args.text), generator=generator)
    ids[:, :tokens] = IMAGE
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < tokens + args.text // 2, -100)
    order = torch.randperm(args.images, generator=torch.Generator().manual_seed(epoch))
    whole = {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return [{name: t[rows].to(args.device) for name, t in whole.items()} for rows in order.split(args.batch)]


def epoch_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, args: argparse.Namespace, epoch: int) -> tuple[float, list[float]]:
    """(seconds, losses)."""
    on_cpu, losses = args.device == "cpu", []
    given = batches(args, epoch)
    began = time.thread_time() if on_cpu else time.perf_counter()
    for batch in given:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bf16"):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    losses = [float(loss) for loss in losses]
    return (time.thread_time() if on_cpu else time.perf_counter()) - began, losses


CACHES = {"without": {}, "images": {"cache_images": "4GB"}, "images and layers": {"cache_images": "4GB", "cache_layers": "4GB"}}


def compare(args: argparse.Namespace, lowest: int, names: list[str]) -> dict[str, Any]:
    """Epochs of models with adapters from layer ``lowest`` on, with these caches."""
    plain = build(args.size, lowest).to(args.device).train()
    models = {name: copy.deepcopy(plain) for name in names}
    for name, model in models.items():
        fp.optimize(model, **CACHES[name])
    optimizers = {name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3) for name, model in models.items()}
    seconds, flops = {name: [] for name in models}, {}
    for epoch in range(1 + args.epochs):
        losses = {}
        for name, model in models.items():
            taken, losses[name] = epoch_of(model, optimizers[name], args, epoch)
            seconds[name].append(taken)
            torch.testing.assert_close(losses[name], losses[names[0]], rtol=1e-2 if args.dtype == "bf16" else 1e-4, atol=1e-4)
        say(f"layers from {lowest}, epoch {epoch}: " + ", ".join(f"{name} {taken[-1]:.2f} s" for name, taken in seconds.items()))
    for name, model in models.items():  # an epoch more, counted and not timed
        with FlopCounterMode(display=False) as counter:
            epoch_of(model, optimizers[name], args, 1 + args.epochs)
        flops[name] = counter.get_total_flops()
    first, rest = ({name: values[0] for name, values in seconds.items()}, {name: min(values[1:]) for name, values in seconds.items()})
    found = {"adapters_from_layer": lowest, "seconds": seconds, "flops_per_epoch_after_first": flops, "caches": {}}
    for name, model in list(models.items())[1:]:
        caches = [*image_caches(model), *layer_caches(model)]
        notes = [cache.note() for cache in caches]
        ratios = {"ratio_after_first": rest[names[0]] / rest[name], "ratio_first": first[names[0]] / first[name]}
        ratios |= {"flops_ratio": flops[names[0]] / flops[name]}
        found["caches"][name] = ratios | {"bytes_per_sample": sum(c.kept.bytes for c in caches) // args.images, "notes": notes}
        told = ", ".join(f"{what} {value:.2f}" for what, value in ratios.items())
        say(f"layers from {lowest}, {names[0]} over {name}: {told}; {'; '.join(notes)}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"images": 4, "batch": 2, "epochs": 2, "size": 512, "text": 60, "lowest": 20}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    found = [compare(args, 0, ["without", "images"]), compare(args, args.lowest, list(CACHES))]
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    result = vars(args) | {"hardware": hardware, "torch": torch.__version__, "transformers": tf.__version__}
    result |= {"date": datetime.date.today().isoformat(), "comparisons": found}
    out = Path(os.environ.get("OUT", Path(__file__).parent / "results"))
    write_json(out / f"cached_{args.device}.json", result)


if __name__ == "__main__":
    main()
