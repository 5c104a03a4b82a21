"""The three terms that the variational bounds have in common: prior, noise-prediction error and reconstruction."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import whole
from ..diffusion.conditions import each
from ..diffusion.denoiser import Cond, CountingDenoiser, Denoiser
from ..diffusion.grids import Grid, LogSNRGrid, spanning
from ..diffusion.prediction import Prediction
from ..diffusion.sde import SDE
from ..diffusion.split import step_divergence
from ..noise.rng import Rng
from ..ops.broadcast import expand_as_batch, host, plain, samples
from .codec import RawCodec


@dataclass(frozen=True)
class Term:
    """One part of a bound on −log p.

    Attributes:
        value: nats, (B,).
        stderr: nats, (B,): of the draws; 0 in closed form, NaN for a single draw.
    """

    value: Tensor
    stderr: Tensor


@dataclass(frozen=True)
class Bound:
    """A lower bound on log p of each sample, in nats.

    Attributes:
        name: of the estimator: "bpd/elbo" or "bpd/vlb".
        prior: KL(q(z_T|x) ‖ p_T(·|cond)); of a guided denoiser p_T is normalised up to second order, so the bound
            holds up to that: below 1e-3 nats at σ_T/α_T = 50 and data of unit variance.
        diffusion: what the denoiser adds between t_min and t_max.
        reconstruction: E_q[−log p(x|z_{t_min})], less the log-volume of continuous raw data.
        steps: of `vlb`, L_1 … L_{T−1} of Ho et al., from noise to data: Term of (B, T). None for `elbo`.
        evaluations: network calls, each on the batch.
    """

    name: str
    prior: Term
    diffusion: Term
    reconstruction: Term
    evaluations: int
    steps: Term | None = None

    @property
    def log_prob(self) -> Tensor:
        """The bound (B,): −(prior + diffusion + reconstruction)."""
        return -(self.prior.value + self.diffusion.value + self.reconstruction.value)

    @property
    def stderr(self) -> Tensor:
        """Its standard error (B,): the terms are drawn independently."""
        return (self.prior.stderr**2 + self.diffusion.stderr**2 + self.reconstruction.stderr**2).sqrt()


class Setting:
    """A batch as model data, its decoder and prior terms, and the counted denoiser."""

    def __init__(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        scaling: RawCodec | None,
        t_min: float | None,
        draws: int,
        rng: Rng | None,
        cond: Cond,
    ):
        draws = whole(draws, "The number of samples")
        if x0.ndim < 2 or len(x0) == 0:
            raise ValueError(f"Expected a batch (B, *event) of at least one sample; got shape {tuple(x0.shape)}.")
        if scaling is None and not x0.is_floating_point() and not x0.is_complex():
            raise TypeError(f"x0 holds {x0.dtype}: pass the data set's scaling=, or scaled floating-point data.")
        self.counted, self.sde, self.samples = CountingDenoiser(denoiser), denoiser.sde, draws
        self.cond = each(plain, cond)
        self.start = self.sde.cut_off(t_min, "likelihood")
        self.rng = Rng(0) if rng is None else rng
        self.x = samples(x0 if scaling is None else scaling.encode(x0), "x0")  # integers at the centres of their bins
        self.edges: tuple[Tensor, Tensor] | None = None
        self.open_edges, self.owned = (
            self.edges,
            torch.tensor(True, dtype=torch.bool, device=self.x.device),
        )  # owned by a bin
        self.half_bins, self.log_volume = self.x.new_zeros((), dtype=torch.float64), self.x.new_zeros(())
        if scaling is not None:
            self.log_volume = scaling.log_volume(x0, self.x)
        if scaling is not None and scaling.discrete:
            self.edges, self.open_edges = scaling.bins(x0), scaling.bins(x0, open_ends=True)
            if self.edges is None or self.open_edges is None:
                raise ValueError(
                    f"The bins of these integers are no intervals of single dimensions under {scaling}, so the "
                    "probability of a bin is not bounded. Measure the density of dequantised data: log_likelihood, "
                    "likelihood.bound=null."
                )
            widths = self.edges[1] - self.edges[0]
            self.half_bins, self.owned = widths / 2, widths > 0
            # what is left is the volume of the continuous ones
            self.log_volume = self.log_volume - widths.where(self.owned, 1.0).log().flatten(1).sum(1)

    def denoise(self, z: Tensor, t: Tensor):
        return self.counted(z, t, self.cond)

    def divergence(self, t: Tensor, s: Tensor, variance: float | None) -> Tensor:
        """An unbiased estimate (B,) of E KL(q(z_s|z_t, x) ‖ p(z_s|z_t)) in nats, from one call; t and s () or (B,).

        Σ of p is the one that the model learnt, or has `variance` as its share: see `Ancestral`.
        """
        p, error, reduced = self._error(t)
        share = p.share if variance is None else variance
        if isinstance(share, Tensor):
            return step_divergence(self.sde, t, s, error, share.double()).flatten(1).sum(1)
        # linear in the squared error
        return step_divergence(self.sde, t, s, reduced, share or 0.0).flatten(1).sum(1)

    def squared_error(self, t: Tensor) -> Tensor:
        """An unbiased estimate (B,) of E_ε‖ε − ε̂(z_t)‖² at t (() or (B,)), from one call."""
        return self._error(t)[2].flatten(1).sum(1)

    def _error(self, t: Tensor) -> tuple[Prediction, Tensor, Tensor]:
        """(the prediction at z_t, (ε − ε̂)², and what has the same mean over ε), float64, from one call at t.

        At high SNR the error is nearly ε itself, whose ‖ε‖² has the known mean D: (‖ε‖² − D)/(1 + 1/SNR)² is taken
        off, which leaves the mean and, for a standard normal, no spread but that of x. (Discrete data are known once
        the noise is well below half a bin, and ε with them: nothing is taken off there.)
        """
        eps = self.rng.normal_like(self.x)
        p = self.denoise(self.sde.perturb(self.x, t, eps), t)
        error = (p.eps - eps).double() ** 2
        log_snr = self.sde.log_snr(t)
        noise = expand_as_batch((-0.5 * log_snr).exp(), self.x)
        known = (eps.double() ** 2 - 1) * (noise > self.half_bins)
        return p, error, error - expand_as_batch(torch.sigmoid(log_snr) ** 2, known) * known

    def times(self, steps: int, grid: Grid | None) -> Tensor:
        """Falling times (steps + 1,), float64."""
        return spanning(grid or LogSNRGrid(self.start), self.sde, whole(steps, "The number of steps"), self.start)

    def prior(self, z: Tensor) -> Tensor:
        """log q(z_T|x) − log p_T(z_T|cond) at z_T = `z` (B,)."""
        scales = self.sde.at(self.sde.t_max, self.x)
        sigma = scales.sigma.double()
        eps = (z - scales.alpha * self.x).double() / sigma
        log_q = -0.5 * (eps**2 + math.log(2 * math.pi)).flatten(1).sum(1) - self.x[0].numel() * sigma.log()
        return log_q - self.counted.prior_log_prob_given(z, self.cond).double()

    def reconstruct(self, z: Tensor) -> Tensor:
        """−log p(x|z) at t_min (B,)."""
        alpha, sigma = (float(v) for v in self.sde.marginal(host(self.start)))
        ratio, centre = sigma / alpha, z.double() / alpha
        x, dims = self.x.double(), self.x[0].numel()
        if self.open_edges is None:
            quadratic = 0.5 * ((x - centre) / ratio).square().flatten(1).sum(1)
            return quadratic + dims * (math.log(ratio) + 0.5 * math.log(2 * math.pi)) - self.log_volume
        return -self.log_bins(z)

    def log_bins(self, z: Tensor) -> Tensor:
        """log of what N(z/α, ς²) gives the raw data (B,) at t_min: the mass of the bins of integers, the outer ones
        endless, and the density of the others."""
        alpha, sigma = (float(v) for v in self.sde.marginal(host(self.start)))
        return self._of_bins(self.open_edges, z.double() / alpha, sigma / alpha).flatten(1).sum(1) + self.log_volume

    def log_noised(self, z: Tensor, dequantised: bool) -> Tensor:
        """log q(z|raw) (B,) at t_min, of the bins of x with uniform noise in them or of their centres."""
        alpha, sigma = (float(v) for v in self.sde.marginal(host(self.start)))
        y, ratio = z.double() / alpha, sigma / alpha  # q of z is that of z/α, a D-th power of α apart
        log_q = self._of_bins(self.edges, y, ratio) if dequantised else _log_normal(y, self.x.double(), ratio)
        if dequantised:
            log_q = log_q - (2 * self.half_bins).where(self.half_bins > 0, 1.0).log()
        return log_q.flatten(1).sum(1) - self.x[0].numel() * math.log(alpha)

    def _of_bins(self, edges: tuple[Tensor, Tensor] | None, centre: Tensor, std: float) -> Tensor:
        """Of each value: log of the mass of N(centre, std²) in its bin, or of its density at a continuous one."""
        assert edges is not None
        below, above = ((edge - centre) / std for edge in edges)
        return _log_mass(below, above).where(self.owned, _log_normal(self.x.double(), centre, std))

    def bound(self, name: str, diffusion: Term, steps: Term | None = None) -> Bound:
        """The terms together; prior and reconstruction by `samples` draws of their own, or in closed form."""
        t_max, start = (host(t) for t in (self.sde.t_max, self.start))

        def noisy(t: Tensor) -> Tensor:
            return self.sde.perturb(self.x, t, self.rng.normal_like(self.x))

        prior = mean_and_error(torch.stack([self.prior(noisy(t_max)) for _ in range(self.samples)]))
        if self.edges is None:  # x − z/α is N(0, (σ/α)² I): the quadratic is D/2 in the mean
            exact = self.reconstruct(self.sde.at(start, self.x).alpha.double() * self.x.double())
            reconstruction = Term(exact + 0.5 * self.x[0].numel(), torch.zeros_like(exact))
        else:
            reconstruction = mean_and_error(torch.stack([self.reconstruct(noisy(start)) for _ in range(self.samples)]))
        return Bound(name, prior, diffusion, reconstruction, self.counted.evaluations, steps)


def _log_mass(below: Tensor, above: Tensor) -> Tensor:
    """log(Φ(above) − Φ(below)), without cancellation: intervals right of 0 are mirrored."""
    mirrored = below + above > 0
    low, high = torch.where(mirrored, -above, below), torch.where(mirrored, -below, above)
    log_high, log_low = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    return log_high + torch.log1p(-(log_low - log_high).exp().clamp(max=1 - 1e-16))


def _log_normal(x: Tensor, mean: Tensor, std: float) -> Tensor:
    return -0.5 * ((x - mean) / std) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi)


def hidden_bits(sde: SDE, bins: tuple[Tensor, Tensor] | None, t_min: float | None = None) -> float:
    """What the noise at t_min costs a density of dequantised integers, in bits/dim, at most: that of a value which is
    always the same, in the narrowest of the bins. Its density at t_min is uniform on a bin and smoothed by ς = σ/α.
    0 without bins."""
    if bins is None:
        return 0.0
    widths = bins[1] - bins[0]
    if not bool((widths > 0).any()):
        return 0.0
    ratio = float((-0.5 * sde.log_snr(host(sde.cut_off(t_min, "likelihood")))).exp())
    u = (torch.arange(256, dtype=torch.float64, device="cpu") + 0.5) / 256
    width = float(widths[widths > 0].min()) / ratio
    return -float(_log_mass(-u * width, (1 - u) * width).mean()) / math.log(2)


def mean_and_error(draws: Tensor, stratified: bool = False) -> Term:
    """Mean over the first dimension and its standard error.

    One draw in each of n strata in order: half the mean square of neighbours' differences stands for the variance
    within strata, which it exceeds by that of the trend between two (Wolter 2007, sec. 8.2).
    """
    if len(draws) == 1:
        return Term(draws[0], torch.full_like(draws[0], math.nan))
    var = 0.5 * draws.diff(dim=0).square().mean(0) if stratified else draws.var(0)
    return Term(draws.mean(0), (var / len(draws)).sqrt())
