"""How the likelihood integral is solved: to tolerances, or with a budget of network calls."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion.grids import Grid, check_grid
from ..diffusion.sde import SDE
from ..ode import check_solver, log_ratio
from .budget import LEAST_BUDGET, LikelihoodGrid


@dataclass(frozen=True)
class Solver:
    """How the integral is solved. Refuses what cannot work before anything is evaluated."""

    rtol: float | None
    atol: float | None
    budget: int | None
    grid: Grid | None
    backend: str
    method: str | None
    max_evaluations: int
    t_min: float | None

    def __post_init__(self) -> None:
        tolerances = [self.rtol, self.atol]
        if self.budget is None:
            if self.rtol is None or self.atol is None:
                raise TypeError(f"Give rtol and atol, or a budget of network calls; got rtol, atol = {tolerances}.")
            if self.grid is not None:
                raise TypeError("A grid says where the calls of a budget go: give budget= with it, not rtol and atol.")
            check_solver(self.backend, self.method, self.rtol, self.atol)
            return
        if tolerances != [None, None]:
            raise TypeError(
                f"A budget replaces the tolerances; got budget={self.budget} and rtol, atol = {tolerances}."
            )
        if self.backend != "native" or self.method is not None:
            raise ValueError(
                f"A budget has its own method; got backend={self.backend!r}, method={self.method!r}. Leave them out, "
                "or give rtol and atol."
            )
        if isinstance(self.budget, bool) or not isinstance(self.budget, int) or self.budget < LEAST_BUDGET:
            raise ValueError(f"A budget is an integer of at least {LEAST_BUDGET} network calls; got {self.budget!r}.")

    def start(self, sde: SDE) -> float:
        """The cut-off for `sde`, checked."""
        start = sde.t_min if self.t_min is None else self.t_min
        if not (sde.t_min <= start < sde.t_max):
            raise ValueError(f"The likelihood cut-off t_min={start} lies outside [{sde.t_min}, {sde.t_max}).")
        return start

    def nodes(self, sde: SDE, calls: int) -> Tensor:
        """u at `calls` rising times from the cut-off to t_max."""
        start = self.start(sde)
        times = check_grid((self.grid or LikelihoodGrid(start))(sde, calls - 1), sde).double().flip(0)
        if len(times) != calls or not torch.allclose(
            times[[0, -1]], torch.tensor([start, sde.t_max], dtype=torch.float64), rtol=1e-6, atol=0
        ):
            raise ValueError(
                f"A budget with {calls} calls on its path needs {calls} times from t_max={sde.t_max} to t_min={start}; "
                f"the grid gave {len(times)} from {float(times[-1])} to {float(times[0])}. Pass t_min= to match it."
            )
        return log_ratio(sde, times)
