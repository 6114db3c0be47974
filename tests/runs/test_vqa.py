"""From names and folders to a run and back: splits, vocabularies, preprocessing, adapters that describe themselves."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

import fastpeft as fp
from fastpeft.data import Preprocess, load_samples, load_tokenizer, save_tokenizer, train_tokenizer
from fastpeft.methods import LoRA
from fastpeft.models import parts_of
from fastpeft.plan import plan_for
from fastpeft.runs.evaluate import eval_run, load_run
from fastpeft.runs.merge import merge_run
from fastpeft.runs.options import DataOptions
from fastpeft.runs.splits import data_notes, load_splits
from fastpeft.runs.train import train_run
from fastpeft.runs.vqa import PREPROCESS, model_for, preprocess_for
from fastpeft.runs.vqa import read as read_vqa
from fastpeft.train import TrainConfig

load_split = partial(load_splits, read=read_vqa)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(phantoms, tmp_path_factory):
    """A run from scratch with a part of the images held out: (its folder, its summary)."""
    out = tmp_path_factory.mktemp("finished") / "run"
    config = TrainConfig(steps=15, batch_size=12, learning_rate=2e-3, base_learning_rate=2e-3, out=out, progress=False)
    return out, train_run("miss-tiny", "LoRA/T/T", DataOptions(str(phantoms), hold_out=0.3), config, pretrained=False, r=2)


def copy_adapter(finished, tmp_path):
    return shutil.copytree(finished[0] / "adapter", tmp_path / "adapter")


def rescored(adapter, data, split_file, model=None):
    scores = eval_run(adapter, DataOptions(str(data), split_file=split_file), device="cpu", model=model, progress=False)
    return {name: value for name, value in scores.items() if name not in ("generation", "notes")}


# splits -------------------------------------------------------------------------------------------------------------------------


def test_a_folders_own_test_split_is_scored(phantoms):
    samples, held = load_split(DataOptions(str(phantoms)))
    assert (len(samples), len(held)) == (50, 20)
    assert load_split(DataOptions(str(phantoms)), evaluate=False)[1] is None


def test_held_out_images_are_not_trained_on(phantoms):
    samples, held = load_split(DataOptions(str(phantoms), hold_out=0.3))
    assert len(samples) + len(held) == 50 and not {s.image for s in samples} & {s.image for s in held}
    with pytest.raises(ValueError, match="give one of them"):
        load_split(DataOptions(str(phantoms), hold_out=0.3, eval_split_file="test.json"))


@pytest.mark.parametrize("hold_out", [-0.5, 1, 1.5])
def test_impossible_fractions_are_refused(phantoms, hold_out):
    with pytest.raises(ValueError, match="use a number between 0 and 1"):
        load_split(DataOptions(str(phantoms), hold_out=hold_out))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"data": 3}, "data must be a path, not 3"),
        ({"split_file": 3}, "split_file must be a path, not 3"),
        ({"languages": 5}, "languages must be a list of q_lang values, not 5"),
        ({"languages": ["en", 5]}, "languages must be a list"),
        ({"skip_bad": "yes"}, "skip_bad must be true or false"),
        ({"hold_out": "half"}, "hold_out='half'"),
    ],
)
def test_data_options_are_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        DataOptions(**{"data": "folder"} | wrong)


def test_an_answer_longer_than_the_decoder_is_named_or_skipped(phantoms, tmp_path):
    data = shutil.copytree(phantoms, tmp_path / "data")
    rows = json.loads((data / "train.json").read_text())
    rows[7]["answer"] = "left lung " * 100
    (data / "train.json").write_text(json.dumps(rows))
    config = TrainConfig(steps=1, batch_size=4, progress=False)
    with pytest.raises(ValueError, match=r"train.json: entry 7: an answer of \d+ tokens, and the decoder has 128 positions"):
        train_run("miss-tiny", "F/F/LoRA", DataOptions(str(data)), config, evaluate=False)
    summary = train_run("miss-tiny", "F/F/LoRA", DataOptions(str(data), skip_bad=True), config, evaluate=False)
    assert "1 samples left out: answer too long" in summary["notes"]


@pytest.mark.parametrize("test, reason", [(None, "apart from the training samples"), ("[{]", "not valid JSON")])
def test_a_test_split_that_cannot_be_asked_is_noted(phantoms, tmp_path, test, reason):
    """Training goes on, and the summary says why nothing was scored."""
    data = shutil.copytree(phantoms, tmp_path / "data")
    (data / "test.json").unlink() if test is None else (data / "test.json").write_text(test)
    samples, held = load_split(DataOptions(str(data)))
    assert held is None and any("no test questions were asked" in note and reason in note for note in data_notes(samples))


def test_what_was_left_out_is_noted_with_and_without_hold_out(phantoms, tmp_path):
    data = shutil.copytree(phantoms, tmp_path / "data")
    rows = json.loads((data / "train.json").read_text())
    rows[0]["q_lang"], rows[1]["answer"] = "zh", ""
    (data / "train.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"train.json: entry 1: answer is empty"):
        load_split(DataOptions(str(data)))
    for hold_out in (0.0, 0.3):
        samples, _ = load_split(DataOptions(str(data), hold_out=hold_out, skip_bad=True))
        assert data_notes(samples)[:2] == ["1 entries in language 'zh' left out", "1 bad entries skipped: empty answer"]


# plans --------------------------------------------------------------------------------------------------------------------------


def test_options_of_lora_reach_all_lora_and_win(tmp_path):
    network = fp.build("miss-tiny", device="meta")
    file = tmp_path / "lora.yaml"
    file.write_text("plan: {vit: F, jtm: {LoRA: {r: 16, lora_dropout: 0.5}}, dec: LoRA+LayerNorm}\n")
    plan = plan_for(parts_of(network), str(file), r=2, lora_alpha=None, lora_dropout=0.1).treatments
    assert plan["jtm"] == (LoRA(r=2, lora_dropout=0.1),) and plan["dec"][0] == LoRA(r=2, lora_dropout=0.1)
    assert str(plan_for(parts_of(network), str(file))) == "F/LoRA/LoRA+LayerNorm"
    assert plan_for(parts_of(network), str(file)).treatments["jtm"] == (LoRA(r=16, lora_dropout=0.5),)


def test_a_plan_without_lora_ignores_its_rank_but_not_a_wrong_one():
    network = fp.build("miss-tiny", device="meta")
    assert str(plan_for(parts_of(network), "F/T/IA3", r=8)) == "F/T/IA3"
    with pytest.raises(ValueError, match="r must be a positive integer, not 0"):
        plan_for(parts_of(network), "F/T/IA3", r=0)


# models, vocabularies, preprocessing --------------------------------------------------------------------------------------------


def test_a_vocabulary_is_learnt_or_taken(phantoms, tmp_path):
    samples = load_samples(phantoms)
    network, learnt, preprocess = model_for("miss-tiny", samples, vocab=None, pretrained=False, seed=0)
    text = network.config.text_config
    assert text.vocab_size == len(learnt) and text.bos_token_id == learnt.bos_token_id and text.sep_token_id == learnt.sep_token_id
    assert network.decoder_start_token_id == learnt.bos_token_id
    assert preprocess == Preprocess(64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    save_tokenizer(train_tokenizer(["a few words"]), tmp_path / "words")
    network, taken, _ = model_for("miss-tiny", samples, vocab=str(tmp_path / "words"), pretrained=False, seed=0)
    assert len(taken) == network.config.text_config.vocab_size != len(learnt)


def test_a_folder_takes_only_its_own_vocabulary(phantoms, finished, tmp_path):
    folder = merge_run(finished[0] / "adapter", tmp_path / "merged")
    other = load_tokenizer(folder)
    other.add_tokens(["borborygmus"])
    save_tokenizer(other, tmp_path / "more")
    with pytest.raises(ValueError, match="use the vocabulary it was trained with"):
        model_for(str(folder), load_samples(phantoms), vocab=str(tmp_path / "more"), pretrained=True, seed=0)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["bos_token_id"] = 9
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"\[DEC\] is token \d+ in the vocabulary and 9 in "):
        model_for(str(folder), load_samples(phantoms), vocab=None, pretrained=True, seed=0)


def test_preprocessing_is_the_folders(tmp_path):
    """Of transformers' file the pixels that its own processor makes of it."""
    network, file = fp.build("miss-tiny", device="meta"), tmp_path / "preprocessor_config.json"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8))
    published = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.1, 0.2, 0.3], "size": {"height": 64, "width": 64}}
    plain = {"do_normalize": False, "resample": 2}
    for content in (published, published | plain, published | {"resample": 3}, {"size": published["size"]}):
        file.write_text(json.dumps(content))
        want = BlipImageProcessorPil.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(preprocess_for(tmp_path, network)(image), want, rtol=0, atol=1e-6)
    file.write_text('{"resample": 1}')
    with pytest.raises(ValueError, match="resample=1: images are resized with 2"):
        preprocess_for(tmp_path, network)
    (tmp_path / PREPROCESS).write_text(json.dumps(Preprocess(48, extra_255=True).to_dict()))
    assert preprocess_for(tmp_path, network) == Preprocess(48, extra_255=True)
    for torn in ("{", "[1]", '{"image_size": "big"}', '{"tint": 3}'):
        (tmp_path / PREPROCESS).write_text(torn)
        with pytest.raises(ValueError, match=PREPROCESS):
            preprocess_for(tmp_path, network)


# runs, adapters, merging --------------------------------------------------------------------------------------------------------


def test_a_seed_decides_new_adapters_too(phantoms, tmp_path):
    final = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        config = TrainConfig(steps=2, batch_size=4, seed=seed, out=tmp_path / name, progress=False)
        train_run("miss-tiny", "F/LoRA/LoRA", DataOptions(str(phantoms)), config, pretrained=False, evaluate=False)
        final.append((tmp_path / name / "adapter" / "dec" / "adapter_model.safetensors").read_bytes())
        torch.rand(5)
    assert final[0] == final[1] != final[2]


def test_an_adapter_folder_is_all_that_scoring_needs(phantoms, finished, tmp_path):
    """held_out.json is a split file: the same questions give the same accuracies as at the end of training."""
    out, summary = finished
    adapter = copy_adapter(finished, tmp_path)
    assert summary["eval"]["n"] == 15 and summary["eval"]["global"] > 0
    assert rescored(adapter, phantoms, out / "held_out.json") == summary["eval"]


def test_a_bfloat16_run_scores_the_same_again(phantoms, tmp_path):
    config = TrainConfig(steps=2, batch_size=4, dtype="bf16", out=tmp_path / "run", progress=False)
    summary = train_run("miss-tiny", "F/LoRA/T", DataOptions(str(phantoms)), config, pretrained=False)
    assert json.loads((tmp_path / "run" / "adapter" / "fastpeft.json").read_text())["base"]["dtype"] == "bfloat16"
    assert rescored(tmp_path / "run" / "adapter", phantoms, None) == summary["eval"]


@pytest.mark.parametrize("evaluate", [True, False])
def test_no_eval_holds_out_all_the_same(phantoms, tmp_path, evaluate):
    config = TrainConfig(steps=1, batch_size=4, out=tmp_path / "run", progress=False)
    data = DataOptions(str(phantoms), hold_out=0.3)
    summary = train_run("miss-tiny", "F/F/LoRA", data, config, pretrained=False, evaluate=evaluate)
    assert (summary["eval"] is not None) is evaluate and len(json.loads((tmp_path / "run" / "held_out.json").read_text())) == 15


def test_a_merged_model_answers_alike_and_trains_on(phantoms, finished, tmp_path):
    out, summary = finished
    merged = merge_run(out / "adapter", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]
    config = TrainConfig(steps=1, batch_size=4, learning_rate=1e-9, out=tmp_path / "next", progress=False)
    again = train_run(str(merged), "F/F/LoRA", DataOptions(str(phantoms), hold_out=0.3), config)
    assert again["eval"] == summary["eval"]  # a step of 1e-9 changes no answer
    assert rescored(tmp_path / "next" / "adapter", phantoms, out / "held_out.json") == summary["eval"]
    moved = merged.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="merged"):
        load_run(tmp_path / "next" / "adapter", "cpu")
    assert rescored(tmp_path / "next" / "adapter", phantoms, out / "held_out.json", model=str(moved)) == summary["eval"]


def test_merging_refuses_to_write_over_anything(finished, tmp_path):
    (tmp_path / "a file").write_text("mine")
    for out in (tmp_path, tmp_path / "a file"):
        with pytest.raises(ValueError, match="is not an empty folder"):
            merge_run(finished[0] / "adapter", out)
    assert (tmp_path / "a file").read_text() == "mine"


def edit(adapter, **changes):
    path = adapter / "fastpeft.json"
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not None}))


@pytest.mark.parametrize(
    "tear, message",
    [
        (shutil.rmtree, "no adapter folder at"),
        (lambda a: (a / "fastpeft.json").unlink(), "has neither fastpeft.json nor config.json: it is no adapter that fastpeft wrote"),
        (lambda a: (a / "fastpeft.json").write_text('{"format": 1, "pl'), "fastpeft.json is damaged or not ours"),
        (lambda a: (a / "fastpeft.json").write_text("[]"), "fastpeft.json is damaged or not ours"),
        (lambda a: edit(a, format=99), "newer than this fastpeft reads"),
        (lambda a: edit(a, base=None), "fastpeft.json is damaged: it does not say the base's model"),
        (lambda a: edit(a, base={"model": "miss-tiny", "dtype": "float31"}), "damaged or not ours: base.dtype: Input should be"),
        (lambda a: edit(a, treatments=None), "fastpeft.json is damaged or not ours"),
        (lambda a: edit(a, preprocess={"zoom": 2}), "fastpeft.json is damaged: preprocess: .*zoom"),
        (lambda a: edit(a, preprocess=None), "an adapter alone: its tokenizer and preprocessing"),
        (lambda a: edit(a, base={"model": "miss-huge"}), "'miss-huge' is neither a model name"),
        (lambda a: shutil.rmtree(a / "tokenizer"), "no tokenizer here"),
        (lambda a: (a / "dec" / "model.safetensors").unlink(), "incomplete: .*model.safetensors is missing"),
        (lambda a: (a / "vit" / "adapter_model.safetensors").write_bytes(b"torn"), "adapter_model.safetensors is damaged"),
    ],
)
def test_a_torn_adapter_is_one_clear_error(finished, tmp_path, tear, message):
    adapter = copy_adapter(finished, tmp_path)
    tear(adapter)
    with pytest.raises(ValueError, match=message) as error:
        load_run(adapter, "cpu")
    assert "\n" not in str(error.value)
