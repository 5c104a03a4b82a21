"""Sampling: a `Step` is one reverse move, a `Sampler` runs it over a grid."""

from .adaptive import AdaptiveODE
from .adaptive_sde import AdaptiveSDE
from .churn import Churn
from .default import default_sampler
from .edit import attribute, interpolate, sdedit
from .fit import fit_grid
from .fit_sampler import fit_sampler
from .fitted import FittedSampler
from .flow_map import FlowMap
from .multistep import DEIS, IPNDM, Adams, DPMSolverPP, Multistep, SASolver, UniPC
from .pilot import pilot, sample
from .restart import Restart
from .runge_kutta import RK4, DPMSolver, Midpoint
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
from .torch_sde import TorchSDE

__all__ = [
    "DDIM",
    "DEIS",
    "IPNDM",
    "RK4",
    "Adams",
    "AdaptiveODE",
    "AdaptiveSDE",
    "Ancestral",
    "AnnealedLangevin",
    "Churn",
    "DPMSolver",
    "DPMSolverPP",
    "EulerMaruyama",
    "FittedSampler",
    "FlowMap",
    "Heun",
    "Langevin",
    "Midpoint",
    "Multistep",
    "PredictorCorrector",
    "Restart",
    "ReverseDiffusion",
    "SASolver",
    "Sampler",
    "Step",
    "TorchSDE",
    "Trace",
    "UniPC",
    "attribute",
    "default_sampler",
    "fit_grid",
    "fit_sampler",
    "interpolate",
    "pilot",
    "sample",
    "sdedit",
]
