"""Responses come in order whatever their batches, and are scored as their data are."""

from pathlib import Path

import pytest
import torch
from sentencepiece_model import write_sentencepiece
from transformers import LogitsProcessorList

import fastpeft as fp
from fastpeft.data import CausalDataset, Instruction, load_causal_tokenizer, train_causal_tokenizer
from fastpeft.evaluate import generation_settings, respond, respond_and_score, responses


@pytest.fixture
def samples():
    texts = ["one", "one two", "three two one zero", "four"]
    return [Instruction(((text, f"answer {i}"),), None, "alpaca", str(i), i, Path("data.json")) for i, text in enumerate(texts)]


@pytest.fixture
def model_and_tokenizer(samples):
    tokenizer = train_causal_tokenizer([sample.question for sample in samples], min_frequency=1)
    return fp.build("llama-tiny", vocab_size=len(tokenizer), num_hidden_layers=2), tokenizer


def prompts(samples, tokenizer):
    return CausalDataset(samples, tokenizer, "plain", prompts_only=True)


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}])
def test_a_response_does_not_depend_on_its_batch(model_and_tokenizer, samples, how):
    model, tokenizer = model_and_tokenizer
    how |= {"max_new_tokens": 6, "progress": False}
    alone = [respond(model, prompts([sample], tokenizer), **how)[0] for sample in samples]
    for batch_size in (1, 3, 4):
        assert respond(model, prompts(samples, tokenizer), batch_size=batch_size, **how) == alone
    assert not model.training


def test_training_data_are_refused(model_and_tokenizer, samples):
    model, tokenizer = model_and_tokenizer
    with pytest.raises(ValueError, match="prompts_only=True"):
        respond(model, CausalDataset(samples, tokenizer, "plain"))


def scored(monkeypatch, model_and_tokenizer, samples, said):
    monkeypatch.setattr(responses, "respond", lambda *a, **k: said)
    model, tokenizer = model_and_tokenizer
    return respond_and_score(model, prompts(samples, tokenizer))[1]


def test_exact_match_open_and_closed(monkeypatch, model_and_tokenizer):
    rows = [("q", "No", "CLOSED"), ("q", "yes", "CLOSED"), ("q", "the left lung", "OPEN"), ("q", "free", None)]
    facts = [{"answer_type": kind} if kind else {} for *_, kind in rows]
    samples = [Instruction(((q, a),), None, "vqa", str(i), i, Path("d"), facts=facts[i]) for i, (q, a, _) in enumerate(rows)]
    got = scored(monkeypatch, model_and_tokenizer, samples, ["no.", "no", "Left lung", "free"])
    assert (got["closed"], got["open"], got["global"], got["always_no_closed"]) == (0.5, 0.0, 0.5, 0.5)
    assert (got["n_closed"], got["n_open"], got["n"]) == (2, 1, 4)


def test_scienceqa_and_captions_have_their_own(monkeypatch, model_and_tokenizer):
    facts = {"choices": ["a", "b"], "answer": 1, "subject": "social science", "grade": "grade7", "has_text": True, "has_image": False}
    problem = Instruction((("q", "The answer is B."),), None, "scienceqa", "1", 0, Path("d"), facts=facts)
    got = scored(monkeypatch, model_and_tokenizer, [problem], ["The answer is B. BECAUSE: it is."])
    assert got["global"] == 1.0 and got["scienceqa"]["SOC"] == got["scienceqa"]["TXT"] == 1.0
    caption = [Instruction((("Describe.", text),), None, "coco", "1", 0, Path("d")) for text in ("a red ball", "two dogs run")]
    got = scored(monkeypatch, model_and_tokenizer, caption, ["a red ball", "two dogs run"])
    assert got["captions"]["BLEU-1"] == 1.0


def test_a_response_stops_at_the_templates_stop_string(tmp_path):
    """Each by itself, whatever tokens the string is made of; nothing is generated after the last, and nothing of it stays."""
    tokenizer = load_causal_tokenizer(write_sentencepiece(tmp_path / "tokenizer.model", merges=("##", "he", "ll", "▁he")))
    said = [f"{text}</s>" for text in ("ll### he he he he", "he ll ll###he")]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in said]
    steps = []

    def forced(so_far, scores):
        at = len(steps)
        steps.append(scores.argmax(-1))
        wanted = [row[min(at, len(row) - 1)] for row in ids]
        return torch.full_like(scores, -torch.inf).scatter_(1, torch.tensor(wanted)[:, None], 0.0)

    samples = [Instruction(((question, ""),), None, "alpaca", "0", 0, tmp_path) for question in ("ho", "he")]
    asked = CausalDataset(samples, tokenizer, "llava_v0", 900, prompts_only=True)
    model = fp.build("llama-tiny", vocab_size=len(tokenizer), pad_token_id=0)
    found = respond(model, asked, max_new_tokens=40, progress=False, logits_processor=LogitsProcessorList([forced]))
    assert found == ["ll", "he ll ll"]
    assert len(steps) == len(tokenizer("he ll ll###", add_special_tokens=False)["input_ids"]) < min(map(len, ids)) + 3
    assert generation_settings(asked, tokenizer)["stop_strings"] == ["###"]
