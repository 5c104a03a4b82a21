"""scoresde: continuous-time score-based SDEs for PyTorch.

A diffusion model is a forward SDE (`sde`), an estimate of where its paths began (`denoiser`), and a way back
(`sampling`); `likelihood` measures it, `loss` trains it.
"""

from . import nn
from .bounds import Bound, ImportanceBound, elbo, importance_weighted, vlb
from .budget import LikelihoodGrid
from .data import suggest_sigma_max
from .denoiser import Cond, Denoiser, DenoiserFunction, Preconditioned, ScoreFunction
from .divergence import Exact, Hutchinson, HutchPlusPlus
from .grids import (
    CosineGrid,
    FittedGrid,
    Grid,
    KarrasGrid,
    LogisticGrid,
    LogSNRGrid,
    QuadraticGrid,
    SavedGrid,
    UniformGrid,
)
from .likelihood import LogLikelihood, bits_per_dim, log_likelihood, sample_with_log_prob
from .loss import DenoisingLoss
from .mixture import GaussianMixtureDenoiser
from .ode import SolverError
from .parameterization import EDM, X0, Eps, Parameterization, Score, V, Velocity
from .prediction import Prediction
from .rng import Rng
from .sampling import (
    DDIM,
    DEIS,
    IPNDM,
    RK4,
    Adams,
    AdaptiveODE,
    AdaptiveSDE,
    Ancestral,
    AnnealedLangevin,
    Churn,
    DPMSolver,
    DPMSolverPP,
    EulerMaruyama,
    Heun,
    Langevin,
    Midpoint,
    Multistep,
    PredictorCorrector,
    Restart,
    ReverseDiffusion,
    Sampler,
    SASolver,
    Step,
    TorchSDE,
    Trace,
    UniPC,
    default_sampler,
    fit_grid,
    sample,
)
from .sde import EDMSDE, SDE, VESDE, VPSDE, CosineSDE, RectifiedFlow, Scales, SubVPSDE
from .table import TableSDE

__version__ = "0.1.0"

__all__ = [
    "DDIM",
    "DEIS",
    "EDM",
    "EDMSDE",
    "IPNDM",
    "RK4",
    "SDE",
    "VESDE",
    "VPSDE",
    "X0",
    "Adams",
    "AdaptiveODE",
    "AdaptiveSDE",
    "Ancestral",
    "AnnealedLangevin",
    "Bound",
    "Churn",
    "Cond",
    "CosineGrid",
    "CosineSDE",
    "DPMSolver",
    "DPMSolverPP",
    "Denoiser",
    "DenoiserFunction",
    "DenoisingLoss",
    "Eps",
    "EulerMaruyama",
    "Exact",
    "FittedGrid",
    "GaussianMixtureDenoiser",
    "Grid",
    "Heun",
    "HutchPlusPlus",
    "Hutchinson",
    "ImportanceBound",
    "KarrasGrid",
    "Langevin",
    "LikelihoodGrid",
    "LogLikelihood",
    "LogSNRGrid",
    "LogisticGrid",
    "Midpoint",
    "Multistep",
    "Parameterization",
    "Preconditioned",
    "Prediction",
    "PredictorCorrector",
    "QuadraticGrid",
    "RectifiedFlow",
    "Restart",
    "ReverseDiffusion",
    "Rng",
    "SASolver",
    "Sampler",
    "SavedGrid",
    "Scales",
    "Score",
    "ScoreFunction",
    "SolverError",
    "Step",
    "SubVPSDE",
    "TableSDE",
    "TorchSDE",
    "Trace",
    "UniPC",
    "UniformGrid",
    "V",
    "Velocity",
    "bits_per_dim",
    "default_sampler",
    "elbo",
    "fit_grid",
    "importance_weighted",
    "log_likelihood",
    "nn",
    "sample",
    "sample_with_log_prob",
    "suggest_sigma_max",
    "vlb",
]
