"""The sampler for a budget of network calls by rule, of models that no sampler was tried on."""

from __future__ import annotations

import math

from ..checks import whole
from ..diffusion.denoiser import Denoiser
from ..diffusion.grids import Grid, LogisticGrid, SoftplusGrid
from .flow_map import FlowMap
from .multistep import Adams, Multistep
from .sampler import Sampler, Step

_ROUGH, _ROUGH_EARLY = 2.0, 4.0
"""The roughness of a network (see `Denoiser`) from which the first steps decide: from 8 evaluations on, and below."""


def default_sampler(denoiser: Denoiser, budget: int) -> Sampler:
    """The deterministic sampler of `budget` evaluations that does best for its kind of network.

    Chosen on trained networks by `benchmarks/networks.py` and on mixtures by `benchmarks/quality.py`, by what
    `Denoiser.measure` knows:

    - Flow maps: so many steps of it.
    - Exact scores (roughness 0): Adams of order 3 in the angle, with its corrector from 12 evaluations on.
    - Networks: order 3 in log-SNR, with its corrector from 10 evaluations on, around the noise level of the data. No
      step counts the largest value more than 2.5 to 4 times, so that no error of a network is blown up.
    - Networks that are rough where there is little but noise (most that predict noise), and all that nobody has
      measured: order 2 on ε̂ below 8 evaluations, from then on as above, with the corrector; always with most steps at
      high noise.

    Raises:
        ValueError: budget < 1.
    """
    budget = whole(budget, "budget, the number of network calls,")
    c = denoiser.data_std
    if "end" in denoiser.told:
        return Sampler(FlowMap(), steps=budget, denoise=False)
    step: Step
    grid: Grid
    if denoiser.roughness == 0 and budget < 12:
        step = Adams(3)
        grid = LogisticGrid(c, 0.5, 1.5) if budget < 8 else LogisticGrid(c, 0.25, 1.25)
    elif denoiser.roughness == 0:
        step = Adams(3, corrector=3)
        grid = LogisticGrid(c, 0.5, 1 + 0.5 * (12 / budget) ** 2)
    elif not is_rough(denoiser, budget):
        grid = LogisticGrid(c, 0.0, 2.0 if budget < 30 else 3.0)
        corrector, bound = 0 if budget < 10 else 3, 3.0 if budget < 16 else 4.0
        step = Multistep(3, sigma_data=None, corrector=corrector, bound=bound)
    elif budget < 8:
        # a network that is known to be rough goes slower still; a smooth one that nobody has measured would lose by it
        grid = SoftplusGrid(c) if math.isinf(denoiser.roughness) else SoftplusGrid(c, 0.0, 2.0)
        step = Multistep(2, sigma_data=math.inf, bound=2.0)
    else:
        grid = SoftplusGrid(c, 3.0, 2.0) if budget < 16 else SoftplusGrid(c, 4.0, 1.0)
        step = Multistep(3, sigma_data=None, corrector=3, bound=2.5)
    return Sampler(step, grid, steps=budget, denoise=False)


def is_rough(denoiser: Denoiser, budget: int) -> bool:
    """Whether the first steps decide, so that most are to lie at high noise."""
    return denoiser.roughness >= (_ROUGH_EARLY if budget < 8 else _ROUGH)
