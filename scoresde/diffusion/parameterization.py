r"""What a network is asked to output: any linear reading `F* = p x_0 + q ε` of the pair.

Given x_t = α x_0 + σ ε, inverting the 2×2 system gives both end points (det = α q − σ p):

    x̂_0 = (q x_t − σ F)/det,    ε̂ = (α F − p x_t)/det.

So a parameterisation is two coefficients, and nothing else knows which one is in use.
"""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from ..checks import positive
from .prediction import Prediction
from .readable import Readable
from .sde import Scales


class Parameterization(Readable, abc.ABC):
    """A row (p, q) of the table; singular where det = α q − σ p vanishes."""

    @abc.abstractmethod
    def coefficients(self, scales: Scales) -> tuple[Tensor, Tensor]:
        """(p, q), each broadcastable against a batch like `scales.alpha`."""

    def target(self, x0: Tensor, eps: Tensor, scales: Scales) -> Tensor:
        """F* = p x_0 + q ε, of the shape of `x0`."""
        p, q = self.coefficients(scales)
        return p * x0 + q * eps

    def prediction(self, output: Tensor, x: Tensor, scales: Scales) -> Prediction:
        """Both end points from a network output F and x_t, each of the shape of `x`."""
        alpha, sigma = scales.alpha, scales.sigma
        p, q = self.coefficients(scales)
        det = alpha * q - sigma * p
        # in place on the first term: for large batches a temporary costs more than the arithmetic
        x0 = ((q / det) * x).addcmul_(output, -sigma / det)
        return Prediction(x0, ((alpha / det) * output).addcmul_(x, -p / det), scales)


class Eps(Parameterization):
    """F* = ε (Ho et al. 2020, eq. 14). Singular where α = 0."""

    def coefficients(self, scales: Scales) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(scales.alpha), torch.ones_like(scales.alpha)


class X0(Parameterization):
    """F* = x_0. Singular where σ = 0."""

    def coefficients(self, scales: Scales) -> tuple[Tensor, Tensor]:
        return torch.ones_like(scales.alpha), torch.zeros_like(scales.alpha)


class V(Parameterization):
    """F* = α ε − σ x_0 (Salimans & Ho 2022, App. D). Never singular."""

    def coefficients(self, scales: Scales) -> tuple[Tensor, Tensor]:
        return -scales.sigma, scales.alpha


class Velocity(Parameterization):
    """F* = α̇ x_0 + σ̇ ε, the flow velocity (Lipman et al. 2023, eq. 9). Never singular: det = α σ̇ − σ α̇ > 0."""

    def coefficients(self, scales: Scales) -> tuple[Tensor, Tensor]:
        return scales.rates


class Score(Parameterization):
    """F* = −ε/σ, the score itself (Song et al. 2021, eq. 7). Singular where α = 0."""

    def coefficients(self, scales: Scales) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(scales.alpha), -1 / scales.sigma


class EDM(Parameterization):
    r"""F* = (σ x_0/σ_d − α σ_d ε)/√D with D = α²σ_d² + σ² (Karras et al. 2022, eq. 7, for every SDE).

    Var F* = 1 for data of standard deviation σ_d; c_skip = α σ_d²/D and c_out = σ σ_d/√D fall out of the inverse.
    Never singular; F = 0 is the exact denoiser of N(0, σ_d² I).

    Args:
        sigma_data: σ_d, standard deviation of the data, > 0.
    """

    def __init__(self, sigma_data: float = 1.0):
        self.sigma_data = positive(sigma_data, "sigma_data", "the standard deviation of the data")

    def coefficients(self, scales: Scales) -> tuple[Tensor, Tensor]:
        alpha, sigma, d = scales.alpha, scales.sigma, self.sigma_data
        root = (alpha**2 * d**2 + sigma**2).sqrt()
        return sigma / (d * root), -alpha * d / root
