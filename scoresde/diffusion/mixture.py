"""The exact denoiser of a Gaussian mixture: the oracle of tests and benchmarks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..noise.rng import Rng
from ..ops.broadcast import as_double, as_time, beside, host, samples
from .conditions import Cond
from .denoiser import Denoiser
from .prediction import Prediction
from .sde import SDE


class GaussianMixtureDenoiser(Denoiser):
    r"""E[x_0 | x_t] and E[ε | x_t] of x_0 ~ Σ_k w_k N(μ_k, C_k), in closed form under every SDE.

    x_t is a mixture too, Σ_k w_k N(α μ_k, α²C_k + σ²I). With C_k = U diag(ℓ) Uᵀ, r = Uᵀ(x − αμ_k) and
    v = α²ℓ + σ², component k says x̂_0 = μ_k + U(αℓ r/v) and ε̂ = U(σ r/v), weighted by its responsibility;
    nothing is divided by σ, so small noise costs no accuracy. Computed in float64, returned in the dtype of x. Its
    prior is the exact marginal at t_max, so what a sampler or likelihood gets wrong is its own doing.

    Args:
        means: (K, D) or (K, *event).
        covs: () or (K,) isotropic variance, (K, D) or (K, *event) diagonal, (K, D, D) full. ≥ 0.
        weights: (K,), positive; normalised here.
        sde: the forward process.

    Raises:
        ValueError: shapes that do not fit, weights that are not positive, a covariance that is not one.
    """

    def __init__(self, means: Tensor, covs: Tensor | float, weights: Tensor, sde: SDE):
        super().__init__(sde)
        means = as_double(means)
        covs = torch.as_tensor(covs, dtype=torch.float64, device=means.device)
        weights = torch.as_tensor(weights, dtype=torch.float64, device=means.device)
        if means.ndim < 2 or weights.shape != means.shape[:1]:
            raise ValueError(
                f"Expected means (K, D) and weights (K,); got {tuple(means.shape)} and {tuple(weights.shape)}."
            )
        if not bool((weights > 0).all()):
            raise ValueError(f"Mixture weights must be positive; got {weights.tolist()}.")
        self.event_shape = tuple(means.shape[1:])
        components, dims = len(means), math.prod(self.event_shape)
        flat = means.reshape(components, dims)
        variances, basis = _spectrum(covs, components, dims, means.shape)
        if not bool((variances >= 0).all()):
            raise ValueError(f"Covariances must not be negative; the smallest variance is {float(variances.min())}.")
        self.register_buffer("means", flat)
        self.register_buffer("variances", variances)
        self.register_buffer("basis", basis)
        self.register_buffer("log_weights", (weights / weights.sum()).log())
        self._set_prior_moments()

    means: Tensor
    variances: Tensor
    basis: Tensor | None
    log_weights: Tensor

    def _set_prior_moments(self) -> None:
        weights = self.log_weights.exp()
        mean = weights @ self.means
        within = self.variances if self.basis is None else torch.einsum("kij,kj->ki", self.basis**2, self.variances)
        var = weights @ (within + (self.means - mean) ** 2)
        self.data_mean, self.data_var = mean.reshape(self.event_shape), var.reshape(self.event_shape)
        self.data_std = math.sqrt(float(var.mean())) or 1.0  # data that are one point have no scale
        self.roughness = 0.0

    def _components(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Residuals r (B, K, D) in each basis, their variances v, and log w_k N(x; …) (B, K)."""
        if x[0].numel() != self.means.shape[1]:
            raise ValueError(
                f"The mixture is over {self.means.shape[1]} dimensions; got a batch of shape {tuple(x.shape)}."
            )
        alpha, sigma = (value.double().reshape(-1, 1, 1) for value in (alpha, sigma))
        residual = x.double().flatten(1)[:, None] - alpha * self.means
        if self.basis is not None:
            residual = _rotate(residual, self.basis)
        variance = (alpha**2 * self.variances + sigma**2).expand(residual.shape)
        log_normal = -0.5 * (residual**2 / variance + variance.log() + math.log(2 * math.pi)).sum(-1)
        return residual, variance, log_normal + self.log_weights

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        x = samples(x, "x_t")
        scales = self.sde.at(t, x)
        alpha, sigma = (beside(value, x) for value in self.sde.marginal(scales.t.double()))
        residual, variance, logits = self._components(x, alpha, sigma)
        responsibility = logits.softmax(-1)
        whitened = residual / variance
        alpha, sigma = alpha.reshape(-1, 1, 1), sigma.reshape(-1, 1, 1)
        signal, noise = alpha * self.variances * whitened, sigma * whitened
        if self.basis is not None:
            signal, noise = _rotate(signal, self.basis.mT), _rotate(noise, self.basis.mT)
        x0 = torch.einsum("bk,bkd->bd", responsibility, self.means + signal)
        eps = torch.einsum("bk,bkd->bd", responsibility, noise)
        return Prediction(x0.reshape(x.shape).to(x.dtype), eps.reshape(x.shape).to(x.dtype), scales)

    def log_prob(self, x: Tensor, t: Tensor | float = 0) -> Tensor:
        """log p_t(x) in nats, shape (B,), for x (B, *event); `t=0` is the data themselves, without any noise."""
        if not isinstance(t, Tensor) and t == 0:
            alpha, sigma = host(1.0), host(0.0)
        else:
            alpha, sigma = self.sde.marginal(as_time(t, x).double())
        return self._components(x, alpha.to(x.device), sigma.to(x.device))[2].logsumexp(-1)

    def prior_sample(self, shape: tuple[int, ...], *, rng, dtype: torch.dtype | None = None, device=None) -> Tensor:
        """x_T of shape (B, *event), exact draws of the marginal at t_max."""
        x0 = self.sample(shape[0], rng=rng, dtype=torch.float64).reshape(shape)
        z = self.sde.perturb(x0, as_time(self.sde.t_max, x0), rng.normal_like(x0))
        return z.to(device or z.device, dtype or torch.float32)

    def prior_log_prob(self, z: Tensor) -> Tensor:
        """Exact log-density of the marginal at t_max in nats, shape (B,)."""
        return self.log_prob(z, self.sde.t_max)

    def sample(self, n: int, *, rng: Rng, dtype: torch.dtype | None = None) -> Tensor:
        """n exact draws of the data, (n, *event), in `dtype` (default: float32)."""
        device = self.means.device
        edges = self.log_weights.exp().cumsum(0)
        index = torch.searchsorted(edges, rng.uniform((n,), dtype=torch.float64, device=device))
        index = index.clamp(max=len(edges) - 1)
        draw = rng.normal((n, self.means.shape[1]), dtype=torch.float64, device=device)
        draw = draw * self.variances.expand_as(self.means)[index].sqrt()
        if self.basis is not None:
            draw = torch.einsum("bij,bj->bi", self.basis[index], draw)
        sample = self.means[index] + draw
        return sample.reshape(n, *self.event_shape).to(dtype or torch.float32)


def _rotate(vectors: Tensor, basis: Tensor) -> Tensor:
    """v_k @ U_k for vectors (B, K, D) and matrices (K, D, D): one by one, as vmap would copy a batch of matrices."""
    return torch.stack([rows @ matrix for rows, matrix in zip(vectors.unbind(1), basis, strict=True)], 1)


def _spectrum(covs: Tensor, components: int, dims: int, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
    """Variances broadcastable to (K, D) and the eigenbasis (K, D, D), None where the axes are the basis."""
    if covs.ndim == 0:
        return covs.expand(components, 1), None
    if covs.shape == (components,):
        return covs[:, None], None
    if covs.shape == shape or covs.shape == (components, dims):
        return covs.reshape(components, dims), None
    if covs.shape == (components, dims, dims):
        if not torch.allclose(covs, covs.mT, rtol=1e-5, atol=1e-8):
            raise ValueError("A full covariance must be symmetric.")
        values, vectors = torch.linalg.eigh(covs)
        # eigh leaves round-off of either sign where a covariance is singular
        floor = -1e-9 * values.abs().amax(-1, keepdim=True)
        return torch.where((values < 0) & (values >= floor), 0.0, values), vectors
    raise ValueError(
        f"covs must be (), ({components},), ({components}, {dims}) or ({components}, {dims}, {dims}); "
        f"got {tuple(covs.shape)}."
    )
