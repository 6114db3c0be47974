"""A dialogue: its history and image in the prompt, its commands, its errors."""

import io
import json

import pytest
from PIL import Image

from fastpeft.cli import app
from fastpeft.data import Instruction
from fastpeft.evaluate.chat import Chat
from fastpeft.runs.causal import dataset as causal_dataset
from fastpeft.runs.causal import model_for as causal_model_for
from fastpeft.runs.options import DataOptions, TextOptions
from fastpeft.runs.train import train_run
from fastpeft.train.config import TrainConfig


def talk(model, image=None, max_length=512):
    sample = Instruction((("Which colour is it?", "red"),), None, "alpaca", "0", 0, None)
    network, tokenizer, preprocess = causal_model_for(model, [sample], pretrained=False)
    text, seen = TextOptions(max_length=max_length), []

    def read(samples):
        seen.extend(samples)
        return causal_dataset(network, samples, tokenizer, preprocess, text, prompts_only=True)

    return Chat(network, read, image, max_new_tokens=3), seen


def test_history_and_image_are_in_the_prompt_until_reset(tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    chat, seen = talk("lavin-tiny", str(tmp_path / "red.png"))
    first, _, third = chat.follow(["one", "", "two", "/reset", "three", "/quit", "four"])
    assert [s.turns for s in seen] == [(("one", ""),), (("one", first), ("two", "")), (("three", ""),)]
    assert {s.image for s in seen} == {(tmp_path / "red.png").resolve()}
    assert chat.turns == [("three", third)]


def test_errors(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.png"):
        talk("lavin-tiny", str(tmp_path / "broken.png"))
    with pytest.raises((ValueError, OSError), match=r"none\.png"):
        talk("lavin-tiny", str(tmp_path / "none.png"))
    with pytest.raises(ValueError, match="sees no images"):
        talk("llama-tiny", str(tmp_path / "broken.png"))
    with pytest.raises(ValueError, match="/reset"):
        talk("lavin-tiny", max_length=4)[0].ask("Which colour is it?")


def test_a_slip_ends_no_dialogue_where_errors_are_told(tmp_path):
    chat, told = talk("llama-tiny")[0], []
    first, second = chat.follow(["one", f"/image {tmp_path}/none.png", "/exit", "two"], told.append)
    assert chat.turns == [("one", first), ("two", second)] and "sees no images" in str(told[0])
    assert str(told[1]) == "there is no /exit; there are /image FILE, /reset and /quit"


def test_the_command(tmp_path, monkeypatch, capsys):
    rows = [{"instruction": "Name the colour.", "input": f"thing {i % 4}", "output": "red"} for i in range(12)]
    (tmp_path / "alpaca_data.json").write_text(json.dumps(rows))
    how = TrainConfig(out=str(tmp_path / "run"), batch_size=4, steps=1, progress=False)
    train_run("llama-tiny", "LoRA", DataOptions(str(tmp_path), split_file=str(tmp_path / "alpaca_data.json")), how, evaluate=False)
    command = ["chat", "--adapter", str(tmp_path / "run" / "adapter"), "--max-new-tokens", "4", "--top-p", "0.9", "--json"]
    said = []
    for _ in range(2):
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello?\n\nAnd then?\n/quit\nnever\n"))
        app(command, standalone_mode=False)
        said.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert [turn["question"] for turn in said[0]["turns"]] == ["Hello?", "And then?"] and said[0]["image"] is None
    assert said[0] == said[1]  # the seed decides
