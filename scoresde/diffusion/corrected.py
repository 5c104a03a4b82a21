r"""A network that corrects the exact denoiser of a Gaussian mixture, which was fitted to the training data.

Tables of a few thousand rows are where a mixture is hard to beat: it knows scales, correlations and exact linear
relations from the first step on. Here the network starts from it (its output is zero at the start) and learns what the
mixture gets wrong, so the model is a mixture where data are few and a diffusion model where they are many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import whole
from ..ops.broadcast import samples
from .conditions import Cond
from .denoiser import Preconditioned
from .parameterization import Parameterization
from .prediction import Prediction
from .sde import SDE

_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 30, 40)
_SHRUNK = (0.0, 0.03, 0.1, 0.3, 0.6, 1.0)


class Corrected(Preconditioned):
    r"""x̂_0 and ε̂ of x_0 ~ Σ_k w_k N(μ_k, C_k), and a network's F on top, read as the parameterisation says.

    The mixture is that of `GaussianMixtureDenoiser`, in the precision of x; `prepare` fits it. Until then it is one
    standard normal distribution, which is what the row EDM(1) has for F = 0.

    Args:
        network, sde, parameterization, sigma_data, noise_input, scale_input, autocast: see `Preconditioned`.
        event_shape: shape (D,) of one sample.
        components: most components that are tried, ≥ 1.

    Raises:
        ValueError: samples that are no vectors, no components.
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        sde: SDE,
        parameterization: Parameterization,
        *,
        event_shape: Sequence[int],
        components: int = 40,
        sigma_data: float = 1.0,
        noise_input: Callable[[SDE, Tensor], Tensor] | None = None,
        scale_input: bool = True,
        autocast: str | None = None,
    ):
        how: dict[str, Any] = {"noise_input": noise_input, "scale_input": scale_input, "autocast": autocast}
        super().__init__(network, sde, parameterization, sigma_data=sigma_data, **how)
        if len(event_shape) != 1:
            raise ValueError(f"A mixture is of vectors, samples (D,); these have the shape {tuple(event_shape)}.")
        self.components, dims = whole(components, "components"), event_shape[0]
        # device=None: where the caller makes modules
        means = torch.zeros((self.components, dims), dtype=torch.float32, device=None)
        axes = torch.eye(dims, dtype=torch.float32, device=None)
        self.register_buffer("means", means)
        self.register_buffer("variances", torch.ones_like(means))
        self.register_buffer("basis", axes.repeat(self.components, 1, 1))
        self.register_buffer("log_weights", torch.full_like(means[:, 0], -math.log(self.components)))

    fits = 20_000
    means: Tensor
    variances: Tensor
    basis: Tensor
    log_weights: Tensor

    @torch.no_grad()
    def prepare(self, x0: Tensor, held_out: Tensor) -> str:
        weights, means, covs = fit_mixture(x0, held_out, self.components)
        values, vectors = torch.linalg.eigh(torch.from_numpy(covs))
        k = len(weights)
        self.log_weights.fill_(-math.inf)
        for kept, found in (
            (self.log_weights, torch.from_numpy(weights).log()),
            (self.means, torch.from_numpy(means)),
            (self.variances, values.clamp(min=0)),
            (self.basis, vectors),
        ):
            kept[:k] = found.to(kept)
        return f"The network corrects a mixture of {k} Gaussians."

    def mixture(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """x̂_0 and ε̂ (B, D) of the mixture at x_t (B, D)."""
        k, dims = self.means.shape
        axes = self.basis.to(x.dtype).transpose(0, 1).reshape(dims, k * dims)  # one product for all components
        centres = (self.basis.mT @ self.means[..., None])[..., 0].to(x.dtype)
        alpha, sigma = alpha[..., None], sigma[..., None]
        residual = (x @ axes).unflatten(1, (k, dims)) - alpha * centres
        variance = alpha**2 * self.variances + sigma**2
        logits = self.log_weights - 0.5 * (residual**2 / variance + variance.log()).sum(-1)
        share = logits.softmax(-1)
        whitened = share[..., None] * residual / variance
        x0 = share @ self.means.to(x.dtype) + (alpha * self.variances * whitened).flatten(1) @ axes.T
        return x0, (sigma * whitened).flatten(1) @ axes.T

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        x = samples(x, "x_t")
        scales = self.sde.at(t, x)
        start = self.mixture(x, scales.alpha.expand(len(x), 1), scales.sigma.expand(len(x), 1))
        output = self.output(x, scales, cond)
        p, q = self.parameterization.coefficients(scales)
        det = scales.alpha * q - scales.sigma * p
        return Prediction(start[0] - scales.sigma / det * output, start[1] + scales.alpha / det * output, scales)


def fit_mixture(x0: Tensor, held_out: Tensor, components: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(weights (K,), means (K, D), covariances (K, D, D)): the most likely on held-out samples of several mixtures.

    Tried are K = 1 … `components`, by expectation maximisation, and each with its covariances shrunk towards their
    mean, C_k ← (1 − γ) C_k + γ Σ_j w_j C_j, which few samples need.

    Args:
        x0, held_out: (n, D), model data.

    Raises:
        ImportError: scikit-learn is missing.
    """
    try:
        from sklearn.mixture import GaussianMixture
    except ImportError as error:
        raise ImportError("A mixture is fitted by scikit-learn: pip install 'scoresde[data]'.") from error

    x, other = (values.double().cpu().numpy() for values in (x0, held_out))
    best, found = -math.inf, None
    for count in [k for k in _COUNTS if k <= components and (k == 1 or len(x) >= 4 * k)]:
        model = GaussianMixture(count, random_state=0, reg_covar=1e-6).fit(x)
        covs, mean = model.covariances_, np.einsum("k,kij->ij", model.weights_, model.covariances_)
        for share in _SHRUNK if count > 1 else (0.0,):
            shrunk = (1 - share) * covs + share * mean
            model.precisions_cholesky_ = np.linalg.inv(np.linalg.cholesky(shrunk)).swapaxes(1, 2)
            if (value := model.score(other)) > best:
                best, found = value, (model.weights_, model.means_, shrunk)
    assert found is not None
    return found
