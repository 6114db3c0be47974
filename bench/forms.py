"""Digests of classes, as ``@fuses(..., code=...)`` records them: ``python -m bench.forms PATH ...``.

Without a path: every recorded example of the installed packages, with what its code is now and whether that is recorded. Exit 1 where one
is not.
"""

from __future__ import annotations

import importlib
import sys

import fastpeft.fused  # noqa: F401  registers the forms
from fastpeft.forms import digest
from fastpeft.registry import recorded


def class_at(path: str) -> type | None:
    """The class that a dotted path leads to; None where the installed packages have none."""
    home, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(home), name, None)
    except ImportError:
        return None


def main(paths: list[str]) -> int:
    known = recorded()
    changed = 0
    for path in paths or known:
        cls = class_at(path)
        found = None if cls is None else digest(cls)
        states = {True: "recorded", False: "not recorded" if path in known else ""}
        print(found or "-" * 12, path, "absent" if cls is None else states[found in known.get(path, ())])
        changed += path in known and cls is not None and found not in known[path]
    return int(changed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
