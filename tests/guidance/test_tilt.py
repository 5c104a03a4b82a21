"""What guidance makes of the prior at t_max, log p_T(z|y)/p_T(z), against mixtures and Gaussians in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from scoresde import (
    EDMSDE,
    MMPS,
    SDE,
    VESDE,
    VPSDE,
    Classifier,
    CosineSDE,
    Energy,
    GaussianMixtureDenoiser,
    Mask,
    Observation,
    RectifiedFlow,
    Rng,
    SubVPSDE,
)
from scoresde.guidance.tilt import by_slope, by_value

each_sde = pytest.mark.parametrize(
    "sde", [VPSDE(), SubVPSDE(), VESDE(), CosineSDE(), EDMSDE(), RectifiedFlow()], ids=lambda s: type(s).__name__
)


def log_mixture(x: Tensor, means: Tensor, var: float, weights: Tensor) -> Tensor:
    """log Σ_k w_k N(x; μ_k, v I), (B, K) -> (B,), weights as they are."""
    logs = -0.5 * ((x[:, None] - means) ** 2 / var + math.log(2 * math.pi * var)).sum(2)
    return (logs + weights.log()).logsumexp(1)


@each_sde
@pytest.mark.parametrize("dims", [1, 2, 8])
def test_the_exact_classifier_makes_the_prior_that_of_its_class(sde: SDE, dims: int) -> None:
    """Data of standard deviation 4, σ_T = 50 (VE): second order is (4/50)² a dimension, the fourth 4e-5."""
    generator = torch.Generator().manual_seed(dims)
    means = 4 * torch.randn(4, dims, generator=generator, dtype=torch.float64)
    weights, var, first = torch.tensor([0.1, 0.2, 0.3, 0.4]).double(), 0.16, torch.tensor([True, False, False, True])
    prior = GaussianMixtureDenoiser(means, var, weights, sde)

    def log_prob(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        alpha, sigma = (float(v[0]) for v in sde.marginal(t))
        noisy = alpha * means, alpha**2 * var + sigma**2
        parts = [log_mixture(x, noisy[0][keep], noisy[1], weights[keep]) for keep in (~first, first)]
        return torch.stack(parts, 1).log_softmax(1).gather(1, y[:, None])[:, 0]

    z, y = prior.prior_sample((32, dims), rng=Rng(0), dtype=torch.float64), torch.arange(32) % 2
    alpha, sigma = (float(v) for v in sde.marginal(sde.terminal))
    noisy = alpha * means, alpha**2 * var + sigma**2
    whole = log_mixture(z, *noisy, weights)
    parts = [log_mixture(z, noisy[0][keep], noisy[1], weights[keep] / weights[keep].sum()) for keep in (~first, first)]
    want = torch.stack(parts, 1).gather(1, y[:, None])[:, 0] - whole
    guided = Classifier(prior, log_prob)
    got = guided.prior_log_prob_given(z, y) - guided.prior_log_prob(z)
    assert (got - want).abs().max() / dims < 4e-5
    tilted = Energy(prior, lambda x, t, cond: -log_prob(x, t, cond))
    torch.testing.assert_close(tilted.prior_log_prob_given(z, y) - tilted.prior_log_prob(z), got)


@each_sde
@pytest.mark.parametrize("dims", [1, 6])
def test_a_told_gaussian_is_normalised_to_second_order(sde: SDE, dims: int) -> None:
    """Data N(μ, 5² I), all seen: one curvature in all directions. Third order is (α 5/σ_T)⁴ = 1e-4 (VE) a dimension,
    times |z − c|²/ς² of the draw, below 10; half of that.
    """
    mean = torch.linspace(-3, 5, dims, dtype=torch.float64)[None]
    prior = GaussianMixtureDenoiser(mean, 25.0, torch.ones(1), sde)
    y, std = mean[0] + 4, 1.0
    told = MMPS(prior, Observation(y, Mask(torch.ones(dims)), std))
    z = prior.prior_sample((64, dims), rng=Rng(0), dtype=torch.float64)
    got = told.prior_log_prob_given(z, None) - told.prior_log_prob(z)
    alpha, sigma = sde.marginal(sde.terminal)
    seen = 25 / (25 + std**2)
    eye = torch.eye(dims, dtype=torch.float64)
    before = MultivariateNormal(alpha * mean[0], (alpha**2 * 25 + sigma**2) * eye)
    after = MultivariateNormal(alpha * (mean[0] + seen * (y - mean[0])), (alpha**2 * seen * std**2 + sigma**2) * eye)
    want = after.log_prob(z) - before.log_prob(z)
    assert (got - want).abs().max() / dims < 5 * (5 * alpha / sigma) ** 4 + 1e-9


@pytest.mark.parametrize("dims", [3, 64, 65, 500])
def test_few_directions_stand_for_many(dims: int) -> None:
    """E e^f of f = −a|z − c|²/2 is (1 + aς²)^(−D/2), whose second order is −D log(1 + aς²/2)-like: off by D(aς²)²."""
    sde, a = VPSDE(), 1e-4
    prior = GaussianMixtureDenoiser(torch.ones(1, dims), 0.5, torch.ones(1), sde)
    z = prior.prior_sample((4, dims), rng=Rng(0), dtype=torch.float64)
    mean, std = sde.prior_moments(z, prior.data_mean, prior.data_var)
    centre = torch.zeros_like(z) + mean

    def f(x: Tensor) -> Tensor:
        return -0.5 * a * (x - centre).square().sum(1)

    want = f(z) + 0.5 * dims * math.log1p(a * float(std.flatten()[0]) ** 2)
    for got in (by_value(prior, f, z), by_slope(prior, lambda x: -a * (x - centre), z)):
        torch.testing.assert_close(got, want, rtol=0, atol=dims * a**2 + (dims * a) ** 2)
