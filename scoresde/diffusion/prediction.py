"""The estimate of a denoiser at x_t: both end points of its line, x̂_0 and ε̂."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..ops.broadcast import coefficient
from .sde import SDE, Scales


@dataclass(frozen=True)
class Prediction:
    """The pair (x̂_0, ε̂), each of the shape of x_t, with the invariant `x_t = α x̂_0 + σ ε̂`.

    Attributes:
        x0: x̂_0 = E[x_0 | x_t], shape (B, *event).
        eps: ε̂ = E[ε | x_t], shape (B, *event).
        scales: α, σ at the time of the prediction.
        share: v', where in each dimension the log-variance of a reverse step is between that of the posterior (0) and
            of the forward move (1), as `Split` learns it; None where the model says nothing of it.
    """

    x0: Tensor
    eps: Tensor
    scales: Scales
    share: Tensor | None = None

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
        """(1 − w) self + w other, w a number or () or (B,): affine, so the invariant holds for w > 1 too (guidance).

        `share` is that of `other`, towards which is guided, and if that has none one's own.
        """
        if isinstance(weight, Tensor):
            weight = coefficient(weight, self.x0)
        # in this form w = 0 and w = 1 are the one and the other, bit for bit
        x0, eps = ((1 - weight) * a + weight * b for a, b in ((self.x0, other.x0), (self.eps, other.eps)))
        return Prediction(x0, eps, self.scales, self.share if other.share is None else other.share)

    def shift(self, score: Tensor) -> Prediction:
        """Add δ = ∇ log p(y|x_t) to the score: x̂_0 += σ²δ/α, ε̂ −= σδ (Bayes' rule; the invariant holds)."""
        alpha, sigma = self.scales.alpha, self.scales.sigma
        return replace(self, x0=self.x0 + sigma**2 / alpha * score, eps=self.eps - sigma * score)


def _flatten(p: Prediction) -> tuple[list[Tensor], SDE | None]:
    scales = p.scales
    rates = scales.known or scales.find_rates()
    # a program that is exported knows tensors alone
    sde = None if torch.compiler.is_compiling() else scales.sde
    share = [] if p.share is None else [p.share]
    return [p.x0, p.eps, scales.t, scales.alpha, scales.sigma, *rates, *share], sde


def _flatten_with_keys(p: Prediction) -> tuple[list[tuple[pytree.KeyEntry, Tensor]], SDE | None]:
    values, sde = _flatten(p)
    names = ("x0", "eps", "t", "alpha", "sigma", "alpha_rate", "sigma_rate", "share")
    return [(pytree.GetAttrKey(name), value) for name, value in zip(names, values, strict=False)], sde


def _unflatten(values: Iterable[Tensor], sde: SDE | None) -> Prediction:
    x0, eps, t, alpha, sigma, d_alpha, d_sigma, *share = values
    scales = Scales(cast(SDE, sde), t, alpha, sigma, x0, (d_alpha, d_sigma))
    return Prediction(x0, eps, scales, *share)


# `torch.export` takes and returns trees of tensors; so do `torch.func` and `torch.vmap`
pytree.register_pytree_node(
    Prediction,
    _flatten,
    _unflatten,
    serialized_type_name="scoresde.Prediction",
    flatten_with_keys_fn=_flatten_with_keys,
    to_dumpable_context=lambda sde: None,
    from_dumpable_context=lambda nothing: None,
)
