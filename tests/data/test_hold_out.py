"""Images held out of training, and the real VQA-RAD."""

import json
import os
from collections import Counter

import pytest

from fastpeft.data import hold_out, load_samples


def raises(text: str):
    return pytest.raises(ValueError, match=text)


def ten_images(make, folder):
    for n in range(10):
        make.image(folder / "images" / f"synpic{n}.jpg")
    make.json(folder / "trainset.json", [make.rad_entry(n, qid=10 * n + k) for n in range(10) for k in range(4)])
    return load_samples(folder)


def test_hold_out_shares_no_image(tmp_path, make):
    samples = ten_images(make, tmp_path)
    kept, held = hold_out(samples, 0.3, seed=0)
    assert len(held) == 12 and len(kept) == 28
    assert not {s.image for s in kept} & {s.image for s in held}
    assert sorted(s.qid for s in [*kept, *held]) == sorted(s.qid for s in samples)
    assert kept.format == "vqa-rad" and [s.qid for s in hold_out(samples, 0.3, seed=0)[1]] == [s.qid for s in held]
    draws = {tuple(s.qid for s in hold_out(samples, 0.3, seed=seed)[1]) for seed in range(5)}
    assert len(draws) > 1


def test_hold_out_does_not_depend_on_where_the_data_lie(tmp_path, make):
    qids = [[s.qid for s in hold_out(ten_images(make, tmp_path / name), 0.2, seed=3)[1]] for name in ("a", "zz/b")]
    assert qids[0] == qids[1]


def test_hold_out_bounds(tmp_path, make):
    samples = ten_images(make, tmp_path)
    assert len(hold_out(samples, 0.001)[1]) == 4 and len(hold_out(samples, 0.999)[0]) == 4
    assert len(hold_out(samples, 0.5, by="sample")[1]) == 20
    for bad in (0, 1, -0.1):
        with raises("fraction="):
            hold_out(samples, bad)
    with raises("by='patient'"):
        hold_out(samples, 0.5, by="patient")
    with raises("1 image"):
        hold_out(samples[:4], 0.5)


def test_real_vqa_rad(real_rad):
    samples = load_samples(real_rad, check_images=True)
    assert len(samples) == 3064 and samples.format == "vqa-rad" and not samples.skipped and not samples.filtered
    assert len({s.image for s in samples}) == 314
    assert Counter(s.answer_type for s in samples) == {"CLOSED": 1823, "OPEN": 1241}
    raw = json.loads((real_rad / "trainset.json").read_text())
    assert sum(e["answer_type"] == "CLOSED " for e in raw) == 2
    integers = [i for i, e in enumerate(raw) if isinstance(e["answer"], int)]
    assert len(integers) == 10 and all(samples[i].answer == str(raw[i]["answer"]) for i in integers)
    assert [s.qid for s in samples] == [str(e["qid"]) for e in raw]
    kept, held = hold_out(samples, 0.1)
    assert not {s.image for s in kept} & {s.image for s in held} and 280 <= len(held) <= 340


def test_real_vqa_rad_in_mile_form(real_rad, make, tmp_path):
    entries = [{"img_name": "vqa-rad/synpic54610.jpg", "qid": 5924, "answer": "Yes", "question_pool": ["a?", "b?"]}]
    sample = load_samples(real_rad, make.json(tmp_path / "RAD_instruction_data.json", entries))[0]
    assert sample.image == real_rad / "images" / "synpic54610.jpg" and os.path.getsize(sample.image) > 0
