"""Training: the loop, the average, checkpoints, logs and pictures."""

from .checkpoint import Checkpoint, CheckpointError
from .ema import EMA, Average, PowerEMA
from .evaluation import BitsPerDim, OdeLikelihood, Samples, draw, drawing, held_out, held_out_loss
from .lock import Locked
from .logger import JsonlLogger, Logger, NullLogger, RunFacts, Tee
from .posthoc import reconstruct, write_snapshot
from .shards import Job, ShardError, Shards, ranks
from .signals import Signals, Stopped
from .state import Training
from .trainer import Trainer, TrainingDiverged
from .wandb_logger import WandbLogger
from .world import Alone, Processes, ProcessLost, World, join

__all__ = [
    "EMA",
    "Alone",
    "Average",
    "BitsPerDim",
    "Checkpoint",
    "CheckpointError",
    "Job",
    "JsonlLogger",
    "Locked",
    "Logger",
    "NullLogger",
    "OdeLikelihood",
    "PowerEMA",
    "ProcessLost",
    "Processes",
    "RunFacts",
    "Samples",
    "ShardError",
    "Shards",
    "Signals",
    "Stopped",
    "Tee",
    "Trainer",
    "Training",
    "TrainingDiverged",
    "WandbLogger",
    "World",
    "draw",
    "drawing",
    "held_out",
    "held_out_loss",
    "join",
    "ranks",
    "reconstruct",
    "write_snapshot",
]
