"""Epochs of a vision-language model with a frozen image encoder, with and without the image cache.

    python bench/cached.py [--images 4] [--batch 2] [--epochs 2] [--size 512] [--text 60] [--device cuda --dtype bf16]

SmolVLM-256M's shape with random weights: SigLIP-B/16 on 512 x 512 pixels (1024 patches), 64 tokens an image, 30 layers of C = 576; LoRA
(r = 8) on the text model's query and value projections. Both models start equal and take the same batches, each epoch in another order,
one after the other within each epoch; losses are compared at every step. On the CPU one thread and its CPU time. Writes
cached_DEVICE.json to $OUT, or bench/results.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import os
import platform
import time
from pathlib import Path

import peft
import torch
import transformers as tf

import fastpeft as fp
from bench.pieces import say
from fastpeft.features import image_caches
from fastpeft.files import write_json

IMAGE = 49_190


def build(size: int) -> torch.nn.Module:
    seen = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 16}
    read = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    text = tf.LlamaConfig(**read, vocab_size=49_280, pad_token_id=2, tie_word_embeddings=True)
    config = tf.SmolVLMConfig(vision_config=seen | {"image_size": size}, text_config=text, image_token_id=IMAGE, scale_factor=4)
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=8, target_modules=r".*text_model.*(q_proj|v_proj)")
    return peft.get_peft_model(tf.SmolVLMForConditionalGeneration(config), lora)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"images": 4, "batch": 2, "epochs": 2, "size": 512, "text": 60}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    plain = build(args.size).to(args.device).train()
    models = {"without": plain, "with": copy.deepcopy(plain)}
    for name, model in models.items():
        fp.optimize(model, cache_images="4GB" if name == "with" else None)
    optimizers = {name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3) for name, model in models.items()}
    seconds = {name: [] for name in models}
    for epoch in range(1 + args.epochs):
        losses = {}
        for name, model in models.items():
            taken, losses[name] = epoch_of(model, optimizers[name], args, epoch)
            seconds[name].append(taken)
        torch.testing.assert_close(losses["with"], losses["without"], rtol=1e-2 if args.dtype == "bf16" else 1e-4, atol=1e-4)
        say(f"epoch {epoch}: " + ", ".join(f"{name} the cache {taken[-1]:.2f} s" for name, taken in seconds.items()))
    (cache,) = image_caches(models["with"])
    ratio = min(seconds["without"][1:]) / min(seconds["with"][1:])
    first = seconds["without"][0] / seconds["with"][0]
    say(f"an epoch after the first takes {ratio:.2f} times as long without the cache; the first {first:.2f} times; {cache.note()}")
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    result = vars(args) | {"hardware": hardware, "torch": torch.__version__, "transformers": tf.__version__}
    result |= {"date": datetime.date.today().isoformat(), "seconds": seconds, "ratio_after_first": ratio, "ratio_first": first}
    result |= {"bytes_per_image": cache.kept.bytes // max(1, len(cache.kept)), "note": cache.note()}
    out = Path(os.environ.get("OUT", Path(__file__).parent / "results"))
    write_json(out / f"cached_{args.device}.json", result)


if __name__ == "__main__":
    main()
