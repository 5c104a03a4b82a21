"""The theory: a forward SDE, what a network's output means, and the estimate (x̂_0, ε̂) of where a path began."""

from .corrected import Corrected
from .denoiser import Cond, Denoiser, DenoiserFunction, Preconditioned, ScoreFunction
from .grids import (
    CosineGrid,
    FittedGrid,
    Grid,
    KarrasGrid,
    LogisticGrid,
    LogSNRGrid,
    QuadraticGrid,
    SavedGrid,
    SoftplusGrid,
    UniformGrid,
)
from .mixture import GaussianMixtureDenoiser
from .noise_input import LogNoiseInput, NearestStepInput, TimeInput
from .parameterization import EDM, X0, Eps, Parameterization, Score, V, Velocity
from .prediction import Prediction
from .sde import EDMSDE, SDE, VESDE, VPSDE, CosineSDE, RectifiedFlow, Scales, SubVPSDE
from .split import Split
from .table import DDPM, TableSDE

__all__ = [
    "DDPM",
    "EDM",
    "EDMSDE",
    "SDE",
    "VESDE",
    "VPSDE",
    "X0",
    "Cond",
    "Corrected",
    "CosineGrid",
    "CosineSDE",
    "Denoiser",
    "DenoiserFunction",
    "Eps",
    "FittedGrid",
    "GaussianMixtureDenoiser",
    "Grid",
    "KarrasGrid",
    "LogNoiseInput",
    "LogSNRGrid",
    "LogisticGrid",
    "NearestStepInput",
    "Parameterization",
    "Preconditioned",
    "Prediction",
    "QuadraticGrid",
    "RectifiedFlow",
    "SavedGrid",
    "Scales",
    "Score",
    "ScoreFunction",
    "SoftplusGrid",
    "Split",
    "SubVPSDE",
    "TableSDE",
    "TimeInput",
    "UniformGrid",
    "V",
    "Velocity",
]
