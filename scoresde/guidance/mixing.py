"""Affine mixtures of predictions, Σ w_i P_i with Σ w_i = 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from ..diffusion.conditions import Cond, expand, join, named, one_entry, override, parted, tell
from ..diffusion.denoiser import Denoiser, DenoiserWrapper
from ..diffusion.prediction import Prediction
from ..diffusion.sde import SDE
from ..ops.broadcast import as_time, expand_as_batch
from .scale import Scale, checked, number, strength


class ClassifierFree(DenoiserWrapper):
    r"""(1 − w) P(x, t, ∅) + w P(x, t, cond) (Ho & Salimans 2022, eq. 6, with w for their 1 + w).

    w = 1 is the conditional model itself and, without rescaling, w = 0 the unconditional one, bit for bit and at the
    cost of one, also where a function or the interval makes it so. Elsewhere both are evaluated in one batch of 2B if
    the network has a null. For w > 1 the guided score is not that of any noised density: samples are sharper and less
    various than p(x|cond), and their likelihood is the one of the guided flow. A flow map that was distilled at many
    scales is told a w > 0 that is the same for all, in one call of B, unless it is rescaled or has another null.

    Args:
        denoiser: trained with its condition dropped at times.
        scale: w, a number or a function of λ.
        interval: (low, high) of σ/α, 0 ≤ low < high, in which to guide; elsewhere w is 1 (Kynkäänniemi et al. 2024).
        rescale: φ in [0, 1]: how far x̂_0 is brought back to the standard deviation, over one sample, of the
            conditional x̂_0 (Lin et al. 2023, eq. 15–16, there on their own prediction).
        null: the null condition, one entry, for networks that do not know their own; or a function of the
            condition, `lambda cond: {"image": cond["image"]}` for guidance by what else is in it.

    Raises:
        ValueError: arguments outside these; when called, a rescale of samples that are one number.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scale: Scale = 1.0,
        *,
        interval: tuple[float, float] = (0.0, math.inf),
        rescale: float = 0.0,
        null: Cond | Callable[[Cond], Cond] = None,
    ):
        super().__init__(denoiser)
        low, high = interval
        if not 0 <= low < high:
            raise ValueError(f"interval is (low, high) of σ/α with 0 <= low < high; got {interval}.")
        if not 0 <= rescale <= 1:
            raise ValueError(f"rescale is a share in [0, 1]; got {rescale}.")
        self.scale = checked(scale)
        self.interval = None if (low, high) == (0, math.inf) or self.scale == 1 else (float(low), float(high))
        self.rescale, self.given_null = float(rescale), null if callable(null) else one_entry(null)
        self.prior_evaluations *= 2

    def null(self, cond: Cond) -> Cond:
        """The condition of the unconditional branch beside `cond`: the null that was given, over the denoiser's own."""
        given = self.given_null(cond) if callable(self.given_null) else self.given_null
        own, told = parted(self.denoiser.null(cond), self.told)
        return tell(override(own, given), **told) if told else override(own, given)

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        cond, t = expand(cond, x), as_time(t, x)
        if cond is None:
            return self.denoiser(x, t, expand(self.null(None), x))
        weight = self.weight(self.sde.log_snr(t))
        known = self.scale if self.interval is None and not callable(self.scale) else number(weight)
        if known == 1:
            return self.denoiser(x, t, cond)
        if known == 0 and self.rescale == 0:
            return self.denoiser(x, t, expand(self.null(cond), x))
        usual = self.rescale == 0 and self.given_null is None
        if usual and "scale" in self.told and "scale" not in named(cond) and known is not None and known > 0:
            return self.denoiser(x, t, tell(cond, scale=x.new_full((len(x),), known)))
        plain, conditional = self._both(x, t, cond)
        guided = plain.blend(conditional, weight)
        return guided if self.rescale == 0 else self._rescaled(guided, conditional)

    def weight(self, log_snr: Tensor) -> Tensor:
        """w at λ () or (B,)."""
        weight = strength(self.scale, log_snr)
        if self.interval is None:
            return weight
        ratio = torch.exp(-0.5 * log_snr)
        inside = (ratio >= self.interval[0]) & (ratio <= self.interval[1])
        return torch.where(inside, weight, torch.ones_like(weight))

    def prior_log_prob_given(self, z: Tensor, cond: Cond) -> Tensor:
        plain = self.denoiser.prior_log_prob_given(z, expand(self.null(cond), z))
        if cond is None:
            return plain
        conditional = self.denoiser.prior_log_prob_given(z, expand(cond, z))
        return plain + self.weight(self.sde.log_snr(self.sde.terminal)).to(z.device) * (conditional - plain)

    def _both(self, x: Tensor, t: Tensor, cond: Cond) -> tuple[Prediction, Prediction]:
        """(unconditional, conditional)."""
        null = self.null(cond)
        if null is None:
            return self.denoiser(x, t, None), self.denoiser(x, t, cond)
        times = t if t.ndim == 0 else torch.cat([t, t])
        both = self.denoiser(torch.cat([x, x]), times, join(expand(null, x), cond))
        scales = self.sde.at(t, x)
        share = (None, None) if both.share is None else both.share.tensor_split(2)
        halves = zip(both.x0.tensor_split(2), both.eps.tensor_split(2), share, strict=True)
        plain, conditional = (Prediction(x0, eps, scales, v) for x0, eps, v in halves)
        return plain, conditional

    def _rescaled(self, guided: Prediction, conditional: Prediction) -> Prediction:
        if guided.x0[0].numel() < 2:
            raise ValueError("rescale compares standard deviations over one sample, and these are one number each.")
        wide, narrow = (p.x0.flatten(1).std(1) for p in (guided, conditional))
        factor = expand_as_batch(1 - self.rescale + self.rescale * narrow / wide.clamp(min=1e-12), guided.x0)
        # ε̂ from x_t = α x̂_0 + σ ε̂, as a change: nothing is lost where σ is small
        change = guided.scales.alpha / guided.scales.sigma * (1 - factor) * guided.x0
        return replace(guided, x0=factor * guided.x0, eps=guided.eps + change)


class Blend(DenoiserWrapper):
    r"""P + Σ w_i (P_i − P): any affine mixture of denoisers of one SDE.

    With P unconditional and P_i of one condition each it is the conjunction of Liu et al. 2022, eq. 11: exact for
    Gaussians of one width. Else the noised product of densities is not the product of the noised, so samples are only
    about those of the product (Du et al. 2023, sec. 3): of N(1, 0.2) N(0, 0.6)/N(0, 1) with the right mean and the
    variance 0.12 in place of 0.18.

    Args:
        denoiser: P; x_T is drawn as its own.
        others: pairs (P_i, w_i), w_i a number or a function of λ.

    Raises:
        ValueError: denoisers of different SDEs.
    """

    def __init__(self, denoiser: Denoiser, others: Sequence[tuple[Denoiser, Scale]]):
        super().__init__(denoiser)
        for other, _ in others:
            check_same(denoiser.sde, other.sde)
        self.others = torch.nn.ModuleList(other for other, _ in others)
        self.scales = [checked(scale) for _, scale in others]
        self.prior_evaluations += sum(other.prior_evaluations for other, _ in others)

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        snr = self.sde.log_snr(as_time(t, x))
        p = self.denoiser(x, t, cond)
        x0, eps = p.x0, p.eps
        for other, scale in zip(self.others, self.scales, strict=True):
            weight, q = expand_as_batch(strength(scale, snr), x).to(x0.dtype), other(x, t, cond)
            x0, eps = x0 + weight * (q.x0 - p.x0), eps + weight * (q.eps - p.eps)
        return replace(p, x0=x0, eps=eps)

    def prior_log_prob_given(self, z: Tensor, cond: Cond) -> Tensor:
        log_prob = own = self.denoiser.prior_log_prob_given(z, cond)
        for other, scale in zip(cast(Iterable[Denoiser], self.others), self.scales, strict=True):
            weight = strength(scale, self.sde.log_snr(self.sde.terminal)).to(z.device)
            log_prob = log_prob + weight * (other.prior_log_prob_given(z, cond) - own)
        return log_prob


class Auto(DenoiserWrapper):
    """(1 − w) P_guide + w P, away from a weaker model of the same data (Karras et al. 2024b, eq. 3).

    Its bias is that of classifier-free guidance at the same w: samples crowd where P is more certain than the guide.

    Args:
        denoiser: P.
        guide: trained less, or smaller, with the same data, SDE and condition.
        scale: w, a number or a function of λ. 1 is P bit for bit.

    Raises:
        ValueError: a guide of another SDE.
    """

    def __init__(self, denoiser: Denoiser, guide: Denoiser, scale: Scale = 1.0):
        super().__init__(denoiser)
        check_same(denoiser.sde, guide.sde)
        self.guide, self.scale = guide, checked(scale)
        self.prior_evaluations += guide.prior_evaluations

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        p = self.denoiser(x, t, cond)
        if self.scale == 1:
            return p
        return self.guide(x, t, cond).blend(p, strength(self.scale, self.sde.log_snr(as_time(t, x))))

    def prior_log_prob_given(self, z: Tensor, cond: Cond) -> Tensor:
        own, weak = (denoiser.prior_log_prob_given(z, cond) for denoiser in (self.denoiser, self.guide))
        return weak + strength(self.scale, self.sde.log_snr(self.sde.terminal)).to(z.device) * (own - weak)


def check_same(a: SDE, b: SDE) -> None:
    """Refuses another process: the same x_t and t would mean another noise."""
    t = torch.linspace(a.t_min, a.t_max, 5, dtype=torch.float64, device="cpu")
    if b.t_min > a.t_min or b.t_max < a.t_max or not all(map(torch.allclose, a.marginal(t), b.marginal(t))):
        raise ValueError(
            "A denoiser and its guides are evaluated at one x_t and t, so they need the same SDE; got "
            f"{type(a).__name__} on [{a.t_min}, {a.t_max}] and {type(b).__name__} on [{b.t_min}, {b.t_max}], or other "
            "constants."
        )
