"""A frozen image encoder's output is a constant of the image: compute it once, keep it, and train on what is kept."""

from __future__ import annotations

import hashlib
import shutil
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from tqdm import tqdm

import fastpeft
from fastpeft.data.feature_store import FeatureStore
from fastpeft.methods import Frozen
from fastpeft.models import parts_of

IMAGE_PARTS, CHUNK = ("vit", "vision"), 16


def image_part(model: nn.Module):
    """The part that encodes images; None where there is none."""
    return next((part for part in parts_of(model) if part.name in IMAGE_PARTS), None)


def why_not(model: nn.Module) -> str:
    """'' where the model's image features are constants; else the reason they are not."""
    part = image_part(model)
    if part is None:
        return "the model has no part that encodes images"
    methods = model.fastpeft_plan.treatments[part.name]
    if methods == (Frozen(),):
        return ""
    return "the frozen image encoder was asked to keep its dropout: its features are random" if Frozen(True) in methods else "it is trained"


def identity_of(model: nn.Module, dataset, dtype: torch.dtype) -> dict[str, Any]:
    """What features depend on beside the image: every weight of the encoder, to the bit, its modules, preprocessing, dtypes, versions."""
    root, digest = image_part(model).of(model), hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(root.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return {
        "weights": digest.hexdigest(),
        "modules": hashlib.blake2b(f"{type(model).__name__} {root!r} {model.config.to_dict()}".encode(), digest_size=16).hexdigest(),
        "preprocess": dataset.preprocess.to_dict(),
        "dtypes": [str(next(root.parameters()).dtype), str(dtype)],
        "versions": [fastpeft.__version__, torch.__version__],
    }


class FeatureCache:
    """Features by image: in memory up to ``limit_bytes``, what does not fit in ``folder``, and without one computed again each time.

    With a ``folder`` all are written there (safetensors, see :class:`fastpeft.data.feature_store.FeatureStore`), found again by the image's
    content and :func:`identity_of`, by later runs and by other processes. Features are those of evaluation mode and equal those of an
    uncached step up to the rounding of another batch size; ``dtype``: kept so (None: the model's), which rounds where it is narrower.
    ``computed``, ``reused`` and ``loaded`` count images.
    """

    def __init__(
        self, model: nn.Module, dataset, limit_bytes: int | None = None, folder: str | Path | None = None, dtype: torch.dtype | None = None
    ):
        self.model, self.dataset = model, dataset
        self.limit_bytes = psutil.virtual_memory().available // 3 if limit_bytes is None else limit_bytes
        self.dtype = next(model.parameters()).dtype if dtype is None else dtype
        self.folder = None if folder is None else Path(folder)
        self.store: FeatureStore | None = None
        self.kept: dict[Path, Tensor] = {}
        self.bytes = self.computed = self.reused = self.loaded = 0
        self.notes: list[str] = []
        self._keys: dict[Path, str] = {}

    def prepare(self, paths: Sequence[Path], progress: bool = True) -> None:
        """Compute the features of all distinct ``paths`` now, saying how large they will be. ValueError names an unreadable image."""
        paths = list(dict.fromkeys(paths))
        if not paths:
            return
        one = self([paths[0]])[0].numel() * self.dtype.itemsize
        size, where = one * len(paths), "memory" if one * len(paths) <= self.limit_bytes else "memory and computed again beyond its limit"
        if self.folder is not None:
            where = str(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
            if size > free:
                self.notes.append(
                    f"{self.folder} has {free / 1e9:.1f} GB free, the features of all images take {size / 1e9:.1f}: kept in memory"
                )
                self.folder = self.store = None
            elif self._slower_to_load(paths[0]):
                self.notes.append("image features are computed again at every visit: that is faster here than to load them")
                self.folder, self.store, self.limit_bytes, self.kept, self.bytes = None, None, 0, {}, 0
                return
        told = f"encoding {len(paths)} images ({size / 1e6:.0f} MB, {where})"
        with tqdm(total=len(paths), desc=told, unit="image", disable=not progress, leave=False) as bar:
            for at in range(0, len(paths), CHUNK):
                self(paths[at : at + CHUNK])
                bar.update(len(paths[at : at + CHUNK]))
        self.flush()

    def _slower_to_load(self, path: Path) -> bool:
        """Whether encoding an image takes less than reading its features back; measured on one, each after a first time."""
        self._open()
        if self.store is None:
            return False
        features = self._encode([path])
        began = time.perf_counter()
        self._encode([path])
        encoding, began = time.perf_counter() - began, time.perf_counter()
        next(iter(features.values())).clone()  # at best, a file in the page cache
        return encoding < time.perf_counter() - began

    @torch.no_grad()
    def __call__(self, paths: Sequence[Path]) -> Tensor:
        """[U, N, C] on the model's device, in its dtype."""
        reference = next(self.model.parameters())
        found = {path: self.kept[path] for path in paths if path in self.kept}
        missing = [path for path in dict.fromkeys(paths) if path not in found]
        if missing and self.folder is not None:
            self._open()
        if self.store is not None:
            stored = {path: self.store.get(self._key(path)) for path in missing}
            loaded = {path: tensor for path, tensor in stored.items() if tensor is not None}
            self.loaded += len(loaded)
            found |= loaded
            missing = [path for path in missing if path not in loaded]
            self._keep(loaded)
        fresh = self._encode(missing)
        found |= fresh
        if self.store is not None:  # what was read from a file that then turned out to be damaged goes into a new one
            absent = {path: tensor for path, tensor in found.items() if self._key(path) not in self.store}
            self._write(lambda: self.store.put({self._key(path): tensor.clone() for path, tensor in absent.items()}))
        self._keep(fresh)
        self.computed += len(missing)
        self.reused += len(paths) - len(missing)
        return torch.stack([found[path] for path in paths]).to(reference.device, reference.dtype)

    def _encode(self, paths: Sequence[Path]) -> dict[Path, Tensor]:
        """Each of its own memory: a view would hold its whole chunk."""
        reference, found = next(self.model.parameters()), {}
        for at in range(0, len(paths), CHUNK):
            chunk = paths[at : at + CHUNK]
            pixels = torch.stack([self.dataset.pixels(path) for path in chunk]).to(reference.device, reference.dtype)
            with torch.no_grad():
                features = self.model.encode_images(pixels).to("cpu", self.dtype)
            found |= {path: tensor.clone() for path, tensor in zip(chunk, features)}
        return found

    def _keep(self, features: dict[Path, Tensor]) -> None:
        for path, tensor in features.items():
            if self.bytes + tensor.nbytes <= self.limit_bytes:
                self.kept[path] = tensor
                self.bytes += tensor.nbytes

    def _open(self) -> None:
        if self.store is None and self.folder is not None:
            self.store = FeatureStore(self.folder, identity_of(self.model, self.dataset, self.dtype))

    def _key(self, path: Path) -> str:
        if path not in self._keys:
            self._keys[path] = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        return self._keys[path]

    def _write(self, write) -> None:
        try:
            write()
        except OSError as error:
            warnings.warn(
                f"{self.folder} cannot be written ({error.strerror or error}): image features are kept in memory only", stacklevel=3
            )
            self.folder = self.store = None

    def flush(self) -> None:
        """Write what waits, so that others see it."""
        if self.store is not None:
            self._write(self.store.flush)

    def note(self) -> str:
        """What it did, for the summary."""
        kept = f"{len(self.kept)} images, {self.bytes / 1e6:.0f} MB in memory" + (
            f", all in {self.folder}" if self.store is not None else ""
        )
        counts = f"encoded {self.computed} times, reused {self.reused} times" + (f", {self.loaded} from disk" if self.loaded else "")
        return "; ".join([f"image features kept ({kept}): {counts}; not in flops_per_sample", *self.notes])
