"""The estimate of a denoiser at x_t: both end points of its line, x̂_0 and ε̂."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..ops.broadcast import coefficient
from .sde import Scales


@dataclass(frozen=True)
class Prediction:
    """The pair (x̂_0, ε̂), each of the shape of x_t, with the invariant `x_t = α x̂_0 + σ ε̂`.

    Attributes:
        x0: x̂_0 = E[x_0 | x_t], shape (B, *event).
        eps: ε̂ = E[ε | x_t], shape (B, *event).
        scales: α, σ at the time of the prediction.
    """

    x0: Tensor
    eps: Tensor
    scales: Scales

    @property
    def score(self) -> Tensor:
        """∇_x log p_t(x) = −ε̂/σ."""
        return -self.eps / self.scales.sigma

    @property
    def velocity(self) -> Tensor:
        """dx/dt of the probability-flow ODE, α̇ x̂_0 + σ̇ ε̂ (equal to f x − ½ g² score, but finite for flows)."""
        d_alpha, d_sigma = self.scales.rates
        return d_alpha * self.x0 + d_sigma * self.eps

    def blend(self, other: Prediction, weight: Tensor | float) -> Prediction:
        """(1 − w) self + w other, w a number or () or (B,): affine, so the invariant holds for w > 1 too (guidance)."""
        if isinstance(weight, Tensor):
            weight = coefficient(weight, self.x0)
        # in this form w = 0 and w = 1 are the one and the other, bit for bit
        x0, eps = ((1 - weight) * a + weight * b for a, b in ((self.x0, other.x0), (self.eps, other.eps)))
        return Prediction(x0, eps, self.scales)

    def shift(self, score: Tensor) -> Prediction:
        """Add δ = ∇ log p(y|x_t) to the score: x̂_0 += σ²δ/α, ε̂ −= σδ (Bayes' rule; the invariant holds)."""
        alpha, sigma = self.scales.alpha, self.scales.sigma
        return Prediction(self.x0 + sigma**2 / alpha * score, self.eps - sigma * score, self.scales)
