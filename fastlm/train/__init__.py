"""The trainer: it knows a model only as something that maps tokens and targets to a summed loss (see `trainer.py`)."""

from fastlm.train.config import TrainConfig
from fastlm.train.progress import Sample
from fastlm.train.trainer import Trainer, TrainResult

__all__ = ["Sample", "TrainConfig", "TrainResult", "Trainer"]
