"""What answers are scored with, beside the answers themselves: training answers, and the metrics of generated text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastpeft.evaluate.captions import references_of
from fastpeft.evaluate.free_text import Candidates, score_free_text
from fastpeft.evaluate.text_metrics import text_metrics

QUESTIONS = {"vqa", "llava"}  # of other kinds an answer is a text of its own, near to no other's


@dataclass(frozen=True)
class Scoring:
    """training: the samples whose answers are candidates. metrics: arguments of :func:`fastpeft.evaluate.text_metrics.text_metrics`.
    draw_unparsed: of :func:`fastpeft.evaluate.scienceqa.score_scienceqa`."""

    training: Sequence = ()
    metrics: dict[str, Any] = field(default_factory=dict)
    draw_unparsed: int | None = None

    def apart_from(self, asked: Sequence) -> Scoring:
        """Without the asked samples themselves, unless there are no others: a held-out part's own answers are no candidates."""
        entries = {(sample.source, sample.entry) for sample in asked}
        others = [sample for sample in self.training if (sample.source, sample.entry) not in entries]
        return replace(self, training=others or self.training)

    def score(self, responses: Sequence[str], samples: Sequence, tokenizer, *, sentences: bool, device="cpu") -> dict[str, Any]:
        """Fields of `score_free_text` and "metrics"; ``sentences``: the model answers in sentences. Captions and reports are compared with
        all references of their image."""
        kinds = {getattr(sample, "kind", "vqa") for sample in samples}
        candidates = Candidates(self.training if kinds & QUESTIONS else ())
        found: dict[str, Any] = score_free_text(responses, samples, candidates, sentences)
        chosen, references = list(responses), [[sample.answer] for sample in samples]
        if samples and kinds <= {"coco", "reports"}:
            first, references = references_of(samples)
            chosen = [responses[i] for i in first]
        return found | {"metrics": text_metrics(chosen, references, tokenizer=tokenizer, device=device, **self.metrics)}
