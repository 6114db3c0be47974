"""Answers and scores follow the documented decoding, whatever the base folder's generation_config.json says."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

import fastpeft as fp
from fastpeft.data import Instruction, Preprocess, VQADataset, load_samples, save_tokenizer
from fastpeft.evaluate import answer_questions, generation_settings, respond
from fastpeft.evaluate.chat import Chat
from fastpeft.evaluate.decoding import callers_settings_only, decoding_settings
from fastpeft.runs.causal import dataset as causal_dataset
from fastpeft.runs.causal import model_for as causal_model_for
from fastpeft.runs.evaluate import eval_run
from fastpeft.runs.options import DataOptions, TextOptions
from fastpeft.runs.train import train_run
from fastpeft.train.config import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")

HOSTILE = {  # each changes what generate() gives, or makes it fail
    "search and output": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": -5.0, "early_stopping": True, "use_cache": False}
    | {"renormalize_logits": True, "return_dict_in_generate": True, "output_scores": True, "output_attentions": True},
    "sampling and guidance": {"do_sample": True, "temperature": 50.0, "top_k": 3, "top_p": 0.1, "min_p": 0.2, "typical_p": 0.3}
    | {"epsilon_cutoff": 0.01, "guidance_scale": 3.0, "prompt_lookup_num_tokens": 2, "token_healing": True},
    "penalties and lengths": {"repetition_penalty": 30.0, "no_repeat_ngram_size": 1, "exponential_decay_length_penalty": [1, 5.0]}
    | {"min_new_tokens": 6, "min_length": 60, "max_length": 2, "max_new_tokens": 1, "max_time": 1e-9, "sequence_bias": [[[7], -90.0]]},
    "tokens and ends": {"forced_eos_token_id": 4, "suppress_tokens": list(range(5, 60)), "begin_suppress_tokens": [7]}
    | {"bad_words_ids": [[61]], "eos_token_id": [4, *range(5, 60)], "pad_token_id": 9, "bos_token_id": 8, "stop_strings": ["a", "e", "i"]},
}
COLOURS = ("red", "green", "blue")


def loud(network):
    """Weights so large that answers depend on what is asked."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return network


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    """Makes a folder of a causal model; gives it and what answers with a model, in all ways there are."""
    folder = tmp_path_factory.mktemp("causal")
    for colour in COLOURS:
        Image.new("RGB", (40, 40), colour).save(folder / f"{colour}.png")

    def make(model):
        images = [None if model == "llama-tiny" else folder / f"{colour}.png" for colour in COLOURS]
        turns = [((f"Which colour is thing {i}, and where?", f"It is {colour}."),) for i, colour in enumerate(COLOURS)]
        samples = [Instruction(t, image, "alpaca", str(i), i, Path("d")) for i, (t, image) in enumerate(zip(turns, images))]
        network, tokenizer, preprocess = causal_model_for(model, samples, pretrained=False, seed=3)
        loud(network).save_pretrained(folder / model)
        save_tokenizer(tokenizer, folder / model)

        def answers(network):
            read = lambda asked: causal_dataset(network, asked, tokenizer, preprocess, TextOptions(), prompts_only=True)  # noqa: E731
            ways = ({}, {"num_beams": 2}, {"do_sample": True, "top_p": 0.9})
            found = []
            for way in ways:
                torch.manual_seed(5)
                found.append(respond(network, read(samples), max_new_tokens=5, progress=False, **way))
            chat = Chat(network, read, images[0] and str(images[0]), max_new_tokens=3)
            return [*found, list(chat.follow(["one"]))]

        return folder / model, answers

    return make


@pytest.fixture(scope="module")
def miss_folder(runs, phantoms, tmp_path_factory):
    folder, words = tmp_path_factory.mktemp("miss"), runs.tokenizer(phantoms)
    ids = {"bos_token_id": words.bos_token_id, "sep_token_id": words.sep_token_id, "eos_token_id": words.sep_token_id}
    loud(fp.build("miss-tiny", pretrained=False, seed=1, vocab_size=len(words), **runs.SMALL, **ids)).save_pretrained(folder)
    dataset = VQADataset(load_samples(phantoms, split="test").samples[:5], Preprocess(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
    return folder, lambda network: [answer_questions(network, dataset, words, num_beams=n, progress=False) for n in (1, 3)]


def spoiled(folder, settings):
    """The folder's model under these settings, in its own generation_config and those of the models it holds."""
    (folder / "generation_config.json").write_text(json.dumps(settings))
    network = fp.build(str(folder), device="cpu")
    for module in network.modules():
        if hasattr(module, "generation_config"):
            module.generation_config = GenerationConfig.from_pretrained(folder)
    return network


@pytest.mark.parametrize("model", ["miss-tiny", "llama-tiny", "llava-med-tiny", "excitor-tiny", "lavin-tiny"])
def test_the_folders_settings_change_no_answer(causal, miss_folder, model, monkeypatch):
    folder, answers = miss_folder if model == "miss-tiny" else causal(model)
    (folder / "generation_config.json").unlink(missing_ok=True)
    want = answers(fp.build(str(folder), device="cpu"))
    assert len({text for texts in want for text in texts}) > 2
    for name, settings in HOSTILE.items():
        network = spoiled(folder, settings)
        before = {n: m.generation_config for n, m in network.named_modules() if hasattr(m, "generation_config")}
        kept = {n: config.to_dict() for n, config in before.items()}
        assert answers(network) == want, name
        assert all(network.get_submodule(n).generation_config is config for n, config in before.items())  # the user's, as it was
        assert {n: config.to_dict() for n, config in before.items()} == kept
    network = spoiled(folder, HOSTILE["penalties and lengths"])
    where = "answers" if model == "miss-tiny" else "responses"
    monkeypatch.setattr(f"fastpeft.evaluate.{where}.callers_settings_only", contextlib.nullcontext)
    assert answers(network)[0] != want[0]  # they would have


def test_they_are_back_after_an_error():
    model = fp.build("llama-tiny")
    own = model.generation_config
    with pytest.raises(KeyError), callers_settings_only(model):
        assert model.generation_config is not own and model.generation_config.eos_token_id == own.eos_token_id
        raise KeyError
    assert model.generation_config is own


def test_settings_are_complete():
    assert decoding_settings(max_length=4) == {"do_sample": False, "num_beams": 1, "max_length": 4}
    assert decoding_settings(num_beams=3, length_penalty=2.0) == {
        "do_sample": False, "num_beams": 3, "length_penalty": 2.0, "early_stopping": False
    }  # fmt: skip
    sampled = decoding_settings(do_sample=True, top_p=0.5)
    assert sampled == {"do_sample": True, "num_beams": 1, "temperature": 1.0, "top_p": 0.5, "top_k": 50}


def test_a_run_and_its_scores_say_how_they_decoded(causal, runs, phantoms, tmp_path):
    folder, _ = causal("llama-tiny")
    rows = [{"instruction": "Which colour is thing 1, and where?", "input": "", "output": f"It is {c}."} for c in COLOURS]
    (tmp_path / "alpaca_data.json").write_text(json.dumps(rows))
    data = DataOptions(str(tmp_path), split_file=str(tmp_path / "alpaca_data.json"), eval_split_file=str(tmp_path / "alpaca_data.json"))
    said = []
    for name, settings in (("clean", {}), ("hostile", HOSTILE["penalties and lengths"])):
        (folder / "generation_config.json").write_text(json.dumps(settings))
        config = TrainConfig(steps=2, batch_size=3, learning_rate=1e-4, out=tmp_path / name, progress=False)
        summary = train_run(str(folder), "LoRA", data, config)
        written = json.loads((tmp_path / name / "summary.json").read_text())["generation"]
        assert written == summary["generation"] and written | {"pad_token_id": 0, "eos_token_id": 0} == {
            "do_sample": False, "num_beams": 1, "max_new_tokens": 128, "pad_token_id": 0, "eos_token_id": 0
        }  # fmt: skip
        said.append(json.loads((tmp_path / name / "predictions.json").read_text()))
        scored = eval_run(tmp_path / name / "adapter", data, progress=False, num_beams=2, max_new_tokens=5)
        assert scored["generation"] == written | {"num_beams": 2, "max_new_tokens": 5, "length_penalty": 1.0, "early_stopping": False}
    assert said[0] == said[1]
    trainer = runs.trainer(phantoms, "F/F/LoRA", steps=1, evaluate=True)
    assert trainer.fit()["generation"] == generation_settings(trainer.eval_dataset, None) == {
        "do_sample": False, "num_beams": 3, "length_penalty": 1.0, "early_stopping": False, "max_length": 10
    }  # fmt: skip
    assert runs.trainer(phantoms, "F/F/LoRA", steps=1).fit()["generation"] is None
