"""The reverse SDE by the solvers of torchsde, with a drift of the user's where it is not linear."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..checks import whole
from ..diffusion.denoiser import Cond, Denoiser
from ..noise.rng import Rng
from ..ode import SolverError, check_finite, check_tolerances
from ..ops.broadcast import coefficient
from .sampler import State, Step

METHODS: dict[str, tuple[float, int, str]] = {
    "srk": (1.5, 2, "ito"),
    "euler": (1.0, 1, "ito"),
    "heun": (1.0, 2, "stratonovich"),
    "midpoint": (1.0, 2, "stratonovich"),
}
"""Strong order for additive noise, network calls per step, and the calculus it is written in (here they agree)."""


class TorchSDE(Step):
    r"""Anderson's reverse SDE `dx = [f(x, t) − g² score] dt + g dw` by torchsde (Li et al. 2020), on its Brownian
    interval (Kidger et al. 2021). The noise is additive, for which SRK (SRA1, Rößler 2010) has strong order 1.5.

    A step of the grid is one solve, of `steps` equal steps in t: one by default, so the grid decides.

    Args:
        method: "srk", "euler", "heun" or "midpoint".
        steps: ≥ 1, inner steps per solve; the first one's size where `adaptive`.
        adaptive: control the error by step doubling, for the batch as one: a sample then depends on its batch-mates.
        rtol, atol: tolerances of that, > 0.
        drift: (x (B, *event), t ()) -> drift of the **forward** SDE like x, in place of f(t) x. The score has to be
            that of its marginals (`ScoreFunction`); g(t) stays that of the SDE.
        max_evaluations: limit on network calls per solve.

    Raises:
        ValueError: an argument outside these, or a time per sample.
        ImportError: torchsde is not installed.
        SolverError: a state or an error estimate that is not finite, step size underflow, evaluation limit.
    """

    def __init__(
        self,
        method: str = "srk",
        steps: int = 1,
        adaptive: bool = False,
        rtol: float = 1e-2,
        atol: float = 1e-2,
        drift: Callable[[Tensor, Tensor], Tensor] | None = None,
        max_evaluations: int = 20_000,
    ):
        if method not in METHODS:
            raise ValueError(f"TorchSDE has no method {method!r}; choose one of {', '.join(METHODS)}.")
        self.rtol, self.atol = check_tolerances(rtol, atol)
        self.method, self.adaptive, self.drift = method, bool(adaptive), drift
        self.steps, self.max_evaluations = whole(steps, "steps"), whole(max_evaluations, "max_evaluations")
        self.order, per_step, _ = METHODS[method]
        self.evaluations = None if adaptive else self.steps * per_step
        self.default_steps = 1 if adaptive else 1000 // per_step

    def __call__(
        self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, state: State, *, cond: Cond, rng: Rng
    ) -> tuple[Tensor, State]:
        try:
            import torchsde
        except ImportError as error:
            raise ImportError("TorchSDE needs the package torchsde: pip install torchsde.") from error
        if t.ndim or s.ndim:
            raise ValueError("A solve by torchsde has one start and one end for the batch: pass scalar times.")
        span = float(t) - float(s)
        if span == 0:
            return x, state
        field = _Reverse(self, denoiser, x, float(t), float(s), cond)
        y = x.flatten(1).to(torch.promote_types(x.dtype, torch.float32))
        noise = _brownian(torchsde.BrownianInterval, y, span, rng)
        try:
            # torchsde probes a field with numbers of the global generator
            with torch.random.fork_rng([x.device] if x.is_cuda else []), warnings.catch_warnings():
                warnings.filterwarnings("error", "Hitting minimum allowed step size")
                y = torchsde.sdeint(
                    field,
                    y,
                    torch.tensor([0.0, span], dtype=torch.float64, device=x.device),
                    bm=noise,
                    method=self.method,
                    dt=span / self.steps * (1 + 1e-9),  # or round-off leaves a sliver for one more step
                    adaptive=self.adaptive,
                    rtol=self.rtol,
                    atol=self.atol,
                    dt_min=1e-6 * span,
                )[-1]
        except (AssertionError, UserWarning) as error:  # how torchsde reports a NaN and an underflow
            raise SolverError(f"torchsde {self.method}: {error}", t=field.t, evaluations=field.evaluations) from error
        check_finite(y, "The solution is not finite", t=float(s), evaluations=field.evaluations)
        return y.to(x.dtype).reshape(x.shape), state


class _Reverse:
    """dx = −[f − g² score] dτ + g dw with t = start − τ, in the form torchsde asks for.

    `g_prod` rather than `g`: a matrix of D × D per sample would be one number times the identity.
    """

    noise_type = "additive"

    def __init__(self, step: TorchSDE, denoiser: Denoiser, like: Tensor, start: float, end: float, cond: Cond):
        self.denoiser, self.like, self.start, self.end, self.cond = denoiser, like, start, end, cond
        self.drift, self.limit, self.sde_type = step.drift, step.max_evaluations, METHODS[step.method][2]
        self.evaluations, self.t = 0, start
        self.known: deque[tuple[float, Tensor, Tensor]] = deque(maxlen=6)

    def time(self, tau: Tensor) -> Tensor:
        return (self.start - tau.double()).clamp(self.end, self.start)

    def f(self, tau: Tensor, y: Tensor) -> Tensor:
        """−f + g² score; torchsde asks up to three times for the same point, the network is asked once."""
        for when, where, value in self.known:
            if where is y and when == float(tau):
                return value
        if self.evaluations >= self.limit:
            raise SolverError(
                f"The solver used its max_evaluations={self.limit}", t=self.t, evaluations=self.evaluations
            )
        self.evaluations += 1
        sde, t = self.denoiser.sde, self.time(tau)
        self.t, x = float(t), y.to(self.like.dtype).reshape(self.like.shape)
        g, (_, sigma) = sde.diffusion(t), sde.marginal(t)
        value = -coefficient(g**2 / sigma, y) * self.denoiser(x, t, self.cond).eps.flatten(1).to(y.dtype)
        forward = coefficient(sde.drift(t), y) * y if self.drift is None else self.drift(x, t).flatten(1).to(y.dtype)
        value = value - forward
        self.known.append((float(tau), y, value))
        return value

    def g_prod(self, tau: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return coefficient(self.denoiser.sde.diffusion(self.time(tau)), y) * v


def _brownian(interval: Callable[..., Any], y: Tensor, span: float, rng: Rng) -> Any:
    """A Brownian motion on [0, span] with space-time Lévy area, seeded from `rng`; one per sample if that has seeds."""
    seeds = rng.integers(2**62, (len(rng),)).tolist()
    make = partial(interval, 0.0, span, dtype=y.dtype, device=y.device, levy_area_approximation="space-time")
    if rng.per_sample:
        return _Stacked([make(size=(1, y.shape[1]), entropy=seed) for seed in seeds])
    return make(size=(len(y), y.shape[1]), entropy=seeds[0])


class _Stacked:
    """Brownian motions of one sample each, as that of a batch."""

    def __init__(self, parts: list[Any]):
        self.parts, self.levy_area_approximation = parts, parts[0].levy_area_approximation
        self.shape = (len(parts), parts[0].shape[1])

    def __call__(self, start: Tensor, end: Tensor, **options: bool) -> Any:
        drawn = [part(start, end, **options) for part in self.parts]
        if isinstance(drawn[0], Tensor):
            return torch.cat(drawn)
        return tuple(torch.cat(values) for values in zip(*drawn, strict=True))
