"""Dynamic thresholding against its definition, by NumPy's quantile."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from scoresde import VPSDE, ClassifierFree, Prediction, Rng, Thresholded
from scoresde.diffusion.conditions import Cond
from scoresde.diffusion.denoiser import Denoiser

SDE = VPSDE()


class Wide(Denoiser):
    """x̂_0 = 2x without a condition, 3x with one."""

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        scales, x0 = self.sde.at(t, x), (2.0 if cond is None else 3.0) * x
        return Prediction(x0, (x - scales.alpha * x0) / scales.sigma, scales)


@pytest.mark.parametrize("quantile, limit", [(0.9, 1.0), (1.0, 0.5), (0.0, 1.0)])
def test_it_is_clipped_at_its_own_quantile_and_scaled_back(quantile: float, limit: float) -> None:
    """s = max(limit, the quantile of |x̂_0|) of each sample, and x_t = α x̂_0 + σ ε̂ is kept to rounding."""
    x, t = 2 * Rng(0).normal((4, 1, 5, 5), dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
    p = Thresholded(Wide(SDE), quantile, limit)(x, t)
    for made, given in zip(p.x0.numpy(), 2 * x.numpy(), strict=True):
        s = max(limit, np.quantile(np.abs(given).astype(np.float32), quantile) if quantile else 0)
        np.testing.assert_allclose(made, given.clip(-s, s) * limit / s, rtol=1e-6)
    torch.testing.assert_close(p.scales.alpha * p.x0 + p.scales.sigma * p.eps, x)
    assert float(p.x0.abs().max()) <= limit * (1 + 1e-6)


def test_a_sample_within_the_limit_is_left_as_it_is() -> None:
    x, t = 0.1 * Rng(0).normal((4, 3)), torch.tensor(0.4)
    p, plain = Thresholded(Wide(SDE))(x, t), Wide(SDE)(x, t)
    assert torch.equal(p.x0, plain.x0) and torch.equal(p.eps, plain.eps)


def test_it_goes_around_guidance() -> None:
    """2 + w (3 − 2) = 4 at w = 2, clipped at 1."""
    x, t = torch.full((2, 3), 0.2), torch.tensor(0.4)
    label = torch.zeros(2, dtype=torch.int64)
    p = Thresholded(Wide(SDE), 0.0, 0.7, inner=partial(ClassifierFree, scale=2.0))(x, t, label)
    torch.testing.assert_close(p.x0, torch.full((2, 3), 0.7))
    with pytest.raises(ValueError, match="quantile is a share"):
        Thresholded(Wide(SDE), 99.5)
    with pytest.raises(ValueError, match="limit"):
        Thresholded(Wide(SDE), limit=0.0)
