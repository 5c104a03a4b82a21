"""What a fit to a model leaves: a step whose weights were fitted, its grid, and how far the two are from the truth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import positive
from ..diffusion.denoiser import Denoiser
from ..diffusion.grids import FittedGrid, Grid
from .default import default_sampler
from .multistep import Multistep
from .sampler import Sampler
from .weights import Knot


class FittedStep(Multistep):
    r"""A multistep method with weights that were fitted to a model: x_s/M_s = x_t/M_t + Σ_j b_j V_j at every step.

    V_0 is the latest value and M the norm, both as in `weights.py`, where the b_j are integrals of polynomials. Fitted
    ones know how this model's values go on. They belong to the fitted times and to no others; so the step has no order.

    Args:
        log_snr: rising λ of the times (n + 1,), n ≥ 1.
        weights: n rows of 1 to 4 numbers; row i has at most i + 1, the weight of the latest value first.
        data_std: c > 0, the standard deviation of the data that V is made with; inf for noise prediction.

    Raises:
        ValueError: rows that do not belong to such times.
    """

    def __init__(self, log_snr: Sequence[float], weights: Sequence[Sequence[float]], data_std: float):
        self.rows = tuple(tuple(float(b) for b in row) for row in weights)
        self.grid = FittedGrid(log_snr)
        sizes = [len(row) for row in self.rows]
        if len(sizes) != len(log_snr) - 1 or any(not 1 <= n <= min(4, i) for i, n in enumerate(sizes, 1)):
            raise ValueError(
                f"Fitted weights are one row for each of the {len(log_snr) - 1} steps, of 1 to 4 numbers and never "
                f"more than there are values by then; got rows of {sizes}."
            )
        if not all(math.isfinite(b) for row in self.rows for b in row):
            raise ValueError(f"Fitted weights are finite numbers; got {self.rows}.")
        c = data_std if data_std == math.inf else positive(data_std, "data_std", "the standard deviation of the data")
        super().__init__(max(sizes), sigma_data=c)
        self.order, self.default_steps = 0.0, len(sizes)

    def default_grid(self, denoiser: Denoiser) -> Grid:
        """The fitted times, which the weights belong to."""
        return self.grid

    def _weights(self, levels: list[Tensor], start: Knot, end: Knot, at: int) -> tuple[Tensor, ...]:
        here, there = 2 * start.level, 2 * end.level
        index = int((self.grid.log_snr[:-1] - here.flatten()[0].cpu()).abs().argmin())
        first, last = self.grid.log_snr[index : index + 2].to(here)
        if bool(torch.maximum((here - first).abs(), (there - last).abs()).max() > 0.01 * (last - first)):
            raise ValueError(
                f"These weights were fitted to the log-SNR {[round(v, 3) for v in self.grid.log_snr.tolist()]}; got "
                f"a step from {here.tolist()} to {there.tolist()}. Run it on its own grid: Sampler(step)."
            )
        # a run that began later has fewer values, and takes the integrals that the fitted weights began from
        if len(levels) < len(self.rows[index]):
            return super()._weights(levels, start, end, at)
        return tuple(end.norm * b for b in self.rows[index])


@dataclass(frozen=True)
class FittedSampler:
    """The sampler that is best for a model at a budget, as far as a fit could find it.

    Attributes:
        sampler: makes samples, by `sampler(denoiser, shape)`; without a last denoising, as `sample` does.
        budget: network calls of a run.
        error: its distance to the ends of the probability-flow ODE on noise that the fit had not seen: RMS over the
            dimensions, mean over the samples, in units of x.
        error_stderr: standard error of that mean.
        generic, generic_stderr: the same of `default_sampler`, on the same noise.
        calls: network calls of the whole fit, on batches of its samples.
        log_snr: the fitted knots; None where the fitted sampler was not better by two standard errors of the paired
            difference, and `sampler` is the generic one.
        rows, data_std: the arguments `weights` and `data_std` of the `FittedStep`; rows are None of the generic step,
            and data_std is None of noise prediction, too.
    """

    sampler: Sampler
    budget: int
    error: float
    error_stderr: float
    generic: float
    generic_stderr: float
    calls: int
    log_snr: list[float] | None
    rows: list[list[float]] | None
    data_std: float | None

    @property
    def is_fitted(self) -> bool:
        return self.log_snr is not None

    def __str__(self) -> str:
        kind = "fitted" if self.is_fitted else "generic"
        against = f", {self.generic:.3g} ± {self.generic_stderr:.1g} before" if self.is_fitted else ""
        return f"{self.budget} calls, {kind}: {self.error:.3g} ± {self.error_stderr:.1g} from the exact end{against}"


def build_sampler(
    denoiser: Denoiser,
    budget: int,
    log_snr: list[float] | None,
    rows: list[list[float]] | None,
    data_std: float | None,
) -> Sampler:
    """The sampler of such knots and weights; without these it is that of `default_sampler`.

    Raises:
        ValueError: a budget, knots or weights that do not belong together.
    """
    generic = default_sampler(denoiser, budget)
    if log_snr is None:
        return generic
    step = generic.step if rows is None else FittedStep(log_snr, rows, math.inf if data_std is None else data_std)
    sampler = Sampler(step, FittedGrid(log_snr), len(log_snr) - 1, denoise=False)
    if sampler.evaluations != budget:
        raise ValueError(
            f"A sampler for {budget} network calls takes {sampler.evaluations} on its {len(log_snr)} knots."
        )
    return sampler
