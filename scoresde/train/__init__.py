"""Training: the loop, the average, checkpoints, logs and pictures."""

from .checkpoint import Checkpoint, CheckpointError
from .ema import EMA
from .evaluation import BitsPerDim, OdeLikelihood, Samples, draw, held_out_loss
from .logger import JsonlLogger, Logger, NullLogger, RunFacts, Tee, WandbLogger
from .state import Training
from .trainer import Trainer, TrainingDiverged

__all__ = [
    "EMA",
    "BitsPerDim",
    "Checkpoint",
    "CheckpointError",
    "JsonlLogger",
    "Logger",
    "NullLogger",
    "OdeLikelihood", "RunFacts",
    "Samples",
    "Tee",
    "Trainer",
    "Training",
    "TrainingDiverged",
    "WandbLogger",
    "draw",
    "held_out_loss",
]  # fmt: skip
