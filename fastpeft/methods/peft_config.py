"""Fields of PEFT's ``adapter_config.json``: those a method reads, those that change no output, those it refuses.

Each method keeps a table ``peft_fields`` beside it, from every field of PEFT's configuration class (0.18 to 0.21) to READ, NEUTRAL or
:class:`Refused`. A field in no table may mean anything, so it passes only where it is null, false or empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

READ = "read"  # interpreted by the method's ``from_peft``
NEUTRAL = "neutral"  # of training, initialisation or bookkeeping: no output depends on it
UNKNOWN_FIX = "fastpeft does not know this field: load the adapter with PEFT, or remove the field if outputs do not depend on it"


@dataclass(frozen=True)
class Refused:
    """A field that changes outputs in a way the method does not compute.

    fix: what the user can do instead. accepted: values that change nothing; None: null, false and whatever is empty.
    """

    fix: str = "merge it with PEFT first"
    accepted: tuple[Any, ...] | None = None

    def takes(self, value: Any) -> bool:
        if self.accepted is None:
            return is_unset(value)
        return any(type(value) is type(known) and _folded(value) == known for known in self.accepted)


# Fields of PeftConfig. runtime_config is never restored from a file, by PEFT neither.
COMMON = {"peft_type": READ} | dict.fromkeys(
    ("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "runtime_config"), NEUTRAL
)
WITH_PEFT = "load it with PEFT (fastpeft.optimize runs PEFT's models)"
MODULES_TO_SAVE = Refused(f"it replaces whole modules of the base: {WITH_PEFT}")


def is_unset(value: Any) -> bool:
    """Whether a JSON value is null, false or empty. The number 0 is a value: ``layers_to_transform = 0`` names a layer."""
    return value is None or value is False or (isinstance(value, str | list | tuple | set | dict) and not value)


def check_fields(method: str, fields: Mapping[str, str | Refused], config: Mapping[str, Any]) -> None:
    """ValueError that names every field of ``config`` which ``fields`` refuses or does not know, with its value and what to do."""
    wrong = []
    for name, value in config.items():
        rule = fields.get(name, Refused(UNKNOWN_FIX))
        if isinstance(rule, Refused) and not rule.takes(value):
            told = repr(value)
            told = told if len(told) <= 120 else told[:120] + "..."
            wrong.append(f"{name}={told} is not supported; {rule.fix}")
    if wrong:
        raise ValueError(f"{method} adapter: " + "; ".join(wrong))


def _folded(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value
