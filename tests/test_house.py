"""The house's limits: files and functions that a reader can hold in mind, and every module's first line."""

import ast
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(p for room in ("fastpeft", "kernels", "bench") for p in (ROOT / room).rglob("*.py"))
MOST_LINES, MOST_BRANCHES = 400, 20  # more, with a reason beside it: "# long: ..." in the file, "# branches: ..." at the function


def branches(function: ast.AST) -> int:
    """Places in ``function`` where it goes one way or another."""
    total = 0
    for node in ast.walk(function):
        if isinstance(node, ast.If | ast.IfExp | ast.For | ast.While | ast.ExceptHandler | ast.match_case | ast.Assert):
            total += 1
        elif isinstance(node, ast.BoolOp):
            total += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            total += 1 + len(node.ifs)
    return total


def too_branched(text: str) -> list[str]:
    """Functions of a file with more branches than MOST_BRANCHES and no reason beside their first line."""
    lines, found = text.splitlines(), []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (count := branches(node)) > MOST_BRANCHES:
            beside = "\n".join(lines[max(0, node.lineno - 2) : node.body[0].lineno])
            if "# branches: " not in beside:
                found.append(f"{node.name} (line {node.lineno}): {count}")
    return found


def test_branches_are_counted():
    code = "def f(x):\n    if x and x > 1 or x < 0:\n        return [y if y else 0 for y in x if y]\n    for _ in x:\n        pass\n"
    assert branches(ast.parse(code).body[0]) == 7
    code = "def f(x):\n" + "    if x:\n        pass\n" * 21
    assert too_branched(code) == ["f (line 1): 21"]
    assert too_branched("# branches: a table of cases\n" + code) == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_reader_can_hold_it_in_mind(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MOST_LINES or "# long: " in text
    assert too_branched(text) == []


@pytest.mark.parametrize("path", [p for p in FILES if p.name != "__init__.py"], ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_says_what_it_is(path):
    assert (ast.get_docstring(ast.parse(path.read_text())) or "").strip()


def test_the_map_names_every_module():
    """CONTRIBUTING's table of rooms: each file by its name, in the row of its room."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = text[text.index("### What each file is") : text.index("### Words")]
    ops = {p.stem for p in (ROOT / "fastpeft" / "ops").glob("[a-z]*.py")}  # one file per operator
    missing = [p for p in FILES if p.is_relative_to(ROOT / "fastpeft") and p.name != "__init__.py" and f"`{p.name}`" not in rows]
    assert [str(p.relative_to(ROOT)) for p in missing if p.stem not in ops] == []


def test_every_test_is_run(pytestconfig):
    """No folder of tests is passed over by name: pytest matches ``norecursedirs`` at any depth."""
    patterns = pytestconfig.getini("norecursedirs")
    folders = {p.parent for p in (ROOT / "tests").rglob("test_*.py")}
    names = {name for folder in folders for name in folder.relative_to(ROOT).parts}
    assert [name for name in sorted(names) if any(fnmatch(name, pattern) for pattern in patterns)] == []
