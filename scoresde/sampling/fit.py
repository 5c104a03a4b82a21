r"""Times fitted to a model: n steps where its errors are, instead of where a formula puts them.

The knots of the log-SNR are the unknowns, and the distances of the end points to those of a fine solve from the same
noise are the residuals. Levenberg and Marquardt's method needs a few runs for every derivative and no gradient of the
network; with gradients Adam goes on from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ..checks import whole
from ..diffusion.conditions import Cond, take
from ..diffusion.denoiser import Denoiser
from ..diffusion.grids import FittedGrid, Grid, KarrasGrid, LogisticGrid, LogSNRGrid, SoftplusGrid, UniformGrid
from ..diffusion.sde import SDE
from ..diffusion.undisturbed import undisturbed
from ..noise.rng import Rng
from ..ode import check_finite
from ..ops.broadcast import host
from .multistep import Multistep
from .sampler import Sampler, Step

_KNOBS = 8
"""Unknowns that move the times: steps grow and shrink by a factor that is linear between so many of them."""


@undisturbed
@torch.no_grad()
def fit_grid(
    denoiser: Denoiser,
    step: Step,
    *,
    steps: int,
    shape: Sequence[int],
    rng: Rng | None = None,
    cond: Cond = None,
    samples: int = 512,
    batch_size: int = 128,
    iterations: int = 400,
    fine_steps: int = 200,
    gradients: bool = True,
) -> FittedGrid:
    r"""The grid of `steps` steps on which `step` comes closest to the exact solution, for this model.

    The mean distance of the end points to those of a fine solve, from the same noise, is minimised over the log-SNR of
    the knots, from the best of the generic grids: by at most twelve iterations of Levenberg and Marquardt's method, and
    with gradients by Adam after it, on batches; the knots kept are those with the smallest distance on a quarter of the
    samples that the gradients never saw.

    Args:
        denoiser: the model; for a conditional one fit with conditions, use the grid under guidance.
        step: a deterministic step with `evaluations` (Adams, DPMSolverPP, Heun …).
        steps: n ≥ 1.
        shape: of one event, as `(3, 32, 32)`.
        rng: draws the noise.
        cond: conditions, `samples` of them.
        samples: noise vectors, ≥ 8.
        batch_size: of the gradient steps.
        iterations: gradient steps.
        fine_steps: of the reference.
        gradients: False for networks too large to differentiate through n evaluations.

    Raises:
        ValueError: steps, samples or shape that cannot work, or a step that is adaptive.
        SolverError: a reference that is not finite.
    """
    steps, samples, batch_size = whole(steps, "steps"), whole(samples, "samples", 8), whole(batch_size, "batch_size")
    iterations, fine_steps = whole(iterations, "iterations", 0), whole(fine_steps, "fine_steps (4 steps)", 4 * steps)
    if step.evaluations is None:
        raise ValueError(f"{type(step).__name__} chooses its own steps; fit a grid for a step that follows one.")
    x = Sampler.start(denoiser, (samples, *shape), Rng(0) if rng is None else rng)
    *_, end = reference(denoiser, x, cond, fine_steps)[1]
    fit = _Fit(denoiser, step, x, end, cond, samples // 4)
    times = descend(fit.residuals, best(fit.residuals, generic_grids(denoiser), denoiser.sde, steps)[0], denoiser.sde)
    return fit.by_gradients(times, batch_size, iterations if gradients and steps > 1 else 0)


class _Fit:
    """The distance of the end points as a function of the times, and its minimisation by gradients."""

    def __init__(self, denoiser: Denoiser, step: Step, x: Tensor, end: Tensor, cond: Cond, held_out: int):
        self.denoiser, self.step, self.x, self.end, self.cond, self.held_out = denoiser, step, x, end, cond, held_out
        self.ends = host([denoiser.sde.t_max, denoiser.sde.t_min])

    def residuals(self, times: Tensor) -> np.ndarray:
        *_, y = run(self.denoiser, self.step, self.x, times, self.cond)
        return residuals(y, self.end)

    def distance(self, knots: Tensor, rows: Tensor) -> Tensor:
        """Mean over the samples `rows` of the RMS distance per dimension, differentiable in the inner knots (n − 1,).

        Not the mean square: the few samples that end at another mode would outvote all others.
        """
        times = torch.cat([self.ends[:1], self.denoiser.sde.time(knots), self.ends[1:]])
        *_, y = run(self.denoiser, self.step, self.x[rows], times, take(self.cond, rows))
        return (y - self.end[rows]).square().flatten(1).mean(1).add(1e-12).sqrt().mean()

    def held_out_distance(self, knots: Tensor) -> float:
        value = float(self.distance(knots, torch.arange(self.held_out, device=self.x.device)))
        return math.inf if math.isnan(value) else value

    def by_gradients(self, times: Tensor, batch_size: int, iterations: int) -> FittedGrid:
        """Adam over the logarithms of the increments of log-SNR, from `times`."""
        level = self.denoiser.sde.log_snr(times)
        low, high, knots = level[0], level[-1], level[1:-1]
        learned = torch.arange(self.held_out, len(self.x), device=self.x.device)
        found, least = knots, self.held_out_distance(knots)
        logits = level.diff().log().requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(iterations, 1))
        for index in range(iterations):
            rows = learned.roll(-index * batch_size)[:batch_size]
            with torch.enable_grad():
                knots = low + (high - low) * logits.softmax(0).cumsum(0)[:-1]
                (logits.grad,) = torch.autograd.grad(self.distance(knots, rows).log(), logits)
            if not bool(torch.isfinite(logits.grad).all()):
                break  # two knots have met; the best so far stands
            optimizer.step()
            schedule.step()
            if index % 20 == 19 or index == iterations - 1:
                knots = low + (high - low) * logits.softmax(0).cumsum(0)[:-1]
                value = self.held_out_distance(knots)
                if value < least:
                    found, least = knots, value
        return FittedGrid([float(low), *found.tolist(), float(high)])


def generic_grids(denoiser: Denoiser) -> list[Grid]:
    """Where fits begin."""
    c = denoiser.data_std
    logistic = [LogisticGrid(c, centre, width) for centre, width in ((0.25, 1.0), (0.25, 1.5), (0.25, 2.5), (1.5, 1.5))]
    return [*logistic, SoftplusGrid(c), LogSNRGrid(), KarrasGrid(), UniformGrid()]


def _at(level: Tensor, sde: SDE, ends: Tensor) -> Tensor:
    """Times of rising log-SNR, with the first and the last of `ends`, which an inverse map would leave by round-off."""
    times = sde.time(level)
    times[0], times[-1] = ends[0], ends[-1]
    return times


def run(denoiser: Denoiser, step: Step, x: Tensor, times: Tensor, cond: Cond) -> Iterator[Tensor]:
    """The states after every step."""
    state, rng = step.init(x), Rng(0)
    for t, s in pairwise(times):
        x, state = step(denoiser, x, t, s, state, cond=cond, rng=rng)
        yield x


def reference(denoiser: Denoiser, x: Tensor, cond: Cond, steps: int) -> tuple[Tensor, Iterator[Tensor]]:
    """Times (steps + 1,), and the states after each step of a solve that is meant to be exact.

    Raises:
        SolverError: the last state is not finite; as the iterator reaches it.
    """
    step = Multistep(3, sigma_data=None, corrector=3, bound=2.5)
    times = LogisticGrid(denoiser.data_std, 0.0, 3.0)(denoiser.sde, steps)

    def states() -> Iterator[Tensor]:
        for y in run(denoiser, step, x, times, cond):
            yield y
        check_finite(
            y, "The fine solve that a fit starts with is not finite: the network's values are not, or are wild"
        )

    return times, states()


def residuals(x: Tensor, end: Tensor) -> np.ndarray:
    """Numbers whose squares sum up to the mean over the samples of the RMS distance of x to `end`, both (B, *event).

    So the few samples that end at another mode do not outvote all others, as they would with the mean square. Of more
    than 2^16 numbers evenly spaced ones are taken.
    """
    error = (x - end).double().flatten(1)
    error = (error / error.square().mean(1, keepdim=True).sqrt().clamp(min=1e-9).sqrt()).flatten()
    error = error[:: max(1, error.numel() // 2**16)] / math.sqrt(error.numel())
    return error.nan_to_num(1e3, 1e3, -1e3).cpu().numpy()


def best(errors: Callable[[Tensor], np.ndarray], grids: Sequence[Grid], sde: SDE, steps: int) -> list[Tensor]:
    """The times of all the grids, the best first."""
    made = [grid(sde, steps) for grid in grids]
    return sorted(made, key=lambda times: float(np.square(errors(times)).sum()))


def descend(errors: Callable[[Tensor], np.ndarray], times: Tensor, sde: SDE, iterations: int = 12) -> Tensor:
    """Times near `times` with a smaller sum of squares of `errors`, by Levenberg and Marquardt's method."""
    from scipy.optimize import least_squares

    n, level = len(times) - 1, sde.log_snr(times).numpy()
    knobs = min(n, _KNOBS)
    places, apart = np.linspace(0, n - 1, knobs), np.diff(level)
    shape = np.stack([np.interp(np.arange(n), places, row) for row in np.eye(knobs)], 1)[:, 1:]

    def moved(factors: np.ndarray) -> Tensor:
        steps = apart * np.exp(shape @ (factors - 1))
        shares = np.append(0.0, steps.cumsum()) / steps.sum()
        return _at(torch.from_numpy(level[0] + shares * (level[-1] - level[0])), sde, times)

    if knobs == 1 or iterations < 1:
        return times
    start = np.ones(knobs - 1)  # not zeros, as `diff_step` is relative
    precision = {"diff_step": 0.05, "ftol": 1e-3, "xtol": 1e-3}
    return moved(least_squares(lambda factors: errors(moved(factors)), start, max_nfev=iterations, **precision).x)
