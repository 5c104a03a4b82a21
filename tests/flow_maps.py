"""The exact flow map of Gaussian data, an oracle of what makes and trains flow maps."""

from __future__ import annotations

import torch
from torch import Tensor

from scoresde import Denoiser
from scoresde.diffusion.conditions import named
from scoresde.diffusion.prediction import Prediction

VAR = 0.6


class ExactMap(Denoiser):
    """The flow map of data N(0, VAR I): y_s = y_t √((VAR + ς_s²)/(VAR + ς_t²)), as its g."""

    told = ("end",)
    factor = 1.0  # on g, for one that is wrong

    def forward(self, x: Tensor, t: Tensor, cond=None) -> Prediction:
        scales = self.sde.at(t, x)
        end = self.sde.at(named(cond).get("end", t), x)
        y, here, there = x / scales.alpha, scales.sigma / scales.alpha, end.sigma / end.alpha
        r = there / here
        moved = y * ((VAR + there**2) / (VAR + here**2)).sqrt()
        g = torch.where(r < 1, (moved - r * y) / torch.where(r < 1, 1 - r, 1.0), VAR / (VAR + here**2) * y)
        g = self.factor * g
        return Prediction(g, (x - scales.alpha * g) / scales.sigma, scales)


class QuantileMap(Denoiser):
    """The exact flow map of a mixture on the line, where the ODE keeps the order: F_s(y_s) = F_t(y_t).

    Newton's method with bisection finds y_s; one more step, through which derivatives go, has the slopes of y_s.
    """

    told = ("end",)
    means, stds, weights = (
        torch.tensor(v, dtype=torch.float64) for v in ((-1.0, 0.4, 1.5), (0.3, 0.2, 0.4), (0.5, 0.2, 0.3))
    )

    def _cdf(self, y: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """(F, its density) of y (B, 1) = x/α at ς = σ/α (B, 1)."""
        stds = (self.stds**2 + ratio**2).sqrt()
        z = (y - self.means) / stds
        density = (self.weights * (-z.square() / 2).exp() / stds).sum(-1, keepdim=True) / (2 * torch.pi) ** 0.5
        return (self.weights * 0.5 * (1 + torch.erf(z / 2**0.5))).sum(-1, keepdim=True), density

    def _solved(self, level: Tensor, ratio: Tensor) -> Tensor:
        low, high = -40 - 40 * ratio, 40 + 40 * ratio
        for _ in range(80):
            middle = (low + high) / 2
            above = self._cdf(middle, ratio)[0] > level
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return (low + high) / 2

    def forward(self, x: Tensor, t: Tensor, cond=None) -> Prediction:
        scales = self.sde.at(t, x)
        end = self.sde.at(named(cond).get("end", t), x)
        y, here, there = x / scales.alpha, scales.sigma / scales.alpha, end.sigma / end.alpha
        level = self._cdf(y, here)[0]
        with torch.no_grad():
            root = self._solved(level, there)
        at, density = self._cdf(root, there)
        moved = root - (at - level) / density
        g = (moved - there / here * y) / (1 - there / here)
        return Prediction(g, (x - scales.alpha * g) / scales.sigma, scales)
