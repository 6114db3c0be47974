"""A dialogue: its history and image in the prompt, its commands, its errors."""

import pytest
from PIL import Image

from fastpeft.data import Instruction
from fastpeft.evaluate.chat import Chat
from fastpeft.train.causal_run import TextOptions, causal_dataset, causal_model_for


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
