"""Instruction-format data of paper 002: phrasings, options, files."""

import json
import random
import re
from pathlib import Path

import pytest
from PIL import Image

from fastpeft.cli import app
from fastpeft.data import Sample, VQADataset, load_samples, normalise_answer, train_tokenizer, write_instruction_data
from fastpeft.data.images import Preprocess
from fastpeft.data.instruct import OptionPools, phrasings, until_options_end

OPTIONS = re.compile(r"\(([a-d])\)(.*?)(?=; \([b-d]\)|\}|$)")


def sample(question, answer, kind="OPEN", content="Modality", **more):
    return Sample(Path("x.jpg"), question, answer, kind, content_type=content, **more)


TRAINING = [sample(f"which {i}?", text) for i, text in enumerate(("CT", "ct.", "MRI", "X-Ray", "Ultrasound", "PET"))]
TRAINING += [sample("where?", text, content="Position") for text in ("Left", "Right")] + [sample("is it?", "Yes", "CLOSED")]


def made(one, style="paper", seed=0, training=TRAINING):
    return phrasings(one, OptionPools(training), style, random.Random(seed))


def options(phrasing):
    listed = until_options_end(phrasing)
    return None if listed is None else [text.strip() for _, text in OPTIONS.findall(listed.partition("Option:")[2])]


# phrasings ----------------------------------------------------------------------------------------------------------------------


def test_released_yes_no_questions_are_those_of_the_authors_file():
    got = made(sample("Is there a pneumothorax?", "no", "CLOSED"), "released", seed=3)
    shown = re.search(r"Option:(\{.*?\})", got[0])[1]
    assert shown in ("{(a)no; (b)Yes}", "{(a)Yes; (b)no}")
    asked = "<image>Question:{Is there a pneumothorax?}"
    assert got == [
        f"{asked}Option:{shown} The answer to the question is:",
        f"{asked}Option:{shown} Answer:",
        f"{asked} Based on the image, give a judgmental answer to the question",
        f"{asked}Option:{shown} Short answer:",
        f"<image>Used the provided image to answer the question:{{Is there a pneumothorax?}}Option:{shown} "
        "Provide your ansewer based on the option",
        '<image>What is the answer to the following question?"{Is there a pneumothorax?}"',
    ]


def test_the_paper_style_has_figure_4s_numbers_of_options():
    assert [len(options(p) or ()) for p in made(sample("what?", "CT"))] == [2, 2, 3, 3, 0]
    assert [len(options(p) or ()) for p in made(sample("is it?", "no", "CLOSED"))] == [2, 2, 0]
    assert not any(mark in p for p in made(sample("what?", "CT")) for mark in ("{", "<image>", "ansewer"))


@pytest.mark.parametrize("style", ["paper", "released"])
@pytest.mark.parametrize("seed", range(20))
def test_the_answer_is_one_option_and_the_others_are_wrong_answers_of_its_attribute(style, seed):
    for phrasing in made(sample("what?", "ct"), style, seed):
        if shown := options(phrasing):
            keys = [normalise_answer(text) for text in shown]
            assert keys.count("ct") == 1 and len(set(keys)) == len(keys)
            assert set(keys) <= {"ct", "mri", "x-ray", "ultrasound", "pet"}  # neither left nor yes


def test_the_answers_place_among_the_options_varies():
    places = {options(made(sample("what?", "CT"), "released", seed)[0]).index("CT") for seed in range(40)}
    assert places == {0, 1, 2, 3}


def test_options_of_the_released_style_are_the_same_in_all_phrasings_and_the_papers_are_not():
    of = lambda style: [{tuple(o) for p in made(sample("what?", "CT"), style, seed) if (o := options(p))} for seed in range(5)]  # noqa: E731
    assert all(len(found) == 1 for found in of("released")) and any(len(found) > 2 for found in of("paper"))


def test_several_attributes_share_their_answers_and_few_are_filled_up():
    both = sample("what?", "Left", content="POSITION, modality")
    assert set(options(made(both, "released")[0])) <= {"Left", "Right", "CT", "MRI", "X-Ray", "Ultrasound", "PET"}
    few = [options(made(sample("where?", "Left", content="Position"), "released", seed)[0]) for seed in range(5)]
    assert all({"Left", "Right"} < set(shown) and len(shown) == 4 for shown in few)  # Right first, then others'


def test_without_any_wrong_answer_no_options_give_the_right_one_away():
    alone = [sample("what?", "CT")]
    assert made(alone[0], training=alone) == ['What is the answer to the following question? "what?"']


def test_braces_and_percent_signs_of_a_question_stay():
    assert "{0} 50% {x}?" in made(sample("{0} 50% {x}?", "CT"))[0]


# files --------------------------------------------------------------------------------------------------------------------------


def test_a_written_folder_trains_in_instruction_format_and_tests_on_the_original_questions(phantoms, tmp_path):
    counts = write_instruction_data(phantoms, tmp_path / "made")
    original, written = load_samples(phantoms), load_samples(tmp_path / "made")
    assert counts["train"] == len(written) == 50 and counts["test"] == 20 and written.format == "mile"
    assert [s.answer for s in written] == [s.answer for s in original]
    assert [s.answer_type for s in written] == [s.answer_type for s in original]
    assert [s.image.read_bytes() for s in written] == [s.image.read_bytes() for s in original]
    test, asked = load_samples(tmp_path / "made", split="test"), load_samples(phantoms, split="test")
    fields = ("question", "answer", "answer_type", "content_type", "qid", "question_pool")
    assert [[getattr(s, f) for f in fields] for s in test] == [[getattr(s, f) for f in fields] for s in asked]
    closed = {normalise_answer(s.answer) for s in asked} & {"yes", "no"}
    seen = {normalise_answer(o) for s in written for p in s.question_pool for o in options(p) or ()}
    assert seen <= {normalise_answer(s.answer) for s in original} | {"yes", "no"} and closed


def test_equal_seeds_write_equal_files(phantoms, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_instruction_data(phantoms, tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "instruction_data.json").read_bytes() for name in "abc")
    assert a == b != c


def test_each_epoch_asks_another_phrasing(phantoms, tmp_path):
    write_instruction_data(phantoms, tmp_path / "made")
    samples = load_samples(tmp_path / "made")
    data = VQADataset(samples, Preprocess(32), seed=4)
    asked = []
    for epoch in range(12):
        data.set_epoch(epoch)
        asked.append(data.question(0))
    assert len(set(asked)) > 1 and set(asked) <= set(samples[0].question_pool)


def test_vqa_rad_as_published_is_written_and_read_back(tmp_path):
    data = tmp_path / "rad"
    (data / "images").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(data / "images" / "a.jpg")
    common = {"image_name": "a.jpg", "phrase_type": "freeform"}
    rows = [{**common, "qid": 1, "question": "How many?", "answer": 2, "answer_type": "OPEN", "question_type": "COUNT"}]
    rows += [{**common, "qid": "x7", "question": "Many?", "answer": "3", "answer_type": "CLOSED ", "question_type": "COUNT, SIZE"}]
    (data / "trainset.json").write_text(json.dumps(rows))
    counts = write_instruction_data(data, tmp_path / "made", style="released")
    assert counts["test"] == 0 and counts["without_options"] == 0  # the training file is no test file
    written = json.loads((tmp_path / "made" / "instruction_data.json").read_text())
    assert [row["img_name"] for row in written] == ["vqa-rad/a.jpg"] * 2 and [row["qid"] for row in written] == [1, "x7"]
    assert [len(row["question_pool"]) for row in written] == [5, 6]
    assert not (tmp_path / "made" / "test.json").exists()
    assert [s.answer for s in load_samples(tmp_path / "made")] == ["2", "3"]


def test_what_cannot_be_written_is_one_clear_error(phantoms, tmp_path):
    write_instruction_data(phantoms, tmp_path / "made")
    with pytest.raises(ValueError, match="not an empty folder"):
        write_instruction_data(phantoms, tmp_path / "made")
    with pytest.raises(ValueError, match="already in instruction format"):
        write_instruction_data(tmp_path / "made", tmp_path / "again")
    with pytest.raises(ValueError, match="style='mine': use one of paper, released"):
        write_instruction_data(phantoms, tmp_path / "again", style="mine")
    assert not (tmp_path / "again").exists()


def test_the_command_writes_and_counts(phantoms, tmp_path, capsys):
    app(["instruct", str(phantoms), str(tmp_path / "made"), "--style", "released", "--json"], standalone_mode=False)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["train"] == 50 and told["test"] == 20 and told["style"] == "released" and told["phrasings"] > 5 * 50


# cut questions ------------------------------------------------------------------------------------------------------------------


def test_samples_that_lose_options_are_counted(phantoms, tmp_path):
    write_instruction_data(phantoms, tmp_path / "made", style="released")
    samples = load_samples(tmp_path / "made")
    words = train_tokenizer([p for s in samples for p in s.question_pool], 2048)
    at = {n: VQADataset(samples, Preprocess(32), tokenizer=words, max_question=n) for n in (35, 120)}
    assert at[120].cut_options == 0 and not at[120].notes and at[120].describe()["max_question"] == 120
    lost = 0
    for s in samples:  # by the tokens that remain
        cut = [words.decode(words(p, truncation=True, max_length=35)["input_ids"][1:-1]) for p in s.question_pool]
        whole = [words.decode(words(until_options_end(p) or "")["input_ids"][1:-1]) for p in s.question_pool]
        lost += any(end not in text for end, text in zip(whole, cut))
    assert at[35].cut_options == lost > 0 and f"{lost} of 50 samples lose answer options" in at[35].notes[0]


@pytest.mark.parametrize("limit", [2, 0, True, 3.5])
def test_impossible_question_lengths_are_refused(limit):
    with pytest.raises(ValueError, match="3 or more"):
        VQADataset([sample("a?", "b")], Preprocess(32), max_question=limit)


def test_batches_are_cut_where_the_data_set_says(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    long = Sample(tmp_path / "x.png", " ".join(["what"] * 60), "b")
    words = train_tokenizer(["what b"], 256)
    for limit in (35, 50):
        data = VQADataset([long], Preprocess(32), tokenizer=words, max_question=limit)
        assert data.collator()([data[0]])["input_ids"].shape == (1, limit)
