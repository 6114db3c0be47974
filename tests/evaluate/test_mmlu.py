"""MMLU: the published files and prompts, likelihoods of choices against one text at a time, scores by hand, and `fastpeft eval`."""

import csv
import json

import pytest
import torch

import fastpeft as fp
from fastpeft.cli import app
from fastpeft.data import train_causal_tokenizer
from fastpeft.data.mmlu import CATEGORY, MMLU, SUBJECTS, TASKS, MultipleChoice, is_mmlu, load_mmlu
from fastpeft.evaluate.mmlu import answer_mmlu, choice_likelihoods, score_mmlu
from fastpeft.study.made_data import make

pytestmark = pytest.mark.usefixtures("one_thread")


def write(folder, split, task, rows):
    (folder / split).mkdir(exist_ok=True, parents=True)
    with open(folder / split / f"{task}_{split}.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)


ROWS = [['What is "one, two"?', "a, b", "None", "NA", "4\nlines", "B"], ["Second?", "w", "x", "y", "z", "D"]]


def test_files_and_prompts(tmp_path):
    write(tmp_path, "test", "us_foreign_policy", ROWS)
    write(tmp_path, "dev", "us_foreign_policy", ROWS[::-1] * 3)
    data = load_mmlu(tmp_path, shots=1)
    assert is_mmlu(tmp_path) and not is_mmlu(tmp_path / "dev")
    assert data.questions[0] == MultipleChoice("us_foreign_policy", 'What is "one, two"?', ("a, b", "None", "NA", "4\nlines"), 1)
    assert data.tasks == ("us_foreign_policy",) and len(data.missing) == 56
    opening = "The following are multiple choice questions (with answers) about  us foreign policy.\n\n"
    asked = 'What is "one, two"?\nA. a, b\nB. None\nC. NA\nD. 4\nlines\nAnswer:'
    assert data.prompt(data.questions[0], 1) == f"{opening}Second?\nA. w\nB. x\nC. y\nD. z\nAnswer: D\n\n{asked}"
    assert data.prompt(data.questions[0], 0) == opening + asked
    assert load_mmlu(tmp_path, shots=0).shots == {}


def test_tasks_and_categories():
    assert len(TASKS) == len(set(TASKS)) == 57 == sum(len(tasks) for of in SUBJECTS.values() for tasks in of.values())
    counts = {name: sum(category == name for category in CATEGORY.values()) for name in SUBJECTS}
    assert counts == {
        "STEM": 18,
        "humanities": 13,
        "social sciences": 12,
        "other": 14,
    }  # the paper's table of tasks; "other" has business, health


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([["q", "a", "b", "c", "d"]], "line 1: a row is question"),
        ([ROWS[0], ["q", "a", "b", "c", "d", "E"]], "line 3: a row is question"),
        ([["q", "a", "b", "c", "d", "AB"]], "a row is question"),
        ([["only"]], "a row is question"),
    ],
)
def test_rows_that_are_no_questions(tmp_path, rows, says):
    write(tmp_path, "test", "virology", rows)
    with pytest.raises(ValueError, match=f"virology_test.csv: .*{says}"):
        load_mmlu(tmp_path, shots=0)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="no MMLU here"):
        load_mmlu(tmp_path)
    write(tmp_path, "test", "virology", ROWS)
    with pytest.raises(ValueError, match=r"virology_dev.csv is missing.*--shots 0"):
        load_mmlu(tmp_path)
    write(tmp_path, "dev", "virology", ROWS)
    with pytest.raises(ValueError, match="give --shots 2"):
        load_mmlu(tmp_path)
    with pytest.raises(ValueError, match="from 0 to 5, not 6"):
        load_mmlu(tmp_path, shots=6)
    (tmp_path / "test" / "virology_test.csv").write_bytes(b"q,\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_mmlu(tmp_path, shots=0)
    (tmp_path / "test" / "virology_test.csv").write_text('"q')
    with pytest.raises(ValueError, match="no CSV"):
        load_mmlu(tmp_path, shots=0)
    write(tmp_path, "test", "alchemy", ROWS)
    with pytest.raises(ValueError, match="no task 'alchemy'"):
        load_mmlu(tmp_path)


def small(plan=None, name="llama-tiny", **more):
    network = fp.build(name, dtype=torch.float64, **more)
    return network if plan is None else fp.adapt(network, plan)


@pytest.fixture(scope="module")
def tokenizer():
    return train_causal_tokenizer(["What is this? Answer: A", "Answer: B", "Answer: C or D, the red one"] * 9, vocab_size=300)


ASKED = [("llama-tiny", None), ("llama-tiny", "Excitor"), ("lavin-tiny", "F/F/MMAdapter"), ("excitor-tiny", "F/Excitor+LoRA")]
ASKED.append(("llava-med-tiny", "F/F/Prefix/F"))


@pytest.mark.parametrize("name, plan", ASKED)
@pytest.mark.parametrize("choices", [[" A", " B", " C", " D"], [" red", " the red one", " redder"]], ids=["letters", "of several tokens"])
def test_likelihoods_are_those_of_each_text_alone(tokenizer, name, plan, choices):
    model = small(plan, name, **({"text_config": {"vocab_size": 512}} if name.startswith("lavin") else {}))
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    prompts = ["What is this? Answer:", "Why? Answer:", "What is this, then, and what was it before? Answer:"]
    got = choice_likelihoods(model.train(), tokenizer, prompts, choices, batch_size=2, progress=False)
    assert model.training
    model.eval()
    encode = lambda text: [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]  # noqa: E731
    for row, prompt in zip(got, prompts):
        texts = [encode(prompt + choice) for choice in choices]
        same = next(i for i in range(99) if len({ids[i] if i < len(ids) else None for ids in texts}) > 1)
        same = min(same, min(map(len, texts)) - 1)
        want = []
        for ids in texts:
            logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1).detach()
            want.append(sum(float(logits[i - 1, ids[i]]) for i in range(same, len(ids))))
        assert row.tolist() == pytest.approx(want, abs=1e-5)


def test_a_prompt_that_is_too_long_leaves_examples_out(tokenizer):
    ask = lambda n: MultipleChoice("virology", "word " * n, ("a", "b", "c", "d"), 0)  # noqa: E731
    data = MMLU([ask(3), ask(40), ask(400)], {"virology": [ask(20)] * 5}, ("virology",))
    model = small(max_position_embeddings=400)
    found = answer_mmlu(model, tokenizer, data, 5, progress=False)
    assert len(found["answers"]) == 3 and found["fewer_shots"] == 3 and found["cut"] == 1
    whole = answer_mmlu(small(), tokenizer, MMLU([ask(3)], data.shots, data.tasks), 1, progress=False)
    assert whole["fewer_shots"] == whole["cut"] == 0
    with pytest.raises(ValueError, match=r"a prompt takes .* tokens, and the model reads 400"):
        choice_likelihoods(model, tokenizer, ["word " * 900], [" A", " B"], progress=False)


def test_scores():
    tasks = {"virology": 4, "anatomy": 2, "formal_logic": 2}
    data = MMLU([MultipleChoice(task, "q", tuple("abcd"), 0) for task, n in tasks.items() for _ in range(n)], {}, tuple(tasks))
    found = score_mmlu([0, 0, 0, 1, 0, 0, 1, 1], data, base=[0, 0, 1, 1, 0, 0, 0, 1])
    assert found["average"] == 5 / 8 and found["task_mean"] == pytest.approx((3 / 4 + 1 + 0) / 3)
    assert found["categories"] == {"humanities": 0.0, "other": 5 / 6} and found["subjects"] == {"philosophy": 0.0, "health": 5 / 6}
    assert (found["wins"], found["ties"], found["losses"]) == (1, 1, 1)
    base = (1 / 2 + 1 + 1 / 2) / 3
    assert found["base"]["task_mean"] == pytest.approx(base) and found["change"] == pytest.approx(found["task_mean"] - base)
    assert found["relative_change"] == pytest.approx(found["change"] / base)
    assert found["tasks"]["virology"] == {"accuracy": 3 / 4, "n": 4, "base": 1 / 2}
    assert "wins" not in score_mmlu([0] * 8, data)
    with pytest.raises(ValueError, match="7 answers for 8 questions"):
        score_mmlu([0] * 7, data)


def test_eval_asks_the_adapter_and_its_base(tmp_path, capsys):
    data = make(tmp_path / "alpaca", {"made": "instructions", "images": {"train": 8, "validate": 1, "test": 1}})
    asked = make(tmp_path / "mmlu", {"made": "mmlu", "images": {"train": 1, "validate": 1, "test": 3}})
    run = [
        "--plan",
        "T",
        "--steps",
        "6",
        "--batch-size",
        "8",
        "--lr",
        "3e-2",
        "--base-lr",
        "3e-2",
        "--no-eval",
        "--quiet",
        "--out",
        str(tmp_path / "run"),
    ]
    app(["train", "--model", "llama-tiny", "--data", str(data), *run], standalone_mode=False)

    def evaluate(*more):
        capsys.readouterr()
        words = ["eval", "--adapter", str(tmp_path / "run/adapter"), "--data", str(asked), "--json", "--quiet", *more]
        app(words, standalone_mode=False)
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    found = evaluate("--shots", "2", "--out", str(tmp_path / "answers.json"))
    assert found["global"] == found["mmlu"]["average"] and found["n"] == 12 and found["open"] is None and found["mmlu"]["shots"] == 2
    assert sum(found["mmlu"][name] for name in ("wins", "ties", "losses")) == 4
    rows = json.loads((tmp_path / "answers.json").read_text())
    assert sum(row["prediction"] == row["answer"] for row in rows) / 12 == pytest.approx(found["global"])
    assert sum(row["base"] == row["answer"] for row in rows) / 12 == pytest.approx(found["mmlu"]["base"]["average"])
    assert [row["prediction"] for row in rows] != [row["base"] for row in rows]  # whole tuning changed the base's own weights
    assert "base" not in evaluate("--no-base")["mmlu"]
    with pytest.raises(ValueError, match="scored by likelihood"):
        evaluate("--top-p", "0.5")
