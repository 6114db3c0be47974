"""Small models of each family and collated batches of random texts and images for them, of lengths that differ from batch to batch."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import torch

import fastpeft as fp
from fastpeft.data import CausalCollator
from fastpeft.labels import IGNORE_INDEX
from fastpeft.models import family_of, parts_of
from fastpeft.plan import plan_for

PLANS = {
    "miss-tiny": "LoRA/LoRA/LoRA",
    "llama-tiny": "LoRA",
    "excitor-tiny": "F/Excitor",
    "lavin-tiny": "MMAdapter/T/MMAdapter",
    "llava-med-tiny": "F/T/LoRA/T",
}
LLAMA = {"num_hidden_layers": 2, "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96}
MISS = {"image_size": 16, "hidden_size": 32, "heads": 2, "vision_layers": 2, "text_layers": 2, "vocab_size": 64}
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "drop_path_rate": 0.1}


def model_of(name: str, dropout: bool, plan: str | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """In training, its parameters drawn anew: adapters that start as nothing have no gradients to compare."""
    overrides = MISS | (DROPOUT if dropout else {}) if name == "miss-tiny" else LLAMA if name == "llama-tiny" else {"text_config": LLAMA}
    options = {"lora_dropout": 0.2} if dropout and "LoRA" in PLANS[name] else {}
    model = fp.build(name, pretrained=False, seed=0, dtype=dtype, **overrides)
    fp.adapt(model, plan_for(parts_of(model), plan or PLANS[name], **options))
    for module in model.modules():  # MM-Adapters draw by default
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.1 * dropout
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=draw) * 0.1)
    return model.to(device, dtype).train()


class Data:
    """What a step asks of a data set."""

    def __init__(self, model, inputs):
        self.inputs, self.asks = inputs, family_of(model).kind == "vqa"

    def weight(self, batch: dict) -> int:
        return len(batch["samples"]) if self.asks else int((batch["labels"] != IGNORE_INDEX).sum())


def batch_of(name: str, model, number: int, *, samples: int = 3, packed: bool = False, images: str = "some", content: int = 0) -> dict:
    """A collated batch; ``number`` decides its sizes, ``content`` what it holds; "none", "some" or "every" of its samples has an image."""
    size, draw = torch.Generator().manual_seed(number), torch.Generator().manual_seed(content)

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=size))

    if name == "miss-tiny":
        return _questions(model, draw, below, samples)
    places = family_of(model).image_tokens(model.config)
    sees = name != "llama-tiny" and images != "none"
    pixels = torch.randn(2, 3, *[model.config.vision_config.image_size] * 2, generator=draw) if sees else None
    items = []
    for i in range(samples):
        has = sees and (images == "every" or i % 2 == 0)
        ahead = places if has else 0
        ids = torch.randint(3, 60, (ahead + 4 + below(9),), generator=draw)
        labels = ids.clone()
        labels[: ahead + 1 + below(3)] = IGNORE_INDEX
        item = {"input_ids": ids, "labels": labels, "sample": SimpleNamespace(image=f"{below(2)}.png" if has else None)}
        if places:
            at = torch.arange(len(ids))
            item["image_mask"] = (at >= 1) & (at <= ahead)
        if has:
            item["pixel_values"] = pixels[int(item["sample"].image[0])]
        items.append(item)
    return CausalCollator(0, packed=packed)(items)


def _questions(model, draw, below, samples: int) -> dict:
    def rows(longest):
        lengths = [2 + below(longest - 2) for _ in range(samples)]
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        return torch.randint(3, 60, mask.shape, generator=draw) * mask, mask.long()

    asked, mask = rows(9)
    answers, answer_mask = rows(5)
    index = torch.tensor([below(2) for _ in range(samples)]) if below(2) else torch.arange(samples)
    index = torch.unique(index, return_inverse=True)[1]
    size = model.config.vision_config.image_size
    return {
        "input_ids": asked, "attention_mask": mask, "decoder_input_ids": answers, "decoder_attention_mask": answer_mask,
        "labels": answers.masked_fill(answer_mask == 0, IGNORE_INDEX), "image_index": index,
        "pixel_values": torch.randn(int(index.max()) + 1, 3, size, size, generator=draw), "samples": [None] * samples,
    }  # fmt: skip


def inputs_of(model, batch: dict, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    given = {name: batch[name] for name in names_of(model) if batch.get(name) is not None}
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in given.items()}


def names_of(model) -> tuple[str, ...]:
    """Of a batch's entries those that the model's forward takes."""
    taken = inspect.signature(model.forward).parameters
    names = ("input_ids", "attention_mask", "position_ids", "labels", "decoder_input_ids", "decoder_attention_mask")
    return tuple(name for name in (*names, "pixel_values", "image_embeds", "image_index", "image_mask") if name in taken)


def with_features(model, batch: dict) -> dict:
    """The batch with features in place of pixels, of the shape that the model's own have."""
    if "pixel_values" not in batch:
        return batch
    vision, images = model.config.vision_config, len(batch["pixel_values"])
    patches = (vision.image_size // vision.patch_size) ** 2
    tokens = family_of(model).image_tokens(model.config) or patches + 1
    width = vision.projection_dim if type(model).__name__.startswith("Excitor") else vision.hidden_size
    features = batch["pixel_values"].flatten(1)
    features = features.repeat(1, -(-tokens * width // features.shape[1]))[:, : tokens * width].view(images, tokens, width)
    return {name: t for name, t in batch.items() if name != "pixel_values"} | {"image_embeds": features}
