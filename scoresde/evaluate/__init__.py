"""A trained model measured and drawn: samples, bits/dim, held-out losses, figures and the report."""

from .edits import Attribute, EmbeddingInterpolation, Interpolation, Retold, SDEdit, Variations
from .features import Features
from .likelihood import Elbo, OdeLikelihood
from .vlb import Vlb

__all__ = [
    "Attribute",
    "Elbo",
    "EmbeddingInterpolation",
    "Features",
    "Interpolation",
    "OdeLikelihood",
    "Retold",
    "SDEdit",
    "Variations",
    "Vlb",
]
