"""Training: configuration, loop, measurement, checkpoints, report."""

from fastpeft.train.config import TrainConfig, read_yaml
from fastpeft.train.trainer import Trainer

__all__ = ["TrainConfig", "Trainer", "read_yaml"]
