"""A trained model measured and drawn: samples, bits/dim, held-out losses, figures and the report."""

from .edits import Attribute, Interpolation, SDEdit
from .features import Features
from .likelihood import Elbo, OdeLikelihood

__all__ = ["Attribute", "Elbo", "Features", "Interpolation", "OdeLikelihood", "SDEdit"]
