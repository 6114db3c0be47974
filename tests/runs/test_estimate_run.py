"""An estimate of a run is that of its data: FLOPs and saved bytes of its first step, for every family."""

import json

import pytest
from typer.testing import CliRunner

from fastpeft.cli import app
from fastpeft.models import resolve
from fastpeft.runs import estimate as module
from fastpeft.runs.options import DataOptions, TextOptions
from fastpeft.runs.train import train_run
from fastpeft.train.config import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def alpaca(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alpaca")
    rows = [{"instruction": f"Count to {n}.", "input": "", "output": " ".join(map(str, range(n)))} for n in range(1, 24)]
    (folder / "alpaca.json").write_text(json.dumps(rows))
    return folder


FAMILIES = [
    ("miss-tiny", "F/LoRA/LoRA", {}),
    ("miss-tiny", "LoRA/LoRA/LoRA", {"questions_per_image": 3}),
    ("miss-tiny", "F/F/LoRA", {}),
    ("llama-tiny", None, {}),
    ("llava-med-tiny", None, {}),
    ("excitor-tiny", None, {}),
    ("lavin-tiny", None, {}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model, plan, how", FAMILIES, ids=lambda v: str(v))
def test_a_run_tells_first_what_it_then_measures(model, plan, how, phantoms, alpaca, capsys):
    data = DataOptions(data=str(alpaca if model == "llama-tiny" else phantoms))
    config = TrainConfig(steps=1, batch_size=6, device="cpu", **how)
    summary = train_run(model, plan, data, config, evaluate=False)
    told = summary["estimate"]
    assert told["flops_per_sample"] == pytest.approx(summary["flops_per_sample"], rel=0.05)
    assert told["saved_bytes"] == pytest.approx(summary["saved_bytes_per_step"], rel=0.05)
    assert "a step: " in capsys.readouterr().err
    assert str(summary["plan"]) == (plan or resolve(model).family.plan)


def test_the_command_reads_lengths_from_the_data(phantoms, alpaca):
    def asked(*arguments):
        done = CliRunner().invoke(app, ["estimate", *arguments, "--json"], catch_exceptions=False)
        return json.loads(done.stdout.splitlines()[-1])

    on_data = asked("--model", "lavin-tiny", "--data", str(phantoms), "--batch-size", "6")
    blind = asked("--model", "lavin-tiny", "--batch-size", "6")
    assert on_data["flops_per_sample"] < blind["flops_per_sample"] / 5  # 512 tokens are assumed where nothing is known
    assert on_data["samples"] == 50 and on_data["steps"] == 9 and on_data["seconds_at_best"] > 0
    room = asked("--model", "llama-tiny", "--data", str(alpaca), "--steps", "7", "--gpu-memory", "1.1GB")
    held = sum(room[name] for name in ("weight_bytes", "gradient_bytes", "optimizer_bytes"))
    of_data = (0.1e9 - held) / (room["peak_bytes"] - held) * 20  # samples as long as the data's, however long others may be
    assert of_data - 1 < room["largest_batch_size"] <= of_data and room["largest_batch_size"] > 20


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--vocab", "here"], "--vocab say how data are read: give --data too"),
        (["--steps", "3"], "--steps say how data are read"),
        (["--data", "{data}", "--seq-len", "7"], "--seq-len say how long samples are, and so does --data"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_options_that_do_not_go_together(arguments, words, phantoms):
    with pytest.raises(ValueError, match=words):
        arguments = [a.format(data=phantoms) for a in arguments]
        CliRunner().invoke(app, ["estimate", "--model", "miss-tiny", *arguments], catch_exceptions=False)


def test_reading_a_run_loads_no_weights_and_no_image(phantoms, monkeypatch):
    monkeypatch.setattr("fastpeft.data.VQADataset.pixels", None)
    _, run = module.read_run(resolve("miss-tiny"), DataOptions(data=str(phantoms)), TextOptions(), 5, questions_per_image=5)
    assert len(run.batch["images"]) == 1 and "pixel_values" not in run.batch and run.samples == 50
    assert module.products_per_second(width=64) > 1e6


@pytest.mark.parametrize(
    ("name", "says"), [("miss", "miss's weights are random"), ("llama-tiny", "has random weights"), ("miss-tiny", "drawn phantoms alone")]
)
def test_who_adapts_random_weights_is_told(name, says, alpaca):
    (note,) = module.expectations(resolve(name), DataOptions(str(alpaca)), None, None, evaluate=False)
    assert says in note
