"""Sliced Wasserstein distance."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import whole
from ..noise.rng import Rng
from .pairs import paired

_COLUMNS = 64  # projections at a time


def sliced_w2(x: Tensor, y: Tensor, *, projections: int = 256, rng: Rng) -> float:
    r"""SW₂ = (E_θ W₂²(θ·x, θ·y))^{1/2}, θ uniform on the unit sphere (Bonneel et al. 2015), in units of the data.

    Each one-dimensional W₂ is that of the two empirical laws, exact for n ≠ m too: ∫₀¹ (F_x⁻¹(q) − F_y⁻¹(q))² dq.
    Not divided by dimension: a shift by δ gives |δ|/√D. Samples of one law give a value above 0 that falls with n.

    Args:
        x: (n, *event), n ≥ 2.
        y: (m, *event), m ≥ 2.
        projections: number of directions, ≥ 1; the relative error of SW₂² falls as 1/√projections.
        rng: draws them.

    Raises:
        TypeError, ValueError: see `scoresde.metrics.pairs.paired`.
    """
    projections = whole(projections, "projections")
    x, y = paired(x, y, minimum=2)
    theta = rng.normal((x.shape[1], projections), dtype=torch.float64, device=x.device)
    theta = theta / theta.norm(dim=0)
    weights, i, j = _couple(len(x), len(y), x.device)
    total = x.new_zeros(())
    for part in theta.split(_COLUMNS, dim=1):
        gap = (x @ part).sort(0).values[i] - (y @ part).sort(0).values[j]
        total = total + (weights[:, None] * gap**2).sum()
    return float((total / projections).sqrt())


def _couple(n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The monotone coupling of n and m equal masses: weights and both indices, piece by piece of [0, 1]."""
    # in units of 1/(n m), so that the cuts are exact integers
    cuts = torch.cat([torch.arange(n + 1, device=device) * m, torch.arange(m + 1, device=device) * n]).unique()
    return cuts.diff().double() / (n * m), cuts[:-1] // m, cuts[:-1] // n
