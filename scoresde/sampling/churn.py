"""Noise added before every step of an ODE method: EDM's stochastic sampler, for every SDE."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import positive
from ..diffusion.denoiser import Cond, Denoiser
from ..noise.rng import Rng
from ..ops import lincomb
from .sampler import State, Step, StepWrapper
from .steps import Heun

_MOST = math.sqrt(2) - 1
"""The paper's bound on γ: a step adds no more noise than there is."""


class Churn(StepWrapper):
    r"""EDM's stochastic sampler (Karras et al. 2022, alg. 2): the forward SDE from ς_t up to (1 + γ) ς_t, ς = σ/α, then
    an ODE step from there to s, with

    `γ = min(churn · log(ς_t/ς_s), √2 − 1)` where low ≤ ς_t ≤ high, and 0 elsewhere.

    Both halves keep the marginals, so the law is reached at the order of the ODE step, and every error made before is
    forgotten at the rate `churn`: as steps get short the process is the reverse SDE with noise η g, η² = churn, of the
    family dx = [f x − ½(1 + η²) g² score] dt + η g dw.

    The paper's S_churn counts per run: γ = S_churn/N in each of N steps. That is `churn = S_churn / log(ς_max/ς_min)`
    on a `LogSNRGrid`, and for any grid the same total noise: S_churn = 40 on [0.002, 80] is churn = 3.8.

    Args:
        churn: rate of fresh noise per unit of log ς, ≥ 0: 1 is that of the reverse SDE.
        low, high: the ς in which noise is added, 0 ≤ low < high (S_tmin, S_tmax; 0.05 and 50 for ImageNet-64).
        noise: standard deviation of that noise over its exact one, > 0. Above 1 (S_noise: 1.003 to 1.007) it makes up
            for networks that remove a little too much.
        step: the ODE method, `Heun()` by default.
    """

    def __init__(
        self, churn: float = 1.0, low: float = 0.0, high: float = math.inf, noise: float = 1.0, step: Step | None = None
    ):
        if not (0 <= churn < math.inf):
            raise ValueError(f"churn is a rate of noise, ≥ 0 and finite; got {churn}.")
        if not (0 <= low < high):
            raise ValueError(f"Noise is added where low ≤ σ/α ≤ high, with 0 ≤ low < high; got {low} and {high}.")
        super().__init__(Heun() if step is None else step)
        self.churn, self.low, self.high = float(churn), float(low), float(high)
        self.noise = positive(noise, "noise", "the factor of a standard deviation, 1 for the exact law")

    def __call__(
        self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, state: State, *, cond: Cond, rng: Rng
    ) -> tuple[Tensor, State]:
        raised = self.raised(denoiser, t, s)
        scale, std = denoiser.sde.transition(t, raised)
        x = lincomb(((scale, x),), (self.noise * std, rng.noise(x)))
        return self.step(denoiser, x, raised, s, state, cond=cond, rng=rng)

    def raised(self, denoiser: Denoiser, t: Tensor, s: Tensor) -> Tensor:
        """The time t̂ ≥ t of ς = (1 + γ) ς_t, at most t_max."""
        sde, snr = denoiser.sde, denoiser.sde.log_snr(t)
        gamma = (0.5 * self.churn * (sde.log_snr(s) - snr)).clamp(0, _MOST)
        ratio = torch.exp(-0.5 * snr)
        churned = (gamma > 0) & (ratio >= self.low) & (ratio <= self.high)
        return torch.where(churned, sde.time(snr - 2 * torch.log1p(gamma)).clamp(max=sde.t_max).maximum(t), t)
