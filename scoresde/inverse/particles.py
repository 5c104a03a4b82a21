"""Sequential Monte Carlo: weighted particles that make a posterior denoiser exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..broadcast import coefficient
from ..checks import whole
from ..diffusion.conditions import Cond, named
from ..diffusion.denoiser import Denoiser
from ..diffusion.prediction import Prediction
from ..diffusion.sde import SDE
from ..noise.rng import Rng
from ..ops import lincomb
from ..sampling import Step
from ..sampling.sampler import State
from .gaussian import MMPS, Posterior, PosteriorPrediction
from .observation import Observation


class Particles(NamedTuple):
    """What is carried from step to step.

    Attributes:
        x: weighted particles (B, *event).
        log_weights: (B,), float64.
        look: what the twisting denoiser says at x.
        given: the equally weighted draws of them that were returned.
    """

    x: Tensor
    log_weights: Tensor
    look: PosteriorPrediction
    given: Tensor


class TwistedSMC(Step):
    r"""The twisted diffusion sampler (Wu et al. 2023, alg. 1): groups of particles, one group per posterior sample set.

    Each moves by the Gaussian kernel r = N(m(P′), std² I) of the ancestral sampler, with the prediction P′ of a
    posterior denoiser, and is weighted by what that should have been,

        w ← w p(x_s|x_t) p̃(y|x_s) / [r(x_s|x_t) p̃(y|x_t)],   p = N(m(P), std² I),

    where P is the prior's prediction and p̃ the denoiser's own guess of p(y|x_t). Whatever bias that guess has, it is
    weighted out: the law of the particles is, as their number grows, p(x) p̃(y|x) at the end of the grid for the prior's
    own ancestral chain, which leaves the discretisation of that chain, and at most the noise at t_min. With few
    particles those of a group stem from few ancestors: modes that none found are missing.

    After each step draws of equal weight are returned; the weighted ones go on to the next step, or where their
    effective number is below `threshold`, the draws. Given other x than it returned, as by a corrector that is told of
    y by the same method, it goes on from those with equal weights.

    Its denoiser is the prior's: `Sampler(TwistedSMC(seen), LogisticGrid(denoiser.sigma_data))(denoiser, shape)`. That
    grid halves the discretisation of `LogSNRGrid`. The more steps, the nearer is each proposal and the less weights
    vary: the table of `benchmarks/posterior.py` is made with 400.

    Args:
        observation: y, A and std > 0; if y is one per sample, all of a group have the same.
        particles: K ≥ 1 of each group, rows 0 … K − 1, K … 2K − 1, … of the batch; None: the batch is one group.
        method: (denoiser, observation) -> `Posterior`, the twist; by default `MMPS`.
        threshold: share of K in [0, 1]; 1 has draws go on always.
        report: is called after each step with the effective number of particles of every group, (B/K,): `list.append`.

    Raises:
        ValueError: an argument outside these; a batch that is not of groups of K, or y or another condition that
            differs within one.
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
            self._check("y", y)
        return None

    def _check_told(self, cond: Cond, n: int) -> None:
        """What comes with the condition of n samples is the same in a group, and its noise is positive."""
        measured, rest = self.observation.split(cond)
        if not bool((measured.std > 0).all()):
            raise ValueError("Particles are weighted by a density of y, which needs std > 0.")
        each = named(rest, "cond") | ({"y": measured.y} if self.observation.y is None else {})
        for name, value in each.items():
            if value.ndim and len(value) == n:
                self._check(name, value)

    def _check(self, name: str, value: Tensor) -> None:
        """`value` (B, *) is one for all of a group."""
        size = self.particles or len(value)
        groups = value.reshape(-1, size, *value.shape[1:])
        first = groups[:, :1]
        if not bool(((groups == first) | ((groups != groups) & (first != first))).all()):  # NaN is none of a kind
            raise ValueError(f"{name} differs within a group of {size} particles; repeat each {size} times.")

    def count(self, steps: int) -> int:
        return steps + 1

    def __call__(
        self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, state: State, *, cond: Cond, rng: Rng
    ) -> tuple[Tensor, State]:
        twist = self.method(denoiser, self.observation)
        if state is None or state.given is not x:
            if state is None and not _recorded(x):
                self._check_told(cond, len(x))
            look = twist.look(x, t, cond)
            # x_T comes from the prior; later x, if others moved them, are draws of p_t(x) p̃(y|x) already
            log_weights = look.log_prob.double() if state is None else torch.zeros_like(look.log_prob.double())
            state = Particles(x, log_weights, look, x)
        x, log_weights, look, _ = state
        moved, gain = _propose(denoiser.sde, look, t, s, rng.normal_like(x))
        there = twist.look(moved, s, cond)
        log_weights = log_weights + gain + there.log_prob.double() - look.log_prob.double()
        return self._select(Particles(moved, log_weights, there, moved), rng)

    def _select(self, found: Particles, rng: Rng) -> tuple[Tensor, Particles]:
        size = self.particles or len(found.x)
        weights = found.log_weights.reshape(-1, size).softmax(1)
        effective = 1 / weights.square().sum(1)
        chosen = _systematic(weights, rng.uniform((len(found.x),), dtype=torch.float64).to(weights.device))
        if self.report is not None:
            self.report(effective)
        given = found.x[chosen]
        # row by row: of groups that are poor the draws go on, of others the weighted particles themselves
        poor = (effective <= self.threshold * size).repeat_interleave(size)
        kept = torch.where(poor, chosen, torch.arange(len(chosen), device=chosen.device))
        log_weights = torch.where(poor, 0.0, found.log_weights)
        return given, Particles(found.x[kept], log_weights, _rows(found.look, kept), given)


def _propose(sde: SDE, look: PosteriorPrediction, t: Tensor, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """x_s ~ r, and log p(x_s|x_t) − log r(x_s|x_t) (B,)."""
    alpha, sigma = sde.marginal(s)
    gap = -torch.expm1(sde.log_snr(t) - sde.log_snr(s))
    kept, std = sigma * (1 - gap).sqrt(), sigma * gap.sqrt()
    moved = lincomb(((alpha, look.told.x0), (kept, look.told.eps)), (std, z))
    by_x0, by_eps = (
        told.double() - plain.double() for told, plain in zip(_ends(look.told), _ends(look.plain), strict=True)
    )
    step = lincomb(((alpha, by_x0), (kept, by_eps))) / coefficient(std, by_x0).clamp(min=1e-300)
    return moved, -(0.5 * step**2 + step * z.double()).flatten(1).sum(1)


def _recorded(x: Tensor) -> bool:
    """Whether a graph is being made, where no number can be looked at."""
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _ends(p: Prediction) -> tuple[Tensor, Tensor]:
    return p.x0, p.eps


def _systematic(weights: Tensor, u: Tensor) -> Tensor:
    """Rows (G·K,) drawn by weights (G, K), float64: at (i + u)/K of the cumulated weights, one u per group."""
    groups, size = weights.shape
    start = u.reshape(groups, size)[:, :1]
    places = (torch.arange(size, dtype=torch.float64, device=weights.device) + start) / size
    chosen = torch.searchsorted(weights.cumsum(1), places).clamp(max=size - 1)
    return (chosen + size * torch.arange(groups, device=weights.device)[:, None]).flatten()


def _rows(look: PosteriorPrediction, rows: Tensor) -> PosteriorPrediction:
    plain, told = (Prediction(p.x0[rows], p.eps[rows], p.scales) for p in (look.plain, look.told))
    return PosteriorPrediction(plain, told, look.log_prob[rows])
