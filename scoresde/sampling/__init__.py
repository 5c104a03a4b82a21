"""Sampling: a `Step` is one reverse move, a `Sampler` runs it over a grid."""

from .adaptive import AdaptiveODE
from .default import default_sampler, sample
from .fit import fit_grid
from .multistep import DEIS, IPNDM, Adams, DPMSolverPP, Multistep, SASolver, UniPC
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
    "DEIS",
    "IPNDM",
    "Adams",
    "AdaptiveODE",
    "Ancestral",
    "AnnealedLangevin",
    "DPMSolverPP",
    "EulerMaruyama",
    "Heun",
    "Langevin",
    "Multistep",
    "PredictorCorrector",
    "ReverseDiffusion",
    "SASolver",
    "Sampler",
    "Step",
    "Trace",
    "UniPC",
    "default_sampler",
    "fit_grid",
    "sample",
]
