"""BLEU, ROUGE-L and CIDEr-D against values worked out by hand, and against COCO's evaluation where it is installed."""

import math
import random
from pathlib import Path

import pytest

from fastpeft.data import Instruction
from fastpeft.evaluate.captions import references_of, score_captions


def raises(text: str):
    return pytest.raises(ValueError, match=text)


def test_bleu_by_hand():
    """Papineni's example of clipping, as one caption: "the" is in a reference twice at most, so 2 of 7."""
    scores = score_captions(["the the the the the the the"], [["The cat is on the mat.", "There is a cat on the mat."]])
    assert scores["BLEU-1"] == pytest.approx(2 / 7) and scores["BLEU-2"] == 0 and scores["CIDEr"] is None


def test_brevity_and_the_whole_corpus():
    scores = score_captions(["a b c", "d e"], [["a b c d"], ["d e f", "x y z w v"]])
    penalty = math.exp(1 - 7 / 5)  # 5 words against the nearest lengths 4 and 3
    assert scores["BLEU-1"] == pytest.approx(penalty) and scores["BLEU-3"] == pytest.approx(penalty)
    assert scores["BLEU-4"] == 0  # no caption has four words


def test_rouge_by_hand():
    """Common subsequence "police the gunman" of 4 and 4 words: precision = recall = 3/4; the mean with a caption of no match."""
    scores = score_captions(["police kill the gunman", "x"], [["police killed the gunman"], ["y"]])
    assert scores["ROUGE-L"] == pytest.approx(0.75 / 2)
    best = score_captions(["a b c d"], [["a b", "a b c d e f g h"]])["ROUGE-L"]  # precision 4/4, recall 2/2, of different references
    assert best == pytest.approx(1.0)


def test_cider_by_hand():
    """Two images. "cat", "dog" are in one image's references (idf log 2), "a" in both (0). Unigrams: cosine 1; bigrams "a cat": 1;
    no longer n-grams: 10 * (1 + 1) / 4 for the right caption, 0 for the wrong."""
    assert score_captions(["a cat", "a bird"], [["a cat"], ["a dog"]])["CIDEr"] == pytest.approx(2.5)
    near = math.exp(-1 / (2 * 6.0**2))  # one bigram more: both words' cosine 1/sqrt(2), "cat" alone of the two
    longer = score_captions(["a cat sat", "a bird"], [["a cat"], ["a dog"]])["CIDEr"]
    assert longer < 2.5 and longer == pytest.approx(10 * near * (_cosine(1, 1) + _cosine(1, 1)) / 4 / 2)


def _cosine(shared: int, more: int) -> float:
    """Of a caption whose words are `shared` with idf log 2 and `more` that no reference has (same idf: counted as in one)."""
    return shared / math.sqrt(shared * (shared + more))


def test_case_and_punctuation():
    same = score_captions(["A CAT, on the mat!", "two dogs."], [["a cat on the mat"], ["Two dogs"]])
    assert same["BLEU-1"] == same["ROUGE-L"] == 1 and score_captions(["", "x"], [["a"], ["x"]])["ROUGE-L"] == 0.5


def test_against_coco_evaluation():
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu")
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    draw = random.Random(0)
    words = ["a", "the", "cat", "dog", "sits", "on", "mat", "red", "runs", "in", "park", "two"]

    def text() -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(4, 14)))

    references = {i: [text() for _ in range(draw.randint(1, 5))] for i in range(200)}
    captions = {i: [f"{draw.choice(references[i])} {text()}"] for i in range(200)}
    ours = score_captions([captions[i][0] for i in range(200)], list(references.values()))
    for n, value in enumerate(bleu.Bleu(4).compute_score(references, captions, verbose=0)[0], 1):
        assert ours[f"BLEU-{n}"] == pytest.approx(value, abs=1e-6)  # theirs is smoothed a little
    assert ours["ROUGE-L"] == pytest.approx(Rouge().compute_score(references, captions)[0], abs=1e-12)
    assert ours["CIDEr"] == pytest.approx(Cider().compute_score(references, captions)[0], abs=1e-12)


def test_references_of_an_image():
    answers = [("1.jpg", "a"), ("2.jpg", "b"), ("1.jpg", "c"), (None, "d"), (None, "e")]
    samples = [Instruction((("Q", a),), i and Path(i), "coco", str(n), n, Path("c.json")) for n, (i, a) in enumerate(answers)]
    assert references_of(samples) == ([0, 1, 3, 4], [["a", "c"], ["b"], ["d"], ["e"]])


def test_bad_calls():
    for captions, references in (("text", [["a"]]), (["a"], []), ([], [])):
        with raises("captions for"):
            score_captions(captions, references)
    for references in ([["a"], []], [["a"], "b"]):
        with raises("references 1 must be a list"):
            score_captions(["a", "b"], references)
