r"""Linear SDEs `dx = f(t) x dt + g(t) dw`, given by their marginal `x_t = α_t x_0 + σ_t ε`.

One letter, one meaning, everywhere: t runs from data (`t_min`) to noise (`t_max`); α scales the data, σ the noise;
λ = log α²/σ² is the log signal-to-noise ratio (`log_snr`), which falls with t.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..noise.rng import Rng
from ..ops import Noise, lincomb
from ..ops.broadcast import as_time, coefficient, host, samples
from .readable import Readable


@dataclass(frozen=True)
class Scales:
    """α_t, σ_t and their time derivatives at `t`, broadcast against a batch (shape () or (B, 1, …, 1))."""

    sde: SDE
    t: Tensor
    alpha: Tensor
    sigma: Tensor
    like: Tensor
    known: tuple[Tensor, Tensor] | None = None  # the derivatives, where there is no SDE to ask any more

    @cached_property
    def rates(self) -> tuple[Tensor, Tensor]:
        """(dα/dt, dσ/dt), broadcast like `alpha` and `sigma`."""
        return self.known or self.find_rates()

    def find_rates(self) -> tuple[Tensor, Tensor]:
        """`rates` for compilers, which cannot trace the lock of a cached property."""
        d_alpha, d_sigma = self.sde.rates(self.t)
        return coefficient(d_alpha, self.like), coefficient(d_sigma, self.like)


class SDE(Readable, abc.ABC):
    r"""A forward process with Gaussian marginal `x_t | x_0 ~ N(α_t x_0, σ_t² I)`.

    Three methods define it: `marginal`, `rates` and `time`. Everything else follows: with λ = log α²/σ²,
    `f = α̇/α`, `g² = dσ²/dt − 2 f σ² = −σ² dλ/dt` (Song et al. 2021, App. D; Kingma et al. 2021, eq. 14–17).

    Attributes:
        t_min: smallest time, where the data are (a little above 0 where the score would diverge).
        t_max: largest time, where the prior is.
        entries: of a discrete schedule, entry i at t = t_max i/entries; None in continuous time.
    """

    t_min: float
    t_max: float
    entries: int | None = None

    @abc.abstractmethod
    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(α_t, σ_t), each of the shape of `t`, for t in [t_min, t_max]."""

    @abc.abstractmethod
    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(dα/dt, dσ/dt), each of the shape of `t`."""

    @abc.abstractmethod
    def time(self, log_snr: Tensor) -> Tensor:
        """The t at which log α²/σ² equals `log_snr`: the inverse of `log_snr`, of the same shape."""

    @property
    def terminal(self) -> Tensor:
        """t_max as solvers hold times: float64, (), on the CPU."""
        return host(self.t_max)

    def log_snr(self, t: Tensor) -> Tensor:
        """λ_t = log α_t²/σ_t², of the shape of `t`."""
        alpha, sigma = self.marginal(t)
        return 2 * (alpha / sigma).log()

    def drift(self, t: Tensor) -> Tensor:
        """f(t) = α̇/α, of the shape of `t`: the drift of the SDE is f(t) x."""
        return self.rates(t)[0] / self.marginal(t)[0]

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t) = √(2σ(σ̇ − fσ)), of the shape of `t`."""
        _, sigma = self.marginal(t)
        _, d_sigma = self.rates(t)
        return (2 * sigma * (d_sigma - self.drift(t) * sigma)).clamp(min=0).sqrt()

    def cut_off(self, t_min: float | None, use: str) -> float:
        """Where one `use` of the SDE ends, "training" or "likelihood": at `t_min`, or at its own for None.

        Raises:
            ValueError: a time outside [t_min, t_max).
        """
        start = self.t_min if t_min is None else float(t_min)
        if not (self.t_min <= start < self.t_max):
            raise ValueError(f"The {use} cut-off t_min={start} lies outside [{self.t_min}, {self.t_max}).")
        return start

    def at(self, t: Tensor | float, like: Tensor) -> Scales:
        """The scales at `t` (() or (B,)), in the dtype of `like` (float32 for half types), broadcast to `like`."""
        t = as_time(t, like)
        alpha, sigma = self.marginal(t)
        return Scales(self, t, coefficient(alpha, like), coefficient(sigma, like), like)

    def perturb(self, x0: Tensor, t: Tensor | float, eps: Tensor | Noise) -> Tensor:
        """x_t = α_t x_0 + σ_t ε (B, *event) of real numbers, in float32 or wider; ε like `x0`, or from `Rng.noise`."""
        x0 = samples(x0, "x0")
        alpha, sigma = self.marginal(as_time(t, x0))
        return lincomb(((alpha, x0),), (sigma, eps))

    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, std) of x_t | x_s ~ N(scale · x_s, std² I) for s ≤ t.

        `scale = α_t/α_s`, `std = σ_t √(1 − e^{λ_t − λ_s})`: no difference of nearly equal variances.
        """
        alpha_s, _ = self.marginal(s)
        alpha_t, sigma_t = self.marginal(t)
        gap = self.log_snr(t) - self.log_snr(s)
        return alpha_t / alpha_s, sigma_t * (-torch.expm1(gap)).clamp(min=0).sqrt()

    def prior_moments(
        self, like: Tensor, mean: Tensor | float = 0.0, var: Tensor | float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of x_{t_max} for data of the given mean and variance (per dimension)."""
        scales = self.at(self.t_max, like)
        alpha = scales.alpha
        mean, var = (torch.as_tensor(value, dtype=alpha.dtype, device=alpha.device) for value in (mean, var))
        std = (alpha**2 * var + scales.sigma**2).sqrt()
        return alpha * mean + torch.zeros_like(std), std

    def prior_sample(
        self,
        shape: Sequence[int],
        *,
        rng: Rng,
        mean: Tensor | float = 0.0,
        var: Tensor | float = 0.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """A draw of shape (B, *event) from N(α_T mean, (α_T² var + σ_T²) I), T = t_max."""
        z = rng.normal(shape, dtype=dtype, device=device)
        centre, std = self.prior_moments(z, mean, var)
        return (centre + std * z).to(z.dtype)

    def prior_log_prob(self, z: Tensor, *, mean: Tensor | float = 0.0, var: Tensor | float = 0.0) -> Tensor:
        """log N(z; α_T mean, (α_T² var + σ_T²) I) in nats, shape (B,), for z of shape (B, *event)."""
        centre, std = self.prior_moments(z.double(), mean, var)
        logs = -0.5 * ((z.double() - centre) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
        return logs.expand(z.shape).flatten(1).sum(1)

    def _check_times(self) -> None:
        if not (0 < self.t_min < self.t_max < math.inf):
            raise ValueError(
                f"{type(self).__name__} needs 0 < t_min < t_max; got t_min={self.t_min}, t_max={self.t_max}."
            )


class _LinearBeta(SDE, abc.ABC):
    """β(t) = β_min + t (β_max − β_min) on (0, 1], α = exp(−½∫β) (Song et al. 2021, eq. 32)."""

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, *, t_min: float = 1e-5):
        if not (0 < beta_min <= beta_max < math.inf):
            raise ValueError(f"Expected 0 < beta_min <= beta_max; got beta_min={beta_min}, beta_max={beta_max}.")
        self.beta_min, self.beta_max = float(beta_min), float(beta_max)
        self.t_min, self.t_max = float(t_min), 1.0
        self._check_times()

    def beta(self, t: Tensor) -> Tensor:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def log_alpha(self, t: Tensor) -> Tensor:
        return t * (-0.25 * (self.beta_max - self.beta_min) * t - 0.5 * self.beta_min)

    def _time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        # the root of ¼(β₁−β₀)t² + ½β₀t = −log α, in the form that does not cancel near t = 0
        c, half = -log_alpha, 0.5 * self.beta_min
        return 2 * c / (half + (half**2 + c * (self.beta_max - self.beta_min)).sqrt())

    def drift(self, t: Tensor) -> Tensor:
        return -0.5 * self.beta(t)


class VPSDE(_LinearBeta):
    r"""Variance preserving: `dx = −½β x dt + √β dw`, α = e^{−½∫β}, σ² = 1 − α² (Song et al. 2021, eq. 11 and 32–33).

    Args:
        beta_min, beta_max: ends of the linear β(t), 0 < beta_min ≤ beta_max.
        t_min: smallest time, in (0, 1). The score grows like 1/σ(t_min).
    """

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = self.log_alpha(t)
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.marginal(t)
        half_beta = 0.5 * self.beta(t)
        return -half_beta * alpha, half_beta * alpha**2 / sigma

    def log_snr(self, t: Tensor) -> Tensor:
        log_alpha = self.log_alpha(t)
        return 2 * log_alpha - (-torch.expm1(2 * log_alpha)).log()

    def time(self, log_snr: Tensor) -> Tensor:
        return self._time_of_log_alpha(-0.5 * F.softplus(-log_snr))  # α² = sigmoid(λ)

    def diffusion(self, t: Tensor) -> Tensor:
        return self.beta(t).sqrt()


class SubVPSDE(_LinearBeta):
    r"""Sub-variance preserving: α as VP, **σ = 1 − α²** (not its root), `g² = β(1 − α⁴)` (Song et al. 2021, eq. 27–29).

    Args:
        beta_min, beta_max: ends of the linear β(t), 0 < beta_min ≤ beta_max.
        t_min: smallest time, in (0, 1).
    """

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = self.log_alpha(t)
        return log_alpha.exp(), -torch.expm1(2 * log_alpha)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, beta = self.log_alpha(t).exp(), self.beta(t)
        return -0.5 * beta * alpha, beta * alpha**2

    def log_snr(self, t: Tensor) -> Tensor:
        log_alpha = self.log_alpha(t)
        return 2 * (log_alpha - (-torch.expm1(2 * log_alpha)).log())

    def time(self, log_snr: Tensor) -> Tensor:
        # with q = σ/α = e^{−λ/2}: α² + qα − 1 = 0, so log α = −asinh(q/2)
        return self._time_of_log_alpha(-torch.asinh(0.5 * (-0.5 * log_snr).exp()))

    def diffusion(self, t: Tensor) -> Tensor:
        return (self.beta(t) * -torch.expm1(4 * self.log_alpha(t))).sqrt()


class VESDE(SDE):
    r"""Variance exploding: α = 1, σ = σ_min (σ_max/σ_min)^t on (0, 1] (Song et al. 2021, eq. 9 and 30–31).

    The marginal keeps σ(0) = σ_min: it is the law of data that carry noise σ_min to begin with. The solution of the
    SDE started at clean data has variance σ(t)² − σ_min² instead; loss, sampler and likelihood all use the marginal.

    Args:
        sigma_min: noise at t = 0, > 0.
        sigma_max: noise at t = 1; about the largest distance between two data points
            (Song & Ermon 2020, technique 1; `scoresde.data.suggest_sigma_max`).
        t_min: smallest time, in (0, 1).
    """

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0, *, t_min: float = 1e-5):
        if not (0 < sigma_min < sigma_max < math.inf):
            raise ValueError(f"Expected 0 < sigma_min < sigma_max; got sigma_min={sigma_min}, sigma_max={sigma_max}.")
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)
        self._log_ratio = math.log(self.sigma_max / self.sigma_min)
        self.t_min, self.t_max = float(t_min), 1.0
        self._check_times()

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), self.sigma_min * (self._log_ratio * t).exp()

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), self._log_ratio * self.marginal(t)[1]

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * (math.log(self.sigma_min) + self._log_ratio * t)

    def time(self, log_snr: Tensor) -> Tensor:
        return (-0.5 * log_snr - math.log(self.sigma_min)) / self._log_ratio


class _EndsAtNoise(SDE, abc.ABC):
    """A process whose α reaches 0 at t = 1, where f and g diverge: time ends just short of it."""

    def __init__(self, *, t_min: float = 1e-4, t_max: float = 0.999):
        self.t_min, self.t_max = float(t_min), float(t_max)
        self._check_times()
        if self.t_max >= 1:
            raise ValueError(f"{type(self).__name__} needs t_max < 1, where alpha reaches 0; got {t_max}.")


class CosineSDE(_EndsAtNoise):
    r"""The cosine schedule α = cos(πt/2), σ = sin(πt/2) (Nichol & Dhariwal 2021, without their offset).

    f and g diverge at t = 1, so time ends just short of it; the prior then ignores α(t_max) = 1.6e-3 of the data.

    Args:
        t_min, t_max: ends of time, 0 < t_min < t_max < 1.
    """

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # sin(½π(1 − t)) keeps the relative accuracy of α near t = 1, which cos(½πt) loses
        return torch.sin(0.5 * math.pi * (1 - t)), torch.sin(0.5 * math.pi * t)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.marginal(t)
        return -0.5 * math.pi * sigma, 0.5 * math.pi * alpha

    def time(self, log_snr: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan((-0.5 * log_snr).exp())


class EDMSDE(SDE):
    r"""Time is the noise level: α = 1, σ = t on [σ_min, σ_max] (Karras et al. 2022, eq. 1–4).

    Args:
        sigma_min, sigma_max: ends of the noise level, 0 < sigma_min < sigma_max.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0):
        self.t_min, self.t_max = float(sigma_min), float(sigma_max)
        self._check_times()

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), t

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.ones_like(t)

    def time(self, log_snr: Tensor) -> Tensor:
        return (-0.5 * log_snr).exp()


class RectifiedFlow(_EndsAtNoise):
    r"""The straight interpolant x_t = (1 − t) x_0 + t ε (Liu et al. 2023; Lipman et al. 2023).

    α = 1 − t, σ = t, f = −1/(1 − t), g² = 2t/(1 − t). Both diverge at t = 1, so time ends just short of it; the
    velocity α̇ x̂_0 + σ̇ ε̂ stays finite.

    Args:
        t_min, t_max: ends of time, 0 < t_min < t_max < 1.
    """

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t + 0

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.ones_like(t)

    def time(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-0.5 * log_snr)
