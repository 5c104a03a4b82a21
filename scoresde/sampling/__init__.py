"""Sampling: a `Step` is one reverse move, a `Sampler` runs it over a grid."""

from .adaptive import AdaptiveODE
from .sampler import Sampler, Step, Trace
from .steps import (
    DDIM,
    Ancestral,
    AnnealedLangevin,
    EulerMaruyama,
    Heun,
    Langevin,
    PredictorCorrector,
    ReverseDiffusion,
)

__all__ = [
    "DDIM",
    "AdaptiveODE",
    "Ancestral",
    "AnnealedLangevin",
    "EulerMaruyama",
    "Heun",
    "Langevin",
    "PredictorCorrector",
    "ReverseDiffusion",
    "Sampler",
    "Step",
    "Trace",
]
