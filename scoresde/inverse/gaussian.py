r"""Posterior denoisers by one formula: x_0 given x_t is approximated by N(x̂_0, V), and Bayes' rule for a linear A gives

    log p(y|x_t) ≈ log N(y; A x̂_0, S),   S = A V Aᵀ + std² I,
    δ = ∇ log p(y|x_t) = Jᵀ Aᵀ S⁻¹ (y − A x̂_0),   J = ∂x̂_0/∂x_t.

The exact covariance of x_0 given x_t is Cov[x_0|x_t] = (σ²/α) J under every SDE (x̂_0 = (x_t + σ² score)/α,
differentiated once more), so J is symmetric, and Jᵀu, a backward pass, is J u. The methods differ in the V that they
take for it. Each makes one network call; where A is not linear, its derivative at x̂_0 takes its place. V or S is held
fixed while x_t is differentiated: for a Gaussian prior that is exact, for others it is one more bias. Where V is so
small that δ would lead further from y than x̂_0 is, by the exact covariance, it is shortened (`_step_length`).
"""

from __future__ import annotations

import abc
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import positive
from ..diffusion.denoiser import Cond, Denoiser, DenoiserWrapper
from ..diffusion.prediction import Prediction
from ..guidance.tilt import by_slope
from ..ops.broadcast import expand_as_batch
from .conjugate import checked, solve
from .observation import Linear, Map, Observation


class PosteriorPrediction(NamedTuple):
    """What one network call says about x_t.

    Attributes:
        prior: the prediction without y.
        posterior: the prediction given y.
        log_prob: the method's approximation of log p(y|x_t), (B,), in nats. Where y has more entries than the method
            has iterations, log det S is that of std² alone (`conjugate.solve`).
    """

    prior: Prediction
    posterior: Prediction
    log_prob: Tensor


class Posterior(DenoiserWrapper, abc.ABC):
    """A denoiser of p(x_0 | y): it approximates E[x_0 | x_t, y].

    Args:
        denoiser: of p(x_0).
        observation: y, A and std.
    """

    def __init__(self, denoiser: Denoiser, observation: Observation):
        super().__init__(denoiser)
        self.observation, self.trials = observation, None
        self.prior_evaluations += 2

    def null(self, cond: Cond) -> Cond:
        return self.observation.null(cond, self.denoiser)

    @abc.abstractmethod
    def predict(self, x: Tensor, t: Tensor, cond: Cond = None) -> PosteriorPrediction:
        """The predictions without and with y at x (B, *event), from one call of the denoiser."""

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        return self.predict(x, t, cond).posterior

    def prior_log_prob_given(self, z: Tensor, cond: Cond) -> Tensor:
        """log p_T(z|y) in nats, (B,): log p_T(z|y)/p_T(z) is integrated from its gradient δ, by two more calls."""

        def slope(x: Tensor) -> Tensor:
            found = self.predict(x, self.sde.terminal, cond)
            return found.posterior.score - found.prior.score

        rest = self.observation.split(cond)[1]
        return self.denoiser.prior_log_prob_given(z, rest) + by_slope(self, slope, z)


def with_jacobian(denoiser: Denoiser, x: Tensor, t: Tensor, cond: Cond) -> tuple[Prediction, Map]:
    """The prediction, and u -> Jᵀu for J = ∂x̂_0/∂x_t; one network call, and a backward pass for each u."""

    def ends(z: Tensor) -> tuple[Tensor, Tensor]:
        p = denoiser(z, t, cond)
        return p.x0, p.eps

    x0, back, eps = torch.func.vjp(ends, x, has_aux=True)  # type: ignore[misc]
    return Prediction(x0, eps, denoiser.sde.at(t, x)), lambda u: back(u.to(x0.dtype))[0]


class Solving(Posterior, abc.ABC):
    """A posterior denoiser that solves with S = A V Aᵀ + std² I.

    Args:
        denoiser, observation: as in `Posterior`.
        iterations: the most products with A V Aᵀ, ≥ 1. A y of at most as many entries is solved exactly, a larger one
            by conjugate gradients.
        tolerance: relative residual, in (0, 1), at which these stop.
    """

    def __init__(self, denoiser: Denoiser, observation: Observation, *, iterations: int = 64, tolerance: float = 1e-6):
        super().__init__(denoiser, observation)
        self.iterations, self.tolerance = checked(iterations, tolerance)

    def _solve(self, near: Linear, covariance: Map) -> tuple[Tensor, Tensor]:
        """u = S⁻¹(y − A x̂_0), float64 (B, *y), and log N(y; A x̂_0, S), (B,)."""
        u, log_det = solve(
            lambda v: near.forward(covariance(near.adjoint(v))),
            near.variance,
            near.residual,
            iterations=self.iterations,
            tolerance=self.tolerance,
        )
        size = near.reached.flatten(1).sum(1)
        square = (near.residual * u).flatten(1).sum(1)
        return u, -0.5 * (square + log_det + size * math.log(2 * math.pi))


class Matched(Solving, abc.ABC):
    """A posterior denoiser by the formula of this module, for the V of a subclass.

    Args:
        denoiser, observation: as in `Posterior`.
        iterations, tolerance: as in `Solving`.
    """

    @abc.abstractmethod
    def covariance(self, p: Prediction, pull: Map) -> Map:
        """v (B, *event) -> V v, from a prediction and u -> Jᵀu."""

    def predict(self, x: Tensor, t: Tensor, cond: Cond = None) -> PosteriorPrediction:
        measured, rest = self.observation.split(cond)
        p, pull = with_jacobian(self.denoiser, x, t, rest)
        near = self.observation.near(p.x0, measured)
        u, log_prob = self._solve(near, self.covariance(p, pull))
        back = near.adjoint(u)
        slope = pull(back)
        length = expand_as_batch(_step_length(near, u, _uncertainty(p, back, slope)), x).to(x.dtype)
        return PosteriorPrediction(p, p.shift(length * slope), log_prob)


class PiGDM(Matched):
    r"""ΠGDM (Song et al. 2023, "Pseudoinverse-guided diffusion models", eq. 7–8): V = r² I, r² = σ²c²/(α²c² + σ²).

    That r² is the variance of x_0 given x_t for data N(0, c² I) under any SDE; the paper has c = 1 and VE, and another
    factor r² on δ, which is left out. Exact for data N(μ, c² I). Bias: all directions are taken to be equally
    uncertain. Where data vary less than c, δ is too weak at large noise; between modes further apart it is too strong.
    Cost: one backward pass.

    Args:
        denoiser, observation: as in `Posterior`; std may be 0.
        sigma_data: c > 0; None takes the denoiser's.
        iterations, tolerance: as in `Matched`; products with A and Aᵀ only.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        observation: Observation,
        sigma_data: float | None = None,
        *,
        iterations: int = 64,
        tolerance: float = 1e-6,
    ):
        super().__init__(denoiser, observation, iterations=iterations, tolerance=tolerance)
        c = denoiser.data_std if sigma_data is None else sigma_data
        self.c = positive(c, "sigma_data", "the standard deviation of the data")

    def covariance(self, p: Prediction, pull: Map) -> Map:
        alpha, sigma = p.scales.alpha, p.scales.sigma
        variance = (sigma * self.c) ** 2 / ((alpha * self.c) ** 2 + sigma**2)
        return lambda v: variance * v


class TMPD(Matched):
    r"""TMPD (Boys et al. 2023, eq. 9 and sec. 3.2): V = (σ²/α) diag(J 1), the row sums of the exact covariance.

    Exact for a Gaussian prior of diagonal covariance. Bias: a row sum is too large where entries vary together and too
    small where they vary against each other (sums below 0 count as 0, and δ is shortened), so it is far off where much
    is correlated; otherwise the bias is that of `MMPS`. Cost: two backward passes.

    Args:
        denoiser, observation: as in `Posterior`.
        iterations, tolerance: as in `Matched`; products with A and Aᵀ only.
    """

    def covariance(self, p: Prediction, pull: Map) -> Map:
        variance = _covariance_factor(p) * pull(torch.ones_like(p.x0)).clamp(min=0)
        return lambda v: variance * v


class MMPS(Matched):
    r"""MMPS (Rozet et al. 2024, eq. 15–16): V = (σ²/α) J, the exact covariance of x_0 given x_t, by Jacobian products.

    Exact for any Gaussian prior. Bias: p(x_0|x_t) is approximated by a Gaussian, so where x_t could still become one of
    several modes, y decides between them too early or too late. Within a mode nothing is lost, but mode weights are
    wrong: by 0.02 to 0.13 in 2 and 16 dimensions of `benchmarks/posterior.py` (0.3 has been seen in 5), by up to 0.6 in
    64, where y rules out modes that the Gaussian cannot separate; `TwistedSMC` corrects that. The Jacobian of a network
    is neither symmetric nor positive, so with few iterations its samples can miss y. Cost: one backward pass per
    iteration and one more.

    Args:
        denoiser, observation: as in `Posterior`.
        iterations, tolerance: as in `Matched`; a product is a backward pass. Cut short, the solve leaves δ weaker than
            it ought to be; 3 to 5 iterations are usual for images.
    """

    def __init__(self, denoiser: Denoiser, observation: Observation, *, iterations: int = 32, tolerance: float = 1e-3):
        super().__init__(denoiser, observation, iterations=iterations, tolerance=tolerance)

    def covariance(self, p: Prediction, pull: Map) -> Map:
        factor = _covariance_factor(p)
        return lambda v: factor * pull(v)


class DPS(Posterior):
    r"""DPS (Chung et al. 2023, eq. 15–16): S = s² I, s² = (std² + rᵀAVAᵀr/rᵀr)/scale, r = y − A x̂_0, V = (σ²/α) J.

    The paper has s = std, which is far too small while x_0 is uncertain, so its step replaces 1/std² by ζ/‖r‖, with ζ
    tuned to 1000 steps of one sampler. Here s² is the uncertainty of A x_0 along the residual, which comes with the
    same backward pass and suits every SDE, solver and number of steps. (It is the first iteration of `MMPS`.) Exact for
    a Gaussian prior if y is one number. Bias: all directions are taken to be as uncertain as that of the residual; δ is
    too weak along those that are less uncertain, and too strong along those that are more. Cost: one backward pass.

    Args:
        denoiser, observation: as in `Posterior`.
        scale: > 0, the strength.
    """

    def __init__(self, denoiser: Denoiser, observation: Observation, scale: float = 1.0):
        super().__init__(denoiser, observation)
        self.scale = positive(scale, "scale", "a strength")

    def predict(self, x: Tensor, t: Tensor, cond: Cond = None) -> PosteriorPrediction:
        measured, rest = self.observation.split(cond)
        p, pull = with_jacobian(self.denoiser, x, t, rest)
        near = self.observation.near(p.x0, measured)
        residual = near.residual.double()
        back = near.adjoint(residual)
        slope = pull(back)
        square = (residual**2).flatten(1).sum(1).clamp(min=torch.finfo(torch.float64).tiny)
        along = _uncertainty(p, back, slope).clamp(min=0) / square
        noise = (near.variance * residual**2).flatten(1).sum(1) / square
        variance = ((noise + along) / self.scale).clamp(min=1e-12)
        posterior = p.shift(slope / expand_as_batch(variance, x).to(x.dtype))
        size = near.reached.flatten(1).sum(1)
        log_prob = -0.5 * (square / variance + size * (2 * math.pi * variance).log())
        return PosteriorPrediction(p, posterior, log_prob)


class DiffPIR(Solving):
    r"""DiffPIR (Zhu et al. 2023, eq. 12–13): x̂_0 is replaced by the x that minimises

        ‖y − A x‖²/std² + λ (α/σ)² ‖x − x̂_0‖²,

    that is V = σ²/(λα²) I without J, so without a backward pass; ε̂ follows from x_t = α x̂_0 + σ ε̂. Bias: the prior is
    taken to be flat around x̂_0, and y reaches the entries that it does not see only with the next step; at large noise
    x̂_0 is made to fit y at once, so modes are chosen too early.

    Args:
        denoiser, observation: as in `Posterior`.
        weight: λ > 0 of the prior.
        iterations, tolerance: as in `Solving`; products with A and Aᵀ only.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        observation: Observation,
        weight: float = 1.0,
        *,
        iterations: int = 64,
        tolerance: float = 1e-6,
    ):
        super().__init__(denoiser, observation, iterations=iterations, tolerance=tolerance)
        self.weight = positive(weight, "weight", "that of the prior")

    def predict(self, x: Tensor, t: Tensor, cond: Cond = None) -> PosteriorPrediction:
        measured, rest = self.observation.split(cond)
        p = self.denoiser(x, t, rest)
        near, ratio = self.observation.near(p.x0, measured), p.scales.sigma / p.scales.alpha
        variance = ratio**2 / self.weight
        u, log_prob = self._solve(near, lambda v: variance * v)
        change = variance * near.adjoint(u)
        return PosteriorPrediction(p, Prediction(p.x0 + change, p.eps - change / ratio, p.scales), log_prob)


def _covariance_factor(p: Prediction) -> Tensor:
    """σ²/α, by which Cov[x_0|x_t] is J multiplied."""
    return p.scales.sigma**2 / p.scales.alpha


def _uncertainty(p: Prediction, back: Tensor, slope: Tensor) -> Tensor:
    """uᵀA Cov[x_0|x_t] Aᵀu (B,), float64, from Aᵀu = `back` and JᵀAᵀu = `slope`."""
    return (_covariance_factor(p) * back * slope).double().flatten(1).sum(1)


def _step_length(near: Linear, u: Tensor, along: Tensor) -> Tensor:
    """κ = min(1, 2 uᵀr / uᵀSu) (B,), S with the exact covariance, uᵀA Cov Aᵀu = `along`; 1 where V is exact.

    Beyond it κ u leads further from y than it started, ½κ²uᵀSu > κ uᵀr: where V is too small, and no noise on the way
    makes up for that, x_t would be lost for good.
    """
    goal = 2 * (near.residual * u).flatten(1).sum(1)
    reach = along + (near.variance * u**2).flatten(1).sum(1)
    return torch.where(reach > goal, goal / reach.clamp(min=torch.finfo(torch.float64).tiny), 1.0)
