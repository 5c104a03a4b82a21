"""Training: the loop, its state, the averages of the weights, and the processes that train together."""

from .ema import EMA, PowerEMA
from .trainer import Trainer

__all__ = ["EMA", "PowerEMA", "Trainer"]
