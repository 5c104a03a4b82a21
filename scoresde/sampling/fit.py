r"""A grid fitted to a model: n steps where the error is, instead of where a formula puts them.

The knots of the log-SNR are the unknowns. By gradients, the end points of n steps are pulled to those of a fine solve
from the same noise; without, the local errors of a fine solve are spread evenly over n steps. Either is one short
calibration; the result is n + 1 numbers (`FittedGrid`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise

import numpy as np
import torch
from torch import Tensor

from ..diffusion.conditions import Cond, take
from ..diffusion.denoiser import Denoiser
from ..diffusion.grids import FittedGrid, Grid, KarrasGrid, LogisticGrid, LogSNRGrid
from ..noise.rng import Rng
from ..ode import check_finite
from .multistep import Adams
from .sampler import Sampler, Step


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

    With gradients: the mean distance of the end points to those of a fine solve, from the same noise, is minimised by
    Adam over the log-SNR increments, from the best of the generic grids; the knots kept are those with the
    smallest distance on a quarter of the samples that the gradients never saw. Without: the step is tried all along a
    fine solve, at a quarter of the spacing; if it is of order p and errs by c h^{p + 1} there, Σ c h^{p + 1} is least
    for h ∝ c^{−1/(p + 1)}; where n is too small for such asymptotics a generic grid wins. Errors count in
    x/√(α²σ_d² + σ²), in which a Gaussian carries them on unchanged.

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
    if steps < 1 or samples < 8 or batch_size < 1 or iterations < 0 or fine_steps < 4 * steps:
        raise ValueError(
            "fit_grid needs steps >= 1, samples >= 8, batch_size >= 1, iterations >= 0 and fine_steps >= 4·steps; got "
            f"{steps}, {samples}, {batch_size}, {iterations}, {fine_steps}."
        )
    if step.evaluations is None:
        raise ValueError(f"{type(step).__name__} chooses its own steps; fit a grid for a step that follows one.")
    rng = Rng(0) if rng is None else rng
    x = Sampler.start(denoiser, (samples, *shape), rng)
    fine = LogisticGrid(denoiser.data_std, width=2.0)(denoiser.sde, fine_steps // 4 * 4).to(x.device)
    with torch.no_grad():
        *_, end = _run(denoiser, Adams(3, 3), x, fine, cond)
        check_finite(end, "The reference solution of fit_grid is not finite")
        fit = _Fit(denoiser, step, x, end, cond, samples // 4)
        spread = [] if gradients else [_spread_errors(denoiser, step, x, fine, steps, cond)]
        knots = fit.best([*_generic(denoiser), *spread], steps)
    return fit.descend(knots, batch_size, iterations if gradients and steps > 1 else 0)


class _Fit:
    """The distance of the end points as a function of the knots, and its minimisation."""

    def __init__(self, denoiser: Denoiser, step: Step, x: Tensor, end: Tensor, cond: Cond, held_out: int):
        self.denoiser, self.step, self.x, self.end, self.cond, self.held_out = denoiser, step, x, end, cond, held_out
        self.times = torch.tensor([denoiser.sde.t_max, denoiser.sde.t_min], dtype=torch.float64, device=x.device)

    def distance(self, knots: Tensor, rows: Tensor) -> Tensor:
        """Mean over the samples `rows` of the RMS distance per dimension, differentiable in the inner knots (n − 1,).

        Not the mean square: the few samples that end at another mode would outvote all others.
        """
        inner = self.denoiser.sde.time(knots)
        times = torch.cat([self.times[:1], inner, self.times[1:]])
        *_, y = _run(self.denoiser, self.step, self.x[rows], times, take(self.cond, rows))
        return (y - self.end[rows]).square().flatten(1).mean(1).add(1e-12).sqrt().mean()

    def held_out_distance(self, knots: Tensor) -> float:
        with torch.no_grad():
            value = float(self.distance(knots, torch.arange(self.held_out, device=self.x.device)))
        return math.inf if math.isnan(value) else value

    def best(self, grids: Sequence[Grid], steps: int) -> Tensor:
        """The inner knots of the best of several grids."""
        sde = self.denoiser.sde
        return min(
            (sde.log_snr(grid(sde, steps))[1:-1].to(self.x.device) for grid in grids), key=self.held_out_distance
        )

    def descend(self, knots: Tensor, batch_size: int, iterations: int) -> FittedGrid:
        """Adam over the logarithms of the increments, from `knots`."""
        low, high = self.denoiser.sde.log_snr(self.times)
        learned = torch.arange(self.held_out, len(self.x), device=self.x.device)
        best, least = knots, self.held_out_distance(knots)
        logits = torch.cat([low[None], knots, high[None]]).diff().log().requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(iterations, 1))
        for index in range(iterations):
            rows = learned.roll(-index * batch_size)[:batch_size]
            knots = low + (high - low) * logits.softmax(0).cumsum(0)[:-1]
            (logits.grad,) = torch.autograd.grad(self.distance(knots, rows).log(), logits)
            if not bool(torch.isfinite(logits.grad).all()):
                break  # two knots have met; the best so far stands
            optimizer.step()
            schedule.step()
            if index % 20 == 19 or index == iterations - 1:
                knots = (low + (high - low) * logits.softmax(0).cumsum(0)[:-1]).detach()
                value = self.held_out_distance(knots)
                if value < least:
                    best, least = knots, value
        return FittedGrid([float(low), *best.tolist(), float(high)])


def _generic(denoiser: Denoiser) -> list[Grid]:
    logistic = [LogisticGrid(denoiser.data_std, centre, width) for centre in (0.0, 0.5, 1.5) for width in (1.0, 1.5)]
    return [LogSNRGrid(), KarrasGrid(), *logistic]


def _run(denoiser: Denoiser, step: Step, x: Tensor, times: Tensor, cond: Cond) -> Iterator[Tensor]:
    """The states after every step."""
    state, rng = step.init(x), Rng(0)
    for t, s in pairwise(times):
        x, state = step(denoiser, x, t, s, state, cond=cond, rng=rng)
        yield x


def _spread_errors(
    denoiser: Denoiser, step: Step, x: Tensor, fine: Tensor, steps: int, cond: Cond, stride: int = 4
) -> FittedGrid:
    """Knots at equal shares of ∫ c^{1/(p + 1)} dλ, where c h^{p + 1} is the step's error on every `stride`-th time."""
    sde, times = denoiser.sde, fine[::stride]
    alpha, sigma = sde.marginal(times)
    unit = (alpha**2 * denoiser.data_std**2 + sigma**2).sqrt()
    state, rng, errors = step.init(x), Rng(0), []
    exact = islice(_run(denoiser, Adams(3, 3), x, fine, cond), stride - 1, None, stride)
    for index, (t, s) in enumerate(pairwise(times)):
        guess, state = step(denoiser, x, t, s, state, cond=cond, rng=rng)
        x = next(exact)
        errors.append((guess - x).double().square().mean().sqrt() / unit[index + 1])
    level = sde.log_snr(times)
    h = level.diff()
    error = torch.stack(errors)
    constant = (error.clamp(min=1e-3 * float(error.max())) / h ** (step.order + 1)) ** (1 / (step.order + 1))
    # neighbours share, as a multistep error belongs to more than one step; a tenth is spread evenly
    smooth = torch.nn.functional.avg_pool1d(constant[None, None], 3, 1, 1, count_include_pad=False)[0, 0]
    mass = smooth * h / (smooth * h).sum() + 0.1 * h / h.sum()
    place = torch.cat([mass.new_zeros(1), mass.cumsum(0)]) / mass.sum()
    shares = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    knots = np.interp(shares.numpy(), place.cpu().numpy(), level.cpu().numpy())
    return FittedGrid(knots.tolist())
