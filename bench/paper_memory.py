"""MILE's memory columns beside what a step of transformers' own execution, and of ours, is computed to hold.

    python bench/paper_memory.py ROWS.json        # rows with paper, model, plan, rank, paper_memory_gb

Batch 20 at 480 px in float32, as the paper trained; questions of 35 tokens, where it cuts them, answers of 6. Computed on tensors without
data (fastpeft.estimate): weights, gradients, optimiser and what backward keeps, all at once, as an allocator that reuses blocks by size
comes to hold them. On top of it a GPU holds the CUDA context and what its allocator cannot join together. Writes
bench/results/paper_memory.json and .md.
"""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path

import torch
import transformers

import fastpeft as fp
from fastpeft.files import write_json, write_text

RESULTS = Path(__file__).parent / "results"
STEP = {"batch_size": 20, "seq_len": 35, "answer_len": 6, "dtype": "fp32"}


def held(row: dict, **how) -> float:
    """GB of weights, gradients, optimiser and activations."""
    options = {"r": row["rank"]} if row["rank"] else {}
    e = fp.estimate(row["model"], row["plan"], **STEP, **how, **options)
    return max(e.peak_bytes - e.process_bytes, e.weight_bytes + e.gradient_bytes + e.optimizer_bytes + e.saved_bytes) / 1e9


def main(path: str) -> None:
    transformers.logging.set_verbosity_error()
    rows = [row for row in json.loads(Path(path).read_text()) if row["model"] == "miss" and row.get("paper_memory_gb")]
    table = []
    for row in sorted(rows, key=lambda row: row["paper_memory_gb"]):
        plain, ours = held(row, optimized=False, feature_cache=False), held(row)
        table.append({"plan": row["plan"], "rank": row["rank"], "paper": row["paper_memory_gb"], "plain": plain, "ours": ours})
        told = f"paper {row['paper_memory_gb']:6.2f}  plain {plain:6.2f}  ours {ours:6.2f} GB"
        print(f"{row['plan']:>16} {row['rank'] or '':>2}  {told}", flush=True)
    lines = ["| plan | r | the paper, GB | transformers' execution, GB | fastpeft, GB |", "|---|---|---|---|---|"]
    lines += [f"| {t['plan']} | {t['rank'] or ''} | {t['paper']:.2f} | {t['plain']:.2f} | {t['ours']:.2f} |" for t in table]
    about = {"date": str(datetime.date.today()), "step": STEP, "torch": torch.__version__, "transformers": transformers.__version__}
    write_json(RESULTS / "paper_memory.json", about | {"rows": table})
    write_text(RESULTS / "paper_memory.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
