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
