"""The probability-flow ODE by adaptive solvers, in both directions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import whole
from ..diffusion.denoiser import Cond, Denoiser
from ..diffusion.undisturbed import in_eval
from ..noise.rng import Rng
from ..ode import METHODS, check_solver, integrate, log_ratio, point, probability_flow
from ..ops.broadcast import as_time, host, samples
from .sampler import State, Step


class AdaptiveODE(Step):
    r"""dy/du = ς ε̂ in y = x/α, u = log ς, solved to a tolerance (Song et al. 2021, sec. 4.3, in scaled coordinates).

    Each step of the grid is one solve, so a `Sampler` takes one by default. With `denoise=False` the map is inverted
    by `encode`.

    Args:
        rtol, atol: tolerances of the solver, > 0, on the state y.
        backend: "native" (dopri5, error and step per sample: no sample depends on its batch-mates), "torchdiffeq"
            (dopri5, dopri8, bosh3, rk4, explicit_adams …) or "scipy" (RK45 and every method of `solve_ivp`, through
            the CPU: the original's choice), which control the batch as one.
        method: of the backend, see `scoresde.ode.METHODS`; default its first.
        fixed_steps: equal steps in u taken by a method without step control (rk4, euler, adams …).
        max_evaluations: limit on network calls per solve.

    Raises:
        ValueError: unknown backend or method, tolerances that are not positive.
        SolverError: from a solve that fails.
    """

    evaluations = None
    default_steps = 1

    def __init__(
        self,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        backend: str = "native",
        method: str | None = None,
        fixed_steps: int = 100,
        max_evaluations: int = 20_000,
    ):
        self.method = check_solver(backend, method, rtol, atol)
        self.order = float(METHODS[backend][self.method])
        self.rtol, self.atol, self.backend = float(rtol), float(atol), backend
        self.fixed_steps = whole(fixed_steps, "fixed_steps")
        self.max_evaluations = whole(max_evaluations, "max_evaluations")

    def __call__(
        self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, state: State, *, cond: Cond, rng: Rng
    ) -> tuple[Tensor, State]:
        return self.move(denoiser, x, t, s, cond=cond), state

    def encode(self, denoiser: Denoiser, x0: Tensor, *, cond: Cond = None, to: Tensor | None = None) -> Tensor:
        """The latent x_T (B, *event) of data `x0` (B, *event), in float32 or wider: the ODE from t_min to t_max.

        With `to`, a time (), the state there.
        """
        sde, x0 = denoiser.sde, samples(x0, "x0")
        with in_eval(list(denoiser.modules())), torch.no_grad():
            end = as_time(sde.t_max if to is None else to, x0)
            return self.move(denoiser, x0, as_time(sde.t_min, x0), end, cond=cond)

    def move(self, denoiser: Denoiser, x: Tensor, start: Tensor, end: Tensor, *, cond: Cond = None) -> Tensor:
        """x at time `end` of the trajectory through x at `start` (times are scalars; either direction)."""
        if start.ndim or end.ndim:
            raise ValueError("An adaptive solve has one start and one end for the batch: pass scalar times.")
        sde = denoiser.sde
        u0, u1 = log_ratio(sde, torch.stack([start, end]).double()).tolist()
        (alpha0, alpha1), _ = sde.marginal(torch.stack([start, end]).double())
        y1 = integrate(
            probability_flow(denoiser, x, cond),
            x.double().flatten(1) / alpha0,
            u0,
            u1,
            rtol=self.rtol,
            atol=self.atol,
            backend=self.backend,
            method=self.method,
            fixed_steps=self.fixed_steps,
            max_evaluations=self.max_evaluations,
            time=lambda u: float(point(sde, host(u))[0]),
        )
        return (alpha1 * y1).to(x.dtype).reshape(x.shape)
