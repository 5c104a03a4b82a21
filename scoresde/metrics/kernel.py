"""Distances that are averages over pairs: maximum mean discrepancy, kernel inception distance, energy distance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import whole
from .pairs import mean_between, mean_within, paired, row_blocks

_MEDIAN_SAMPLES = 1000


def mmd(x: Tensor, y: Tensor, *, bandwidths: float | Sequence[float] | None = None) -> float:
    r"""Unbiased estimate of MMD² = E k(x, x') + E k(y, y') − 2 E k(x, y), without units.

    k(a, b) is the mean over bandwidths h of exp(−|a − b|²/(2h²)) (Gretton et al. 2012, eq. 3). Being unbiased, it is
    below 0 for about half of all samples of one law. Cost (n + m)².

    Args:
        x: (n, *event), n ≥ 2.
        y: (m, *event), m ≥ 2.
        bandwidths: h > 0, one or several, in units of the data. None is the median heuristic: the median distance
            between two different points of x and y pooled, from at most 1,000 points of each, evenly spread. It
            depends on the data, so give numbers where values are compared with each other.

    Raises:
        TypeError, ValueError: see `scoresde.metrics.pairs.paired`; a bandwidth that is not positive.
    """
    x, y = paired(x, y, minimum=2)
    if bandwidths is None:
        widths = [_median_distance(x, y)]
    else:
        widths = [float(bandwidths)] if isinstance(bandwidths, (int, float)) else [float(h) for h in bandwidths]
    if not widths or not all(0 < h < math.inf for h in widths):
        raise ValueError(f"bandwidths are positive; got {widths}. (All points equal? Then there is no median.)")

    def kernel(distances: Tensor) -> Tensor:
        return sum((torch.exp(-0.5 * (distances / h) ** 2) for h in widths), torch.zeros_like(distances)) / len(widths)

    return float(mean_within(x, kernel) + mean_within(y, kernel) - 2 * mean_between(x, y, kernel))


def _median_distance(x: Tensor, y: Tensor) -> float:
    points = torch.cat([part[:: math.ceil(len(part) / _MEDIAN_SAMPLES)] for part in (x, y)])
    return float(torch.pdist(points - points.mean(0)).median())


def kid(x: Tensor, y: Tensor, *, degree: int = 3) -> float:
    r"""Unbiased estimate of MMD² by the kernel k(a, b) = (a·b/F + 1)^degree of F features, without units.

    The kernel inception distance of Bińkowski et al. 2018 (arXiv:1801.01401, sec. 4) where the features are
    Inception's, on all pairs in place of means over subsets. Below 0 for about half of all samples of one law.

    Args:
        x: (n, *event), n ≥ 2.
        y: (m, *event), m ≥ 2.
        degree: ≥ 1.

    Raises:
        TypeError, ValueError: see `scoresde.metrics.pairs.paired`; another degree.
    """
    whole(degree, "degree")
    x, y = paired(x, y, minimum=2)

    def kernel(products: Tensor) -> Tensor:
        return (products / x.shape[1] + 1) ** degree

    def total(a: Tensor, b: Tensor) -> Tensor:
        return sum((kernel(a[rows] @ b.T).sum() for rows in row_blocks(a, b)), a.new_zeros(()))

    def within(a: Tensor) -> Tensor:
        return (total(a, a) - kernel((a * a).sum(1)).sum()) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * total(x, y) / (len(x) * len(y)))


def energy_distance(x: Tensor, y: Tensor) -> float:
    r"""Unbiased estimate of 2 E|x − y| − E|x − x'| − E|y − y'|, in units of the data.

    0 for equal laws only (Székely & Rizzo 2013, eq. 2.5; some libraries return its square root). Cost (n + m)².

    Args:
        x: (n, *event), n ≥ 2.
        y: (m, *event), m ≥ 2.

    Raises:
        TypeError, ValueError: see `scoresde.metrics.pairs.paired`.
    """
    x, y = paired(x, y, minimum=2)
    return float(2 * mean_between(x, y, torch.clone) - mean_within(x, torch.clone) - mean_within(y, torch.clone))
