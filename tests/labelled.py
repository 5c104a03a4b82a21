"""A class-conditional mixture of which everything is known: p(x), p(x|y), p(y|x_t). `from labelled import …`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scoresde import SDE, Cond, Denoiser, GaussianMixtureDenoiser, Prediction, Rng

CLASSES = 3


class Labelled(Denoiser):
    """Label y keeps the components of class y of a mixture of six; the label 3, or no condition, keeps them all.

    Args:
        sde: the process.
        knows_null: whether it says so, as a network with a null token does.
        event_shape: of one sample.

    Attributes:
        calls: batch size of each call so far.
        parts: the mixture of each class, and last the whole one.
    """

    def __init__(self, sde: SDE, knows_null: bool = True, event_shape: tuple[int, ...] = (2,)):
        super().__init__(sde)
        generator = torch.Generator().manual_seed(3)
        self.means = 1.2 * torch.randn(6, *event_shape, generator=generator, dtype=torch.float64)
        self.vars = 0.05 + 0.2 * torch.rand(6, generator=generator, dtype=torch.float64)
        weights, self.of = torch.tensor([1.0, 2, 1, 3, 2, 1]).double() / 10, torch.tensor([0, 1, 2, 0, 1, 2])
        keep = torch.stack([self.of == k for k in range(CLASSES)] + [self.of >= 0])
        self.parts = [GaussianMixtureDenoiser(self.means[k], self.vars[k], weights[k], sde) for k in keep]
        self.priors = torch.stack([weights[k].sum() for k in keep])
        self.log_weights = torch.where(keep, weights, 0).log() - self.priors[:, None].log()  # (classes + 1, 6)
        whole = self.whole = self.parts[-1]
        self.data_std, self.data_mean, self.data_var = whole.data_std, whole.data_mean, whole.data_var
        self.knows_null, self.calls = knows_null, []

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        self.calls.append(len(x))
        assert cond is None or (isinstance(cond, Tensor) and cond.shape == (len(x),))
        y = torch.full((len(x),), CLASSES) if cond is None else cond
        scales = self.sde.at(t, x)
        rest, var, alpha, sigma, logs = self._components(x, t)
        share = (logs + self.log_weights[y]).softmax(1)[..., None]
        x0 = (share * (self.means.flatten(1) + alpha * self.vars[:, None] * rest / var)).sum(1)
        eps = (share * sigma * rest / var).sum(1)
        return Prediction(x0.reshape(x.shape).to(x.dtype), eps.reshape(x.shape).to(x.dtype), scales)

    def null(self, cond: Cond) -> Cond:
        return torch.tensor([CLASSES]) if self.knows_null and cond is not None else None

    def log_prob(self, x: Tensor, t: Tensor | float, y: Tensor) -> Tensor:
        """log p_t(x | y), nats (B,)."""
        return (self._components(x, t)[-1] + self.log_weights[y]).logsumexp(1)

    def posterior(self, x: Tensor, t: Tensor | float) -> Tensor:
        """log p(y | x_t) of every class, (B, 3)."""
        logs = self._components(x, t)[-1][:, None] + self.log_weights[:-1]
        return (logs.logsumexp(2) + self.priors[:-1].log()).log_softmax(1)

    def classify(self, x: Tensor, t: Tensor, y: Cond) -> Tensor:
        """log p(y | x_t), (B,)."""
        assert isinstance(y, Tensor)
        return self.posterior(x, t).gather(1, y[:, None])[:, 0].to(x.dtype)

    def sample(self, y: Tensor, *, rng: Rng) -> Tensor:
        """One exact draw of p(x | y) for each y (B,), float64."""
        each = torch.stack([part.sample(len(y), rng=rng, dtype=torch.float64) for part in self.parts], 1)
        return each[torch.arange(len(y)), y]

    def prior_sample(self, shape, *, rng, dtype=None, device=None):
        return self.whole.prior_sample(shape, rng=rng, dtype=dtype, device=device)

    def prior_log_prob(self, z: Tensor) -> Tensor:
        return self.whole.prior_log_prob(z)

    def prior_log_prob_given(self, z: Tensor, cond: Cond) -> Tensor:
        assert cond is None or isinstance(cond, Tensor)
        return self.prior_log_prob(z) if cond is None else self.log_prob(z, self.sde.t_max, cond)

    def _components(self, x: Tensor, t: Tensor | float) -> tuple[Tensor, ...]:
        """x − αμ_k (B, 6, D), α²c_k + σ² (B, 6, 1), α, σ (B or 1, 1, 1), and log N(x; αμ_k, …) (B, 6)."""
        alpha, sigma = (v.reshape(-1, 1, 1) for v in self.sde.marginal(torch.as_tensor(t, dtype=torch.float64)))
        rest = x.double().flatten(1)[:, None] - alpha * self.means.flatten(1)
        var = alpha**2 * self.vars[:, None] + sigma**2
        return rest, var, alpha, sigma, -0.5 * (rest**2 / var + (2 * math.pi * var).log()).sum(2)
