"""Metrics as an evaluation calls them: (samples, held-out points, training samples) -> number, all (n, *event).

They are functions, so that one of a user's own is a function too; their keyword arguments are their settings.
"""

from __future__ import annotations

from torch import Tensor

from ..noise.rng import Rng
from .c2st import c2st
from .frechet import frechet_distance
from .kernel import kid
from .sliced import sliced_w2


def frechet_score(made: Tensor, held_out: Tensor, train: Tensor) -> float:
    """`frechet_distance`, in squared units of the features; less is better.

    Raises:
        ValueError: not more samples than features.
    """
    fewest, dims = min(len(made), len(held_out)), made[0].numel()
    if fewest <= dims:
        raise ValueError(f"{fewest} samples cannot fill the covariance of {dims} features; more than {dims} can")
    return frechet_distance(made.flatten(1), held_out.flatten(1))


def kernel_score(made: Tensor, held_out: Tensor, train: Tensor, *, degree: int = 3) -> float:
    """`kid`, without units; less is better, and 0 in the mean for equal laws."""
    return kid(made, held_out, degree=degree)


def sliced_score(made: Tensor, held_out: Tensor, train: Tensor, *, projections: int = 256, seed: int = 0) -> float:
    """`sliced_w2`, in units of the features; less is better."""
    return sliced_w2(made, held_out, projections=projections, rng=Rng(seed))


def c2st_score(
    made: Tensor, held_out: Tensor, train: Tensor, *, hidden: int = 64, steps: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Accuracy of `c2st` on as many samples as held-out points, with its binomial error; ½ is best."""
    rng, count = Rng(seed), min(len(made), len(held_out))
    x, y = (part[rng.permutation(len(part))[:count].to(part.device)] for part in (made, held_out))
    found = c2st(x, y, rng=rng, hidden=hidden, steps=steps)
    return found.accuracy, found.stderr
