"""Prompts over max_length: what is cut, and that an image's places never are."""

import copy
from pathlib import Path

import pytest
import torch
from prompt_text import prompt_text

from fastpeft.data import CausalDataset, Instruction, load_causal_tokenizer, train_causal_tokenizer
from fastpeft.data.causal_tokenizer import add_tokens, encode_texts
from fastpeft.data.prompts import frame

BOS, PLACES = 1, 6
CLOSING = {"alpaca": "### Response:", "lavin": "Response:", "llava": "ASSISTANT:", "plain": "\n", "scienceqa": "Answer:"}
CLOSING |= {"mistral_instruct": "[/INST]", "llava_v0": "###Assistant:"}  # LLaVA's others differ in their words
AFTER = {"simple": "###Assistant:", "v0_train": "\n### Assistant:"}  # whose image follows the question
FRAMES = (None, ("<im_start>", "<im_end>"))


def raises(text: str):
    return pytest.raises(ValueError, match=text)


def sample(*turns, image=True, context="", kind="alpaca", n=0, **more) -> Instruction:
    path = Path("x.png") if image else None
    return Instruction(turns, path, kind, str(n), n, Path("a.json"), context=context, image_name="x.png" if image else "", **more)


@pytest.fixture(scope="module")
def tokenizer():
    return train_causal_tokenizer(["Response: The answer is B. Instruction: Image: N/A question word"] * 3, 300)


@pytest.fixture(params=["bytes", "sentencepiece"])
def either(request, tmp_path, tokenizer, make):
    """A tokenizer without merges across words, and one that puts a "▁" before each text."""
    return tokenizer if request.param == "bytes" else load_causal_tokenizer(make.sentencepiece(tmp_path / "tokenizer.model"))


def prompts(tokenizer, samples, template, max_length=10_000, **how):
    return CausalDataset(samples, tokenizer, template, max_length, image_tokens=PLACES, prompts_only=True, **how)


QUESTION = " ".join(f"question {n}" for n in range(30))
CONTEXT = " ".join(f"context {n}" for n in range(30))


def is_part(short: torch.Tensor, whole: torch.Tensor) -> bool:
    """Whether it is what is left of `whole` when some of it is taken out."""
    rest = iter(whole.tolist())
    return all(token in rest for token in short.tolist())


@pytest.mark.parametrize("turns", [((QUESTION, ""),), (("one?", "first " * 30), (QUESTION, ""))], ids=["question", "dialogue"])
@pytest.mark.parametrize("context", ["", CONTEXT], ids=["", "context"])
@pytest.mark.parametrize("template", CLOSING)
def test_at_every_length(either, template, context, turns):
    """Image places whole or refused with a count; the template's last words whole; at most max_length tokens, and all that fit."""
    seen = sample(*turns, context=context)
    whole = prompts(either, [seen], template)[0]["input_ids"]
    image = prompts(either, [seen], template)[0]["image_mask"]
    assert image.sum() == PLACES
    head = int(image.nonzero().max()) + 1
    words = frame(template, seen, turns[0][0], True)
    before, after = words.before, words.after
    least = None
    for length in range(2, len(whole) + 7, 7):
        try:
            data = prompts(either, [seen], template, length)
        except ValueError as error:
            refused = f"no room for the image's {PLACES} places and the prompt around them in max_length={length} (1 of 1 samples)"
            assert refused in str(error)
            assert least is None
            continue
        least = least or length
        item = data[0]
        assert len(item["input_ids"]) == min(length, len(whole)) and data.cut == (length < len(whole))
        assert item["image_mask"].sum() == PLACES and torch.equal(item["input_ids"][:head], whole[:head])
        assert is_part(item["input_ids"], whole)
        assert either.decode(item["input_ids"]).endswith(CLOSING[template])
        spare = length - head - len(encode_texts(either, [before])[0]) - len(encode_texts(either, [after])[0])
        if spare >= 2:  # a token may reach across each border
            assert before.strip() in either.decode(item["input_ids"][head:])
    assert least is not None and least <= head + len(encode_texts(either, [after])[0]) + 7


@pytest.mark.parametrize("around", FRAMES, ids=["bare", "framed"])
@pytest.mark.parametrize("turns", [((QUESTION, ""),), (("one?", "first " * 30), (QUESTION, ""))], ids=["question", "dialogue"])
@pytest.mark.parametrize("context", ["", CONTEXT], ids=["", "context"])
@pytest.mark.parametrize("template", AFTER)
def test_at_every_length_with_the_image_after_the_question(tokenizer, template, context, turns, around):
    """bos, the image's places, the tokens around them and the template's last words stay, or the prompt is refused."""
    tokenizer = copy.deepcopy(tokenizer)
    add_tokens(tokenizer, FRAMES[1])
    seen = sample(*turns, context=context)
    read = lambda length: prompts(tokenizer, [seen], template, length, image_around=around)  # noqa: E731
    whole = read(10_000)[0]["input_ids"]
    closing = encode_texts(tokenizer, [AFTER[template]])[0]
    least = 1 + len(encode_texts(tokenizer, ["\n"])[0]) + PLACES + 2 * (around is not None) + len(closing)
    fits = []
    for length in (*range(2, least + 4), *range(least + 4, len(whole) + 9, 9)):
        try:
            data = read(length)
        except ValueError as error:
            assert "no room for the image" in str(error) and not fits
            continue
        fits.append(length)
        ids, places = data[0]["input_ids"], data[0]["image_mask"].nonzero().flatten()
        assert len(ids) == min(length, len(whole)) and data.cut == (length < len(whole)) and is_part(ids, whole)
        assert len(places) == PLACES == 1 + places[-1] - places[0] and ids[0] == BOS and ids[-len(closing) :].tolist() == closing
        if around:
            found = tokenizer.convert_ids_to_tokens([int(ids[places[0] - 1]), int(ids[places[-1] + 1])])
            assert found == list(around)
    assert fits[0] == least


@pytest.mark.parametrize("template", [*CLOSING, *AFTER])
def test_without_an_image_none_is_refused(tokenizer, template):
    blind = sample((QUESTION, ""), image=False, context=CONTEXT)
    whole = prompts(tokenizer, [blind], template)[0]["input_ids"]
    for length in range(2, len(whole), 7):
        item = prompts(tokenizer, [blind], template, length)[0]
        assert item["input_ids"][0] == BOS and len(item["input_ids"]) == length and not item["image_mask"].any()
        assert item["input_ids"][-1] == whole[-1]


@pytest.mark.parametrize("template", ["alpaca", "llava", "plain", "lavin"])
def test_the_context_goes_first_and_from_its_beginning(tokenizer, template):
    seen = sample(("What is asked here?", ""), context=CONTEXT)
    text, whole = prompt_text(template, seen), len(prompts(tokenizer, [seen], template)[0]["input_ids"])
    of_context = len(encode_texts(tokenizer, [CONTEXT])[0])
    short = prompts(tokenizer, [seen], template, whole - of_context // 2)[0]
    left = tokenizer.decode(short["input_ids"][~short["image_mask"]]).replace("<s>", "")
    assert "What is asked here?" in left and "context 29" in left and "context 0 context 1 " not in left
    assert left.replace("\n", "").endswith(text[-30:].replace("\n", "")) and "context 0 context 1 " in text
    short = prompts(tokenizer, [seen], template, whole - of_context - 6)[0]
    left = tokenizer.decode(short["input_ids"][~short["image_mask"]])
    assert "context 2" not in left and "here?" in left and "What is asked" not in left


def test_of_a_dialogue_the_oldest_goes_first(tokenizer):
    seen = sample(("first question " * 5, "first answer " * 5), ("second question", ""))
    whole = prompts(tokenizer, [seen], "llava")[0]["input_ids"]
    item = prompts(tokenizer, [seen], "llava", len(whole) - len(encode_texts(tokenizer, ["first question " * 5])[0]) - 5)[0]
    left = tokenizer.decode(item["input_ids"])
    assert "first question" not in left and "first answer" in left and left.endswith("USER: second question ASSISTANT:")


def test_refused_together(tokenizer):
    samples = [sample(("What?", ""), image=n != 1, n=n) for n in range(4)]
    with raises(r"a.json: entry 0: no room for the image's 6 places .* in max_length=12 \(3 of 4 samples\): .*--max-length.*--skip-bad"):
        prompts(tokenizer, samples, "llava", 12)
    data = prompts(tokenizer, samples, "llava", 12, skip_bad=True)
    assert [s.entry for s in data.samples] == [1] and data.skipped == {"no room for the image": 3} and len(data) == 1
    assert data.notes == ["3 samples left out: no room for the image", "1 prompts cut to max_length=12 within their question"]
    with raises("max_length=12 leaves no sample its image"):
        prompts(tokenizer, samples[2:], "llava", 12, skip_bad=True)


@pytest.mark.parametrize("template", [*CLOSING, *AFTER])
def test_training_keeps_every_place_or_refuses(either, template):
    """A response begins after the image: a sample that is left one has all of its image."""
    samples = [sample((QUESTION, "answer"), ("more?", "more"), n=n) for n in range(3)] + [sample(("x", "answer"), image=False, n=3)]
    whole = CausalDataset(samples, either, template, 10_000, image_tokens=PLACES)
    assert whole.cut == 0 and whole.notes == []
    begins = int((whole[0]["labels"] != -100).nonzero().min())
    for length in (begins, begins + 1, begins + 3):
        if length == begins:
            with raises(rf"a.json: entry 0: no room for a response in max_length={length} \(3 of 4 samples\)"):
                CausalDataset(samples, either, template, length, image_tokens=PLACES)
            data = CausalDataset(samples, either, template, length, image_tokens=PLACES, skip_bad=True)
            assert data.skipped == {"response cut off": 3} and len(data) == 1
        else:
            data = CausalDataset(samples, either, template, length, image_tokens=PLACES)
            assert [int(data[n]["image_mask"].sum()) for n in range(4)] == [PLACES] * 3 + [0]
            assert torch.equal(data[0]["input_ids"], whole[0]["input_ids"][:length])
            assert f"3 samples cut to max_length={length} at their end" in data.notes


def test_one_alternative_without_room_leaves_the_sample_out(tokenizer):
    other = (((QUESTION, "b"),),)
    samples = [sample(("What?", "a"), alternatives=other), sample(("What?", "a"), n=1)]
    with raises(r"entry 0: no room for a response in max_length=60 \(1 of 2 samples\)"):
        CausalDataset(samples, tokenizer, "plain", 60, image_tokens=PLACES)
    data = prompts(tokenizer, samples, "plain", 60)
    assert data.cut == 1 and len(data) == 2


@pytest.mark.parametrize("turns", [((QUESTION, ""),), ((QUESTION, "an answer"), ("more?", ""))], ids=["question", "dialogue"])
@pytest.mark.parametrize("at", [1, len(QUESTION) // 2, len(QUESTION) - 1])
def test_an_image_within_the_question(tokenizer, at, turns):
    """Where the data have it: its places and the tokens beside them stay in one piece."""
    tokenizer = copy.deepcopy(tokenizer)
    add_tokens(tokenizer, FRAMES[1])
    seen, how = sample(*turns, image_at=at, context=CONTEXT), {"image_place": "data", "image_around": FRAMES[1]}
    whole, fits = prompts(tokenizer, [seen], "mistral_instruct", **how)[0]["input_ids"], []
    for length in range(2, len(whole) + 21, 21):
        try:
            item = prompts(tokenizer, [seen], "mistral_instruct", length, **how)[0]
        except ValueError as error:
            assert "no room for the image" in str(error) and not fits
            continue
        fits.append(length)
        ids, places = item["input_ids"], item["image_mask"].nonzero().flatten()
        assert len(ids) == min(length, len(whole)) and len(places) == PLACES == 1 + places[-1] - places[0]
        assert tokenizer.convert_ids_to_tokens([int(ids[places[0] - 1]), int(ids[places[-1] + 1])]) == list(FRAMES[1])
        assert tokenizer.decode(ids).endswith("[/INST]") and is_part(ids, whole)
    assert fits
