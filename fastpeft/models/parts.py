"""What the models of several parts have in common."""

from __future__ import annotations

from typing import Any

from fastpeft.registry import fuse, fused_inside


class FrozenEvaluates:
    """A model whose parts marked F (``evaluation_only``, their paths) stay as in evaluation: what they compute are constants."""

    def train(self, mode: bool = True):
        super().train(mode)
        for path in getattr(self, "evaluation_only", None) or ():
            self.get_submodule(path).eval()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """A pickle says which modules are fused: by themselves they name the class they replace."""
        return super().__getstate__() | {"fused_inside": fused_inside(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        fused = state.pop("fused_inside", {})
        super().__setstate__(state)
        fuse(self, fused)

