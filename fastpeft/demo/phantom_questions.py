"""Scenes of phantoms and the questions about them, chosen so that answers are balanced.

A `Scene` is the truth behind one image: modality, plane, region, lesions, and a coloured bar along one edge, the marker. Positions
are the image's own (its left is left). `questions_of` lists all that can be asked of a scene; `Balancer.pick` takes those whose
answers were given least so far, so that over a set of images the words of a question alone tell little: Yes and No come near half
each, open answers spread over their values.
"""

import functools
import re
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MODALITIES = ("CT", "MRI", "X-Ray")
PLANES = ("Axial", "Coronal", "Sagittal")
ORGANS = {
    "Head": ("brain",),
    "Chest": ("lung", "heart"),
    "Abdomen": ("liver", "kidney"),
    "Pelvis": ("bladder",),
}  # main one first
REGIONS = tuple(ORGANS)
LOCATIONS = {"Head": "Brain_Tissue", "Chest": "Lung", "Abdomen": "Abdomen", "Pelvis": "Pelvic Cavity"}  # Slake's names
PLACES = {"Upper Left": (-1, -1), "Upper Right": (1, -1), "Lower Left": (-1, 1), "Lower Right": (1, 1), "Center": (0, 0)}
CORNERS = tuple(PLACES)[:4]
EDGES = {"Top": (0, -1), "Bottom": (0, 1), "Left": (-1, 0), "Right": (1, 0)}
SIZES = {"Small": (0.14, 0.17), "Large": (0.28, 0.32)}  # radius, an image being -1 to 1 wide: 9-11 and 18-20 pixels across of 64
TONES = ("White", "Black")
COLORS = ("Red", "Green", "Blue", "Yellow")
NUMBERS = ("no", "one", "two", "three")


class Kind(NamedTuple):
    """A kind of question. {} in a phrase stands for what the question names. `held_out` is a phrase for scanners whose users ask
    differently, in words that the others' `phrases` hold."""

    content: str  # Slake's content type
    answer_type: str
    weight: float  # share in the choice of questions
    phrases: tuple[str, str]
    held_out: str


KINDS = {
    "modality": Kind("Modality", "OPEN", 1.0,
        ("what modality is this?", "which modality is used?"), "what is the modality of this image?"),
    "is modality": Kind("Modality", "CLOSED", 0.8,
        ("is this a {} image?", "does this look like a {} image?"), "is this image a {}?"),
    "plane": Kind("Plane", "OPEN", 1.0,
        ("what plane is this?", "which plane is used?"), "what is the plane of this image?"),
    "is plane": Kind("Plane", "CLOSED", 0.8,
        ("is this the {} plane?", "does this look like the {} plane?"), "is this image in the {} plane?"),
    "region": Kind("Organ", "OPEN", 0.8,
        ("what body part is this?", "which body part is in this image?"), "what part of the body is in this image?"),
    "organ": Kind("Organ", "OPEN", 0.8,
        ("which organ is in this image?", "what is the main organ?"), "what organ is this?"),
    "is organ": Kind("Organ", "CLOSED", 0.8,
        ("is the {} in this image?", "is there a {} in this image?"), "does this image contain the {}?"),
    "lesion": Kind("Abnormality", "CLOSED", 0.8,
        ("is there a lesion?", "does this image contain a lesion?"), "is a lesion in this image?"),
    "normal": Kind("Abnormality", "CLOSED", 0.6,
        ("is this image normal?", "does this image look normal?"), "does this look normal?"),
    "abnormality": Kind("Abnormality", "OPEN", 0.8,
        ("what abnormality is there?", "what is the abnormality?"), "which abnormality is this?"),
    "count": Kind("Quantity", "OPEN", 1.2,
        ("how many lesions are there?", "what is the number of lesions?"), "how many lesions are in this image?"),
    "is count": Kind("Quantity", "CLOSED", 0.6,
        ("are there {} lesions?", "is the number of lesions {}?"), "does this image contain {} lesions?"),
    "position": Kind("Position", "OPEN", 1.2,
        ("where is the lesion?", "which part contains the lesion?"), "what is the position of the lesion?"),
    "is position": Kind("Position", "CLOSED", 0.8,
        ("is there a lesion in the {}?", "does the {} contain a lesion?"), "is a lesion in the {}?"),
    "side": Kind("Position", "CLOSED", 0.6,
        ("is the lesion on the left or right?", "which side is the lesion on?"), "is the lesion left or right?"),
    "size": Kind("Size", "OPEN", 0.8,
        ("what size is the lesion?", "how large is the lesion?"), "what is the size of the lesion?"),
    "is size": Kind("Size", "CLOSED", 0.8,
        ("is the lesion {}?", "does the lesion look {}?"), "does the size of the lesion look {}?"),
    "tone": Kind("Color", "CLOSED", 0.8,
        ("is the lesion white or black?", "is the lesion black or white?"), "what color is the lesion, black or white?"),
    "marker": Kind("Color", "OPEN", 1.2,
        ("what color is the marker?", "which color is used, on the marker?"), "what is the color of the marker?"),
    "is marker": Kind("Color", "CLOSED", 0.8,
        ("is the marker {}?", "does the marker look {}?"), "does the color of the marker look {}?"),
    "edge": Kind("Position", "OPEN", 1.2,
        ("where is the marker?", "what is the position of the marker?"), "which part contains the marker?"),
    "is edge": Kind("Position", "CLOSED", 0.6,
        ("is the marker on the {}?", "does the {} contain the marker?"), "is there a marker on the {}?"),
}  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """The truth behind one image. `lesions` are centres (x, y), x rightwards, y downwards, -1 to 1; they share size and tone."""

    modality: str
    plane: str
    region: str
    lesions: tuple[tuple[float, float], ...]
    positions: tuple[str, ...]  # of each lesion: a corner or "Center"
    size: str
    tone: str
    marker: str
    edge: str


def _one(rng: np.random.Generator, values: tuple[str, ...]) -> str:
    return values[rng.integers(len(values))]


def draw_scene(rng: np.random.Generator) -> Scene:
    """A random scene. A radiograph is never axial, so CT and MRI are axial more often: modality and plane are each uniform."""
    modality = _one(rng, MODALITIES)
    plane = _one(rng, ("Coronal", "Sagittal") if modality == "X-Ray" else ("Axial", "Axial", "Coronal", "Sagittal"))
    size = _one(rng, tuple(SIZES))
    number = int(rng.choice(4, p=(0.27, 0.37, 0.18, 0.18)))  # one is frequent: only a single lesion is asked where it is
    places = ("Center",) if number == 1 and rng.random() < 0.2 else tuple(str(place) for place in rng.permutation(CORNERS)[:number])
    low, high = ((0.36, 0.38), (0.42, 0.46)) if size == "Large" else ((0.28, 0.30), (0.42, 0.46))  # so that large ones never touch
    jitter = rng.uniform(-0.04, 0.04, 2)
    away = [np.multiply(PLACES[place], rng.uniform(low, high)) + (jitter if place == "Center" else 0) for place in places]
    region, tone, marker, edge = (_one(rng, values) for values in (REGIONS, TONES, COLORS, tuple(EDGES)))
    lesions = tuple((float(x), float(y)) for x, y in away)
    return Scene(modality, plane, region, lesions, places, size, tone, marker, edge)


def questions_of(scene: Scene) -> list[tuple[str, str, str]]:
    """All (kind, named value, answer) that can be asked of a scene; the named value is "" where the question names nothing."""
    shown, number = ORGANS[scene.region], len(scene.lesions)
    asked = [
        ("modality", "", scene.modality),
        ("plane", "", scene.plane),
        ("region", "", scene.region),
        ("organ", "", shown[0].capitalize()),
        ("normal", "", _yes(number == 0)),
        ("lesion", "", _yes(number > 0)),
        ("abnormality", "", {"White": "Mass", "Black": "Cyst"}[scene.tone] if number else "None"),
        ("count", "", str(number)),
        ("marker", "", scene.marker),
        ("edge", "", scene.edge),
    ]
    asked += [("is modality", m, _yes(m == scene.modality)) for m in MODALITIES]
    asked += [("is plane", p, _yes(p == scene.plane)) for p in PLANES]
    asked += [("is organ", o, _yes(o in shown)) for organs in ORGANS.values() for o in organs]
    asked += [("is count", word, _yes(n == number)) for n, word in enumerate(NUMBERS)]
    asked += [("is marker", c, _yes(c == scene.marker)) for c in COLORS]
    asked += [("is edge", e, _yes(e == scene.edge)) for e in EDGES]
    if number:  # of no lesion, position and size would always be No
        asked += [("is position", c, _yes(c in scene.positions)) for c in CORNERS]
        asked += [("is size", s, _yes(s == scene.size)) for s in SIZES]
        asked += [("size", "", scene.size), ("tone", "", scene.tone)]
    if number == 1:
        asked.append(("position", "", scene.positions[0]))
        if scene.positions[0] != "Center":
            asked.append(("side", "", scene.positions[0].split()[1]))
    return asked


def _yes(truth: bool) -> str:
    return "Yes" if truth else "No"


def phrase(kind: str, named: str, rng: np.random.Generator, held_out: bool) -> str:
    """The question in words: one of the kind's phrases, or with `held_out` its first phrase or the held-out one."""
    known = KINDS[kind].phrases
    text = _one(rng, (known[0], KINDS[kind].held_out) if held_out else known)
    return (text[0].upper() + text[1:]).format(named if named in MODALITIES else named.lower())


class Balancer:
    """Chooses questions for image after image, one of a kind at most, those first that were asked least for the kind's weight."""

    def __init__(self) -> None:
        self.asked: Counter[tuple[str, str, str]] = Counter()

    def pick(self, scene: Scene, number: int, rng: np.random.Generator) -> list[tuple[str, str, str]]:
        """At most `number` of the scene's questions: (kind, named value, answer)."""
        best: dict[
            str, tuple[float, float, tuple[str, str, str]]
        ] = {}  # kind -> (how often asked, in the kind's terms; tie break; question)
        for question in questions_of(scene):
            kind = question[0]
            rank = (self.asked[question] * len(possible_answers()[kind]) / KINDS[kind].weight, rng.random(), question)
            best[kind] = min(best.get(kind, rank), rank)
        chosen = [question for _, _, question in sorted(best.values())[:number]]
        self.asked.update(chosen)
        return chosen


@functools.cache
def possible_answers() -> dict[str, frozenset[tuple[str, str]]]:
    """kind -> all (named value, answer), from enough random scenes to meet every one."""
    rng = np.random.default_rng(0)
    found = {question for _ in range(1000) for question in questions_of(draw_scene(rng))}
    return {kind: frozenset((named, answer) for k, named, answer in found if k == kind) for kind in KINDS}


def vocabulary(held_out: bool = True) -> list[str]:
    """Every lower-case word and sign of the questions and answers, split as BERT's basic tokenizer does ("X-Ray" is x - ray)."""
    texts = [text for kind in KINDS.values() for text in kind.phrases + ((kind.held_out,) if held_out else ())]
    texts += [text for pairs in possible_answers().values() for pair in pairs for text in pair]
    return sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.replace("{}", "").lower())})
