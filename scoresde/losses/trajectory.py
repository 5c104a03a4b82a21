"""Flow maps along trajectories of a teacher, or of their own."""

from __future__ import annotations

import math
from typing import Unpack

import torch
from torch import Tensor

from ..checks import whole
from ..diffusion.conditions import Cond, parted, take
from ..diffusion.denoiser import Denoiser
from ..diffusion.sde import SDE
from ..noise.rng import Rng
from ..ops.broadcast import coefficient
from ..sampling.multistep import Multistep
from ..sampling.sampler import Sampler
from .denoising import Times
from .flow_map import FlowMapLoss, Options, Pairs, Target, shares_of


class TrajectoryLoss(FlowMapLoss):
    r"""Distillation along trajectories of the teacher's, drawn as it goes: g* = (y_s − r y_t)/(1 − r).

    A batch of B comes from B/reuse noises, whose trajectories of `steps` network calls are run from t_max to t_min;
    each gives `reuse` pairs (t, s) of its times, which are moved by a random share of a step in every batch, so that
    all times are met. Costs `steps`/`reuse` calls of the teacher's for a sample. (Luhman & Luhman 2021 for one pair;
    Boffi et al. 2025, *Flow map matching*, Lagrangian form integrated.)

    Without a teacher the map is its own: at s = t it is a denoiser, which the share `still` of every batch trains on
    data, and whose trajectories the rest learns. (Boffi et al. 2025, *How to build a consistency model*, Lagrangian
    self-distillation integrated.)

    Args:
        steps: of a trajectory, by `solver`, ≥ 2.
        reuse: pairs of each, ≥ 1.
        first: share of t = t_max among the pairs, where every sample starts.
        last: share of s = t_min among them, where every sample ends.
        still: share of the batch with s = t, at data that are noised at `times`, in [0, 1); None for 0.8
            without a teacher, where at ½ the map follows itself before it is a denoiser, and for 0 with one, which is
            then learned at the times of its trajectories only.
        times: of those.
        solver: whose step and grid make trajectories; default order 3 in log-SNR with its corrector.
        options: those of `FlowMapLoss`.

    Raises:
        ValueError: still outside [0, 1), or 0 without a teacher; see `FlowMapLoss`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        teacher: Denoiser | None = None,
        *,
        steps: int = 32,
        reuse: int = 8,
        first: float = 0.5,
        last: float = 0.5,
        still: float | None = None,
        times: Times | None = None,
        solver: Sampler | None = None,
        **options: Unpack[Options],
    ):
        super().__init__(denoiser, teacher, **options)
        self.steps, self.reuse = whole(steps, "steps", 2), whole(reuse, "reuse")
        self.shares = Pairs(times, first=first, last=last, still=0.0)
        self.shares.times.start(denoiser.sde)
        self.still = (0.8 if teacher is None else 0.0) if still is None else float(still)
        if not (0 if teacher is not None else 1e-9) <= self.still < 1:
            raise ValueError(
                "still is the share of a batch that trains the map as a denoiser, in [0, 1), and more than 0 without a "
                f"teacher, which the map then is to itself; got {still}."
            )
        self.solver = Sampler(Multistep(3, sigma_data=None, corrector=3, bound=2.5)) if solver is None else solver

    def target(self, x0: Tensor, cond: Cond, teacher: Denoiser | None, rng: Rng) -> Target:
        still = min(round(self.still * len(x0)), len(x0) - 1)
        leader = self.denoiser if teacher is None else teacher
        g, x, t, s, own = self._along(x0[still:], take(cond, slice(still, None)), leader, rng)
        if not still:
            return Target(g, x, t, s, take(cond, own))
        sde, known = self.denoiser.sde, x0[:still]
        here, _ = self.shares.times.sample(sde, still, rng, x0.device)
        noised = sde.perturb(known, here, rng.normal_like(known))
        if teacher is not None:
            known = teacher(noised, here, parted(take(cond, slice(still)), ("scale",))[0]).x0
        rows = torch.cat([torch.arange(still, device=x0.device), still + own])
        ends = torch.cat([known, g]), torch.cat([noised, x]), torch.cat([here, t]), torch.cat([here, s])
        return Target(*ends, take(cond, rows))

    def _along(
        self, x0: Tensor, cond: Cond, teacher: Denoiser, rng: Rng
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(g*, x_t, t, s) of as many pairs as x0 has samples, on trajectories, and whose condition each has."""
        n, sde, shares = len(x0), teacher.sde, self.shares
        m = math.ceil(n / self.reuse)
        own = torch.arange(n, device=x0.device) % m
        grid = _moved(sde, self.solver.grid_for(teacher)(sde, self.steps), float(rng.uniform((1,))))
        sampler = Sampler(self.solver.step, lambda sde, n: grid, self.steps, denoise=False)
        z = teacher.prior_sample((m, *x0.shape[1:]), rng=rng, dtype=x0.dtype, device=x0.device)
        run = sampler.iterate(teacher, z, cond=take(parted(cond, ("scale",))[0], slice(m)), rng=rng)
        path = torch.stack([trace.x for trace in run])
        kinds, ends, where, to = rng.uniform((n, 4), dtype=torch.float64, device=x0.device).unbind(1)
        i = torch.where(kinds < shares.first, 0, (where * self.steps).long())
        j = torch.where(ends < shares.last, self.steps, i + 1 + (to * (self.steps - i)).long())
        times = grid.to(x0.device)
        (kept, gain), x, there = shares_of(sde, times[i], times[j]), path[i, own], path[j, own]
        g = (there - coefficient(kept, x) * x) / coefficient(gain, x)
        return g, x, times[i], times[j], own


def _moved(sde: SDE, grid: Tensor, share: float) -> Tensor:
    """Times whose inner ones are moved in λ by up to half a step, all by the same share."""
    grid = grid.double().cpu()
    level = sde.log_snr(grid)
    at = torch.arange(1, len(grid) - 1, dtype=torch.float64, device="cpu") + share - 0.5
    below = at.floor().long()
    return torch.cat([grid[:1], sde.time(torch.lerp(level[below], level[below + 1], at - below)), grid[-1:]])
