r"""Guidance: denoisers around denoisers.

Every method here is one of two: an affine mixture of predictions, Σ w_i P_i with Σ w_i = 1, or a score added to one,
`P.shift(δ)`. Both keep x_t = α x̂_0 + σ ε̂, so guided denoisers go wherever denoisers go: any sampler, likelihood, or
another guide. What reads the condition only to add a score (`Classifier`, `Energy`) goes outside, mixtures inside.
`Thresholded` clips x̂_0 instead, keeps the same, and goes outside of all.
"""

from .conditioned import Conditioned
from .energy import Classifier, Energy
from .mixing import Auto, Blend, ClassifierFree
from .threshold import Thresholded

__all__ = ["Auto", "Blend", "Classifier", "ClassifierFree", "Conditioned", "Energy", "Thresholded"]
