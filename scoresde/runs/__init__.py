"""A run on disk: its folder, checkpoints, lock and logs. Nothing here trains, and importing it imports no torch."""

from .logger import NullLogger
from .wandb_logger import WandbLogger

__all__ = ["NullLogger", "WandbLogger"]
