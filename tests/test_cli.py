"""The command line: JSON on the last line, exit code 2 and one clear line for bad input, and a killed process that goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import fastpeft as fp
from fastpeft import cli
from fastpeft.cli_options import emit
from fastpeft.data import Preprocess, save_tokenizer
from fastpeft.files import write_json
from fastpeft.runs.vqa import PREPROCESS
from fastpeft.train.metrics import MetricsLog

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def fastpeft(monkeypatch, capfd):
    """fastpeft("train", ...) in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["fastpeft", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capfd.readouterr()
        return stop.value.code, said.out, said.err

    return call


@pytest.fixture
def ok(fastpeft):
    """What a command that succeeds prints as JSON; its stderr must be empty."""

    def call(*arguments):
        code, out, err = fastpeft(*arguments, "--json")
        assert (code, err) == (0, "")
        return json.loads(out.splitlines()[-1])

    return call


@pytest.fixture
def bad(fastpeft):
    """The one line that a command with bad input says."""

    def call(*arguments):
        code, out, err = fastpeft(*arguments)
        assert code == 2 and out == "" and err.startswith("fastpeft: ") and err.count("\n") == 1 and err.endswith("\n"), (code, out, err)
        return err

    return call


@pytest.fixture(scope="session")
def small(runs, phantoms, tmp_path_factory):
    """A transformers folder of the smallest MISS, with vocabulary and preprocessing."""
    folder = tmp_path_factory.mktemp("small") / "model"
    made = runs.trainer(phantoms)
    fp.merge(made.model)
    made.model.config.architectures = ["BlipForQuestionAnswering"]
    made.model.save_pretrained(folder)
    save_tokenizer(made.dataset.tokenizer, folder)
    write_json(folder / PREPROCESS, Preprocess(32).to_dict())
    return folder


@pytest.fixture
def train(small, phantoms, tmp_path):
    """The arguments of a short training run."""
    given = {"model": small, "data": phantoms, "out": tmp_path / "run", "steps": 3, "batch-size": 4, "device": "cpu"}

    def arguments(*more, **changes):
        changes = {name.replace("_", "-"): value for name, value in changes.items()}
        pairs = [(f"--{k}", v) for k, v in (given | changes).items() if v is not None]
        return ["train", "--quiet", *(x for pair in pairs for x in pair), *more]

    return arguments


# what works ---------------------------------------------------------------------------------------------------------------------


def test_params_are_the_papers(ok):
    counted = ok("params", "--model", "miss", "--plan", "F/LoRA/LoRA", "--rank", 4)
    assert counted["trainable"] == 589_824 and round(counted["percent"], 3) == 0.163
    assert counted["base"] == 361_478_972 and counted["parts"]["vit"]["trainable"] == 0


def test_rank_wins_over_a_plan_file_of_any_name(ok, tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text("plan: {jtm: {LoRA: {r: 16}}, dec: {LoRA: {r: 16}}}\n")
    at = {r: ok("params", "--model", "miss-tiny", "--plan", file, *(["--rank", r] if r else []))["trainable"] for r in (None, 4)}
    assert at[None] == 4 * at[4]


def test_train_eval_merge(ok, train, small, phantoms, tmp_path):
    """An adapter folder is all that `eval` needs; a merged folder serves as a model."""
    run = tmp_path / "run"
    summary = ok(*train(plan="LoRA/LoRA/LayerNorm", rank=2, questions_per_image=2, hold_out=0.3, gradient_accumulation=2))
    assert summary["steps"] == 3 and summary["samples"] == 24 and json.loads((run / "summary.json").read_text()) == summary
    assert {"jtm", "vit", "dec", "fastpeft.json", "tokenizer"} == {path.name for path in (run / "adapter").iterdir()}
    shutil.move(run / "adapter", tmp_path / "elsewhere")
    held = ("--data", phantoms, "--split-file", run / "held_out.json", "--quiet")
    scored = ok("eval", "--adapter", tmp_path / "elsewhere", *held, "--out", tmp_path / "answers.json")
    assert {name: scored[name] for name in summary["eval"]} == summary["eval"] and scored["n"] == 15
    assert [set(row) >= {"image", "prediction"} for row in json.loads((tmp_path / "answers.json").read_text())] == [True] * 15
    merged = ok("merge", "--adapter", tmp_path / "elsewhere", "--out", tmp_path / "merged")["out"]
    again = ok(*train(model=merged, out=tmp_path / "again", plan="F/F/LoRA", hold_out=0.3, steps=1, lr=1e-9))
    assert again["eval"] == summary["eval"]


def test_json_is_the_last_line_and_people_are_told_too(fastpeft, train, tmp_path):
    code, out, err = fastpeft(*train("--json", steps=2))
    *lines, last = out.splitlines()
    assert code == 0 and err == "" and json.loads(last)["steps"] == 2
    assert lines[0].startswith("F/LoRA/LoRA: loss ") and any("accuracy on 20 questions" in line for line in lines)
    assert lines[-1] == f"everything is in {tmp_path / 'run'} (report.html to look at)"


def test_the_bar_is_all_that_stderr_shows(fastpeft, train):
    code, _, err = fastpeft(*(argument for argument in train("--no-eval", steps=2) if argument != "--quiet"))
    assert code == 0 and err.startswith("a step: ") and "training: 2/2 step" in err and "\r" not in err  # not a terminal
    assert not any(word in err for word in ("Loading", "Writing", "Warning", "warning"))


def test_a_config_file_and_the_command_line_over_it(ok, small, phantoms, tmp_path):
    file = tmp_path / "run.yaml"
    lines = {"model": small, "data": phantoms, "out": tmp_path / "run", "plan": "{dec: {LoRA: {r: 2, lora_dropout: 0.5}}}", "steps": 50}
    lines |= {"lr": "5e-3", "batch-size": 5, "workers": 0, "quiet": "true", "languages": "en", "rank": 3, "no_eval": "true", "seed": 4}
    file.write_text("".join(f"{name}: {value}\n" for name, value in lines.items()))
    summary = ok("train", "--config", file, "--steps", 2, "--seed", 0, "--lora-dropout", 0)
    assert (summary["steps"], summary["samples"], summary["seed"], summary["eval"]) == (2, 10, 0, None)
    about = json.loads((tmp_path / "run" / "adapter" / "fastpeft.json").read_text())
    lora = about["treatments"]["dec"][0]["LoRA"]
    assert (lora["r"], lora["lora_dropout"]) == (3, 0)
    config = json.loads((tmp_path / "run" / "checkpoint" / "progress.json").read_text())["config"]
    assert config["learning_rate"] == 5e-3 and config["warmup"] == 0.05


@pytest.mark.parametrize("recipe, trainable", [("mile", 589_824), ("layernorm", None)])
def test_recipes_start(monkeypatch, ok, phantoms, tmp_path, recipe, trainable):
    """A recipe's own model is too large for a test: what `train` makes of the file is what counts."""
    seen = {}

    def note(model, plan, data, config, **how):
        network = fp.build(model, device="meta")
        fp.adapt(network, run.plan_for(fp.models.parts_of(network), plan, **{k: how[k] for k in ("r", "lora_alpha", "lora_dropout")}))
        seen.update(config=config, counted=fp.count(network), network=network)
        keys = ("plan", "loss_first", "loss_last", "steps", "steady_samples_per_second", "peak_memory_bytes")
        return dict.fromkeys(keys, 0) | {"eval": None}

    from fastpeft.runs import train as run

    monkeypatch.setattr(run, "train_run", note)
    ok("train", "--config", f"{os.path.dirname(__file__)}/../recipes/{recipe}.yaml", "--data", phantoms, "--out", tmp_path)
    assert seen["config"].learning_rate == seen["config"].base_learning_rate == 2e-5 and seen["config"].weight_decay == 0.05
    if recipe == "mile":
        layer = seen["network"].text_decoder.bert.encoder.layer[0].attention.self.query
        assert seen["counted"]["trainable"] == trainable and (layer.scaling, layer.lora_dropout) == (8.0, 0.1)


def test_bfloat16_from_scratch_on_a_split_file(ok, train, phantoms, tmp_path):
    qids = tmp_path / "some.txt"
    qids.write_text("\n".join(str(row["qid"]) for row in json.loads((phantoms / "train.json").read_text())[:8]))
    summary = ok(*train("--from-scratch", model="miss-tiny", dtype="bf16", split_file=qids, steps=None, epochs=1, plan="F/F/LoRA"))
    assert summary["dtype"] == "bf16" and summary["samples"] == 8 and summary["steps"] == 2


def test_bad_entries_can_be_skipped(bad, ok, train, phantoms, tmp_path):
    data = shutil.copytree(phantoms, tmp_path / "data")
    (data / "imgs" / "xmlab0" / "source.jpg").unlink()
    (data / "imgs" / "xmlab1" / "source.jpg").write_bytes(b"no image")
    assert "train.json: entry 0: image 'xmlab0/source.jpg' not found" in bad(*train(data=data))
    notes = ok(*train("--skip-bad", "--no-eval", data=data))["notes"]
    assert notes[:2] == ["5 bad entries skipped: missing image", "5 bad entries skipped: corrupt image"]


def test_doctor_and_help(ok, fastpeft):
    about = ok("doctor")
    assert about["environment"]["torch"] == torch.__version__ and "lora_linears_fwd" in about["operators"]
    assert {"norm_mm_adapter_fwd", "excitor_merge_fwd"} <= about["operators"].keys()  # though nothing has used them yet
    for command in (["--help"], ["train", "--help"], ["eval", "--help"], []):
        code, out, err = fastpeft(*command)
        assert code == (0 if command else 2) and "Usage" in out and err == ""


def test_convert_there_and_back(ok, small, tmp_path):
    """Heads of 16 channels, which a checkpoint of this width does not tell."""
    file, folder = tmp_path / "official.pth", tmp_path / "folder"
    assert ok("convert", small, file)["direction"] == "transformers -> official"
    there = ok("convert", file, folder, "--text-heads", 2, "--vision-heads", 2)
    assert there["direction"] == "official -> transformers" and there["n_tensors"] > 0
    mine, theirs = (dict(fp.build(path).named_parameters()) for path in (small, folder))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


# what is refused ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["params", "--plan", "F/LoRA"], "plan 'F/LoRA' has 2 treatments; this model has 3 parts: vit/jtm/dec"),
        (["params", "--plan", "F/LoRA/Lora2"], "unknown treatment 'Lora2'"),
        (["params", "--plan", "nowhere.yaml"], "cannot read the plan nowhere.yaml"),
        (["params", "--model", "misss"], "'misss' is neither a model name (miss, miss-tiny, llama-7b, "),
        (["params", "--rank", "0"], "r must be a positive integer, not 0"),
        (["params", "--plan", "F/T/T", "--rank", "-4"], "r must be a positive integer, not -4"),
        (["params", "--rank", "four"], "Invalid value for '--rank'"),
        (["params", "--ranks", "4"], "No such option"),
        (["estimate", "--gpu-memory", "24"], "'24' has no unit; write it as 24GB"),
        (["estimate", "--seq-len", "100000"], "seq_len=100000 is more than the model's 512 positions"),
        (["parms"], "No such command 'parms'"),
        (["eval", "--data", "x"], "Missing option '--adapter'"),
        (["train", "--out", "x"], "--data is missing: give a data folder"),
        (["train", "--data", "x"], "--out is missing: give a folder for the run"),
        (["convert", "nowhere.pth", "out"], "nowhere.pth: no such file or folder"),
        (["merge", "--adapter", "nowhere", "--out", "x"], "no adapter folder at nowhere"),
    ],
)
def test_bad_arguments_are_one_clear_line(bad, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in bad(*arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": -1}, "steps must be a whole number of 1 or more, not -1"),
        ({"batch_size": 0}, "batch_size must be a whole number of 1 or more, not 0"),
        ({"rank": 0}, "r must be a positive integer, not 0"),
        ({"lora_dropout": 1}, "lora_dropout must be in [0, 1), not 1"),
        ({"dtype": "fp16"}, "dtype must be one of fp32, bf16"),
        ({"lr": "nan"}, "learning_rate must be a number of 0 or more, not nan"),
        ({"lr": 1e30, "warmup": 0, "steps": 9}, "lower learning_rate, or use fp32"),
        ({"device": "toaster"}, "device 'toaster' cannot be used here"),
        ({"data": "nowhere"}, "nowhere: no such folder"),
        ({"data": "."}, "no annotation file found"),
        ({"data": "broken"}, "train.json: not valid JSON: line 1, column 3"),
        ({"split_file": "nowhere.json"}, "nowhere.json: no such split file"),
        ({"hold_out": 2}, "use a number between 0 and 1"),
        ({"vocab": "nowhere.txt"}, "no tokenizer here"),
        ({"plan": "F/F/F"}, "nothing to train"),
        ({"plan": "Prefix/F/F"}, "Prefix is not defined for part 'vit'"),
        ({"config": "unknown.yaml"}, "unknown option learning_rte"),
        ({"config": "torn.yaml"}, "cannot read torn.yaml"),
        ({"out": "a file"}, "a file"),
        ({"out": "a file/run"}, "a file/run"),
        ({"eval_split_file": "nowhere.json"}, "no such split file"),
    ],
)
def test_bad_training_is_one_clear_line(bad, train, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.json").write_text("[{]")
    (tmp_path / "a file").write_text("")
    (tmp_path / "unknown.yaml").write_text("learning_rte: 1.0e-3\n")
    (tmp_path / "torn.yaml").write_text("steps: [1\n")
    assert message in bad(*train(**changes))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_found_damaged_while_training_is_named(bad, train, phantoms, tmp_path, workers):
    data = shutil.copytree(phantoms, tmp_path / "data")
    (data / "imgs" / "xmlab3" / "source.jpg").write_bytes(b"no image")
    said = bad(*train("--no-eval", data=data, steps=30, workers=workers))
    assert said.startswith(f"fastpeft: {data / 'imgs' / 'xmlab3' / 'source.jpg'}: not an image that Pillow can read")


def test_runs_are_neither_overwritten_nor_resumed_as_another(bad, ok, train, tmp_path):
    ok(*train("--no-eval"))
    assert "holds a run already: resume it (--resume), or choose another --out" in bad(*train())
    assert "seed was 0, now 7" in bad(*train("--resume", seed=7))
    assert "batch_size was 4, now 5" in bad(*train("--resume", batch_size=5))
    (tmp_path / "run" / "checkpoint" / "optimizer.pt").write_bytes(b"torn")
    assert "is damaged" in bad(*train("--resume", "--no-eval", steps=5))


def test_adapters_that_are_none_are_refused(bad, ok, train, phantoms, small, tmp_path):
    ok(*train("--no-eval"))
    adapter, asked = tmp_path / "run" / "adapter", ("--data", phantoms)
    assert "neither fastpeft.json nor config.json: it is no adapter" in bad("eval", "--adapter", phantoms, *asked)
    assert "no adapter folder at" in bad("eval", "--adapter", tmp_path / "nowhere", *asked)
    assert "'--num-beams'" in bad("eval", "--adapter", adapter, *asked, "--num-beams", 0)
    assert "is a folder: give a file for the predictions" in bad("eval", "--adapter", adapter, *asked, "--out", tmp_path)
    assert "'--top-p'" in bad("eval", "--adapter", adapter, *asked, "--top-p", 2)
    assert "'toaster' cannot be used" in bad("eval", "--adapter", adapter, *asked, "--device", "toaster")
    assert "config.json" in bad("eval", "--adapter", adapter, *asked, "--quiet", "--out", small / "config.json" / "answers.json")
    (adapter / "jtm" / "adapter_model.safetensors").write_bytes(b"torn")
    assert "adapter_model.safetensors is damaged" in bad("eval", "--adapter", adapter, *asked)


def test_running_out_of_memory_is_one_clear_line(bad, train, monkeypatch):
    from fastpeft.runs import train as run

    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(run, "train_run", full)
    assert "out of memory: a smaller batch_size" in bad(*train())


def test_an_adapter_of_other_weights_warns_in_one_line(fastpeft, ok, train, phantoms, small, tmp_path):
    ok(*train("--no-eval"))
    other = shutil.copytree(small, tmp_path / "other")
    model = fp.build(other)
    with torch.no_grad():
        model.vision_model.post_layernorm.weight.mul_(2)
    model.save_pretrained(other)
    code, _, err = fastpeft("eval", "--adapter", tmp_path / "run" / "adapter", "--data", phantoms, "--model", other, "--quiet")
    assert code == 0 and err.count("\n") == 1 and err.startswith("fastpeft: warning: ") and "other base weights" in err


def test_sigterm_saves_and_says_how_to_go_on(monkeypatch, fastpeft, ok, train, tmp_path):
    log = MetricsLog.log

    def stop_at_two(self, row, seconds):
        log(self, row, seconds)
        if row["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsLog, "log", stop_at_two)
    assert fastpeft(*train("--no-eval", steps=4)) == (143, "", "fastpeft: stopped after step 2; --resume goes on from there\n")
    monkeypatch.undo()
    assert ok(*train("--no-eval", "--resume", steps=4))["steps"] == 4


def test_what_is_printed_does_not_steer_the_terminal(fastpeft, phantoms, tmp_path, capfd):
    """Escapes in names, in data and in answers: written out, one line on stderr."""
    code, _, err = fastpeft("eval", "--adapter", tmp_path / "a\x1b[2J\x9b31mb", "--data", phantoms)
    assert code == 2 and err.count("\n") == 1 and "a\\x1b[2J\\x9b31mb" in err and "\x1b" not in err
    emit({}, False, ["\u202eleft\rright", "tab\tand \u0646\u200c\u0627 \U0001f469\u200d\U0001f52c stay"])
    assert capfd.readouterr().out == "\\u202eleft\\rright\ntab\tand \u0646\u200c\u0627 \U0001f469\u200d\U0001f52c stay\n"


# a process of its own -----------------------------------------------------------------------------------------------------------


def test_a_killed_process_resumes_to_the_bit(ok, runs, train, tmp_path):
    """SIGKILL mid-epoch, with dropout and accumulation; --resume ends in the weights and metrics of a run that was left alone."""
    options = {"lora_dropout": 0.1, "gradient_accumulation": 2, "questions_per_image": 2, "steps": 40, "save_every": 3}
    killed = train("--no-eval", **options)
    process = subprocess.Popen(
        [sys.executable, "-m", "fastpeft.cli", *map(str, killed)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics, checkpoint = tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "checkpoint"
    deadline = time.monotonic() + 120
    while not (checkpoint.is_dir() and len(metrics.read_bytes().splitlines()) >= 10):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "run" / "summary.json").exists()
    process.stderr.close()

    assert 0 < json.loads((checkpoint / "progress.json").read_text())["done"]["step"] < 40
    for name, resumed in (("run", ("--resume",)), ("whole", ())):
        ok(*train(*resumed, "--no-eval", **options, out=tmp_path / name))
    assert runs.metrics(tmp_path / "run") == runs.metrics(tmp_path / "whole")
    for part in ("jtm", "dec"):
        one, other = (tmp_path / name / "adapter" / part / "adapter_model.safetensors" for name in ("run", "whole"))
        assert one.read_bytes() == other.read_bytes()
    assert not list((tmp_path / "run").glob(".*"))


@pytest.mark.parametrize("command", [[], ["study", "file.yaml", "--out", "out"]])
def test_interrupts_before_anything_runs_end_without_a_traceback(command, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastpeft.study.runner.run_study" if command else "fastpeft.cli.app", interrupted)
    monkeypatch.setattr("fastpeft.study.file.data_folders", lambda *args: {})
    monkeypatch.setattr(sys, "argv", ["fastpeft", *command])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130 and capsys.readouterr().err == ("fastpeft: interrupted\n" if command else "")
