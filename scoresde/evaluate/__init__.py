"""A trained model measured and drawn: samples, bits/dim, held-out losses, figures and the report."""

from .evaluation import OdeLikelihood

__all__ = ["OdeLikelihood"]
