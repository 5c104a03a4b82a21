r"""Log-normaliser of a tilted prior: log e^{f(z)}/E e^f at t_max, where noise has made f nearly flat.

E is over the prior N(c, ς²) of x_T, per dimension, and the mean of e^f is that of its second-order expansion about c,

    log E e^f ≈ f(c) + log(1 + ½ Σ_i ς_i² ∂_i² e^{f(c)} / e^{f(c)}).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..diffusion.denoiser import Denoiser
from ..noise.rng import Rng

_ALL, _SOME = 64, 16  # curvature is taken in every dimension up to _ALL of them, and in _SOME directions of more


def by_value(denoiser: Denoiser, f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """For an f (B, *event) -> (B,) whose values are known, at x_T = z (B, *event): (B,), float64.

    Second differences over one ς, in each of up to 64 dimensions, and in 16 orthonormal directions of more.
    """
    centre, std = _prior(denoiser, z)
    middle = f(centre).double()
    directions = _directions(z[0].numel()).to(z)
    mean = torch.ones_like(middle)
    for direction in directions:
        step = std * direction.reshape(z.shape[1:])
        change = [(f(side).double() - middle).expm1() for side in (centre + step, centre - step)]
        mean = mean + 0.5 * z[0].numel() / len(directions) * sum(change)
    return f(z).double() - middle - mean.clamp(min=0.1).log()


def by_slope(denoiser: Denoiser, slope: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """For an f known by δ = ∇f (B, *event) -> (B, *event), at x_T = z (B, *event): (B,), float64.

    From δ at z and at c, exact to second order where f has one curvature in all directions, as it has in one dimension.
    """
    centre, std = _prior(denoiser, z)
    there, middle = slope(z).double(), slope(centre).double()
    away = (z - centre).double()
    bend = ((there - middle) * away).flatten(1).sum(1)
    steps = (away / std).square().flatten(1).mean(1).clamp(min=torch.finfo(torch.float64).tiny)
    log_mean = 0.5 * ((std * middle).square().flatten(1).sum(1) + bend / steps)
    return (middle * away).flatten(1).sum(1) + 0.5 * bend - log_mean


def _prior(denoiser: Denoiser, z: Tensor) -> tuple[Tensor, Tensor]:
    """c, as a batch like z, and ς."""
    mean, std = denoiser.sde.prior_moments(z, denoiser.data_mean, denoiser.data_var)
    return torch.zeros_like(z) + mean.to(z.dtype), std.to(z.dtype)


def _directions(size: int) -> Tensor:
    """Orthonormal rows (n, size), float64."""
    if size <= _ALL:
        return torch.eye(size, dtype=torch.float64, device="cpu")
    return torch.linalg.qr(Rng(0).normal((_SOME, size), dtype=torch.float64).mT).Q.mT
