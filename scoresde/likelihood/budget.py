r"""log p along a path of exactly n network calls: predictor, corrector, and the score as the adjoint of log p.

For *any* path y(u), a solution or not, an exact score s = ∇_y log p_u and v = ςε̂ give, with ∂_u log p = −∇·v − s·v,

    log p_{u_0}(y_0) = log p_{u_1}(y_1) + ∫ ∇·v du − ∫ s·(dy − v du)

so what a cheap step gets wrong, its defect dy − v du, enters with a weight that is known without another call, and
the error of the path is left in second order. The path itself is a predictor–corrector in PEC mode: ε̂ linear in u
through the last two nodes, integrated against dς (exponential Adams–Bashforth; Zhang & Chen 2023), corrected on the
next call by the quadratic through three (Zhao et al. 2023, UniPC, with one call per step). Both integrals above are
of cubics through the four nodes around each interval, on any nodes. Memory does not grow with the number of calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import positive, whole
from ..diffusion.grids import Grid, spanning
from ..diffusion.readable import Readable
from ..diffusion.sde import SDE
from ..ode import SolverError, lagrange, log_ratio
from ..ops.broadcast import host
from .flow import Flow
from .solver import Solved, Solver

LEAST_BUDGET = 4
"""A cubic has four nodes."""

_TRUST = 0.05
"""ς below which a network's −ε̂/ς is noise, not a score: defects count by ς²/(ς² + 0.05²). Data are of order 1."""

_NODES, _WEIGHTS = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(16))

PathField = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(u (B,), y (B, D)) -> (ε̂ (B, D), rates d log p/du (B, C)), float64."""


class LikelihoodGrid(Readable):
    """Times for a likelihood: their density in u = log σ/α is `floor` + sech((u − log centre)/width).

    Data of order 1 have their structure at ς from 0.02 to 3; above, ε̂ is nearly y/ς, below, the ODE hardly moves.

    Args:
        t_end: last time, None for the SDE's t_min.
        centre: ς = σ/α where points are densest, > 0; in units of the data.
        width: of the dense region in u, > 0.
        floor: share that goes everywhere, relative to the peak, > 0.
    """

    def __init__(self, t_end: float | None = None, *, centre: float = 0.22, width: float = 1.5, floor: float = 0.2):
        self.t_end, self.centre = t_end, positive(centre, "centre", "a noise level σ/α")
        self.width, self.floor = positive(width, "width", "a length in log(σ/α)"), positive(floor, "floor", "a share")

    def __call__(self, sde: SDE, steps: int) -> Tensor:
        """Falling times (steps + 1,), float64, with exact ends."""
        ends = host([sde.t_max, sde.t_min if self.t_end is None else self.t_end])
        first, last = log_ratio(sde, ends).tolist()
        u = torch.linspace(first, last, 4097, dtype=torch.float64, device="cpu")
        # the integral of sech is the Gudermannian 2 atan(tanh(·/2))
        mass = self.floor * u + 2 * self.width * torch.atan(torch.tanh((u - math.log(self.centre)) / (2 * self.width)))
        wanted = torch.linspace(0, 1, steps + 1, dtype=torch.float64, device="cpu") * (mass[-1] - mass[0]) + mass[0]
        nodes = torch.from_numpy(np.interp(wanted.neg().numpy(), mass.neg().numpy(), u.numpy()))
        times = sde.time(-2 * nodes)
        times[0], times[-1] = ends
        return times


@dataclass(frozen=True)
class Budget(Solver):
    """Solves in exactly `calls` network calls, at the same nodes for every sample.

    Args:
        calls: network calls per batch, ≥ 4, with those that the divergence and the prior need.
        grid: where they go, (sde, n − 1) -> n falling times from t_max to the likelihood's `t_min`; default
            `LikelihoodGrid`.

    Raises:
        ValueError: fewer calls than a path takes.
    """

    calls: int
    grid: Grid | None = None

    def __post_init__(self) -> None:
        whole(self.calls, "A budget of network calls", LEAST_BUDGET)

    @property
    def accuracy(self) -> dict[str, float]:
        return {"budget": self.calls}

    @property
    def settings(self) -> dict[str, Any]:
        return {"budget": self.calls, "grid": type(self.grid or LikelihoodGrid()).__name__}

    def __call__(self, flow: Flow, y: Tensor, *, up: bool) -> Solved:
        calls = self.calls - flow.counted.evaluations - flow.counted.prior_evaluations
        if calls < LEAST_BUDGET:
            raise ValueError(
                f"A budget of {self.calls} network calls leaves {calls} beside divergence's and prior's; a path takes "
                f"{LEAST_BUDGET}."
            )
        nodes = self._nodes(flow.sde, flow.start, calls)
        return follow(flow.field, y, nodes if up else nodes.flip(0), estimate=flow.estimate, time=flow.time)

    def _nodes(self, sde: SDE, start: float, calls: int) -> Tensor:
        """u at `calls` rising times from the cut-off to t_max."""
        return log_ratio(sde, spanning(self.grid or LikelihoodGrid(start), sde, calls - 1, start).flip(0))


@dataclass(frozen=True)
class _Node:
    u: float
    y: Tensor
    eps: Tensor
    rates: Tensor


def follow(
    field: PathField,
    y0: Tensor,
    nodes: Tensor,
    *,
    estimate: Callable[[Tensor], Tensor],
    time: Callable[[float], float],
) -> Solved:
    """The path from `y0` (B, D) over `nodes` (n,) of u, monotone, n ≥ 4: one call of `field` at each.

    Args:
        estimate: (B, C) -> (B,), the change of log p that integrated columns stand for.
        time: u -> diffusion time, for error messages.

    Raises:
        SolverError: a state that is not finite, with the samples.
    """
    window: list[_Node] = []
    settled = y = y0
    parts: list[Tensor] | None = None
    for count, u in enumerate(nodes.tolist()):
        if window:
            y = settled + _integral(window[-2:], window[-1].u, u)
        eps, rates = field(nodes.new_full((len(y0),), u, device=y0.device), y)
        bad = ~(torch.isfinite(y).all(1) & torch.isfinite(eps).all(1) & torch.isfinite(rates).all(1))
        if bool(bad.any()):
            samples = bad.nonzero().flatten().tolist()
            raise SolverError("The path is not finite", t=time(u), evaluations=count + 1, samples=samples)
        window = [*window[-3:], _Node(u, y, eps, rates)]
        if count:
            settled = settled + _integral(window[-3:], window[-2].u, u)
        if count < 3:
            continue
        first, last = count == 3, count == len(nodes) - 1
        for left in [0] * first + [1] + [2] * last:  # the inner interval of the window; the outer ones at the ends
            new = _interval(window, left, estimate)
            parts = new if parts is None else [total + part for total, part in zip(parts, new, strict=True)]
    assert parts is not None
    columns, correction, error = parts
    return Solved(y, columns, correction, error.detach())


def _weights(nodes: Sequence[float], start: float, stop: float, exponential: bool) -> list[float]:
    """∫ L_j(u) du from `start` to `stop`, L_j the Lagrange polynomials of `nodes`; ∫ L_j(u) e^u du if `exponential`."""
    u = start + 0.5 * (stop - start) * (1 + _NODES)
    measure = 0.5 * (stop - start) * _WEIGHTS * (u.exp() if exponential else 1.0)
    return (lagrange(host(nodes), u) @ measure).tolist()


def _integral(nodes: Sequence[_Node], start: float, stop: float) -> Tensor:
    """∫ ε̂ dς over [start, stop], ε̂ a polynomial in u through `nodes`."""
    weights = _weights([node.u for node in nodes], start, stop, exponential=True)
    return sum((w * node.eps for w, node in zip(weights, nodes, strict=True)), host(0.0))


def _interval(window: Sequence[_Node], left: int, estimate: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """(columns, correction, error) of the interval from node `left` of four to the next."""
    a, b = window[left], window[left + 1]
    weight_a, weight_b = adjoint(host([a.u, b.u])).tolist()
    score = -0.5 * (weight_a * a.eps + weight_b * b.eps)
    columns, corrections = [], []
    for nodes in (window, window[:3] if left < 2 else window[1:]):  # the cubic, and a quadratic for the error
        weights = _weights([node.u for node in nodes], a.u, b.u, exponential=False)
        columns.append(sum((w * node.rates for w, node in zip(weights, nodes, strict=True)), host(0.0)))
        defect = b.y - a.y - _integral(nodes, a.u, b.u)
        corrections.append(-(score * defect).sum(1))
    # the correction itself counts: a learned score is not the gradient of log p of its own flow, so it may be all wrong
    error = estimate(columns[0] - columns[1]).abs() + (corrections[0] - corrections[1]).abs() + corrections[0].abs()
    return [columns[0], corrections[0], error]


def adjoint(u: Tensor) -> Tensor:
    """ς/(ς² + 0.05²), of the shape of u = log ς: −ε̂ times it is the score in y, damped where it cannot be trusted."""
    ratio = u.exp()
    return ratio / (ratio**2 + _TRUST**2)
