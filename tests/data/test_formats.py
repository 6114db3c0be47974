"""Readers: what each published layout gives, and which of its files is read."""

import json

import pytest

from fastpeft.data import load_samples


def raises(text: str):
    return pytest.raises(ValueError, match=text)


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_slake(slake):
    samples = load_samples(slake)
    assert [s.qid for s in samples] == ["101", "102", "103"]
    assert samples.format == "slake" and samples.file == slake / "train.json"
    assert samples.filtered == {"zh": 1} and samples.skipped == {} and samples.note == ""
    first = samples[0]
    assert first.image == (slake / "imgs/xmlab1/source.jpg").resolve() and first.image_name == "xmlab1/source.jpg"
    assert (first.question, first.answer, first.answer_type) == ("What is in picture 1?", "Liver", "OPEN")
    assert (first.content_type, first.language, first.question_pool, first.entry) == ("Organ", "en", (), 0)
    assert samples[1].answer_type == "CLOSED"
    assert [s.qid for s in load_samples(slake, split="test")] == ["104"]
    assert [s.qid for s in load_samples(slake, split="val")] == ["150"]


def test_languages(slake):
    assert [s.answer for s in load_samples(slake, languages="zh")] == ["肝"]
    both = load_samples(slake, languages=None)
    assert len(both) == 4 and both.filtered == {}
    with raises(r"no train samples left \(3 in language 'en', of languages=\('de',\); 1 in language 'zh'"):
        load_samples(slake, languages=("de",))


def test_everything(slake):
    samples = load_samples(slake, split=None)
    assert [s.source.name for s in samples] == ["train.json"] * 3 + ["validate.json", "test.json"]
    assert [f.name for f in samples.files] == ["train.json", "validate.json", "test.json"]


def test_vqa_rad(rad):
    samples = load_samples(rad)
    assert samples.format == "vqa-rad"
    assert [(s.answer, s.answer_type) for s in samples] == [("Yes", "CLOSED"), ("4", "OPEN")]
    assert samples[0].content_type == "PRES"
    test = load_samples(rad, split="test")
    assert [(s.qid, s.answer_type) for s in test] == [("3", "CLOSED")]


def public(make, folder, kinds):
    for n in range(len(kinds)):
        make.image(folder / "VQA_RAD Image Folder" / f"synpic{n}.jpg")
    entries = [make.rad_entry(n, qid=str(n), phrase_type=kind, question_rephrase="NULL") for n, kind in enumerate(kinds)]
    return make.json(folder / "VQA_RAD Dataset Public.json", entries)


def test_vqa_rad_public(tmp_path, make):
    file = public(make, tmp_path, ["freeform", "test_freeform", "para", "test_para"])
    assert [s.qid for s in load_samples(tmp_path)] == ["0", "2"]
    assert [s.qid for s in load_samples(tmp_path, split="test")] == ["1", "3"]
    assert len(load_samples(tmp_path, split=None)) == 4
    assert [s.qid for s in load_samples(tmp_path, file, split="test")] == ["1", "3"]
    assert load_samples(tmp_path)[0].image.parent.name == "VQA_RAD Image Folder"


def test_public_file_of_test_entries_is_never_trained_on_by_itself(tmp_path, make):
    file = public(make, tmp_path, ["test_freeform", "test_para"])
    with raises("no train samples left"):
        load_samples(tmp_path)
    assert len(load_samples(tmp_path, file)) == 2  # named by the user


@pytest.mark.parametrize("folder", ["image", "images", "imgs", ".", "vqa-rad", "vqa-rad/images", "images/vqa-rad"])
def test_mile(tmp_path, make, folder):
    image = make.image(tmp_path / folder / "synpic1.jpg")
    pool = ["<image>Question:{Is it?} Answer:", "<image>What?"]
    entries = [
        {"img_name": "vqa-rad/synpic1.jpg", "qid": 5924, "answer": "Yes", "question_pool": pool},
        {"img_name": "vqa-rad/synpic1.jpg", "qid": 5925, "answer": "Ultrasound", "question_pool": pool[1:]},
    ]
    make.json(tmp_path / "RAD_instruction_data.json", entries)
    samples = load_samples(tmp_path)
    assert samples.format == "mile" and samples[0].image == image.resolve()
    assert samples[0].question_pool == tuple(pool) and samples[0].question == pool[0]
    assert [s.answer_type for s in samples] == ["CLOSED", "OPEN"]


def test_mile_slake(tmp_path, make):
    image = make.image(tmp_path / "imgs" / "xmlab1" / "source.jpg")
    make.image(tmp_path / "imgs" / "source.jpg")
    entry = {"img_name": "slake/xmlab1/source.jpg", "qid": 1, "answer": "No", "question_pool": ["Is it?"]}
    make.json(tmp_path / "instruction_data.json", [entry])
    assert load_samples(tmp_path)[0].image == image.resolve()


def test_a_missing_slake_image_is_not_replaced_by_a_namesake(slake, make):
    make.image(slake / "imgs" / "source.jpg")
    (slake / "imgs" / "xmlab2" / "source.jpg").unlink()
    with raises("train.json: entry 1: image 'xmlab2/source.jpg' not found"):
        load_samples(slake)


@pytest.mark.parametrize("name", ["train.jsonl", "slake_train.jsol", "train.json", "TRAIN.NDJSON"])
def test_json_lines_and_bom(slake, make, name):
    entries = [make.slake_entry(1), make.slake_entry(2, question="Où est le foie?")]
    (slake / "train.json").unlink()
    (slake / name).write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps(e, ensure_ascii=False) for e in entries).encode() + b"\n\n")
    assert [s.question for s in load_samples(slake)] == ["What is in picture 1?", "Où est le foie?"]
    (slake / name).write_text(json.dumps(entries[0]))  # a single line is a file of one entry
    assert len(load_samples(slake)) == 1


@pytest.mark.parametrize(
    "value, text, kind",
    [(4, "4", "OPEN"), (2.0, "2", "OPEN"), (0.5, "0.5", "OPEN"), (True, "yes", "CLOSED"), (False, "no", "CLOSED"), (0, "0", "OPEN"),
     (" YES. ", "YES.", "CLOSED"), ("no \t", "no", "CLOSED"), ("left\n lung", "left lung", "OPEN")],
)  # fmt: skip
def test_answers_and_inferred_types(slake, make, value, text, kind):
    entry = make.slake_entry(1, answer=value)
    for absent in ({}, {"answer_type": None}, {"answer_type": " "}):
        del entry["answer_type"]
        entry |= absent
        make.json(slake / "train.json", [entry])
        sample = load_samples(slake)[0]
        assert (sample.answer, sample.answer_type) == (text, kind)
        entry.setdefault("answer_type", None)


@pytest.mark.parametrize("given", ["closed", " Closed ", "CLOSED\n"])
def test_answer_types_are_read_generously(slake, make, given):
    make.json(slake / "train.json", [make.slake_entry(1, answer_type=given)])
    assert load_samples(slake)[0].answer_type == "CLOSED"


# --- which file -------------------------------------------------------------------------------------------------------


def test_split_file_paths(slake, make, tmp_path, monkeypatch):
    other = make.json(slake / "splits" / "mine.json", [make.slake_entry(2)])
    assert [s.qid for s in load_samples(slake, other)] == ["102"]
    assert [s.qid for s in load_samples(slake, "splits/mine.json")] == ["102"]  # relative to the data
    monkeypatch.chdir(slake / "splits")
    assert [s.qid for s in load_samples("..", "mine.json")] == ["102"]  # relative to the working directory
    with raises("absent.json: no such split file"):
        load_samples(slake, "absent.json")


def test_split_file_of_ids(slake, make):
    make.json(slake / "ids.json", [150, "102"])
    assert [s.qid for s in load_samples(slake, "ids.json", split="test")] == ["102", "150"]
    (slake / "ids.txt").write_text("# kept\n101\n\n 103 \n101\n")
    assert [s.qid for s in load_samples(slake, "ids.txt")] == ["101", "103"]


def test_split_file_of_ids_says_what_is_wrong(slake, make):
    make.json(slake / "ids.json", [101, 7, 8])
    with raises("2 of 3 qids are in none of train.json, validate.json, test.json: 7, 8"):
        load_samples(slake, "ids.json")
    assert load_samples(slake, "ids.json", skip_bad=True).skipped == {"unknown qid": 2}
    make.json(slake / "ids.json", [104])  # the Chinese entry of train.json and the one of test.json
    with raises(r"qid 104 is ambiguous \(train.json entry 3, test.json entry 0\)"):
        load_samples(slake, "ids.json")
    (slake / "ids.txt").write_text("# nothing\n")
    with raises("ids.txt: holds no qids"):
        load_samples(slake, "ids.txt")


def test_duplicate_qids_are_fine_otherwise(slake, make):
    make.json(slake / "train.json", [make.slake_entry(1), make.slake_entry(2, qid=101)])
    assert [s.qid for s in load_samples(slake)] == ["101", "101"]


def test_test_split_falls_back_and_says_so(slake):
    (slake / "test.json").unlink()
    samples = load_samples(slake, split="test")
    assert samples.file.name == "validate.json" and "validate.json" in samples.note
    (slake / "validate.json").unlink()
    samples = load_samples(slake, split="test")
    assert samples.file.name == "train.json" and "train.json" in samples.note


def test_training_never_falls_back_on_test_data(slake):
    (slake / "train.json").unlink()
    with raises("no train file among test.json, validate.json; name the file to use as split_file"):
        load_samples(slake)


def test_choice_between_names(slake, make):
    make.json(slake / "slake_train.json", [make.slake_entry(2)])
    assert load_samples(slake).file.name == "train.json"
    (slake / "train.json").unlink()
    (slake / "._train.json").write_bytes(b"\0\5\26\7")  # what macOS archives carry
    assert load_samples(slake).file.name == "slake_train.json"
    make.json(slake / "rad_train.json", [make.slake_entry(2)])
    with raises("several train files .rad_train.json, slake_train.json.; name the one"):
        load_samples(slake)


def test_no_data(tmp_path, make):
    with raises("absent: no such folder"):
        load_samples(tmp_path / "absent")
    with raises(r"no annotation file found; looked for train.json.*trainset.json.*Public.json.*instruction_data.json"):
        load_samples(tmp_path)
    file = make.json(tmp_path / "others.json", [])
    with raises("to use others.json, name it as split_file"):
        load_samples(tmp_path)
    with raises("is a file: give its folder"):
        load_samples(file)
    make.json(tmp_path / "Slake1.0" / "train.json", [])
    with raises(r"did you mean .*Slake1.0\?"):
        load_samples(tmp_path)
    with raises("split='dev'"):
        load_samples(tmp_path, split="dev")
