"""A frozen image encoder's output is a constant of the image: compute it once, keep it, and train on what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from fastpeft.data import VQADataset
from fastpeft.methods import Frozen

IMAGE_PART, CHUNK = "vit", 16


def why_not(model: nn.Module) -> str:
    """'' where the model's image features are constants; else the reason they are not."""
    methods = model.fastpeft_plan.treatments.get(IMAGE_PART)
    if methods is None:
        return f"the model has no part {IMAGE_PART!r}"
    if methods == (Frozen(),):
        return ""
    return "the frozen image encoder was asked to keep its dropout: its features are random" if Frozen(True) in methods else "it is trained"


class FeatureCache:
    """Features [N, C] by image path, in memory up to ``limit_bytes``; what does not fit is computed again each time.

    The features are those of evaluation mode, in the model's dtype, and equal those of an uncached step up to the rounding of another
    batch size. ``computed`` and ``reused`` count images.
    """

    def __init__(self, model: nn.Module, dataset: VQADataset, limit_bytes: int | None = None):
        self.model, self.dataset = model, dataset
        self.limit_bytes = psutil.virtual_memory().available // 3 if limit_bytes is None else limit_bytes
        self.kept: dict[Path, Tensor] = {}
        self.bytes = self.computed = self.reused = 0

    @torch.no_grad()
    def __call__(self, paths: Sequence[Path]) -> Tensor:
        """[U, N, C] on the model's device."""
        reference = next(self.model.parameters())
        found = {path: self.kept[path] for path in paths if path in self.kept}
        missing = [path for path in dict.fromkeys(paths) if path not in found]
        for at in range(0, len(missing), CHUNK):
            chunk = missing[at : at + CHUNK]
            pixels = torch.stack([self.dataset.pixels(path) for path in chunk]).to(reference.device, reference.dtype)
            found |= dict(zip(chunk, self.model.encode_images(pixels).cpu().unbind()))
        for path in missing:
            size = found[path].nbytes
            if self.bytes + size <= self.limit_bytes:
                self.kept[path] = found[path].clone()  # of its own: a view would hold its whole chunk
                self.bytes += size
        self.computed += len(missing)
        self.reused += len(paths) - len(missing)
        return torch.stack([found[path] for path in paths]).to(reference.device)

    def note(self) -> str:
        """What it did, for the summary."""
        kept = f"{len(self.kept)} images, {self.bytes / 1e6:.0f} MB"
        return f"image features kept ({kept}): encoded {self.computed} times, reused {self.reused} times; not in flops_per_sample"
