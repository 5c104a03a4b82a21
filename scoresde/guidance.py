r"""Guidance: denoisers around denoisers.

Every method here is one of two: an affine mixture of predictions, Σ w_i P_i with Σ w_i = 1, or a score added to one,
`P.shift(δ)`. Both keep x_t = α x̂_0 + σ ε̂, so guided denoisers go wherever denoisers go: any sampler, likelihood, or
another guide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .denoiser import Around, Cond, Denoiser
from .prediction import Prediction
from .shapes import as_time, expand_as_batch

Scale = float | Callable[[Tensor], Tensor]
"""A strength: a number, or a function of the log-SNR λ () or (B,) of the same shape."""


class Conditioned(Around):
    """A denoiser with its condition filled in: for samplers that have another, or none.

    Args:
        denoiser: of P(x, t, cond).
        cond: what it is asked for; one entry is shared by all samples of a batch.
    """

    def __init__(self, denoiser: Denoiser, cond: Cond):
        super().__init__(denoiser)
        self.cond = cond

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        if cond is not None:
            raise ValueError("This denoiser has its condition already; leave cond out.")
        return self.denoiser(x, t, spread(self.cond, len(x)))


class ClassifierFree(Around):
    r"""(1 − w) P(x, t, ∅) + w P(x, t, cond) (Ho & Salimans 2022, eq. 6, with w for their 1 + w).

    w = 1 is the conditional model itself and w = 0 the unconditional one, bit for bit and at the cost of one. Between
    and beyond, both are asked in one batch of 2B where the network has a null token. For w > 1 the guided score is not
    that of any noised density: samples are sharper and less various than p(x|cond), and their likelihood is the one of
    the guided flow.

    Args:
        denoiser: trained with its condition dropped at times.
        scale: w, a number or a function of λ.
        interval: (low, high) of σ/α, 0 ≤ low < high, in which to guide; elsewhere w is 1 (Kynkäänniemi et al. 2024).
        rescale: φ in [0, 1]: how far x̂_0 is brought back to the standard deviation, over one sample, of the
            conditional x̂_0 (Lin et al. 2023, eq. 15–16, there on their own prediction).
        null: a condition that means none, one entry or one per sample, for networks that do not know their own.

    Raises:
        ValueError: arguments outside these.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scale: Scale = 1.0,
        *,
        interval: tuple[float, float] = (0.0, math.inf),
        rescale: float = 0.0,
        null: Cond = None,
    ):
        super().__init__(denoiser)
        low, high = interval
        if not 0 <= low < high:
            raise ValueError(f"interval is (low, high) of σ/α with 0 <= low < high; got {interval}.")
        if not 0 <= rescale <= 1:
            raise ValueError(f"rescale is a share in [0, 1]; got {rescale}.")
        self.scale, self.interval = _checked(scale), (float(low), float(high))
        self.rescale, self.nothing = float(rescale), null

    def null(self, cond: Cond) -> Cond:
        return self.denoiser.null(cond) if self.nothing is None else self.nothing

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        if cond is None or self.scale == 0 and self.interval == (0, math.inf):
            return self.denoiser(x, t, None if self.nothing is None else spread(self.nothing, len(x)))
        if self.scale == 1:
            return self.denoiser(x, t, cond)
        t = as_time(t, x)
        plain, asked = self._both(x, t, cond)
        snr = self.sde.log_snr(t)
        weight = _at(self.scale, snr)
        if self.interval != (0, math.inf):
            ratio = torch.exp(-0.5 * snr)
            inside = (ratio >= self.interval[0]) & (ratio <= self.interval[1])
            weight = torch.where(inside, weight, torch.ones_like(weight))
        guided = plain.blend(asked, weight)
        if self.rescale == 0:
            return guided
        wide, narrow = (p.x0.flatten(1).std(1) for p in (guided, asked))
        factor = expand_as_batch(1 - self.rescale + self.rescale * narrow / wide.clamp(min=1e-12), x)
        x0 = factor * guided.x0
        # ε̂ from x_t = α x̂_0 + σ ε̂, as a change: nothing is lost where σ is small
        change = guided.scales.alpha / guided.scales.sigma * (1 - factor) * guided.x0
        return Prediction(x0, guided.eps + change, guided.scales)

    def _both(self, x: Tensor, t: Tensor, cond: Cond) -> tuple[Prediction, Prediction]:
        """(unconditional, conditional)."""
        null = self.null(cond)
        if null is None:
            return self.denoiser(x, t, None), self.denoiser(x, t, cond)
        n = len(x)
        times = t if t.ndim == 0 else torch.cat([t, t])
        both = self.denoiser(torch.cat([x, x]), times, join(spread(null, n), spread(cond, n)))
        return tuple(  # type: ignore[return-value]
            Prediction(both.x0[part], both.eps[part], self.sde.at(t, x)) for part in (slice(n), slice(n, None))
        )


class Blend(Around):
    r"""P + Σ w_i (P_i − P): any affine mixture of denoisers of one SDE.

    With P unconditional and P_i of one condition each it is the conjunction of Liu et al. 2022, eq. 11.

    Args:
        denoiser: P; priors and moments are its own.
        others: pairs (P_i, w_i), w_i a number or a function of λ.
    """

    def __init__(self, denoiser: Denoiser, others: Sequence[tuple[Denoiser, Scale]]):
        super().__init__(denoiser)
        self.others = torch.nn.ModuleList(other for other, _ in others)
        self.scales = [_checked(scale) for _, scale in others]

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        snr = self.sde.log_snr(as_time(t, x))
        p = self.denoiser(x, t, cond)
        x0, eps = p.x0, p.eps
        for other, scale in zip(self.others, self.scales, strict=True):
            weight, q = expand_as_batch(_at(scale, snr), x).to(x0.dtype), other(x, t, cond)
            x0, eps = x0 + weight * (q.x0 - p.x0), eps + weight * (q.eps - p.eps)
        return Prediction(x0, eps, p.scales)


class Auto(Around):
    """(1 − w) P_guide + w P, away from what a weaker model of the same data says (Karras et al. 2024b, eq. 3).

    Args:
        denoiser: P.
        guide: trained less, or smaller, with the same data, SDE and condition.
        scale: w, a number or a function of λ. 1 is P bit for bit.
    """

    def __init__(self, denoiser: Denoiser, guide: Denoiser, scale: Scale = 1.0):
        super().__init__(denoiser)
        self.guide, self.scale = guide, _checked(scale)

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        p = self.denoiser(x, t, cond)
        if self.scale == 1:
            return p
        return self.guide(x, t, cond).blend(p, _at(self.scale, self.sde.log_snr(as_time(t, x))))


class Energy(Around):
    r"""Samples of p(x_0) e^{−s E}, by δ = −s ∇_x E added to the score.

    Exact if E(x_t, t) = −log E[e^{−E(x_0)} | x_t], as a classifier of noisy x_t is trained to be. An energy of x̂_0
    (`of="x0"`) is the first-order guess of that: it pulls too weakly where p(x_0 | x_t) is wide, and costs a backward
    pass through the denoiser (Bansal et al. 2023; Chung et al. 2023).

    Args:
        denoiser: of p.
        energy: (z (B, *event), t (B,), cond) -> (B,), differentiable, in nats.
        scale: s, a number or a function of λ.
        of: "xt", z is x_t; or "x0", z is x̂_0.
        conditional: whether the denoiser is told the condition too.

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
        if of not in ("xt", "x0"):
            raise ValueError(f"An energy is of 'xt' or of 'x0'; got {of!r}.")
        self.energy, self.scale, self.of, self.conditional = energy, _checked(scale), of, bool(conditional)

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        t, told = as_time(t, x), cond if self.conditional else None
        times = t.to(torch.promote_types(x.dtype, torch.float32)).expand(len(x))

        def total(z: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
            p = self.denoiser(z, t, told) if self.of == "x0" else None
            value = self.energy(z if p is None else p.x0, times, cond)
            if value.shape != (len(x),):
                raise ValueError(f"An energy is one number per sample, ({len(x)},); got shape {tuple(value.shape)}.")
            return value.sum(), None if p is None else (p.x0, p.eps)

        slope, pair = torch.func.grad(total, has_aux=True)(x)
        p = self.denoiser(x, t, told) if pair is None else Prediction(*pair, self.sde.at(t, x))
        return p.shift(-expand_as_batch(_at(self.scale, self.sde.log_snr(t)), x).to(x.dtype) * slope)


class Classifier(Energy):
    r"""Samples of p(x) p(y|x)^s by the gradient of a classifier of noisy x_t (Dhariwal & Nichol 2021, alg. 1 and 2).

    Exact at s = 1 if the classifier is. At other s the noised p p(y|·)^s is not p_t p_t(y|·)^s, and samples are only
    about those.

    Args:
        denoiser: of p(x); told nothing of y unless `conditional`.
        log_prob: (x_t (B, *event), t (B,), y) -> log p(y | x_t) (B,) in nats, as `loss.ClassifierLoss` trains.
        scale: s.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        log_prob: Callable[[Tensor, Tensor, Cond], Tensor],
        scale: Scale = 1.0,
        *,
        conditional: bool = False,
    ):
        super().__init__(denoiser, lambda x, t, y: -log_prob(x, t, y), scale, conditional=conditional)
        self.log_prob = log_prob


def spread(cond: Cond, n: int) -> Cond:
    """A condition with one entry, for n samples; others are returned as they are."""
    if cond is None:
        return None
    if isinstance(cond, Mapping):
        return {name: _spread(value, n) for name, value in cond.items()}
    return _spread(cond, n)


def join(first: Cond, second: Cond) -> Cond:
    """The conditions of two batches, one behind the other."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return {name: torch.cat([first[name], value]) for name, value in second.items()}
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        raise ValueError("Conditions of one batch are all tensors, or all mappings with the same names.")
    return torch.cat([first, second])


def _spread(value: Tensor, n: int) -> Tensor:
    value = value[None] if value.ndim == 0 else value
    return value.expand(n, *value.shape[1:]) if len(value) == 1 else value


def _checked(scale: Scale) -> Scale:
    if callable(scale):
        return scale
    if not math.isfinite(scale):
        raise ValueError(f"A guidance scale is a finite number or a function of log-SNR; got {scale}.")
    return float(scale)


def _at(scale: Scale, log_snr: Tensor) -> Tensor:
    return scale(log_snr) if callable(scale) else torch.full_like(log_snr, scale)
