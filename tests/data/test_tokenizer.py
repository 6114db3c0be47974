"""Tokens: the official ids, question and answer layouts, a vocabulary that is the same on every run."""

import hashlib
import json
from itertools import pairwise

import pytest
import torch

from fastpeft.data import (
    decode,
    encode_answers,
    encode_questions,
    load_samples,
    load_tokenizer,
    normalise_answer,
    save_tokenizer,
    train_tokenizer,
)

TEXTS = ["Is the liver enlarged?", "Is the left lung enlarged?", "X-ray", "yes", "no", "T2-weighted", "12 cm", "The liver", "Où?"]


def raises(text: str):
    return pytest.raises(ValueError, match=text)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=200)


def bert_vocab(folder, extra=()):
    """A vocabulary of bert-base-uncased's size, with its special tokens where they are there."""
    tokens = [f"[unused{i}]" for i in range(30522)]
    tokens[0] = "[PAD]"
    tokens[100:104] = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    for i, word in enumerate(["is", "the", "liver", "##s", "?", "yes", *extra]):
        tokens[2000 + i] = word
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return folder


def test_official_ids(tmp_path):
    for path in (bert_vocab(tmp_path / "bert"), tmp_path / "bert" / "vocab.txt"):
        tokenizer = load_tokenizer(path)
        assert len(tokenizer) == 30524 and tokenizer.bos_token_id == 30522
        assert tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [30522, 30523]
        questions = encode_questions(tokenizer, ["Is the LIVERS?", "is"])
        assert questions["input_ids"].tolist() == [[30523, 2000, 2001, 2002, 2003, 2004, 102], [30523, 2000, 102, 0, 0, 0, 0]]
        assert questions["attention_mask"].tolist() == [[1] * 7, [1, 1, 1, 0, 0, 0, 0]]
        answers = encode_answers(tokenizer, ["yes", "the livers"])
        assert answers["input_ids"].tolist() == [[30522, 2005, 102, 0, 0], [30522, 2001, 2002, 2003, 102]]
        assert answers["labels"].tolist() == [[30522, 2005, 102, -100, -100], [30522, 2001, 2002, 2003, 102]]
        assert all(t.dtype == torch.int64 for t in (*questions.values(), *answers.values()))


def test_specials_already_there_keep_their_ids(tmp_path):
    tokenizer = load_tokenizer(bert_vocab(tmp_path, extra=["[ENC]", "[DEC]"]))
    assert len(tokenizer) == 30522 and tokenizer.convert_tokens_to_ids(["[ENC]", "[DEC]"]) == [2006, 2007]


@pytest.mark.parametrize("ending", ["", "\n\n\n", "\r\n"])
def test_the_end_of_a_vocabulary_file_moves_no_id(tmp_path, ending):
    file = bert_vocab(tmp_path) / "vocab.txt"
    text = file.read_text().rstrip("\n")
    file.write_bytes((text.replace("\n", "\r\n") if ending == "\r\n" else text).encode() + ending.encode())
    assert load_tokenizer(file).bos_token_id == 30522


def test_questions_are_cut_and_closed(tokenizer):
    encoded = encode_questions(tokenizer, ["is the liver " * 30, "no"])
    ids = encoded["input_ids"]
    assert ids.shape == (2, 35) and ids[0, -1] == tokenizer.sep_token_id and ids[1, 2] == tokenizer.sep_token_id
    assert (ids[:, 0] == tokenizer.convert_tokens_to_ids("[ENC]")).all() and tokenizer.cls_token_id not in ids
    assert encode_questions(tokenizer, ["is the liver " * 30], max_length=5)["input_ids"].shape == (1, 5)
    assert encode_answers(tokenizer, ["is the liver " * 30])["input_ids"].shape[1] > 90  # answers aren't, unless asked
    assert encode_answers(tokenizer, ["is the liver " * 30], max_length=6)["input_ids"].shape == (1, 6)


def test_labels_ignore_padding_only(tokenizer):
    encoded = encode_answers(tokenizer, ["yes", "The liver"])
    ids, mask, labels = encoded["input_ids"], encoded["attention_mask"], encoded["labels"]
    assert torch.equal(labels == -100, mask == 0) and (mask == 0).any()
    assert torch.equal(labels[mask == 1], ids[mask == 1]) and (ids[mask == 0] == tokenizer.pad_token_id).all()


def test_decode(tokenizer):
    encoded = encode_answers(tokenizer, ["X-ray", "Zebra fish", "12 cm"])
    expected = ["x - ray", "zebra fish", "12 cm"]
    assert decode(tokenizer, encoded["input_ids"]) == decode(tokenizer, encoded["labels"]) == expected
    assert decode(tokenizer, [[*row, 10**6] for row in encoded["input_ids"].tolist()]) == expected
    assert decode(tokenizer, [[], [tokenizer.sep_token_id]]) == ["", ""]


def test_bad_calls(tokenizer):
    for texts in ([], "one string"):
        with raises("list of one or more texts"):
            encode_questions(tokenizer, texts)
    with raises("max_length=1"):
        encode_questions(tokenizer, ["a"], max_length=1)


# --- learning a vocabulary --------------------------------------------------------------------------------------------


def test_trained_vocabulary(tokenizer):
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"]
    assert tokenizer.convert_tokens_to_ids(names) == list(range(7)) and len(tokenizer) <= 200
    assert tokenizer.tokenize("liver enlarged") == ["liver", "enlarged"]  # whole words, where there was room
    ascii_text = "".join(map(chr, range(33, 127))) + " unseen qwertz 0123456789 ~!"
    assert tokenizer.unk_token_id not in encode_questions(tokenizer, [ascii_text], max_length=None)["input_ids"]
    assert tokenizer.unk_token_id in encode_questions(tokenizer, ["ж"])["input_ids"]


def test_the_commonest_pairs_come_first():
    tokenizer = train_tokenizer(["abab"] * 3 + ["cd"] * 5 + ["ce"] * 4, vocab_size=10**4)
    size = len(train_tokenizer(["a"], vocab_size=10**4))
    learnt = sorted((i, t) for t, i in tokenizer.get_vocab().items() if i >= size)
    # cd 5, ce 4, then of a ##b ##a ##b, whose pairs all come 3 times, the alphabetically first: ##a ##b
    assert [t for _, t in learnt] == ["cd", "ce", "##ab", "##bab", "abab"]
    assert tokenizer.tokenize("abab cd ce") == ["abab", "cd", "ce"]


def test_merges_against_a_plain_count():
    """The trainer against recounting everything before each merge; ties: characters alphabetically, then pieces as they were learnt."""
    words = {"banana": 4, "bandana": 3, "anan": 2, "nab": 5, "aaaa": 2}
    spelt = {w: [w[0], *("##" + c for c in w[1:])] for w in words}
    expected = []
    age = {piece: i for i, piece in enumerate(sorted({piece for pieces in spelt.values() for piece in pieces}))}
    while True:
        pairs = {}
        for word, pieces in spelt.items():
            for pair in pairwise(pieces):
                pairs[pair] = pairs.get(pair, 0) + words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], age[p[0]], age[p[1]]))
        token = best[0] + best[1][2:]
        expected.append(token)
        age.setdefault(token, len(age))
        for pieces in spelt.values():
            j = 0
            while j < len(pieces) - 1:
                if (pieces[j], pieces[j + 1]) == best:
                    pieces[j : j + 2] = [token]
                j += 1
    tokenizer = train_tokenizer([w for w, n in words.items() for _ in range(n)], vocab_size=10**4)
    base = len(train_tokenizer(["a"], vocab_size=10**4))
    learnt = [t for _, t in sorted((i, t) for t, i in tokenizer.get_vocab().items() if i >= base)]
    assert learnt == list(dict.fromkeys(expected))


def test_limits():
    with raises("vocab_size=20: the characters of these texts alone need"):
        train_tokenizer(TEXTS, vocab_size=20)
    with raises("no texts"):
        train_tokenizer(["", "  "])
    with raises("several texts"):
        train_tokenizer("one string")
    assert len(train_tokenizer(TEXTS, vocab_size=125)) == 125
    assert "enlarged" not in train_tokenizer(TEXTS, min_frequency=3).get_vocab()


def test_same_vocabulary_in_every_process():
    """Pinned by a digest, since each run of the tests hashes text anew; nor does the texts' order matter."""
    for texts in (TEXTS * 3, (TEXTS * 3)[::-1]):
        vocab = train_tokenizer(texts, 180).get_vocab()
        assert hashlib.sha256("\n".join(sorted(vocab, key=vocab.get)).encode()).hexdigest()[:16] == "dd04eca2f83fe7a3"


def test_same_vocabulary_of_a_data_set_in_every_process(real_rad):
    """Thousands of ties, several threads."""
    samples = load_samples(real_rad)
    vocab = train_tokenizer([text for s in samples for text in (s.question, s.answer)], 4096).get_vocab()
    assert hashlib.sha256("\n".join(sorted(vocab, key=vocab.get)).encode()).hexdigest()[:16] == "767863ac208bc081"


# --- files ------------------------------------------------------------------------------------------------------------


def test_save_and_load(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "new" / "folder")
    again = load_tokenizer(tmp_path / "new" / "folder")
    assert again.get_vocab() == tokenizer.get_vocab() and again.bos_token == "[DEC]"
    for encode in (encode_questions, encode_answers):
        ours, theirs = encode(tokenizer, TEXTS), encode(again, TEXTS)
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert decode(again, encode_answers(again, TEXTS)["input_ids"]) == decode(tokenizer, encode_answers(tokenizer, TEXTS)["input_ids"])


def test_bad_files(tmp_path):
    with raises("absent: no tokenizer here"):
        load_tokenizer(tmp_path / "absent")
    with raises("no tokenizer here; give a folder with tokenizer.json or vocab.txt"):
        load_tokenizer(tmp_path)
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("[PAD]\n[UNK]\n[CLS]\na\n")
    with raises(r"vocab.txt: no \[SEP\], \[MASK\] in this vocabulary"):
        load_tokenizer(tmp_path)
    vocab.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\na\n")
    with raises("token 'a' is there more than once"):
        load_tokenizer(vocab)
    vocab.write_bytes(b"\xff\xfe\x00")
    with raises("not UTF-8"):
        load_tokenizer(vocab)
    file = tmp_path / "tokenizer.json"
    file.write_text("{")
    with raises("tokenizer.json: not valid JSON"):
        load_tokenizer(tmp_path)
    for model in ({"type": "BPE", "vocab": {}}, {"type": "WordPiece"}, None):
        file.write_text(json.dumps({"model": model}))
        with raises("holds no WordPiece vocabulary"):
            load_tokenizer(tmp_path)
    file.write_text(json.dumps({"model": {"type": "WordPiece", "vocab": {"[PAD]": 0}}}))
    with raises(r"no \[UNK\]"):
        load_tokenizer(tmp_path)


def test_real_answers_survive(real_rad):
    samples = load_samples(real_rad)
    tokenizer = train_tokenizer([s.question for s in samples] + [s.answer for s in samples], vocab_size=2000)
    answers = sorted({s.answer for s in samples})
    decoded = decode(tokenizer, encode_answers(tokenizer, answers)["input_ids"])
    assert [normalise_answer(d) for d in decoded] == [normalise_answer(a) for a in answers] and len(answers) > 400
