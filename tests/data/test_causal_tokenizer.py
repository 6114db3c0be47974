"""Tokenizers of causal models: sentencepiece's segmentation from its file, a vocabulary that is the same on every run."""

import hashlib
import json

import pytest

from fastpeft.data import load_causal_tokenizer, save_tokenizer, train_causal_tokenizer
from fastpeft.data._sentencepiece import read_pieces
from fastpeft.data.causal_tokenizer import encode_texts

TEXTS = ["Below is an instruction.", "Is the left lung enlarged?", "naïve 中文 12,345\n\n### Response:", "the the the lung"]


def raises(text: str):
    return pytest.raises(ValueError, match=text)


@pytest.mark.parametrize("place", ["tokenizer.model", ".", "7B"])
def test_sentencepiece_model(tmp_path, place, make):
    """By hand: "▁hello" joins h e (score 0), then l l, then he ll, then ▁ hell: ▁hell o. In "the", h e before ▁t h."""
    make.sentencepiece(tmp_path / "tokenizer.model")
    (tmp_path / "7B").mkdir()
    tokenizer = load_causal_tokenizer(tmp_path / place)
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token_id == 0 and len(tokenizer) == 3 + 256 + 6 + 6  # padding adds no token
    hello, the, spaced, other, empty = encode_texts(tokenizer, ["hello", "the hell", " hello", "é", ""])
    assert tokenizer.convert_ids_to_tokens(hello) == ["▁hell", "o"]
    assert tokenizer.convert_ids_to_tokens(the) == ["▁t", "he", "▁hell"]
    assert tokenizer.convert_ids_to_tokens(spaced) == ["▁", "▁hell", "o"]
    assert tokenizer.convert_ids_to_tokens(other) == ["▁", "<0xC3>", "<0xA9>"] and empty == []
    assert [tokenizer.decode(ids) for ids in (the, other)] == ["the hell", "é"]
    save_tokenizer(tokenizer, tmp_path / "saved")
    again = load_causal_tokenizer(tmp_path / "saved")
    assert encode_texts(again, ["hello", " hello"]) == [hello, spaced] and again.get_vocab() == tokenizer.get_vocab()


def test_against_sentencepiece(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("\n".join(TEXTS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
    )
    theirs, ours = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")), load_causal_tokenizer(tmp_path)
    for text in [*TEXTS, " leading", "two  spaces", "\n", "ж", "Response:The"]:
        assert encode_texts(ours, [text]) == [theirs.encode(text)] and ours.decode(theirs.encode(text)) == theirs.decode(
            theirs.encode(text)
        )


def test_trained_vocabulary():
    tokenizer = train_causal_tokenizer(TEXTS * 3, vocab_size=300)
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<pad>"]) == [0, 1, 2, 3] and len(tokenizer) <= 300
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 3)
    texts = [*TEXTS, "ж never seen \x00 ##hash ▁", " <s> </s> <pad>"]
    encoded = encode_texts(tokenizer, texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert all(min(ids) > 3 for ids in encoded)  # no text of the data is a special token
    assert tokenizer.tokenize(" the") == ["Ġthe"]


def test_the_commonest_pairs_come_first():
    tokenizer = train_causal_tokenizer(["##a"] * 3 + ["cd"] * 5, vocab_size=1000)
    learnt = sorted((i, t) for t, i in tokenizer.get_vocab().items() if i >= 260)
    # words are "##" and "a" (punctuation apart) three times, "cd" five times
    assert [t for _, t in learnt] == ["cd", "##"]
    assert len(train_causal_tokenizer(["ab", "cd"], vocab_size=1000)) == 260  # seen once only


def test_same_vocabulary_in_every_process():
    """Pinned by a digest, since each run of the tests hashes text anew; nor does the texts' order matter."""
    for texts in (TEXTS * 3, (TEXTS * 3)[::-1]):
        vocab = train_causal_tokenizer(texts, 290).get_vocab()
        assert hashlib.sha256("\n".join(sorted(vocab, key=vocab.get)).encode()).hexdigest()[:16] == "6f9e091ea8e9a091"


def test_saved_and_loaded(tmp_path):
    tokenizer = train_causal_tokenizer(TEXTS, 300)
    save_tokenizer(tokenizer, tmp_path / "new")
    again = load_causal_tokenizer(tmp_path / "new")
    assert again.get_vocab() == tokenizer.get_vocab() and again.pad_token_id == 3
    assert encode_texts(again, [*TEXTS, "</s>"]) == encode_texts(tokenizer, [*TEXTS, "</s>"])


def test_bad_calls(tmp_path):
    with raises("no tokenizer here; give a folder with tokenizer.json or tokenizer.model"):
        load_causal_tokenizer(tmp_path)
    with raises("vocab_size=100: the special tokens and the 256 bytes alone need 260"):
        train_causal_tokenizer(TEXTS, 100)
    with raises("several texts"):
        train_causal_tokenizer("one")
    with raises("no texts"):
        train_causal_tokenizer([])
    (tmp_path / "tokenizer.json").write_text("{")
    with raises("this tokenizer cannot be loaded"):
        load_causal_tokenizer(tmp_path)


def test_a_tokenizer_without_end_is_refused(tmp_path):
    save_tokenizer(train_causal_tokenizer(TEXTS, 300), tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "eos_token"}))
    with raises("the tokenizer has no eos_token"):
        load_causal_tokenizer(tmp_path)


def test_bad_models(tmp_path, make):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(b"")
    with raises("holds no byte-pair model"):
        load_causal_tokenizer(file)
    with raises("holds no byte-pair model"):
        load_causal_tokenizer(make.sentencepiece(file, algorithm=1))
    with raises("no </s> among its special pieces"):
        load_causal_tokenizer(make.sentencepiece(file, specials=(("<unk>", 2), ("<s>", 3))))
    for wrong, what in ((b"\x80" * 20, "more than 64 bits"), (b"\x0a\xc8\x13\x0a\xc5\x13" + b"a" * 2501, "a piece of 2501 bytes")):
        file.write_bytes(wrong)
        with raises(what):
            load_causal_tokenizer(file)
    data = make.sentencepiece(file).read_bytes()
    for cut in (1, 20, len(data) // 2, len(data) - 3):
        file.write_bytes(data[:cut])
        with raises("tokenizer.model: "):
            load_causal_tokenizer(file)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with raises("not a sentencepiece model|holds no byte-pair model"):
        read_pieces(file)
