r"""A fine solve from some noises, and multistep methods whose weights are regressed on it.

With w = x/M(t) the probability-flow ODE is dw/dℓ = κ(ℓ) V(ℓ) (`weights.py`), and every multistep method, corrected or
not, is w_{i+1} = w_i + Σ_j b_ij V(t_{i−j}). The weights that polynomials give are right for short steps; the best for
long ones depend on how the values of this model go on. So they are regressed: the method is run beside the fine solve,
and at each step b_i is the least-squares solution of w_i + Σ_j b_ij V_{i−j} ≈ w at the next time of the fine solve.
That costs no calls beside those of the run, and takes back part of the error that has come before, as V is taken along
the run and not along the fine solve. (Shaul et al. 2024, "Bespoke Non-Stationary Solvers", train all coefficients by
gradients.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..diffusion.conditions import Cond
from ..diffusion.denoiser import Denoiser, sample_std
from ..diffusion.grids import Grid, KarrasGrid, LogisticGrid, SoftplusGrid
from ..ode import check_finite, lagrange
from .fit import run
from .multistep import Multistep
from .sampler import Step
from .weights import Knot, bounded, knots

_NODES = 4  # values that a step goes by
_CLOSE = 0.1  # of the distance that is to be shortened: so near are solves that are believed at once
_RIDGE = 1e-6  # of the mean square of V: what keeps weights that the data leave open near those of polynomials


class FineSolve:
    """Where the ODE takes the noises `x`, on the way and at the end.

    No one solver is right for every network: where x̂_0 is wild at t_max, one whose steps go by the data is off by as
    much as the samples are wide. So two are run, and a third if they end farther from each other than a tenth of the
    way to the ends `usual`. The two that end nearest to each other are believed.

    Args:
        denoiser: the model.
        x: noises (n, *event).
        cond: conditions of them.
        steps: of each solve.
        usual: (n, *event), where a sampler ends that is to be surpassed.

    Attributes:
        end: (n, *event), where it ends.
        gap: RMS distance per dimension to the end of the other that is believed, mean over the noises: about how wrong
            `end` may be.
        std: standard deviation of the data, as the model makes them.

    Raises:
        SolverError: none of them is finite.
    """

    def __init__(self, denoiser: Denoiser, x: Tensor, cond: Cond, steps: int, usual: Tensor):
        self.denoiser, self.x, self.cond, self.gap = denoiser, x, cond, math.inf
        ends: list[Tensor] = []
        for step, grid in solvers(denoiser):
            times = grid(denoiser.sde, steps)
            states = [x, *run(denoiser, step, x, times, cond)]
            gap = min((_apart(states[-1], end) for end in ends), default=math.inf)
            if gap < self.gap or not ends:
                self.solver, self.times, self.states, self.gap = step, times, states, gap
            ends += [states[-1]] if bool(torch.isfinite(states[-1]).all()) else []
            if self.gap < _CLOSE * _apart(self.states[-1], usual):
                break
        self.end = self.states[-1]
        _check(self.end)
        self.std = sample_std(self.end) or 1.0  # one point has no scale
        self.levels = 0.5 * denoiser.sde.log_snr(self.times)

    def ends(self, x: Tensor, cond: Cond) -> Tensor:
        """Where the ODE takes other noises, by the solver that is believed."""
        *_, end = run(self.denoiser, self.solver, x, self.times, cond)
        _check(end)
        return end

    def at(self, knot: Knot) -> Tensor:
        """w there (n, *event), of the cubic through four states of the solve."""
        first = int(torch.searchsorted(self.levels, knot.level).clamp(2, len(self.levels) - 2)) - 2
        near = slice(first, first + 4)
        around = knots(self.denoiser.sde, self.times[near], knot.q)
        shares = lagrange(self.levels[near], knot.level[None])[:, 0]
        states = [y / point.norm.to(y) for y, point in zip(self.states[near], around, strict=True)]
        return sum(share.to(y) * y for share, y in zip(shares, states, strict=True))

    def follow(self, times: Tensor, c: float, *, regressed: bool = True) -> tuple[Tensor, list[list[float]]]:
        """The end of a run at `times`, (n, *event), and the weights of its steps.

        Args:
            times: falling (steps + 1,).
            c: the standard deviation of the data that V is made with, in (0, inf]; inf is noise prediction.
            regressed: by weights that are found on the way; else by those of polynomials, none of which counts a value
                more than twice.
        """
        points = knots(self.denoiser.sde, times, 1.0 if c == math.inf else c * c / (1 + c * c))
        values: list[Tensor] = []
        w, rows = self.x / points[0].norm.to(self.x), []
        for index, (here, there) in enumerate(pairwise(points)):
            value = here.value(self.denoiser(w * here.norm.to(w), times[index], self.cond))
            values = [value, *values[: _NODES - 1]]
            levels = [point.level for point in points[index::-1][:_NODES]]
            rule = torch.stack(bounded(levels[:3], here, there, 0.0, at=0, bound=2.0)) / there.norm
            usual = torch.cat([rule, rule.new_zeros(len(levels) - len(rule))])
            row = _regressed(values, self.at(there) - w, usual) if regressed else usual.tolist()
            rows.append(row)
            w = w + sum(b * v for b, v in zip(row, values, strict=True))
        return w * points[-1].norm.to(w), rows


def solvers(denoiser: Denoiser) -> list[tuple[Step, Grid]]:
    """Solvers that go wrong in different places."""
    corrected = Multistep(3, sigma_data=None, corrector=3, bound=2.5)
    by_noise = Multistep(3, sigma_data=math.inf, bound=4.0)
    c = denoiser.data_std
    return [(corrected, SoftplusGrid(c, 4.0, 1.0)), (corrected, LogisticGrid(c, 0.0, 3.0)), (by_noise, KarrasGrid())]


def _check(end: Tensor) -> None:
    check_finite(end, "The fine solve that a fit starts with is not finite: the network's values are not, or are wild")


def _apart(x: Tensor, y: Tensor) -> float:
    return float(distances(x, y).mean())


def distances(x: Tensor, y: Tensor) -> Tensor:
    """RMS over the dimensions, (n,)."""
    return (x - y).double().square().flatten(1).mean(1).sqrt()


def _regressed(values: Sequence[Tensor], missing: Tensor, usual: Tensor) -> list[float]:
    """The b (k,) with the least |Σ_j b_j V_j − missing|², near `usual` where that leaves them open."""
    v = torch.stack([value.double().flatten() for value in values])
    gram, usual = v @ v.T, usual.to(v)
    if not bool(torch.isfinite(gram).all()):
        return usual.tolist()  # the run is lost
    ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return (
        usual + torch.linalg.pinv(gram + ridge, hermitian=True) @ (v @ (missing.double().flatten() - usual @ v))
    ).tolist()
