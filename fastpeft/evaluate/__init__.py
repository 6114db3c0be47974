"""Answers generated and scored."""

from fastpeft.evaluate.answers import answer_questions
from fastpeft.evaluate.metrics import normalise_answer, score, write_predictions

__all__ = ["answer_questions", "normalise_answer", "score", "write_predictions"]
