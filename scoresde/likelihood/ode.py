r"""log p(x_0) by the instantaneous change of variables along the probability-flow ODE, in scaled coordinates.

With y = x/α, u = log(σ/α): dy/du = ς ε̂ and d log p(y)/du = −σ tr ∂ε̂/∂x, so

    log p_{t_min}(x) = log prior(x_T) + D (log α_T − log α_{t_min}) + ∫ σ tr(∂ε̂/∂x) du

(Chen et al. 2018, eq. 8; Song et al. 2021, eq. 39, in the coordinates of the module `ode`). The integral is solved to
a tolerance, or along a path of exactly so many network calls (`Tolerance`, `Budget`), in either direction.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion.denoiser import Cond, Denoiser
from ..diffusion.undisturbed import undisturbed
from ..noise.rng import Rng
from ..ode import SolverError
from ..ops.broadcast import samples
from .codec import RawCodec
from .divergence import Divergence, Hutchinson
from .flow import Flow
from .solver import Solver
from .terms import hidden_bits


@dataclass(frozen=True)
class LogLikelihood:
    """The result of `log_likelihood`: log_prob ± 1.96 stderr is meant to hold the truth 95 times in 100 or more.

    Attributes:
        log_prob: (B,) nats, of the data as they were given (raw, if a scaling was).
        stderr: (B,) nats, √(divergence_error² + solver_error²); NaN where the solver does not know its error.
        latent: x_T (B, *event).
        evaluations: network calls, each on the batch or what is left of it.
        divergence_error: (B,) nats, standard error of the divergence estimate: 0 for Exact.
        solver_error: (B,) nats, the sum of local errors in log p, by the embedded rule of lower order, widened for
            kinked fields and learned scores; an upper estimate as a rule. NaN where the backend does not tell
            (torchdiffeq, scipy).
        name: of the estimator.
        dims: D of bits/dim, the numbers in a raw sample; None for those of the latent.
    """

    log_prob: Tensor
    stderr: Tensor
    latent: Tensor
    evaluations: int
    divergence_error: Tensor
    solver_error: Tensor
    name: str = "bpd/ode"
    dims: int | None = None

    def __repr__(self) -> str:
        """Mean ± standard error over the samples; of a single one, itself ± its own error."""
        shown, n = [], len(self.log_prob)
        per_bit = (self.dims or self.latent[0].numel()) * math.log(2)
        for values, scale, unit in ((self.log_prob, 1.0, "nats"), (self.bits_per_dim, per_bit, "bits/dim")):
            error = float(values.detach().double().std()) / n**0.5 if n > 1 else float(self.stderr[0]) / scale
            shown.append(f"{float(values.detach().double().mean()):.5g} ± {error:.2g} {unit}")
        kind = ", a lower bound" if self.name.endswith("-bound") else ""
        return f"LogLikelihood({', '.join(shown)}{kind}; samples: {n:,}, evaluations: {self.evaluations:,})"

    @property
    def bits_per_dim(self) -> Tensor:
        """−log_prob/(D ln 2), (B,)."""
        return bits_per_dim(self.log_prob, (self.dims or self.latent[0].numel(),))


@undisturbed
def log_likelihood(
    denoiser: Denoiser,
    x0: Tensor,
    solver: Solver,
    *,
    divergence: Divergence | None = None,
    cond: Cond = None,
    rng: Rng | None = None,
    scaling: RawCodec | None = None,
    t_min: float | None = None,
    differentiable: bool = False,
) -> LogLikelihood:
    """log p of each sample, in nats.

    The density is that of the marginal at `t_min`, not of the data themselves: they differ by the noise σ(t_min). Where
    that may be worth more than 0.01 bits/dim of integer data there is a warning; `ode_bound` bounds those.
    Networks run in eval mode, since dropout would make the field random, and are given back as they were.

    Args:
        denoiser: the model.
        x0: data (B, *event), floating point; raw data if `scaling` is given.
        solver: `Tolerance(rtol, atol)` or `Budget(calls)`. There is no default: it is part of the result. Of a flow map
            `FlowMapSteps(n)` has the density of what its n steps make.
        divergence: `Hutchinson(probes, kind)` (default, one Rademacher probe), `HutchPlusPlus` or `Exact()`.
        cond: condition of each sample.
        rng: source of probes and dequantisation noise.
        scaling: codec of the data set; raw integers are dequantised with uniform noise (Theis et al. 2016) and the
            log-volume of the codec is added, so the result is the density of raw data; of latents, one draw of a
            lower bound on it, which `latent_bound` takes the mean of.
        t_min: likelihood cut-off, None for the SDE's own.
        differentiable: let `log_prob` carry gradients to `x0` and the network's parameters by plain autograd; memory
            then grows with the evaluations. The steps of an adaptive solve are constants to it.

    Raises:
        SolverError: a solve that failed; the samples are named.
        TypeError: integer data without a scaling: a point mass has no density.
        ValueError: a cut-off outside the SDE's range, a grid that does not fit it.
    """
    rng = Rng(0) if rng is None else rng
    x, log_volume = _model_data(x0, scaling, rng)
    if (hidden := hidden_bits(denoiser.sde, None if scaling is None else scaling.bins(x0), t_min)) > 0.01:
        warnings.warn(
            f"The noise at t_min hides up to {hidden:.2g} bits/dim of these integers: it is wide beside a bin of "
            "theirs, and this is the density of the dequantised data there. Take a smaller t_min, or `ode_bound` "
            "(likelihood.bound=dequantised), which bounds the probability of the integers through that noise.",
            stacklevel=2,
        )
    with torch.set_grad_enabled(differentiable):
        flow = Flow(denoiser, x, divergence or Hutchinson(), cond, rng, t_min=t_min, differentiable=differentiable)
        latent, change, errors = _solve(flow, solver, x, up=True)
        latent = latent.to(x.dtype)
        log_prob = flow.counted.prior_log_prob_given(latent, cond) + flow.log_scale + change + log_volume
    error, dims = torch.hypot(*errors), x0[0].numel()
    name = "bpd/latent-bound" if scaling is not None and scaling.bound else solver.estimator
    return LogLikelihood(log_prob, error, latent, flow.counted.evaluations, *errors, name, dims)


@undisturbed
def sample_with_log_prob(
    denoiser: Denoiser,
    shape_or_x: Sequence[int] | Tensor,
    solver: Solver,
    *,
    divergence: Divergence | None = None,
    cond: Cond = None,
    rng: Rng | None = None,
    t_min: float | None = None,
    differentiable: bool = False,
) -> tuple[Tensor, LogLikelihood]:
    """Draws of the probability flow with their log-density, from one solve: `log_likelihood` run the other way.

    Args:
        denoiser: the model.
        shape_or_x: (B, *event) to draw the latent from the prior, or the latent x_T itself.
        rng: source of the latent, then of the probes.
        solver, divergence, cond, t_min, differentiable: as in `log_likelihood`.

    Returns:
        x at t_min (B, *event), and the log-density of the model there, as `log_likelihood` would measure it: of
        p(x|cond), also where x_T is drawn from a prior that knows no condition.

    Raises:
        SolverError: a solve that failed; the samples are named.
    """
    rng = Rng(0) if rng is None else rng
    if isinstance(shape_or_x, Tensor):
        latent = shape_or_x
    else:
        device = next((p.device for p in denoiser.parameters()), torch.device("cpu"))
        latent = denoiser.prior_sample(tuple(shape_or_x), rng=rng, device=device)
    latent, _ = _model_data(latent, None, rng)
    with torch.set_grad_enabled(differentiable):
        flow = Flow(denoiser, latent, divergence or Hutchinson(), cond, rng, t_min=t_min, differentiable=differentiable)
        x, change, errors = _solve(flow, solver, latent, up=False)
        log_prob = flow.counted.prior_log_prob_given(latent, cond) + flow.log_scale + change
    found = (log_prob, torch.hypot(*errors), latent, flow.counted.evaluations, *errors, solver.estimator)
    return x.to(latent.dtype), LogLikelihood(*found)


def _solve(flow: Flow, solver: Solver, x: Tensor, *, up: bool) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """(x at the other end, ∫ σ tr ∂ε̂/∂x du from t_min to t_max (B,), (divergence error, solver error))."""
    bad = (~torch.isfinite(x).flatten(1).all(1)).nonzero().flatten().tolist()
    if bad:
        raise SolverError("The state is not finite before the solve", t=flow.time(flow.ends[0]), samples=bad)
    # when sampling there are no data to build the basis on: the divergence looks at noise around 0
    flow.probes = flow.divergence.probes(x if up else 0 * x, flow.rng, flow.denoised)
    alpha, end_alpha = flow.alphas if up else flow.alphas.flip(0)
    solved = solver(flow, x.double().flatten(1) / alpha, up=up)
    change, divergence_error = flow.divergence.summarise(solved.columns, flow.probes)
    change = (change + solved.correction) * (1 if up else -1)
    return (end_alpha * solved.end).reshape(x.shape), change, (divergence_error.detach(), solved.error)


def _model_data(x0: Tensor, scaling: RawCodec | None, rng: Rng) -> tuple[Tensor, Tensor | float]:
    if x0.ndim < 2 or len(x0) == 0:
        raise ValueError(f"Expected a batch (B, *event) of at least one sample; got shape {tuple(x0.shape)}.")
    if scaling is not None:
        x = scaling.encode(x0, rng=rng)
        return x, scaling.log_volume(x0, x)
    if not x0.is_floating_point() and not x0.is_complex():
        raise TypeError(
            f"x0 holds {x0.dtype}: integers are points, which have no density. Pass the data set's scaling= to "
            "dequantise them, or scaled floating-point data."
        )
    return samples(x0, "x0"), 0.0


def bits_per_dim(log_prob: Tensor, event_shape: Sequence[int], *, log_volume: Tensor | float = 0.0) -> Tensor:
    """−(log p + log_volume)/(D ln 2), of the shape of `log_prob`.

    Args:
        log_prob: log-density in nats.
        event_shape: of one raw sample; D is the product.
        log_volume: `log_volume` of the codec in nats, (B,), when `log_prob` is of model data (0 when
            `log_likelihood` was given the codec).
    """
    dims = math.prod(event_shape)
    if dims < 1:
        raise ValueError(f"event_shape must hold at least one dimension; got {tuple(event_shape)}.")
    return -(log_prob + log_volume) / (dims * math.log(2))
