"""Distances between two samples. All compute in float64 and say their units."""

from .c2st import C2ST, c2st
from .frechet import Frechet, FrechetRecord, frechet_distance
from .kernel import energy_distance, mmd
from .sliced import sliced_w2

__all__ = ["C2ST", "Frechet", "FrechetRecord", "c2st", "energy_distance", "frechet_distance", "mmd", "sliced_w2"]
