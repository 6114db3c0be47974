"""Answers generated and scored."""

from fastpeft.data import VQADataset
from fastpeft.evaluate.answers import answer_questions
from fastpeft.evaluate.metrics import normalise_answer, score, write_predictions


def answer_and_score(model, dataset, tokenizer, *, progress: bool = True) -> tuple[list[str], dict]:
    """(answers, scores) of a model on a data set, as the papers generate and score that kind of data."""
    if isinstance(dataset, VQADataset):
        answers = answer_questions(model, dataset, tokenizer, progress=progress)
        return answers, score(answers, dataset.samples)
    raise TypeError(f"{type(dataset).__name__} has no score here; pass a VQADataset")


__all__ = ["answer_and_score", "answer_questions", "normalise_answer", "score", "write_predictions"]
