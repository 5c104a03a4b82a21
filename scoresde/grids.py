r"""Where the steps go: a grid is a callable (sde, n) -> n + 1 times in float64, falling from t_max to t_end.

`t_end` is the sampling cut-off; None means the SDE's own `t_min`. It is separate from the cut-offs of training
(`scoresde.loss`) and likelihood (`log_likelihood(t_min=…)`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .sde import SDE

Grid = Callable[[SDE, int], Tensor]


def check_grid(times: Tensor, sde: SDE) -> Tensor:
    """`times` if it is a grid for `sde`, or a ValueError that says what is wrong: order, ends, or length."""
    if times.ndim != 1 or len(times) < 2 or not times.is_floating_point():
        raise ValueError(
            f"A grid holds at least two floating-point times; got shape {tuple(times.shape)}, {times.dtype}."
        )
    if not bool((times[1:] < times[:-1]).all()):
        raise ValueError(f"A grid must fall strictly from noise to data; got {times.tolist()}.")
    slack = 1e-9 * sde.t_max
    if float(times[0]) > sde.t_max + slack or float(times[-1]) < sde.t_min - slack:
        raise ValueError(
            f"The grid runs from {float(times[0])} to {float(times[-1])}, outside [t_min, t_max] = "
            f"[{sde.t_min}, {sde.t_max}] of {type(sde).__name__}."
        )
    return times


def _ends(sde: SDE, steps: int, t_end: float | None) -> tuple[Tensor, Tensor, Tensor]:
    if steps < 1:
        raise ValueError(f"A grid needs at least one step; got {steps}.")
    end = sde.t_min if t_end is None else t_end
    if not (sde.t_min <= end < sde.t_max):
        raise ValueError(f"t_end must lie in [t_min, t_max) = [{sde.t_min}, {sde.t_max}); got {end}.")
    start, stop = torch.tensor([sde.t_max, end], dtype=torch.float64)
    return start, stop, torch.linspace(0, 1, steps + 1, dtype=torch.float64)


def _pin(times: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """Exact ends: an inverse map leaves round-off there."""
    times[0], times[-1] = start, stop
    return times


class UniformGrid:
    """Equal steps in t.

    Args:
        t_end: last time, None for the SDE's t_min.
    """

    def __init__(self, t_end: float | None = None):
        self.t_end = t_end

    def __call__(self, sde: SDE, steps: int) -> Tensor:
        start, stop, u = _ends(sde, steps, self.t_end)
        return _pin(start + u * (stop - start), start, stop)


class LogSNRGrid:
    """Equal steps in log-SNR (Lu et al. 2022, sec. 3).

    Args:
        t_end: last time, None for the SDE's t_min.
    """

    def __init__(self, t_end: float | None = None):
        self.t_end = t_end

    def __call__(self, sde: SDE, steps: int) -> Tensor:
        start, stop, u = _ends(sde, steps, self.t_end)
        first, last = sde.log_snr(start), sde.log_snr(stop)
        return _pin(sde.time(first + u * (last - first)), start, stop)


class KarrasGrid:
    """Equal steps in ς^{1/ρ}, ς = σ/α (Karras et al. 2022, eq. 5).

    Args:
        rho: ρ > 0; 7 is the paper's, larger puts more steps near the data.
        t_end: last time, None for the SDE's t_min.
    """

    def __init__(self, rho: float = 7.0, t_end: float | None = None):
        if not rho > 0:
            raise ValueError(f"KarrasGrid needs rho > 0; got {rho}.")
        self.rho, self.t_end = float(rho), t_end

    def __call__(self, sde: SDE, steps: int) -> Tensor:
        start, stop, u = _ends(sde, steps, self.t_end)
        first, last = (torch.exp(-0.5 * sde.log_snr(t) / self.rho) for t in (start, stop))
        return _pin(sde.time(-2 * self.rho * (first + u * (last - first)).log()), start, stop)


class QuadraticGrid:
    """Equal steps in √t: short ones near the data (Song et al. 2021, DDIM, App. D.2).

    Args:
        t_end: last time, None for the SDE's t_min.
    """

    def __init__(self, t_end: float | None = None):
        self.t_end = t_end

    def __call__(self, sde: SDE, steps: int) -> Tensor:
        start, stop, u = _ends(sde, steps, self.t_end)
        return _pin((start.sqrt() + u * (stop.sqrt() - start.sqrt())) ** 2, start, stop)
