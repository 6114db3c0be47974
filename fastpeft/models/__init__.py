"""Backbones: what :func:`fastpeft.build` can make, and where methods attach in it. Architectures and weights come from transformers."""

from fastpeft.models.family import NAMES, Family, ModelSource, family_of, load_model, new_model, parts_of, resolve

__all__ = ["NAMES", "Family", "ModelSource", "family_of", "load_model", "new_model", "parts_of", "resolve"]
