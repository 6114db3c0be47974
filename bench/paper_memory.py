"""MILE's memory columns beside what a step of transformers' own execution, and of ours, is computed to hold.

    python bench/paper_memory.py        # every row of its tables 1 to 4, as recipes/studies/mile_1.yaml to mile_4.yaml have them

Batch 20 at 480 px in float32, as the paper trained; questions of 35 tokens, where it cuts them, answers of 6. Computed on tensors without
data (fastpeft.estimate): weights, gradients, optimiser and what backward keeps, all at once, as an allocator that reuses blocks by size
comes to hold them. On top of it a GPU holds the CUDA context and what its allocator cannot join together. Writes
bench/results/paper_memory.json and .md.
"""

from __future__ import annotations

import datetime
from pathlib import Path

import torch
import transformers

import fastpeft as fp
from fastpeft.files import write_json, write_text
from fastpeft.study.file import read_study

STUDIES = Path(__file__).parents[1] / "recipes" / "studies"
RESULTS = Path(__file__).parent / "results"
STEP = {"batch_size": 20, "seq_len": 35, "answer_len": 6, "dtype": "fp32"}


def held(row: dict, **how) -> float:
    """GB of weights, gradients, optimiser and activations."""
    options = {"r": row["rank"]} if row["rank"] else {}
    e = fp.estimate("miss", row["plan"], **STEP, **how, **options)
    return max(e.peak_bytes - e.process_bytes, e.weight_bytes + e.gradient_bytes + e.optimizer_bytes + e.saved_bytes) / 1e9


def paper_rows() -> list[dict]:
    """Plan, rank and the paper's memory in GB (None where it prints none) of every row of tables 1 to 4."""
    rows = []
    for number in range(1, 5):
        for row in read_study(STUDIES / f"mile_{number}.yaml").rows:
            about = {"table": number, "plan": row.options["plan"], "rank": row.options.get("rank")}
            rows.append(about | {"paper": row.paper.get("memory")})
    return rows


def main() -> None:
    transformers.logging.set_verbosity_error()
    table = []
    for row in sorted(paper_rows(), key=lambda row: (row["paper"] is None, row["paper"])):
        plain, ours = held(row, optimized=False, feature_cache=False), held(row)
        table.append(row | {"plain": plain, "ours": ours})
        print(f"{row['plan']:>16} {row['rank'] or '':>2}  paper {row['paper']}  plain {plain:6.2f}  ours {ours:6.2f} GB", flush=True)
    lines = ["| table | plan | r | the paper, GB | transformers' execution, GB | fastpeft, GB |", "|---|---|---|---|---|---|"]
    shown = [(t, "-" if t["paper"] is None else f"{t['paper']:.2f}") for t in table]
    lines += [f"| {t['table']} | {t['plan']} | {t['rank'] or ''} | {paper} | {t['plain']:.2f} | {t['ours']:.2f} |" for t, paper in shown]
    about = {"date": str(datetime.date.today()), "step": STEP, "torch": torch.__version__, "transformers": transformers.__version__}
    write_json(RESULTS / "paper_memory.json", about | {"rows": table})
    write_text(RESULTS / "paper_memory.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
