r"""Singlestep methods of higher order on the pair (x̂_0, ε̂): each is the DDIM point plus differences of predictions.

With y = x/α and ς = σ/α the probability flow is dy/dς = ε̂, and DDIM its Euler step. Methods that freeze ε̂ or x̂_0 in
log(α/σ) = λ/2 start from the same point. Nothing is divided by α, σ or the step, and s == t does not move.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import whole
from ..diffusion.denoiser import Cond, Denoiser
from ..diffusion.sde import SDE
from ..noise.rng import Rng
from ..ops import lincomb
from .sampler import LongStep, State


class RungeKutta(LongStep):
    r"""An explicit Runge–Kutta method on dy/dς = ε̂, y = x/α, ς = σ/α.

    a_i1 and b_1 are what the other entries of a row lack to c_i and 1, so y_i = y_t + c_i Δς ε̂_1 + Δς Σ_j a_ij (ε̂_j −
    ε̂_1): the first two terms are the DDIM point.

    Attributes:
        stages: (c_i, (a_i2, a_i3, …)) for i ≥ 2.
        weights: (b_2, b_3, …).
    """

    stages: tuple[tuple[float, tuple[float, ...]], ...]
    weights: tuple[float, ...]

    def __call__(
        self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, state: State, *, cond: Cond, rng: Rng
    ) -> tuple[Tensor, State]:
        sde, first = denoiser.sde, denoiser(x, t, cond)
        start, end = (torch.exp(-0.5 * sde.log_snr(time)) for time in (t, s))
        slopes: list[Tensor] = []

        def point(time: Tensor, row: tuple[float, ...]) -> Tensor:
            alpha, sigma = sde.marginal(time)
            width = alpha * (end - start)
            further = [(entry * width, slope) for entry, slope in zip(row, slopes, strict=True)]
            return lincomb(((alpha, first.x0), (sigma, first.eps), *further))

        for c, row in self.stages:
            time = s if c == 1 else _time(sde, -2 * (start + c * (end - start)).log(), t, s)
            slopes.append(denoiser(point(time, row), time, cond).eps - first.eps)
        return point(s, self.weights), state


class Midpoint(RungeKutta):
    """The midpoint method on dy/dς = ε̂, y = x/α, ς = σ/α: ε̂ halfway between ς_t and ς_s carries the whole step."""

    order, evaluations = 2.0, 2
    default_steps = 50
    stages, weights = ((0.5, ()),), (1.0,)


class RK4(RungeKutta):
    """The classical fourth-order Runge–Kutta method on dy/dς = ε̂, y = x/α, ς = σ/α.

    In ς and not in log ς, so that a step can be of any length: dε̂/dy lies in [0, 1/ς] where the density is log-concave
    and |Δς| < ς, so the method is stable, while in log ς a step by a factor of 17 diverges (Δ log ς > 2.8).
    """

    order, evaluations = 4.0, 4
    default_steps = 25
    stages, weights = ((0.5, ()), (0.5, (0.5,)), (1.0, (0.0, 1.0))), (1 / 3, 1 / 3, 1 / 6)


def _time(sde: SDE, log_snr: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The time of a log-SNR between those of t and s, which round-off may leave."""
    return sde.time(log_snr).clamp(min=s, max=t)


class DPMSolver(LongStep):
    r"""Singlestep DPM-Solver-2 and -3 (Lu et al. 2022, alg. 1 and 2) and DPM-Solver++ (Lu et al. 2022b, alg. 1).

    A prediction linear in log(α/σ) is integrated exactly. With h = ½(λ_s − λ_t), a stage at a fraction r of the way,
    and Δ the difference of its prediction from the first,

        prediction="x0":   x_s = α_s x̂_0 + σ_s ε̂ + α_s w(h)/r Δx̂_0
        prediction="eps":  x_s = α_s x̂_0 + σ_s ε̂ + σ_s w(−h)/r Δε̂

    where w(z) = ½(1 − e^{−z}) with r = ½ for order 2, and w(z) = 1 − (1 − e^{−z})/z with r = ⅔ for order 3, whose stage
    comes the same way from another at ⅓.

    With η > 0 it solves `dx = [f x − ½(1 + η²) g² score] dt + η g dw`, which has the same marginals for every η:
    e^{−η²h} damps ε̂, noise of variance σ_s² (1 − e^{−2η²h}) replaces it, and w is taken at (1 + η²) h. All is exact
    for constant x̂_0. Stages lie on the same Brownian path, which makes the weak order 2; the order declared is the
    strong one, 1.

    Args:
        order: 2 or 3, and as many evaluations.
        prediction: what is interpolated, "x0" or "eps"; "x0" bears long steps and strong guidance better.
        eta: noise, ≥ 0, for "x0": 0 is the probability-flow ODE, 1 the reverse SDE.

    Raises:
        ValueError: an argument outside these.
    """

    evaluations: int

    def __init__(self, order: int = 2, prediction: str = "x0", eta: float = 0.0):
        if whole(order, "order") not in (2, 3):
            raise ValueError(f"DPMSolver has order 2 or 3 (DDIM is its first); got {order!r}.")
        if prediction not in ("x0", "eps"):
            raise ValueError(f"DPMSolver interpolates prediction='x0' or 'eps'; got {prediction!r}.")
        if not (0 <= eta < math.inf):
            raise ValueError(f"DPMSolver needs eta ≥ 0; got {eta}.")
        if eta > 0 and prediction == "eps":
            raise ValueError("DPMSolver(prediction='eps') has no eta: it would extrapolate the noise it replaces.")
        self.order, self.evaluations = 1.0 if eta else float(order), int(order)
        self.default_steps = 100 // self.evaluations
        self.prediction, self.eta = prediction, float(eta)

    def __call__(
        self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, state: State, *, cond: Cond, rng: Rng
    ) -> tuple[Tensor, State]:
        sde, first, stages = denoiser.sde, denoiser(x, t, cond), self.evaluations
        snr_t, snr_s = sde.log_snr(t), sde.log_snr(s)
        h = 0.5 * (snr_s - snr_t)
        part = h / stages  # every stage is one part further along
        noise: Tensor | None = None
        change: tuple[float, Tensor] | None = None  # the last stage's share of the way, and its Δ
        for k in range(1, stages + 1):
            c = k / stages
            time = s if k == stages else _time(sde, snr_s + (1 - c) * (snr_t - snr_s), t, s)
            if self.eta > 0:
                exponent = -(self.eta**2) * part
                fresh = (-torch.expm1(2 * exponent)).clamp(min=0).sqrt()
                before = torch.zeros_like(x) if noise is None else noise
                noise = lincomb(((exponent.exp(), before),), (fresh, rng.noise(x)))
            alpha, sigma = sde.marginal(time)
            terms = [(alpha, first.x0), (sigma * torch.exp(-(self.eta**2) * (c * h)), first.eps)]
            if noise is not None:
                terms.append((sigma, noise))
            if change is not None:
                scale, z = (alpha, (1 + self.eta**2) * (c * h)) if self.prediction == "x0" else (sigma, -(c * h))
                grown = -torch.expm1(-z)
                weight = 0.5 * grown if stages == 2 else torch.where(z == 0, 0, 1 - grown / z)
                terms.append((c / change[0] * scale * weight, change[1]))
            moved = lincomb(terms)
            if k < stages:
                p = denoiser(moved, time, cond)
                change = c, p.x0 - first.x0 if self.prediction == "x0" else p.eps - first.eps
        return moved, state
