"""Tokenizer of the MISS family: BERT WordPiece, where [ENC] opens a question and [DEC] an answer. B = texts, L = tokens."""

from __future__ import annotations

import hashlib
import json
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from fastpeft.documents import parse_json
from fastpeft.labels import IGNORE_INDEX

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_QUESTION = 35


def _check_specials(vocab: dict[str, int], file: Path) -> None:
    missing = [token for token in SPECIALS if token not in vocab]
    if missing:
        raise ValueError(f"{file}: no {', '.join(missing)} in this vocabulary; a BERT vocabulary is needed")


def _add_roles(tokenizer):
    """[DEC] as the bos token, then [ENC]: the order of the official tokenizer, and so its ids."""
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return tokenizer


def load_tokenizer(path):
    """A `BertTokenizer` from a local folder (tokenizer.json or vocab.txt) or from a vocab.txt; nothing is downloaded.

    [DEC] (its bos token) and then [ENC] are appended where the vocabulary lacks them: ids 30,522 and 30,523 after
    bert-base-uncased's. ValueError where the path, its vocabulary or a special token is missing.
    """
    path = Path(path)
    refuse_own_code(path if path.is_dir() else path.parent)
    if path.is_dir() and (path / "tokenizer.json").is_file():
        return _from_json(path)
    vocab_file = path / "vocab.txt" if path.is_dir() else path
    if not vocab_file.is_file():
        raise ValueError(f"{path}: no tokenizer here; give a folder with tokenizer.json or vocab.txt, or a vocab.txt file")
    try:
        tokens = vocab_file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{vocab_file}: not UTF-8 text; a vocabulary is a text file with one token on each line") from None
    tokens = [token.rstrip("\r") for token in tokens]
    while tokens and not tokens[-1]:  # empty lines at the end would push [DEC] and [ENC] to other ids
        tokens.pop()
    twice = [token for token, n in Counter(tokens).items() if n > 1]
    if twice:
        raise ValueError(f"{vocab_file}: token {twice[0]!r} is there more than once; a line's number is its token's id")
    vocab = {token: i for i, token in enumerate(tokens)}
    _check_specials(vocab, vocab_file)
    from transformers import BertTokenizer

    beside = vocab_file.parent / "tokenizer_config.json"  # says what a vocab.txt can't
    config = _read_object(beside) if beside.is_file() else {}
    options = {name: config[name] for name in ("do_lower_case", "strip_accents", "tokenize_chinese_chars") if name in config}
    return _add_roles(BertTokenizer(vocab=vocab, **options))


def _read_object(file: Path) -> dict:
    try:
        value = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON and of UTF-8
        raise ValueError(f"{file}: not valid JSON ({error})") from None
    return value if isinstance(value, dict) else {}


def refuse_own_code(folder: Path) -> None:
    """ValueError for a tokenizer that asks for Python code beside it: it is not run, and no other class surely gives the same ids."""
    file = folder / "tokenizer_config.json"
    named = _read_object(file).get("auto_map") if file.is_file() else None
    if named.get("AutoTokenizer") if isinstance(named, dict) else named:
        raise ValueError(
            f"{file}: this tokenizer is Python code of its own (auto_map), which is never run: save it as a tokenizer.json with a "
            "tokenizer_class of transformers, and without auto_map"
        )


def _from_json(folder: Path):
    from transformers import BertTokenizer

    file = folder / "tokenizer.json"
    model = _read_object(file).get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict) or model.get("type", "WordPiece") != "WordPiece":
        raise ValueError(f"{file}: holds no WordPiece vocabulary; a BERT tokenizer is needed")
    _check_specials(model["vocab"], file)
    for beside in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / beside).is_file():
            _read_object(folder / beside)  # names the file where it is damaged
    try:
        return _add_roles(BertTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False))
    except Exception as error:  # the tokenizers library raises plain ones
        raise ValueError(f"{folder}: holds no tokenizer that loads ({' '.join(str(error).split())[:200]})") from None


def save_tokenizer(tokenizer, folder) -> None:
    """Writes what `load_tokenizer` reads back into a folder, made where absent."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(folder))


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4096, min_frequency: int = 1):
    """A lower-case WordPiece tokenizer of at most `vocab_size` tokens, learnt from texts: same texts, same ids, on every run.

    Ids: [PAD] 0, [UNK], [CLS], [SEP], [MASK], [DEC], [ENC]; ASCII punctuation, letters and digits, so that any English text
    can be encoded; the texts' other characters; then merges of the most frequent neighbours, seen `min_frequency` times or more.
    Among pairs of one frequency, characters go first, in alphabetical order, then pieces in the order they were learnt.
    ValueError where there are no texts, or no room for the characters.
    """
    from tokenizers import Tokenizer, models, trainers
    from transformers import BertTokenizer

    if isinstance(texts, str):
        raise ValueError("texts must be several texts, not one string")
    bert, texts = BertTokenizer().backend_tokenizer, list(texts)
    split, normalise = bert.pre_tokenizer.pre_tokenize_str, bert.normalizer.normalize_str
    words = {word for text in texts for word, _ in split(normalise(text))}
    if not words:
        raise ValueError("no texts to learn a vocabulary from")
    inner = string.ascii_lowercase + string.digits
    base = [*SPECIALS, "[DEC]", "[ENC]", *string.punctuation, *inner, *(f"##{c}" for c in inner)]
    base = list(dict.fromkeys(base + sorted({piece for word in words for piece in (word[0], *(f"##{c}" for c in word[1:]))})))
    if len(base) > vocab_size:
        raise ValueError(f"vocab_size={vocab_size}: the characters of these texts alone need {len(base)}")
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = bert.normalizer, bert.pre_tokenizer
    # All characters are given: those the trainer finds by itself get their ids, and so their place among ties, in a hash map's order.
    options = {"special_tokens": sorted(base), "continuing_subword_prefix": "##", "show_progress": False}
    backend.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=vocab_size, min_frequency=min_frequency, **options))
    vocab = backend.get_vocab()
    learnt = sorted(vocab, key=vocab.__getitem__)[len(base) :]
    return _add_roles(BertTokenizer(vocab={token: i for i, token in enumerate(base + learnt)}))


def _ids(tokenizer, texts: Sequence[str], first: str, max_length: int | None) -> dict[str, torch.Tensor]:
    if isinstance(texts, str) or not len(texts):
        raise ValueError("give a list of one or more texts")
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length={max_length}: at least 2, for the opening token and [SEP]")
    cut = {"truncation": True, "max_length": max_length} if max_length is not None else {}
    encoded = tokenizer(list(texts), padding="longest", return_tensors="pt", **cut)
    encoded["input_ids"][:, 0] = tokenizer.convert_tokens_to_ids(first)
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def encode_questions(tokenizer, questions: Sequence[str], max_length: int = MAX_QUESTION) -> dict[str, torch.Tensor]:
    """{"input_ids", "attention_mask"}, int64 [B, L]: [ENC] question [SEP], cut at `max_length`, padded to the longest."""
    return _ids(tokenizer, questions, "[ENC]", max_length)


def encode_answers(tokenizer, answers: Sequence[str], max_length: int | None = None) -> dict[str, torch.Tensor]:
    """{"input_ids", "attention_mask", "labels"}, int64 [B, L]: [DEC] answer [SEP]; labels, not shifted, are -100 at padding."""
    encoded = _ids(tokenizer, answers, "[DEC]", max_length)
    return {**encoded, "labels": encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, IGNORE_INDEX)}


def decode(tokenizer, ids) -> list[str]:
    """Texts of ids [B, L] (a tensor or lists), word pieces joined: "x - ray", which `normalise_answer` knows for "x-ray".

    Special tokens, -100 and ids beyond the vocabulary (a model's table may be larger) are left out.
    """
    texts = []
    for row in ids.tolist() if isinstance(ids, torch.Tensor) else ids:
        known = [int(i) for i in row if 0 <= i < len(tokenizer)]
        pieces = tokenizer.convert_ids_to_tokens(known, skip_special_tokens=True)
        texts.append(" ".join(pieces).replace(" ##", "").removeprefix("##"))
    return texts


def tokenizer_digest(tokenizer) -> str:
    """Of its class, vocabulary and special tokens: 32 hexadecimal digits."""
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    about = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), special]
    return hashlib.blake2b(json.dumps(about).encode(), digest_size=16).hexdigest()
