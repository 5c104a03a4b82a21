"""What happens in training, summed on the device: no step waits for a number."""

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
    """What happened since the last look: means over the steps that were kept.

    Attributes:
        loss, grad_norm: means; NaN when no step was kept.
        by_time: mean loss in each quarter of [t_min, t_max], NaN where no t fell.
        skipped: steps left out since the start, because loss or gradient was not finite.
        streak: length of the row of skipped steps that ends at the last one, 0 if that was kept.
        blame: where the last such row began, in words; "" if there was none.
    """

    loss: float
    grad_norm: float
    by_time: tuple[float, ...]
    skipped: int
    streak: int
    blame: str


class Tally:
    """Sums of one process, which agrees with the others on what to keep.

    Args:
        device: where it counts.
        sde: whose times the losses have.
        names: of the parameters, in the order of `norms`.
        world: with whom it agrees.

    Attributes:
        sums: (16,) float64: of loss, gradient norm and steps kept since the last look; steps skipped and the present
            row of them; step, rank and parameter at which that row began; loss and number of samples by quarter of t.
    """

    def __init__(self, device: torch.device, sde: SDE, names: Sequence[str], world: World | None = None):
        self.names, self.world = list(names), Alone() if world is None else world
        self.sums = torch.zeros(8 + 2 * BINS, dtype=torch.float64, device=device)
        self._t_min, self._per_t = sde.t_min, BINS / (sde.t_max - sde.t_min)
        self._ones = torch.ones((), dtype=torch.float64, device=device)
        self._pass = torch.zeros(1 + 2 * BINS, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, terms: Terms, share: float) -> None:
        """One pass, which makes up `share` of the batch of its step."""
        loss = terms.loss.detach().double()
        index = terms.t.sub(self._t_min).mul_(self._per_t).long().clamp_(0, BINS - 1)
        self._pass[0] += share * loss.mean()
        self._pass.index_add_(0, index + 1, loss)
        self._pass.index_add_(0, index + 1 + BINS, self._ones.expand(len(index)))

    @torch.no_grad()
    def judge(self, norms: Tensor, blame: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Ends a step: whether it is kept, the same on every process, and its gradient norm.

        Args:
            norms: (P,) of the gradient, by parameter.
            blame: bool, this process's own part of the gradient was not finite.
            step: its number.

        Returns:
            keep (bool), norm: scalars on the device.
        """
        norm, total, rank = torch.linalg.vector_norm(norms).double(), self._pass[0], self._ones * self.world.rank
        if self.world.size > 1:
            news = torch.zeros(1 + self.world.size, dtype=torch.float64, device=self.sums.device)
            news[0] = total / self.world.size
            news[1 + self.world.rank] = (blame.to(news.device) | ~total.isfinite()).double()
            news = self.world.sum(news)
            # slices hide whose gradient it was
            total, rank = news[0], torch.where(news[1:].any(), news[1:].argmax(), -1).double()
        keep = (total + norm).isfinite()
        gained = torch.stack([total, norm, self._ones])
        if keep.device.type == "cpu" and keep:  # read at no cost, and then there is little to do
            self.sums[:3] += gained
            self.sums[8:] += self._pass[1:]
            self.sums[4] = 0
            self._pass.zero_()
            return keep, norm
        bad = ~norms.isfinite()
        # 0 is the loss, −1 the sum of squares of a gradient that was finite
        parameter = torch.where(bad.any(), bad.int().argmax() + 1, -total.isfinite().int()).double()
        kept = keep.double()
        self.sums[:3] += torch.where(keep, gained, 0.0)
        begins = ~keep & (self.sums[4] == 0)
        self.sums[5:8] = torch.where(begins, torch.stack([self._ones * step, rank, parameter]), self.sums[5:8])
        self.sums[3] += 1 - kept
        self.sums[4] = (self.sums[4] + 1) * (1 - kept)
        self.sums[8:] += torch.where(keep, self._pass[1:], 0.0)
        self._pass.zero_()
        return keep, norm

    def streak(self) -> int:
        """Length of the present row of skipped steps; waits for the device."""
        return int(self.sums[4])

    def averages(self, reset: bool = False) -> Averages:
        """The averages so far; waits for the device, and every process calls it."""
        binned = self.world.sum(self.sums[8:].clone())
        values = [*self.sums[:8].tolist(), *binned.tolist()]
        loss, norm, kept, skipped, streak, step, rank, parameter = values[:8]
        losses, counts = values[8 : 8 + BINS], values[8 + BINS :]
        if reset:
            self.sums[:3] = 0
            self.sums[8:] = 0
        return Averages(
            _ratio(loss, kept), _ratio(norm, kept), tuple(map(_ratio, losses, counts)), int(skipped), int(streak),
            self._words(int(step), int(rank), int(parameter)) if skipped else "",
        )  # fmt: skip

    def _words(self, step: int, rank: int, parameter: int) -> str:
        what = {0: "the loss", -1: "the norm of the whole gradient"}.get(parameter)
        who = "unknown" if rank < 0 else rank
        return f"step {step}, rank {who}, first in {what or f'the gradient of {self.names[parameter - 1]}'}"


def _ratio(total: float, count: float) -> float:
    return total / count if count else float("nan")
