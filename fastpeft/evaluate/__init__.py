"""Answers generated and scored."""

from fastpeft.evaluate.metrics import normalise_answer, score, write_predictions

__all__ = ["normalise_answer", "score", "write_predictions"]
