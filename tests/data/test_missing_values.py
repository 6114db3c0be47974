"""Absent, null and NaN fields, and "<image>" without its image: in every reader refused by name, or counted with `skip_bad`."""

import json
import math

import pytest

from fastpeft.data import load_instructions, load_samples

ABSENT, NAN = object(), float("nan")
NOTHING = {"absent": ABSENT, "null": None, "nan": NAN}


def raises(text: str):
    return pytest.raises(ValueError, match=text)


def alpaca(n, **changes):
    return {"instruction": f"Name it {n}.", "input": "", "output": "red"} | changes


def llava(n, asked="<image>\nWhat?", answer="red", **changes):
    said = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    said = [{name: value for name, value in message.items() if value is not ABSENT} for message in said]
    return {"id": str(n), "image": "1.png", "conversations": said} | changes


def caption(n, **changes):
    return {"image": "1.png", "caption": "A cat."} | changes


def report(n, **changes):
    return {"image": "1.png", "report": "Clear."} | changes


def slake(n, **changes):
    return {"img_name": "1.png", "question": "What?", "answer": "Liver", "qid": n} | changes


def rad(n, **changes):
    return {"image_name": "1.png", "question": "What?", "answer": "Yes", "qid": n} | changes


def mile(n, **changes):
    return {"img_name": "1.png", "question_pool": ["What?", "Which?"], "answer": "Yes", "qid": n} | changes


def problem(n, **changes):
    return {"question": "Which?", "choices": ["a", "b"], "answer": 1, "image": "image.png", "split": "train"} | changes


REQUIRED = [(alpaca, "instruction"), (alpaca, "output"), (caption, "caption"), (caption, "image"), (report, "report"), (report, "image")]
REQUIRED += [(llava, "asked"), (llava, "answer"), (llava, "conversations")]
REQUIRED += [(make, name) for make in (slake, rad) for name in ("question", "answer", "img_name")]
REQUIRED += [
    (mile, "question_pool"),
    (mile, "answer"),
    (mile, "img_name"),
    (problem, "question"),
    (problem, "choices"),
    (problem, "answer"),
]


def write(folder, make, entries):
    """Entries as the reader's file holds them, NaN and all; returns (how to read it, what names entry 1)."""
    entries = [{k: v for k, v in entry.items() if v is not ABSENT} for entry in entries]
    if make is problem:
        (folder / "pid_splits.json").write_text(json.dumps({"train": [str(n) for n in range(len(entries))]}))
        (folder / "problems.json").write_text(json.dumps({str(n): entry for n, entry in enumerate(entries)}))
        return load_instructions, "problems.json: problem 1: "
    (folder / "train.json").write_text(json.dumps(entries))
    return (load_samples if make in (slake, rad, mile) else load_instructions), "train.json: entry 1: "


@pytest.fixture
def folder(tmp_path, make):
    make.image(tmp_path / "images" / "1.png")
    for n in range(3):
        make.image(tmp_path / "images" / "train" / str(n) / "image.png")
    return tmp_path


@pytest.mark.parametrize("kind", NOTHING)
@pytest.mark.parametrize("entry, name", REQUIRED, ids=lambda value: getattr(value, "__name__", value))
def test_nothing_where_something_is_needed(folder, entry, name, kind):
    field = "image_name" if (entry, name) == (rad, "img_name") else name
    if entry is mile and kind == "absent" and field == "question_pool":
        field, what = "question_pool", "question"  # it may have a question instead
    else:
        what = "value" if entry is llava and name != "conversations" else field
    entries = [entry(0), entry(1, **{field: NOTHING[kind]}), entry(2)]
    read, where = write(folder, entry, entries)
    with raises(f"{where}.*{what}"):
        read(folder)
    samples = read(folder, skip_bad=True)
    assert len(samples) == 2 and list(samples.skipped.values()) == [1]
    if read is load_samples:
        assert load_instructions(folder, skip_bad=True).skipped == samples.skipped


@pytest.mark.parametrize("kind", NOTHING)
@pytest.mark.parametrize("entry", [alpaca, llava, caption, report, slake, rad, mile])
def test_a_bad_first_entry_does_not_hide_the_format(folder, entry, kind):
    """The format is told by the first entry that shows it."""
    name = {alpaca: "output", llava: "conversations", caption: "caption", report: "report"}.get(entry, "answer")
    read, _ = write(folder, entry, [entry(0, **{name: NOTHING[kind]}), entry(1)])
    samples = read(folder, skip_bad=True)
    assert len(samples) == 1 and sum(samples.skipped.values()) == 1


def test_an_empty_output_is_to_say_nothing(folder):
    write(folder, alpaca, [alpaca(0, output=""), alpaca(1, output="nan"), alpaca(2, output=2)])
    assert [sample.answer for sample in load_instructions(folder)] == ["", "nan", "2"]


@pytest.mark.parametrize("kind", NOTHING)
def test_nothing_where_it_may_be(folder, kind):
    write(folder, alpaca, [alpaca(0, input=NOTHING[kind])])
    assert load_instructions(folder)[0].context == ""
    write(folder, llava, [llava(0, asked="What?", image=NOTHING[kind], id=NOTHING[kind])])
    if kind == "nan":
        with raises("entry 0: the image must be a file's name"):
            load_instructions(folder)
    else:
        sample = load_instructions(folder)[0]
        assert sample.image is None and sample.qid == "0"
    write(folder, slake, [slake(0, qid=NOTHING[kind], q_lang=NOTHING[kind], answer_type=NOTHING[kind], content_type=NOTHING[kind])])
    sample = load_samples(folder)[0]
    assert (sample.qid, sample.language, sample.answer_type, sample.content_type) == ("0", "en", "OPEN", "")
    (folder / "captions.json").write_text(json.dumps({"captions": {"0": None if kind == "absent" else NOTHING[kind]}}))
    write(folder, problem, [problem(0, hint=NOTHING[kind], lecture=NOTHING[kind], solution=NOTHING[kind])])
    sample = load_instructions(folder, use_caption=True)[0]
    assert "Context: N/A" in sample.question and sample.answer == "The answer is B."


@pytest.mark.parametrize("image", [NAN, 7, True, [], ["1.png"]])
def test_an_image_that_is_no_name(folder, image):
    for make in (llava, problem):
        read, where = write(folder, make, [make(0), make(1, image=image)])
        with raises(f"{where}the image must be a file's name"):
            read(folder)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_numbers_that_are_none(folder, value):
    for make, name in ((alpaca, "output"), (slake, "answer"), (caption, "caption")):
        read, where = write(folder, make, [make(0), make(1, **{name: value})])
        with raises(f"{where}{name} must be text"):
            read(folder)


def test_sentences_of_captions_that_are_none(folder):
    image = {"filename": "1.png", "split": "train"}
    for sentences in (NAN, None, [], [None], [{"raw": NAN}], ["text"]):
        pages = [{**image, "sentences": [{"raw": "A cat."}]}, {**image, "sentences": sentences}]
        (folder / "train.json").write_text(json.dumps({"images": pages}))
        with raises("entry 1: .*caption"):
            load_instructions(folder)
        assert load_instructions(folder, skip_bad=True).skipped == {"missing caption": 1}


# --- <image> ----------------------------------------------------------------------------------------------------------

TWO = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "a"}, {"from": "human", "value": "<image> Which?"}]
TWO.append({"from": "gpt", "value": "b"})
STRAY = {
    "alpaca, instruction": (alpaca, {"instruction": "<image>\nWhat?"}, "a text without an image"),
    "alpaca, input": (alpaca, {"input": "this: <image>"}, "a text without an image"),
    "alpaca, output": (alpaca, {"output": "<image>"}, "a text without an image"),
    "llava, no image": (llava, {"image": ABSENT}, "a text without an image"),
    "llava, null image": (llava, {"image": None}, "a text without an image"),
    "llava, answer alone": (llava, {"asked": "What?", "answer": "<image>", "image": ABSENT}, "a text without an image"),
    "llava, two": (llava, {"asked": "<image><image>\nWhat?"}, "2 times"),
    "llava, in an answer": (llava, {"answer": "a <image>"}, "in an answer"),
    "llava, later": (llava, {"conversations": TWO}, "in a later question"),
    "llava, later, no image": (llava, {"conversations": TWO, "image": ABSENT}, "a text without an image"),
    "caption": (caption, {"caption": "<image>"}, "in an answer"),
    "report": (report, {"report": "<image>"}, "in an answer"),
    "slake, two": (slake, {"question": "<image> or <image>?"}, "2 times"),
    "slake, answer": (slake, {"answer": "<image>"}, "in an answer"),
    "rad, two": (rad, {"question": "<image> or <image>?"}, "2 times"),
    "mile, two": (mile, {"question_pool": ["What?", "<image> or <image>?"]}, "2 times"),
    "scienceqa, no image": (problem, {"image": None, "question": "What is <image>?"}, "a text without an image"),
    "scienceqa, choices": (problem, {"choices": ["<image>", "<image>"]}, "2 times"),
    "scienceqa, solution": (problem, {"solution": "see <image>"}, "in an answer"),
}


@pytest.mark.parametrize("case", STRAY)
def test_an_image_mark_without_its_one_image(folder, case):
    make, changes, message = STRAY[case]
    read, where = write(folder, make, [make(0), make(1, **changes), make(2)])
    with raises(f"{where}<image> stands .*{message}"):
        read(folder)
    samples = read(folder, skip_bad=True)
    assert samples.skipped == {"stray <image>": 1} and {sample.entry for sample in samples} <= {0, 2, "0", "2"}


def test_an_image_mark_is_taken_out_of_what_is_asked(folder):
    write(folder, llava, [llava(0, asked="What is it?\n<image>"), llava(1, asked="<image>")])
    assert [sample.question for sample in load_instructions(folder)] == ["What is it?", ""]
    write(folder, caption, [caption(0)])
    assert load_instructions(folder, instruction="<image>\nDescribe.")[0].question == "Describe."
    write(folder, mile, [mile(0, question_pool=["<image>What?", "Which?"])])
    assert load_samples(folder)[0].question_pool == ("<image>What?", "Which?")  # as published; for MISS it is text
    sample = load_instructions(folder)[0]
    assert sample.question == "What?" and sample.alternatives == ((("Which?", "Yes"),),)
    write(folder, problem, [problem(0, question="What is <image>?")])
    assert "<image>" not in load_instructions(folder)[0].question
