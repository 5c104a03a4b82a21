r"""log p(x_0) by the instantaneous change of variables along the probability-flow ODE, in scaled coordinates.

With y = x/α, u = log(σ/α): dy/du = ς ε̂ and d log p(y)/du = −σ tr ∂ε̂/∂x, so

    log p_{t_min}(x) = log prior(x_T) + D (log α_T − log α_{t_min}) + ∫ σ tr(∂ε̂/∂x) du

(Chen et al. 2018, eq. 8; Song et al. 2021, eq. 39, in the coordinates of the module `ode`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .denoiser import Cond, CountingDenoiser, Denoiser
from .divergence import Divergence, Hutchinson
from .ode import integrate, log_ratio, point
from .rng import Rng
from .shapes import select


class RawScaling(Protocol):
    """How raw data became model data (`scoresde.data.Scaling`)."""

    def encode(self, raw: Tensor, *, rng: Rng | None = None) -> Tensor: ...

    def log_volume(self, event_shape: Sequence[int]) -> float: ...


@dataclass(frozen=True)
class LogLikelihood:
    """The result of `log_likelihood`.

    Attributes:
        log_prob: (B,) nats, of the data as they were given (raw, if a scaling was).
        stderr: (B,) nats, standard error of the divergence estimate (0 for Exact); without the solver's own error.
        latent: x_T (B, *event).
        evaluations: network calls, each on the batch or what is left of it.
    """

    log_prob: Tensor
    stderr: Tensor
    latent: Tensor
    evaluations: int


def log_likelihood(
    denoiser: Denoiser,
    x0: Tensor,
    *,
    rtol: float,
    atol: float,
    divergence: Divergence | None = None,
    cond: Cond = None,
    rng: Rng | None = None,
    scaling: RawScaling | None = None,
    t_min: float | None = None,
    backend: str = "native",
    method: str | None = None,
    max_evaluations: int = 20_000,
) -> LogLikelihood:
    """log p of each sample, in nats.

    The density is that of the marginal at `t_min`, not of the data themselves: they differ by the noise σ(t_min).
    Put the network into `eval()` mode first: dropout would make the field random.

    Args:
        denoiser: the model.
        x0: data (B, *event), floating point; raw data if `scaling` is given.
        rtol, atol: tolerances of the solver on y and on log p, > 0. There is no default: they are part of the result.
        divergence: `Hutchinson(probes, kind)` (default, one Rademacher probe) or `Exact()`.
        cond: condition of each sample.
        rng: source of probes and dequantisation noise.
        scaling: of the data set; raw integers are dequantised with uniform noise (Theis et al. 2016) and the
            log-volume of the scaling is added, so the result is the density of raw data.
        t_min: likelihood cut-off, None for the SDE's own.
        backend, method, max_evaluations: see `scoresde.ode.integrate`. With "native" a sample's result does not
            depend on its batch-mates (beyond round-off of the network in another batch size).

    Raises:
        SolverError: a solve that failed; the samples are named.
        TypeError: integer data without a scaling: a point mass has no density.
    """
    divergence = Hutchinson() if divergence is None else divergence
    rng = Rng(0) if rng is None else rng
    x, log_volume = _model_data(x0, scaling, rng)
    sde, dims = denoiser.sde, x[0].numel()
    start = sde.t_min if t_min is None else t_min
    if not (sde.t_min <= start < sde.t_max):
        raise ValueError(f"The likelihood cut-off t_min={start} lies outside [{sde.t_min}, {sde.t_max}).")
    ends = torch.tensor([start, sde.t_max], dtype=torch.float64)
    (alpha0, alpha1), _ = sde.marginal(ends)
    u0, u1 = log_ratio(sde, ends).tolist()
    probes = divergence.probes(x, rng)
    counted = CountingDenoiser(denoiser)

    def rhs(u: Tensor, state: Tensor, rows: Tensor) -> Tensor:
        t, alpha, sigma = point(sde, u)
        here = (alpha[:, None] * state[:, :dims]).to(x.dtype).reshape(-1, *x.shape[1:])
        part = select(cond, rows)
        eps, rates = divergence(lambda value: counted(value, t, part).eps, here, probes[rows])
        return torch.cat([(sigma / alpha)[:, None] * eps.flatten(1).double(), sigma[:, None] * rates], 1)

    with torch.no_grad():
        columns, controlled = divergence.columns(dims)
        y0 = torch.cat([x.double().flatten(1) / alpha0, x.new_zeros(len(x), columns, dtype=torch.float64)], 1)
        y1 = integrate(
            rhs,
            y0,
            u0,
            u1,
            rtol=rtol,
            atol=atol,
            backend=backend,
            method=method,
            blocks=[dims, controlled],
            max_evaluations=max_evaluations,
            time=lambda u: float(point(sde, torch.tensor(u, dtype=torch.float64))[0]),
        )
        latent = (alpha1 * y1[:, :dims]).reshape(x.shape)
        change, stderr = divergence.summarise(y1[:, dims:], probes)
        log_prob = denoiser.prior_log_prob(latent) + dims * (alpha1.log() - alpha0.log()) + change + log_volume
    return LogLikelihood(log_prob, stderr, latent.to(x.dtype), counted.evaluations)


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
