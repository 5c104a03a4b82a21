"""Sets of points without their centre: an orthonormal basis of it, which codecs and networks share."""

from __future__ import annotations

import torch
from torch import Tensor


def centred_basis(points: int) -> Tensor:
    """(N − 1, N) in float64, with orthonormal rows that each sum to zero (Helmert): row k weighs the mean of the
    first k points against the next one.

    z = basis @ x (N − 1, d) are coordinates of the points x (N, d) less their mean, and basisᵀ @ z is those points
    again. Distances and Gaussian noise stay as they are, and volumes of the centred points.

    Args:
        points: N ≥ 2.
    """
    k = torch.arange(1, points, dtype=torch.float64, device="cpu")[:, None]
    place = torch.arange(points, dtype=torch.float64, device="cpu")
    rows = (place < k).double() - k * (place == k)
    return rows / (k * (k + 1)).sqrt()
