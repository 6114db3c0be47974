"""The split resolver: formats told apart by their entries, files chosen by names and contents, entries by what they say of their split."""

import pytest

from fastpeft.data._instruction_formats import INSTRUCTION_FORMATS
from fastpeft.data._splits import NOT_TEST, AnnotationFile, InstructionNaming, QuestionNaming, resolve
from fastpeft.data.formats import QUESTION_FORMATS

ENTRIES = {  # (format among instructions, among questions) of an entry
    ("alpaca", None): {"instruction": "a", "input": "", "output": "b"},
    ("llava", None): {"id": 1, "image": "a.jpg", "conversations": []},
    ("reports", None): {"image_path": ["a.png"], "report": "Clear."},
    ("coco", None): {"image": "a.jpg", "caption": "A cat."},
    ("vqa", "slake"): {"img_name": "a.jpg", "question": "a?", "answer": "b"},
    ("vqa", "vqa-rad"): {"image_name": "a.jpg", "question": "a?", "answer": "b"},
    ("vqa", "mile"): {"img_name": "a.jpg", "question_pool": ["a?"], "answer": "b"},
    (None, None): {"file": "a.jpg", "text": "b"},
}


def source(value, kind="unnamed"):
    return AnnotationFile("x.json", kind, lambda _: value)


def name(form):
    return None if form is None else form.name


@pytest.mark.parametrize("expected", ENTRIES, ids=str)
def test_a_format_is_told_by_its_entries_fields(expected):
    entry = ENTRIES[expected]
    for value in ([entry], ["damaged", {}, entry], {"train": [], "val": [entry]}):
        found = tuple(name(source(value).format(formats)) for formats in (INSTRUCTION_FORMATS, QUESTION_FORMATS))
        assert found == expected
    assert source({"info": [entry]}).format(INSTRUCTION_FORMATS) is None  # no list of a split


@pytest.mark.parametrize("value", [5, "text", None, [], {}, [[1]], {"images": []}, {"images": [{"id": 1}], "annotations": [{"bbox": []}]}])
def test_content_of_no_format(value):
    assert source(value).format(INSTRUCTION_FORMATS) is None and source(value).format(QUESTION_FORMATS) is None
    assert isinstance(source(value).fields, str)


def test_entries_of_a_split():
    marked = source([{"phrase_type": "para"}, {"phrase_type": " Test_para"}, "damaged"])
    assert [entry.split for entry in marked.all_entries] == [NOT_TEST, "test", NOT_TEST]
    assert [[index for index, _ in marked.entries(split)] for split in ("train", "val", "test", None)] == [[0, 2], [0, 2], [1], [0, 1, 2]]
    lists = source({"validation": [{"a": 1}], "test": [{"a": 2}, {"a": 3}], "about": "text"})
    assert [len(lists.entries(split)) for split in ("train", "val", "test", None)] == [0, 1, 2, 3]
    assert len(lists.entries("train", whole=True)) == 3
    assert (marked.holds("val"), marked.holds("test"), lists.holds("val"), source([{}]).holds("test")) == (False, True, True, False)


def test_files_that_cannot_serve_are_not_read(tmp_path, make):
    """A large file for another split costs nothing, and its faults are not this split's."""
    good = make.json(tmp_path / "a_test.json", [ENTRIES["vqa", "slake"]])
    (tmp_path / "a_train.json").write_text("damaged")
    for naming in (QuestionNaming(lambda path: 1 / 0), InstructionNaming(INSTRUCTION_FORMATS, None, ("vqa",))):
        ((found,), note) = resolve(tmp_path, "test", naming)
        assert found.path == good and note == ""
