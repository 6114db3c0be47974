"""Merging of an adapter into its base, as a plain transformers folder (`fastpeft merge`)."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import SafetensorError

from fastpeft.adapters import adapter_in, describe, merge, save_adapter
from fastpeft.data import save_tokenizer
from fastpeft.files import atomic_folder, write_json
from fastpeft.models import family_of
from fastpeft.plan import detach
from fastpeft.runs.evaluate import load_run
from fastpeft.runs.vqa import PREPROCESS


def merge_run(adapter: str | Path, out: str | Path, model: str | None = None, modality: str | None = None) -> Path:
    """Fold an adapter, or a run's, into its base and write a plain transformers folder with tokenizer and preprocessing. What no weight can
    hold (see :func:`fastpeft.merge`) stays in ``out/adapter``. ValueError if out exists."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder: choose another --out")
    adapter = adapter_in(adapter)
    network, tokenizer, preprocess = load_run(adapter, "cpu", model)
    merge(network, modality)
    with atomic_folder(out) as draft:
        if network.fastpeft_plan is not None:
            about = describe(adapter)
            network.fastpeft_source = {"model": str(out.resolve()), "dtype": about["base"].get("dtype", "float32")}
            more = {key: about[key] for key in about.keys() - {"format", "plan", "treatments", "base", "base_fingerprint"}}
            tokens = lambda folder: shutil.copytree(Path(adapter) / about["tokenizer"], folder / about["tokenizer"])  # noqa: E731
            save_adapter(network, draft / "adapter", description=more, write_more=tokens)
            detach(network)
        network.config.architectures = [family_of(network).known.__name__]
        try:
            network.save_pretrained(draft)
        except SafetensorError as error:  # of a full disk
            raise OSError(f"{out} cannot be written: {error}") from None
        save_tokenizer(tokenizer, draft)
        if preprocess is not None:
            write_json(draft / PREPROCESS, preprocess.to_dict())
    return out
