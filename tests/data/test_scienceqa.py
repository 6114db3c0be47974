"""ScienceQA: the published folder, and prompts word for word."""

import pytest
from prompt_text import prompt_text

from fastpeft.data import load_instructions, load_scienceqa
from fastpeft.data.prompts import render
from fastpeft.data.scienceqa import scienceqa_prompt


def raises(text: str):
    return pytest.raises(ValueError, match=text)


def problem(**changes) -> dict:
    entry = {
        "question": "Which is north?",
        "choices": ["Ohio", "Utah", "Iowa"],
        "answer": 1,
        "hint": "",
        "image": None,
        "task": "closed choice",
        "grade": "grade2",
        "subject": "social science",
        "topic": "geography",
        "category": "Geography",
        "skill": "Read a map",
        "lecture": "Maps have\narrows.",
        "solution": "Look  at it.",
        "split": "train",
    }
    return {**entry, **changes}


@pytest.fixture
def folder(tmp_path, make):
    """Problems 1 (image), 2 (text only), 4 in train; 3 (image) in test and minitest."""
    data = tmp_path / "data" / "scienceqa"
    make.image(data / "images" / "train" / "1" / "image.png")
    make.image(data / "images" / "test" / "3" / "image.png", (1, 2, 3))
    problems = {"1": problem(image="image.png"), "2": problem(hint="It is far.", grade="grade9"), "4": problem(lecture="", solution="")}
    make.json(data / "problems.json", {**problems, "3": problem(image="image.png", hint="See.", split="test", answer=2)})
    make.json(data / "pid_splits.json", {"train": ["2", "1", "4"], "test": ["3"], "minitest": ["3"], "val": []})
    make.json(data.parent / "captions.json", {"model": "vit-gpt2", "captions": {"1": "A map.", "3": "An arrow."}})
    return data


def test_published_folder(folder):
    samples = load_scienceqa(folder)
    assert [s.qid for s in samples] == ["2", "1", "4"] and samples.format == "scienceqa"
    assert samples[1].image == (folder / "images/train/1/image.png").resolve() and samples[0].image is None
    assert samples[0].question == "Question: Which is north?\nContext: It is far.\nOptions: (A) Ohio (B) Utah (C) Iowa"
    assert samples[0].answer == "The answer is B. BECAUSE: Maps have\\narrows. Look at it."
    assert samples[2].answer == "The answer is B."  # neither lecture nor solution
    facts = {"subject": "social science", "grade": "grade9", "topic": "geography", "choices": ["Ohio", "Utah", "Iowa"], "answer": 1}
    assert samples[0].facts == {**facts, "has_text": True, "has_image": False} and samples[1].facts["has_image"]
    for split in ("test", "minitest"):
        assert load_scienceqa(folder, split)[0].image == (folder / "images/test/3/image.png").resolve()
    assert len(load_scienceqa(folder, None)) == 4


def test_the_common_door(folder):
    for where in (folder, folder / "problems.json"):
        assert [s.kind for s in load_instructions(where)] == ["scienceqa"] * 3
    both = load_instructions(folder, prompt_format=("QCM-LEA", "QCM-A"), use_caption=True)
    assert both[0].answer == "Maps have\\narrows. Look at it. The answer is B."
    asked = f"{both[0].question}\nAnswer with the option's letter from the given choices directly."  # told apart
    assert both[0].alternatives == (((asked, "The answer is B."),),)
    assert both[1].question.startswith("Question: Which is north?\nContext: A map.\nOptions:")
    assert load_scienceqa(folder, "test", use_caption=True)[0].question.split("\n")[1] == "Context: See. An arrow."
    assert load_scienceqa(folder, "test")[0].question.split("\n")[1] == "Context: See."


L, E, A = "Maps have\\narrows.", "Look at it.", "The answer is B."
Q, C, M = "Question: Which is north?\n", "Context: N/A\n", "Options: (A) Ohio (B) Utah (C) Iowa\n"


@pytest.mark.parametrize(
    "given, prompt",
    [
        ("CQM", C + Q + M),
        ("QCM", Q + C + M),
        ("QCML", f"{Q}{C}{M}BECAUSE: {L}\n"),
        ("QCME", f"{Q}{C}{M}BECAUSE: {E}\n"),
        ("QCMLE", f"{Q}{C}{M}BECAUSE: {L} {E}\n"),
        ("QCLM", f"{Q}{C}BECAUSE: {L}\n{M}"),
        ("QCEM", f"{Q}{C}BECAUSE: {E}\n{M}"),
        ("QCLEM", f"{Q}{C}BECAUSE: {L} {E}\n{M}"),
    ],
)
def test_inputs(given, prompt):
    assert scienceqa_prompt(problem(), f"{given}-A") == (prompt.removesuffix("\n"), A)


@pytest.mark.parametrize(
    "wanted, response",
    [
        ("A", A),
        ("AL", f"{A} BECAUSE: {E}"),  # the official way round
        ("AE", f"{A} BECAUSE: {L}"),
        ("ALE", f"{A} BECAUSE: {L} {E}"),
        ("AEL", f"{A} BECAUSE: {E} {L}"),
        ("LA", f"{L} {A}"),
        ("EA", f"{E} {A}"),
        ("LEA", f"{L} {E} {A}"),
        ("ELA", f"{E} {L} {A}"),
        ("LE", f"{L} {E}"),
        ("L", L),
    ],
)
def test_outputs(wanted, response):
    assert scienceqa_prompt(problem(), f"QCM-{wanted}")[1] == response
    bare = scienceqa_prompt(problem(lecture="", solution=""), f"QCM-{wanted}")[1]
    assert bare == (A if "A" in wanted else "")


def test_templates(folder):
    sample = load_scienceqa(folder, prompt_format="QCM-A")[1]
    body = "Question: Which is north?\nContext: N/A\nOptions: (A) Ohio (B) Utah (C) Iowa"
    assert render("scienceqa", sample) == [([f"{body}\nAnswer:"], " The answer is B.")]
    assert render("lavin", sample) == [([f"{body}\nResponse:"], "The answer is B.")]
    assert render("lavin", sample, image_tokens=True)[0][0] == ["Image: ", None, f"{body}\nResponse:"]
    assert prompt_text("alpaca", sample).endswith(f"### Instruction:\n{body}\n\n### Response:")


@pytest.mark.parametrize("bad", ["QCM", "QCM-", "QCM-B", "MCQ-A", "QCM-A-L", "", "qcm-a", "QCM-AA"])
def test_unknown_formats(folder, bad):
    with raises(f"prompt_format='{bad}': use one of CQM"):
        load_scienceqa(folder, prompt_format=bad)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"answer": 3}, "answer 3 is none of the 3 choices"),
        ({"answer": "B"}, "answer 'B' is none"),
        ({"choices": ["one"]}, "choices must be a list of 2 to 5 texts"),
        ({"choices": [1, 2]}, "choices must be a list"),
        ({"question": ""}, "question is empty"),
        ({"hint": ["x"]}, "hint must be text, not list"),
        ({"image": "other.png"}, "image 'images/train/2/other.png' not found"),
        ({"image": "../../../../1.png"}, "may not leave the data folder"),
    ],
)
def test_bad_problems(folder, make, changes, text):
    make.json(folder / "problems.json", {"1": problem(), "2": problem(**changes)})
    make.json(folder / "pid_splits.json", {"train": ["1", "2"]})
    with raises(f"problems.json: problem 2: .*{text}"):
        load_scienceqa(folder)
    samples = load_scienceqa(folder, skip_bad=True)
    assert [s.qid for s in samples] == ["1"] and sum(samples.skipped.values()) == 1


def test_bad_folders(folder, make):
    with raises("no split 'dev'; it has train, test, minitest, val"):
        load_scienceqa(folder, "dev")
    with raises("no split 'val'"):
        load_scienceqa(folder, "val")
    with raises("problem 4: nothing to respond in QCM-LE"):
        load_scienceqa(folder, prompt_format="QCM-LE")
    make.json(folder / "pid_splits.json", {"train": ["9"]})
    with raises("problem 9: not among the problems"):
        load_scienceqa(folder)
    with raises("no train problems left .1 skipped for unknown problem"):
        load_scienceqa(folder, skip_bad=True)
    (folder.parent / "captions.json").unlink()
    with raises("captions.json: cannot be read"):
        load_scienceqa(folder, use_caption=True)
    make.json(folder / "problems.json", [])
    with raises("problems.json: expected a JSON object"):
        load_scienceqa(folder)
