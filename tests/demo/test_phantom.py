"""The phantom set: the same arguments give the same files, questions need the image, scanners differ only in looks."""

import json
import re
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from fastpeft.data import load_samples
from fastpeft.demo.phantom import SCANNERS, Scanner, main, make_phantoms
from fastpeft.demo.phantom_images import ANATOMY, Canvas
from fastpeft.demo.phantom_questions import (
    KINDS,
    MODALITIES,
    PLANES,
    REGIONS,
    SIZES,
    Balancer,
    draw_scene,
    phrase,
    possible_answers,
    vocabulary,
)

FIELDS = ["img_id", "img_name", "question", "answer", "q_lang", "location", "modality"]
FIELDS += ["answer_type", "base_type", "content_type", "triple", "qid"]
TINY = {"train": 30, "validate": 6, "test": 6}


def words(text):
    return re.findall(r"\w+|[^\w\s]", text.lower())


def scenes(number, seed=0):
    return [draw_scene(np.random.default_rng([seed, i])) for i in range(number)]


def asked(number=800):
    """(kind, named, answer) chosen for that many images."""
    rng, balancer = np.random.default_rng(0), Balancer()
    return [question for scene in scenes(number) for question in balancer.pick(scene, 10, rng)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_phantoms(tmp_path_factory.mktemp("sets") / "a", images=TINY, progress=False)


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_arguments_same_files(folder, tmp_path):
    again = make_phantoms(tmp_path / "again", images=TINY, progress=False)
    assert files_of(again) == files_of(folder)
    other = files_of(make_phantoms(tmp_path / "other", images=TINY, seed=1, progress=False))
    assert other["train.json"] != files_of(folder)["train.json"]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []  # no work folder left


def test_slake_fields(folder):
    qids = []
    for split, number in (("train", 30), ("validate", 6), ("test", 6)):
        rows = json.loads((folder / f"{split}.json").read_text())
        assert len(rows) == 10 * number
        for row in rows:
            assert list(row) == FIELDS
            assert row["img_name"] == f"xmlab{row['img_id']}/source.jpg"
            assert row["answer_type"] in ("OPEN", "CLOSED") and row["q_lang"] == "en" and row["modality"] in MODALITIES
            assert 1 <= len(row["answer"].split()) <= 2 and len(row["question"].rstrip("?").split()) <= 12
            with Image.open(folder / "imgs" / row["img_name"]) as image:
                assert image.size == (64, 64) and image.mode == "RGB"
            qids.append(row["qid"])
    assert qids == list(range(420))


def test_ordinary_loader_reads_it(folder):
    for split, number in (("train", 300), ("val", 60), ("test", 60), (None, 420)):
        assert len(load_samples(folder, split=split, check_images=True)) == number


def test_splits_share_no_image(folder):
    shown = {split: {row["img_name"] for row in json.loads((folder / f"{split}.json").read_text())} for split in TINY}
    assert {split: len(names) for split, names in shown.items()} == TINY
    assert len(set.union(*shown.values())) == 42
    assert len({path.read_bytes() for path in folder.rglob("source.jpg")}) == 42


def test_answers_need_the_image():
    """Given what a question says, its answers are spread: Yes and No halves, open ones near uniform."""
    table = defaultdict(Counter)
    for kind, named, answer in asked():
        table[kind, named][answer] += 1
    assert set(table) == {(kind, named) for kind, pairs in possible_answers().items() for named, _ in pairs}
    for (kind, named), answers in table.items():
        assert len(answers) == sum(name == named for name, _ in possible_answers()[kind])
        assert max(answers.values()) / answers.total() < 1.15 / len(answers), (kind, named, answers)
    best = sum(max(answers.values()) for answers in table.values()) / sum(answers.total() for answers in table.values())
    assert best < 0.42  # all that a model without eyes can reach
    closed = sum(KINDS[kind].answer_type == "CLOSED" for kind, _, _ in asked()) / len(asked())
    assert 0.35 < closed < 0.55


def test_one_question_of_a_kind_per_image():
    balancer, rng = Balancer(), np.random.default_rng(0)
    for scene in scenes(50):
        kinds = [kind for kind, _, _ in balancer.pick(scene, 100, rng)]
        assert len(set(kinds)) == len(kinds) >= 16


def test_answers_are_true_to_the_scene():
    for scene in scenes(300):
        truth = {(kind, named): answer for kind, named, answer in Balancer().pick(scene, 100, np.random.default_rng(0))}
        assert truth["count", ""] == str(len(scene.lesions)) and (truth["normal", ""] == "Yes") == (not scene.lesions)
        if len(scene.lesions) == 1:
            x, y = scene.lesions[0]
            corner = f"{'Upper' if y < 0 else 'Lower'} {'Left' if x < 0 else 'Right'}"
            assert truth["position", ""] == ("Center" if abs(x) < 0.1 else corner)
        for i, (x, y) in enumerate(scene.lesions):  # and no two lesions touch
            radius = SIZES[scene.size][1]
            assert all(np.hypot(x - u, y - v) > 2 * radius for u, v in scene.lesions[:i])


def test_few_words_and_known_ones():
    assert len(vocabulary()) < 100
    assert vocabulary(held_out=True) == vocabulary(held_out=False)  # new phrasings, no new words
    rng = np.random.default_rng(0)
    for kind, named, answer in asked(200):
        for held_out in (False, True):
            text = phrase(kind, named, rng, held_out)
            assert text[0].isupper() and text.endswith("?") and set(words(text) + words(answer)) <= set(vocabulary())


def test_scanners_share_scenes_not_looks(tmp_path):
    sets = [make_phantoms(tmp_path / name, name, {"train": 20}, progress=False) for name in "ab"]
    rows = [json.loads((folder / "train.json").read_text()) for folder in sets]
    assert [row["answer"] for row in rows[0]] == [row["answer"] for row in rows[1]]
    assert {row["question"] for row in rows[1]} - {row["question"] for row in rows[0]}
    first, second = (np.asarray(Image.open(folder / "imgs/xmlab3/source.jpg"), np.float32) for folder in sets)
    assert np.abs(first - second).mean() > 50
    scanners = (Scanner(), Scanner(noise=0.2))
    plain, noisy = (Canvas(64, scanner).draw(scenes(1)[0], np.random.default_rng(0)) for scanner in scanners)
    assert np.abs(plain.astype(int) - noisy).mean() > 5


@pytest.mark.parametrize("name", SCANNERS)
def test_lesions_and_marker_show(name):
    canvas = Canvas(64, replace(SCANNERS[name], noise=0.0))
    base = replace(scenes(1)[0], lesions=(), positions=(), size="Small", marker="Red", edge="Right")

    def drawn(**changes):
        return canvas.draw(replace(base, **changes), np.random.default_rng(0)).astype(int)

    for tone in ("White", "Black"):
        centre = drawn(tone=tone, lesions=((-0.3, 0.3),), positions=("Lower Left",))[40:43, 21:24].mean()
        assert centre > 200 if tone == "White" else centre < 60
    inks = [drawn(marker=color) for color in ("Red", "Green", "Blue", "Yellow")]
    for i, one in enumerate(inks):
        for other in inks[:i]:
            changed = np.abs(one - other).sum(2) > 40
            assert changed.sum() > 200 and changed[:, 54:].sum() == changed.sum()


def test_every_view_is_drawn():
    assert set(ANATOMY) == {(region, plane) for region in REGIONS for plane in PLANES}
    canvas = Canvas(96, SCANNERS["a"])
    base = replace(scenes(1)[0], lesions=(), positions=())
    views = [canvas.draw(replace(base, region=r, plane=p), np.random.default_rng(0)).astype(int) for r, p in ANATOMY]
    for i, one in enumerate(views):
        assert one.shape == (96, 96, 3)
        assert all(np.abs(one - other).mean() > 8 for other in views[:i])


def test_reused_or_refused(folder, tmp_path):
    before = (folder / "train.json").stat().st_mtime_ns
    assert make_phantoms(folder, images=TINY, progress=False) == folder
    assert (folder / "train.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="differing in scanner, seed"):
        make_phantoms(folder, "b", TINY, seed=3, progress=False)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="something other than phantoms"):
        make_phantoms(tmp_path, images=TINY, progress=False)


def test_nothing_half_written(tmp_path, monkeypatch):
    monkeypatch.setattr(Canvas, "draw", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_phantoms(tmp_path / "a", images=TINY, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "bad",
    [
        {"scanner": "c"},
        {"images": {}},
        {"images": {"training": 3}},
        {"images": {"train": -1}},
        {"questions_per_image": 0},
        {"image_size": 16},
        {"seed": -1},
    ],
)
def test_bad_arguments(tmp_path, bad):
    with pytest.raises(ValueError):
        make_phantoms(tmp_path / "a", progress=False, **bad)
    assert list(tmp_path.iterdir()) == []


def test_command_line(tmp_path, capsys):
    arguments = [str(tmp_path / "b"), "--scanner", "b", "--seed", "1", "--train", "4", "--validate", "2", "--test", "0"]
    main(arguments)
    assert capsys.readouterr().out.strip() == arguments[0]
    assert len(json.loads((tmp_path / "b" / "train.json").read_text())) == 40
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "b")])
    assert "holds other phantoms" in capsys.readouterr().err
