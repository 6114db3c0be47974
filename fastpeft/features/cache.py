"""Cache of frozen stages' outputs: constants of an image, or of a question about it, are computed once and kept."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

import fastpeft
from fastpeft.caching.digest import digest_of_weights
from fastpeft.caching.store import FeatureStore
from fastpeft.features.frozen_stages import ImageFeatures, QuestionStates, longest_frozen_stages
from fastpeft.methods import Frozen
from fastpeft.options import bytes_of
from fastpeft.progress import progress_bar
from fastpeft.ranks import ALONE, Ranks

CHUNK = 16  # images encoded at a time


def identity_of(stages: ImageFeatures, dtype: torch.dtype) -> dict[str, Any]:
    """What outputs depend on beside their items: every weight of the stages, to the bit, their modules, preprocessing, dtypes, versions."""
    model = stages.model
    roots = [part.of(model) for part in stages.parts(model)]
    weights = digest_of_weights(named for root in roots for named in sorted(root.state_dict().items()))
    modules = " ".join([type(model).__name__, *map(repr, roots), str(model.config.to_dict())])
    return {
        "weights": weights,
        "modules": hashlib.blake2b(modules.encode(), digest_size=16).hexdigest(),
        "preprocess": stages.dataset.preprocess.to_dict(),
        "dtypes": [str(next(roots[0].parameters()).dtype), str(dtype)],
        "versions": [fastpeft.__version__, torch.__version__],
    }


class FeatureCache:
    """Outputs of the longest frozen stages by item (``stages``: :class:`ImageFeatures` by image, :class:`QuestionStates` by image and
    question): in memory up to ``limit_bytes``, what does not fit in ``folder``, and without one computed again each time.

    With a ``folder`` all are written there (safetensors, see :class:`fastpeft.caching.store.FeatureStore`), found again by the item's
    content and :func:`identity_of`, by later runs and by other processes; ``ranks`` on one machine share a folder of the run's own
    where none is given. Outputs are those of evaluation mode and equal those of an uncached step up to the rounding of another
    batch size; ``dtype``: kept so (None: the model's), which rounds where it is narrower.
    ``computed``, ``reused`` and ``loaded`` count items, of several readers each one's own. ValueError where the model has no frozen stage.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset,
        limit_bytes: int | None = None,
        folder: str | Path | None = None,
        dtype: torch.dtype | None = None,
        ranks: Ranks = ALONE,
    ):
        found = longest_frozen_stages(model, dataset)
        if found is None:
            raise ValueError(f"there are no image features to keep: {ImageFeatures.why_not(model, dataset)}")
        self.model, self.dataset, self.stages = model, dataset, found(model, dataset)
        self.limit_bytes = psutil.virtual_memory().available // 3 // ranks.local_world if limit_bytes is None else limit_bytes
        self.ranks = ranks
        self.dtype = next(model.parameters()).dtype if dtype is None else dtype
        self.folder = None if folder is None else Path(folder)
        self.store: FeatureStore | None = None
        self.kept: dict[Hashable, Tensor] = {}
        self.bytes = 0
        self.readers, self.reader = 1, ""  # runs on one base that take from it in turn, and whose turn it is
        self._counts: dict[str, Counter[str]] = defaultdict(Counter)  # by reader
        self.recent: tuple[list[Hashable], list[Tensor]] = ([], [])  # what was read last, where the next reader may have the same batch
        self.notes: list[str] = []
        asked = model.fastpeft_plan.treatments.get("jtm", ())
        if found is ImageFeatures and asked and all(isinstance(method, Frozen) for method in asked):
            self.notes.append(f"question states are not kept: {QuestionStates.why_not(model, dataset)}")

    @property
    def computed(self) -> int:
        return self._counts[self.reader]["computed"]

    @property
    def reused(self) -> int:
        return self._counts[self.reader]["reused"]

    @property
    def loaded(self) -> int:
        return self._counts[self.reader]["loaded"]

    def _count(self, **items: int) -> None:
        self._counts[self.reader].update(items)

    def prepare(self, progress: bool = True) -> None:
        """Compute the outputs of all samples' distinct items now, saying how large they will be. ValueError names an unreadable image.
        The ranks on a machine compute a part each, and read the others' from a folder."""
        if self.readers > 1 and all(item in self.kept for item in self.stages.items()):
            return  # another reader has
        with self._shared_on_machine() as lent:
            self._prepare(progress, lent)
            self.flush()
        self._open()
        if self.store is not None:
            self.store.refresh()

    @contextmanager
    def _shared_on_machine(self) -> Iterator[bool]:
        """Inside, each rank writes its part; after it all are written. True where the folder is one for this run alone."""
        ranks = self.ranks
        if ranks.alone:
            yield False
            return
        lend = self.folder is None and ranks.local_rank == 0 and ranks.local_world > 1
        self._lent = tempfile.TemporaryDirectory(prefix="fastpeft-features-") if lend else None  # removed with this object
        names = ranks.gather(self._lent.name if lend else None)
        if (name := names[ranks.rank - ranks.local_rank]) is not None:
            self.folder = Path(name)
        yield name is not None
        ranks.wait()

    def _prepare(self, progress: bool, lent: bool) -> None:
        """This rank's part. ``lent``: the folder is there to share alone, so what it holds is worth keeping in memory."""
        stages, items = self.stages, list(dict.fromkeys(self.stages.items()))
        at, of = (self.ranks.local_rank, self.ranks.local_world) if self.folder is not None else (0, 1)
        chunks = list(self._chunks(items))[at::of]
        if not chunks:
            return
        first = chunks[0][0]
        one = self.read([first])[0].numel() * self.dtype.itemsize // stages.tokens(first)
        size = one * sum(map(stages.tokens, items))
        where = "memory" if size <= self.limit_bytes else "memory and computed again beyond its limit"
        if self.folder is not None:
            where = str(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
            if size > free:
                self.notes.append(f"{self.folder} has {free / 1e9:.1f} GB free, all {stages.what} take {size / 1e9:.1f}: kept in memory")
                self.folder = self.store = None
            elif not lent and self._slower_to_load(first):
                self.notes.append(f"{stages.what} are computed again at every visit: that is faster here than to load them")
                self.folder, self.store, self.limit_bytes, self.kept, self.bytes = None, None, 0, {}, 0
                return
        told = f"encoding {len(items)} {stages.unit}s ({size / 1e6:.0f} MB, {where})"
        with progress_bar(total=sum(map(len, chunks)), desc=told, unit=stages.unit, disable=not progress, leave=False) as bar:
            for chunk in chunks:
                self.read(chunk)
                bar.update(len(chunk))

    def _chunks(self, items: Sequence[Hashable]) -> Iterator[list[Hashable]]:
        """Those of 16 images at a time, an image's together."""
        by_image: dict[Path, list[Hashable]] = {}
        for item in items:
            by_image.setdefault(self.stages.image(item), []).append(item)
        groups = list(by_image.values())
        for at in range(0, len(groups), CHUNK):
            yield [item for group in groups[at : at + CHUNK] for item in group]

    def _slower_to_load(self, item: Hashable) -> bool:
        """Whether encoding an item takes less than reading its outputs back; measured on one, each after a first time."""
        self._open()
        if self.store is None:
            return False
        outputs = self._encode([item])
        began = time.perf_counter()
        self._encode([item])
        encoding, began = time.perf_counter() - began, time.perf_counter()
        next(iter(outputs.values())).clone()  # at best, a file in the page cache
        return encoding < time.perf_counter() - began

    def put_in(self, inputs: dict[str, Tensor], batch: dict) -> dict[str, Tensor]:
        """The model's ``inputs`` made of ``batch``, with what is kept in place of what it was computed from."""
        items = self.stages.items_of(batch)
        if not items:
            return inputs
        return {name: t for name, t in inputs.items() if name not in self.stages.replaced} | {self.stages.argument: self(items)}

    def __call__(self, items: Sequence[Hashable]) -> Tensor:
        """[U, N, C], or [B, L, C] with zeros beyond a question's end; on the model's device, in its dtype."""
        reference = next(self.model.parameters())
        return nn.utils.rnn.pad_sequence(self.read(items), batch_first=True).to(reference.device, reference.dtype)

    @torch.no_grad()
    def read(self, items: Sequence[Hashable]) -> list[Tensor]:
        """Each item's output as it is kept, on the CPU: do not write to it."""
        if self.readers > 1 and list(items) == self.recent[0]:
            self._count(reused=len(items))
            return self.recent[1]
        found = {item: self.kept[item] for item in items if item in self.kept}
        missing = [item for item in dict.fromkeys(items) if item not in found]
        if missing and self.folder is not None:
            self._open()
        if self.store is not None:
            stored = {item: self.store.get(self.stages.key(item)) for item in missing}
            loaded = {item: tensor for item, tensor in stored.items() if tensor is not None}
            self._count(loaded=len(loaded))
            found |= loaded
            missing = [item for item in missing if item not in loaded]
            self._keep(loaded)
        fresh = self._encode(missing)
        found |= fresh
        if self.store is not None:  # what was read from a file that then turned out to be damaged goes into a new one
            absent = {item: tensor for item, tensor in found.items() if self.stages.key(item) not in self.store}
            self._write(lambda: self.store.put({self.stages.key(item): tensor.clone() for item, tensor in absent.items()}))
        self._keep(fresh)
        self._count(computed=len(missing), reused=len(items) - len(missing))
        outputs = [found[item] for item in items]
        self.recent = (list(items), outputs) if self.readers > 1 else ([], [])
        return outputs

    def _encode(self, items: Sequence[Hashable]) -> dict[Hashable, Tensor]:
        """Each of its own memory: a view would hold its whole chunk."""
        reference, found = next(self.model.parameters()), {}
        for chunk in self._chunks(items):
            images = dict.fromkeys(map(self.stages.image, chunk))
            pixels = torch.stack([self.dataset.pixels(path) for path in images]).to(reference.device, reference.dtype)
            with torch.no_grad():
                outputs = self.stages.outputs(chunk, self.model.encode_images(pixels))
                found |= {item: tensor.to("cpu", self.dtype, copy=True) for item, tensor in zip(chunk, outputs)}
        return found

    def _keep(self, outputs: dict[Hashable, Tensor]) -> None:
        for item, tensor in outputs.items():
            if self.bytes + tensor.nbytes <= self.limit_bytes:
                self.kept[item] = tensor
                self.bytes += tensor.nbytes

    def _open(self) -> None:
        if self.store is None and self.folder is not None:
            self.store = FeatureStore(self.folder, identity_of(self.stages, self.dtype))

    def _write(self, write) -> None:
        try:
            write()
        except OSError as error:
            warnings.warn(
                f"{self.folder} cannot be written ({error.strerror or error}): {self.stages.what} are kept in memory only", stacklevel=3
            )
            self.folder = self.store = None

    def flush(self) -> None:
        """Write what waits, so that others see it."""
        if self.store is not None:
            self._write(self.store.flush)

    def complete(self) -> bool:
        """Whether no item has to be computed again."""
        stored = self.store if self.store is not None else ()
        return all(item in self.kept or self.stages.key(item) in stored for item in dict.fromkeys(self.stages.items()))

    def counts(self) -> dict[str, Any]:
        """Items computed, reused, and of these read from the folder; what they are, and in what unit."""
        return {
            "what": self.stages.what, "unit": self.stages.unit,
            "computed": self.computed, "reused": self.reused, "loaded": self.loaded,
        }  # fmt: skip

    def note(self) -> str:
        """What it did, for the summary."""
        kept = f"{len(self.kept)} {self.stages.unit}s, {self.bytes / 1e6:.0f} MB in memory"
        kept += f", all in {self.folder}" if self.store is not None else ""
        counts = f"encoded {self.computed} times, reused {self.reused} times" + (f", {self.loaded} from disk" if self.loaded else "")
        shared = [f"shared by {self.readers} runs on one base"] if self.readers > 1 else []
        return "; ".join([f"{self.stages.what} kept ({kept}): {counts}; not in flops_per_sample", *shared, *self.notes])


def sees_constants(model: nn.Module, dataset, config) -> bool:
    """Whether a run of these options (feature_cache) has outputs of frozen stages to keep."""
    return config.feature_cache and any(s.image is not None for s in dataset.samples) and longest_frozen_stages(model, dataset) is not None


def cache_of(model: nn.Module, dataset, config, ranks: Ranks = ALONE) -> FeatureCache | None:
    """The cache that a run's options (feature_cache, feature_cache_memory, feature_cache_dir, feature_dtype) ask for, where there is
    something to keep."""
    if not sees_constants(model, dataset, config):
        return None
    limit = None if config.feature_cache_memory is None else bytes_of(config.feature_cache_memory)
    kept = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}[config.feature_dtype]
    return FeatureCache(model, dataset, limit, config.feature_cache_dir, kept, ranks)
