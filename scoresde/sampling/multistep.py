r"""Multistep methods: one network call per step, and a polynomial through the values it gave before.

`weights.py` has the formulas, and derives DPM-Solver++ 2M from them; here is what a step remembers, and in which order
it predicts and corrects.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import whole
from ..diffusion.denoiser import Cond, Denoiser
from ..noise.rng import Rng
from ..ops import lincomb
from .sampler import LongStep, State
from .weights import Knot, bounded, carry, knots, published, weights

Term = tuple[Tensor | float, Any]
"""A coefficient and the tensor, or the noise, that it multiplies."""


class History(NamedTuple):
    """What a multistep method remembers.

    Attributes:
        base: the last step's x_s without its integral, (B, *event), for a corrector to add it again; else None.
        knots: the times of the values, the latest first.
        values: V there, (B, *event) each.
        origin: where the first step began, as long as steps are corrected from there; then None.
    """

    base: Tensor | None
    knots: tuple[Knot, ...]
    values: tuple[Tensor, ...]
    origin: Tensor | None


class Multistep(LongStep):
    r"""Any multistep method of `weights.py`; the named methods below are choices of its arguments.

    The predictor integrates the polynomial through the last `order` values. With a corrector the previous step is
    repeated once its end has been evaluated, with that value among its nodes, at no cost (PEC). The first steps have
    fewer values than the order needs, and the error of one Euler step would remain to the end; so without noise they
    are repeated from the very start with each new value until there are enough. For fourth order that takes one more
    evaluation, which `count` counts.

    Args:
        order: nodes of the predictor, 1 to 4.
        eta: η ≥ 0: 0 is the probability-flow ODE, 1 the reverse SDE, more is more noise and more contraction.
        sigma_data: c, in [0, inf]; None takes the denoiser's.
        corrector: nodes of the corrector with the new one, 0 for none, at most order + 1. It needs short first steps
            with noise prediction: on two trained networks c = ∞ ended 4 to 9 times farther with it, at 10 calls.
        slope: how two nodes make a line. "exact" integrates it; "bh1" and "bh2" take ½ h, resp. ½ (1 − e^{−h}), times
            the slope, as published for data prediction (Zhao et al. 2023, App. C), which differs in order h³.
        angle: polynomials in arctan(ς/c) instead of ℓ; for 0 < c < ∞.
        bound: Λ ≥ 2, how many times the largest value may count in a step (see `bounded` in `weights.py`): what makes
            extrapolation safe on networks. From 4 on order 3 is what it was on short equal steps, from 7 on order 4;
            below, the order is 2, or 3 with a corrector. None for no bound; not with a published slope.

    Raises:
        ValueError: arguments outside these ranges.
    """

    evaluations = 1
    default_steps = 20

    def __init__(
        self,
        order: int,
        *,
        eta: float = 0.0,
        sigma_data: float | None = 0.0,
        corrector: int = 0,
        slope: str = "exact",
        angle: bool = False,
        bound: float | None = None,
    ):
        name = type(self).__name__
        if whole(order, "order") not in (1, 2, 3, 4):
            raise ValueError(f"{name} needs order 1, 2, 3 or 4 (past values to use); got {order!r}.")
        if not (0 <= whole(corrector, "corrector", 0) <= order + 1):
            raise ValueError(f"{name}'s corrector has 0 to order + 1 = {order + 1} nodes; got {corrector}.")
        if slope not in ("exact", "bh1", "bh2"):
            raise ValueError(f"slope is 'exact', 'bh1' or 'bh2'; got {slope!r}.")
        if not (0 <= eta < math.inf):
            raise ValueError(f"{name} needs eta >= 0 (0 is the ODE, 1 the reverse SDE); got {eta}.")
        if sigma_data is not None and not sigma_data >= 0:
            raise ValueError(f"{name} needs sigma_data >= 0, None for the denoiser's own; got {sigma_data}.")
        if bound is not None and not (bound >= 2 and slope == "exact"):
            raise ValueError(f"{name} needs bound >= 2, and slope='exact' with it; got {bound} and slope={slope!r}.")
        self.nodes, self.eta, self.corrector = int(order), float(eta), int(corrector)
        self.sigma_data = None if sigma_data is None else float(sigma_data)
        self.slope, self.angle, self.bound = slope, angle, bound
        kept = order if bound is None else sum(gain <= bound for gain in _GAINS[:order])
        reached = min(kept + 1, corrector) if corrector > kept else kept
        self.order = 1.0 if eta > 0 else float(reached)  # with noise 1, as x̂_0 along a Brownian path is not smooth

    def count(self, steps: int) -> int:
        return steps + int(self.order > 3 and steps > 1)

    def __call__(
        self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, state: State, *, cond: Cond, rng: Rng
    ) -> tuple[Tensor, State]:
        here, there = knots(denoiser.sde, torch.stack([t, s]), self.q(denoiser))
        past: tuple[Knot, ...] = (here,)
        values: tuple[Tensor, ...] = (here.value(denoiser(x, t, cond)),)
        origin = x
        if state is not None:
            past, values, origin = past + state.knots, values + state.values, state.origin
            if origin is not None:
                x = self._integrate(*self.carried(origin, past[-1], here, rng), here, past, values, len(values) - 1)
                if self.order > 3 and len(values) == 2:
                    values = (here.value(denoiser(x, t, cond)), *state.values)
            elif self.corrector:
                x = self._integrate((1.0, state.base), None, here, past[: self.corrector], values, 1)
        carried, base = self.carried(x, here, there, rng), None
        if self.corrector:
            base = lincomb((carried[0],), carried[1])
            carried = (1.0, base), None
        x = self._integrate(*carried, there, past[: self.nodes], values, 0)
        keep = max(self.nodes, self.corrector, 2) - 1
        starting = self.eta == 0 and len(values) < self.order - 1
        return x, History(base, past[:keep], values[:keep], origin if starting else None)

    def moved(self, denoiser: Denoiser, state: State, t: Tensor, by: Tensor) -> State:
        # what a repeated step starts from is moved by as much as makes its end move by `by`
        base, origin = state.base, state.origin
        if origin is not None:
            here, first = knots(denoiser.sde, t[None], self.q(denoiser))[0], state.knots[-1]
            origin = lincomb(((1.0, origin), (first.norm / here.norm, by)))
        return state._replace(base=None if base is None else base + by, origin=origin)

    def q(self, denoiser: Denoiser) -> float:
        """q = c²/(1 + c²), 0 for data and 1 for noise prediction."""
        c = denoiser.data_std if self.sigma_data is None else self.sigma_data
        return 1.0 if c == math.inf else c * c / (1 + c * c)

    def carried(self, x: Tensor, start: Knot, end: Knot, rng: Rng) -> tuple[Term, Term | None]:
        """x at `end` without the integral: what the known Gaussian makes of x at `start`, and the noise."""
        if self.eta == 0:
            return (end.norm / start.norm, x), None
        scale, std = carry(start, end, self._noise(start))
        return (scale, x), (std, rng.noise(x))

    def _noise(self, start: Knot) -> Tensor | float:
        """η of the step that begins at `start`."""
        return self.eta

    def _integrate(
        self, base: Term, noise: Term | None, end: Knot, past: Sequence[Knot], values: Sequence[Tensor], at: int
    ) -> Tensor:
        """`base` and the integral, from knot number `at` to `end`, of the polynomial through the values there."""
        factors = self._weights([knot.level for knot in past], past[at], end, at)
        return lincomb((base, *zip(factors, values, strict=False)), noise)

    def _weights(self, levels: list[Tensor], start: Knot, end: Knot, at: int) -> tuple[Tensor, ...]:
        eta = self._noise(start) if self.eta > 0 else 0.0
        if start.is_pure_x0 and self.slope != "exact" and self.order < 4 and len(levels) <= 2:
            return published(levels, start, end, eta, latest=at == 0, slope=self.slope)
        if self.bound is None:
            return weights(levels, start, end, eta, angle=self.angle)
        return bounded(levels, start, end, eta, at=at, bound=self.bound, angle=self.angle)


class DPMSolverPP(Multistep):
    r"""DPM-Solver++, multistep (Lu et al. 2022, "DPM-Solver++", alg. 2, eq. 12), and its SDE form (their sec. 4.4).

    Order 2 is the published 2M. Order 3 integrates the parabola through three values; the published 3M code takes half
    of its curvature term and is of second order.

    Args:
        order: 1 (DDIM), 2 or 3.
        eta: η ≥ 0, see `Multistep`; 1 is SDE-DPM-Solver++.
    """

    def __init__(self, order: int = 2, eta: float = 0.0):
        _check_order(self, order, 3)
        super().__init__(order, eta=eta, slope="bh2")


class UniPC(Multistep):
    r"""UniPC: the multistep UniP with the corrector UniC, from one evaluation per step (Zhao et al. 2023, alg. 5–8).

    With the corrector order p becomes p + 1. At p = 3 that costs one more evaluation, in the first step.

    Args:
        order: p = 1, 2 or 3.
        variant: "bh1" (B(h) = h) or "bh2" (B(h) = e^h − 1); they matter for p = 1 and 2 only.
        eta: η ≥ 0, see `Multistep`.
    """

    def __init__(self, order: int = 3, variant: str = "bh2", eta: float = 0.0):
        _check_order(self, order, 3)
        super().__init__(order, eta=eta, corrector=order + 1, slope=variant)


class SASolver(Multistep):
    r"""SA-Solver: stochastic Adams predictor and corrector on x̂_0, the corrector with the predictor's own noise.

    (Xue et al. 2023, alg. 1, eq. 14 and 17, with the two-node rule of their code, B(h) = h.)

    Args:
        predictor: nodes of the predictor, 1 to 4.
        corrector: nodes of the corrector with the new one, 0 (none) to predictor + 1.
        tau: τ ≥ 0, the noise: 0 is the ODE, 1 the reverse SDE.
        between: (low, high), the noise levels σ/α on which τ acts (their sec. 6; 0.05 and 1 for EDM networks).
    """

    def __init__(
        self, predictor: int = 2, corrector: int = 2, tau: float = 1.0, between: tuple[float, float] = (0.0, math.inf)
    ):
        super().__init__(predictor, eta=tau, corrector=corrector, slope="bh1")
        low, high = between
        if not (0 <= low < high):
            raise ValueError(f"between is (low, high) with 0 <= low < high; got {between}.")
        self.between = float(low), float(high)

    def _noise(self, start: Knot) -> Tensor | float:
        low, high = self.between
        ratio = start.sigma / start.alpha
        return self.eta * ((ratio >= low) & (ratio <= high)).to(ratio.dtype)


class DEIS(Multistep):
    r"""DEIS with polynomials in log-SNR, ρ-AB (Zhang & Chen 2023, eq. 14–15): exponential Adams–Bashforth on ε̂.

    Args:
        order: 1 (DDIM) to 4. Order 4 costs one more evaluation, in the first step.
        eta: η ≥ 0, see `Multistep`.
    """

    def __init__(self, order: int = 3, eta: float = 0.0):
        super().__init__(order, eta=eta, sigma_data=math.inf)


class IPNDM(Multistep):
    r"""iPNDM: ε̂ extrapolated as on equal steps, then a DDIM step (Liu et al. 2022; Zhang & Chen 2023, App. H).

    Adams–Bashforth's coefficients on any grid: second order, however many values are used, unless ς falls in equal
    steps.

    Args:
        order: past values used, 1 to 4; the order reached is at most 2.
    """

    def __init__(self, order: int = 4):
        super().__init__(order, sigma_data=math.inf)
        self.order = float(min(order, 2))

    def _weights(self, levels: list[Tensor], start: Knot, end: Knot, at: int) -> tuple[Tensor, ...]:
        width = end.sigma - end.alpha / start.alpha * start.sigma
        return tuple(width * number for number in _ADAMS_BASHFORTH[len(levels) - 1])


class Adams(Multistep):
    r"""Adams–Bashforth and –Moulton on what a Gaussian of the data's spread leaves over: the default for exact scores.

    With w = x/√(α²c² + σ²), θ = arctan(σ/(αc)) and V as in this module, dw/dθ ∝ V: a plain ODE over a bounded angle, in
    which noise (θ = π/2) and Gaussian data (V = 0) cost nothing (c = 1 is v-prediction, Salimans & Ho 2022, App. D).

    Args:
        order: nodes of the predictor, 1 to 4.
        corrector: nodes of the corrector with the new one, 0 (none) to order + 1; see `Multistep` for what it needs.
        eta: η ≥ 0, see `Multistep`.
        sigma_data: c > 0, None for the denoiser's own.
        angle: polynomials in θ, best for exact scores; on four trained networks ten calls ended 2 to 43 times as far as
            those of a bounded `Multistep`. False has them in log-SNR.
    """

    def __init__(
        self, order: int = 3, corrector: int = 0, eta: float = 0.0, sigma_data: float | None = None, angle: bool = True
    ):
        super().__init__(order, eta=eta, corrector=corrector, sigma_data=sigma_data, angle=angle)


def _check_order(step: Multistep, order: int, highest: int) -> None:
    if order not in range(1, highest + 1):
        raise ValueError(f"{type(step).__name__} has orders 1 to {highest}; got {order!r}.")


_GAINS = (1.0, 2.0, 11 / 3, 20 / 3)  # Λ of Adams–Bashforth on short equal steps
_ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
