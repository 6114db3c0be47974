"""Causal samples and batches: where labels lie, what is cut, padded against packed, text mixed with images."""

from pathlib import Path

import pytest
import torch
from prompt_text import prompt_text
from torch.utils.data import DataLoader

from fastpeft.data import (
    CausalCollator,
    CausalDataset,
    EpochSampler,
    Instruction,
    LengthGroupedSampler,
    Preprocess,
    load_causal_tokenizer,
    train_causal_tokenizer,
)
from fastpeft.data.causal_tokenizer import encode_texts
from fastpeft.data.prompts import TEMPLATES, render

BOS, EOS, PAD = 1, 2, 3


def raises(text: str):
    return pytest.raises(ValueError, match=text)


def instruction(*turns, image=None, kind="alpaca", n=0, **more) -> Instruction:
    path = None if image is None else Path(image)
    return Instruction(turns or (("Add 1 and 1.", "2"),), path, kind, str(n), n, Path("a.json"), image_name=str(image or ""), **more)


@pytest.fixture(scope="module")
def tokenizer():
    return train_causal_tokenizer(["Response: The answer is B. Instruction: Image: N/A"] * 3, 300)


def texts_of(tokenizer, item, want_labels=True) -> str:
    """The text that has labels (or hasn't)."""
    return tokenizer.decode(item["input_ids"][(item["labels"] != -100) == want_labels])


# --- templates --------------------------------------------------------------------------------------------------------


def test_alpaca_template():
    bare, paired = instruction(), instruction(("Sum.", "3"), context="1, 2")
    assert prompt_text("alpaca", bare) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd 1 and 1.\n\n### Response:"
    )
    assert prompt_text("alpaca", paired) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSum.\n\n### Input:\n1, 2\n\n### Response:"
    )


def test_lavin_template():
    assert render("lavin", instruction()) == [(["Instruction: Add 1 and 1. \nResponse:"], "2")]  # the space is the official one's
    assert prompt_text("lavin", instruction(("Sum  it.", "3"), context="1, 2")) == "Instruction: Sum it. 1, 2\nResponse:"
    seen, unseen = instruction(("What?", "A cat."), image="x", kind="llava"), instruction(("What?", "A cat."), kind="llava")
    assert render("lavin", seen, image_tokens=True) == [(["Image: ", None, "Instruction: What?\nResponse:"], "A cat.")]
    assert render("lavin", unseen, image_tokens=True) == [(["Image: N/A", "Instruction: What?\nResponse:"], "A cat.")]


def test_llava_template():
    sample = instruction(("What?", "A cat."), ("Where?", "There."), image="x", kind="llava")
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    )
    first, second = render("llava", sample, image_tokens=True)
    assert first == ([f"{system}USER: ", None, "\nWhat? ASSISTANT:"], " A cat.") and second == (["USER: Where? ASSISTANT:"], " There.")
    assert prompt_text("llava", sample) == f"{system}USER: What? ASSISTANT: A cat.USER: Where? ASSISTANT:"


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_template_asks_everything(template, tokenizer):
    sample = instruction(("Q one", "A one"), ("Q two", "A two"), context="CONTEXT")
    text = prompt_text(template, sample)
    assert "Q one" in text and "A one" in text and "Q two" in text and "A two" not in text
    assert [answer.strip() for _, answer in render(template, sample)] == ["A one", "A two"]
    assert text.count("CONTEXT") == (template != "scienceqa")  # there the context is part of the problem
    with raises("template='chatml': use one of alpaca"):
        render("chatml", sample)


# --- labels -----------------------------------------------------------------------------------------------------------


def test_labels_on_the_response_and_the_end(tokenizer):
    data = CausalDataset([instruction()], tokenizer)
    item = data[0]
    ids, labels = item["input_ids"].tolist(), item["labels"].tolist()
    assert ids[0] == BOS and ids[-1] == EOS and labels[0] == -100
    assert ids[1:-1] == encode_texts(tokenizer, [prompt_text("alpaca", instruction()) + "2"])[0]
    assert labels[-2:] == [*encode_texts(tokenizer, ["2"])[0], EOS] and set(labels[:-2]) == {-100}
    assert data.weight({"labels": item["labels"][None]}) == 2


def test_a_token_across_the_border_is_learnt():
    """A vocabulary that joins ":." writes the prompt's last colon and the response's first dot as one: it is the response's."""
    tokenizer = train_causal_tokenizer([":."] * 5, 261)
    sample = instruction(("a", ".b"))
    prompt = prompt_text("alpaca", sample)
    whole = encode_texts(tokenizer, [prompt + ".b"])[0]
    assert prompt.endswith(":") and len(whole) == len(encode_texts(tokenizer, [prompt])[0]) + 1
    item = CausalDataset([sample], tokenizer)[0]
    assert item["input_ids"].tolist() == [BOS, *whole, EOS] and texts_of(tokenizer, item) == ":.b</s>"


def test_each_turn_of_a_conversation_is_learnt(tokenizer):
    item = CausalDataset([instruction(("Q one", "A one"), ("Q two", "A two"))], tokenizer, "llava")[0]
    assert texts_of(tokenizer, item) == " A one</s> A two</s>"
    assert texts_of(tokenizer, item, False).endswith("USER: Q one ASSISTANT:USER: Q two ASSISTANT:")


def test_an_empty_response_is_its_end(tokenizer):
    item = CausalDataset([instruction(("Do nothing.", ""))], tokenizer)[0]
    assert item["labels"][-1] == EOS and (item["labels"][:-1] == -100).all()


def test_data_cannot_end_a_sequence(tokenizer):
    item = CausalDataset([instruction(("a</s><s>", "b</s>c<pad>"))], tokenizer, "plain")[0]
    assert item["input_ids"].tolist().count(EOS) == 1 and texts_of(tokenizer, item) == "b</s>c<pad></s>"


def test_as_lavin_tokenises(tmp_path, make):
    """bos, the image's prefix, its places, then prompt and response as one text, eos; sentencepiece opens each with "▁"."""
    tokenizer = load_causal_tokenizer(make.sentencepiece(tmp_path / "tokenizer.model"))
    samples = [instruction(("hello", "the"), image="x", kind="llava"), instruction(("hello", "the"), kind="llava")]
    with_image, without = CausalDataset(samples, tokenizer, "lavin", image_tokens=6)
    text = "Instruction: hello\nResponse:the"
    expected = [1, *encode_texts(tokenizer, ["Image: "])[0], *[0] * 6, *encode_texts(tokenizer, [text])[0], 2]
    assert with_image["input_ids"].tolist() == expected and with_image["image_mask"].sum() == 6
    start = 1 + len(encode_texts(tokenizer, ["Image: "])[0])
    assert with_image["image_mask"][start : start + 6].all() and (with_image["labels"][: start + 6] == -100).all()
    expected = [1, *encode_texts(tokenizer, ["Image: N/A"])[0], *encode_texts(tokenizer, [text])[0], 2]
    assert without["input_ids"].tolist() == expected and not without["image_mask"].any()
    for item in (with_image, without):  # "Response:the" is cut as ":the" after the prompt's own tokens
        prompt = len(encode_texts(tokenizer, ["Instruction: hello\nResponse:"])[0])
        whole = encode_texts(tokenizer, [text])[0]
        assert item["labels"][item["labels"] != -100].tolist() == [*whole[prompt:], 2]


# --- cutting ----------------------------------------------------------------------------------------------------------


def test_long_samples_are_cut_at_the_end(tokenizer):
    samples = [instruction(("ask", "word " * 50)), instruction()]
    whole = CausalDataset(samples, tokenizer, "plain")[0]["input_ids"]
    data = CausalDataset(samples, tokenizer, "plain", max_length=20)
    assert torch.equal(data[0]["input_ids"], whole[:20]) and data[0]["labels"][-1] == whole[19] != EOS
    assert data.lengths == [20, len(data[1]["input_ids"])]


def test_a_sample_without_room_for_its_response(tokenizer):
    samples = [instruction(n=4), instruction(("long " * 50, "no"), n=5)]
    with raises("a.json: entry 5: no room for a response in max_length=100"):
        CausalDataset(samples, tokenizer, "plain", max_length=100)
    data = CausalDataset(samples, tokenizer, "plain", max_length=100, skip_bad=True)
    assert [s.entry for s in data.samples] == [4] and data.skipped == {"response cut off": 1} and len(data) == 1
    with raises("max_length=10 leaves no sample a response"):
        CausalDataset(samples[1:], tokenizer, "plain", max_length=10, skip_bad=True)


def test_prompts_for_generation(tokenizer):
    samples = [instruction(("Q one", "A one"), ("Q two", "A two")), instruction(("x" * 99, "no"))]
    data = CausalDataset(samples, tokenizer, "llava", prompts_only=True)
    assert tokenizer.decode(data[0]["input_ids"]).endswith("USER: Q one ASSISTANT: A one</s>USER: Q two ASSISTANT:")
    assert "labels" not in data[0]
    cut = CausalDataset(samples, tokenizer, "llava", max_length=30, prompts_only=True)[1]["input_ids"]
    assert cut[0] == BOS and len(cut) == 30 and torch.equal(cut[1:], data[1]["input_ids"][-29:])
    batch = data.collator()([data[0], data[1]])
    assert batch["input_ids"][1, -1] == data[1]["input_ids"][-1] and batch["attention_mask"][1].tolist() == sorted(
        batch["attention_mask"][1]
    )
    assert "labels" not in batch


# --- batches ----------------------------------------------------------------------------------------------------------


def mixed(make, folder):
    one, two = make.image(folder / "1.png", (9, 9, 9)), make.image(folder / "2.png", (200, 0, 0))
    samples = [(("a", "b"), two), (("longer question", "longer answer"), None), (("c", "d e"), one), (("e", "f"), two)]
    return [instruction(turn, image=image, kind="llava", n=i) for i, (turn, image) in enumerate(samples)]


def test_text_and_images_in_one_batch(tmp_path, make, tokenizer):
    samples = mixed(make, tmp_path)
    preprocess = Preprocess(8)
    data = CausalDataset(samples, tokenizer, "lavin", preprocess=preprocess, image_tokens=2)
    batch = next(iter(DataLoader(data, batch_size=4, collate_fn=data.collator())))
    assert batch["images"] == [tmp_path / "2.png", tmp_path / "1.png"] and batch["image_index"].tolist() == [0, -1, 1, 0]
    assert torch.equal(batch["pixel_values"][1], preprocess(tmp_path / "1.png")) and batch["pixel_values"].shape == (2, 3, 8, 8)
    assert batch["samples"] == samples and batch["image_mask"].sum(1).tolist() == [2, 0, 2, 2]
    assert set(data.inputs) >= {"pixel_values", "image_index", "image_mask"}
    data.load_images = False
    batch = data.collator()(data.__getitems__([0, 1]))
    assert "pixel_values" not in batch and batch["image_index"].tolist() == [0, -1]
    only_text = CausalDataset(samples[1:2], tokenizer, "lavin", preprocess=preprocess)
    batch = only_text.collator()([only_text[0]])
    assert batch["images"] == [] and batch["image_index"].tolist() == [-1] and "pixel_values" not in batch
    assert "image_index" not in only_text.inputs  # a language model takes no such argument


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded(tmp_path, make, tokenizer, side):
    data = CausalDataset(mixed(make, tmp_path), tokenizer, "lavin", image_tokens=3)
    items = [data[i] for i in range(4)]
    batch = CausalCollator(PAD, padding_side=side, multiple_of=16)(items)
    width = max(len(item["input_ids"]) for item in items)
    assert batch["input_ids"].shape[1] % 16 == 0 and 0 <= batch["input_ids"].shape[1] - width < 16
    for i, item in enumerate(items):
        n, L = len(item["input_ids"]), batch["input_ids"].shape[1]
        real = slice(0, n) if side == "right" else slice(L - n, L)
        for name in ("input_ids", "labels", "image_mask"):
            assert torch.equal(batch[name][i, real], item[name])
        assert batch["attention_mask"][i].sum() == n and batch["attention_mask"][i, real].all()
        assert (batch["labels"][i][batch["attention_mask"][i] == 0] == -100).all()
        assert (batch["input_ids"][i][batch["attention_mask"][i] == 0] == PAD).all()
    assert all(batch[name].dtype == torch.int64 for name in ("input_ids", "labels", "attention_mask"))
    assert data.tokens(batch) == sum(data.lengths)
    assert CausalCollator(PAD)(items)["input_ids"].shape[1] == width


def test_packed_is_transformers_flattening(tmp_path, make, tokenizer):
    from transformers import DataCollatorWithFlattening

    data = CausalDataset(mixed(make, tmp_path), tokenizer, "lavin", packed=True)
    items = [data[i] for i in range(4)]
    batch = data.collator()(items)
    rows = [{"input_ids": item["input_ids"].tolist(), "labels": item["labels"].tolist()} for item in items]
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows)
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(batch[name], theirs[name])
    assert torch.equal(batch["cu_seqlens"], theirs["cu_seq_lens_q"]) and batch["cu_seqlens"].dtype == torch.int32
    assert batch["max_seqlen"] == theirs["max_length_q"] and "attention_mask" not in batch
    assert batch["image_index"].tolist() == [0, -1, 1, 0] and data.tokens(batch) == sum(data.lengths)


def test_padded_and_packed_give_the_same_loss(tokenizer):
    """Of a small model of transformers, float64: padding, packing and samples alone agree on the sum over labelled tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": len(tokenizer)}
    model = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sdpa")).double().eval()
    samples = [instruction((q, a)) for q, a in (("one", "1"), ("two and two", "four, as they say"), ("x", ""))]
    data = CausalDataset(samples, tokenizer, "plain")
    items = [data[i] for i in range(3)]

    def loss(batch):  # transformers' own is in float32
        inputs = {name: batch[name] for name in data.inputs if name in batch and name != "labels"}
        logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum")

    with torch.no_grad():
        expected = sum(loss({name: row[None] for name, row in item.items() if name != "sample"}) for item in items)
    for packed in (False, True):
        batch = CausalCollator(PAD, packed=packed)(items)
        with torch.no_grad():
            assert abs(float(loss(batch) - expected)) < 1e-10
        assert data.weight(batch) == sum(map(data.weight, items))


# --- epochs and order -------------------------------------------------------------------------------------------------


def test_alternatives_are_drawn_by_epoch(tokenizer):
    other = ((("Q", "long answer"),),)
    samples = [instruction(("Q", "a"), alternatives=other, n=i) for i in range(40)]
    data, again = CausalDataset(samples, tokenizer, "plain", seed=1), CausalDataset(samples, tokenizer, "plain", seed=1)
    drawn = []
    for epoch in (0, 1):
        data.set_epoch(epoch)
        again.set_epoch(epoch)
        drawn.append([texts_of(tokenizer, item) for item in data])
        assert drawn[-1] == [texts_of(tokenizer, again[i]) for i in reversed(range(40))][::-1]
        assert set(drawn[-1]) == {"a</s>", "long answer</s>"}
    assert drawn[0] != drawn[1] and data.lengths == [max(len(i["input_ids"]) for i in data)] * 40


def test_epoch_sampler_takes_instructions(tmp_path, make, tokenizer):
    data = CausalDataset(mixed(make, tmp_path), tokenizer)
    sampler = EpochSampler(data, 2, questions_per_image=2)
    assert sorted(i for batch in sampler for i in batch) == [0, 1, 2, 3] and sampler.identity()["n"] == 4


@pytest.mark.parametrize("n, size, pool", [(50, 4, 3), (48, 4, 100), (7, 10, 2), (30, 1, 5)])
def test_batches_of_like_length(tokenizer, n, size, pool):
    samples = [instruction(("x", "y" * (1 + 37 * i % 50)), n=i) for i in range(n)]
    data = CausalDataset(samples, tokenizer, "plain")
    sampler = LengthGroupedSampler(data, size, seed=2, pool=pool)
    batches = list(sampler)
    assert sorted(i for b in batches for i in b) == list(range(n)) and [len(b) for b in batches[:-1]] == [size] * (len(batches) - 1)
    assert batches == list(sampler) and sampler.identity()["pool"] == pool

    def padding(batches):
        return sum(max(data.lengths[i] for i in b) * len(b) - sum(data.lengths[i] for i in b) for b in batches)

    if n > size > 1:
        assert padding(batches) < 0.5 * padding(EpochSampler(data, size, seed=2))
    sampler.set_epoch(1)
    assert n <= size or list(sampler) != batches


def test_what_an_adapter_carries(tmp_path, tokenizer):
    data = CausalDataset([instruction()], tokenizer, "lavin", preprocess=Preprocess(8), image_tokens=6)
    prompt = {"template": "lavin", "max_length": 512, "image_tokens": 6}
    assert data.describe() == {"preprocess": Preprocess(8).to_dict(), "tokenizer": "tokenizer", "prompt": prompt}
    data.save(tmp_path)
    assert load_causal_tokenizer(tmp_path / "tokenizer").get_vocab() == tokenizer.get_vocab()


def test_bad_calls(tokenizer):
    with raises("at least one sample"):
        CausalDataset([], tokenizer)
    with raises("max_length=1"):
        CausalDataset([instruction()], tokenizer, max_length=1)
    with raises("padding_side='middle'"):
        CausalCollator(PAD, padding_side="middle")
    with raises("pool=0"):
        LengthGroupedSampler(CausalDataset([instruction()], tokenizer), 1, pool=0)
