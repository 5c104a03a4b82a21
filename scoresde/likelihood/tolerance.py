"""log p to a tolerance: an adaptive solve of the state and the divergence together."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import whole
from ..ode import check_solver, integrate, point
from .budget import adjoint
from .flow import Flow
from .solver import Solved, Solver


@dataclass(frozen=True)
class Tolerance(Solver):
    """Solves to tolerances. They are part of the result, so there is no default.

    Args:
        rtol, atol: on y = x/α and on log p, > 0: a step's error is measured against atol + rtol·|y|.
        max_evaluations: limit on network calls per solve, ≥ 1.
        backend, method: see `scoresde.ode.integrate`. With "native" a sample's result does not depend on its
            batch-mates (beyond round-off of the network in another batch size), and its error is known.

    Raises:
        ValueError: tolerances that are not positive, an unknown backend or a method that it does not have.
    """

    rtol: float
    atol: float
    max_evaluations: int = 20_000
    backend: str = "native"
    method: str | None = None

    def __post_init__(self) -> None:
        check_solver(self.backend, self.method, self.rtol, self.atol)
        whole(self.max_evaluations, "max_evaluations", 1)

    @property
    def accuracy(self) -> dict[str, float]:
        return {"rtol": self.rtol, "atol": self.atol}

    @property
    def settings(self) -> dict[str, Any]:
        return asdict(self)

    def __call__(self, flow: Flow, y: Tensor, *, up: bool) -> Solved:
        dims = flow.dims
        columns, controlled = flow.divergence.columns(dims)
        total, calls, steps = (y.new_zeros(len(y)) for _ in range(3))

        def rhs(u: Tensor, state: Tensor, rows: Tensor) -> Tensor:
            calls[rows] += 1
            eps, rates = flow.field(u, state[:, :dims], rows)
            _, alpha, sigma = point(flow.sde, u)  # a reference backend may try u far outside: e^u would overflow
            return torch.cat([(sigma / alpha)[:, None] * eps, rates], 1)

        def watch(rows: Tensor, u: Tensor, slope: Tensor, error: Tensor) -> None:
            # a step's error in y moves log p by its product with the score, as in `budget`
            score = -(adjoint(u) / u.exp())[:, None] * slope[:, :dims]
            missed = flow.divergence.summarise(error[:, dims:], flow.probes[rows])[0]
            total[rows] += missed.abs() + (score * error[:, :dims]).sum(1).abs()
            steps[rows] += 1

        end = integrate(
            rhs,
            torch.cat([y, y.new_zeros(len(y), columns)], 1),
            *(flow.ends if up else reversed(flow.ends)),
            rtol=self.rtol,
            atol=self.atol,
            backend=self.backend,
            method=self.method,
            blocks=[dims, controlled],
            max_evaluations=self.max_evaluations,
            time=flow.time,
            watch=watch,
        )
        error = total * _distrust(calls, steps) if self.backend == "native" else torch.full_like(total, math.nan)
        return Solved(end[:, :dims], end[:, dims:], torch.zeros_like(total), error)


def _distrust(calls: Tensor, steps: Tensor) -> Tensor:
    r"""How far the embedded pair may underrate the error of a solve of so many `calls` and accepted `steps`: 3 to 21.

    3 for steps so long that the pair underrates itself. Where a network has kinks (ReLU), the divergence jumps along
    the path. A jump J in a step costs up to 0.26 h J, of which the pair of Dormand and Prince may see as little as
    0.003 h J (the partial sums of its weights over the stages before the jump), and steps are accepted where it sees
    little. How often a step is rejected tells such a field: 2 to 6 % of the tries in smooth fields, 14 to 50 % in
    kinked ones from tolerance 1e-4 down. Two more count as rejected, so that few tries prove nothing. Both ends are
    measured (`benchmarks/coverage.py`): 21 and not 0.26/0.003, because the signs of the jumps differ.
    """
    tries = (calls - 2) / 6  # two calls choose the first step
    share = (tries - steps + 2) / tries
    return 3 + 18 * ((share - 0.06) / 0.15).clamp(0, 1)
