"""Codecs between raw data and model data, with the log-volume that turns a density of one into that of the other."""

from .autoencoder import Autoencoder
from .centred import Centred
from .chain import Chain
from .codec import Codec
from .haar import Haar, HaarDetails, HaarLow
from .lifted import LiftedDetails, LiftedLow
from .patches import Patches
from .scaling import Scaling
from .spectrum import Spectrum
from .standardise import Standardise

__all__ = [
    "Autoencoder",
    "Centred",
    "Chain",
    "Codec",
    "Haar",
    "HaarDetails",
    "HaarLow",
    "LiftedDetails",
    "LiftedLow",
    "Patches",
    "Scaling",
    "Spectrum",
    "Standardise",
]
