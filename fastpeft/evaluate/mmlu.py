"""MMLU by likelihood: the choice whose letter is the likeliest after the prompt. Per task, per category and over all, against a base."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastpeft.data.causal_tokenizer import encode_texts
from fastpeft.data.mmlu import CATEGORY, LETTERS, MMLU, SUBJECTS


@torch.no_grad()
def choice_likelihoods(
    model: nn.Module, tokenizer, prompts: Sequence[str], choices: Sequence[str], *, batch_size: int = 8, progress: bool = True
) -> Tensor:
    """float32 [prompts, choices] on the CPU: log p(choice | prompt) by a causal language model, the sum over the choice's tokens.

    Prompt and choice are tokenised as one text, after the start token; what the choices of a prompt have in common counts for none of them.
    Where each is then one token, a prompt is run once. Batches are padded on the left and masked. ValueError for a text that the model's
    positions do not hold.
    """
    places = [_encoded(tokenizer, prompt, choices) for prompt in prompts]
    rows = [row for place in places for row in place]
    limit = max_tokens(model)
    if long := [len(ids) for ids, _, _ in rows if len(ids) > limit]:
        raise ValueError(f"a prompt takes {max(long)} tokens, and the model reads {limit}: cut it")
    found = torch.empty(len(prompts), len(choices))
    owner = [at for at, place in enumerate(places) for _ in place]
    order, was, device = sorted(range(len(rows)), key=lambda i: -len(rows[i][0])), model.training, next(model.parameters()).device
    model.eval()
    try:
        for start in tqdm(range(0, len(order), batch_size), desc="choosing", unit="batch", disable=not progress, leave=False):
            batch = order[start : start + batch_size]
            wanted = max(len(tails[0]) for _, tails, _ in (rows[i] for i in batch))
            scores = _log_probabilities(model, [rows[i][0] for i in batch], wanted, device)
            for i, of_row in zip(batch, scores):
                _, tails, numbers = rows[i]
                for number, tail in zip(numbers, tails):
                    at = torch.arange(len(of_row) - len(tail), len(of_row))
                    found[owner[i], number] = of_row[at, torch.tensor(tail)].sum()
    finally:
        model.train(was)
    return found


def max_tokens(model: nn.Module) -> int:
    """Positions of the language model."""
    config = getattr(model.config, "text_config", None) or model.config
    return config.max_position_embeddings


def _encoded(tokenizer, prompt: str, choices: Sequence[str]) -> list[tuple[list[int], list[list[int]], list[int]]]:
    """Rows to run: (ids, the tokens whose likelihood counts after ids' end or at it, the choices' numbers)."""
    texts = [[tokenizer.bos_token_id, *ids] for ids in encode_texts(tokenizer, [prompt + choice for choice in choices])]
    same = min(map(len, texts)) - 1  # a token of each at least
    same = next((i for i in range(same) if len({ids[i] for ids in texts}) > 1), same)
    tails = [ids[same:] for ids in texts]
    if all(len(tail) == 1 for tail in tails):
        return [(texts[0][:same], tails, list(range(len(choices))))]
    return [(ids[:-1], [tail], [number]) for number, (ids, tail) in enumerate(zip(texts, tails))]


def _log_probabilities(model: nn.Module, rows: list[list[int]], wanted: int, device) -> Tensor:
    """[rows, wanted, vocabulary] of the token after each of the last ``wanted`` positions, float32 on the CPU."""
    width = max(map(len, rows))
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    ids = torch.tensor([[row[0]] * (width - len(row)) + row for row in rows], device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=wanted)
    return out.logits[:, -wanted:].float().log_softmax(-1).cpu()


def answer_mmlu(model: nn.Module, tokenizer, data: MMLU, shots: int = 5, *, batch_size: int = 8, progress: bool = True) -> dict[str, Any]:
    """{"answers": the number of the likeliest choice of each question, "fewer_shots", "cut"}: how many prompts left examples out, as the
    official code does where a prompt is too long for the model, and how many lost the beginning of their question as well."""
    room = max_tokens(model) - 2  # the start token, and one of the answer's
    prompts, fewer, cut = [], 0, 0
    for question in data.questions:
        used = shots
        while used and _length(tokenizer, data.prompt(question, used)) > room:
            used -= 1
        prompt = data.prompt(question, used)
        fewer += used < shots
        if not used and (over := _length(tokenizer, prompt) - room) > 0:
            prompt, cut = _without_beginning(tokenizer, prompt, over), cut + 1
        prompts.append(prompt)
    scores = choice_likelihoods(model, tokenizer, prompts, [f" {c}" for c in LETTERS], batch_size=batch_size, progress=progress)
    return {"answers": scores.argmax(1).tolist(), "fewer_shots": fewer, "cut": cut}


def _length(tokenizer, text: str) -> int:
    return len(encode_texts(tokenizer, [text])[0])


def _without_beginning(tokenizer, text: str, over: int) -> str:
    """The end of a text, ``over`` tokens shorter at least."""
    room = _length(tokenizer, text) - over
    while (length := _length(tokenizer, text)) > room:
        text = text[max(1, (length - room) * len(text) // (2 * length)) :]
    return text


def score_mmlu(answers: Sequence[int], data: MMLU, base: Sequence[int] | None = None) -> dict[str, Any]:
    """Accuracies as fractions of 1.

    average: over all questions, as the official code has it; task_mean: the mean of the tasks'; categories and subjects: over their
    questions; tasks: each with its "accuracy" and "n". With the answers of a ``base`` on the same questions: "base" has its average,
    task_mean and categories; "change" and "relative_change" are of the task_mean (paper 003, figure 5: relative), "wins", "ties" and
    "losses" count tasks, and each task has its base's accuracy. ValueError unless there is one answer for each question.
    """
    for given in (answers, base):
        if given is not None and len(given) != len(data.questions):
            raise ValueError(f"{len(given)} answers for {len(data.questions)} questions: give the number of a choice for each")
    found = _accuracies(answers, data)
    if base is None:
        return found
    other = _accuracies(base, data)
    pairs = [(task["accuracy"], other["tasks"][name]["accuracy"]) for name, task in found["tasks"].items()]
    for name, task in found["tasks"].items():
        task["base"] = other["tasks"][name]["accuracy"]
    change = found["task_mean"] - other["task_mean"]
    return found | {
        "base": {name: other[name] for name in ("average", "task_mean", "categories")},
        "change": change,
        "relative_change": change / other["task_mean"] if other["task_mean"] else None,
        "wins": sum(a > b for a, b in pairs),
        "ties": sum(a == b for a, b in pairs),
        "losses": sum(a < b for a, b in pairs),
    }


def _accuracies(answers: Sequence[int], data: MMLU) -> dict[str, Any]:
    hits: dict[str, list[bool]] = {task: [] for task in data.tasks}
    for question, answer in zip(data.questions, answers):
        hits[question.task].append(answer == question.answer)
    by_category = {c: [hit for task, of_task in hits.items() if CATEGORY[task] == c for hit in of_task] for c in SUBJECTS}
    by_subject = {s: [hit for task in tasks for hit in hits.get(task, ())] for of in SUBJECTS.values() for s, tasks in of.items()}
    return {
        "average": fmean(hit for of_task in hits.values() for hit in of_task),
        "task_mean": fmean(fmean(of_task) for of_task in hits.values()),
        "n": len(data.questions),
        "n_tasks": len(data.tasks),
        "categories": {name: fmean(found) for name, found in by_category.items() if found},
        "subjects": {name: fmean(found) for name, found in by_subject.items() if found},
        "tasks": {task: {"accuracy": fmean(of_task), "n": len(of_task)} for task, of_task in hits.items()},
    }
