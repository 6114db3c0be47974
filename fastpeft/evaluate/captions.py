"""Caption metrics as COCO's evaluation defines them: BLEU-1 to 4, ROUGE-L and CIDEr-D.

Texts are lower-cased and split into words without punctuation. COCO's evaluation uses the Stanford tokenizer, which differs in details
(contractions, hyphens), so scores here are close to its scores, not equal to them.

BLEU (Papineni 2002) is of the whole corpus, its brevity penalty against the nearest reference length. ROUGE-L (Lin 2004) has
beta = 1.2 and takes best precision and best recall over the references. CIDEr-D (Vedantam 2015): n = 1 to 4, sigma = 6, document
frequencies from the references given, so it needs two images or more; 10 times a mean of cosines.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from fastpeft.data import Instruction

_WORD = re.compile(r"\w+(?:['.-]\w+)*")
_N, _BETA, _SIGMA = 4, 1.2, 6.0


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _grams(words: Sequence[str], n: int) -> Counter:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def references_of(samples: Sequence[Instruction]) -> tuple[list[int], list[list[str]]]:
    """(the index of each image's first sample, all answers about that image): what to caption, and against what."""
    groups: dict[object, list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(index if sample.image is None else sample.image, []).append(index)
    return [group[0] for group in groups.values()], [[samples[i].answer for i in group] for group in groups.values()]


def score_captions(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float | None]:
    """{"BLEU-1", ..., "BLEU-4", "ROUGE-L": fractions of 1, "CIDEr": 0 to 10, None for a single image}.

    captions: one text per image; references: one or more texts per image. ValueError where their numbers differ or one has none.
    """
    if isinstance(captions, str) or len(captions) != len(references) or not captions:
        raise ValueError(f"{len(captions)} captions for {len(references)} lists of references: give one list for each, one or more")
    empty = next((i for i, texts in enumerate(references) if isinstance(texts, str) or not len(texts)), None)
    if empty is not None:
        raise ValueError(f"references {empty} must be a list of one or more texts")
    given = [_words(text) for text in captions]
    wanted = [[_words(text) for text in texts] for texts in references]
    rouge = sum(map(_rouge_l, given, wanted)) / len(given)
    return {**_bleu(given, wanted), "ROUGE-L": rouge, "CIDEr": _cider(given, wanted) if len(given) > 1 else None}


def _bleu(given: list[list[str]], wanted: list[list[list[str]]]) -> dict[str, float]:
    matched, total, length, target = [0] * _N, [0] * _N, 0, 0
    for words, references in zip(given, wanted):
        length += len(words)
        target += min((abs(len(r) - len(words)), len(r)) for r in references)[1]
        for n in range(1, _N + 1):
            most: Counter = Counter()
            for reference in references:
                most |= _grams(reference, n)
            grams = _grams(words, n)
            matched[n - 1] += sum((grams & most).values())
            total[n - 1] += sum(grams.values())
    penalty = 1.0 if length >= target else math.exp(1 - target / length) if length else 0.0
    scores, logs = {}, 0.0
    for n in range(_N):
        logs += math.log(matched[n] / total[n]) if matched[n] else -math.inf
        scores[f"BLEU-{n + 1}"] = penalty * math.exp(logs / (n + 1))
    return scores


def _common(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], before + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def _rouge_l(words: list[str], references: list[list[str]]) -> float:
    if not words or not any(references):
        return 0.0
    common = [(_common(words, reference), len(reference)) for reference in references if reference]
    precision, recall = max(c for c, _ in common) / len(words), max(c / n for c, n in common)
    if not precision:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _cider(given: list[list[str]], wanted: list[list[list[str]]]) -> float:
    frequency: dict[tuple, int] = defaultdict(int)  # images in whose references an n-gram is
    for references in wanted:
        for gram in {g for reference in references for n in range(1, _N + 1) for g in _grams(reference, n)}:
            frequency[gram] += 1

    def weighted(words: list[str], n: int) -> dict[tuple, float]:
        return {g: count * (math.log(len(given)) - math.log(max(1, frequency.get(g, 0)))) for g, count in _grams(words, n).items()}

    def norm(vector: dict[tuple, float]) -> float:
        return math.sqrt(sum(v * v for v in vector.values()))

    total = 0.0
    for words, references in zip(given, wanted):
        ours = [weighted(words, n) for n in range(1, _N + 1)]
        for reference in references:
            # the official length is the number of bigrams
            gap = max(0, len(words) - 1) - max(0, len(reference) - 1)
            near = math.exp(-(gap**2) / (2 * _SIGMA**2))
            for n in range(_N):
                theirs = weighted(reference, n + 1)
                size = norm(ours[n]) * norm(theirs)
                if size:
                    dot = sum(min(v, theirs[g]) * theirs[g] for g, v in ours[n].items() if g in theirs)
                    total += near * dot / size / len(references) / _N
    return 10 * total / len(given)
