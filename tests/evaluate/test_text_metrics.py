"""Text metrics against the libraries that define them, on 200 made pairs; nothing is downloaded."""

import builtins
import json
import random
import socket
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from fastpeft.evaluate.text_metrics import METRICS, open_wordnet, text_metrics

WORDS = [
    *("the", "a", "no", "left", "right", "lung", "lungs", "heart", "is", "are", "clear", "enlarged", "normal"),
    *("effusion", "effusions", "seen", "large", "small", "big", "tall", "there", "liver", "X-ray"),
]


@pytest.fixture(scope="module")
def pairs():
    """200 responses and references, some of one word, with punctuation and capitals."""
    draw = random.Random(0)

    def text(most: int) -> str:
        words = [draw.choice(WORDS) for _ in range(draw.randint(1, most))]
        return " ".join(words).capitalize() + draw.choice(["", ".", ", seen.", "!"])

    return [text(14) for _ in range(200)], [text(10) for _ in range(200)]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def single(pairs, **how):
    said, wanted = pairs
    return text_metrics(said, [[text] for text in wanted], **how)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder of a random BERT; its tokenizer says how much it takes, as bert_score itself needs."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("models") / "some-bert"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",", "!", "-", "x", "ray", *map(str.lower, WORDS[:-1])]
    BertTokenizer(vocab={piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, model_max_length=40).save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 40}
    BertModel(BertConfig(vocab_size=len(pieces), initializer_range=0.5, **size)).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")  # bert_score's own reading of baselines
@pytest.mark.parametrize("how", [{"layer": 2}, {"layer": 3, "idf": True}, {}, {"layer": 1, "baseline": True}])
def test_bertscore(pairs, bert, tmp_path, how):
    from bert_score import score

    baseline = None
    if how.get("baseline"):
        baseline = tmp_path / "bert.tsv"
        baseline.write_text("LAYER,P,R,F\n0,0.1,0.1,0.1\n1,0.2,0.25,0.3\n2,0.5,0.5,0.5\n3,0.6,0.6,0.6\n")
    layer, idf = how.get("layer"), how.get("idf", False)
    given = {"bertscore_layer": layer, "bertscore_idf": idf, "bertscore_baseline": baseline}
    ours = single(pairs, metrics=["bertscore"], bertscore_model=str(bert), **given)
    rescaled = {"rescale_with_baseline": True, "baseline_path": str(baseline), "lang": "en"} if baseline else {}
    theirs = score(*pairs, model_type=str(bert), num_layers=layer or 3, idf=idf, nthreads=0, device="cpu", **rescaled)
    got = ours["BERTScore"]
    assert [got[name] for name in ("precision", "recall", "f1")] == pytest.approx([t.double().mean().item() for t in theirs], abs=1e-6)
    assert (got["layer"], got["idf"], got["rescaled"]) == (layer or 3, idf, str(baseline) if baseline else False)
    assert 0.05 < got["f1"] < 0.98 and not ours["missing"]


def test_bertscore_of_several_references_and_of_empty_texts(bert):
    from bert_score import score

    how = {"metrics": ["bertscore"], "bertscore_model": str(bert), "bertscore_layer": 2}
    said, wanted = ["the left lung", "heart"], [["a left heart", "left lung seen"], ["the liver"]]
    theirs = score(said, wanted, model_type=str(bert), num_layers=2, nthreads=0, device="cpu")
    got = text_metrics(said, wanted, **how)["BERTScore"]
    assert [got[name] for name in ("precision", "recall", "f1")] == pytest.approx([t.double().mean().item() for t in theirs], abs=1e-6)
    half = text_metrics([*said, "", " "], [*wanted, ["lung"], ["heart"]], **how)["BERTScore"]
    assert half["f1"] == pytest.approx(got["f1"] / 2, abs=1e-6)


def test_bertscore_cuts_at_the_models_positions(bert, tmp_path):
    """Where the tokenizer does not say how much it takes, and bert_score itself fails."""
    import shutil

    folder = shutil.copytree(bert, tmp_path / "endless-bert")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["model_max_length"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    said, wanted = ["the left lung " * 30], [["a heart"]]
    for path in (folder, bert):
        got = text_metrics(said, wanted, metrics=["bertscore"], bertscore_model=str(path))["BERTScore"]
        assert got["f1"] == pytest.approx(text_metrics(said, wanted, metrics=["bertscore"], bertscore_model=str(bert))["BERTScore"]["f1"])


def test_rouge(pairs):
    from rouge_score.rouge_scorer import RougeScorer

    theirs = [RougeScorer(["rougeL"]).score(wanted, said)["rougeL"] for said, wanted in zip(*pairs)]
    got = single(pairs, metrics=["rouge"])["ROUGE-L"]
    for name, at in (("precision", 0), ("recall", 1), ("f1", 2)):
        assert got[name] == pytest.approx(sum(row[at] for row in theirs) / 200, abs=1e-12)
    best = text_metrics(["the left lung"], [["heart", "the left lung"]], metrics=["rouge"])["ROUGE-L"]
    assert best["f1"] == best["precision"] == best["recall"] == 1.0


# nltk looks up what the stemmer leaves of a word: "big" and "tall" are the words whose synonyms it finds
SYNSETS = [("big", "tall"), ("fluid", "liquid"), ("clear", "normal"), ("big", "large")]


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory):
    """A WordNet of four nouns' synsets, in the files' own format; the other parts of speech are empty."""
    folder = tmp_path_factory.mktemp("wordnet")
    for name in ("adj", "adv", "noun", "verb"):
        for file in (f"index.{name}", f"data.{name}", f"{name}.exc"):
            (folder / file).write_text("")
    (folder / "lexnames").write_text("00\tadj.all\t3\n01\tadj.pert\t3\n02\tadv.all\t4\n03\tnoun.Tops\t1\n")
    (folder / "cntlist.rev").write_text("")
    (folder / "index.sense").write_text("")
    data, places = "", {}
    for synset in SYNSETS:
        offset = len(data)
        for word in synset:
            places.setdefault(word, []).append(offset)
        data += f"{offset:08d} 03 n {len(synset):02x} {' '.join(f'{word} 0' for word in synset)} 000 | meaning\n"
    (folder / "data.noun").write_text(data)
    rows = (f"{word} n {len(at)} 0 {len(at)} 0 {' '.join(f'{o:08d}' for o in at)}\n" for word, at in sorted(places.items()))
    (folder / "index.noun").write_text("".join(rows))
    return folder


@pytest.mark.parametrize("synonyms", [False, True])
def test_meteor(pairs, wordnet, synonyms):
    from nltk.tokenize import wordpunct_tokenize as cut
    from nltk.translate.meteor_score import single_meteor_score

    class Table:
        """Synonyms from a table, in WordNet's place."""

        def synsets(self, word):
            found = [[SimpleNamespace(name=partial(str, w)) for w in group] for group in SYNSETS if word in group and synonyms]
            return [SimpleNamespace(lemmas=partial(list, lemmas)) for lemmas in found]

    got = single(pairs, metrics=["meteor"], wordnet=str(wordnet) if synonyms else None)["METEOR"]
    theirs = [single_meteor_score(cut(wanted), cut(said), wordnet=Table()) for said, wanted in zip(*pairs)]
    assert got["score"] == pytest.approx(sum(theirs) / 200, abs=1e-12)
    assert got["synonyms"] == (str(wordnet) if synonyms else "without synonyms")
    assert not synonyms or got["score"] > single(pairs, metrics=["meteor"])["METEOR"]["score"]


def test_meteor_matches_stems_and_synonyms(wordnet):
    def meteor(said, wanted, **how):
        return text_metrics([said], [[wanted]], metrics=["meteor"], **how)["METEOR"]["score"]

    assert meteor("large effusions", "large effusion") == meteor("large effusion", "large effusion") == 1 - 0.5 * (1 / 2) ** 3
    assert meteor("big fluid", "tall liquid") == 0
    assert meteor("big fluid", "tall liquid", wordnet=str(wordnet)) == 1 - 0.5 * (1 / 2) ** 3
    assert [s.lemma_names() for s in open_wordnet(wordnet).synsets("big")] == [["big", "tall"], ["big", "large"]]


def test_mean_tokens():
    from fastpeft.data import train_causal_tokenizer, train_tokenizer

    texts = ["left lung", "the heart is large", ""]
    for tokenizer in (train_causal_tokenizer(texts, min_frequency=1), train_tokenizer(texts)):
        counts = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        assert text_metrics(texts, [["x"]] * 3, metrics=["tokens"], tokenizer=tokenizer)["tokens"] == sum(counts) / 3 and counts[2] == 0
    assert text_metrics(texts[:2], [["x"]] * 2, metrics=["tokens"], tokenizer=tokenizer)["tokens"] == 3.0  # no [DEC], no [SEP]


def test_what_is_missing_says_how_to_provide_it(tmp_path, pairs, monkeypatch):
    real = builtins.__import__
    found = single(pairs, bertscore_model=str(tmp_path), wordnet=str(tmp_path / "none"))
    assert found.keys() == {"ROUGE-L", "missing"} and found["missing"].keys() == {"METEOR", "BERTScore", "tokens"}
    assert "has no lexnames" in found["missing"]["METEOR"] and "has no config.json" in found["missing"]["BERTScore"]
    assert "bertscore_model" in single(pairs, metrics=["bertscore"])["missing"]["BERTScore"]

    def without(name, *rest):
        if name.split(".")[0] in ("rouge_score", "nltk", "bert_score"):
            raise ImportError(name)
        return real(name, *rest)

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(builtins, "__import__", without)
    missing = single(pairs, bertscore_model=str(tmp_path))["missing"]
    for title, package in (("ROUGE-L", "rouge_score"), ("METEOR", "nltk"), ("BERTScore", "bert_score")):
        assert missing[title] == f"{package} is not installed: pip install 'fastpeft[metrics]'"


def test_damaged_resources_do_not_stop_the_others(bert, wordnet, tmp_path):
    import shutil

    broken, words = shutil.copytree(bert, tmp_path / "broken"), shutil.copytree(wordnet, tmp_path / "words")
    (broken / "model.safetensors").write_bytes(b"no weights")
    (words / "index.noun").write_text("large n 2 0 1 0 00000000\n")
    found = text_metrics(["lung"], [["lung"]], bertscore_model=str(broken), wordnet=str(words))
    assert found["ROUGE-L"]["f1"] == 1.0 and "cannot be read as WordNet" in found["missing"]["METEOR"]
    assert "no BERTScore with this model" in found["missing"]["BERTScore"]
    deep = text_metrics(["lung"], [["lung"]], metrics=["bertscore"], bertscore_model=str(bert), bertscore_layer=4)
    assert "has 3 layers" in deep["missing"]["BERTScore"]


def test_bad_calls():
    with pytest.raises(ValueError, match="no metric is called bleu; there are rouge, meteor, bertscore, tokens"):
        text_metrics(["a"], [["a"]], metrics=["bleu"])
    for references in ([], [["a"], ["b"]], [[]]):
        with pytest.raises(ValueError, match="lists of references"):
            text_metrics(["a"], references)
    assert text_metrics([], []) == {"missing": {}} and len(METRICS) == 4


def test_importing_the_metrics_imports_no_library_and_says_nothing():
    code = "import sys, fastpeft.evaluate; print(sorted({'nltk', 'rouge_score', 'bert_score', 'matplotlib', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_bertscore_of_a_roberta(tmp_path):
    """Its positions begin after the padding's: two fewer than the configuration has."""
    from bert_score import score
    from tokenizers import pre_tokenizers
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizer

    folder = tmp_path / "some-roberta"
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    RobertaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=512).save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 42}
    RobertaModel(RobertaConfig(vocab_size=len(pieces), initializer_range=0.5, **size)).save_pretrained(folder)
    how = {"metrics": ["bertscore"], "bertscore_model": str(folder)}
    got = text_metrics(["a big cat"], [["the cat"]], **how)["BERTScore"]
    theirs = score(["a big cat"], ["the cat"], model_type=str(folder), num_layers=2, device="cpu")
    assert [got[name] for name in ("precision", "recall", "f1")] == pytest.approx([t.item() for t in theirs], abs=1e-6)
    assert text_metrics(["lung " * 60], [["the cat"]], **how)["missing"] == {}
