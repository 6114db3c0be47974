"""Training: configuration, loop, measurement, checkpoints, report."""

import importlib

_LATER = {"Callback": "callbacks", "TrainConfig": "config", "Trainer": "trainer"}  # options are read without torch


def __getattr__(name: str):
    if name in _LATER:
        return getattr(importlib.import_module(f"fastpeft.train.{_LATER[name]}"), name)
    raise AttributeError(f"module 'fastpeft.train' has no attribute {name!r}")


__all__ = ["Callback", "TrainConfig", "Trainer"]
