"""Replacement: after each move, what was seen is put in again, with the noise of that time."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from torch import Tensor

from ..checks import whole
from ..diffusion.denoiser import Cond, Denoiser
from ..noise.rng import Rng
from ..ops import lincomb
from ..ops.broadcast import expand_as_batch
from ..sampling.sampler import State, Step, StepWrapper
from .conjugate import checked
from .observation import Observation


class Replacement(StepWrapper):
    r"""A step, and then x_s + A⁺(α y + α std η + σ A z − A x_s), η, z ~ N(0, I), for a linear A.

    (Song et al. 2021, App. I.2 and I.4, for std = 0; with noise, what was seen is drawn from N(y, std²).) The network
    learns of y only through x_s, so the part that is not seen is drawn given the noised y of that time instead of y.
    Bias: samples fit y, and are less coherent with it than the posterior; the prior of the part that is seen is left
    out, which counts where std is not small. No derivative of the network is needed.

    Moves have to be short: steps that go from noise to data in one call, such as adaptive ones, are refused. Under
    `torch.compile` A⁺ breaks the graph, because its loop ends only at the tolerance.

    Args:
        step: the move, of fixed size.
        observation: of a linear A.
        iterations, tolerance: of the conjugate gradients that apply A⁺; they take one iteration where AAᵀ is a multiple
            of the identity.

    Raises:
        ValueError: an adaptive step, or an A that is not linear.
        RuntimeError: A⁺ does not reach the tolerance, see `conjugate`.
    """

    def __init__(self, step: Step, observation: Observation, *, iterations: int = 500, tolerance: float = 1e-4):
        if step.evaluations is None:
            raise ValueError(
                f"{type(step).__name__} goes all the way in one call, and y would be put in only at its end; take a "
                "step of fixed size, or a posterior denoiser (PiGDM, MMPS), which works with every step."
            )
        if not observation.linear:
            raise ValueError("Replacement needs a linear operator; say linear=True, or take PiGDM, MMPS or DPS.")
        super().__init__(step)
        self.observation = observation
        self.iterations, self.tolerance = checked(iterations, tolerance)

    def __call__(
        self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, state: State, *, cond: Cond, rng: Rng
    ) -> tuple[Tensor, State]:
        measured, rest = self.observation.split(cond)
        x, state = self.step(denoiser, x, t, s, state, cond=rest, rng=rng)
        scales, seen = denoiser.sde.at(s, x), self.observation(rng.normal_like(x))
        y, std = self.observation.fitted(measured, seen)
        alpha, sigma = (
            expand_as_batch(value.flatten() if value.ndim else value, seen) for value in (scales.alpha, scales.sigma)
        )
        target = alpha * (y + std.to(seen) * rng.normal_like(seen)) + sigma * seen
        return self.observation.project(x, target, iterations=self.iterations, tolerance=self.tolerance), state


class Segment(NamedTuple):
    """The state of the inner step, and the times since the last jump."""

    state: State
    times: tuple[Tensor, ...]


class RePaint(StepWrapper):
    r"""RePaint (Lugmayr et al. 2022, alg. 1 and App. B): `Replacement`, and after every `jump` steps `repeats` − 1
    times the forward SDE back over them and the steps again.

    The noise erases the part that is not seen, which is then drawn anew beside the part that is: as `repeats` grows
    this becomes a Gibbs sampler of each noise level, which removes the incoherence of `Replacement` and not its other
    biases. Steps at the end of a grid that do not fill a jump are taken once.

    Args:
        step, observation: as in `Replacement`.
        jump: steps of a jump, ≥ 1.
        repeats: times that each step is taken, ≥ 1; network calls grow by that factor.
        iterations, tolerance: as in `Replacement`.

    Attributes:
        evaluations: network calls of a step without a jump; `count` gives those of a run.
    """

    def __init__(
        self,
        step: Step,
        observation: Observation,
        jump: int = 10,
        repeats: int = 10,
        *,
        iterations: int = 500,
        tolerance: float = 1e-4,
    ):
        super().__init__(Replacement(step, observation, iterations=iterations, tolerance=tolerance))
        self.jump, self.repeats = whole(jump, "jump"), whole(repeats, "repeats")

    def count(self, steps: int) -> int | None:
        once, again = self.step.count(steps), self.step.count(self.jump)
        return None if once is None or again is None else once + steps // self.jump * (self.repeats - 1) * again

    def init(self, x: Tensor) -> State:
        return Segment(self.step.init(x), ())

    def __call__(
        self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, state: State, *, cond: Cond, rng: Rng
    ) -> tuple[Tensor, State]:
        inner, times = state
        x, inner = self.step(denoiser, x, t, s, inner, cond=cond, rng=rng)
        times = (*(times or (t,)), s)
        if len(times) <= self.jump:
            return x, Segment(inner, times)
        scale, std = denoiser.sde.transition(s, times[0])
        for _ in range(self.repeats - 1):
            x = lincomb(((scale, x),), (std, rng.noise(x)))
            inner = self.step.init(x)
            for start, stop in itertools.pairwise(times):
                x, inner = self.step(denoiser, x, start, stop, inner, cond=cond, rng=rng)
        return x, Segment(inner, ())
