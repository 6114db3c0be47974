"""What ``fastpeft.json`` of an adapter folder may hold: checked where it is read, so that what follows meets no value of another kind."""

from __future__ import annotations

from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class Base(_Checked):
    """The base an adapter was trained on, as :func:`fastpeft.build` takes it."""

    model_config = ConfigDict(strict=True, extra="forbid")
    model: str | None = None
    dtype: Literal["float64", "float32", "bfloat16", "float16"] = "float32"
    pretrained: bool = True
    seed: int = Field(default=0, ge=0, lt=2**63)
    overrides: dict[str, Any] = {}
    quantize: str | None = None

    @field_validator("overrides")
    @classmethod
    def _of_the_shape(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(value.keys() & {"model", "device", "dtype", "seed", "pretrained", "quantize"}):
            raise ValueError(f"{', '.join(taken)} is no field of a model's configuration")
        return value


class Description(_Checked):
    """``fastpeft.json``. Fields that are not named here are kept as they are."""

    format: int
    plan: str = ""
    treatments: dict[str, Any]
    base: Base = Base()
    base_fingerprint: str | None = None
    preprocess: dict[str, Any] | None = None
    tokenizer: str | None = None
    prompt: dict[str, Any] = {}
    max_question: int | None = None

    @field_validator("tokenizer")
    @classmethod
    def _inside(cls, value: str | None) -> str | None:
        """A folder of the adapter's own."""
        if value and (".." in PurePosixPath(value.replace("\\", "/")).parts or value.startswith("/") or PureWindowsPath(value).drive):
            raise ValueError(f"{value!r} lies outside the adapter's folder")
        return value


def checked(about: Any) -> dict[str, Any]:
    """``about`` itself. ValueError names the first field of another kind."""
    try:
        Description.model_validate(about)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg'].removeprefix('Value error, ')}" if where else "it is no mapping of fields") from None
    return about
