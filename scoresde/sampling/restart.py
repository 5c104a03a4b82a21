"""Going back up and down again: restart sampling around any step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import positive, whole
from ..diffusion.denoiser import Cond, Denoiser
from ..noise.rng import Rng
from ..ops import lincomb
from ..ops.broadcast import expand_as_batch, host
from .sampler import State, Step, StepWrapper
from .steps import Heun


class Restart(StepWrapper):
    r"""Restart sampling (Xu et al. 2023, alg. 2): a run by `step`, and where it first gets to ς = σ/α ≤ low,
    `repeats` times the forward SDE up to ς = high and `steps` steps back down.

    Both ways keep the marginals. The noise makes the run forget its earlier errors, as a reverse SDE does, while the
    errors of discretisation stay those of the ODE: for data of variance v, an excess variance is multiplied by
    (v + low²)/(v + high²) each time. Intervals nest: `Restart(Restart(Heun(), 0.06, 0.3), 1.0, 10.0)`; they should not
    overlap.

    Its order is that of `step`, in the grid and `steps` together.

    Args:
        step: any step, `Heun()` by default. Multistep methods begin each way down without history, and need times that
            the batch shares.
        low, high: the interval of ς, 0 < low < high; by default that of CIFAR-10 for data in [−1, 1].
        repeats: K ≥ 1, times up and down.
        steps: n ≥ 1 steps of each way down, equal in log ς.
        noise: standard deviation of the noise over its exact one, > 0 (S_noise, as in `Churn`).

    Attributes:
        evaluations: network calls of a step that does not restart; `count` gives those of a run whose grid ends below
            `low`.

    Raises:
        ValueError: an argument outside these; at the first step if the SDE does not reach `high`.
    """

    def __init__(
        self,
        step: Step | None = None,
        low: float = 0.06,
        high: float = 0.3,
        repeats: int = 3,
        steps: int = 4,
        noise: float = 1.0,
    ):
        if not (0 < low < high < math.inf):
            raise ValueError(f"The interval of σ/α needs 0 < low < high; got {low} and {high}.")
        super().__init__(Heun() if step is None else step)
        self.low, self.high = float(low), float(high)
        self.repeats, self.steps = whole(repeats, "repeats"), whole(steps, "steps")
        self.noise = positive(noise, "noise", "the factor of a standard deviation, 1 for the exact law")

    def count(self, steps: int) -> int | None:
        return self.step.count(steps + self.repeats * self.steps)

    def __call__(
        self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, state: State, *, cond: Cond, rng: Rng
    ) -> tuple[Tensor, State]:
        sde = denoiser.sde
        low, high = (-2 * host(ratio).log() for ratio in (self.low, self.high))
        if float(high) < float(sde.log_snr(sde.terminal)):
            raise ValueError(f"Restart goes up to σ/α = {self.high}, beyond t_max of {type(sde).__name__}; lower it.")
        x, state = self.step(denoiser, x, t, s, state, cond=cond, rng=rng)
        snr = sde.log_snr(s)
        crossed = (sde.log_snr(t) < low) & (snr >= low)
        if not bool(crossed.any()):
            return x, state
        # samples with times of their own that do not cross go nowhere: from s to s
        top = torch.where(crossed, sde.time(high.to(snr)), s)
        snr_top = sde.log_snr(top)
        way = [top, *(sde.time(snr_top + k / self.steps * (snr - snr_top)) for k in range(1, self.steps)), s]
        scale, std = sde.transition(s, top)
        for _ in range(self.repeats):
            moved = lincomb(((scale, x),), (self.noise * std, rng.noise(x)))
            state = self.step.init(moved)
            for k in range(self.steps):
                moved, state = self.step(denoiser, moved, way[k], way[k + 1], state, cond=cond, rng=rng)
            x = moved if crossed.ndim == 0 else torch.where(expand_as_batch(crossed, x), moved, x)
        return x, state
