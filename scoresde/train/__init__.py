"""Training: the loop, the average, checkpoints, logs and pictures."""

from .checkpoint import Checkpoint, CheckpointError
from .ema import EMA
from .evaluation import BitsPerDim, OdeLikelihood, Samples, draw, drawing, held_out_loss
from .logger import JsonlLogger, Logger, NullLogger, RunFacts, Tee, WandbLogger
from .shards import Job, ShardError, Shards, ranks
from .state import Training
from .trainer import Trainer, TrainingDiverged

__all__ = [
    "EMA",
    "BitsPerDim",
    "Checkpoint",
    "CheckpointError",
    "Job",
    "JsonlLogger",
    "Logger",
    "NullLogger",
    "OdeLikelihood",
    "RunFacts",
    "Samples",
    "ShardError",
    "Shards",
    "Tee",
    "Trainer",
    "Training",
    "TrainingDiverged",
    "WandbLogger",
    "draw",
    "drawing",
    "held_out_loss",
    "ranks",
]
