r"""A sampler fitted to a model: the times and the weights of a multistep method with which few calls come nearest.

The weights are regressed on a fine solve (`fine.py`), which takes one run. So many grids can be tried, and the times of
the best be fitted around that, as in `fit.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checks import whole
from ..diffusion.conditions import Cond
from ..diffusion.denoiser import CountingDenoiser, Denoiser
from ..diffusion.grids import Grid, KarrasGrid, LogisticGrid, QuadraticGrid, SoftplusGrid, UniformGrid
from ..diffusion.undisturbed import undisturbed
from ..noise.rng import Rng
from .default import default_sampler, is_rough
from .fine import FineSolve, distances
from .fit import descend, residuals, run
from .fitted import FittedSampler, build_sampler
from .sampler import Sampler

_FAR = 1e9  # a distance that stands for values that are not finite
_FEW = 20  # calls; with more, the rule's step on another grid is often nearest
_MANY = 64  # samples among which rare ones that end far away are seen


def fit_sampler(
    denoiser: Denoiser,
    *,
    budget: int,
    shape: Sequence[int],
    rng: Rng | None = None,
    cond: Cond = None,
    samples: int | None = None,
    calls: int = 1100,
) -> FittedSampler:
    r"""The sampler of `budget` network calls that comes closest to the exact solution, for this model.

    Candidates are multistep methods with weights regressed along a fine solve, on several grids, some that go by
    polynomials, and the step of `default_sampler`; the times of the best are fitted. What comes nearest is compared
    with `default_sampler` on fresh noise, and the default is returned where it is not farther by more than two standard
    errors and what the fine solve may be wrong by. No gradient of the network is taken. The data's standard deviation
    is measured on the fine solve.

    It takes about `calls` + 3 max(128, 6 `budget`) evaluations of the denoiser on a batch of `samples`, 4 in place of 3
    where fine solves disagree, and the memory of two such solves.

    Args:
        denoiser: the model, with the guidance around it under which it will be sampled.
        budget: network calls of a run, ≥ 1.
        shape: of one event, as `(3, 32, 32)`.
        rng: draws the noise, default `Rng(0)`.
        cond: conditions, `samples` of them.
        samples: noise vectors to fit to, and as many to compare on, ≥ 8; None takes 4096 numbers' worth, 16 to 512.
        calls: about how many evaluations the search may take.

    Raises:
        ValueError: a budget, number of samples or shape that cannot work.
        SolverError: the fine solve is not finite, as with a network that returns NaN.
    """
    budget, calls = whole(budget, "budget, the number of network calls,"), whole(calls, "calls")
    samples = whole(samples_for(shape) if samples is None else samples, "samples", 8)
    rng = Rng(0) if rng is None else rng
    how: dict[str, Any] = {"fine": max(128, 6 * budget), "calls": calls, "margin": 2}
    return nearest(denoiser, budget, (samples, *shape), rng, cond, **how)


@undisturbed
@torch.no_grad()
def nearest(
    denoiser: Denoiser, budget: int, shape: Sequence[int], rng: Rng, cond: Cond, *, fine: int, calls: int, margin: float
) -> FittedSampler:
    """`fit_sampler` on noises of `shape` (samples, *event), by solves of `fine` steps; no times are fitted where the
    calls do not suffice. The default is left for what is better by `margin` standard errors.
    """
    counted, generic = CountingDenoiser(denoiser), default_sampler(denoiser, budget)
    x = Sampler.start(denoiser, shape, rng)
    *_, usual_end = run(counted, generic.step, x, generic.times(denoiser), cond)
    solve = FineSolve(counted, x, cond, fine, usual_end)
    found = _search(solve, generic, budget, calls)
    fitted = build_sampler(denoiser, budget, *found)
    x = Sampler.start(denoiser, shape, rng)
    end = solve.ends(x, cond)
    ours, usual = (_distance(counted, sampler, x, cond, end) for sampler in (fitted, generic))
    round_off = 4 * torch.finfo(x.dtype).eps * solve.std
    is_fitted = float((usual - ours).mean()) > margin * _stderr(usual - ours) + round_off + solve.gap
    kept, error = (fitted, ours) if is_fitted else (generic, usual)
    numbers = float(error.mean()), _stderr(error), float(usual.mean()), _stderr(usual)
    return FittedSampler(kept, budget, *numbers, counted.evaluations, *(found if is_fitted else (None, None, None)))


def samples_for(shape: Sequence[int]) -> int:
    """How many samples a fit takes: 4096 numbers' worth, 16 to 512."""
    return min(max(4096 // math.prod(shape), 16), 512)


_Found = tuple[list[float], list[list[float]] | None, float | None]
"""Knots, and the weights of a `FittedStep`, or None of the generic step, and its data's standard deviation, or None."""


class _Candidate(NamedTuple):
    """A way to sample at given times: how far from the ends it comes, and what a `FittedSampler` keeps of it."""

    times: Tensor
    residuals: Callable[[Tensor], np.ndarray]
    found: Callable[[Tensor], _Found]

    @property
    def loss(self) -> float:
        return float(np.square(self.residuals(self.times)).sum())


def _search(solve: FineSolve, generic: Sampler, budget: int, calls: int) -> _Found:
    """What comes nearest on the noises of `solve`."""
    sde = solve.denoiser.sde

    def by_rule(times: Tensor) -> np.ndarray:
        *_, x = run(solve.denoiser, generic.step, solve.x, times, solve.cond)
        return residuals(x, solve.end)

    def following(grid: Grid, c: float, regressed: bool) -> _Candidate:
        kept = None if c == math.inf else c  # JSON has no infinity
        return _Candidate(
            grid(sde, budget),
            lambda times: residuals(solve.follow(times, c, regressed=regressed)[0], solve.end),
            lambda times: (sde.log_snr(times).tolist(), solve.follow(times, c, regressed=regressed)[1], kept),
        )

    grids, by_noise = _grids(solve.denoiser, budget, len(solve.x)), (UniformGrid(), KarrasGrid())
    tried = [following(grid, solve.std, True) for grid in (*grids, generic.grid_for(solve.denoiser))]
    tried += [following(grid, math.inf, regressed) for grid in by_noise for regressed in (True, False)]
    usual = _Candidate(generic.times(solve.denoiser), by_rule, lambda t: (sde.log_snr(t).tolist(), None, None))
    if budget > _FEW:
        tried += [usual._replace(times=grid(sde, budget)) for grid in (grids[0], grids[2], KarrasGrid())]
    best = [*sorted(tried, key=lambda one: one.loss)[:2], usual]
    iterations = (calls // budget - len(tried)) // (len(best) * min(budget, 8))
    fitted = [one._replace(times=descend(one.residuals, one.times, sde, iterations)) for one in best]
    chosen = min(fitted, key=lambda one: one.loss)
    return chosen.found(chosen.times)


def _grids(denoiser: Denoiser, budget: int, samples: int) -> list[Grid]:
    """Where the times begin: at high noise, and, where no error of the first steps can outgrow all that was seen,
    around the noise level of the data.

    On the digits' VP network one noise in sixteen ended ten times farther with logistic and quadratic grids of 20
    steps, which were the nearest from the sixteen of the trial. A fit to 64 sees such noises, and on that network
    comes nearest from a logistic grid.
    """
    c = denoiser.data_std
    softplus = [SoftplusGrid(c, centre, width) for centre, width in ((2.0, 1.0), (0.0, 2.0), (4.0, 1.0))]
    if math.isfinite(denoiser.roughness) and samples < _MANY and is_rough(denoiser, budget):
        return [*softplus, KarrasGrid(), UniformGrid()]
    logistic = [LogisticGrid(c, centre, width) for centre, width in ((0.5, 1.0), (0.25, 1.5), (-0.25, 1.5), (0.0, 2.0))]
    return [*softplus, KarrasGrid(), UniformGrid(), *logistic, QuadraticGrid()]


def _distance(denoiser: Denoiser, sampler: Sampler, x: Tensor, cond: Cond, end: Tensor) -> Tensor:
    """RMS over the dimensions of a run from x, (B,)."""
    *_, y = run(denoiser, sampler.step, x, sampler.times(denoiser), cond)
    return distances(y, end).nan_to_num(_FAR, _FAR).clamp(max=_FAR)


def _stderr(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values)))
