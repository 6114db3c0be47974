"""Small data sets in the layouts they are published in, and the real VQA-RAD where it is at hand."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from sentencepiece_model import write_sentencepiece

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "vqa-rad"


def write_image(path: Path, color=(10, 20, 30), size=(12, 10)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def write_json(path: Path, value) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def slake_entry(n: int, **changes) -> dict:
    entry = {
        "img_id": n,
        "img_name": f"xmlab{n}/source.jpg",
        "question": f"What is in picture {n}?",
        "answer": "Liver",
        "q_lang": "en",
        "location": "Abdomen",
        "modality": "CT",
        "answer_type": "OPEN",
        "base_type": "vqa",
        "content_type": "Organ",
        "triple": ["vhead", "_", "_"],
        "qid": 100 + n,
    }
    return {**entry, **changes}


def rad_entry(n: int, **changes) -> dict:
    entry = {
        "qid": n,
        "image_name": f"synpic{n}.jpg",
        "image_organ": "HEAD",
        "answer": "Yes",
        "answer_type": "CLOSED",
        "question_type": "PRES",
        "question": f"Is lesion {n} seen?",
        "phrase_type": "freeform",
    }
    return {**entry, **changes}


@pytest.fixture
def make():
    return SimpleNamespace(
        image=write_image, json=write_json, slake_entry=slake_entry, rad_entry=rad_entry, sentencepiece=write_sentencepiece
    )


@pytest.fixture
def slake(tmp_path):
    """Slake 1.0: images 1 to 4; training entries on 1 to 3 (one of them Chinese), a test entry on 4."""
    for n in range(1, 5):
        write_image(tmp_path / "imgs" / f"xmlab{n}" / "source.jpg", (n, n, n))
    write_json(tmp_path / "imgs" / "xmlab1" / "question.json", [{"not": "ours"}])
    closed = slake_entry(2, answer="No", answer_type="CLOSED")
    chinese = slake_entry(3, question="图中是什么", answer="肝", q_lang="zh", qid=104)
    write_json(tmp_path / "train.json", [slake_entry(1), closed, slake_entry(3), chinese])
    write_json(tmp_path / "validate.json", [slake_entry(3, qid=150)])
    write_json(tmp_path / "test.json", [slake_entry(4)])
    return tmp_path


@pytest.fixture
def rad(tmp_path):
    """VQA-RAD as trainset.json and testset.json, images 1 to 3 in images/."""
    for n in range(1, 4):
        write_image(tmp_path / "images" / f"synpic{n}.jpg", (n, n, n))
    write_json(tmp_path / "trainset.json", [rad_entry(1), rad_entry(2, answer=4, answer_type="OPEN")])
    write_json(tmp_path / "testset.json", [rad_entry(3, answer_type="CLOSED ")])
    return tmp_path


@pytest.fixture
def real_rad():
    if not (REAL / "trainset.json").is_file():
        pytest.skip(f"the real VQA-RAD isn't in {REAL}")
    return REAL
