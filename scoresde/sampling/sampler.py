"""One reverse move (`Step`), and the loop that makes samples of it (`Sampler`)."""

from __future__ import annotations

import abc
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import whole
from ..diffusion.denoiser import Cond, CountingDenoiser, Denoiser
from ..diffusion.grids import Grid, LogisticGrid, UniformGrid, check_grid
from ..diffusion.readable import Readable
from ..diffusion.undisturbed import in_eval
from ..noise.rng import Rng
from ..ode import check_finite
from ..ops.broadcast import samples
from .cuda_graph import Graphs

State = Any
"""What a step remembers between calls (multistep history); None for one-step methods."""


class Step(Readable, abc.ABC):
    """A move of x from t to s ≤ t. Where s == t it is a corrector.

    Attributes:
        order: global order of convergence (0 for correctors, which do not move in time).
        evaluations: network calls per step; None where the step decides itself (adaptive solvers).
        default_steps: number of steps a `Sampler` takes when none is asked for.
    """

    order: float
    evaluations: int | None
    default_steps: int = 100

    def init(self, x: Tensor) -> State:
        """The state before the first step."""
        return None

    def count(self, steps: int) -> int | None:
        """Network calls of a run of `steps` steps; None for adaptive steps."""
        return None if self.evaluations is None else steps * self.evaluations

    def default_grid(self, denoiser: Denoiser) -> Grid:
        """The grid of a `Sampler` that is given none: equal steps in t, where a step knows nothing better."""
        return UniformGrid()

    def moved(self, denoiser: Denoiser, state: State, t: Tensor, by: Tensor) -> State:
        """The state after somebody added `by` (B, *event) to x_t between two steps, as an inpainting loop does."""
        return state

    @abc.abstractmethod
    def __call__(
        self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, state: State, *, cond: Cond, rng: Rng
    ) -> tuple[Tensor, State]:
        """(x_s, state) from x_t (B, *event) at times t ≥ s, each () or (B,)."""


class LongStep(Step):
    """A step of a method that takes few: by default they are short where noise becomes data, and long elsewhere."""

    def default_grid(self, denoiser: Denoiser) -> Grid:
        """Wide enough for networks that predict noise, whose first steps decide."""
        return LogisticGrid(denoiser.data_std, 0.0, 3.0)


class StepWrapper(Step):
    """A step around another: by default it starts, converges and counts as the one inside does.

    Args:
        step: what is inside.
    """

    def __init__(self, step: Step):
        self.step = step
        self.order, self.evaluations, self.default_steps = step.order, step.evaluations, step.default_steps

    def init(self, x: Tensor) -> State:
        return self.step.init(x)

    def count(self, steps: int) -> int | None:
        return self.step.count(steps)

    def moved(self, denoiser: Denoiser, state: State, t: Tensor, by: Tensor) -> State:
        return self.step.moved(denoiser, state, t, by)

    def default_grid(self, denoiser: Denoiser) -> Grid:
        return self.step.default_grid(denoiser)


@dataclass(frozen=True)
class Trace:
    """One point of a sampling run.

    Attributes:
        index: 0 at the prior, k after k steps; one more after the final denoising.
        t: time of `x`.
        x: the state, (B, *event).
        evaluations: network calls so far.
    """

    index: int
    t: float
    x: Tensor
    evaluations: int


class Sampler(Readable):
    """Runs a step over a time grid, from the prior to data.

    Args:
        step: the move.
        grid: (sde, n) -> n + 1 falling times; None takes the step's own for the model, `Step.default_grid`.
        steps: n ≥ 1; None takes the step's own default.
        denoise: end with x̂_0(x, t_end), one more evaluation: removes the noise σ(t_end) that is left.
        cuda_graph: on a CUDA device, run all steps as one CUDA graph, network included. The samples are the same. It
            pays where kernels are short: for small networks and batches. The first call costs three runs; so does one
            with another shape, kind of `rng`, denoiser or place of its weights. Memory for a whole run is held for as
            long as the denoiser lives. Numbers and tensors that a denoiser holds besides its parameters and buffers,
            and what it does in Python, stay those of the first call.

    Raises:
        ValueError: steps < 1, or a CUDA graph of an adaptive step.
    """

    def __init__(
        self,
        step: Step,
        grid: Grid | None = None,
        steps: int | None = None,
        denoise: bool = True,
        cuda_graph: bool = False,
    ):
        steps = whole(step.default_steps if steps is None else steps, "steps")
        if cuda_graph and step.count(steps) is None:
            raise ValueError(
                f"{type(step).__name__} decides as it goes how many steps it takes, and a CUDA graph always does the "
                "same: take a step of fixed size, or cuda_graph=False."
            )
        self.step = step
        self.grid = grid
        self.steps = steps
        self.denoise = denoise
        self.cuda_graph = bool(cuda_graph)
        self._graphs = Graphs()

    @property
    def evaluations(self) -> int | None:
        """Network calls of a run; None for adaptive steps, whose runs count in `Trace.evaluations`."""
        count = self.step.count(self.steps)
        return None if count is None else count + int(self.denoise)

    def __call__(
        self, denoiser: Denoiser, shape_or_x: Sequence[int] | Tensor, *, cond: Cond = None, rng: Rng | None = None
    ) -> Tensor:
        """Samples (B, *event), from a shape (prior draws) or from given x_T (B, *event).

        Raises:
            SolverError: a sample is not finite; its index is named.
            ValueError: a shape, starting point or grid that cannot be used; `cuda_graph` with x or `cond` off CUDA.
            RuntimeError: `cuda_graph` without kernels, or for a step or network that no graph can contain.
        """
        if not self.cuda_graph:
            return deque(self.iterate(denoiser, shape_or_x, cond=cond, rng=rng), maxlen=1).pop().x
        rng = Rng(0) if rng is None else rng
        times = self.times(denoiser)
        x = self.start(denoiser, shape_or_x, rng)

        def run(x: Tensor, cond: Cond, rng: Rng) -> Tensor:
            return deque(self._states(CountingDenoiser(denoiser), x, times, cond, rng), maxlen=1).pop()

        x = self._graphs(run, (self.step, self.denoise, *times.tolist()), denoiser, x, cond, rng)
        self._check(x, float(times[-1]), self.evaluations or 0)
        return x

    def iterate(
        self, denoiser: Denoiser, shape_or_x: Sequence[int] | Tensor, *, cond: Cond = None, rng: Rng | None = None
    ) -> Iterator[Trace]:
        """A run point by point: progress bars and trajectories are the caller's `for`. Never a CUDA graph."""
        rng = Rng(0) if rng is None else rng
        times, counted = self.times(denoiser), CountingDenoiser(denoiser)
        start, labels = self.start(denoiser, shape_or_x, rng), times.tolist()
        yield Trace(0, labels[0], start, 0)
        for index, x in enumerate(self._states(counted, start, times, cond, rng), 1):
            if index >= self.steps:
                self._check(x, labels[-1], counted.evaluations)
            yield Trace(index, labels[min(index, self.steps)], x, counted.evaluations)

    def grid_for(self, denoiser: Denoiser) -> Grid:
        """The grid that was given, or else that of the step for this model."""
        return self.step.default_grid(denoiser) if self.grid is None else self.grid

    def times(self, denoiser: Denoiser) -> Tensor:
        """Falling times (n + 1,), float64, on the CPU, where steps compute plain numbers from them.

        Raises:
            ValueError: the grid does not fit the SDE.
        """
        times = check_grid(self.grid_for(denoiser)(denoiser.sde, self.steps), denoiser.sde)
        if len(times) != self.steps + 1:
            raise ValueError(f"A grid (sde, n) returns n + 1 times; got {len(times)} for n = {self.steps}.")
        return times.to("cpu", torch.float64)

    def _states(self, denoiser: Denoiser, x: Tensor, times: Tensor, cond: Cond, rng: Rng) -> Iterator[Tensor]:
        """x after each step, and after the last denoising."""
        knots, state, modules = times.unbind(), self.step.init(x), list(denoiser.modules())
        for t, s in itertools.pairwise(knots):
            with in_eval(modules), torch.no_grad():
                x, state = self.step(denoiser, x, t, s, state, cond=cond, rng=rng)
            yield x
        if self.denoise:
            with in_eval(modules), torch.no_grad():
                x = denoiser(x, knots[-1], cond).x0
            yield x

    @staticmethod
    def start(denoiser: Denoiser, shape_or_x: Sequence[int] | Tensor, rng: Rng) -> Tensor:
        if isinstance(shape_or_x, Tensor):
            if not shape_or_x.is_floating_point() or shape_or_x.ndim < 2:
                raise ValueError(
                    "A starting point is a floating-point batch (B, *event); "
                    f"got shape {tuple(shape_or_x.shape)}, {shape_or_x.dtype}."
                )
            return samples(shape_or_x.detach(), "x_T")
        shape = tuple(whole(n, "Each size of a shape (B, *event)") for n in shape_or_x)
        if len(shape) < 2 or min(shape) < 1:
            raise ValueError(f"A sample shape is (B, *event) with positive sizes; got {shape}.")
        tensors = itertools.chain(denoiser.parameters(), denoiser.buffers())
        device = next((tensor.device for tensor in tensors), None)
        dtypes = (torch.promote_types(parameter.dtype, torch.float32) for parameter in denoiser.parameters())
        dtype = next(dtypes, torch.float32)
        return denoiser.prior_sample(shape, rng=rng, dtype=dtype, device=device)

    @staticmethod
    def _check(x: Tensor, t: float, evaluations: int) -> None:
        reason = "too few steps for this step and SDE, or a network that is not"
        check_finite(x, f"Sampling ended with values that are not finite ({reason})", t=t, evaluations=evaluations)
