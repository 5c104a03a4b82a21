r"""Bounds on log p(x) by the variational view: three terms, Monte-Carlo each, with their standard errors.

With z_t ~ q(z_t|x) = N(α_t x, σ_t² I), SNR = α²/σ², and the decoder p(x|z_0) at t_min,

    −log p(x) ≤ KL(q(z_T|x) ‖ prior) + diffusion + E_q[−log p(x|z_{t_min})]

(Kingma et al. 2021, *Variational diffusion models*, eq. 11; Ho et al. 2020, eq. 5). What is bounded is the density of
the *model*: of samples drawn by the ancestral chain (`vlb`, `importance_weighted`) or the reverse SDE (`elbo`) and
then decoded, not of the probability flow, whose log p `log_likelihood` measures.

The decoder is N(z/α, (σ/α)² I) at t_min, so that of continuous data is in closed form, and discrete data (raw integers
and their codec) get the probability of their bin, the outer bins open (Ho et al. 2020, eq. 13). In a table of both, the
integers get that probability, and the others a density.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..diffusion.denoiser import Cond, Denoiser
from ..diffusion.grids import Grid
from ..diffusion.sde import SDE
from ..diffusion.undisturbed import undisturbed
from ..noise.rng import Rng
from ..ops.broadcast import host
from .codec import RawCodec
from .divergence import Divergence
from .latent import averaged
from .ode import LogLikelihood, log_likelihood
from .solver import Solver
from .terms import Bound, Setting, Term, mean_and_error


@dataclass(frozen=True)
class ImportanceBound:
    """A lower bound on log p of each sample, in nats, in expectation over the draws.

    Attributes:
        log_prob: (B,) log of the mean weight.
        log_weights: (samples, B).
        effective: (B,) effective number of draws, (Σw)²/Σw², in [1, samples].
        evaluations: network calls, each on the batch.
        name: of the estimator.
    """

    log_prob: Tensor
    log_weights: Tensor
    effective: Tensor
    evaluations: int
    name: str = "bpd/iw"


@undisturbed
@torch.no_grad()
def elbo(
    denoiser: Denoiser,
    x0: Tensor,
    *,
    samples: int,
    cond: Cond = None,
    rng: Rng | None = None,
    scaling: RawCodec | None = None,
    t_min: float | None = None,
    importance: bool = True,
) -> Bound:
    r"""The bound of continuous time; its diffusion term is ½ ∫ E‖ε − ε̂(z_t, t)‖² |dλ| (Kingma et al. 2021, eq. 17).

    With the exact denoiser and prior, diffusion + prior is E_{z ~ q(z_{t_min}|x)}[−log p_{t_min}(z)] less the entropy
    of q(z_{t_min}|x): what the bound loses is the decoder's Jensen gap alone, of order D (σ/α)² at t_min.

    Args:
        denoiser: the model.
        x0: data (B, *event); raw data if `scaling` is given.
        samples: draws of (t, ε) per sample, ≥ 1, each one network call on the batch. The t of a sample are stratified.
        scaling: codec of raw data; integers stay what they are and the bound is on their probability, without
            dequantisation; of floats `log_volume` makes it the density of raw data.
        t_min: cut-off and decoder, None for the SDE's own.
        importance: draw λ = log SNR uniformly: p(t) ∝ |dλ/dt|, which cancels the weight. False draws t uniformly.

    Returns:
        Terms in nats. The standard error of the diffusion term is read from differences of neighbouring strata.

    Raises:
        ValueError: no samples, or a cut-off outside the SDE's range.
    """
    setting = Setting(denoiser, x0, scaling, t_min, samples, rng, cond)
    sde, x = setting.sde, setting.x
    high, low = sde.log_snr(host([setting.start, sde.t_max])).tolist()
    shift = setting.rng.uniform((len(x), samples), dtype=torch.float64, device=x.device)
    u = (torch.arange(samples, device=x.device) + shift) / samples
    if importance:
        t = sde.time(low + u * (high - low)).clamp(setting.start, sde.t_max)
        weight = torch.full_like(t, 0.5 * (high - low))
    else:
        t = setting.start + u * (sde.t_max - setting.start)
        alpha, sigma = sde.marginal(t)
        d_alpha, d_sigma = sde.rates(t)
        weight = (d_sigma / sigma - d_alpha / alpha) * (sde.t_max - setting.start)
    draws = torch.stack([weight[:, k] * setting.squared_error(t[:, k]) for k in range(samples)])
    return setting.bound("bpd/elbo", mean_and_error(draws, stratified=True))


@undisturbed
@torch.no_grad()
def ode_bound(
    denoiser: Denoiser,
    x0: Tensor,
    solver: Solver,
    *,
    scaling: RawCodec,
    samples: int = 1,
    dequantised: bool = True,
    divergence: Divergence | None = None,
    cond: Cond = None,
    rng: Rng | None = None,
    t_min: float | None = None,
) -> LogLikelihood:
    r"""A lower bound on log P of raw integers by the probability flow, through the noise at `t_min`:

        log P(raw) ≥ E_{z ~ q(z|raw)} [log p_{t_min}(z) + log P(raw|z) − log q(z|raw)],

    where log p_{t_min} is `log_likelihood`'s, q(z|raw) is the data at t_min, x of `raw` with noise, and P(raw|z) the
    mass of N(z/α, (σ/α)²) in the bin of `raw`, the decoder of `elbo`. What is lost is KL(q(z|raw) ‖ p(z|raw)). With
    an exact divergence the draws are importance-weighted (Burda et al. 2016, eq. 8), and the bound rises with `samples`
    to log P(raw). With probes they are averaged: a weight e^noise would be too large in the mean.

    Args:
        scaling: codec of the integers.
        samples: draws of z per sample, ≥ 1, each one solve. A single one has no `stderr`.
        dequantised: the network was trained on integers with uniform noise, so q is uniform in the bin and has the
            noise of t_min. False for the centres of the bins, as in `elbo`.
        denoiser, x0, solver, divergence, cond, rng, t_min: as in `log_likelihood`.

    Returns:
        As of `log_likelihood`; `divergence_error` is the standard error of the draws, with that of their divergence.

    Raises:
        ValueError: no samples, a codec without integers, or one whose bins are no intervals in model space.
        SolverError: a solve that failed.
    """
    setting = Setting(denoiser, x0, scaling, t_min, samples, rng, cond)
    if setting.edges is None:
        raise ValueError("ode_bound bounds the probability of integers: pass their scaling=, with levels.")
    rng, t = setting.rng, host(setting.start)
    values, solves = [], []
    for _ in range(setting.samples):
        x = scaling.encode(x0, rng=rng) if dequantised else setting.x
        z = setting.sde.perturb(x, t, rng.normal_like(x))
        found = log_likelihood(denoiser, z, solver, divergence=divergence, cond=cond, rng=rng, t_min=t_min)
        values.append(found.log_prob + setting.log_bins(z) - setting.log_noised(z, dequantised))
        solves.append(found)
    return averaged(solves, torch.stack(values, 1), "bpd/ode-bound", x0[0].numel())


@undisturbed
@torch.no_grad()
def vlb(
    denoiser: Denoiser,
    x0: Tensor,
    *,
    steps: int,
    grid: Grid | None = None,
    samples: int = 1,
    terms: int | None = None,
    variance: float | None = None,
    cond: Cond = None,
    rng: Rng | None = None,
    scaling: RawCodec | None = None,
    t_min: float | None = None,
) -> Bound:
    r"""L_0 + Σ L_{t−1} + L_T of the ancestral chain of T `steps` (Ho et al. 2020, eq. 5).

    With the posterior variance each KL, z_t → z_s, is ½ (SNR_s − SNR_t) E‖x − x̂_0(z_t)‖² (Kingma et al. 2021, eq. 13):
    the upper sum of `elbo`'s integral, to which it falls as 1/T. With a learned one it may be less, but not less than
    that integral where the denoiser is exact (see `step_divergence`).

    Args:
        steps: T ≥ 1.
        grid: (sde, T) -> falling times from t_max to `t_min`; default equal steps in log-SNR. Pass the grid samples are
            drawn on: another grid is another model.
        samples: draws of ε per step and sample, ≥ 1; T·samples network calls. One draw has no standard error.
        terms: in place of all T steps, so many drawn for each sample, in proportion to the λ that they pass: that many
            network calls, also for prior and decoder. T of them are each step once. Their standard error is read from
            neighbours, and so is at most too large.
        variance: of the chain, as in `Ancestral`.
        denoiser, x0, cond, rng, scaling, t_min: as in `elbo`.

    Raises:
        ValueError: no steps or samples, more terms than steps; a grid that does not run from t_max to `t_min`.
    """
    setting = Setting(denoiser, x0, scaling, t_min, samples if terms is None else terms, rng, cond)
    times = setting.times(steps, grid)
    if terms is not None:
        return setting.bound("bpd/vlb", _some(setting, times, terms, variance))
    values, errors = [], []
    for t, s in pairwise(times):
        term = mean_and_error(torch.stack([setting.divergence(t, s, variance) for _ in range(samples)]))
        values.append(term.value)
        errors.append(term.stderr)
    each = Term(torch.stack(values, 1), torch.stack(errors, 1))
    total = Term(each.value.sum(1), each.stderr.square().sum(1).sqrt())
    return setting.bound("bpd/vlb", total, each)


def _some(setting: Setting, times: Tensor, terms: int, variance: float | None) -> Term:
    """The sum over all steps of `times`, estimated by so many of them, one from each of as many strata."""
    steps, device = len(times) - 1, setting.x.device
    if terms > steps:
        raise ValueError(f"A chain of {steps} steps has no {terms} terms to draw: take terms={steps}, all of them.")
    passed = setting.sde.log_snr(times).diff()
    chance = (torch.ones_like(passed) / steps if terms == steps else passed / passed.sum()).to(device)
    shift = setting.rng.uniform((len(setting.x), terms), dtype=torch.float64, device=device)
    u = (torch.arange(terms, device=device) + shift) / terms
    k = torch.searchsorted(chance.cumsum(0), u, right=True).clamp(max=steps - 1).T
    t, s = times.to(device)[k], times.to(device)[k + 1]
    draws = [setting.divergence(t[i], s[i], variance) / chance[k[i]] for i in range(terms)]
    return mean_and_error(torch.stack(draws), stratified=True)


@undisturbed
@torch.no_grad()
def importance_weighted(
    denoiser: Denoiser,
    x0: Tensor,
    *,
    steps: int,
    samples: int,
    grid: Grid | None = None,
    cond: Cond = None,
    rng: Rng | None = None,
    scaling: RawCodec | None = None,
    t_min: float | None = None,
) -> ImportanceBound:
    r"""log (1/K) Σ_k p(x, z^k_{0…T})/q(z^k_{0…T}|x), z^k ~ q: K = `samples` whole chains (Burda et al. 2016, eq. 8).

    Its expectation bounds log p(x) of the ancestral chain of `steps` steps on `grid` (posterior variance) from below,
    is `vlb` for K = 1, and rises with K to log p(x) itself. That is the density of the chain's samples: the law of the
    chain differs from the reverse SDE's by the discretisation, and from the probability flow's by the model's error.
    The weights spread over e^±√(2·KL): K must be of that order for the gap to close (`effective` tells).

    Args:
        steps, grid: the chain, as in `vlb`.
        samples: K ≥ 1; K·steps network calls.
        denoiser, x0, cond, rng, scaling, t_min: as in `elbo`.
    """
    setting = Setting(denoiser, x0, scaling, t_min, samples, rng, cond)
    sde, x, rng = setting.sde, setting.x, setting.rng
    times = setting.times(steps, grid)
    weights = []
    for _ in range(samples):
        z = sde.perturb(x, times[0], rng.normal_like(x))
        log_weight = -setting.prior(z)
        for t, s in pairwise(times):
            # q(z_s|z_t, x) and p(z_s|z_t) = q(z_s|z_t, x̂_0): one variance, means that differ by shift·(x̂_0 − x)
            noise, difference = rng.normal_like(x), setting.denoise(z, t).x0 - x
            scale, shift, std = _posterior(sde, t, s)
            z = scale * z + shift * x + std * noise
            apart = (shift / std * difference).double()
            log_weight = log_weight + (noise.double() * apart - 0.5 * apart**2).flatten(1).sum(1)
        weights.append(log_weight - setting.reconstruct(z))
    log_weights = torch.stack(weights)
    top = log_weights.logsumexp(0)
    effective = (2 * top - (2 * log_weights).logsumexp(0)).exp()
    return ImportanceBound(top - math.log(samples), log_weights, effective, setting.counted.evaluations)


def _posterior(sde: SDE, t: Tensor, s: Tensor) -> tuple[float, float, float]:
    """(a, b, std) of q(z_s|z_t, x) = N(a z_t + b x, std² I) (Ho et al. 2020, eq. 6–7)."""
    alpha_s, sigma_s = sde.marginal(s)
    _, sigma_t = sde.marginal(t)
    scale, std = sde.transition(s, t)
    share = std / sigma_t  # √(1 − e^{λ_t − λ_s})
    return float(scale * (sigma_s / sigma_t) ** 2), float(alpha_s * share**2), float(sigma_s * share)
