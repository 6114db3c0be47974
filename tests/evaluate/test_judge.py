"""Pairs for a judge in both orders, and its judgments read back: scores by hand, AlpacaEval's forms, the command line."""

import json

import pytest

from fastpeft.cli import app
from fastpeft.evaluate.judge import Outputs, parse_judgment, read_judgments, read_outputs, write_pairs
from fastpeft.study.made_data import make

OURS = Outputs("ours", {"One?": "1", "Two?": "two", "Three?": "same", "Mine?": "x"})
THEIRS = Outputs("theirs", {"Three?": "same", "Two?": "2", "One?": "one"})


def lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_each_pair_is_asked_in_both_orders(tmp_path):
    assert write_pairs(tmp_path / "pairs.jsonl", OURS, THEIRS) == 6
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert [pair["id"] for pair in pairs] == ["0-ab", "0-ba", "1-ab", "1-ba", "2-ab", "2-ba"]
    assert (pairs[0]["output_1"], pairs[0]["output_2"], pairs[0]["generator_1"]) == ("1", "one", "ours")
    assert (pairs[1]["output_1"], pairs[1]["output_2"], pairs[1]["generator_1"]) == ("one", "1", "theirs")
    asked = pairs[1]["messages"][-1]["content"]
    assert asked.index("One?") < asked.index("one") < asked.index("Response of assistant 2:\n1")
    assert "ours" not in asked and "theirs" not in asked  # a judge does not know whose they are


@pytest.mark.parametrize(
    ("said", "scores"),
    [
        ("8 6\nThe first is better.", (8, 6)),
        ("  8.5, 10 ", (8.5, 10)),
        ("8/10; 6.5/10", (8, 6.5)),
        ("[9, 3]", (9, 3)),
        ("Assistant 1 says 4 5.", None),
        ("8", None),
        ("", None),
        ("Both fit, but [[B]] is no verdict yet: [[A]]", (1, 0)),
        ("[[C]]", (0.5, 0.5)),
        ({"scores": [3, 4.5]}, (3, 4.5)),
        ({"scores": [3]}, None),
        ({"preference": 1.0}, (1, 0)),
        ({"preference": 2}, (0, 1)),
        ({"preference": 1.5}, (0.5, 0.5)),
        ({"preference": 0}, (0.5, 0.5)),
        ({"preference": float("nan")}, None),
        ({"preference": 3}, None),
        ({"response": "7 7"}, (7, 7)),
        (None, None),
    ],
)
def test_judgments_are_read(said, scores):
    assert parse_judgment(said) == scores


def test_both_orders_count_alike(tmp_path):
    """A judge that adds 2 to what it reads first: the means of both orders are without it."""
    true = {"0": (6, 5), "1": (5, 7), "2": (6, 6)}
    rows = []
    for pair, (a, b) in true.items():
        rows.append({"id": f"{pair}-ab", "response": f"{a + 2} {b}\nbecause"})
        rows.append({"id": f"{pair}-ba", "response": f"{b + 2} {a}\nbecause"})
    found = read_judgments(lines(tmp_path / "said.jsonl", rows), OURS, THEIRS)
    assert {k: found[k] for k in ("wins", "ties", "losses", "n", "win_rate")} == {
        "wins": 1,
        "ties": 1,
        "losses": 1,
        "n": 3,
        "win_rate": 0.5,
    }
    assert found["scores"] == pytest.approx([(6 + 5 + 6) / 3 + 1, (5 + 7 + 6) / 3 + 1])
    assert found["first_preferred"] == 5 / 5  # but for the tie of 5 + 2 and 7
    some = read_judgments(lines(tmp_path / "some.jsonl", [rows[0], {"id": "2-ba", "response": "no idea"}]), OURS, THEIRS)
    assert (some["wins"], some["n"], some["one_order"], some["unread"], some["unjudged"]) == (1, 1, 1, 1, 2)


def test_annotations_of_alpaca_eval(tmp_path):
    named = {"generator_1": "theirs", "generator_2": "ours"}
    rows = [
        {"instruction": "One?", "output_1": "one", "output_2": "1", "preference": 2.0} | named,
        {"instruction": "Two?", "output_1": "two", "output_2": "2", "preference": 2.0},
        {"instruction": "Three?", "output_1": "same", "output_2": "same", "preference": 1.9} | named,
    ]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(rows))
    found = read_judgments(path, OURS, THEIRS)
    assert (found["wins"], found["losses"], found["ties"], found["one_order"]) == (2, 1, 0, 3)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"id": "3-ab", "response": "1 2"}], "of pair 3, and there are 3"),
        ([{"id": "0-ab", "response": "1 2"}] * 2, "the second one of pair 0 in order ab"),
        ([{"id": "x", "response": "1 2"}], "neither the id of a pair"),
        ([{"instruction": "One?", "output_1": "1", "output_2": "?", "preference": 1}], "of other responses to 'One\\?'"),
        (["8 7", "7 8"], "judgment 0 is str"),
    ],
)
def test_judgments_of_something_else(tmp_path, rows, says):
    with pytest.raises(ValueError, match=says):
        read_judgments(lines(tmp_path / "said.jsonl", rows), OURS, THEIRS)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", "expected a JSON list"),
        ("[]", "expected a JSON list"),
        ('[{"instruction": "a"}]', "entry 0 is no output"),
        ('[{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "c"}]', "entry 1 has an instruction that is there before"),
        (
            '[{"instruction": "a", "output": "b", "generator": "x"}, {"instruction": "c", "output": "b", "generator": "y"}]',
            "several generators",
        ),
        ("[", "cannot read"),
    ],
)
def test_files_of_outputs_that_are_none(tmp_path, text, says):
    (tmp_path / "outputs.json").write_text(text)
    with pytest.raises(ValueError, match=says):
        read_outputs(tmp_path / "outputs.json")


def test_from_an_adapter_to_wins(tmp_path, capsys, one_thread):
    data = make(tmp_path / "alpaca", {"made": "instructions", "images": {"train": 4, "validate": 1, "test": 2}})

    def call(*words):
        capsys.readouterr()
        app([str(word) for word in words], standalone_mode=False)
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    shown = ["--quiet", "--json"]
    call("train", "--model", "llama-tiny", "--plan", "LoRA", "--data", data, "--steps", 1, "--no-eval", "--out", tmp_path / "run", *shown)
    for name, length in (("a", 1), ("b", 2)):
        how = ["--outputs", tmp_path / f"{name}.json", "--generator", name, "--max-new-tokens", length, *shown]
        call("eval", "--adapter", tmp_path / "run/adapter", "--data", data, *how)
    rows = json.loads((tmp_path / "a.json").read_text())
    assert rows[0].keys() == {"dataset", "instruction", "output", "generator"} and "\n\n" in rows[0]["instruction"]
    files = ["judge", tmp_path / "a.json", tmp_path / "b.json", "--json"]
    assert call(*files, "--out", tmp_path / "pairs.jsonl")["lines"] == 2 * len(rows)
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    said = [{"id": pair["id"], "response": "9 1" if pair["generator_1"] == "a" else "1 9"} for pair in pairs]
    found = call(*files, "--judgments", lines(tmp_path / "said.jsonl", said))
    assert (found["wins"], found["losses"], found["first_preferred"]) == (len(rows), 0, 0.5)
    with pytest.raises(ValueError, match="give --out FILE"):
        call(*files)
