"""A trained model measured and drawn: samples, bits/dim, held-out losses, figures and the report."""

from .edits import Attribute, Interpolation, Retold, SDEdit
from .features import Features
from .likelihood import Elbo, OdeLikelihood
from .vlb import Vlb

__all__ = ["Attribute", "Elbo", "Features", "Interpolation", "OdeLikelihood", "Retold", "SDEdit", "Vlb"]
