"""Every public name, which `scoresde` looks up here: all that the folders of the theory publish, and a few others."""

from . import codecs, diffusion, guidance, inverse, likelihood, nn, sampling
from .codecs import *  # noqa: F403
from .data import suggest_sigma_max
from .diffusion import *  # noqa: F403
from .guidance import *  # noqa: F403
from .inverse import *  # noqa: F403
from .likelihood import *  # noqa: F403
from .losses import (
    AutoencoderLoss,
    ClassifierLoss,
    ConsistencyLoss,
    Contrastive,
    ContrastiveLoss,
    DenoisingLoss,
    HybridLoss,
    MeanFlowLoss,
    NoisyClassifier,
    SemigroupLoss,
    TrajectoryLoss,
    VariationalAutoencoder,
)
from .noise.rng import Rng
from .ode import SolverError
from .runs.cascade import Cascade
from .runs.entry import load
from .runs.run import Run
from .sampling import *  # noqa: F403

__all__ = [
    "AutoencoderLoss",
    "Cascade",
    "ClassifierLoss",
    "ConsistencyLoss",
    "Contrastive",
    "ContrastiveLoss",
    "DenoisingLoss",
    "HybridLoss",
    "MeanFlowLoss",
    "NoisyClassifier",
    "Rng",
    "Run",
    "SemigroupLoss",
    "SolverError",
    "TrajectoryLoss",
    "VariationalAutoencoder",
    "load",
    "nn",
]
__all__ += ["suggest_sigma_max"]
__all__ += codecs.__all__ + diffusion.__all__ + guidance.__all__ + inverse.__all__ + likelihood.__all__
__all__ += sampling.__all__
