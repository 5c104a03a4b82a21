r"""Denoising score matching.

Every objective is `E_t[w(t) ‖ε̂ − ε‖²]`: a *time sampler* says where t falls, a *weighting* what an error there costs,
a *coupling* which noise goes with which data. The training cut-off is the time sampler's `t_min`.
"""

from __future__ import annotations

import abc
import math

import torch
from torch import Tensor, nn

from ..checks import positive, whole
from ..diffusion.conditions import Cond, each
from ..diffusion.denoiser import Denoiser
from ..diffusion.prediction import Prediction
from ..diffusion.sde import SDE
from ..noise.rng import Rng
from ..ops import dsm_loss
from ..ops.broadcast import plain, samples
from .coupling import Coupling, Independent
from .loss import Loss, Terms, fresh


class Times(abc.ABC):
    """Draws training times on [t_min, t_max].

    Args:
        t_min: training cut-off; None for the SDE's own.
    """

    def __init__(self, t_min: float | None = None):
        self.t_min = t_min

    @abc.abstractmethod
    def sample(self, sde: SDE, n: int, rng: Rng, device: torch.device) -> tuple[Tensor, Tensor]:
        """(t (n,), importance (n,)) in float64: importance = 1/(p(t)(t_max − t_min)) makes any t-integral unbiased."""

    def start(self, sde: SDE) -> float:
        """The training cut-off for `sde`, checked."""
        return sde.cut_off(self.t_min, "training")


class UniformTimes(Times):
    """t ~ U[t_min, t_max]."""

    def sample(self, sde: SDE, n: int, rng: Rng, device: torch.device) -> tuple[Tensor, Tensor]:
        start = self.start(sde)
        u = rng.uniform((n,), dtype=torch.float64, device=device)
        return start + u * (sde.t_max - start), torch.ones_like(u)


class StratifiedTimes(Times):
    """Uniform t, one draw in each of n equal strata of [t_min, t_max] (Kingma et al. 2021, App. I.1)."""

    def sample(self, sde: SDE, n: int, rng: Rng, device: torch.device) -> tuple[Tensor, Tensor]:
        start = self.start(sde)
        u = rng.stratified(n, device=device)
        return start + u * (sde.t_max - start), torch.ones_like(u)


class DiscreteTimes(Times):
    """t = t_max k/steps, k uniform (stratified) on 1 … steps: the steps of a discrete process, as DDPM is trained.

    The distribution is part of the objective, so the importance is 1: do not use it with `Likelihood`.

    Args:
        steps: ≥ 1; the first one is no earlier than the SDE's t_min.
    """

    def __init__(self, steps: int = 1000):
        super().__init__()
        self.steps = whole(steps, "steps")

    def start(self, sde: SDE) -> float:
        first = sde.t_max / self.steps
        if first < sde.t_min * (1 - 1e-9):  # round-off of a table's 1/N
            cure = f" Take steps={sde.entries}, the length of its table." if sde.entries else ""
            raise ValueError(
                f"{self.steps} steps begin at t = {first:g}, before the SDE's t_min = {sde.t_min:g}.{cure}"
            )
        return super().start(sde)

    def sample(self, sde: SDE, n: int, rng: Rng, device: torch.device) -> tuple[Tensor, Tensor]:
        step = (rng.stratified(n, device=device) * self.steps).floor().clamp(max=self.steps - 1) + 1
        return (sde.t_max * step / self.steps).clamp(min=sde.t_min), torch.ones_like(step)


class LogNormalTimes(Times):
    """ln(σ/α) ~ N(mean, std²), clamped to [t_min, t_max] (Karras et al. 2022, table 1).

    The distribution is part of the EDM objective, so the importance is 1: do not use it with `Likelihood`.

    Args:
        mean, std: of ln(σ/α); std > 0. −1.2 and 1.2 are the paper's for images of σ_data 0.5.
        t_min: training cut-off.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2, t_min: float | None = None):
        super().__init__(t_min)
        if not math.isfinite(mean):
            raise ValueError(f"mean, that of ln(σ/α), is a finite number; got {mean}.")
        self.mean, self.std = float(mean), positive(std, "std", "the standard deviation of ln(σ/α)")

    def sample(self, sde: SDE, n: int, rng: Rng, device: torch.device) -> tuple[Tensor, Tensor]:
        log_ratio = self.mean + self.std * rng.normal((n,), dtype=torch.float64, device=device)
        t = sde.time(-2 * log_ratio).clamp(self.start(sde), sde.t_max)
        return t, torch.ones_like(t)


class LogSNRTimes(Times):
    """λ uniform (stratified) on [λ(t_max), λ(t_min)]: the exact importance sampler of the likelihood weight.

    g²/σ² = −dλ/dt, so p(t) = (g²/σ²)/Z with Z = λ(t_min) − λ(t_max) exactly; the likelihood-weighted loss then has
    constant weight ½Z (Song et al. 2021, *Maximum likelihood training*, sec. 5, without their numerical inverse).
    """

    def sample(self, sde: SDE, n: int, rng: Rng, device: torch.device) -> tuple[Tensor, Tensor]:
        start = self.start(sde)
        ends = torch.tensor([start, sde.t_max], dtype=torch.float64, device=device)
        high, low = sde.log_snr(ends)
        t = sde.time(low + rng.stratified(n, device=device) * (high - low)).clamp(start, sde.t_max)
        return t, (high - low) / (_snr_rate(sde, t) * (sde.t_max - start))


def _snr_rate(sde: SDE, t: Tensor) -> Tensor:
    """−dλ/dt = g²/σ² ≥ 0."""
    alpha, sigma = sde.marginal(t)
    d_alpha, d_sigma = sde.rates(t)
    return 2 * (d_sigma / sigma - d_alpha / alpha)


class Weighting(abc.ABC):
    """w(t), the price of ‖ε̂ − ε‖² / D at time t (D: number of dimensions of one sample)."""

    @abc.abstractmethod
    def weight(self, sde: SDE, t: Tensor, dims: int, span: float) -> Tensor:
        """w(t) of the shape of t; `dims` is D, `span` the length t_max − t_min of the training interval."""


class Simple(Weighting):
    """w = 1: the ε-loss (Ho et al. 2020, eq. 14).

    Equal to the score loss weighted by σ², σ²‖s_θ − s‖² (Song et al. 2021, eq. 7 with λ = σ²).
    """

    def weight(self, sde: SDE, t: Tensor, dims: int, span: float) -> Tensor:
        return torch.ones_like(t)


class Likelihood(Weighting):
    """w = ½ (g²/σ²) D (t_max − t_min), in **nats**: E_t[w‖ε̂ − ε‖²/D] = ½ ∫ g² ‖s_θ − s‖² dt.

    Plus the prior term KL(p(x_T|x_0) ‖ prior) and the entropy of p(x_{t_min}|x_0) it bounds −E log p(x_{t_min})
    from above (Song et al. 2021, *Maximum likelihood training*, theorem 3; Kingma et al. 2021, eq. 17).
    """

    def weight(self, sde: SDE, t: Tensor, dims: int, span: float) -> Tensor:
        return 0.5 * dims * span * _snr_rate(sde, t)


class EDMWeighting(Weighting):
    """w = (ς² + σ_d²)/σ_d², ς = σ/α: unit weight on the EDM network output (Karras et al. 2022, table 1).

    Args:
        sigma_data: σ_d > 0.
    """

    def __init__(self, sigma_data: float = 1.0):
        self.sigma_data = positive(sigma_data, "sigma_data", "the standard deviation of the data")

    def weight(self, sde: SDE, t: Tensor, dims: int, span: float) -> Tensor:
        return 1 + (-sde.log_snr(t)).exp() / self.sigma_data**2


class MinSNR(Weighting):
    """w = min(SNR, γ)/SNR on the ε-error (Hang et al. 2023, sec. 3.4).

    Args:
        gamma: γ > 0.
    """

    def __init__(self, gamma: float = 5.0):
        self.gamma = positive(gamma, "gamma", "a signal-to-noise ratio")

    def weight(self, sde: SDE, t: Tensor, dims: int, span: float) -> Tensor:
        return (self.gamma * (-sde.log_snr(t)).exp()).clamp(max=1.0)


class DenoisingLoss(Loss):
    """Per-sample loss w(t) ‖ε̂(x_t, t) − ε‖²/D, to be averaged by the caller.

    With `Likelihood` the mean over t and ε is in nats; with the others it is a mean square per dimension.

    Args:
        denoiser: what is trained.
        times: time sampler.
        weighting: weight of the error.
        coupling: noise for data.
        uncertainty: u(λ) (B,) of λ (B,), such as `nn.LogVariance`, for a learned weighting: the objective is then
            loss·e^{−u} + u. At its minimum `weighting` and importance cancel, and a noise level counts as often as
            `times` draw it. Its parameters are trained with the denoiser's. None: `weighting` alone.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        times: Times | None = None,
        weighting: Weighting | None = None,
        coupling: Coupling | None = None,
        uncertainty: nn.Module | None = None,
    ):
        super().__init__()
        self.denoiser = denoiser
        self.times = UniformTimes() if times is None else times
        self.weighting = Simple() if weighting is None else weighting
        self.coupling = Independent() if coupling is None else coupling
        self.uncertainty = uncertainty
        self.times.start(denoiser.sde)

    def terms(self, x0: Tensor, cond: Cond = None, *, rng: Rng | None = None) -> Terms:
        loss, t, _, _ = self.errors(x0, cond, rng)
        if self.uncertainty is None:
            return Terms(loss, loss, t)
        u = self.uncertainty(self.denoiser.sde.log_snr(t)).to(loss.dtype)
        return Terms(loss * (-u).exp() + u, loss, t)

    def errors(self, x0: Tensor, cond: Cond, rng: Rng | None) -> tuple[Tensor, Tensor, Tensor, Prediction]:
        """(weighted errors (B,), drawn times (B,), the data as they were paired with noise, the prediction)."""
        rng, x0, cond = fresh() if rng is None else rng, samples(x0, "x0"), each(plain, cond)
        sde = self.denoiser.sde
        t, importance = self.times.sample(sde, x0.shape[0], rng, x0.device)
        x0, eps = self.coupling(x0, rng)
        prediction = self.denoiser(sde.perturb(x0, t, eps), t, cond)
        dims, span = x0[0].numel(), sde.t_max - self.times.start(sde)
        weight = importance * self.weighting.weight(sde, t, dims, span)
        return dsm_loss(prediction.eps, eps, weight), t, x0, prediction
