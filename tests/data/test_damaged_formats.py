"""Readers: what each kind of damage to a published layout says."""

import json

import pytest

from fastpeft.data import load_samples


def raises(text: str):
    return pytest.raises(ValueError, match=text)


ABSENT = object()
BAD_FIELDS = {
    "missing img_name": ({"img_name": ABSENT, "question_pool": ["q"]}, "no field 'img_name' .it has answer, "),
    "missing question": ({"question": ABSENT}, "no field 'question'"),
    "missing answer": ({"answer": ABSENT}, "no field 'answer'"),
    "empty question": ({"question": " \n"}, "question is empty"),
    "empty answer": ({"answer": None}, "answer is empty"),
    "empty img_name": ({"img_name": ""}, "img_name is empty"),
    "bad answer": ({"answer": ["a", "b"]}, "answer must be text or a number, not list"),
    "bad question": ({"question": "\ud800?"}, "surrogate"),
    "unknown answer_type": ({"answer_type": "MULTI"}, "answer_type 'MULTI' is neither OPEN nor CLOSED"),
    "missing image": ({"img_name": "xmlab9/source.jpg"}, "image 'xmlab9/source.jpg' not found in .*imgs/xmlab9"),
    "unsafe image path": ({"img_name": "../outside.jpg"}, "may not leave the data folder through '..'"),
}


@pytest.mark.parametrize("reason", BAD_FIELDS)
def test_bad_fields(slake, make, reason):
    changes, message = BAD_FIELDS[reason]
    bad = {k: v for k, v in make.slake_entry(1, **changes).items() if v is not ABSENT}
    (slake / "train.json").write_text(json.dumps([make.slake_entry(1), bad, make.slake_entry(2)]))
    with raises(f"train.json: entry 1: .*{message}"):
        load_samples(slake)
    samples = load_samples(slake, skip_bad=True)
    assert samples.skipped == {reason: 1} and [(s.qid, s.entry) for s in samples] == [("101", 0), ("102", 2)]


def test_entries_that_are_no_objects(slake, make):
    make.json(slake / "train.json", [make.slake_entry(1), ["no"], "text", None])
    with raises("train.json: entry 1: expected an object with fields, not list"):
        load_samples(slake)
    assert load_samples(slake, skip_bad=True).skipped == {"not an object": 3}


@pytest.mark.parametrize("pool, reason", [([], "bad question_pool"), ("Is it?", "bad question_pool"), (["Is it?", ""], "empty question")])
def test_bad_pools(slake, make, pool, reason):
    entries = [{"img_name": "slake/xmlab1/source.jpg", "qid": n, "answer": "No", "question_pool": q} for n, q in enumerate([["q"], pool])]
    make.json(slake / "train.json", entries)
    with raises("train.json: entry 1: .*question"):
        load_samples(slake)
    assert load_samples(slake, skip_bad=True).skipped == {reason: 1}


def test_an_empty_answer_from_a_table(slake, make):
    (slake / "train.json").write_text(json.dumps([make.slake_entry(1, answer=float("nan"))]))  # NaN, which Python's reader lets pass
    with raises("entry 0: answer is empty"):
        load_samples(slake)


def test_nothing_but_bad_entries(slake, make):
    make.json(slake / "train.json", [make.slake_entry(9), make.slake_entry(8)])
    with raises("no train samples left .2 skipped for missing image"):
        load_samples(slake, skip_bad=True)


OUTSIDE = ["/etc/hostname", "C:\\x.jpg", "\\\\host\\x.jpg", "..\\outside.jpg", "a/../../outside.jpg", "imgs/../../o.jpg", "x\0.jpg"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_paths_outside_are_refused(slake, make, name):
    make.image(slake.parent / "outside.jpg")
    make.json(slake / "train.json", [make.slake_entry(1), make.slake_entry(2, img_name=name)])
    with raises("entry 1: image path .* is refused"):
        load_samples(slake)
    samples = load_samples(slake, skip_bad=True)
    assert len(samples) == 1 and samples.skipped == {"unsafe image path": 1}


def test_links_outside_are_refused(slake, make, tmp_path_factory):
    outside = make.image(tmp_path_factory.mktemp("elsewhere") / "source.jpg")
    target = slake / "imgs" / "xmlab2" / "source.jpg"
    target.unlink()
    target.symlink_to(outside)
    with raises("entry 1: image path 'xmlab2/source.jpg' is refused: .* symbolic link"):
        load_samples(slake)
    target.unlink()
    target.symlink_to(slake / "imgs" / "xmlab1" / "source.jpg")  # a link that stays inside is fine
    assert load_samples(slake)[1].image == (slake / "imgs/xmlab1/source.jpg").resolve()


def test_the_folder_itself_may_be_a_link(slake, tmp_path_factory):
    link = tmp_path_factory.mktemp("links") / "data"
    link.symlink_to(slake, target_is_directory=True)
    assert len(load_samples(link)) == 3


def test_absurd_image_names(slake, make):
    make.json(slake / "train.json", [make.slake_entry(1, img_name="x" * 5000)])
    with raises("not found"):
        load_samples(slake)


@pytest.mark.parametrize("damage", [b"", b"not an image", None])
def test_corrupt_images(slake, damage):
    path = slake / "imgs" / "xmlab2" / "source.jpg"
    path.write_bytes(path.read_bytes()[:-200] if damage is None else damage)
    assert len(load_samples(slake)) == 3  # found when it is read
    with raises("train.json: entry 1: .*xmlab2/source.jpg: "):
        load_samples(slake, check_images=True)
    samples = load_samples(slake, skip_bad=True)
    assert samples.skipped == {"corrupt image": 1} and [s.qid for s in samples] == ["101", "103"]
    assert len(load_samples(slake, skip_bad=True, check_images=False)) == 3


@pytest.mark.parametrize(
    "text, message",
    [
        ('[{"img_name": "a",\n "answer" 3}]', "train.json: not valid JSON: line 2, column 11"),
        ('{"a": 1}\n{"a" 2}', "not valid JSON: line 2, column 6"),
        ("[]", "train.json: holds no entries"),
        ("", "not valid JSON: line 1"),
        ("3", "expected a JSON list of entries"),
        ("[" * 100_000, "nested too deeply"),
        ("[1, 2]", "entry 0: expected an object with fields, not int"),
        ('[{"file": "a", "text": "b"}]', "unknown format: entries have the fields file, text; supported formats: slake .*vqa-rad .*mile"),
    ],
)
def test_bad_files(slake, text, message):
    (slake / "train.json").write_text(text)
    with raises(message):
        load_samples(slake)


def test_other_encodings_are_named(slake, make):
    (slake / "train.json").write_bytes(json.dumps([make.slake_entry(1, question="Où?")], ensure_ascii=False).encode("latin-1"))
    with raises("train.json: not UTF-8 text"):
        load_samples(slake)
