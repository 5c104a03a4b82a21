r"""log p(x_0) by the instantaneous change of variables along the probability-flow ODE, in scaled coordinates.

With y = x/α, u = log(σ/α): dy/du = ς ε̂ and d log p(y)/du = −σ tr ∂ε̂/∂x, so

    log p_{t_min}(x) = log prior(x_T) + D (log α_T − log α_{t_min}) + ∫ σ tr(∂ε̂/∂x) du

(Chen et al. 2018, eq. 8; Song et al. 2021, eq. 39, in the coordinates of the module `ode`). The integral is solved to
a tolerance, or along a path of exactly `budget` network calls (module `budget`); in either direction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..broadcast import select
from ..diffusion.denoiser import Cond, CountingDenoiser, Denoiser
from ..diffusion.grids import Grid
from ..noise.rng import Rng
from ..ode import SolverError, integrate, log_ratio, point
from .budget import LEAST_BUDGET, adjoint, follow
from .divergence import Divergence, Hutchinson
from .solver import Solver


class RawScaling(Protocol):
    """How raw data became model data (`scoresde.codecs.Scaling`)."""

    def encode(self, raw: Tensor, *, rng: Rng | None = None) -> Tensor: ...

    def log_volume(self, event_shape: Sequence[int]) -> float: ...


@dataclass(frozen=True)
class LogLikelihood:
    """The result of `log_likelihood`: log_prob ± 1.96 stderr is meant to hold the truth 95 times in 100 or more.

    Attributes:
        log_prob: (B,) nats, of the data as they were given (raw, if a scaling was).
        stderr: (B,) nats, √(divergence_error² + solver_error²), the terms that are known.
        latent: x_T (B, *event).
        evaluations: network calls, each on the batch or what is left of it.
        divergence_error: (B,) nats, standard error of the divergence estimate: 0 for Exact.
        solver_error: (B,) nats, the sum of local errors in log p, by the embedded rule of lower order; an upper
            estimate as a rule. NaN where the backend does not tell (torchdiffeq, scipy).
        name: of the estimator.
    """

    log_prob: Tensor
    stderr: Tensor
    latent: Tensor
    evaluations: int
    divergence_error: Tensor
    solver_error: Tensor
    name: str = "bpd/ode"


def log_likelihood(
    denoiser: Denoiser,
    x0: Tensor,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    budget: int | None = None,
    grid: Grid | None = None,
    divergence: Divergence | None = None,
    cond: Cond = None,
    rng: Rng | None = None,
    scaling: RawScaling | None = None,
    t_min: float | None = None,
    backend: str = "native",
    method: str | None = None,
    max_evaluations: int = 20_000,
    differentiable: bool = False,
) -> LogLikelihood:
    """log p of each sample, in nats.

    The density is that of the marginal at `t_min`, not of the data themselves: they differ by the noise σ(t_min).
    Put the network into `eval()` mode first: dropout would make the field random.

    Args:
        denoiser: the model.
        x0: data (B, *event), floating point; raw data if `scaling` is given.
        rtol, atol: tolerances of the solver on y and on log p, > 0. There is no default: they are part of the result.
        budget: instead of tolerances, the exact number of network calls, ≥ 4: the same nodes for every sample.
        grid: where the calls of a budget go, (sde, budget − 1) -> falling times from t_max to `t_min`; default
            `LikelihoodGrid`.
        divergence: `Hutchinson(probes, kind)` (default, one Rademacher probe), `HutchPlusPlus` or `Exact()`.
        cond: condition of each sample.
        rng: source of probes and dequantisation noise.
        scaling: of the data set; raw integers are dequantised with uniform noise (Theis et al. 2016) and the
            log-volume of the scaling is added, so the result is the density of raw data.
        t_min: likelihood cut-off, None for the SDE's own.
        backend, method, max_evaluations: see `scoresde.ode.integrate`. With "native" a sample's result does not
            depend on its batch-mates (beyond round-off of the network in another batch size).
        differentiable: let `log_prob` carry gradients to `x0` and the network's parameters by plain autograd; memory
            then grows with the evaluations. The steps of an adaptive solve are constants to it.

    Raises:
        SolverError: a solve that failed; the samples are named.
        TypeError: integer data without a scaling: a point mass has no density; neither tolerances nor a budget.
    """
    solver = Solver(rtol, atol, budget, grid, backend, method, max_evaluations, t_min)
    rng = Rng(0) if rng is None else rng
    x, log_volume = _model_data(x0, scaling, rng)
    with torch.set_grad_enabled(differentiable):
        flow = _Flow(denoiser, x, solver, divergence or Hutchinson(), cond, rng, differentiable)
        latent, change, errors = flow.run(x, up=True)
        latent = latent.to(x.dtype)
        log_prob = flow.counted.prior_log_prob_given(latent, cond) + flow.log_scale + change + log_volume
    return LogLikelihood(log_prob, _total(*errors), latent, flow.counted.evaluations, *errors)


def sample_with_log_prob(
    denoiser: Denoiser,
    shape_or_x: Sequence[int] | Tensor,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    budget: int | None = None,
    grid: Grid | None = None,
    divergence: Divergence | None = None,
    cond: Cond = None,
    rng: Rng | None = None,
    t_min: float | None = None,
    backend: str = "native",
    method: str | None = None,
    max_evaluations: int = 20_000,
    differentiable: bool = False,
) -> tuple[Tensor, LogLikelihood]:
    """Draws of the probability flow with their log-density, from one solve: `log_likelihood` run the other way.

    Args:
        denoiser: the model.
        shape_or_x: (B, *event) to draw the latent from the prior, or the latent x_T itself.
        rng: source of the latent, then of the probes.
        rtol, atol, budget, grid, divergence, cond, t_min, backend, method, max_evaluations, differentiable: as in
            `log_likelihood`.

    Returns:
        x at t_min (B, *event), and the log-density of the model there, as `log_likelihood` would measure it: of
        p(x|cond), also where x_T is drawn from a prior that knows no condition.

    Raises:
        SolverError: a solve that failed; the samples are named.
    """
    solver = Solver(rtol, atol, budget, grid, backend, method, max_evaluations, t_min)
    rng = Rng(0) if rng is None else rng
    if isinstance(shape_or_x, Tensor):
        latent = shape_or_x
    else:
        device = next((p.device for p in denoiser.parameters()), torch.device("cpu"))
        latent = denoiser.prior_sample(tuple(shape_or_x), rng=rng, device=device)
    latent, _ = _model_data(latent, None, rng)
    with torch.set_grad_enabled(differentiable):
        flow = _Flow(denoiser, latent, solver, divergence or Hutchinson(), cond, rng, differentiable)
        x, change, errors = flow.run(latent, up=False)
        log_prob = flow.counted.prior_log_prob_given(latent, cond) + flow.log_scale + change
    return x.to(latent.dtype), LogLikelihood(log_prob, _total(*errors), latent, flow.counted.evaluations, *errors)


class _Flow:
    """The probability flow of one batch, with its divergence, between the cut-off and t_max.

    Attributes:
        log_scale: D (log α_T − log α_{t_min}).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        like: Tensor,
        solver: Solver,
        divergence: Divergence,
        cond: Cond,
        rng: Rng,
        differentiable: bool,
    ):
        self.counted, self.sde, self.like, self.cond = CountingDenoiser(denoiser), denoiser.sde, like, cond
        self.solver, self.divergence, self.differentiable, self.rng = solver, divergence, differentiable, rng
        self.dims = like[0].numel()
        ends = torch.tensor([solver.start(self.sde), self.sde.t_max], dtype=torch.float64)
        (self.alpha0, self.alpha1), _ = self.sde.marginal(ends)
        self.u0, self.u1 = log_ratio(self.sde, ends).tolist()
        self.log_scale = self.dims * (self.alpha1.log() - self.alpha0.log())

    def field(self, u: Tensor, y: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """ε̂ (n, D) and σ · divergence columns (n, C) at u (n,) and y (n, D), float64."""
        t, alpha, sigma = point(self.sde, u)
        x = (alpha[:, None] * y).to(self.like.dtype).reshape(-1, *self.like.shape[1:])
        cond, probes = (self.cond, self.probes) if rows is None else (select(self.cond, rows), self.probes[rows])
        eps, rates = self.divergence(
            lambda value: self.counted(value, t, cond).eps, x, probes, differentiable=self.differentiable
        )
        return eps.flatten(1).double(), sigma[:, None] * rates

    def estimate(self, columns: Tensor) -> Tensor:
        return self.divergence.summarise(columns, self.probes)[0]

    def time(self, u: float) -> float:
        return float(point(self.sde, torch.tensor(u, dtype=torch.float64))[0])

    def denoised(self, x0: Tensor, ratio: float) -> Tensor:
        """x̂_0 of x_0 with noise of σ/α = `ratio`, one network call: what a divergence may look at before the solve."""
        u = torch.full((len(x0),), min(max(math.log(ratio), self.u0), self.u1), dtype=torch.float64, device=x0.device)
        t, _, _ = point(self.sde, u)
        return self.counted(self.sde.perturb(x0, t, self.rng.normal_like(x0)), t, self.cond).x0

    def run(self, x: Tensor, *, up: bool) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """(x at the other end, ∫ σ tr ∂ε̂/∂x du from t_min to t_max (B,), (divergence error, solver error))."""
        bad = (~torch.isfinite(x).flatten(1).all(1)).nonzero().flatten().tolist()
        if bad:
            raise SolverError("The state is not finite before the solve", t=self.time(self.u0), samples=bad)
        # when sampling there are no data to build the basis on: the divergence looks at noise around 0
        self.probes = self.divergence.probes(x if up else 0 * x, self.rng, self.denoised)
        alpha, end_alpha = (self.alpha0, self.alpha1) if up else (self.alpha1, self.alpha0)
        solve = self._to_tolerance if self.solver.budget is None else self._to_budget
        end, columns, correction, solver_error = solve(x.double().flatten(1) / alpha, up)
        change, divergence_error = self.divergence.summarise(columns, self.probes)
        change = (change + correction) * (1 if up else -1)
        return (end_alpha * end).reshape(x.shape), change, (divergence_error, solver_error)

    def _to_budget(self, y: Tensor, up: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        solver = self.solver
        assert solver.budget is not None
        calls = solver.budget - self.counted.evaluations - self.counted.prior_evaluations
        if calls < LEAST_BUDGET:
            raise ValueError(
                f"budget={solver.budget} leaves {calls} network calls beside divergence's and prior's; a path takes "
                f"{LEAST_BUDGET}."
            )
        nodes = solver.nodes(self.sde, calls)
        path = follow(self.field, y, nodes if up else nodes.flip(0), estimate=self.estimate, time=self.time)
        return path.end, path.columns, path.correction, path.error.detach()

    def _to_tolerance(self, y: Tensor, up: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        solver, dims = self.solver, self.dims
        assert solver.rtol is not None and solver.atol is not None
        columns, controlled = self.divergence.columns(dims)
        total = torch.full(
            (len(y),), 0.0 if solver.backend == "native" else math.nan, dtype=torch.float64, device=y.device
        )

        def rhs(u: Tensor, state: Tensor, rows: Tensor) -> Tensor:
            eps, rates = self.field(u, state[:, :dims], rows)
            _, alpha, sigma = point(self.sde, u)  # a reference backend may try u far outside: e^u would overflow
            return torch.cat([(sigma / alpha)[:, None] * eps, rates], 1)

        def watch(rows: Tensor, u: Tensor, slope: Tensor, error: Tensor) -> None:
            # a step's error in y moves log p by its product with the score, as in `budget`; 3 for steps so long that
            # the pair underrates itself: on a ring of Gaussians 95 % are then covered from tolerance 1e-4 down
            score = -(adjoint(u) / u.exp())[:, None] * slope[:, :dims]
            missed = self.divergence.summarise(error[:, dims:], self.probes[rows])[0]
            total[rows] += 3 * (missed.abs() + (score * error[:, :dims]).sum(1).abs())

        end = integrate(
            rhs,
            torch.cat([y, y.new_zeros(len(y), columns)], 1),
            *((self.u0, self.u1) if up else (self.u1, self.u0)),
            rtol=solver.rtol,
            atol=solver.atol,
            backend=solver.backend,
            method=solver.method,
            blocks=[dims, controlled],
            max_evaluations=solver.max_evaluations,
            time=self.time,
            watch=watch,
        )
        return end[:, :dims], end[:, dims:], torch.zeros_like(total), total


def _total(divergence_error: Tensor, solver_error: Tensor) -> Tensor:
    return torch.hypot(divergence_error.detach(), solver_error.nan_to_num(0.0))


def _model_data(x0: Tensor, scaling: RawScaling | None, rng: Rng) -> tuple[Tensor, float]:
    if x0.ndim < 2 or len(x0) == 0:
        raise ValueError(f"Expected a batch (B, *event) of at least one sample; got shape {tuple(x0.shape)}.")
    if scaling is not None:
        return scaling.encode(x0, rng=rng), scaling.log_volume(tuple(x0.shape[1:]))
    if not x0.is_floating_point():
        raise TypeError(
            f"x0 holds {x0.dtype}: integers are points, which have no density. Pass the data set's scaling= to "
            "dequantise them, or scaled floating-point data."
        )
    return x0, 0.0


def bits_per_dim(log_prob: Tensor, event_shape: Sequence[int], *, log_volume: float = 0.0) -> Tensor:
    """−(log p + log_volume)/(D ln 2), of the shape of `log_prob`.

    Args:
        log_prob: log-density in nats.
        event_shape: of one sample; D is the product.
        log_volume: log |dx/d raw| of the data scaling in nats, when `log_prob` is of scaled data (0 when
            `log_likelihood` was given the scaling).
    """
    dims = math.prod(event_shape)
    if dims < 1:
        raise ValueError(f"event_shape must hold at least one dimension; got {tuple(event_shape)}.")
    return -(log_prob + log_volume) / (dims * math.log(2))
