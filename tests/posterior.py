"""Closed forms of mixtures seen through y = A x_0 + std · noise: what posterior methods are measured by."""

from __future__ import annotations

import math

import torch
from oracles import component_covariances
from torch import Tensor

from scoresde import SDE, Denoiser, GaussianMixtureDenoiser, Prediction, Rng
from scoresde.inverse import Observation


def matrix(operator, event_shape: tuple[int, ...]) -> Tensor:
    """A as a matrix (m, D), float64: its columns are what it makes of the unit vectors."""
    size = math.prod(event_shape)
    basis = torch.eye(size, dtype=torch.float64).reshape(size, *event_shape)
    return operator(basis).flatten(1).mT


def posterior(prior: GaussianMixtureDenoiser, a: Tensor, y: Tensor, std: float, sde: SDE | None = None):
    """p(x_0 | y) for one y (m,): a mixture of the same number of components, exact under every SDE."""
    covs, means, log_weights = [], [], []
    noise = std**2 * torch.eye(len(a), dtype=torch.float64)
    for mean, cov, log_weight in zip(prior.means, component_covariances(prior), prior.log_weights, strict=True):
        s = a @ cov @ a.mT + noise
        gain = torch.linalg.solve(s, a @ cov).mT
        residual = y - a @ mean
        means.append(mean + gain @ residual)
        part = cov - gain @ a @ cov
        covs.append(0.5 * (part + part.mT))
        log_weights.append(log_weight - 0.5 * (residual @ torch.linalg.solve(s, residual) + torch.logdet(s)))
    weights = (torch.stack(log_weights) - max(log_weights)).exp().clamp(min=1e-300)
    means = torch.stack(means).reshape(-1, *prior.event_shape)
    return GaussianMixtureDenoiser(means, torch.stack(covs), weights, prior.sde if sde is None else sde)


def log_evidence(prior: GaussianMixtureDenoiser, a: Tensor, y: Tensor, std: float, x: Tensor, t: Tensor) -> Tensor:
    """log p(y | x_t) (B,), exact: log p(y, x_t) − log p(x_t), each a mixture; differentiable in x."""
    alpha, sigma = prior.sde.marginal(t.double())
    size = a.shape[1]
    eye, noise = torch.eye(size, dtype=torch.float64), std**2 * torch.eye(len(a), dtype=torch.float64)
    flat, joint, alone = x.double().flatten(1), [], []
    for mean, cov, log_weight in zip(prior.means, component_covariances(prior), prior.log_weights, strict=True):
        marginal = alpha**2 * cov + sigma**2 * eye
        cross = alpha * cov @ a.mT
        whole = torch.cat([torch.cat([marginal, cross], 1), torch.cat([cross.mT, a @ cov @ a.mT + noise], 1)], 0)
        both = torch.cat([flat - alpha * mean, (y - a @ mean).expand(len(flat), -1)], 1)
        joint.append(log_weight + _log_normal(both, whole))
        alone.append(log_weight + _log_normal(flat - alpha * mean, marginal))
    return torch.stack(joint).logsumexp(0) - torch.stack(alone).logsumexp(0)


def _log_normal(residual: Tensor, cov: Tensor) -> Tensor:
    factor = torch.linalg.cholesky(cov)
    white = torch.linalg.solve_triangular(factor, residual.mT, upper=False)
    return -0.5 * (white**2).sum(0) - factor.diagonal().log().sum() - 0.5 * len(cov) * math.log(2 * math.pi)


class Shifted(Denoiser):
    """The prior's prediction, shifted by the exact ∇ log p(y | x_t)."""

    def __init__(self, prior: GaussianMixtureDenoiser, a: Tensor, y: Tensor, std: float):
        super().__init__(prior.sde, prior.data_std)
        self.prior, self.a, self.y, self.std = prior, a, y, std

    def forward(self, x: Tensor, t: Tensor, cond=None) -> Prediction:
        slope = torch.func.grad(lambda z: log_evidence(self.prior, self.a, self.y, self.std, z, t).sum())(x)
        return self.prior(x, t).shift(slope.to(x.dtype))


def mode_weights(mixture: GaussianMixtureDenoiser, x: Tensor) -> Tensor:
    """Share of the samples that each component answers for, (K,), by exact responsibilities."""
    logits = mixture._components(x, torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64))[2]
    return logits.softmax(-1).mean(0)


def observed(prior: GaussianMixtureDenoiser, operator, std: float, seed: int = 0) -> tuple[Observation, Tensor, Tensor]:
    """An observation of one draw of the prior: (observation, A (m, D), y (m,))."""
    x0 = prior.sample(1, rng=Rng(seed), dtype=torch.float64)
    seen = operator(x0)
    noise = Rng(seed + 1).normal(seen.shape, dtype=torch.float64)
    # what no x reaches, as outside of a mask, stays 0
    reached = (matrix(operator, prior.event_shape) != 0).any(1).reshape(seen.shape[1:])
    y = (seen + std * noise * reached)[0]
    return Observation(y, operator, std), matrix(operator, prior.event_shape), y.flatten()
