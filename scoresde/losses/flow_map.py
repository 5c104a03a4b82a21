r"""Objectives of flow maps: x̂_0 = g(x_t, t, s), with which a DDIM step from t to s ends where the ODE does.

With y = x/α, ς = σ/α, λ = ln ς and r = ς_s/ς_t a flow map is y_s = r y_t + (1 − r) g(y_t, t, s) (`sampling.FlowMap`).
Each objective here makes a target g* and costs w ‖g − g*‖², so that they compare at equal cost:

    `TrajectoryLoss`    g* = (y_s − r y_t)/(1 − r) of two points of a trajectory of the teacher's
    `SemigroupLoss`     the same, where the map itself goes from t to s by a stop between
    `ConsistencyLoss`   g* = g − T/(|T| + c) of the tangent T = r (g − x̂_0) + (1 − r) dg/dλ
    `MeanFlowLoss`      g* = g − T

dg/dλ is taken along the ODE, dy/dλ = y − x̂_0. T vanishes for the exact map and for no other: it is the derivative by λ
of where the map ends. At s = t it is g − x̂_0, so that the map is a denoiser there; x̂_0 is the teacher's, or x_0 itself.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor, nn

from ..diffusion.conditions import Cond, chosen, each, named, parted, tell, unnamed
from ..diffusion.denoiser import Denoiser
from ..diffusion.sde import SDE
from ..diffusion.undisturbed import in_eval
from ..guidance.mixing import ClassifierFree, check_same
from ..noise.rng import Rng
from ..ops import dsm_loss
from ..ops.broadcast import coefficient, plain, samples
from .denoising import EDMWeighting, LogSNRTimes, Times, Weighting
from .loss import Loss, Terms, fresh


class Pairs:
    """Draws times t, and where to go, s ≤ t with λ uniform between t and t_min.

    Args:
        times: of t.
        first: share of t_max among the t, where every sample starts.
        last: share of t_min among the s, where most end.
        still: share of s = t.

    Raises:
        ValueError: shares outside [0, 1], or last and still of more than 1 together.
    """

    def __init__(self, times: Times | None = None, first: float = 0.25, last: float = 0.5, still: float = 0.25):
        for name, share in {"first": first, "last": last, "still": still, "last + still": last + still}.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is a share of the pairs (t, s) in [0, 1]; got {share}.")
        self.times = LogSNRTimes() if times is None else times
        self.first, self.last, self.still = float(first), float(last), float(still)

    def sample(self, sde: SDE, n: int, rng: Rng, device: torch.device) -> tuple[Tensor, Tensor]:
        """(t, s), (n,) each in float64."""
        t, _ = self.times.sample(sde, n, rng, device)
        starts, kinds, between = (rng.uniform((n,), dtype=torch.float64, device=device) for _ in range(3))
        start = self.times.start(sde)
        t = torch.where(starts < self.first, sde.t_max, t)
        high = sde.log_snr(torch.full_like(t, start))
        s = sde.time(torch.lerp(sde.log_snr(t), high, between)).clamp(min=start).minimum(t)
        s = torch.where(kinds < self.last, start, s)
        return t, torch.where(kinds >= 1 - self.still, t, s)


class Target(NamedTuple):
    """What a flow map is held against: g* (B, *event) at x_t (B, *event), t and s (B,), and its condition."""

    g: Tensor
    x: Tensor
    t: Tensor
    s: Tensor
    cond: Cond


class _Held:
    """A model that belongs to nobody here: neither its weights nor a copy of it are part of what holds it."""

    def __init__(self, model: Any):
        self.model = model

    def __deepcopy__(self, memo: dict[int, Any]) -> _Held:
        return self


class Options(TypedDict, total=False):
    """The arguments of `FlowMapLoss` that every objective takes and hands on."""

    weighting: Weighting | None
    uncertainty: nn.Module | None
    adaptive: float
    scales: Sequence[float] | None
    cond_dropout: float | None


class FlowMapLoss(Loss):
    """Per-sample loss w ‖g − g*‖²/D of a flow map, to be averaged by the caller.

    Args:
        denoiser: the flow map that is trained, with "end" in `told`.
        teacher: whose ODE it learns, of the same SDE, with any guidance around it, on the device of the data, and left
            as it is. None learns from the data alone, where that is possible.
        weighting: of an error of ε̂; default `EDMWeighting` of the data's standard deviation, for which the error of the
            network's output counts the same everywhere.
        uncertainty: see `DenoisingLoss`; of λ_t.
        adaptive: p in [0, 1]: the objective is loss/(loss + 10⁻³)^p, the denominator without a gradient (Geng et al.
            2025, *Mean flows*, eq. 22): 0 is the square, ½ about the absolute value.
        scales: (low, high) of the scale of classifier-free guidance, which is drawn for each batch, put around the
            teacher, and told to the map; null for none but what is around the teacher.
        cond_dropout: share in [0, 1) of the samples whose condition is dropped for the teacher and the map alike, so
            that the map may be guided from outside. A dropout of the network's own would drop it for the map only,
            which then learned the mean of what the teacher does under all conditions. None is 0.

    Raises:
        ValueError: a denoiser that is told one noise level only, a teacher of another SDE, or values outside these.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        teacher: Denoiser | None = None,
        *,
        weighting: Weighting | None = None,
        uncertainty: nn.Module | None = None,
        adaptive: float = 0.0,
        scales: Sequence[float] | None = None,
        cond_dropout: float | None = None,
    ):
        super().__init__()
        name = type(self).__name__
        if "end" not in denoiser.told:
            raise ValueError(
                f"{name} trains a flow map, which is told where it goes, and this denoiser is told one noise level "
                "only: denoiser.told=[end], and in Python told=['end'] for the network, too."
            )
        if teacher is None and scales is not None:
            raise ValueError(f"{name} needs a teacher to guide at scales: scoresde-distil run=….")
        if teacher is not None:
            check_same(denoiser.sde, teacher.sde)
        if not 0 <= adaptive <= 1:
            raise ValueError(f"adaptive is a power in [0, 1]; got {adaptive}.")
        self.cond_dropout = 0.0 if cond_dropout is None else float(cond_dropout)
        if not 0 <= self.cond_dropout < 1:
            raise ValueError(f"cond_dropout is a share in [0, 1); got {cond_dropout}.")
        if (scales is not None) != ("scale" in denoiser.told) or (
            scales is not None and not 0 <= scales[0] <= scales[1]
        ):
            raise ValueError(f"scales is (low, high) where told has 'scale'; got {scales} and told = {denoiser.told}.")
        self.denoiser, self._teacher = denoiser, _Held(teacher)
        self.weighting = EDMWeighting(denoiser.data_std) if weighting is None else weighting
        self.uncertainty, self.adaptive, self.scales = uncertainty, float(adaptive), scales

    @property
    def teacher(self) -> Any:
        """Whose ODE is learned; None where the data teach alone."""
        return self._teacher.model

    @abc.abstractmethod
    def target(self, x0: Tensor, cond: Cond, teacher: Denoiser | None, rng: Rng) -> Target:
        """Where the map is to go, without a gradient."""

    def terms(self, x0: Tensor, cond: Cond = None, *, rng: Rng | None = None) -> Terms:
        rng, x0, cond = fresh() if rng is None else rng, samples(x0, "x0"), each(plain, cond)
        sde, teacher = self.denoiser.sde, self.teacher
        cond = self._dropped(cond, len(x0), rng)
        if self.scales is not None:
            low, high = self.scales
            scale = low + (high - low) * float(rng.uniform((1,)))
            teacher, cond = ClassifierFree(teacher, scale), tell(cond, scale=x0.new_full((len(x0),), scale))
        with torch.no_grad(), in_eval([*(self.denoiser if teacher is None else teacher).modules()]):
            g, x, t, s, cond = self.target(x0, cond, teacher, rng)
        weight = self.weighting.weight(sde, t, x[0].numel(), sde.t_max - sde.t_min) * sde.log_snr(t).exp()
        loss = dsm_loss(self.map(x, t, s, cond), g, weight)  # ‖ε̂ − ε‖² = ‖g − g*‖²/ς²
        objective = loss / (loss.detach() + 1e-3) ** self.adaptive
        if self.uncertainty is not None:
            u = self.uncertainty(sde.log_snr(t)).to(x0.dtype)
            objective = objective * (-u).exp() + u
        return Terms(objective, loss, t)

    def _dropped(self, cond: Cond, n: int, rng: Rng) -> Cond:
        """The condition, of a share of the n samples null."""
        null = self.denoiser.null(cond) if self.cond_dropout else None
        if null is None:
            return cond
        keep, nothing = rng.uniform((n,)) >= self.cond_dropout, named(null, "")
        return unnamed({name: chosen(keep, value, nothing[name]) for name, value in named(cond, "").items()}, "")

    def map(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """g (B, *event) of the map that is trained."""
        return self.denoiser(x, t, tell(cond, end=s)).x0

    def go(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """x_s (B, *event), where the map goes from x_t."""
        kept, gain = shares_of(self.denoiser.sde, t, s)
        return coefficient(kept, x) * x + coefficient(gain, x) * self.map(x, t, s, cond)


def shares_of(sde: SDE, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """(σ_s/σ_t, α_s − α_t σ_s/σ_t), what of x_t and of g is in x_s."""
    (_, sigma_t), (alpha_s, sigma_s) = sde.marginal(t), sde.marginal(s)
    return sigma_s / sigma_t, -alpha_s * torch.expm1(0.5 * (sde.log_snr(t) - sde.log_snr(s)))


class FromData(FlowMapLoss):
    """What begins at noised data.

    Args:
        pairs: of times.
        options: those of `FlowMapLoss`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        teacher: Denoiser | None = None,
        *,
        pairs: Pairs | None = None,
        **options: Unpack[Options],
    ):
        super().__init__(denoiser, teacher, **options)
        self.pairs = Pairs() if pairs is None else pairs
        self.pairs.times.start(denoiser.sde)

    def target(self, x0: Tensor, cond: Cond, teacher: Denoiser | None, rng: Rng) -> Target:
        sde = self.denoiser.sde
        t, s = self.pairs.sample(sde, len(x0), rng, x0.device)
        x = sde.perturb(x0, t, rng.normal_like(x0))
        guess = x0 if teacher is None else teacher(x, t, parted(cond, ("scale",))[0]).x0
        return Target(self.improved(x, t, s, guess, cond), x, t, s, cond)

    @abc.abstractmethod
    def improved(self, x: Tensor, t: Tensor, s: Tensor, guess: Tensor, cond: Cond) -> Tensor:
        """g* (B, *event), given x̂_0."""


class SemigroupLoss(FromData):
    r"""A step is two steps: g* = (y_s − r y_t)/(1 − r) of the y_s that the map reaches by a stop between t and s.

    As DDIM steps of one x̂_0 make one, g* is a mean of the g of both, and is formed as that: the difference that the
    formula divides would lose all digits of close times. The stop is halfway in λ; where s = t, a share `pairs.still`,
    g* is x̂_0, which is where knowledge comes in. With a teacher it is progressive distillation (Salimans & Ho 2022) of
    all lengths at once, without one the shortcut model of Frans et al. 2025. Two calls of the map for a target.
    """

    def improved(self, x: Tensor, t: Tensor, s: Tensor, guess: Tensor, cond: Cond) -> Tensor:
        sde = self.denoiser.sde
        u = sde.time((sde.log_snr(t) + sde.log_snr(s)) / 2).minimum(t).maximum(s)
        first = self.map(x, t, u, cond)
        kept, gain = (coefficient(share, x) for share in shares_of(sde, t, u))
        second = self.map(kept * x + gain * first, u, s, cond)
        still = s >= t
        share = shares_of(sde, u, s)[1] / torch.where(still, 1.0, shares_of(sde, t, s)[1])
        return torch.where(coefficient(still, x).bool(), guess, torch.lerp(first, second, coefficient(share, x)))


class MeanFlowLoss(FromData):
    r"""g* = g − T, T = r (g − x̂_0) + (1 − r) dg/dλ, the derivative of the map's end along the ODE.

    Without a teacher x̂_0 is x_0 itself, whose mean it is at every x_t: for a flow it is that of Geng et al. 2025 (*Mean
    flows*, eq. 10–11) up to the factor α_s/α_t on T, without which it is finite under every SDE. With one it is the
    Eulerian map distillation of Boffi et al. 2025.

    dg/dλ is one product with the Jacobian, by `torch.func.jvp`, forward through the network: our MLP, U-Net and DiT can
    all be differentiated so, with the attention that torch has formulas for in forward mode, which is the plain one.
    """

    def improved(self, x: Tensor, t: Tensor, s: Tensor, guess: Tensor, cond: Cond) -> Tensor:
        g, tangent = self.tangent(x, t, s, guess, cond)
        return g - tangent

    def tangent(self, x: Tensor, t: Tensor, s: Tensor, guess: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """(g, T), (B, *event) each."""
        sde = self.denoiser.sde
        scales = sde.at(t, x)
        alpha, sigma, (d_alpha, d_sigma) = scales.alpha, scales.sigma, scales.rates
        pace = alpha * sigma / (alpha * d_sigma - sigma * d_alpha)  # dt/dλ
        velocity = d_alpha * guess + d_sigma * (x - alpha * guess) / sigma
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            found: Any = torch.func.jvp(
                lambda x, t: self.map(x, t, s, cond), (x, t), (pace * velocity, pace.flatten().to(t))
            )
        g, slope = found
        r = coefficient((0.5 * (sde.log_snr(t) - sde.log_snr(s))).exp(), x)
        return g, r * (g - guess) + (1 - r) * slope


class ConsistencyLoss(MeanFlowLoss):
    r"""g* = g − T/(|T| + c) with the root mean square |T| of the sample and T of `MeanFlowLoss`, of bounded length.

    Continuous-time consistency distillation, or training where there is no teacher, with tangents normalised as Lu &
    Song (2025, sCM, sec. 4.1) do; `Pairs(last=1)` for s = t_min alone, as there. Fixed points are those of
    `MeanFlowLoss`.

    Args:
        c: > 0; theirs is 0.1.
        pairs, options: of `MeanFlowLoss` and of `FlowMapLoss`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        teacher: Denoiser | None = None,
        *,
        c: float = 0.1,
        pairs: Pairs | None = None,
        **options: Unpack[Options],
    ):
        super().__init__(denoiser, teacher, pairs=pairs, **options)
        if not 0 < c < math.inf:
            raise ValueError(f"c, which bounds how far a normalised tangent is stretched, is > 0; got {c}.")
        self.c = float(c)

    def improved(self, x: Tensor, t: Tensor, s: Tensor, guess: Tensor, cond: Cond) -> Tensor:
        g, tangent = self.tangent(x, t, s, guess, cond)
        length = tangent.square().flatten(1).mean(1).sqrt()
        return g - tangent / coefficient(length + self.c, x)
