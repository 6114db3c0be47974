"""LLaVA's and LLaVA-Med's conversations against the texts that their conversation.py gives (get_prompt), and what ends a response."""

import hashlib
from pathlib import Path

import pytest
from prompt_text import prompt_text

from fastpeft.data import CausalDataset, Instruction, load_causal_tokenizer
from fastpeft.data.causal_tokenizer import add_tokens, encode_texts
from fastpeft.data.conversations import CONVERSATIONS
from fastpeft.data.prompts import BOS, IMAGE, ending, render

HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to "
    "the human's questions."
)
USER = HUMAN.replace("human", "user")
TAGS = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to understand the visual content that "
    "the user provides, and assist the user with a variety of tasks using natural language.The visual content will be provided with the "
    "following format: <Image>visual content</Image>."
)
SEES = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, and assist the "
    "user with a variety of tasks using natural language."
)
HI = "###Human: Hi!###Assistant: Hi there!  How can I help you today?\n"
# get_prompt() of two turns and a role without its message; </s> and <s> are tokens there
TWO_TURNS = {
    "v1": f"{USER} USER: Q1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:",
    "llava": f"{USER} USER: Q1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:",
    "llava_v1": f"{HUMAN} USER: Q1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:",
    "v1_mmtag": f"{TAGS} USER: Q1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:",
    "llava_v0": f"{HUMAN}###Human: Q1###Assistant: A1###Human: Q2###Assistant:",
    "v0_mmtag": f"{TAGS}###Human: Q1###Assistant: A1###Human: Q2###Assistant:",
    "simple": f"{HUMAN}{HI}###Human: Q1###Assistant: A1###Human: Q2###Assistant:",
    "mistral_instruct": "[INST] Q1 [/INST] A1 </s>[INST] Q2 [/INST]",
    "llava_llama_2": f"[INST] <<SYS>>\n{SEES}\n<</SYS>>\n\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST]",
    "v0_train": f"{HUMAN}\n\n### Human: Q1\n### Assistant: A1\n### Human: Q2\n### Assistant:",  # train.py's _add_speaker_and_signal
}
STOPS = {"v0": "###", "v0_train": "###", "llava_v0": "###", "v0_mmtag": "###", "simple": "###", "multimodal": "###"}


def sample(*turns, image=True, **more):
    return Instruction(turns, Path("x.png") if image else None, "llava", "0", 0, Path("a.json"), **more)


def official(template, turns, **how) -> str:
    """The pieces as one text, tokens by their names."""
    text = ""
    for number, (pieces, answer) in enumerate(render(template, turns, **how), 1):
        text += "".join("<image>" if piece is IMAGE else piece for piece in pieces)
        if number < len(turns.turns):
            text += answer + ending(template).text + ("</s>" if ending(template).eos else "")
    return text


@pytest.mark.parametrize("template", TWO_TURNS)
def test_two_turns(template):
    assert official(template, sample(("Q1", "A1"), ("Q2", ""), image=False)) == TWO_TURNS[template]


def test_the_longer_systems():
    blind = sample(("Q1", ""), image=False)
    v0, med, safe = (official(name, blind) for name in ("v0", "multimodal", "llama_2"))
    asked = "###Human: What are the key differences between renewable and non-renewable energy sources?###Assistant: Renewable energy"
    assert v0.startswith(HUMAN + asked) and v0.count("\n") == 7 and all(f"\n{n}. " in v0 for n in range(1, 7))
    assert hashlib.sha256(v0.encode()).hexdigest()[:16] == "6748d51ec314ccca"  # of the text that v0's get_prompt() gives
    assert v0.endswith("and their depletion can lead to economic and social instability.\n###Human: Q1###Assistant:")
    assert med.startswith("You are LLaVA-Med, a large language and vision assistant trained by a group of researchers at Microsoft, ")
    assert "LLaVA architecture.You are able" in med and "medical and clinical tasks using" in med and f"detail.{HI}" in med
    assert "medical and clinical research tasks" in official("llava_med_v1", blind)
    assert safe.startswith("[INST] <<SYS>>\nYou are a helpful, respectful and honest assistant. Always") and "safe.  Your answers" in safe
    assert safe.endswith("don't share false information.\n<</SYS>>\n\nQ1 [/INST]") and "in nature.\n\nIf a question" in safe


def test_stops():
    assert {name: ending(name).stop for name in CONVERSATIONS if ending(name).stop} == STOPS
    assert all(ending(name).eos != (name in STOPS) for name in CONVERSATIONS)
    assert ending("alpaca").eos and not ending("alpaca").stop


@pytest.mark.parametrize(
    ("template", "how", "at", "said"),
    [
        ("v1", {}, None, f"{USER} USER: <image>\nQ1 ASSISTANT:"),
        ("v1", {}, 2, f"{USER} USER: <image>\nQ1 ASSISTANT:"),  # LLaVA's code moves it to the beginning
        ("v1", {"place": "data"}, 2, f"{USER} USER: Q1\n<image> ASSISTANT:"),
        ("v1", {"place": "data"}, 1, f"{USER} USER: Q<image>1 ASSISTANT:"),
        ("v1", {"place": "data"}, None, f"{USER} USER: <image>\nQ1 ASSISTANT:"),
        ("v1_mmtag", {}, None, f"{TAGS} USER: <Image><image></Image>\nQ1 ASSISTANT:"),
        ("mistral_instruct", {}, None, "[INST] <image>\nQ1 [/INST]"),
        ("llava_v0", {"around": ("<im_start>", "<im_end>")}, None, f"{HUMAN}###Human: <im_start><image><im_end>\nQ1###Assistant:"),
        ("simple", {"around": ("<im_start>", "<im_end>")}, 0, f"{HUMAN}{HI}###Human: Q1\n<im_start><image><im_end>###Assistant:"),
        ("simple", {"place": "before"}, None, f"{HUMAN}{HI}###Human: <image>\nQ1###Assistant:"),
        ("v0_train", {}, 0, f"{HUMAN}\n\n### Human: <image>\nQ1\n### Assistant:"),
        ("v0_train", {}, 2, f"{HUMAN}\n\n### Human: Q1\n<image>\n### Assistant:"),
        ("v0_train", {}, None, f"{HUMAN}\n\n### Human: Q1\n<image>\n### Assistant:"),
    ],
)
def test_where_the_image_stands(template, how, at, said):
    assert official(template, sample(("Q1", ""), image_at=at), image_tokens=True, **how) == said


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from sentencepiece_model import write_sentencepiece

    return load_causal_tokenizer(write_sentencepiece(tmp_path_factory.mktemp("t") / "tokenizer.model", merges=("##", "###", "▁h", "▁he")))


def test_one_text_over_turns(tokenizer):
    """Without an end token between, the turns are one text to the tokenizer, as the official code has them; labels cover the answers and
    their separators."""
    talk = sample(("he", "ll"), ("ho", "lo"), image=False)
    item = CausalDataset([talk], tokenizer, "llava_v0", 900)[0]
    whole = f"{HUMAN}###Human: he###Assistant: ll###Human: ho###Assistant: lo###"
    assert item["input_ids"].tolist() == [1, *tokenizer(whole, add_special_tokens=False)["input_ids"]]
    labelled, runs = item["labels"] != -100, []
    for token, label in zip(item["input_ids"].tolist(), labelled.tolist()):
        if label and not runs:
            runs.append([])
        if label:
            runs[-1].append(token)
        elif runs and runs[-1]:
            runs.append([])
    assert [tokenizer.decode(run).strip() for run in runs if run] == ["ll###", "lo###"]
    two = CausalDataset([talk], tokenizer, "llava_llama_2", 900)[0]["input_ids"].tolist()
    assert two.count(1) == two.count(2) == 2 and two[two.index(2) + 1] == 1  # </s><s>
    assert render("llama_2", talk)[1][0][0] is BOS
    asked = CausalDataset([talk], tokenizer, "llava_v0", 900, prompts_only=True)[0]["input_ids"].tolist()
    assert asked == [1, *encode_texts(tokenizer, [prompt_text("llava_v0", talk)])[0]]


def test_what_cannot_be(tokenizer):
    seen = [sample(("he", "ll"))]
    with pytest.raises(ValueError, match="image_place='middle': use one of before, after, data"):
        CausalDataset(seen, tokenizer, "v1", image_tokens=2, image_place="middle")
    with pytest.raises(ValueError, match="template alpaca has its own place for the image; leave image_place out"):
        CausalDataset(seen, tokenizer, "alpaca", image_tokens=2, image_place="after")
    with pytest.raises(ValueError, match="puts <im_start> beside an image, and the tokenizer has no such token"):
        CausalDataset(seen, tokenizer, "v1", image_tokens=2, image_around=("<im_start>", "<im_end>"))


def test_data_cannot_place_an_image_or_a_token(tokenizer, tmp_path):
    """Special tokens in a text are spelt out, so that none of them can stand for an image."""
    import copy

    framed = copy.deepcopy(tokenizer)
    add_tokens(framed, ["[PAD]", "<im_patch>", "<im_start>", "<im_end>"])
    said = sample(("he <im_start><im_patch><im_end> </s>", "ll"))
    item = CausalDataset([said], framed, "simple", 900, image_tokens=3, image_around=("<im_start>", "<im_end>"))[0]
    ids, (start, end) = item["input_ids"], framed.convert_tokens_to_ids(["<im_start>", "<im_end>"])
    assert (ids == start).sum() == (ids == end).sum() == 1 and item["image_mask"].sum() == 3 and framed.pad_token == "[PAD]"
