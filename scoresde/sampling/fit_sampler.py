r"""A sampler fitted to a model: the times and the weights of a multistep method with which few calls come nearest.

With w = x/M(t) the probability-flow ODE is dw/dℓ = κ(ℓ) V(ℓ) (`weights.py`), and every multistep method, corrected or
not, is w_{i+1} = w_i + Σ_j b_ij V(t_{i−j}). The weights that polynomials give are right for short steps; the best for
long ones depend on how the values of this model go on. So they are regressed: a fine solve from some noises is kept,
the method is run beside it, and at each step b_i is the least-squares solution of w_i + Σ_j b_ij V_{i−j} ≈ w at the
next time of the fine solve. That costs no calls beside those of the run, and takes back part of the error that has come
before, as V is taken along the run and not along the fine solve. (Shaul et al. 2024, "Bespoke Non-Stationary Solvers",
train all coefficients by gradients.) The times are fitted around that, as in `fit.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checks import whole
from ..diffusion.conditions import Cond
from ..diffusion.denoiser import CountingDenoiser, Denoiser, sample_std
from ..diffusion.undisturbed import undisturbed
from ..noise.rng import Rng
from ..ode import lagrange
from .default import default_sampler
from .fit import best, descend, generic_grids, reference, residuals, run
from .fitted import FittedSampler, build_sampler
from .sampler import Sampler
from .weights import Knot, knots, weights

_NODES = 4  # values that a step goes by
_RIDGE = 1e-6  # of the mean square of V: what keeps weights that the data leave open near those of polynomials


@undisturbed
@torch.no_grad()
def fit_sampler(
    denoiser: Denoiser,
    *,
    budget: int,
    shape: Sequence[int],
    rng: Rng | None = None,
    cond: Cond = None,
    samples: int | None = None,
    calls: int = 1200,
) -> FittedSampler:
    r"""The sampler of `budget` network calls that comes closest to the exact solution, for this model.

    Candidates are a multistep method with weights regressed along a fine solve, from the two best of several grids, and
    the step of `default_sampler`; the times of each are fitted. The best is compared with `default_sampler` on fresh
    noise, and the default is returned where it is not better by two standard errors. No gradient of the network is
    taken. The data's standard deviation is measured on the fine solve.

    It takes about `calls` + 2 max(160, 8 `budget`) evaluations of the denoiser on a batch of `samples`, and the memory
    of half as many batches.

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
    budget = whole(budget, "budget, the number of network calls,")
    samples = samples_for(shape) if samples is None else samples
    samples, calls, fine = whole(samples, "samples", 8), whole(calls, "calls"), max(160, 8 * budget)
    counted, rng = CountingDenoiser(denoiser), Rng(0) if rng is None else rng
    generic = default_sampler(denoiser, budget)
    path = _Path(counted, Sampler.start(denoiser, (samples, *shape), rng), cond, fine)
    found = _search(path, generic, budget, calls)
    fitted = build_sampler(denoiser, budget, *found)
    x = Sampler.start(denoiser, (samples, *shape), rng)
    *_, end = reference(counted, x, cond, fine)[1]
    ours, usual = (_distance(_last(counted, sampler, x, cond), end) for sampler in (fitted, generic))
    round_off = 4 * torch.finfo(x.dtype).eps * path.std
    is_fitted = float((usual - ours).mean()) > 2 * _stderr(usual - ours) + round_off
    kept, error = (fitted, ours) if is_fitted else (generic, usual)
    numbers = float(error.mean()), _stderr(error), float(usual.mean()), _stderr(usual)
    return FittedSampler(kept, budget, *numbers, counted.evaluations, *(found if is_fitted else (None, None, None)))


def samples_for(shape: Sequence[int]) -> int:
    """How many samples a fit takes: 4096 numbers' worth, 16 to 512."""
    return min(max(4096 // math.prod(shape), 16), 512)


_Found = tuple[list[float], list[list[float]] | None, float | None]
"""Knots, and the weights and the standard deviation of a `FittedStep`, or None of the generic step."""


class _Candidate(NamedTuple):
    residuals: Callable[[Tensor], np.ndarray]
    times: Tensor
    found: Callable[[Tensor], _Found]


def _search(path: _Path, generic: Sampler, budget: int, calls: int) -> _Found:
    """What comes nearest on the noises of `path`."""
    sde = path.denoiser.sde

    def plain(times: Tensor) -> np.ndarray:
        *_, x = run(path.denoiser, generic.step, path.x, times, path.cond)
        return residuals(x, path.end)

    grids = [*generic_grids(path.denoiser), generic.grid_for(path.denoiser)]
    starts = best(path.residuals, grids, sde, budget)[:2]
    tried = [_Candidate(path.residuals, times, path.found) for times in starts]
    tried.append(_Candidate(plain, generic.times(path.denoiser), lambda t: (sde.log_snr(t).tolist(), None, None)))
    iterations = (calls // budget - len(grids)) // (len(tried) * min(budget, 8))
    fitted = [one._replace(times=descend(one.residuals, one.times, sde, iterations)) for one in tried]
    chosen = min(fitted, key=lambda one: float(np.square(one.residuals(one.times)).sum()))
    return chosen.found(chosen.times)


class _Path:
    """A fine solve from the noises `x`, and methods that are regressed on it.

    Attributes:
        end: (B, *event), where it ends.
        std: standard deviation of the data, as the model makes them.
    """

    def __init__(self, denoiser: Denoiser, x: Tensor, cond: Cond, steps: int):
        self.denoiser, self.x, self.cond = denoiser, x, cond
        times, solve = reference(denoiser, x, cond, steps)
        states = [x, *solve]
        self.end = states[-1]
        self.std = sample_std(self.end) or 1.0  # one point has no scale
        self.points = knots(denoiser.sde, times, self._q)
        self.levels = torch.stack([point.level for point in self.points])
        self.states = torch.stack([y / point.norm.to(y) for y, point in zip(states, self.points, strict=True)])

    @property
    def _q(self) -> float:
        return self.std**2 / (1 + self.std**2)

    def at(self, knot: Knot) -> Tensor:
        """w there (B, *event), of the cubic through four states of the solve."""
        first = int(torch.searchsorted(self.levels, knot.level).clamp(2, len(self.levels) - 2)) - 2
        near = slice(first, first + 4)
        shares = lagrange(self.levels[near], knot.level[None])[:, 0]
        return torch.tensordot(shares.to(self.states), self.states[near], 1)

    def fitted(self, times: Tensor) -> tuple[Tensor, list[list[float]]]:
        """The end of a run at `times`, (B, *event), and the weights of its steps, which it finds on its way."""
        points = knots(self.denoiser.sde, times, self._q)
        values: list[Tensor] = []
        w, rows = self.x / points[0].norm.to(self.x), []
        for index, (here, there) in enumerate(pairwise(points)):
            value = here.value(self.denoiser(w * here.norm.to(w), times[index], self.cond))
            values = [value, *values[: _NODES - 1]]
            levels = [point.level for point in points[index::-1][:_NODES]]
            usual = torch.stack(weights(levels, here, there, 0.0)) / there.norm
            rows.append(_regressed(values, self.at(there) - w, usual))
            w = w + sum(b * v for b, v in zip(rows[-1], values, strict=True))
        return w * points[-1].norm.to(w), rows

    def residuals(self, times: Tensor) -> np.ndarray:
        return residuals(self.fitted(times)[0], self.end)

    def found(self, times: Tensor) -> _Found:
        return self.denoiser.sde.log_snr(times).tolist(), self.fitted(times)[1], self.std


def _regressed(values: Sequence[Tensor], missing: Tensor, usual: Tensor) -> list[float]:
    """The b (k,) with the least |Σ_j b_j V_j − missing|², near `usual` where that leaves them open."""
    v = torch.stack([value.double().flatten() for value in values])
    gram, usual = v @ v.T, usual.to(v)
    ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return (
        usual + torch.linalg.pinv(gram + ridge, hermitian=True) @ (v @ (missing.double().flatten() - usual @ v))
    ).tolist()


def _last(denoiser: Denoiser, sampler: Sampler, x: Tensor, cond: Cond) -> Tensor:
    *_, x = run(denoiser, sampler.step, x, sampler.times(denoiser), cond)
    return x


def _distance(x: Tensor, end: Tensor) -> Tensor:
    """RMS over the dimensions, (B,)."""
    return (x - end).double().square().flatten(1).mean(1).sqrt()


def _stderr(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values)))
