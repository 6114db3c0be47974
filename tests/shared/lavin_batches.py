"""A small LaVIN and batches of its samples. ``lavin_samples`` and ``lavin_pixels`` are the fixtures ``samples`` and ``pixels``."""

import pytest
import torch

import fastpeft as fp

PLAN = "MMAdapter/T/MMAdapter"


def randomise(model):
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data += (0.3 if "adapter" in name else 0.05) * torch.randn_like(p)
    return model


def build(plan=PLAN, **more):
    model = fp.build("lavin-tiny", dtype=torch.float64, text_config={"num_key_value_heads": 2}, **more)
    model = randomise(fp.adapt(model, plan, **({"dropout": 0.0} if "Adapter" in plan else {})))
    return model.train()


@pytest.fixture(name="samples")
def lavin_samples():
    """(ids, places of the image's four tokens, labels, image or None): two on one image, one text alone, one on another image."""
    torch.manual_seed(0)
    out = []
    for length, image in ((11, 1), (6, None), (9, 0), (8, 1)):
        ids, places = torch.randint(3, 400, (length,)), torch.zeros(length, dtype=torch.bool)
        places[2:6] = image is not None
        out.append((ids, places, torch.where(torch.arange(length) > length - 4, ids, -100), image))
    return out


@pytest.fixture(name="pixels")
def lavin_pixels():
    torch.manual_seed(3)
    return torch.randn(2, 3, 32, 32, dtype=torch.float64)


def padded(samples, pixels, side="right"):
    pad, most = torch.nn.functional.pad, max(len(ids) for ids, *_ in samples)
    fills = [(0, most - len(i)) if side == "right" else (most - len(i), 0) for i, *_ in samples]
    rows = [(pad(i, f), pad(torch.ones_like(i), f), pad(m, f), pad(y, f, value=-100)) for (i, m, y, _), f in zip(samples, fills)]
    batch = dict(zip(("input_ids", "attention_mask", "image_mask", "labels"), map(torch.stack, zip(*rows))))
    return batch | images_of(samples, pixels)


def packed(samples, pixels):
    ids, places, labels = (torch.cat([s[i] for s in samples])[None] for i in range(3))
    batch = {"input_ids": ids, "image_mask": places, "labels": labels}
    batch["position_ids"] = torch.cat([torch.arange(len(s[0])) for s in samples])[None]
    return batch | images_of(samples, pixels)


def images_of(samples, pixels):
    return {"pixel_values": pixels, "image_index": torch.tensor([-1 if s[3] is None else s[3] for s in samples])}
