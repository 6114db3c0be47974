"""Option dataclasses, declared once: checks, other names, YAML and the command line derive from them.

    @options
    class TrainConfig:
        batch_size: Annotated[int, Field(ge=1), Option(names=("per_device_train_batch_size",))] = 20
        "Samples per forward."

pydantic checks the values and converts none (``"20"`` is no number). A wrong one is one line: ``batch_size must be a whole number of 1 or
more, not 0``. Nothing here imports torch, so that the command line's help and usage errors come at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
import shlex
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from fastpeft.documents import parse_yaml


@dataclass(frozen=True)
class Option:
    """What a field's type does not say. names: other names it is accepted under (Hugging Face's, PEFT's, the command line's short ones).
    off: the name of a switch that sets it to false. must: what it must be, in words. says: the whole message about a wrong value.
    panel: its heading in the command line's help. repeats: given several times, the command line makes a list of it."""

    names: tuple[str, ...] = ()
    off: str = ""
    must: str = ""
    says: str = ""
    panel: str = ""
    repeats: bool = False


class OptionError(ValueError):
    """A wrong value; ``option`` is the field's name."""

    def __init__(self, message: str, option: str):
        super().__init__(message)
        self.option = option


def _text(value: Any) -> Any:
    """Paths and devices as text."""
    return str(value) if isinstance(value, os.PathLike) or type(value).__module__ == "torch" else value


UNITS = {"": 1, "b": 1} | {f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)} | {f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)}


def bytes_of(size: str) -> int:
    """Bytes of "6GB", "800 MB", "5.5GiB". ValueError for what is no size."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", size.strip().lower())
    if found is None or found[2] not in UNITS or not float(found[1]) > 0:
        raise ValueError(f"{size!r} is no size in bytes; write it as 6GB, 800MB or 5.5GiB")
    if found[2] == "" and float(found[1]) < 1000:  # "24" is meant as 24 GB
        raise ValueError(f"{size!r} has no unit; write it as {found[1]}GB or {found[1]}MB")
    return int(float(found[1]) * UNITS[found[2]])


def _size(value: str) -> str:
    bytes_of(value)
    return value


Text = Annotated[str, BeforeValidator(_text)]
FilePath = Annotated[str, BeforeValidator(_text), Option(must="a path")]
Size = Annotated[str, BeforeValidator(_text), AfterValidator(_size)]
Count = Annotated[int, Field(ge=1, lt=2**63)]
CountOrZero = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


def options(cls: type) -> type:
    """Class decorator: a frozen dataclass whose values are checked, whose fields have docstrings, and which takes their other names too.

    ValueError names a wrong value, TypeError an unknown option."""
    config = ConfigDict(strict=True, use_attribute_docstrings=True, extra="forbid")
    made = checked_dataclass(cls, frozen=True, config=config)
    checked = made.__init__

    @functools.wraps(checked)
    def __init__(self, *args, **given):
        given = canonical(given, made)
        if unknown := sorted(given.keys() - made.__pydantic_fields__.keys()):
            raise TypeError(f"{cls.__name__}: {_unknown(unknown, made)}")
        try:
            checked(self, *args, **given)
        except ValidationError as error:
            raise _sentence(made, error.errors(include_url=False)[0]) from None

    made.__init__ = __init__
    about = "\n".join(f"    {field.name}: {field.help}" for field in fields(made))
    made.__doc__ = f"{cls.__doc__ or cls.__name__}\n\nFields:\n{about}\n"
    return made


def _sentence(made: type, error: Mapping[str, Any], written: str = "") -> ValueError:
    """One line about the first thing that pydantic found wrong; ``written``: the option's name as its author spelt it."""
    cause = error.get("ctx", {}).get("error")
    if not error["loc"]:  # of __post_init__, about several fields
        return cause if isinstance(cause, ValueError) else ValueError(error["msg"])
    place = error["loc"][0]
    field = list(fields(made))[place] if isinstance(place, int) else next(f for f in fields(made) if f.name == place)
    if error["type"] == "missing":
        return OptionError(f"{field.name} is missing", field.name)
    if error["type"] == "value_error":
        return OptionError(str(cause), field.name)
    value = error["input"] if len(error["loc"]) == 1 else "that"
    says = field.option.says or "{name} must be {must}, not {value!r}"
    return OptionError(says.format(name=written or field.name, must=field.must, value=value), field.name)


@dataclass(frozen=True)
class FieldOption:
    """A field of an option class, as the command line, YAML and documentation read it."""

    name: str
    kind: type
    many: bool
    choices: tuple[str, ...]
    optional: bool
    default: Any
    description: str
    option: Option
    bounds: Mapping[str, float]

    @property
    def must(self) -> str:
        """What a value must be, in words."""
        if self.option.must:
            return self.option.must
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.kind is int:
            return f"a whole number of {self.bounds['ge']:g} or more" if "ge" in self.bounds else "a whole number"
        if self.kind is float and "gt" in self.bounds:
            return f"a number above {self.bounds['gt']:g}"
        if self.kind is float:
            below = next((f"from {self.bounds['ge']:g} {word} {self.bounds[k]:g}" for k, word in ENDS if k in self.bounds), None)
            return f"a number {below or 'of {:g} or more'.format(self.bounds.get('ge', 0))}"
        return {bool: "true or false", str: "text"}[self.kind]

    @property
    def help(self) -> str:
        """The field's docstring, with its default."""
        shown = self.default
        if shown is None or shown is dataclasses.MISSING or isinstance(shown, bool) or "default" in self.description:
            return self.description
        return f"{self.description.removesuffix('.')} (default {','.join(shown) if isinstance(shown, tuple) else shown})."


ENDS = (("lt", "to below"), ("le", "to"))


@functools.cache
def fields(made: type) -> tuple[FieldOption, ...]:
    """The fields of a class made by :func:`options`."""
    defaults = {f.name: f.default for f in dataclasses.fields(made)}
    return tuple(_read(name, info, defaults[name]) for name, info in made.__pydantic_fields__.items())


def _read(name: str, info, default) -> FieldOption:
    kinds, metadata = _unpacked(info.annotation, [*info.metadata])
    plain = [kind for kind in kinds if kind is not type(None)]
    choices = tuple(map(str, get_args(plain[0]))) if get_origin(plain[0]) is Literal else ()
    many = get_origin(plain[0]) is tuple
    kind = str if choices or many else plain[0]
    given = [m for m in metadata if isinstance(m, Option)]
    merged = Option(**{f.name: next((v for m in given if (v := getattr(m, f.name))), f.default) for f in dataclasses.fields(Option)})
    flat = [inner for m in metadata for inner in getattr(m, "metadata", [m])]
    bounds = {k: getattr(m, k) for k in ("ge", "gt", "le", "lt") for m in flat if getattr(m, k, None) is not None}
    return FieldOption(name, kind, many, choices, len(plain) < len(kinds), default, info.description or "", merged, bounds)


def _unpacked(annotation, metadata: list) -> tuple[list, list]:
    """The members of a union of annotated types, and all their metadata."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return _unpacked(inner, [*metadata, *more])
    if get_origin(annotation) in (Union, types.UnionType):
        found = [_unpacked(part, []) for part in get_args(annotation)]
        return [kind for kinds, _ in found for kind in kinds], [*metadata, *(m for _, more in found for m in more)]
    return [annotation], metadata


def _named(*classes: type) -> Iterator[tuple[str, FieldOption, bool]]:
    """(other name, field, whether it sets the field to its opposite)."""
    for field in (field for made in classes for field in fields(made)):
        yield from ((name, field, False) for name in field.option.names)
        if field.option.off:
            yield field.option.off, field, True


def canonical(given: Mapping[str, Any], *classes: type) -> dict[str, Any]:
    """``given`` under the fields' own names; several values as a tuple, "a,b" split. ValueError where two names say the same thing, or a
    switch is no switch."""
    other, found = {name: (field.name, off) for name, field, off in _named(*classes)}, {}
    many = {field.name for cls in classes for field in fields(cls) if field.many}
    for said, value in given.items():
        name, off = other.get(key := str(said).replace("-", "_"), (key, False))
        if off:
            if not isinstance(value, bool):
                raise OptionError(f"{said} must be true or false, not {value!r}", name)
            value = not value
        if name in many and isinstance(value, str):
            value = tuple(part.strip() for part in value.split(","))
        elif name in many and isinstance(value, list):  # as YAML and typer have several values
            value = tuple(value)
        if name in found and found[name] != value:
            raise OptionError(f"{said} and {name} are the same option: give one of them", name)
        found[name] = value
    return found


def split(given: Mapping[str, Any], *classes: type) -> list[Any]:
    """One of each class, made of the options it declares. ValueError names what none of them knows."""
    given, made = canonical(given, *classes), []
    known = {field.name for cls in classes for field in fields(cls)}
    if unknown := sorted(given.keys() - known):
        raise ValueError(_unknown(unknown, *classes))
    for cls in classes:
        own = {field.name for field in fields(cls)}
        made.append(cls(**{name: value for name, value in given.items() if name in own}))
    return made


def _unknown(unknown: list[str], *classes: type) -> str:
    known = sorted({field.name for cls in classes for field in fields(cls)})
    near = difflib.get_close_matches(unknown[0], [*known, *(name for name, *_ in _named(*classes))], 1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"unknown option {', '.join(unknown)}; {hint}known: {', '.join(known)}"


def read_yaml(path: str | Path, *classes: type) -> dict[str, Any]:
    """A recipe: a YAML mapping of the options of ``classes``, under their own names. ValueError names the file and what is wrong."""
    try:
        content = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping of options, such as 'learning_rate: 2.0e-5'")
    return checked(content, path, *classes)


def checked(content: Mapping[str, Any], where: str | Path, *classes: type) -> dict[str, Any]:
    """Options as YAML reads them, under their own names; options that none of ``classes`` declares are kept. ValueError names ``where``
    they stand and what is wrong."""
    try:
        written = {next(iter(canonical({said: True}, *classes))): str(said) for said in content}
        content = canonical(content, *classes)
        for cls in classes:
            for field in fields(cls):
                if field.name in content:
                    content[field.name] = _from_yaml(cls, field, content[field.name], written[field.name])
    except OptionError as error:
        raise OptionError(f"{where}: {error}", error.option) from None
    return content


def _from_yaml(cls: type, field: FieldOption, value: Any, written: str) -> Any:
    """``value``, checked; YAML reads 2e-5 as text (it wants 2.0e-5)."""
    if field.kind is float and isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise OptionError(f"{written} must be a number, not {value!r}", field.name) from None
    info = cls.__pydantic_fields__[field.name]
    try:
        TypeAdapter(Annotated[(info.annotation, *info.metadata)], config=ConfigDict(strict=True)).validate_python(value)
    except ValidationError as error:
        raise _sentence(cls, error.errors(include_url=False)[0] | {"loc": (field.name,), "input": value}, written) from None
    return value


def as_command(name: str, given: Mapping[str, Any], *classes: type) -> str:
    """The command line ``fastpeft NAME`` with these options of ``classes``; what only YAML can say is left out, as are ``out`` and
    ``resume``, which do not bear on the result."""
    words = ["fastpeft", name]
    for field in (field for cls in classes for field in fields(cls)):
        value = given.get(field.name)
        if value is None or field.name in ("out", "resume") or value == field.default:
            continue
        if field.kind is bool:
            words.append(f"--{(field.option.off if field.default is True else field.name).replace('_', '-')}")
            continue
        values = value if field.option.repeats and isinstance(value, list | tuple) else [value]
        for one in values:
            if isinstance(one, dict):
                break
            text = ",".join(map(str, one)) if isinstance(one, list | tuple) else str(one)
            words += [f"--{field.name.replace('_', '-')}", text]
    return shlex.join(words)
