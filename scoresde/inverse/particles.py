"""Sequential Monte Carlo: weighted particles that make a posterior denoiser exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import whole
from ..diffusion.conditions import Cond, named
from ..diffusion.denoiser import Denoiser
from ..diffusion.prediction import Prediction
from ..diffusion.sde import SDE
from ..noise.rng import Rng
from ..ops import lincomb
from ..ops.broadcast import coefficient
from ..sampling.sampler import State, Step
from .gaussian import MMPS, Posterior, PosteriorPrediction
from .observation import Observation


class Particles(NamedTuple):
    """What is carried from step to step.

    Attributes:
        x: weighted particles (B, *event).
        log_weights: (B,), float64.
        found: the predictions of the twisting denoiser at x.
        returned: the equally weighted draws from them that were returned.
    """

    x: Tensor
    log_weights: Tensor
    found: PosteriorPrediction
    returned: Tensor


class TwistedSMC(Step):
    r"""The twisted diffusion sampler (Wu et al. 2023, alg. 1): groups of particles, one group per posterior sample set.

    Each particle moves by the Gaussian kernel r = N(m(P′), std² I) of the ancestral sampler, with the prediction P′ of
    a posterior denoiser, and its weight corrects for that,

        w ← w p(x_s|x_t) p̃(y|x_s) / [r(x_s|x_t) p̃(y|x_t)],   p = N(m(P), std² I),

    where P is the prior's prediction and p̃ the method's own approximation of p(y|x_t). The weights remove whatever bias
    that has: as the number of particles grows their law becomes p(x) p̃(y|x) at the end of the grid, with p(x) that of
    the prior's own ancestral chain. What remains is the discretisation of that chain, and at most the noise at t_min.
    With few particles those of a group stem from few ancestors, and modes that none of them found are missing.

    Each step returns draws of equal weight. The weighted particles themselves go on to the next step, or the draws
    where the effective number of particles is below `threshold`. Where the next x is not the one returned, because a
    corrector for the same posterior moved it, the run goes on from that x with equal weights.

    Its denoiser is the prior's: `Sampler(TwistedSMC(seen), LogisticGrid(denoiser.data_std))(denoiser, shape)`. That
    grid halves the discretisation error of `LogSNRGrid`. With more steps each proposal is closer and the weights vary
    less: the table of `benchmarks/posterior.py` is made with 400.

    Args:
        observation: y, A and std > 0; where each sample has its own y, those of a group are equal.
        particles: K ≥ 1 of each group, rows 0 … K − 1, K … 2K − 1, … of the batch; None makes the batch one group.
        method: (denoiser, observation) -> `Posterior`, the twist; by default `MMPS`.
        threshold: share of K in [0, 1]; with 1 the draws always go on.
        report: is called after each step with the effective number of particles of every group, (B/K,): `list.append`.

    Raises:
        ValueError: an argument outside these ranges; a batch that does not consist of groups of K; y or another
            condition that differs within a group.
    """

    order, evaluations = 1.0, 1
    default_steps = 400

    def __init__(
        self,
        observation: Observation,
        particles: int | None = None,
        method: Callable[[Denoiser, Observation], Posterior] = MMPS,
        *,
        threshold: float = 0.5,
        report: Callable[[Tensor], object] | None = None,
    ):
        if particles is not None:
            particles = whole(particles, "particles", otherwise="None for the whole batch")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold is a share of the particles, in [0, 1]; got {threshold}.")
        if not bool((observation.std > 0).all()):
            raise ValueError("Particles are weighted by a density of y, which needs an Observation with std > 0.")
        self.observation, self.method = observation, method
        self.particles = particles
        self.threshold, self.report = float(threshold), report

    def init(self, x: Tensor) -> State:
        size = self.particles or len(x)
        if len(x) % size:
            raise ValueError(f"A batch of {len(x)} has no groups of {size} particles.")
        y = self.observation.y
        if y is not None and len(y) == len(x) and y.shape[1:] and self.observation(x).shape[1:] != y.shape:
            self._check_shared("y", y)
        return None

    def _check_conditions(self, cond: Cond, n: int) -> None:
        """The conditions of n samples are equal within a group, and the noise level among them is positive."""
        measured, rest = self.observation.split(cond)
        if not bool((measured.std > 0).all()):
            raise ValueError("Particles are weighted by a density of y, which needs std > 0.")
        each = named(rest, "cond") | ({"y": measured.y} if self.observation.y is None else {})
        for name, value in each.items():
            if value.ndim and len(value) == n:
                self._check_shared(name, value)

    def _check_shared(self, name: str, value: Tensor) -> None:
        """`value` (B, *) is equal within each group."""
        size = self.particles or len(value)
        groups = value.reshape(-1, size, *value.shape[1:])
        first = groups[:, :1]
        if not bool(((groups == first) | ((groups != groups) & (first != first))).all()):  # NaN equals NaN here
            raise ValueError(f"{name} differs within a group of {size} particles; repeat each {size} times.")

    def count(self, steps: int) -> int:
        return steps + 1

    def __call__(
        self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, state: State, *, cond: Cond, rng: Rng
    ) -> tuple[Tensor, State]:
        twist = self.method(denoiser, self.observation)
        if state is None or state.returned is not x:
            if state is None and not _recorded(x):
                self._check_conditions(cond, len(x))
            found = twist.predict(x, t, cond)
            # x_T comes from the prior; a later x that was moved elsewhere is already a draw of p_t(x) p̃(y|x)
            log_weights = found.log_prob.double() if state is None else torch.zeros_like(found.log_prob.double())
            state = Particles(x, log_weights, found, x)
        x, log_weights, found, _ = state
        moved, gain = _propose(denoiser.sde, found, t, s, rng.normal_like(x))
        there = twist.predict(moved, s, cond)
        log_weights = log_weights + gain + there.log_prob.double() - found.log_prob.double()
        return self._select(Particles(moved, log_weights, there, moved), rng)

    def _select(self, particles: Particles, rng: Rng) -> tuple[Tensor, Particles]:
        x, log_weights, found, _ = particles
        size = self.particles or len(x)
        weights = log_weights.reshape(-1, size).softmax(1)
        effective = 1 / weights.square().sum(1)
        chosen = _systematic(weights, rng.uniform((len(x),), dtype=torch.float64).to(weights.device))
        if self.report is not None:
            self.report(effective)
        # row by row: of groups with too few effective particles the draws go on, of others the weighted particles
        few = (effective <= self.threshold * size).repeat_interleave(size)
        kept = torch.where(few, chosen, torch.arange(len(chosen), device=chosen.device))
        prior, posterior = (Prediction(p.x0[kept], p.eps[kept], p.scales) for p in (found.prior, found.posterior))
        found = PosteriorPrediction(prior, posterior, found.log_prob[kept])
        drawn = x[chosen]
        return drawn, Particles(x[kept], torch.where(few, 0.0, log_weights), found, drawn)


def _propose(sde: SDE, found: PosteriorPrediction, t: Tensor, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """x_s ~ r, and log p(x_s|x_t) − log r(x_s|x_t) (B,)."""
    alpha, sigma = sde.marginal(s)
    gap = -torch.expm1(sde.log_snr(t) - sde.log_snr(s))
    kept, std = sigma * (1 - gap).sqrt(), sigma * gap.sqrt()
    p, r = found.prior, found.posterior
    moved = lincomb(((alpha, r.x0), (kept, r.eps)), (std, z))
    x0, eps = r.x0.double() - p.x0.double(), r.eps.double() - p.eps.double()
    step = lincomb(((alpha, x0), (kept, eps))) / coefficient(std, x0).clamp(min=1e-300)
    return moved, -(0.5 * step**2 + step * z.double()).flatten(1).sum(1)


def _recorded(x: Tensor) -> bool:
    """Whether a graph is being compiled or captured, in which no number can be read."""
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _systematic(weights: Tensor, u: Tensor) -> Tensor:
    """Rows (G·K,) drawn by weights (G, K), float64: at (i + u)/K of the cumulative weights, one u per group."""
    groups, size = weights.shape
    start = u.reshape(groups, size)[:, :1]
    places = (torch.arange(size, dtype=torch.float64, device=weights.device) + start) / size
    chosen = torch.searchsorted(weights.cumsum(1), places).clamp(max=size - 1)
    return (chosen + size * torch.arange(groups, device=weights.device)[:, None]).flatten()
