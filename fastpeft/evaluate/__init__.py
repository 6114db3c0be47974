"""Evaluation: answers, responses and captions, generated and scored."""

from fastpeft.data import VQADataset
from fastpeft.evaluate.answers import answer_questions
from fastpeft.evaluate.captions import references_of, score_captions
from fastpeft.evaluate.decoding import answer_settings, response_settings
from fastpeft.evaluate.metrics import normalise_answer, score, score_responses, write_predictions
from fastpeft.evaluate.responses import respond, respond_and_score, write_responses
from fastpeft.evaluate.scienceqa import parse_answer, score_scienceqa
from fastpeft.evaluate.scoring import Scoring


def answer_and_score(model, dataset, tokenizer, *, progress: bool = True, scoring: Scoring | None = None, **how) -> tuple[list[str], dict]:
    """(answers, scores) of a model on a data set, as the papers generate and score that kind of data; ``how``: of generation, and
    ``ranks``, which share the questions; each then has all answers."""
    scoring = scoring or Scoring()
    if not isinstance(dataset, VQADataset):
        return respond_and_score(model, dataset, progress=progress, scoring=scoring, **how)
    answers, device = answer_questions(model, dataset, tokenizer, progress=progress, **how), next(model.parameters()).device
    more = scoring.score(answers, dataset.samples, tokenizer, sentences=False, device=device)
    return answers, score(answers, dataset.samples) | more


def generation_settings(dataset, tokenizer, **given) -> dict:
    """The arguments of transformers' ``generate`` that answer a data set: ``given`` over that kind's defaults."""
    return answer_settings(**given) if isinstance(dataset, VQADataset) else response_settings(tokenizer, stop=dataset.ending.stop, **given)


def write_answers(path, dataset, answers: list[str]) -> None:
    """The answers of a data set as a JSON list, each beside what was asked."""
    (write_predictions if isinstance(dataset, VQADataset) else write_responses)(path, dataset.samples, answers)


__all__ = [
    "Scoring",
    "answer_and_score",
    "answer_questions",
    "generation_settings",
    "normalise_answer",
    "parse_answer",
    "references_of",
    "respond",
    "respond_and_score",
    "score",
    "score_captions",
    "score_responses",
    "score_scienceqa",
    "write_answers",
    "write_predictions",
    "write_responses",
]
