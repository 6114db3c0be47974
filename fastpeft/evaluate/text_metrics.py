"""Metrics of generated text in paper 001: ROUGE-L, METEOR, BERTScore and mean tokens, by their own libraries (extra ``metrics``).

Where an image has several references, the best one counts, as each library defines it. What a metric lacks (a package, a model folder) is
said under "missing"; the other metrics are reported.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

METRICS = ("rouge", "meteor", "bertscore", "tokens")
TITLES = {"rouge": "ROUGE-L", "meteor": "METEOR", "bertscore": "BERTScore", "tokens": "tokens"}
INSTALL = "pip install 'fastpeft[metrics]'"
WORDNET_FILES = ("lexnames", *(f"{kind}.{pos}" for kind in ("index", "data") for pos in ("noun", "verb", "adj", "adv")))


class Missing(Exception):
    """What a metric needs and does not have, and how to provide it."""


def text_metrics(
    responses: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    tokenizer=None,
    metrics: Sequence[str] = METRICS,
    bertscore_model: str | None = None,
    bertscore_layer: int | None = None,
    bertscore_idf: bool = False,
    bertscore_baseline: str | None = None,
    wordnet: str | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """{"ROUGE-L", "METEOR", "BERTScore", "tokens", "missing": {metric: reason}} of responses against one or more references each.

    tokenizer: the model's, for "tokens": the mean number of a response's tokens, without the end token. ValueError where the numbers of
    responses and references differ, or a metric is unknown.
    """
    if isinstance(responses, str) or len(responses) != len(references) or not all(references):
        raise ValueError(f"{len(responses)} responses for {len(references)} lists of references: give one list of texts for each")
    if unknown := sorted(set(metrics) - set(METRICS)):
        raise ValueError(f"no metric is called {', '.join(unknown)}; there are {', '.join(METRICS)}")
    bert = {"model": bertscore_model, "layer": bertscore_layer, "idf": bertscore_idf, "baseline": bertscore_baseline, "device": device}
    compute: dict[str, Callable[[], Any]] = {
        "rouge": lambda: rouge_l(responses, references),
        "meteor": lambda: meteor(responses, references, wordnet),
        "bertscore": lambda: bertscore(responses, references, **bert),
        "tokens": lambda: mean_tokens(responses, tokenizer),
    }
    found, missing = {}, {}
    for name in METRICS if responses else ():
        if name in metrics:
            try:
                found[TITLES[name]] = compute[name]()
            except Missing as reason:
                missing[TITLES[name]] = str(reason)
    return found | {"missing": missing}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def rouge_l(responses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Mean precision, recall and F1 of `rouge_score`'s rougeL, without stemming."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise Missing(f"rouge_score is not installed: {INSTALL}") from None
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    rows = [scorer.score_multi(list(texts), response)["rougeL"] for response, texts in zip(responses, references)]
    means = [_mean(column) for column in zip(*rows)]  # a row: precision, recall, fmeasure
    return dict(zip(("precision", "recall", "f1"), means)) | {"stemming": False}


class NoSynonyms:
    """In WordNet's place: every word without synonyms, so that METEOR matches words and stems alone."""

    def synsets(self, word: str) -> list:
        return []


def open_wordnet(folder: str | Path):
    """nltk's reader of a WordNet folder (data.noun, index.noun, ...)."""
    import nltk.data
    from nltk.corpus.reader import WordNetCorpusReader

    class English(WordNetCorpusReader):
        """Of this folder alone: the mapping to WordNet 3.0, for other languages, would look for a second one."""

        def map_wn(self, version="wordnet"):
            return None

    root = Path(folder).expanduser().resolve()
    if lacking := [name for name in WORDNET_FILES if not (root / name).is_file()]:
        raise Missing(f"{root} is no WordNet folder, as it has no {lacking[0]}: give the unpacked corpora/wordnet of nltk_data (wordnet)")
    if str(root) not in nltk.data.path:
        nltk.data.path.append(str(root))  # nltk opens files below its own paths only
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is for English alone
            return English(str(root), None)
    except Exception as error:  # nltk's own, OSError, ValueError, AssertionError of a damaged file
        raise Missing(f"{root} cannot be read as WordNet ({' '.join(str(error).split())[:200] or type(error).__name__})") from None


def meteor(responses: Sequence[str], references: Sequence[Sequence[str]], wordnet: str | None = None) -> dict[str, Any]:
    """Mean METEOR of nltk (exact, stem and synonym matches; alpha 0.9, beta 3, gamma 0.5). Texts are split by nltk's
    ``wordpunct_tokenize``, which needs no data. Without a WordNet folder there are no synonyms, and the result says so."""
    try:
        from nltk.tokenize import wordpunct_tokenize
        from nltk.translate.meteor_score import meteor_score
    except ImportError:
        raise Missing(f"nltk is not installed: {INSTALL}") from None
    synonyms = NoSynonyms() if wordnet is None else open_wordnet(wordnet)
    scores = []
    for response, texts in zip(responses, references):
        scores.append(meteor_score([wordpunct_tokenize(text) for text in texts], wordpunct_tokenize(response), wordnet=synonyms))
    return {"score": _mean(scores), "synonyms": "without synonyms" if wordnet is None else str(wordnet), "words": "wordpunct_tokenize"}


def bertscore(
    responses: Sequence[str],
    references: Sequence[Sequence[str]],
    model: str | None,
    layer: int | None = None,
    idf: bool = False,
    baseline: str | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Mean precision, recall and F1 of `bert_score` with a local model folder; nothing is downloaded.

    layer: whose output is compared (default: bert_score's choice for a model of the folder's name, else the last). idf: words weighted by
    their rarity among the references. baseline: bert_score's CSV of baselines by layer, to rescale with. An empty text scores 0. Texts
    are cut where the model's positions end.
    """
    if model is None:
        raise Missing("no model folder: give one (bertscore_model), such as a copy of roberta-large")
    folder = Path(model).expanduser().absolute()
    if not (folder / "config.json").is_file():
        raise Missing(f"{folder} is no model folder, as it has no config.json: give a local transformers folder (bertscore_model)")
    if baseline is not None and not Path(baseline).is_file():
        raise Missing(f"no baseline file at {baseline}: bert_score has them in rescale_baseline/ (bertscore_baseline)")
    try:
        from bert_score.utils import model2layers
    except ImportError:
        raise Missing(f"bert_score is not installed: {INSTALL}") from None
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        layers = config.num_hidden_layers
        names = [name for name in model2layers if name.split("/")[-1] == folder.name]
        layer = layer or min(layers, model2layers[names[0]] if names else layers)
        if layer > layers:
            raise Missing(f"{folder} has {layers} layers: give bertscore_layer up to that")
        rows = _bertscore_rows(responses, references, folder, layer, idf, config, device)
        if baseline is not None:
            base = _baseline(baseline, layer)
            rows = (rows - base) / (1 - base)
    except Missing:
        raise
    except Exception as error:  # of a folder's config, tokenizer or weights: transformers, tokenizers, safetensors, each with its own types
        raise Missing(f"{folder}: no BERTScore with this model ({' '.join(str(error).split())[:300]})") from None
    about = {"model": str(folder), "layer": layer, "idf": idf, "rescaled": False if baseline is None else str(baseline)}
    return dict(zip(("precision", "recall", "f1"), rows.double().mean(0).tolist())) | about


def _bertscore_rows(responses, references, folder: Path, layer: int, idf: bool, config, device) -> torch.Tensor:
    """float32 [N, 3]: precision, recall and F1 of each response, each the best over its references, as `bert_score.score` has them. That
    function itself fails on empty texts and on tokenizers without a greatest length (0.3.13 with transformers 5)."""
    from bert_score.utils import bert_cos_score_idf, get_idf_dict, get_model, get_tokenizer

    if "t5" in str(folder) and "t5" not in config.model_type:
        raise ValueError("bert_score takes every path with 't5' in it for a T5: give the folder another path")
    pairs = [(i, response, text) for i, (response, texts) in enumerate(zip(responses, references)) for text in texts]
    full = [at for at, (_, response, text) in enumerate(pairs) if response.strip() and text.strip()]
    scores = torch.zeros(len(pairs), 3)
    if full:
        tokenizer = get_tokenizer(str(folder))
        positions = getattr(config, "max_position_embeddings", None) or 512
        reserved = 2 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0  # their positions count from the padding's
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions - reserved)
        if idf:
            weights = get_idf_dict([text for *_, text in pairs if text.strip()], tokenizer, nthreads=0)
        else:
            weights = _equal_weights(tokenizer)
        network = get_model(str(folder), layer).to(device)
        said, wanted = [pairs[at][1] for at in full], [pairs[at][2] for at in full]
        scores[full] = bert_cos_score_idf(network, wanted, said, tokenizer, weights, device=device).float()
    owner = torch.tensor([i for i, *_ in pairs])
    return torch.stack([scores[owner == i].amax(0) for i in range(len(responses))])


def _equal_weights(tokenizer) -> dict[int, float]:
    """1 for every token, 0 for the first and the last of a text."""
    from collections import defaultdict

    weights: dict[int, float] = defaultdict(lambda: 1.0)
    return weights | {tokenizer.sep_token_id: 0.0, tokenizer.cls_token_id: 0.0}


def _baseline(path: str | Path, layer: int) -> torch.Tensor:
    """float32 [3]: a layer's baselines of precision, recall and F1, from a CSV with a header and one row per layer from 0."""
    lines = Path(path).read_text(encoding="utf-8").split()[1:]
    return torch.tensor([float(value) for value in lines[layer].split(",")[1:4]])


def mean_tokens(responses: Sequence[str], tokenizer) -> float:
    """Tokens of a response by the model's tokenizer, on average; the end token and other special ones are not counted."""
    if tokenizer is None:
        raise Missing("no tokenizer: give the model's")
    return _mean([len(ids) for ids in tokenizer(list(responses), add_special_tokens=False)["input_ids"]])
