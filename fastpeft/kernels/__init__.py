"""Triton kernels. In a checkout they live in the top-level ``kernels/`` folder; an installed package ships them here.

The top-level folder has no ``__init__.py`` on purpose: transformers imports a Hugging Face package called ``kernels``,
and a checkout must never shadow it.
"""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[2] / "kernels"
if (_checkout.parent / "pyproject.toml").is_file() and _checkout.is_dir():
    __path__.append(str(_checkout))
