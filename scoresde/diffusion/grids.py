r"""Where the steps go: a grid is a callable (sde, n) -> n + 1 times in float64, falling from t_max to t_end.

`t_end` is the sampling cut-off; None means the SDE's own `t_min`. It is separate from the cut-offs of training
(`scoresde.losses.denoising`) and likelihood (`log_likelihood(t_min=…)`).
"""

from __future__ import annotations

import abc
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..checks import positive, whole
from ..ops.broadcast import host
from .readable import Readable
from .sde import SDE

Grid = Callable[[SDE, int], Tensor]
"""(sde, n) -> n + 1 times, float64, decreasing from t_max to t_min."""


def check_grid(times: Tensor, sde: SDE) -> Tensor:
    """`times` if it is a grid for `sde`, or a ValueError that names the fault: order, ends, or length."""
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


def spanning(grid: Grid, sde: SDE, steps: int, start: float) -> Tensor:
    """The times (steps + 1,) of `grid`, float64, or a ValueError if they do not run from t_max to `start`."""
    times = check_grid(grid(sde, steps), sde).double()
    ends = host([sde.t_max, start])
    if len(times) != steps + 1 or not torch.allclose(times[[0, -1]], ends, rtol=1e-6, atol=0):
        raise ValueError(
            f"A path of {steps} steps needs {steps + 1} times from t_max={sde.t_max} to t_min={start}; "
            f"the grid gave {len(times)} from {float(times[0])} to {float(times[-1])}. Pass t_min= to match it."
        )
    return times


class _Grid(Readable, abc.ABC):
    """n + 1 times from t_max down to `t_end`, by a rule for what lies between."""

    def __init__(self, t_end: float | None = None):
        if t_end is not None and not math.isfinite(t_end):
            raise ValueError(f"t_end is a time of the SDE, or None for its t_min; got {t_end}.")
        self.t_end = t_end

    @abc.abstractmethod
    def _between(self, sde: SDE, start: Tensor, stop: Tensor, u: Tensor) -> Tensor:
        """Times at shares u (n + 1,) of the way from `start` to `stop`."""

    def __call__(self, sde: SDE, steps: int) -> Tensor:
        """Falling times (steps + 1,), float64, with exact ends."""
        steps = whole(steps, "steps, the number of steps of a grid,")
        end = sde.t_min if self.t_end is None else self.t_end
        if not (sde.t_min <= end < sde.t_max):
            raise ValueError(f"t_end must lie in [t_min, t_max) = [{sde.t_min}, {sde.t_max}); got {end}.")
        start, stop = host([sde.t_max, end])
        times = self._between(sde, start, stop, torch.linspace(0, 1, steps + 1, dtype=torch.float64, device="cpu"))
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
        self.rho = positive(rho, "rho", "the exponent of a KarrasGrid")

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


class CosineGrid(_Grid):
    """Equal steps in the angle arctan(σ/α): those of a cosine schedule (Nichol & Dhariwal 2021, eq. 17), for any SDE.

    Args:
        t_end: last time, None for the SDE's t_min.
    """

    def _between(self, sde: SDE, start: Tensor, stop: Tensor, u: Tensor) -> Tensor:
        first, last = (torch.atan(torch.exp(-0.5 * sde.log_snr(t))) for t in (start, stop))
        return sde.time(-2 * torch.tan(first + u * (last - first)).log())


class _DataGrid(_Grid):
    """A grid that knows the noise level of the data: its `middle` is ℓ = `centre` in terms of log(α/σ)."""

    def __init__(self, sigma_data: float, centre: float, width: float, t_end: float | None):
        super().__init__(t_end)
        if not math.isfinite(centre):
            raise ValueError(f"centre is a finite number; got {centre}.")
        self.sigma_data = positive(sigma_data, "sigma_data", "about the standard deviation of the data")
        self.centre, self.width = float(centre), positive(width, "width", "a length in log(α/σ)")

    @property
    def middle(self) -> float:
        return self.centre - math.log(self.sigma_data)


class LogisticGrid(_DataGrid):
    r"""Steps where noise becomes data: quantiles of a logistic law of log(σ/α), between the ends.

    With ℓ = log(α σ_d/σ), step i ends at the share i/n of the mass that 1/(1 + e^{−(ℓ − centre)/width}) has between the
    ends of the grid. Wide, it is `LogSNRGrid`; narrow, it hardly visits the noise far above the data and the blur far
    below.

    Args:
        sigma_data: σ_d, about the standard deviation of the data, > 0.
        centre: where the steps are shortest, in units of ℓ: 0 is noise as large as the data, 1 e times less.
        width: > 0, in units of ℓ.
        t_end: last time, None for the SDE's t_min.
    """

    def __init__(self, sigma_data: float = 1.0, centre: float = 0.5, width: float = 1.5, t_end: float | None = None):
        super().__init__(sigma_data, centre, width, t_end)

    def _between(self, sde: SDE, start: Tensor, stop: Tensor, u: Tensor) -> Tensor:
        middle = self.middle
        first, last = (torch.sigmoid((0.5 * sde.log_snr(t) - middle) / self.width) for t in (start, stop))
        return sde.time(2 * (middle + self.width * torch.logit(first + u * (last - first))))


class SoftplusGrid(_DataGrid):
    r"""Equal steps in log-SNR while noise is above the data, ever longer ones below.

    With ℓ = log(α σ_d/σ), equal steps in log(1 + e^{(centre − ℓ)/width}). For networks that predict noise: their x̂_0 is
    rough where there is little but noise, and the first steps decide (centre 2, width 1; see `default_sampler`).

    Args:
        sigma_data: σ_d, about the standard deviation of the data, > 0.
        centre: in units of ℓ, where steps begin to grow.
        width: > 0, in units of ℓ: how slowly they do.
        t_end: last time, None for the SDE's t_min.
    """

    def __init__(self, sigma_data: float = 1.0, centre: float = 2.0, width: float = 1.0, t_end: float | None = None):
        super().__init__(sigma_data, centre, width, t_end)

    def _between(self, sde: SDE, start: Tensor, stop: Tensor, u: Tensor) -> Tensor:
        middle = self.middle
        first, last = (softplus((middle - 0.5 * sde.log_snr(t)) / self.width) for t in (start, stop))
        return sde.time(2 * (middle - self.width * torch.expm1(first + u * (last - first)).log()))


class FittedGrid(Readable):
    """Steps that were fitted to a model (`scoresde.fit_grid`): log-SNR from t_max to the data, for any SDE.

    For another number of steps than the fitted one the knots are read off between those that were fitted. The ends are
    the SDE's own, so a grid fitted under one SDE serves the same network under another: it sees ς = σ/α alone.

    Args:
        log_snr: rising λ of the knots (n + 1,), n ≥ 1.

    Raises:
        ValueError: fewer than two knots, or knots that do not rise.
    """

    def __init__(self, log_snr: Sequence[float]):
        knots = torch.as_tensor(log_snr, dtype=torch.float64, device="cpu")
        if knots.ndim != 1 or len(knots) < 2 or not bool((knots[1:] > knots[:-1]).all()):
            raise ValueError(f"A fitted grid holds at least two rising values of log-SNR; got {knots.tolist()}.")
        self.log_snr = knots

    def __call__(self, sde: SDE, steps: int) -> Tensor:
        """Falling times (steps + 1,), float64, with exact ends."""
        steps = whole(steps, "steps, the number of steps of a grid,")
        place = torch.linspace(0, len(self.log_snr) - 1, steps + 1, dtype=torch.float64, device="cpu")
        low = place.floor().long().clamp(max=len(self.log_snr) - 2)
        knots = self.log_snr[low] + (place - low) * (self.log_snr[low + 1] - self.log_snr[low])
        start, stop = host([sde.t_max, sde.t_min])
        first, last = sde.log_snr(start), sde.log_snr(stop)
        if not bool((knots[1:-1] > first).all() and (knots[1:-1] < last).all()):
            raise ValueError(
                f"This grid's knots, log-SNR {float(knots[1]):.3g} to {float(knots[-2]):.3g}, do not lie inside the "
                f"range {float(first):.3g} to {float(last):.3g} of {type(sde).__name__}: fit one for this SDE."
            )
        times = sde.time(knots)
        times[0], times[-1] = start, stop
        return times

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the knots as JSON text; `path` is there whole or not at all."""
        new = Path(f"{os.fspath(path)}.new")
        new.write_text(json.dumps({"log_snr": self.log_snr.tolist()}) + "\n", encoding="utf-8")
        os.replace(new, path)


class SavedGrid(FittedGrid):
    """The fitted grid of a file that `FittedGrid.save` wrote; what a config names.

    Args:
        path: of the file.

    Raises:
        ValueError: the file holds no such grid; the message has the cause.
    """

    def __init__(self, path: str | os.PathLike[str]):
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            knots = [float(value) for value in content["log_snr"]]
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path} is not a grid saved by FittedGrid.save: {error!r}.") from error
        super().__init__(knots)
