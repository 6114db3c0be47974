"""Command that runs a study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastpeft.cli_options import Json, emit, printable, say


def study(
    file: Annotated[str, typer.Argument(help="YAML file of the study, such as recipes/studies/mile_1.yaml.")],
    out: Annotated[str, typer.Option(help="Folder for its runs, table and figures; the same folder goes on.")],
    data: Annotated[list[str] | None, typer.Option(help="NAME=DIR of a data set in the file, or DIR where it has one; repeatable.")] = None,
    scale: Annotated[str, typer.Option(help="Scale: full, or tiny, the file's tiny block, in minutes on a CPU.")] = "full",
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of every stage, not the file's: 2 show that all rows run.")] = None,
    side_by_side: Annotated[int, typer.Option(min=1, help="Rows that run at once, those of one base over one base in memory.")] = 1,
    device: Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda, ... (default: CUDA where there is one).")] = None,
    as_json: Json = False,
) -> None:
    """Run a study: all its rows, their table as Markdown, CSV and HTML, their figures. Killed, the same command goes on."""
    from fastpeft.study.file import data_folders
    from fastpeft.study.runner import run_study

    try:
        how = {"scale": scale, "steps": steps, "side_by_side": side_by_side, "device": device, "say": _tell}
        results = run_study(file, out, data=data_folders(file, data or []), **how)
    except KeyboardInterrupt as error:
        say(str(error) or "interrupted")
        raise typer.Exit(getattr(error, "exit_status", 130)) from None
    tables = [name for name in results["files"] if name.endswith(".md")]
    lines = [Path(name).read_text(encoding="utf-8") for name in tables]
    emit(results, as_json, [*lines, f"everything is in {out} (study.html to look at)"])
    if results["failed"]:
        raise typer.Exit(1)


def _tell(line: str) -> None:
    print(printable(line), flush=True)
