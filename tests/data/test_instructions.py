"""Instruction data: what each published layout gives, how it is told, and what each kind of damage says."""

import json
from pathlib import Path

import pytest

from fastpeft.data import CausalDataset, hold_out, load_instructions, train_causal_tokenizer


def raises(text: str):
    return pytest.raises(ValueError, match=text)


ALPACA = [
    {"instruction": "Give three tips.", "input": "", "output": "1. Eat.\n2. Sleep.\n3. Move."},
    {"instruction": "Rewrite it.", "input": "two  lines\nof text", "output": ""},
]


def turn(*values, image="1.jpg", **more):
    says = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return {"id": "x", **({"image": image} if image else {}), "conversations": says, **more}


def test_alpaca(tmp_path, make):
    file = make.json(tmp_path / "alpaca_data.json", ALPACA)
    for where in (tmp_path, file):
        samples = load_instructions(where)
        assert samples.format == "alpaca" and samples.file == file and len(samples) == 2
    first, second = samples
    assert first.turns == (("Give three tips.", "1. Eat.\n2. Sleep.\n3. Move."),) and first.context == "" and first.image is None
    assert second.context == "two  lines\nof text" and second.answer == "" and (second.entry, second.qid) == (1, "1")
    with raises("no test annotations"):  # a file that names no split is for training
        load_instructions(tmp_path, split="test")


def test_llava(tmp_path, make):
    image = make.image(tmp_path / "images" / "1.jpg")
    both = turn("What is it?\n<image>", "A cat.", "Where?", "On a\nmat.")
    text = turn("Hello", "Hi.", image=None, id="t")
    make.json(tmp_path / "llava_instruct_150k.json", [both, text])
    samples = load_instructions(tmp_path)
    assert samples.format == "llava" and samples[0].image == image.resolve() and samples[0].image_name == "1.jpg"
    assert samples[0].turns == (("What is it?", "A cat."), ("Where?", "On a\nmat."))
    assert (samples[0].question, samples[0].answer) == ("What is it?", "On a\nmat.")
    assert samples[1].image is None and samples[1].qid == "t"
    split = load_instructions(tmp_path, turns="each")
    assert [s.turns for s in split] == [(("What is it?", "A cat."),), (("Where?", "On a\nmat."),), (("Hello", "Hi."),)]
    assert [s.entry for s in split] == [0, 0, 1]


@pytest.mark.parametrize("name", ["coco/train2017/1.jpg", "train2017/1.jpg"])
def test_llava_names_of_images(tmp_path, make, name):
    image = make.image(tmp_path / "train2017" / "1.jpg")
    file = make.json(tmp_path / "llava.json", [turn("<image>\nWhat?", "A cat.", image=name)])
    assert load_instructions(file)[0].image == image.resolve()
    make.json(file, [turn("<image>\nWhat?", "A cat.")])
    assert load_instructions(file, image_folder="train2017")[0].image == image.resolve()


def coco(make, folder: Path, split="train"):
    for n in (1, 2):
        make.image(folder / f"{split}2014" / f"COCO_{split}2014_{n}.jpg")
    images = [{"id": 10 + n, "file_name": f"COCO_{split}2014_{n}.jpg"} for n in (1, 2)]
    notes = [{"id": 7, "image_id": 11, "caption": " A cat. "}, {"id": 8, "image_id": 12, "caption": "A dog."}]
    notes.append({"id": 9, "image_id": 11, "caption": "One cat."})
    return make.json(folder / "annotations" / f"captions_{split}2014.json", {"info": {}, "images": images, "annotations": notes})


def test_coco(tmp_path, make):
    coco(make, tmp_path)
    file = coco(make, tmp_path, "val")
    make.json(tmp_path / "annotations" / "instances_val2014.json", {"images": [], "annotations": []})
    samples = load_instructions(tmp_path)
    assert samples.format == "coco" and [s.answer for s in samples] == ["A cat.", "A dog.", "One cat."]
    assert samples[2].image == samples[0].image == (tmp_path / "train2014/COCO_train2014_1.jpg").resolve()
    assert samples[0].qid == "7" and "caption" in samples[0].question
    held = load_instructions(tmp_path, split="val", instruction="What is there?")
    assert {s.question for s in held} == {"What is there?"} and held.file == file
    assert len(load_instructions(tmp_path, split=None)) == 6 and len(load_instructions(file, split="val")) == 3


def test_coco_of_karpathy(tmp_path, make):
    make.image(tmp_path / "val2014" / "a.jpg")
    image = {"filepath": "val2014", "filename": "a.jpg", "sentences": [{"raw": "A cat.", "sentid": 3}, {"raw": "Cats."}]}
    make.json(tmp_path / "dataset_coco.json", {"dataset": "coco", "images": [{**image, "split": "restval"}, {**image, "split": "test"}]})
    assert [s.answer for s in load_instructions(tmp_path)] == ["A cat.", "Cats."]
    assert [(s.entry, s.qid) for s in load_instructions(tmp_path, split="test")] == [(1, "3"), (1, "1")]


def test_reports(tmp_path, make):
    for name in ("a", "b", "c"):
        make.image(tmp_path / "images" / f"{name}.png")
    entry = {"id": "CXR1", "image_path": ["a.png", "b.png"], "report": "Heart size is normal.\nNo effusion."}
    make.json(tmp_path / "annotation.json", {"train": [entry], "val": [], "test": [{"id": "CXR2", "image_path": "c.png", "report": "x"}]})
    samples = load_instructions(tmp_path)
    assert samples.format == "reports" and [s.image.name for s in samples] == ["a.png", "b.png"]
    assert samples[1].turns == (("Describe the given chest x-ray image in detail.", "Heart size is normal.\nNo effusion."),)
    assert [s.qid for s in load_instructions(tmp_path, split="test")] == ["CXR2"]
    with raises("no val samples left"):
        load_instructions(tmp_path, split="val")
    make.json(tmp_path / "annotation.json", [{"image": "c.png", "report": "Clear."}])
    assert [s.answer for s in load_instructions(tmp_path)] == ["Clear."]


def test_reports_are_asked_for_in_many_words(tmp_path, make):
    """Drawn anew in every epoch of training, seeded; when answers are wanted, always the same; `instruction` says another."""
    make.image(tmp_path / "images" / "a.png")
    make.json(tmp_path / "annotation.json", {split: [{"image": "a.png", "report": "Clear."}] for split in ("train", "val", "test")})
    (training,) = load_instructions(tmp_path)
    words = [training.question, *(turns[0][0] for turns in training.alternatives)]
    assert len(words) == len(set(words)) == 15 and words[0] == "Describe the given chest x-ray image in detail."
    assert all(turns[0][1] == "Clear." for turns in training.alternatives)
    assert [load_instructions(tmp_path, split=split)[0].alternatives for split in ("val", "test")] == [(), ()]
    assert load_instructions(tmp_path, instruction="Report.")[0].turns == (("Report.", "Clear."),)
    assert load_instructions(tmp_path, instruction="Report.")[0].alternatives == ()
    tokenizer = train_causal_tokenizer(words)
    data = CausalDataset([training], tokenizer, "plain", seed=3)
    drawn = []
    for epoch in range(40):
        data.set_epoch(epoch)
        drawn.append(tokenizer.decode(data[0]["input_ids"], skip_special_tokens=True).split("\n")[0])
    assert set(drawn) <= set(words) and len(set(drawn)) > 8
    data.set_epoch(7)
    assert tokenizer.decode(data[0]["input_ids"], skip_special_tokens=True).split("\n")[0] == drawn[7]
    asked = CausalDataset([training], tokenizer, "plain", seed=3, prompts_only=True)  # held out of the training split, say
    for epoch in range(5):
        asked.set_epoch(epoch)
        assert tokenizer.decode(asked[0]["input_ids"], skip_special_tokens=True) == f"{words[0]}\n"


def test_xraygpts_summaries(tmp_path, make):
    """filter_cap.json beside image/ID.png (OpenI) or image/ID.jpg (MIMIC); it says nothing of splits."""
    for name in ("1.png", "abea-9.jpg"):
        make.image(tmp_path / "image" / name)
    content = {"annotations": [{"image_id": 1, "caption": "No effusion."}, {"image_id": "abea-9", "caption": " Clear.\n"}]}
    file = make.json(tmp_path / "filter_cap.json", content)
    samples = load_instructions(tmp_path)
    assert samples.format == "reports" and [s.image.name for s in samples] == ["1.png", "abea-9.jpg"] and samples.note == ""
    assert [s.answer for s in samples] == ["No effusion.", "Clear."] and len(samples[0].alternatives) == 14
    for given in (tmp_path, file):  # another model's test set
        asked = load_instructions(given, split="test")
        assert [s.answer for s in asked] == ["No effusion.", "Clear."] and {s.alternatives for s in asked} == {()}
    assert load_instructions(tmp_path, split="test").note.startswith("no test file: filter_cap.json is used, the only one")
    with raises("no val annotations"):
        load_instructions(tmp_path, split="val")
    make.json(file, {"annotations": [{"image_id": "2", "caption": "x"}]})
    with raises(r"entry 0: image '2.png' not found"):
        load_instructions(tmp_path)
    make.json(file, {"annotations": [{"image_id": "../1", "caption": "x"}]})
    with raises(r"entry 0: image path '../1.png' is refused"):
        load_instructions(tmp_path)
    assert load_instructions(make.json(file, content), kind="reports").format == "reports"


def test_where_llavas_data_have_the_image(tmp_path, make):
    make.image(tmp_path / "a.png")
    said = ["<image>\nWhat?", "What?\n<image>", "In <image>, what?", " <image>"]
    make.json(tmp_path / "x.json", [turn(text, "A cat.", image="a.png") for text in said])
    assert [(s.question, s.image_at) for s in load_instructions(tmp_path)] == [("What?", 0), ("What?", 5), ("In , what?", 3), ("", 0)]
    typed = {"id": 7, "image": "a.png", "answer_type": "closed", "conversatons": turn("<image>\nIs it?", 1, image="a.png")["conversations"]}
    make.json(tmp_path / "x.json", [typed])  # so spelt in some of LLaVA-Med's files, a number for an answer
    (sample,) = load_instructions(tmp_path)
    assert sample.facts == {"answer_type": "CLOSED"} and sample.answer == "1" and sample.qid == "7"


def test_vqa_as_instructions(slake):
    samples = load_instructions(slake)
    assert samples.format == "vqa" and samples.filtered == {"zh": 1}
    assert samples[0].turns == (("What is in picture 1?", "Liver"),) and samples[0].facts["answer_type"] == "OPEN"
    assert [s.qid for s in load_instructions(slake, split="test")] == ["104"]


def test_languages_of_questions(slake):
    assert {s.answer for s in load_instructions(slake, languages=("zh",))}.isdisjoint(s.answer for s in load_instructions(slake))
    assert len(load_instructions(slake, languages=None)) == len(load_instructions(slake)) + 1
    assert [s.turns for s in load_instructions(slake, languages="zh")] == [s.turns for s in load_instructions(slake, languages=("zh",))]
    with raises(r"no train samples left \(3 in language 'en', of languages=\('de',\); 1 in language 'zh'"):
        load_instructions(slake, languages="de")


def test_a_file_that_marks_its_test_entries_has_a_test_split(tmp_path, make):
    """VQA-RAD's public file: one list, the split in each entry's phrase_type."""
    for n in range(4):
        make.image(tmp_path / "images" / f"synpic{n}.jpg")
    kinds = ("freeform", "test_freeform", "para", "test_para")
    entries = [make.rad_entry(n, phrase_type=kind) for n, kind in enumerate(kinds)]
    make.json(tmp_path / "VQA_RAD Dataset Public.json", entries)
    assert [s.qid for s in load_instructions(tmp_path)] == ["0", "2"]
    assert [s.qid for s in load_instructions(tmp_path, split="test")] == ["1", "3"]
    named = load_instructions(tmp_path, split_file="VQA_RAD Dataset Public.json")
    assert [s.qid for s in named] == ["0", "2"]  # naming it does not train on its test entries
    with raises("no val annotations: VQA_RAD Dataset Public.json is for another split"):
        load_instructions(tmp_path, split="val")


def test_a_file_of_test_entries_is_never_trained_on_by_itself(tmp_path, make):
    make.image(tmp_path / "images" / "synpic1.jpg")
    file = make.json(tmp_path / "VQA_RAD Dataset Public.json", [make.rad_entry(1, phrase_type="test_para")])
    with raises("no train samples left"):
        load_instructions(tmp_path)
    held = load_instructions(tmp_path, split="test")
    assert len(held) == 1 and held.note == ""
    for named in (load_instructions(file), load_instructions(tmp_path, split_file=file)):
        assert len(named) == 1


def test_questions_in_lists_by_split(slake, make):
    for file in slake.glob("*.json"):
        file.unlink()
    make.json(slake / "slake.json", {"val": [], "train": [make.slake_entry(1), make.slake_entry(2)], "test": [make.slake_entry(4)]})
    assert [s.qid for s in load_instructions(slake)] == ["101", "102"]
    assert [s.qid for s in load_instructions(slake, split="test")] == ["104"]
    with raises("no val samples left"):
        load_instructions(slake, split="val")


def test_one_file_of_questions_may_be_in_another_language(slake, make):
    """What counts is that samples are left, not that each file has some."""
    make.json(slake / "validate.json", [make.slake_entry(3, q_lang="zh")])
    samples = load_instructions(slake, split=None)
    assert len(samples) == 4 and samples.filtered == {"zh": 2}


@pytest.mark.parametrize("name", ["trainset.json", "RAD_instruction_data.json"])
def test_the_only_file_of_questions_is_the_test_split_too(tmp_path, make, name):
    make.image(tmp_path / "images" / "synpic1.jpg")
    make.json(tmp_path / name, [make.rad_entry(1)])
    held = load_instructions(tmp_path, split="test")
    assert [s.qid for s in held] == ["1"] and held.note.startswith(f"no test file: {name} is used, the only one")
    assert load_instructions(tmp_path).note == ""


def test_a_split_file_names_images_of_the_folder(tmp_path, make):
    data, elsewhere = tmp_path / "data", tmp_path / "splits"
    make.image(data / "images" / "a.png")
    report = {"id": "r", "image": "a.png", "report": "Clear."}
    make.json(data / "reports_train.json", [report, {**report, "id": "s"}])
    make.json(elsewhere / "some.json", {"train": [report], "test": [{**report, "report": "Dense."}]})
    assert [s.answer for s in load_instructions(data, split="test", split_file=elsewhere / "some.json")] == ["Dense."]
    assert len(load_instructions(data, split="val", split_file=elsewhere / "some.json")) == 2  # it has none: taken whole
    assert len(load_instructions(data, split="test", split_file="reports_train.json")) == 2
    with raises("no such split file"):
        load_instructions(data, split_file="other.json")


def test_qids_pick_entries(tmp_path, make):
    rows = [{"id": name, "instruction": "Say it.", "output": name} for name in "abca"]
    make.json(tmp_path / "alpaca_train.json", rows)
    make.json(tmp_path / "alpaca_test.json", [{"id": "z", "instruction": "Say it.", "output": "z"}, {**rows[1], "output": "B"}])
    picked = make.json(tmp_path / "qids" / "held_out.json", ["a", "b"])
    assert [s.answer for s in load_instructions(tmp_path, split="test", split_file=picked)] == ["a", "b", "a"]  # of the training split
    (tmp_path / "qids.txt").write_text("# of the test file\nz\n")
    assert [s.answer for s in load_instructions(tmp_path, split="test", split_file="qids.txt")] == ["z"]
    both = make.json(tmp_path / "qids" / "both.json", ["b", "z"])
    with raises(r"qid b is ambiguous \(in alpaca_test.json, alpaca_train.json\)"):
        load_instructions(tmp_path, split_file=both)
    unknown = make.json(tmp_path / "qids" / "unknown.json", ["a", "q"])
    with raises("names 1 samples that .* does not have, such as 'q'"):
        load_instructions(tmp_path, split_file=unknown)
    kept = load_instructions(tmp_path, split_file=unknown, skip_bad=True)
    assert len(kept) == 2 and kept.skipped == {"unknown qid": 1}


def test_files_of_other_splits_are_named(tmp_path, make):
    make.json(tmp_path / "alpaca_train.json", ALPACA)
    with raises("no test annotations: alpaca_train.json is for another split.*name the file to use as split_file"):
        load_instructions(tmp_path, split="test")


def test_pools_are_alternatives(tmp_path, make):
    make.image(tmp_path / "images" / "x.jpg")
    entry = {"img_name": "vqa-rad/x.jpg", "qid": 1, "answer": "Yes", "question_pool": ["a?", "b?"]}
    make.json(tmp_path / "instruction_data.json", [entry])
    sample = load_instructions(tmp_path)[0]
    assert sample.turns == (("a?", "Yes"),) and sample.alternatives == ((("b?", "Yes"),),)


@pytest.mark.parametrize(
    "value, text",
    [
        ({"instruction": "a", "output": 3.5, "input": ["x"]}, "entry 1: input must be text, not list"),
        ({"instruction": " ", "output": "x"}, "entry 1: instruction is empty"),
        ({"output": "x"}, r"entry 1: no field 'instruction' \(it has output\)"),
        ("text", "entry 1: expected an object with fields, not str"),
        ({"instruction": "\ud800", "output": "x"}, "entry 1: instruction holds half a surrogate pair"),
    ],
)
def test_bad_alpaca(tmp_path, value, text):
    (tmp_path / "a.json").write_text(json.dumps([ALPACA[0], value, ALPACA[1]]))
    with raises(text):
        load_instructions(tmp_path)
    samples = load_instructions(tmp_path, skip_bad=True)
    assert [s.entry for s in samples] == [0, 2] and sum(samples.skipped.values()) == 1


@pytest.mark.parametrize(
    "entry, text",
    [
        (turn("<image>\na"), "must go human, gpt, human, gpt, ..., not human"),
        (turn("a", "b", "c"), "must go human, gpt"),
        ({"id": 1, "conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]}, "not gpt, human"),
        ({"id": 1, "conversations": []}, "conversations must be a list"),
        (turn("a", ""), "value is empty"),
        (turn("a", "b", image="2.jpg"), "image '2.jpg' not found"),
        (turn("a", "b", image="../1.jpg"), "may not leave the data folder"),
        (turn("a", "b", image="/etc/passwd"), "give it relative to the data folder"),
        (turn("a", "b", image=["1.jpg", "2.jpg"]), "must be a file's name"),
    ],
)
def test_bad_llava(tmp_path, make, entry, text):
    make.image(tmp_path / "data" / "1.jpg")
    make.image(tmp_path / "1.jpg")
    file = make.json(tmp_path / "data" / "llava.json", [turn("<image>\na", "b"), entry])
    with raises(f"llava.json: entry 1: .*{text}"):
        load_instructions(file)
    samples = load_instructions(file, skip_bad=True)
    assert len(samples) == 1 and sum(samples.skipped.values()) == 1


def test_images_leave_the_folder_by_no_link(tmp_path, make):
    outside = make.image(tmp_path / "secret.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").symlink_to(outside)
    make.json(tmp_path / "data" / "x.json", [{"image": "a.png", "report": "r"}])
    with raises("leaves the data folder through a symbolic link"):
        load_instructions(tmp_path / "data")


def test_damaged_images(tmp_path, make):
    make.image(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"not an image")
    make.json(tmp_path / "x.json", [{"image": name, "report": "r"} for name in ("a.png", "b.png")])
    assert len(load_instructions(tmp_path)) == 2
    with raises("entry 1: .*b.png: not an image"):
        load_instructions(tmp_path, check_images=True)
    assert load_instructions(tmp_path, skip_bad=True).skipped == {"corrupt image": 1}


def test_choosing_a_file(tmp_path, make):
    with raises("no such file or folder"):
        load_instructions(tmp_path / "absent")
    with raises("no train annotations in the format .* .no JSON files"):
        load_instructions(tmp_path)
    make.json(tmp_path / "config.json", {"a": 1})
    with raises("config.json: fields a"):
        load_instructions(tmp_path)
    train = make.json(tmp_path / "my_train.json", ALPACA)
    make.json(tmp_path / "my-test.json", ALPACA[:1])
    assert load_instructions(tmp_path).file == train and len(load_instructions(tmp_path, split="test")) == 1
    make.json(tmp_path / "other_train.json", ALPACA)
    with raises(r"several files for train \(my_train.json, other_train.json\)"):
        load_instructions(tmp_path)
    assert len(load_instructions(train)) == 2
    with raises("my_train.json: format alpaca, not llava"):
        load_instructions(train, kind="llava")
    with raises("config.json: an unknown format"):
        load_instructions(tmp_path / "config.json")
    with raises("kind='chat'"):
        load_instructions(tmp_path, kind="chat")
    with raises("split='all'"):
        load_instructions(tmp_path, split="all")
    train.write_text("[{]")
    with raises("my_train.json: not valid JSON: line 1"):
        load_instructions(train)


def test_json_lines(tmp_path):
    (tmp_path / "alpaca.jsonl").write_text("\n".join(map(json.dumps, ALPACA)))
    assert len(load_instructions(tmp_path)) == 2


def test_hold_out_of_samples_without_images(tmp_path, make):
    make.json(tmp_path / "a.json", [{**ALPACA[0], "instruction": str(i)} for i in range(10)])
    kept, held = hold_out(load_instructions(tmp_path), 0.2)
    assert (len(kept), len(held)) == (8, 2) and not {s.entry for s in kept} & {s.entry for s in held}
