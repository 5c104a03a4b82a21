r"""A lower bound on log p of raw data under a model of their latents."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import whole
from ..diffusion.denoiser import Cond, Denoiser
from ..diffusion.undisturbed import undisturbed
from ..noise.rng import Rng
from .codec import RawCodec
from .divergence import Divergence, spread
from .ode import LogLikelihood, log_likelihood
from .solver import Solver


@undisturbed
@torch.no_grad()
def latent_bound(
    denoiser: Denoiser,
    raw: Tensor,
    solver: Solver,
    *,
    scaling: RawCodec,
    samples: int = 1,
    divergence: Divergence | None = None,
    cond: Cond = None,
    rng: Rng | None = None,
    t_min: float | None = None,
) -> LogLikelihood:
    r"""A lower bound on log p of raw data by the probability flow of a model of latents:

        log p(raw) ≥ E_{z ~ q(z|raw)} [log p_{t_min}(z) + log p(raw|z) − log q(z|raw)],

    the last two the `log_volume` of the codec. What is lost is KL(q(z|raw) ‖ p(z|raw)). With an exact divergence the
    draws of z are importance-weighted (Burda et al. 2016, eq. 8), and the bound rises with their number to log p(raw).
    With probes they are averaged: a weight e^noise would be too large in the mean.

    Args:
        denoiser: of the latents.
        raw: (B, *raw shape), integers or floats as the codec takes them.
        scaling: a codec that is a bound, `codecs.Autoencoder`; for any other one the result is the density itself.
        samples: draws of z per sample, ≥ 1, each one solve. A single one has no `stderr`.
        solver, divergence, cond, rng, t_min: as in `log_likelihood`.

    Returns:
        As of `log_likelihood`; `divergence_error` is the standard error of the draws, with that of their divergence.

    Raises:
        ValueError: no samples.
        SolverError: a solve that failed.
    """
    rng, draws = Rng(0) if rng is None else rng, whole(samples, "The number of samples")
    solves = [
        log_likelihood(denoiser, raw, solver, divergence=divergence, cond=cond, rng=rng, scaling=scaling, t_min=t_min)
        for _ in range(draws)
    ]
    return averaged(solves, torch.stack([found.log_prob for found in solves], 1), "bpd/latent-bound", raw[0].numel())


def averaged(solves: Sequence[LogLikelihood], log_weights: Tensor, estimator: str, dims: int) -> LogLikelihood:
    """What K solves with log-weights (B, K) say together, see `pooled`; `dims` is of the data that are bounded."""
    last = solves[-1]
    log_prob, of_draws = pooled(log_weights, exact=not bool(last.divergence_error.any()))
    of_solver = torch.stack([found.solver_error for found in solves]).mean(0)
    evaluations, stderr = sum(found.evaluations for found in solves), torch.hypot(of_draws, of_solver)
    return LogLikelihood(log_prob, stderr, last.latent, evaluations, of_draws, of_solver, estimator, dims)


def pooled(draws: Tensor, *, exact: bool) -> tuple[Tensor, Tensor]:
    """Of log-weights (B, K): log of their mean where they are `exact`, else their own mean; and its standard error,
    NaN for a single draw."""
    log_prob, relative = draws.mean(1), draws
    if exact:
        log_prob = draws.logsumexp(1) - math.log(draws.shape[1])
        relative = (draws - log_prob[:, None]).exp()
    return log_prob, spread(relative) if draws.shape[1] > 1 else torch.full_like(log_prob, math.nan)
