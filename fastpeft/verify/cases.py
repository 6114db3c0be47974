"""Verification cases: small samples of each family, to run one by one and together, in every form that saves work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BlipForQuestionAnswering, LlamaForCausalLM

from fastpeft.data.shared_prefix import most_shared, share, with_images
from fastpeft.methods import is_adapter
from fastpeft.models import family_of, parts_of
from fastpeft.models.excitor import ExcitorForConditionalGeneration
from fastpeft.models.lavin import LavinForConditionalGeneration
from fastpeft.models.llava import LlavaMedForConditionalGeneration
from fastpeft.models.vision_language import VisionLanguageModel
from fastpeft.savings import force

Batch = dict[str, Tensor]


@dataclass
class Form:
    """A way to run all samples in one fused step: ``inputs(model)`` makes its batch, inside ``context``."""

    name: str
    inputs: Callable[[nn.Module], Batch]
    context: Callable[[], object] | None = None


@dataclass
class Case:
    """Samples of one family: to run alone, each with its weight in the loss of a batch, and forms to run them together."""

    alone: list[Batch]
    weights: list[float]
    forms: list[Form]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    floor: float = 0.0  # a relative error that the plain model has in every dtype


def base_dtype(model: nn.Module) -> torch.dtype:
    """Dtype of the base's activations: adapters stay in float32 under a half-precision base."""
    return next(p.dtype for name, p in model.named_parameters() if not is_adapter(name))


def case_of(model: nn.Module, seed: int = 0) -> Case:
    """Samples and forms for a model's family; ValueError for a family without."""
    for family, make in FAMILIES.items():
        if isinstance(model, family):
            return make(model, torch.Generator().manual_seed(seed), next(model.parameters()).device)
    raise ValueError(f"{type(model).__name__} cannot be verified; known: {', '.join(f.__name__ for f in FAMILIES)}")


def blip_case(model: BlipForQuestionAnswering, generator: torch.Generator, device: torch.device) -> Case:
    """Four questions of several lengths on three images."""
    text, size = model.config.text_config, model.config.vision_config.image_size
    questions, answers, index = (9, 6, 9, 4), (4, 3, 5, 4), torch.tensor([0, 1, 2, 0])

    def tokens(length: int, first: int) -> Tensor:
        ids = torch.randint(5, text.vocab_size - 2, (length,), generator=generator)
        ids[0] = first
        return ids.to(device)

    images = torch.randn(3, 3, size, size, generator=generator, dtype=torch.float64).to(next(model.vision_model.parameters()).dtype)
    images, index = images.to(device), index.to(device)
    asked = [tokens(n, text.vocab_size - 1) for n in questions]
    answered = [tokens(n, text.bos_token_id) for n in answers]
    alone = [
        {"input_ids": q[None], "attention_mask": torch.ones_like(q)[None], "labels": a[None], "pixel_values": images[i : i + 1]}
        for q, a, i in zip(asked, answered, index.tolist())
    ]
    together = {
        "input_ids": pad_sequence(asked, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(q) for q in asked], batch_first=True),
        "labels": pad_sequence(answered, batch_first=True, padding_value=-100),
    }
    grouped = together | {"pixel_values": images, "image_index": index}
    forms = [
        Form("one padded batch", lambda model: together | {"pixel_values": images[index]}),
        Form("questions grouped by image", lambda model: grouped),
        Form("attention to states, absorbed", lambda model: grouped, lambda: force("absorb", True)),
        Form("attention to keys and values", lambda model: grouped, lambda: force("absorb", False)),
    ]
    skipped = []
    if any(p.requires_grad for p in model.vision_model.parameters()):
        skipped.append(("image features kept", "the image encoder is trained"))
    else:

        @torch.no_grad()
        def kept(model):
            return together | {"image_embeds": model.encode_images(images), "image_index": index}

        forms.append(Form("image features kept", kept))
    return Case(alone, [1.0] * len(alone), forms, skipped)


# transformers' LlamaRMSNorm, rotary tables and loss are float32 in a float64 model too
LLAMA_FLOOR = 64 * torch.finfo(torch.float32).eps


def texts(vocabulary: int, lengths: tuple[int, ...], generator: torch.Generator, device: torch.device) -> tuple[list[Batch], Batch, Batch]:
    """Texts, the last three tokens of each labelled: each alone, as one padded batch, and packed into one row."""
    ids = [torch.randint(3, vocabulary, (n,), generator=generator).to(device) for n in lengths]
    ids[-1][:-4] = ids[0][: len(ids[-1]) - 4]  # the last begins as the first
    labels = [t.index_fill(0, torch.arange(len(t) - 3, device=device), -100) for t in ids]
    alone = [{"input_ids": t[None], "labels": label[None]} for t, label in zip(ids, labels)]
    padded = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(t) for t in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }
    positions = [torch.arange(len(t), device=device) for t in ids]
    packed = {"input_ids": torch.cat(ids)[None], "labels": torch.cat(labels)[None], "position_ids": torch.cat(positions)[None]}
    return alone, padded, packed


def shared(alone: list[Batch], images: list[int]) -> tuple[Batch, Tensor]:
    """The same samples in one row, where what two begin with is there once; and their order. ``images``: of each sample, -1 for none."""
    samples = [{name: t[0] for name, t in sample.items() if name in ("input_ids", "labels", "image_mask")} for sample in alone]
    tokens = [with_images(s["input_ids"].cpu(), s["image_mask"].cpu() if "image_mask" in s else None, i) for s, i in zip(samples, images)]
    order, lengths = share(tokens, [most_shared(s["labels"].cpu(), len(s["labels"])) for s in samples], images, worth=1)
    rows = [{name: t[n:] for name, t in samples[i].items()} for i, n in zip(order, lengths)]
    batch = {name: torch.cat([row[name] for row in rows])[None] for name in samples[0]}
    positions = [torch.arange(n, len(samples[i]["input_ids"])) for i, n in zip(order, lengths)]
    batch["position_ids"] = torch.cat(positions)[None].to(batch["input_ids"].device)
    return batch | {"prefix_lengths": torch.tensor(lengths)}, torch.tensor(order)


def llama_case(model: LlamaForCausalLM, generator: torch.Generator, device: torch.device) -> Case:
    """Four texts of several lengths."""
    alone, padded, packed = texts(model.config.vocab_size, (12, 7, 9, 5), generator, device)
    row, _ = shared(alone, [-1] * 4)
    forms = [Form("one padded batch", lambda model: padded), Form("packed into one row", lambda model: packed)]
    forms.append(Form("a common beginning once", lambda model: row))
    return Case(alone, [3.0] * len(alone), forms, floor=LLAMA_FLOOR)


def vision_language_case(
    model: VisionLanguageModel | LlavaMedForConditionalGeneration, generator: torch.Generator, device: torch.device
) -> Case:
    """Four texts, two on one image, one without any. LaVIN's and LLaVA-Med's have places for the image's tokens."""
    size, index = model.config.vision_config.image_size, torch.tensor([1, -1, 0, 1], device=device)
    places = family_of(model).image_tokens(model.config)
    vision = next(part for part in parts_of(model) if part.name == "vision").of(model)
    alone, padded, packed = texts(model.config.text_config.vocab_size, (places + 9, 7, places + 6, places + 7), generator, device)
    images = torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64).to(device)
    for sample, image in zip(alone, index.tolist()):
        if image >= 0:
            sample["pixel_values"] = images[image : image + 1]
    if places:
        for sample in alone:
            seen = torch.zeros_like(sample["input_ids"], dtype=torch.bool)
            seen[:, 1 : 1 + places] = "pixel_values" in sample
            sample["image_mask"] = seen
        masks = [sample["image_mask"][0] for sample in alone]
        padded["image_mask"], packed["image_mask"] = pad_sequence(masks, batch_first=True), torch.cat(masks)[None]
    seen = {"pixel_values": images, "image_index": index}
    row, order = shared(alone, index.tolist())
    row |= {"pixel_values": images, "image_index": index[order]}
    forms = [Form("one padded batch", lambda model: padded | seen), Form("packed into one row", lambda model: packed | seen)]
    forms.append(Form("a common beginning once", lambda model: row))
    skipped = []
    if any(p.requires_grad for p in vision.parameters()):
        skipped.append(("image features kept", "the image encoder is trained"))
    else:

        @torch.no_grad()
        def kept(model):
            return padded | {"image_embeds": model.encode_images(images.to(base_dtype(model))), "image_index": index}

        forms.append(Form("image features kept", kept))
    return Case(alone, [3.0] * len(alone), forms, skipped, floor=LLAMA_FLOOR)


FAMILIES: dict[type[nn.Module], Callable[..., Case]] = {
    BlipForQuestionAnswering: blip_case,
    LlamaForCausalLM: llama_case,
    ExcitorForConditionalGeneration: vision_language_case,
    LavinForConditionalGeneration: vision_language_case,
    LlavaMedForConditionalGeneration: vision_language_case,
}
