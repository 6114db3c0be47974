"""A converted LaVIN answers, talks and is trained from its folder alone, by the command line."""

import io
import json

import pytest
import torch
from official_lavin import adapter_state, arguments, clip, embedded, forward, llama_state, write_adapter, write_llama_folder
from PIL import Image
from sentencepiece_model import write_sentencepiece

import fastpeft as fp
from fastpeft.cli import app
from fastpeft.data.causal_tokenizer import encode_texts
from fastpeft.runs.evaluate import load_run

pytestmark = pytest.mark.usefixtures("one_thread")
PROBLEM = {"choices": ["red", "blue"], "answer": 0, "hint": "", "task": "closed choice", "grade": "grade2", "subject": "natural science"}
PROBLEM |= {"topic": "physics", "category": "Light", "skill": "Colours", "lecture": "Light has a colour.", "solution": "It is red."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("official")
    write_llama_folder(root / "LLaMA/7B", {n: t.float() for n, t in llama_state().items()})
    write_sentencepiece(root / "LLaMA/tokenizer.model")
    torch.save({n: t.float() for n, t in clip().items()}, root / "ViT.pt")
    write_adapter(root / "lavin.pth", {n: t.float() for n, t in adapter_state().items()}, arguments(max_seq_len=300))
    call("convert", root / "lavin.pth", root / "lavin", "--llama", root / "LLaMA/7B", "--clip", root / "ViT.pt")
    return root / "lavin"


def call(*words):
    app([str(word) for word in words], standalone_mode=False)


@pytest.fixture(scope="module")
def scienceqa(tmp_path_factory):
    root = tmp_path_factory.mktemp("scienceqa")
    problems = {str(i): PROBLEM | {"question": f"the {i}?", "image": "image.png" if i % 2 else None} for i in range(1, 5)}
    problems = {k: p | {"split": "train" if int(k) < 3 else "test"} for k, p in problems.items()}
    (root / "problems.json").write_text(json.dumps(problems))
    (root / "pid_splits.json").write_text(json.dumps({"train": ["1", "2"], "test": ["3", "4"]}))
    for i in (1, 3):
        path = root / "images" / problems[str(i)]["split"] / str(i) / "image.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (40, 30), "red").save(path)
    return root


def test_the_adapter_knows_how_it_was_trained(folder):
    about = json.loads((folder / "adapter/fastpeft.json").read_text())
    prompt = {
        "template": "lavin",
        "max_length": 299,
        "image_tokens": 2,
        "instruction": None,
        "prompt_format": "QCM-LA",
        "use_caption": False,
        "tell_format": False,
    }
    assert about["prompt"] == prompt and about["preprocess"]["mean"] == [0.485, 0.456, 0.406] and not about["preprocess"]["crop"]
    assert about["preprocess"]["image_size"] == 32 and about["base"]["dtype"] == "float32"


def test_eval(folder, scienceqa, capsys):
    call("eval", "--adapter", folder / "adapter", "--data", scienceqa, "--max-new-tokens", 3, "--quiet", "--json", "--device", "cpu")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["n"] == 2


def test_chat_says_what_the_official_computation_says(folder, tmp_path, capsys, monkeypatch):
    """The likeliest tokens after [t_m, bos, "Image: ", the image's tokens, the instruction], one after the other."""
    Image.new("RGB", (50, 40), "blue").save(tmp_path / "blue.png")
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    call("chat", "--adapter", folder / "adapter", "--image", tmp_path / "blue.png", "--max-new-tokens", 4, "--json", "--device", "cpu")
    (said,) = json.loads(capsys.readouterr().out.splitlines()[-1])["turns"]
    _, tokenizer, preprocess = load_run(folder / "adapter", "cpu")
    llama, adapters = llama_state(), adapter_state()
    first, rest = encode_texts(tokenizer, ["Image: ", "Instruction: hello\nResponse:"])
    before, after, answer = torch.tensor([1, *first]), list(rest), []
    image = preprocess(tmp_path / "blue.png")[None].double()
    while len(answer) < 4 and answer[-1:] != [2]:
        text = embedded(llama, clip(), adapters, before, torch.tensor(after + answer), image)
        answer.append(int(forward(llama, adapters, text, 1)[-1].argmax()))
    assert said["response"] == tokenizer.decode([t for t in answer if t < len(tokenizer) and t != 2]).strip()
    assert said["response"], answer


@pytest.mark.parametrize("plan", ["MMAdapter/T/MMAdapter"])
def test_train_goes_on_from_the_folder(folder, scienceqa, tmp_path, plan, capsys):
    how = ["--model", folder, "--plan", plan, "--data", scienceqa, "--out", tmp_path / "run", "--steps", 2, "--batch-size", 2]
    call("train", *how, "--prompt-format", "QCM-A", "--no-eval", "--quiet", "--device", "cpu", "--json")
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["steps"] == 2 and summary["plan"] == plan and summary["loss_last"] < 20
    about = json.loads((tmp_path / "run/adapter/fastpeft.json").read_text())
    assert about["prompt"]["prompt_format"] == "QCM-A"  # eval asks as training did
    assert fp.load_adapter(fp.build(folder), tmp_path / "run/adapter")
