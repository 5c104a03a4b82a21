"""Samples for a budget of network calls, when nothing else is asked for: by a sampler that was tried on the model."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import whole
from ..diffusion.conditions import Cond, each, named
from ..diffusion.denoiser import Denoiser
from ..noise.rng import Rng
from ..ode import SolverError
from .default import default_sampler
from .fit_sampler import nearest
from .fitted import FittedSampler
from .sampler import Sampler

_MOST = 64
"""The largest budget that is tried: with more calls the generic sampler is near the end, and trials are dear."""

_log = logging.getLogger(__name__)


def pilot(
    denoiser: Denoiser, shape: Sequence[int], *, budgets: Sequence[int] = (5, 10, 20, 50), cond: Cond = None
) -> dict[int, FittedSampler]:
    r"""A sampler for each budget, chosen by trial on this model; `sample` takes it from then on.

    No fixed rule knows which steps a network wants. So fifteen candidates, most of them multistep methods with weights
    regressed along a fine solve, and `default_sampler` are run from a few noises of their own and compared with that
    solve; the nearest is kept if it beats `default_sampler` on fresh noises by a standard error and by what the fine
    solve may be wrong. It is `fit_sampler` with less effort: 3 max(64, 4 `budget`) + about 20 `budget` evaluations, 400
    for ten calls, on 8 to 64 samples (1024 numbers' worth); 4 in place of 3 where fine solves disagree.

    The choice lies on the denoiser, for this shape and kind of conditions, and is copied and moved with it, but is no
    part of its state_dict. `measure` forgets it, as after more training.

    Args:
        denoiser: the model, with the guidance around it under which it will be sampled.
        shape: of one event, as `(3, 32, 32)`.
        budgets: network calls, each ≥ 1.
        cond: conditions, one or more, which are taken in turn.

    Raises:
        ValueError: a budget or shape that cannot work.
        SolverError: the fine solve is not finite, as with a network that returns NaN.
    """
    return {budget: _tried(denoiser, shape, whole(budget, "Each budget"), cond) for budget in budgets}


def sample(
    denoiser: Denoiser,
    shape_or_x: Sequence[int] | Tensor,
    *,
    budget: int,
    cond: Cond = None,
    rng: Rng | None = None,
    pilot: bool = True,
) -> Tensor:
    """Samples (B, *event) by exactly `budget` network calls. They end at t_min, with what noise is left there.

    Of a model that was measured (`denoiser.measure(x0)`), as a loaded run is, by the sampler of `pilot`, which is tried
    when a budget of at most 64 is first asked for: that once takes some hundred calls more. Of all others, and of exact
    scores, by `default_sampler`.

    Args:
        denoiser: the model.
        shape_or_x: (B, *event), or x_T to start from.
        budget: network calls, ≥ 1.
        cond: condition of each sample.
        rng: source of the noise, default `Rng(0)`.
        pilot: False for `default_sampler` whatever is known, and no call besides.

    Raises:
        ValueError: a budget below 1, or a shape that is not (B, *event).
        SolverError: a sample that is not finite.
    """
    budget, rng = whole(budget, "budget, the number of network calls,"), Rng(0) if rng is None else rng
    x = Sampler.start(denoiser, shape_or_x, rng)
    sampler = chosen_sampler(denoiser, x.shape[1:], budget, cond) if pilot else default_sampler(denoiser, budget)
    return sampler(denoiser, x, cond=cond, rng=rng)


def chosen_sampler(denoiser: Denoiser, shape: Sequence[int], budget: int, cond: Cond = None) -> Sampler:
    """The sampler by which `sample` draws events of this shape."""
    trials = denoiser.trials
    if trials is None or "end" in denoiser.told or (budget > _MOST and _use(shape, budget, cond) not in trials):
        return default_sampler(denoiser, budget)
    try:
        return _tried(denoiser, shape, budget, cond).sampler
    except SolverError:  # of the fine solve; the generic sampler may do better, and says so if not
        return default_sampler(denoiser, budget)


def _use(shape: Sequence[int], budget: int, cond: Cond) -> tuple[Any, ...]:
    """What a sampler is chosen for."""
    return tuple(shape), budget, *sorted(named(cond))


def _tried(denoiser: Denoiser, shape: Sequence[int], budget: int, cond: Cond) -> FittedSampler:
    """What was chosen for this before, or else is now."""
    use, trials = _use(shape, budget, cond), denoiser.trials
    if trials is None:
        trials = denoiser.trials = {}
    if use not in trials:
        n = min(max(1024 // math.prod(shape), 8), 64)
        told = each(lambda v: v[torch.arange(n, device=v.device) % len(v)] if v.ndim else v, cond)
        how: dict[str, Any] = {"fine": max(64, 4 * budget), "calls": 1, "margin": 1}
        trials[use] = found = nearest(denoiser, budget, (n, *shape), Rng(1729), told, **how)
        _log.info("Tried samplers on the model, by %d network calls on %d samples: %s", found.calls, n, found)
    return trials[use]
