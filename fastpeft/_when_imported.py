"""Optional packages: whether one is imported, and a post-import hook (PEFT learns of Excitor, and is not loaded for it)."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType


def loaded(name: str) -> ModuleType | None:
    """The module of this name where it is imported already. What is not imported has no object in use."""
    return sys.modules.get(name)


def when_imported(name: str, call: Callable[[], None]) -> None:
    """``call()`` now where the package is loaded, else right after its own code has run. It may not be there at all."""
    if sys.modules.get(name) is not None:
        call()
    elif name not in sys.modules:  # None there forbids the import
        sys.meta_path.insert(0, _Finder(name, call))


class _Finder:
    """Finds one package, once, as the others would, and has ``call`` follow its loading."""

    def __init__(self, name: str, call: Callable[[], None]):
        self.name, self.call = name, call

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            sys.meta_path.insert(0, self)
            return None
        load = spec.loader.exec_module

        def load_and_call(module):
            load(module)
            self.call()

        spec.loader.exec_module = load_and_call
        return spec
