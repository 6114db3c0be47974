"""Comparison with the same model without fastpeft: losses and every gradient."""

from fastpeft.verify.compare import DTYPES, verify

__all__ = ["DTYPES", "verify"]
