"""Command-line options derived from the fields of option classes (fastpeft.options)."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

from fastpeft.options import FieldOption, fields
from fastpeft.runs.options import RECIPE

# the short names that the command line shows; every other name of an option is taken too (fastpeft.options.Option)
SHORT = {"learning_rate": "lr", "base_learning_rate": "base_lr", "min_learning_rate": "min_lr", "num_workers": "workers"}


def described(name: str) -> str:
    """What the option ``name`` of a run is."""
    return next(f.description for cls in RECIPE for f in fields(cls) if f.name == name)


# options that several commands have
Model = Annotated[str, typer.Option(help=described("model"))]
PlanOption = Annotated[str | None, typer.Option(help=described("plan"))]
Rank = Annotated[int | None, typer.Option(help=described("rank"))]
ImageEncoder = Annotated[str | None, typer.Option(help=described("image_encoder"))]
Quantize = Annotated[str | None, typer.Option(help=described("quantize"))]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress bars.")]
Device = Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda, ... (default: CUDA where there is one).")]
Adapter = Annotated[str, typer.Option(help="Folder of a run, or of its adapter.")]
MovedBase = Annotated[str | None, typer.Option(help="The base, where it is no longer where the adapter says.")]
Seed = Annotated[int, typer.Option(help="Seed of sampling.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


def printable(text: str) -> str:
    """``text`` with control characters written out (``\\x1b``): what a file or a model says does not steer the terminal. Line ends and
    tabs stay, and the joiners that scripts and emoji need."""
    kept = "\n\t\u200c\u200d"
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def example(*commands: str) -> str:
    """The end of a command's help."""
    return "\n\n".join(f"Example: {command}" for command in commands)


def emit(values: dict[str, Any], as_json: bool, lines: list[str]) -> None:
    """Print for people, then, if asked, for programs."""
    for line in lines:
        print(printable(line))
    if as_json:
        print(json.dumps(values))


def flag(field: FieldOption) -> str:
    """How the command line spells an option."""
    name = field.option.off if field.kind is bool and field.default is True else SHORT.get(field.name, field.name)
    return f"--{name.replace('_', '-')}"


def with_options(*classes: type, only: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Decorator of a command: its ``**given`` become the fields of ``classes`` (of these ``only`` some), where they are given."""
    chosen = [f for cls in classes for f in fields(cls) if (not only or f.name in only) and f.name not in without]

    def decorate(command: Callable) -> Callable:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]

        def run(**given):
            said = {f.name: (given.pop(f.name), f) for f in chosen}
            said = {name: not _is_off(f) if f.kind is bool else v for name, (v, f) in said.items() if v is not None and v is not False}
            return command(**given, **said)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        more = [inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=_unset(f), annotation=_annotation(f)) for f in chosen]
        run.__signature__ = inspect.Signature([p.replace(kind=p.KEYWORD_ONLY) for p in own] + more)
        run.__annotations__ = {p.name: p.annotation for p in run.__signature__.parameters.values()}
        return run

    return decorate


def _is_off(field: FieldOption) -> bool:
    return field.kind is bool and field.default is True


def _unset(field: FieldOption) -> bool | None:
    return False if field.kind is bool else None


def _annotation(field: FieldOption):
    text = f"Do not {field.description[0].lower()}{field.description[1:]}" if _is_off(field) else field.help
    option = typer.Option(flag(field), help=text, rich_help_panel=field.option.panel or None, show_default=False)
    kind = list[field.kind] if field.option.repeats else field.kind
    return Annotated[bool if field.kind is bool else kind | None, option]


def other_names(*classes: type) -> dict[str, Any]:
    """Settings of a command under which an option's other names, and underscores for dashes, are taken."""
    other = {}
    for field in (field for cls in classes for field in fields(cls)):
        shown = flag(field)[2:]
        if not _is_off(field):
            other |= {name.replace("_", "-"): shown for name in (field.name, *field.option.names)}
    return {"token_normalize_func": lambda name: other.get(dashed := name.replace("_", "-"), dashed)}
