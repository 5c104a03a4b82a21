"""The bound through latents, against models of which log p of raw data is known in closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scoresde import (
    EDMSDE,
    MMPS,
    Budget,
    Exact,
    GaussianMixtureDenoiser,
    Observation,
    Rng,
    Tolerance,
    elbo,
    latent_bound,
    log_likelihood,
)
from scoresde.codecs import Autoencoder, Scaling
from scoresde.evaluate.problem import through

D, K = 6, 2
NOISE = 0.3


class LinearGaussian(nn.Module):
    """raw = W z + c + NOISE · noise, the columns of W orthogonal, so that under z ~ N(0, I) the posterior of z is
    independent in each place: precision 1 + |w_k|²/NOISE² (Tipping & Bishop 1999, eq. 6). `widened` is another q."""

    levels, event_shape, latent_shape = None, (D,), (K,)

    def __init__(self, widened: float = 1.0):
        super().__init__()
        basis = torch.linalg.qr(Rng(3).normal((D, K), dtype=torch.float64))[0]
        self.register_buffer("w", basis * torch.tensor([2.0, 0.7], dtype=torch.float64))
        self.register_buffer("c", torch.linspace(-1, 1, D, dtype=torch.float64))
        self.widened = widened

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        precision = 1 + self.w.square().sum(0) / NOISE**2
        mean = (x - self.c) @ self.w / NOISE**2 / precision
        return mean, self.widened * precision.rsqrt().expand_as(mean)

    def decode(self, z: Tensor) -> Tensor:
        return z @ self.w.T + self.c

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        each = -0.5 * ((x - z @ self.w.T - self.c) / NOISE) ** 2 - math.log(NOISE) - 0.5 * math.log(2 * math.pi)
        return each.sum(1)


def codec_and_prior(network: LinearGaussian, means: Tensor, weights: Tensor) -> tuple[Autoencoder, Any, Any]:
    """Latents under a scale of their own, the exact denoiser of a mixture of N(means, I) there, and log p of raw data
    under it, whose z are smoothed by σ_min = 1e-4 as those of the denoiser are: 1e-8 of their variance."""
    mean, std = (0.4, -0.2), (1.3, 0.6)
    base = Scaling(-1.0, 1.0, None, -2.0, 2.0, bounded=False)  # whose volume counts: the network sees raw / 2

    class Halved(LinearGaussian):
        def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().encode(2 * x)

        def decode(self, z: Tensor) -> Tensor:
            return super().decode(z) / 2

        def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
            return super().log_prob(2 * x, z) + D * math.log(2)

    inside = Halved(network.widened)
    codec = Autoencoder(base, inside, mean, std)
    scale = torch.tensor(std, dtype=torch.float64)
    x_means = (means - torch.tensor(mean, dtype=torch.float64)) / scale
    denoiser = GaussianMixtureDenoiser(
        x_means, (1 / scale**2).expand_as(x_means), weights, EDMSDE(sigma_min=1e-4, sigma_max=80.0)
    )
    cov = network.w @ network.w.T + NOISE**2 * torch.eye(D, dtype=torch.float64)

    def truth(raw: Tensor) -> Tensor:
        each = [
            torch.distributions.MultivariateNormal(network.decode(m), cov).log_prob(raw) + w.log()
            for m, w in zip(means, weights, strict=True)
        ]
        return torch.stack(each).logsumexp(0)

    return codec, denoiser, truth


def data(network: LinearGaussian, means: Tensor, weights: Tensor, n: int) -> Tensor:
    rng = Rng(5)
    which = (rng.uniform((n,), dtype=torch.float64)[:, None] > weights.cumsum(0)).sum(1)
    z = means[which] + rng.normal((n, K), dtype=torch.float64)
    return network.decode(z) + NOISE * rng.normal((n, D), dtype=torch.float64)


ONE = (torch.zeros(1, K, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
TWO = (torch.tensor([[-1.5, 0.5], [1.5, -0.5]], dtype=torch.float64), torch.tensor([0.7, 0.3], dtype=torch.float64))


def test_with_the_exact_posterior_the_bound_is_log_p_of_probabilistic_pca() -> None:
    """log p(z) + log p(x|z) − log q(z|x) is log p(x) for every z: no draw changes it. What is left is the solver, whose
    tolerance is 1e-7, and σ_min: the density of z + σ_min noise has log p off by σ_min² ½|∇² log p …| < 1e-6."""
    network = LinearGaussian()
    codec, denoiser, truth = codec_and_prior(network, *ONE)
    raw = data(network, *ONE, 8)
    for seed in (0, 1):
        found = log_likelihood(denoiser, raw, Tolerance(1e-7, 1e-7), divergence=Exact(), scaling=codec, rng=Rng(seed))
        assert float((found.log_prob - truth(raw)).abs().max()) / D < 1e-5
    assert found.name == "bpd/latent-bound" and "a lower bound" in repr(found)
    assert torch.allclose(found.bits_per_dim, -truth(raw) / (D * math.log(2)), atol=1e-4)
    below = elbo(denoiser, codec.encode(raw, rng=Rng(1)), samples=256)
    x = codec.encode(raw, rng=Rng(1))
    off = below.log_prob + codec.log_volume(raw, x) - truth(raw)
    assert bool((off < 4 * below.stderr).all())


@pytest.mark.parametrize(("law", "widened"), [(ONE, 1.6), (TWO, 1.0)], ids=["wide q", "latents of a mixture"])
def test_weighted_draws_raise_an_inexact_bound_and_never_pass_the_truth(law: Any, widened: float) -> None:
    """One draw loses KL(q ‖ p(z|x)), which is known where both are Gaussian: K (w² − 1 − log w²)/2 nats."""
    network = LinearGaussian(widened)
    codec, denoiser, truth = codec_and_prior(network, *law)
    raw, exact = data(network, *law, 120), None
    exact = truth(raw)
    how: Any = {"divergence": Exact(), "scaling": codec}
    gaps, errors = [], []
    for draws in (1, 3, 16):
        found = latent_bound(denoiser, raw, Budget(30), samples=draws, rng=Rng(draws), **how)
        gap = exact - found.log_prob
        gaps.append(float(gap.mean()))
        errors.append(float(gap.std()) / math.sqrt(len(raw)))
        assert float(gap.mean()) > -4 * errors[-1] - 1e-3
    if law is ONE:
        assert abs(gaps[0] - K * (widened**2 - 1 - math.log(widened**2)) / 2) < 4 * errors[0] + 1e-3
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 0.25 * gaps[0] + 4 * errors[2]


def test_a_draw_has_no_error_and_several_have_that_of_their_mean() -> None:
    network = LinearGaussian(1.6)
    codec, denoiser, _ = codec_and_prior(network, *ONE)
    raw, how = data(network, *ONE, 64), {"divergence": Exact(), "scaling": codec}
    assert bool(latent_bound(denoiser, raw, Budget(10), **how).stderr.isnan().all())  # type: ignore[arg-type]
    runs = [latent_bound(denoiser, raw, Budget(10), samples=8, rng=Rng(seed), **how) for seed in (1, 2, 3, 4)]  # type: ignore[arg-type]
    seen = torch.stack([run.log_prob for run in runs]).var(0).mean().sqrt()  # of 64 · 3 degrees of freedom: ± 5 %
    told = torch.stack([run.divergence_error for run in runs]).square().mean().sqrt()
    assert 0.7 < float(told / seen) < 1.4


def test_an_observation_through_the_decoder_has_the_exact_posterior_of_a_linear_one() -> None:
    """x ~ N(m, S) diagonal, x_t = α x + σ ε and y = A D(x) + s noise with an affine D are jointly Gaussian, where MMPS
    is exact: E[x | x_t, y] by the normal equations, which its conjugate gradients solve to 1e-8."""
    network = LinearGaussian()
    codec, denoiser, _ = codec_and_prior(network, *ONE)
    std, a, t = 0.2, Rng(8).normal((3, D), dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64)
    y = Rng(9).normal((4, 3), dtype=torch.float64)
    observation = through(codec, Observation(None, lambda x: x @ a.T, std, linear=True))
    x_t = Rng(10).normal((4, K), dtype=torch.float64)
    found = MMPS(denoiser, observation, tolerance=1e-8)(x_t, t, {"y": y}).x0
    alpha, sigma = (float(v) for v in denoiser.sde.marginal(t))
    zero = torch.zeros(1, K, dtype=torch.float64)
    offset = codec.unfold(zero) @ a.T
    matrix = codec.unfold(torch.eye(K, dtype=torch.float64)) @ a.T - offset  # (K, 3)
    prior = torch.tensor(codec.std, dtype=torch.float64) ** 2
    mean = -torch.tensor(codec.mean, dtype=torch.float64) / prior.sqrt()
    precision = torch.diag(prior) + alpha**2 / sigma**2 * torch.eye(K, dtype=torch.float64) + matrix @ matrix.T / std**2
    right = prior * mean + alpha / sigma**2 * x_t + (y - offset) @ matrix.T / std**2
    assert torch.allclose(found, torch.linalg.solve(precision, right.T).T, atol=1e-4)
    assert not observation.linear and codec.pixels is codec.base
