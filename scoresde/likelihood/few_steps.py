r"""log p of what the steps of a flow map make, by the change of variables.

With y = x/α, ς = σ/α and r = ς_s/ς_t a step is y_s = r y_t + (1 − r) g(x_t, t, s) (`sampling.FlowMap`), so that

    ∂y_s/∂y_t = r I + (1 − r) α_t ∂g/∂x_t,    log p(y_s) = log p(y_t) − log det ∂y_s/∂y_t,

where a step is one to one. That of the exact flow is, and turns nothing inside out: its determinant is above 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import positive, whole
from ..diffusion.conditions import tell
from ..diffusion.denoiser import Denoiser
from ..diffusion.grids import Grid, LogisticGrid, spanning
from ..ode import SolverError, integrate, log_ratio, probability_flow
from ..ops.broadcast import per_sample
from .divergence import forward, jacobian
from .flow import Flow
from .solver import Solved, Solver

LARGEST = 1024
"""Numbers in a sample, D: a batch holds (B, D, D), and D³ goes into each determinant."""

_STARTS = (0.0, 0.03, 0.1, 0.3, 1.0)
"""How far from the first guess Newton's method begins, in units of the noise; another where it went astray."""

_Step = Callable[[Tensor], tuple[Tensor, Tensor]]
"""y_t (B, D) -> (y_s (B, D), ∂y_s/∂y_t (B, D, D)), float64."""


@dataclass(frozen=True)
class FlowMapSteps(Solver):
    r"""The density of the samples of `Sampler(FlowMap(), grid, steps, denoise=False)`, exactly, and not of an ODE.

    For `sample_with_log_prob`, `log_likelihood` and `Run.log_likelihood`, in place of a `Tolerance`; a divergence is
    not asked, since each step takes its whole Jacobian, by D backward products. Data are brought back to x_T step by
    step: by Newton's method, which begins where the ODE of the map's own g at s = t leads. A positive determinant at
    each step of a sample is necessary for a map that is one to one, and not sufficient: where another x_T makes the
    same sample, its share of the density is not seen, and log p is too low.

    Args:
        steps: of the map, ≥ 1.
        grid: of their times, (sde, n) -> n + 1 falling times; None is that of `FlowMap`.
        tolerance: how near the map has to come to given data, > 0: RMS of y_s over its dimensions ≤ tolerance (1 + that
            of the data). From there one more step of Newton's is taken.
        iterations: of Newton's method for a step of the map, from each of five starts, ≥ 1.
        chunk: backward products at a time, ≥ 1: memory against speed.
        renoise: as that of `FlowMap`; True is refused.

    Raises:
        ValueError: numbers outside their ranges, or renoise; when called: a model that is no flow map, or D > 1024.
        SolverError: when called: a step that folds space at a sample, or data that no x_T was found for. There is never
            a number instead.
    """

    steps: int = 1
    grid: Grid | None = None
    tolerance: float = 1e-5
    iterations: int = 50
    chunk: int = 64
    renoise: bool = False

    estimator, how = "bpd/flow-map", "by the change of variables of the flow map's own steps"

    def __post_init__(self) -> None:
        for name in ("steps", "iterations", "chunk"):
            whole(getattr(self, name), f"FlowMapSteps's {name}")
        positive(self.tolerance, "tolerance", "how near the map comes to given data")
        if self.renoise:
            raise ValueError(
                "With renoise=True the samples of a flow map are no function of x_T: their density is an integral over "
                "the noise between the steps, which has no closed form. renoise=False has one."
            )

    @property
    def accuracy(self) -> dict[str, float]:
        return {"steps": self.steps, "tolerance": self.tolerance}

    @property
    def settings(self) -> dict[str, Any]:
        grid = None if self.grid is None else type(self.grid).__name__
        return {"flow_map_steps": self.steps, "grid": grid, "tolerance": self.tolerance, "iterations": self.iterations}

    def whose(self, denoiser: Denoiser) -> str:
        if "end" not in denoiser.told:
            raise ValueError(
                "FlowMapSteps measures what the steps of a flow map make, and this model is told one noise level only: "
                "Budget or Tolerance (likelihood=budget, hutchinson) measure its ODE, and scoresde-distil makes a map "
                "of it."
            )
        many = "one step" if self.steps == 1 else f"{self.steps} steps"
        return f"The number is of the samples that {many} of this flow map make, and not of its ODE."

    def __call__(self, flow: Flow, y: Tensor, *, up: bool) -> Solved:
        self.whose(flow.counted)
        if flow.dims > LARGEST:
            raise ValueError(
                f"A density by change of variables takes a determinant of {flow.dims} × {flow.dims} for each sample, "
                f"and at most {LARGEST} × {LARGEST} are taken. Of larger samples the teacher has a likelihood."
            )
        grid = LogisticGrid(flow.counted.data_std, 0.0, 3.0, flow.start) if self.grid is None else self.grid
        pairs = spanning(grid, flow.sde, self.steps, flow.start).unfold(0, 2, 1)
        total, error = torch.zeros_like(y[:, 0]), torch.zeros_like(y[:, 0])
        for t, s in pairs.flip(0) if up else pairs:
            step = _step_of(flow, t, s, self.chunk)
            if up:
                y, rows, missed = self._back(flow, step, y, t, s)
                error = error + missed
            else:
                y, rows = step(y)
            total = total + _log_det(rows, float(t), flow.counted.evaluations)
        columns = y.new_zeros(len(y), flow.divergence.columns(flow.dims)[0])
        return Solved(y, columns, -total if up else total, error)

    def _back(self, flow: Flow, step: _Step, end: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(y_t (B, D), ∂y_s/∂y_t there, what log p may be off (B,)) of y_s = `end`."""
        u = log_ratio(flow.sde, torch.stack([s, t])).tolist()
        with torch.no_grad():
            rhs = probability_flow(flow.counted, flow.like, flow.cond)
            guess = y = integrate(rhs, end.detach(), *u, rtol=1e-3, atol=1e-3, time=flow.time)
        far = torch.ones_like(y[:, 0], dtype=torch.bool)
        for size in _STARTS:
            noise = flow.rng.normal_like(guess) if size else torch.zeros_like(guess)
            start = torch.where(far[:, None], guess + size * math.exp(u[1]) * noise, y)
            y, far = self._nearest(step, end, start)
            if not bool(far.any()):
                break
        else:
            raise SolverError(
                f"No x_T was found that the map brings within {self.tolerance:g} of these data: it does not reach "
                "them, or folds on the way. More steps, or more training, make it one to one; likelihood=hutchinson "
                "measures the ODE of its g at s = t",
                t=float(t),
                evaluations=flow.counted.evaluations,
                samples=far.nonzero().flatten().tolist(),
            )
        value, rows = step(y)
        move = torch.linalg.solve_ex(rows.detach(), value - end)[0]  # its gradient is that of the inverse function
        before, y = torch.linalg.slogdet(rows.detach())[1], y - move
        value, rows = step(y)
        left = torch.linalg.solve_ex(rows.detach(), (value - end).detach())[0].norm(dim=1)
        moved = move.detach().norm(dim=1)
        # what that step did to log det, and to log p(y_t), whose slope is about √D/ς_t, for each unit of its length
        rate = (torch.linalg.slogdet(rows.detach())[1] - before).abs() / moved.clamp(min=1e-300)
        return y, rows, left * (rate + flow.dims**0.5 / math.exp(u[1]))

    def _nearest(self, step: _Step, end: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """(y_t (B, D) by Newton's method with halved steps, what of it is too far (B,)); frozen where it is not."""
        wanted = self.tolerance * (1 + _rms(end))
        best, share = torch.full_like(wanted, torch.inf), torch.ones_like(wanted)
        y = tried = start
        move = torch.zeros_like(y)
        for _ in range(self.iterations):
            value, rows = step(tried)
            missed = (value - end).detach()
            nearer = _rms(missed) < best  # not where it is NaN
            newton = torch.linalg.solve_ex(rows.detach(), missed)[0]
            y, move = torch.where(nearer[:, None], tried, y), torch.where(nearer[:, None], newton, move)
            best = torch.where(nearer, _rms(missed), best)
            share = torch.where(nearer, (2 * share).clamp(max=1), share / 2)
            if not bool((best > wanted).any()):
                break
            tried = torch.where((best > wanted)[:, None], y - share[:, None] * move, y)
        return y, best > wanted


def _step_of(flow: Flow, t: Tensor, s: Tensor, chunk: int) -> _Step:
    """The step of the map from t to s."""
    alpha = float(flow.sde.marginal(t)[0])
    r = float((log_ratio(flow.sde, s) - log_ratio(flow.sde, t)).exp())
    cond = tell(flow.cond, end=per_sample(s, flow.like))

    def step(y: Tensor) -> tuple[Tensor, Tensor]:
        x = (alpha * y).to(flow.like.dtype).reshape(flow.like.shape)
        x, g = forward(lambda x: flow.counted(x, t, cond).x0, x, flow.differentiable)
        rows = torch.cat([rows for _, rows in jacobian(g, x, chunk, flow.differentiable)]).transpose(0, 1).double()
        kept = r * torch.eye(flow.dims, dtype=torch.float64, device=y.device)
        g = g if flow.differentiable else g.detach()
        return r * y + (1 - r) * g.flatten(1).double(), kept + (1 - r) * alpha * rows

    return step


def _log_det(rows: Tensor, t: float, evaluations: int) -> Tensor:
    """log det (B,), where it is of positive matrices."""
    sign, log_det = torch.linalg.slogdet(rows)
    if not bool((sign > 0).all()):
        raise SolverError(
            "The map folds space, with a determinant that is not above 0: several x_T make one sample, whose density "
            "is a sum over them. More steps, or more training, make it one to one",
            t=t,
            evaluations=evaluations,
            samples=(~(sign > 0)).nonzero().flatten().tolist(),
        )
    return log_det


def _rms(y: Tensor) -> Tensor:
    return y.detach().square().mean(1).sqrt()
