"""Distances between two samples. All compute in float64 and say their units."""

from .c2st import C2ST, c2st
from .frechet import Frechet, FrechetRecord, frechet_distance
from .jackknife import Metric, Score, score
from .kernel import energy_distance, kid, mmd
from .neighbours import density_coverage, memorisation, precision_recall
from .scores import c2st_score, frechet_score, kernel_score, sliced_score
from .sliced import sliced_w2

__all__ = [
    "C2ST",
    "Frechet",
    "FrechetRecord",
    "Metric",
    "Score",
    "c2st",
    "c2st_score",
    "density_coverage",
    "energy_distance",
    "frechet_distance",
    "frechet_score",
    "kernel_score",
    "kid",
    "memorisation",
    "mmd",
    "precision_recall",
    "score",
    "sliced_score",
    "sliced_w2",
]
