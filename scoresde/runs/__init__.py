"""A run on disk: its folder, checkpoints, lock and logs. Nothing here trains, and importing it does not import torch."""

from .logger import NullLogger
from .wandb_logger import WandbLogger

__all__ = ["NullLogger", "WandbLogger"]
