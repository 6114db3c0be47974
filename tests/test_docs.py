"""The documentation and the README hold: their Python runs page by page, their commands are commands, every page is in the navigation."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer
import yaml

from fastpeft.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
GROUP = typer.main.get_command(app)


def blocks(page: Path, *languages: str) -> list[str]:
    return [body for _, language, body in BLOCK.findall(page.read_text(encoding="utf-8")) if language in languages]


def commands(page: Path) -> list[list[str]]:
    """Every call of fastpeft in a block of commands, without comments and continued lines."""
    indented = re.findall(r"(?:^    .*\n)+", BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    text = "\n".join([*blocks(page, "", "console"), *indented]).replace("\\\n", " ")
    lines = [line.strip().removeprefix("$ ") for line in text.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("fastpeft ")]


@pytest.fixture(scope="module")
def place(tmp_path_factory, runs):
    """A folder as `make demo` and the first command of the quick start leave it, of fewer and smaller images."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "demo-run").mkdir()
    shutil.move(runs.make_data(folder), folder / "demo-run" / "phantoms-b")
    options = ["--model", "miss-tiny", "--plan", "F/F/LoRA", "--data", str(folder / "demo-run" / "phantoms-b"), "--steps", "1"]
    app(["train", *options, "--batch-size", "2", "--no-eval", "--quiet", "--out", str(folder / "my-run")], standalone_mode=False)
    shutil.copy(next((folder / "demo-run" / "phantoms-b" / "imgs").rglob("*.jpg")), folder / "image.jpg")
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("one_thread", "methods_restored")
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.stem)
def test_python_runs(page, place, tmp_path, monkeypatch):
    for found in place.iterdir():
        (tmp_path / found.name).symlink_to(found)
    monkeypatch.chdir(tmp_path)
    space = {"__name__": "docs"}
    for body in blocks(page, "python"):
        exec(compile(body, page.name, "exec"), space)


@pytest.mark.parametrize("page, words", [pytest.param(p, w, id=f"{p.stem}: {' '.join(w)[:60]}") for p in PAGES for w in commands(p)])
def test_commands_are_commands(page, words):
    """Names of commands and options, and what must be given; the files need not be there."""
    if words[0] in ("bench", "--version"):
        return
    name, arguments = words[0], [w for w in words[1:] if w != "..."]
    command = GROUP.commands[name]
    complete = len(arguments) == len(words[1:])
    try:
        command.make_context(name, list(arguments))
    except Exception as error:  # of the copy of click that typer has
        assert type(error).__name__ == "MissingParameter" and not complete, error


@pytest.mark.parametrize("name", sorted(GROUP.commands.keys() - {"bench"}))
def test_help_is_in_sentences_and_ends_with_examples(name):
    command = GROUP.commands[name]
    told = [text for p in command.params if (text := getattr(p, "help", None)) and not getattr(p, "is_eager", False)]
    assert [text for text in told if not re.fullmatch(r"[A-Z0-9].*[.?]", text, re.DOTALL)] == []
    examples = (command.epilog or "").split("\n\n")
    for line in examples:
        words = shlex.split(line.removeprefix("Example: fastpeft "))
        assert words[0] == name and command.make_context(name, words[1:])
        assert all((ROOT / word).is_file() for word in words if word.startswith("recipes/"))


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"[\w/-]+\.md", str(yaml.load((ROOT / "mkdocs.yml").read_text(), yaml.BaseLoader)["nav"]))
    assert sorted(listed) == sorted(str(p.relative_to(ROOT / "docs")) for p in PAGES if p.name != "README.md")


def test_commands_are_found():
    assert ["doctor"] not in commands(ROOT / "README.md") and any(w[0] == "train" for w in commands(ROOT / "README.md"))
    assert sum(len(commands(p)) for p in PAGES) > 20


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebooks_run(path, tmp_path, monkeypatch):
    """Cell by cell, as Jupyter would; committed without outputs."""
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert cells and not any(cell["outputs"] for cell in cells)
    space = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), space)
