"""The noise level as a vector: waves of c_noise at fixed frequencies."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..checks import whole


class _Waves(nn.Module):
    """[cos(ω c), sin(ω c)] for fixed angular frequencies ω, computed in float32 or wider."""

    omega: Tensor

    def __init__(self, omega: Tensor):
        super().__init__()
        self.register_buffer("omega", omega.float())

    def forward(self, c_noise: Tensor) -> Tensor:
        dtype = torch.promote_types(c_noise.dtype, torch.float32)
        angle = c_noise.to(dtype)[:, None] * self.omega.to(dtype)
        return torch.cat([angle.cos(), angle.sin()], 1)


def _half(width: int) -> int:
    if whole(width, "width", 0) < 2 or width % 2:
        raise ValueError(f"An embedding holds pairs of cosine and sine: its width is even, ≥ 2; got {width}.")
    return width // 2


class FourierEmbedding(_Waves):
    r"""Gaussian Fourier features (Tancik et al. 2020; Song et al. 2021, app. H), with no random numbers.

    The features are cos(2π f_i c) and sin(2π f_i c) with f_i = scale √2 erfinv((i + ½)/(w/2)): the quantiles of
    |N(0, scale²)| instead of draws from it, so that no checkpoint depends on a seed for them.

    Args:
        width: w, even; the result of forward(c_noise (B,)) is (B, w).
        scale: standard deviation of the frequencies in cycles per unit of c_noise, > 0. NCSN++ used 16 on
            log σ; 1 is smoother and enough for c_noise in [−3, 3] (as in Karras et al. 2024).
    """

    def __init__(self, width: int, scale: float = 1.0):
        half = _half(width)
        quantile = torch.erfinv((torch.arange(half, dtype=torch.float64) + 0.5) / half)
        super().__init__(2 * math.pi * scale * math.sqrt(2) * quantile)


class SinusoidalEmbedding(_Waves):
    r"""Geometric frequencies (Vaswani et al. 2017; Ho et al. 2020): ω_i = 100 scale · 10^{−4i/(w/2)}.

    From 16 cycles per unit of c_noise down to one almost straight line. DDPM's own, on steps 0 … 1000, are
    `scale=0.01`.

    Args:
        width: w, even; the result of forward(c_noise (B,)) is (B, w).
        scale: factor on every frequency, > 0.
    """

    def __init__(self, width: int, scale: float = 1.0):
        half = _half(width)
        super().__init__(100 * scale * 10 ** (-4 * torch.arange(half, dtype=torch.float64) / half))
