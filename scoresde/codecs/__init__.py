"""Codecs between raw data and model data, with the log-volume that turns a density of one into that of the other."""

from .codec import Codec
from .scaling import Scaling

__all__ = ["Codec", "Scaling"]
