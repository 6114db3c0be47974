"""Synthetic medical VQA data set: procedural CT-, MR- and X-ray-like phantoms in the format of Slake 1.0.

    make_phantoms("phantoms/a", scanner="a", images={"train": 12000, "validate": 200, "test": 400})
    python -m fastpeft.demo.phantom phantoms/b --scanner b --seed 1

A scanner changes how a scene looks, never what it holds: grays, noise, blur, orientation, frame, palette, and the phrasing of the
questions. A model trained on one scanner's images reads the other's poorly, and adapting it is the demo's task. Equal seeds give
equal scenes under any scanner: take another seed for another set.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from fastpeft.demo.phantom_images import SCANNERS, Canvas, Scanner
from fastpeft.demo.phantom_questions import KINDS, LOCATIONS, Balancer, draw_scene, phrase
from fastpeft.documents import parse_json
from fastpeft.files import atomic_folder

VERSION = 3  # of what the same parameters draw; a set of another version is not reused
IMAGES = {"train": 1200, "validate": 100, "test": 200}


def make_phantoms(
    folder: str | Path,
    scanner: str | Scanner = "a",
    images: dict[str, int] | None = None,
    questions_per_image: int = 10,
    seed: int = 0,
    progress: bool = True,
    image_size: int = 64,
) -> Path:
    """Write a set to `folder` in Slake's layout, imgs/xmlabN/source.jpg and a JSON list of questions per split; returns its path.

    `scanner` is a name in SCANNERS or a Scanner; `images` maps some of train, validate and test to numbers of images (default
    1200, 100, 200), and no image is in two splits. An image gets `questions_per_image` questions, or as many kinds as apply to it
    (16 to 22). The same arguments give the same set. The folder appears when it is complete; where the same set stands already,
    it is kept. ValueError: an argument out of range, or anything else in the folder.
    """
    folder = Path(folder)
    images = dict(IMAGES if images is None else images)
    if isinstance(scanner, str):
        if scanner not in SCANNERS:
            raise ValueError(f"unknown scanner {scanner!r}: one of {', '.join(SCANNERS)}, or a Scanner")
        scanner = SCANNERS[scanner]
    if not images or set(images) - set(IMAGES) or min(images.values()) < 0:
        raise ValueError(f"images must map some of {', '.join(IMAGES)} to numbers of images, not {images}")
    if questions_per_image < 1 or image_size < 32 or seed < 0:
        raise ValueError("questions_per_image must be at least 1, image_size at least 32 and seed at least 0")
    wanted = {"version": VERSION, "scanner": asdict(scanner), "images": images, "seed": seed}
    wanted = json.loads(json.dumps(wanted | {"questions_per_image": questions_per_image, "image_size": image_size}))
    if _stands(folder, wanted):
        return folder
    try:
        with atomic_folder(folder, replace=False, durable=False) as draft:
            _write(draft, Canvas(image_size, scanner), images, questions_per_image, seed, progress)
            (draft / "phantom.json").write_text(json.dumps(wanted, indent=1))
    except OSError:
        if not _stands(folder, wanted):  # else another process finished first
            raise
    return folder


def _stands(folder: Path, wanted: dict) -> bool:
    """Whether `folder` holds the wanted set already; ValueError if it holds anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = parse_json((folder / "phantom.json").read_text())
    except (OSError, ValueError):
        found = None
    if found == wanted:
        return True
    if not isinstance(found, dict):
        raise ValueError(f"{folder} holds something other than phantoms: name another folder")
    differing = ", ".join(key for key in wanted if found.get(key) != wanted[key])
    raise ValueError(f"{folder} holds other phantoms (differing in {differing}): name another folder, or delete this one")


def _write(folder: Path, canvas: Canvas, images: dict[str, int], questions_per_image: int, seed: int, progress: bool) -> None:
    image_id = qid = 0
    with tqdm(total=sum(images.values()), desc="phantoms", unit="image", disable=not progress) as bar:
        for split in IMAGES:
            balancer, rows = Balancer(), []
            for _ in range(images.get(split, 0)):
                rng = np.random.default_rng([seed, image_id])
                scene, (draw_rng, ask_rng) = draw_scene(rng), rng.spawn(2)
                name = f"xmlab{image_id}/source.jpg"
                path = folder / "imgs" / name
                path.parent.mkdir(parents=True)
                Image.fromarray(canvas.draw(scene, draw_rng)).save(path, quality=95, subsampling=0)
                for kind, named, answer in balancer.pick(scene, questions_per_image, ask_rng):
                    rows.append(
                        {
                            "img_id": image_id,
                            "img_name": name,
                            "question": phrase(kind, named, ask_rng, canvas.scanner.held_out_phrases),
                            "answer": answer,
                            "q_lang": "en",
                            "location": LOCATIONS[scene.region],
                            "modality": scene.modality,
                            "answer_type": KINDS[kind].answer_type,
                            "base_type": "vqa",
                            "content_type": KINDS[kind].content,
                            "triple": ["vhead", "_", "_"],
                            "qid": qid,
                        }
                    )
                    qid += 1
                image_id += 1
                bar.update()
            if split in images:
                (folder / f"{split}.json").write_text(json.dumps(rows, indent=1))


def main(argv: list[str] | None = None) -> None:
    """Make a set from the command line."""
    parser = argparse.ArgumentParser(prog="python -m fastpeft.demo.phantom", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scanner", default="a", choices=list(SCANNERS))
    for split, number in IMAGES.items():
        parser.add_argument(f"--{split}", type=int, default=number, metavar="IMAGES")
    parser.add_argument("--questions-per-image", type=int, default=10)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    images = {split: getattr(args, split) for split in IMAGES}
    try:
        make_phantoms(args.folder, args.scanner, images, args.questions_per_image, args.seed, image_size=args.image_size)
    except ValueError as error:
        parser.error(str(error))
    print(args.folder)


if __name__ == "__main__":
    main()
