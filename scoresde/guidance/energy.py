"""Scores added to a prediction, P.shift(δ): gradients of energies and of classifiers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..diffusion.conditions import Cond
from ..diffusion.denoiser import Denoiser, DenoiserWrapper
from ..diffusion.prediction import Prediction
from ..ops.broadcast import as_time, expand_as_batch, per_sample
from .mixing import check_same
from .scale import Scale, checked, strength
from .tilt import by_slope, by_value


class Energy(DenoiserWrapper):
    r"""Samples of p(x_0) e^{−s E}, by δ = −s ∇_x E added to the score.

    Exact if E(x_t, t) = −log E[e^{−E(x_0)} | x_t], as a classifier of noisy x_t is trained to be. An energy of x̂_0
    (`of="x0"`; Bansal et al. 2023; Chung et al. 2023) is the first-order guess of that, at the cost of a backward pass
    through the denoiser. It is exact for linear E of Gaussian data. Else it pulls too hard where p(x_0 | x_t) is wide,
    for Gaussians and quadratic E by 1 + E″ Var(x_0 | x_t), and samples go too far and lose variance: of N(0.4, 0.8)
    tilted by E = 1.5 (x + 0.6)², exactly N(−0.31, 0.24), the ODE makes mean −0.75 and variance 0.08, the SDE −0.52 and
    0.17 (noise forgives).

    Args:
        denoiser: of p.
        energy: (z (B, *event), t (B,), cond) -> (B,), differentiable, in nats.
        scale: s, a number or a function of λ.
        of: "xt", z is x_t; or "x0", z is x̂_0.
        conditional: whether the denoiser is given the condition too.

    Raises:
        ValueError: `of` is neither; or, when called, an energy that is not (B,).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        energy: Callable[[Tensor, Tensor, Cond], Tensor],
        scale: Scale = 1.0,
        *,
        of: str = "xt",
        conditional: bool = True,
    ):
        super().__init__(denoiser)
        self.trials = None
        if of not in ("xt", "x0"):
            raise ValueError(f"An energy is of 'xt' or of 'x0'; got {of!r}.")
        self.energy, self.scale, self.of, self.conditional = energy, checked(scale), of, bool(conditional)
        self.prior_evaluations += 2 * (of == "x0")

    def null(self, cond: Cond) -> Cond:
        return None  # an energy knows no null: free guidance around it asks twice, once with no condition

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        p, pull = self._pull(x, as_time(t, x), cond)
        return p.shift(pull)

    def prior_log_prob_given(self, z: Tensor, cond: Cond) -> Tensor:
        inner = self.denoiser.prior_log_prob_given(z, cond if self.conditional else None)
        if self.of == "xt":
            return inner + by_value(self, lambda x: -_at_last(self, self.energy, x, cond), z)
        return inner + by_slope(self, lambda x: self._pull(x, self.sde.terminal, cond)[1], z)

    def _pull(self, x: Tensor, t: Tensor, cond: Cond) -> tuple[Prediction, Tensor]:
        """The prediction inside, and δ."""
        inner = cond if self.conditional else None
        times = per_sample(t, x)
        if self.of == "xt":
            slope, p = _slope(lambda z: self.energy(z, times, cond), x), self.denoiser(x, t, inner)
        else:

            def total(z: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
                p = self.denoiser(z, t, inner)
                return _summed(self.energy(p.x0, times, cond), z), (p.x0, p.eps)

            slope, (x0, eps) = torch.func.grad(total, has_aux=True)(x)
            p = Prediction(x0, eps, self.sde.at(t, x))
        return p, -expand_as_batch(strength(self.scale, self.sde.log_snr(t)), x).to(x.dtype) * slope


class Classifier(DenoiserWrapper):
    r"""Samples of p(x) p(y|x)^s by the gradient of a classifier of noisy x_t (Dhariwal & Nichol 2021, alg. 1 and 2).

    Exact at s = 1 if the classifier is. At other s the noised p p(y|·)^s is not p_t p_t(y|·)^s, and samples are only
    about those: for s > 1 they crowd where the classifier is sure. Without a condition it is the denoiser unguided.

    Args:
        denoiser: of p(x); it is given y only if `conditional`.
        log_prob: (x_t (B, *event), t (B,), y) -> log p(y | x_t) (B,) in nats, such as a `NoisyClassifier`.
        scale: s, a number or a function of λ.
        conditional: whether the denoiser is given y too.

    Raises:
        ValueError: a classifier whose attribute `sde` is another SDE; when called, a log-probability
            that is not (B,).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        log_prob: Callable[[Tensor, Tensor, Cond], Tensor],
        scale: Scale = 1.0,
        *,
        conditional: bool = False,
    ):
        super().__init__(denoiser)
        self.trials = None
        check_same(denoiser.sde, getattr(log_prob, "sde", denoiser.sde))  # a plain function has none
        self.log_prob, self.scale, self.conditional = log_prob, checked(scale), bool(conditional)

    def null(self, cond: Cond) -> Cond:
        return None  # a classifier knows no null

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        t = as_time(t, x)
        p = self.denoiser(x, t, cond if self.conditional else None)
        if cond is None:
            return p
        times = per_sample(t, x)
        slope = _slope(lambda z: self.log_prob(z, times, cond), x)
        return p.shift(expand_as_batch(strength(self.scale, self.sde.log_snr(t)), x).to(x.dtype) * slope)

    def prior_log_prob_given(self, z: Tensor, cond: Cond) -> Tensor:
        inner = self.denoiser.prior_log_prob_given(z, cond if self.conditional else None)
        return inner if cond is None else inner + by_value(self, lambda x: _at_last(self, self.log_prob, x, cond), z)


def _at_last(
    guided: Energy | Classifier, fn: Callable[[Tensor, Tensor, Cond], Tensor], x: Tensor, cond: Cond
) -> Tensor:
    """s fn at t_max, (B,)."""
    value = fn(x, per_sample(guided.sde.terminal, x), cond)
    return strength(guided.scale, guided.sde.log_snr(guided.sde.terminal)).to(value) * value


def _slope(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """∇_x of (B, *event) -> (B,), sample by sample; under no_grad too, and differentiable."""
    return torch.func.grad(lambda z: _summed(fn(z), z))(x)


def _summed(value: Tensor, x: Tensor) -> Tensor:
    if value.shape != (len(x),):
        raise ValueError(f"One number per sample is expected, ({len(x)},); got shape {tuple(value.shape)}.")
    return value.sum()
