"""What nearest neighbours say: are samples near the data, are data near samples, are training data repeated?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import whole
from .pairs import distances_between, paired


def precision_recall(made: Tensor, held_out: Tensor, train: Tensor, *, k: int = 3) -> dict[str, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv:1904.06991, eq. 1), in [0, 1], more is better.

    Precision: the share of samples that lie within the distance of a held-out point to its k-th neighbour. Recall: the
    same with both exchanged, so the share of held-out points that the samples reach.

    Args:
        made, held_out: (n, *event) and (m, *event), n, m > k.
        train: not used.
        k: the k-th nearest other point gives the radius, ≥ 1.

    Raises:
        TypeError, ValueError: see `scoresde.metrics.pairs.paired`; no more than k points.
    """
    x, y = paired(made, held_out, minimum=whole(k, "k") + 1)
    near_real, _ = _inside(x, y, _radii(y, k))
    near_made, _ = _inside(y, x, _radii(x, k))
    return {"precision": _share(near_real > 0), "recall": _share(near_made > 0)}


def density_coverage(made: Tensor, held_out: Tensor, train: Tensor, *, k: int = 5) -> dict[str, float]:
    """Density and coverage (Naeem et al. 2020, arXiv:2002.09797, eq. 3 and 5), more is better.

    Density: in how many balls of held-out points a sample lies, over k: its mean is 1 for equal laws, and may be more.
    Coverage: the share of held-out points with a sample in their ball, 1 − 2^{−k} for equal laws and large n = m.

    Args, Raises: as in `precision_recall`.
    """
    x, y = paired(made, held_out, minimum=whole(k, "k") + 1)
    near_real, reached = _inside(x, y, _radii(y, k))
    return {"density": float(near_real.double().mean()) / k, "coverage": _share(reached)}


def memorisation(
    made: Tensor, held_out: Tensor, train: Tensor, *, ratio: float = 1 / 3
) -> dict[str, tuple[float, float]]:
    r"""Whether samples repeat training data: two shares, each with an error in closed form.

    `memorised` = (s − p)/(1 − p), where s is the share of samples whose nearest real point is one of the N training
    points and not one of the M held-out ones, and p = N/(N + M). If the samples know nothing of which points were
    trained on, its mean is 0 exactly, whatever N and M are; if a share f of them repeats training data and the others
    are as new, its mean is f. The error is its standard deviation when the N + M points are divided at random, which
    is exact for f = 0: N M Σ_i (c_i − c̄)²/((N + M)(N + M − 1)) is the variance of the number of samples whose nearest
    point is in training, c_i those of point i.

    `copies` is the share of samples that are `ratio` times as near to their nearest training point as to their second
    (Yoon et al. 2023, *Diffusion probabilistic models generalize when they fail to memorize*, sec. 3: a third), less
    the same share of the held-out points, which cannot be copies; binomial errors, of (k + 1)/(n + 2).

    Args:
        made, held_out, train: (n, *event), (M, *event), (N, *event), n, M ≥ 1 and N ≥ 2.
        ratio: in (0, 1).

    Raises:
        TypeError, ValueError: see `scoresde.metrics.pairs.paired`; a ratio outside (0, 1).
    """
    if not 0 < ratio < 1:
        raise ValueError(f"ratio lies in (0, 1); got {ratio}.")
    if len(train) < 2:
        raise ValueError(f"memorisation is of the training samples, at least 2; there are {len(train)}")
    (x, t), (y, _) = paired(made, train, minimum=1), paired(held_out, train, minimum=1)
    to_train, at_train = _nearest(x, t, 2)
    to_held, at_held = _nearest(x, y, 1)
    n, points = len(t), len(t) + len(y)
    p, from_train = n / points, to_train[:, 0] < to_held[:, 0]
    counts = torch.bincount(torch.where(from_train, at_train[:, 0], n + at_held[:, 0]), minlength=points).double()
    spread = math.sqrt(n * len(y) * float(counts.var()) / points) / len(x)
    of_made, of_held = (near[:, 0] <= ratio * near[:, 1] for near in (to_train, _nearest(y, t, 2)[0]))
    return {
        "memorised": ((_share(from_train) - p) / (1 - p), spread / (1 - p)),
        "copies": (_share(of_made) - _share(of_held), math.hypot(_binomial(of_made), _binomial(of_held))),
    }


def _radii(x: Tensor, k: int) -> Tensor:
    """(n,) distance of each point to its k-th nearest other."""
    found = x.new_empty(len(x))
    for rows, distances in distances_between(x, x):
        distances.diagonal(rows.start).fill_(math.inf)
        found[rows] = distances.kthvalue(k).values
    return found


def _inside(points: Tensor, centres: Tensor, radii: Tensor) -> tuple[Tensor, Tensor]:
    """((n,) in how many balls each point lies, (m,) whether each ball holds one); a border belongs to its ball."""
    slack = 1e-6 * (centres - centres.mean(0)).norm(dim=1).max()  # round-off of distances that are 0
    balls, held = centres.new_zeros(len(points), dtype=torch.int64), torch.zeros_like(radii, dtype=torch.bool)
    for rows, distances in distances_between(points, centres):
        inside = distances <= radii + slack
        balls[rows], held = inside.sum(1), held | inside.any(0)
    return balls, held


def _nearest(x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(distances (n, k), indices (n, k)) of the k nearest points y of each x, the nearest first."""
    blocks = [distances.topk(min(k, len(y)), largest=False) for _, distances in distances_between(x, y)]
    return torch.cat([block.values for block in blocks]), torch.cat([block.indices for block in blocks])


def _share(which: Tensor) -> float:
    return float(which.double().mean())


def _binomial(which: Tensor) -> float:
    """Standard error of a share, of one more on either side, so that none of n is not taken as certain."""
    n = len(which)
    share = (int(which.sum()) + 1) / (n + 2)
    return math.sqrt(share * (1 - share) / n)
