"""Every public name, which `scoresde` looks up here: all that the folders of the theory publish, and a few others."""

from . import diffusion, guidance, inverse, likelihood, nn, sampling
from .data import suggest_sigma_max
from .diffusion import *  # noqa: F403
from .guidance import *  # noqa: F403
from .inverse import *  # noqa: F403
from .likelihood import *  # noqa: F403
from .losses import ClassifierLoss, DenoisingLoss, NoisyClassifier
from .noise.rng import Rng
from .ode import SolverError
from .sampling import *  # noqa: F403

__all__ = ["ClassifierLoss", "DenoisingLoss", "NoisyClassifier", "Rng", "SolverError", "nn", "suggest_sigma_max"]
__all__ += diffusion.__all__ + guidance.__all__ + inverse.__all__ + likelihood.__all__ + sampling.__all__
