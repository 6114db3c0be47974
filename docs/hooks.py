"""What mkdocs makes while it builds: the help of every command, and tables of treatments, from the code that runs them."""

import dataclasses
import html
import re
from pathlib import Path

import typer
from typer.cli import get_docs_for_click

from fastpeft.cli import app
from fastpeft.methods import METHODS

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"


def on_page_markdown(markdown: str, page, **_) -> str:
    makers = {"<!-- commands -->": commands, "<!-- treatments -->": treatments, "<!-- measured -->": measured}
    for mark, make in makers.items():
        if mark in markdown:
            markdown = markdown.replace(mark, make())
    return markdown


def commands() -> str:
    group = typer.main.get_command(app)
    text = html.unescape(get_docs_for_click(obj=group, ctx=group.context_class(group, info_name="fastpeft"), name="fastpeft"))
    return re.sub(r"^Example: (.+)$", r"Example:\n\n```console\n$ \1\n```", text, flags=re.MULTILINE)


def treatments() -> str:
    """Every treatment with the options a plan may give it, and their defaults."""
    rows = ["| treatment | options and their defaults |", "|---|---|"]
    for name, method in METHODS.items():
        options = [f"`{f.name}={f.default!r}`" for f in dataclasses.fields(method)]
        rows.append(f"| `{name}` | {', '.join(options)} |")
    return "\n".join(rows)


def measured() -> str:
    """The tables under bench/results/, as they were written."""
    sections = []
    for path in sorted(RESULTS.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        title = re.match(r"# (.+)\n", text)
        name = title.group(1) if title else path.stem.replace("_", " ")
        body = re.sub(r"^#", "##", text[title.end() :] if title else text, flags=re.MULTILINE)
        sections.append(f"## {name} {{#{path.stem}}}\n\n`bench/results/{path.name}`\n\n{body}")
    return "\n\n".join(sections)
