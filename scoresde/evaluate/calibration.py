"""How well a model denoises, noise level by noise level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import Dataset, Split
from ..diffusion.denoiser import Denoiser, model_device
from ..diffusion.grids import LogSNRGrid
from ..metrics import Score
from ..metrics.jackknife import mean_score
from ..noise.rng import Rng
from .evaluation import evenly_spaced

_POINTS = 1024
_SEED = 2**40  # of no data set: noise of its seed would be the data themselves


@dataclass(frozen=True)
class Level:
    """The error of a denoiser at one noise level.

    Attributes:
        t: the time.
        noise: σ/α there, in units of the model data.
        held_out, training: mean of ‖ε̂ − ε‖²/D, with its standard error over the points.
    """

    t: float
    noise: float
    held_out: Score
    training: Score

    @property
    def gap(self) -> Score:
        """What held-out points cost more than training points: above 0 where training data are learnt by heart."""
        return self.held_out.minus(self.training)


@torch.no_grad()
def noise_levels(
    denoiser: Denoiser, dataset: Dataset, levels: int, *, conditional: bool = False, batch_size: int = 256
) -> list[Level]:
    """The error at `levels` ≥ 2 times that are even in log-SNR, from t_max to t_min, on at most 1,024 points of each
    split, with the same noise at every level and every call. An ε̂ of 0 has the error 1, a perfect one that of the data.
    """
    times = LogSNRGrid()(denoiser.sde, levels - 1)
    alpha, sigma = denoiser.sde.marginal(times)
    ratios = (sigma / alpha).tolist()
    errors = [
        _errors(denoiser, dataset, split, times, conditional, batch_size) for split in (dataset.test, dataset.train)
    ]
    return [Level(*each) for each in zip(times.tolist(), ratios, *errors, strict=True)]


def _errors(
    denoiser: Denoiser, dataset: Dataset, split: Split, times: Tensor, conditional: bool, batch_size: int
) -> list[Score]:
    rng, device, parts = Rng(_SEED), model_device(denoiser), []
    for index in evenly_spaced(len(split), min(len(split), _POINTS)).split(batch_size):
        x0, cond = dataset.drawn(split.raw[index], split.cond(index, conditional, device), rng, device)
        eps = rng.normal_like(x0)
        found = [denoiser(denoiser.sde.perturb(x0, t, eps), t, cond).eps - eps for t in times.to(device)]
        parts.append(torch.stack([(error**2).flatten(1).mean(1).double().cpu() for error in found]))
    values = torch.cat(parts, 1)
    return [mean_score(each) for each in values]


def by_split(levels: Sequence[Level]) -> dict[str, list[Score]]:
    """The columns of a table of levels."""
    return {
        "held out": [level.held_out for level in levels],
        "training": [level.training for level in levels],
        "held out − training": [level.gap for level in levels],
    }
