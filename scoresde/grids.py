r"""Where the steps go: a grid is a callable (sde, n) -> n + 1 times in float64, falling from t_max to t_end.

`t_end` is the sampling cut-off; None means the SDE's own `t_min`. It is separate from the cut-offs of training
(`scoresde.loss`) and likelihood (`log_likelihood(t_min=…)`).
"""

from __future__ import annotations

import abc
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


class _Grid(abc.ABC):
    """n + 1 times from t_max down to `t_end`, by a rule for what lies between."""

    def __init__(self, t_end: float | None = None):
        self.t_end = t_end

    @abc.abstractmethod
    def _between(self, sde: SDE, start: Tensor, stop: Tensor, u: Tensor) -> Tensor:
        """Times at shares u (n + 1,) of the way from `start` to `stop`."""

    def __call__(self, sde: SDE, steps: int) -> Tensor:
        """Falling times (steps + 1,), float64, with exact ends."""
        if steps < 1:
            raise ValueError(f"A grid needs at least one step; got {steps}.")
        end = sde.t_min if self.t_end is None else self.t_end
        if not (sde.t_min <= end < sde.t_max):
            raise ValueError(f"t_end must lie in [t_min, t_max) = [{sde.t_min}, {sde.t_max}); got {end}.")
        start, stop = torch.tensor([sde.t_max, end], dtype=torch.float64)
        times = self._between(sde, start, stop, torch.linspace(0, 1, steps + 1, dtype=torch.float64))
        times[0], times[-1] = start, stop  # an inverse map leaves round-off there
        return times


class UniformGrid(_Grid):
    """Equal steps in t.

    Args:
        t_end: last time, None for the SDE's t_min.
    """

    def _between(self, sde: SDE, start: Tensor, stop: Tensor, u: Tensor) -> Tensor:
        return start + u * (stop - start)


class LogSNRGrid(_Grid):
    """Equal steps in log-SNR (Lu et al. 2022, sec. 3).

    Args:
        t_end: last time, None for the SDE's t_min.
    """

    def _between(self, sde: SDE, start: Tensor, stop: Tensor, u: Tensor) -> Tensor:
        first, last = sde.log_snr(start), sde.log_snr(stop)
        return sde.time(first + u * (last - first))


class KarrasGrid(_Grid):
    """Equal steps in ς^{1/ρ}, ς = σ/α (Karras et al. 2022, eq. 5).

    Args:
        rho: ρ > 0; 7 is the paper's, larger puts more steps near the data.
        t_end: last time, None for the SDE's t_min.
    """

    def __init__(self, rho: float = 7.0, t_end: float | None = None):
        super().__init__(t_end)
        if not rho > 0:
            raise ValueError(f"KarrasGrid needs rho > 0; got {rho}.")
        self.rho = float(rho)

    def _between(self, sde: SDE, start: Tensor, stop: Tensor, u: Tensor) -> Tensor:
        first, last = (torch.exp(-0.5 * sde.log_snr(t) / self.rho) for t in (start, stop))
        return sde.time(-2 * self.rho * (first + u * (last - first)).log())


class QuadraticGrid(_Grid):
    """Equal steps in √t: short ones near the data (Song et al. 2021, DDIM, App. D.2).

    Args:
        t_end: last time, None for the SDE's t_min.
    """

    def _between(self, sde: SDE, start: Tensor, stop: Tensor, u: Tensor) -> Tensor:
        return (start.sqrt() + u * (stop.sqrt() - start.sqrt())) ** 2
