"""Sums over training steps, kept on the device so that no step waits for a number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion.sde import SDE
from ..losses.loss import Terms
from .world import Alone, World

BINS = 4


@dataclass(frozen=True)
class Averages:
    """Means over the steps that were kept since the last reset.

    Attributes:
        loss, grad_norm: means; NaN when no step was kept.
        by_time: mean loss in each quarter of [t_min, t_max], NaN where no t fell.
        skipped: steps left out since the start, because loss or gradient was not finite.
        streak: number of steps skipped in a row up to now, 0 if the last one was kept.
        blame: where the last such row began, in words; "" if no step was skipped.
    """

    loss: float
    grad_norm: float
    by_time: tuple[float, ...]
    skipped: int
    streak: int
    blame: str


class Tally:
    """Sums of one process, which agrees with the others on which steps to keep.

    Args:
        device: of the sums.
        sde: the SDE in whose time the losses are binned.
        names: of the parameters, in the order of `norms`.
        world: the processes that agree.

    Attributes:
        sums: (16,) float64, all that is counted. The others are views of it.
        kept: (3,) loss, gradient norm and number of the steps kept since the last reset.
        skipped, streak: () steps skipped since the start, and in a row up to now.
        origin: (3,) step, rank and parameter at which the last such row began.
        by_time: (2, BINS) loss and number of samples by quarter of t.
    """

    def __init__(self, device: torch.device, sde: SDE, names: Sequence[str], world: World | None = None):
        self.names, self.world = list(names), Alone() if world is None else world
        self.sums = torch.zeros(8 + 2 * BINS, dtype=torch.float64, device=device)
        self.kept, self.skipped, self.streak = self.sums[:3], self.sums[3], self.sums[4]
        self.origin, self.by_time = self.sums[5:8], self.sums[8:].view(2, BINS)
        self._t_min, self._per_t = sde.t_min, BINS / (sde.t_max - sde.t_min)
        self._one = torch.ones((), dtype=torch.float64, device=device)
        # of the step that is under way
        self._loss, self._by_time = torch.zeros_like(self._one), torch.zeros_like(self.by_time)

    @torch.no_grad()
    def add(self, terms: Terms, share: float) -> None:
        """Adds one pass, which is `share` of the batch of its step."""
        loss = terms.loss.detach().double()
        index = terms.t.sub(self._t_min).mul_(self._per_t).long().clamp_(0, BINS - 1)
        self._loss += share * loss.mean()
        self._by_time[0].index_add_(0, index, loss)
        self._by_time[1].index_add_(0, index, self._one.expand(len(index)))

    @torch.no_grad()
    def judge(self, norms: Tensor, blame: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Ends a step. Decides whether it is kept, the same on every process.

        Args:
            norms: (P,) of the gradient, by parameter.
            blame: bool, this process's own part of the gradient was not finite.
            step: its number.

        Returns:
            keep (bool) and the norm of the whole gradient: scalars on the device.
        """
        norm, total, rank = torch.linalg.vector_norm(norms).double(), self._loss, self._one * self.world.rank
        if self.world.size > 1:
            news = torch.zeros(1 + self.world.size, dtype=torch.float64, device=self.sums.device)
            news[0] = total / self.world.size
            news[1 + self.world.rank] = (blame.to(news.device) | ~total.isfinite()).double()
            news = self.world.sum(news)
            # slices hide whose gradient it was
            total, rank = news[0], torch.where(news[1:].any(), news[1:].argmax(), -1).double()
        keep = (total + norm).isfinite()
        gained = torch.stack([total, norm, self._one])
        if keep.device.type == "cpu" and keep:  # a CPU tensor is read at no cost, and there is then little to do
            self.kept += gained
            self.by_time += self._by_time
            self.streak.zero_()
        else:
            bad, kept = ~norms.isfinite(), keep.double()
            # 0 is the loss, −1 the sum of squares of a gradient that was finite
            parameter = torch.where(bad.any(), bad.int().argmax() + 1, -total.isfinite().int()).double()
            begins = ~keep & (self.streak == 0)
            origin = torch.where(begins, torch.stack([self._one * step, rank, parameter]), self.origin)
            self.origin.copy_(origin)
            self.kept += torch.where(keep, gained, 0.0)
            self.by_time += torch.where(keep, self._by_time, 0.0)
            self.skipped += 1 - kept
            self.streak.copy_((self.streak + 1) * (1 - kept))
        self._loss.zero_()
        self._by_time.zero_()
        return keep, norm

    def averages(self, reset: bool = False) -> Averages:
        """The averages so far; waits for the device, and every process calls it."""
        losses, counts = self.world.sum(self.by_time.clone()).tolist()
        loss, norm, kept = self.kept.tolist()
        skipped, streak, origin = int(self.skipped), int(self.streak), self.origin.tolist()
        if reset:
            self.kept.zero_()
            self.by_time.zero_()
        return Averages(
            loss=_ratio(loss, kept),
            grad_norm=_ratio(norm, kept),
            by_time=tuple(map(_ratio, losses, counts)),
            skipped=skipped,
            streak=streak,
            blame=self._words(*map(int, origin)) if skipped else "",
        )

    def _words(self, step: int, rank: int, parameter: int) -> str:
        what = {0: "the loss", -1: "the norm of the whole gradient"}.get(parameter)
        who = "unknown" if rank < 0 else rank
        return f"step {step}, rank {who}, first in {what or f'the gradient of {self.names[parameter - 1]}'}"

    def state(self) -> Tensor:
        """The sums as one process would have them. Every process calls it."""
        sums = self.sums.clone()
        sums[8:] = self.world.sum(self.by_time.flatten())
        return sums

    def load(self, saved: Tensor) -> None:
        """Continues from `state`, whose sums by time the first process takes as its own."""
        self.sums.zero_()
        self.sums[: len(saved)] = saved.to(self.sums.device)
        self.by_time *= self.world.rank == 0


def _ratio(total: float, count: float) -> float:
    return total / count if count else float("nan")
