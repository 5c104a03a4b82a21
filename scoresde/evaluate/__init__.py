"""A trained model measured and drawn: samples, bits/dim, held-out losses, figures and the report."""

from .features import Features
from .likelihood import Elbo, OdeLikelihood

__all__ = ["Elbo", "Features", "OdeLikelihood"]
