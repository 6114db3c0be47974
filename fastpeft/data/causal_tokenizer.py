"""Tokenizers of causal language models: a local folder's, LLaMA's tokenizer.model, or a small one trained on the data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from fastpeft.data._sentencepiece import BYTE, CONTROL, UNKNOWN, byte_pair_merges, read_pieces
from fastpeft.data.tokenizer import refuse_own_code
from fastpeft.documents import parse_json

_ROLES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def load_causal_tokenizer(path):
    """A tokenizer with bos, eos and padding tokens; nothing is downloaded.

    Args:
        path: a folder with tokenizer.json or any tokenizer that transformers loads without code from the folder, a folder with
            LLaMA's tokenizer.model or below one that has it (the original layout: tokenizer.model beside 7B/), or that file; tokens of
            an added_tokens.json beside it come after its own.

    Without a padding token, the unknown token pads, else the end token: padding is masked and carries no label, so which one
    makes no difference, and the vocabulary keeps its size. ValueError where nothing is found, or bos or eos is missing.
    """
    path = Path(path)
    model = next((f for f in (path, path / "tokenizer.model", path.parent / "tokenizer.model") if f.is_file()), None)
    own = path.is_dir() and any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json"))
    if own and ((path / "tokenizer.json").is_file() or not (path / "tokenizer.model").is_file()):
        from transformers import AutoTokenizer

        refuse_own_code(path)
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # of json, tokenizers, transformers, each with its own types
            what = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"{path}: this tokenizer cannot be loaded ({what})") from None
    elif model is not None:
        tokenizer = _from_sentencepiece(model)
        _add_listed(tokenizer, model.parent / "added_tokens.json")
    else:
        raise ValueError(f"{path}: no tokenizer here; give a folder with tokenizer.json or tokenizer.model, or a tokenizer.model file")
    missing = [name for name in ("bos_token", "eos_token") if getattr(tokenizer, f"{name}_id") is None]
    if missing:
        raise ValueError(f"{path}: the tokenizer has no {' and no '.join(missing)}; name it in tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token if tokenizer.unk_token_id is not None else tokenizer.eos_token
    return tokenizer


def add_tokens(tokenizer, tokens: Sequence[str]) -> None:
    """Special tokens after a tokenizer's own, in this order; [PAD] becomes the one that pads."""
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    if "[PAD]" in tokens:
        tokenizer.pad_token = "[PAD]"


def _add_listed(tokenizer, file: Path) -> None:
    """The tokens of an added_tokens.json. ValueError where their ids do not follow the tokenizer's."""
    if not file.is_file():
        return
    try:
        listed = parse_json(file.read_text(encoding="utf-8"))
        tokens = sorted(listed, key=listed.__getitem__)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not a mapping of tokens to ids ({error})") from None
    new = [token for token in tokens if token not in tokenizer.get_vocab()]
    add_tokens(tokenizer, new)
    if wrong := [token for token in tokens if tokenizer.get_vocab()[token] != listed[token]]:
        raise ValueError(f"{file}: {wrong[0]} has id {listed[wrong[0]]}, and {tokenizer.get_vocab()[wrong[0]]} follows the tokenizer's own")


def _from_sentencepiece(file: Path):
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = read_pieces(file)
    special = {text for text, _, kind in pieces if kind in (UNKNOWN, CONTROL)}
    absent = [token for token in _ROLES.values() if token not in special]
    if absent:
        raise ValueError(f"{file}: no {', '.join(absent)} among its special pieces; LLaMA's tokenizer.model is needed")
    if sum(kind == BYTE for _, _, kind in pieces) != 256:
        raise ValueError(f"{file}: no pieces for the 256 bytes; LLaMA's tokenizer.model is needed")
    vocab = {text: i for i, (text, _, _) in enumerate(pieces)}
    merges = byte_pair_merges(pieces)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    # Not transformers' LlamaTokenizer: it gives a text that opens with a space one "▁" where sentencepiece gives two.
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pieces_to_text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(pieces_to_text)
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **_ROLES)


def train_causal_tokenizer(texts: Iterable[str], vocab_size: int = 4096, min_frequency: int = 2):
    """A byte-level BPE tokenizer of at most `vocab_size` tokens, learnt from texts: same texts, same ids, on every run.

    Ids: <unk> 0, <s> 1 (bos), </s> 2 (eos), <pad> 3; the 256 bytes, so that any text can be encoded and decoded again without
    loss; then merges of the most frequent neighbours within words, seen `min_frequency` times or more. Among pairs of one frequency, the
    one whose pieces have the lower ids goes first. ValueError where there are no texts, or no room for the bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if isinstance(texts, str):
        raise ValueError("texts must be several texts, not one string")
    roles, alphabet, texts = {**_ROLES, "pad_token": "<pad>"}, sorted(pre_tokenizers.ByteLevel.alphabet()), list(texts)
    if vocab_size < len(roles) + len(alphabet):
        raise ValueError(f"vocab_size={vocab_size}: the special tokens and the 256 bytes alone need {len(roles) + len(alphabet)}")
    if not any(texts):
        raise ValueError("no texts to learn a vocabulary from")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    options = {"special_tokens": list(roles.values()), "initial_alphabet": alphabet, "show_progress": False}
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=min_frequency, **options))
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **roles)


def encode_texts(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, without bos and eos. A "</s>" within a text is spelt out: data can't end a sequence."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
