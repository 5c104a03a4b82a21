"""The sampler for a budget of network calls, when nothing else is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..checks import whole
from ..diffusion.denoiser import Cond, Denoiser
from ..diffusion.grids import LogisticGrid
from ..noise.rng import Rng
from .multistep import Adams
from .sampler import Sampler


def default_sampler(denoiser: Denoiser, budget: int) -> Sampler:
    """The deterministic sampler of `budget` evaluations that does best over the mixtures of `benchmarks/quality.py`.

    Adams of order 3 in the angle, with its corrector from 12 evaluations on (before, what a step learns from its own
    end comes too late), on steps around the noise level of the data, closer around it the more there are.

    Raises:
        ValueError: budget < 1.
    """
    budget = whole(budget, "budget, the number of network calls,")
    if budget < 12:
        step = Adams(3)
        centre, width = (0.5, 1.5) if budget < 8 else (0.25, 1.25)
    else:
        step = Adams(3, corrector=3)
        centre, width = 0.5, 1 + 0.5 * (12 / budget) ** 2
    grid = LogisticGrid(denoiser.data_std, centre, width)
    return Sampler(step, grid, steps=budget, denoise=False)


def sample(
    denoiser: Denoiser, shape_or_x: Sequence[int] | Tensor, *, budget: int, cond: Cond = None, rng: Rng | None = None
) -> Tensor:
    """Samples (B, *event) by exactly `budget` network calls: `default_sampler`, run.

    They end at t_min, with what noise is left there.

    Args:
        denoiser: the model; `measure` its `data_std` first.
        shape_or_x: (B, *event), or x_T to start from.
        budget: network calls, ≥ 1.
        cond: condition of each sample.
        rng: source of the noise, default `Rng(0)`.

    Raises:
        ValueError: a budget below 1, or a shape that is not (B, *event).
        SolverError: a sample that is not finite.
    """
    return default_sampler(denoiser, budget)(denoiser, shape_or_x, cond=cond, rng=rng)
