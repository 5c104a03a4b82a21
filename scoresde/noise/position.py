"""Which streams of random numbers there are, and how far each has come."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .address import Noise


@dataclass
class _Count:
    """Number of the next draw of each stream: `together` + `alone`. All parts of a position share it."""

    alone: Tensor  # (S,)
    together: int = 0
    apart: bool = False  # whether `alone` has an entry other than 0


class Position:
    """The place in one stream, or in one stream per sample, from which the next draw is made.

    Args:
        seeds: (S,) int64.
        per_sample: one stream per sample; else S is 1, and the rows of a draw are numbered.
    """

    def __init__(self, seeds: Tensor, per_sample: bool):
        self.seeds, self.per_sample = seeds, per_sample
        self.rank, self.world = 0, 1
        self._count = _Count(torch.zeros_like(seeds))
        self._rows: Tensor | None = None  # of `_count.alone`, for some of the streams
        self._placed: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def share(self, rank: int, world: int) -> Position:
        """Rank `rank` of `world` processes that divide every draw of the single stream among them.

        Raises:
            ValueError: the streams are per sample, or the rank is outside 0 … world − 1.
        """
        if self.per_sample or not 0 <= rank < world:
            raise ValueError(f"share is of a single stream, with 0 <= rank < world; got rank={rank}, world={world}.")
        part = copy.copy(self)
        part.rank, part.world = rank, world
        return part

    def rows(self, rows: Tensor) -> Position:
        """The per-sample streams `rows` (n,) alone."""
        part, rows = copy.copy(self), rows.cpu()
        part.seeds, part._placed = self.seeds[rows], {}
        part._rows = rows if self._rows is None else self._rows[rows]
        return part

    def skip(self, draws: int) -> None:
        """Moves on by `draws` ≥ 0."""
        if self._rows is None:
            self._count.together += draws
        else:
            self._count.alone[self._rows] += draws
            self._count.apart = True

    def numbers(self) -> Tensor:
        """(S,) the number of each stream's next draw."""
        alone = self._count.alone
        return self._count.together + (alone if self._rows is None else alone[self._rows])

    def restore(self, streams: Tensor) -> None:
        """Takes the seed and the number of the next draw of every stream, (S, 2) int64.

        Raises:
            ValueError: another shape or dtype.
        """
        size = len(self.seeds)
        if streams.shape != (size, 2) or streams.dtype != torch.int64:
            raise ValueError(
                f"The saved state has {len(streams)} streams, this Rng has {size}; each is (seed, draw) in int64."
            )
        self.seeds, draws = streams.cpu().clone().unbind(1)
        self._placed = {}
        if self._rows is None:
            self._count.together = int(draws.min())
            self._count.alone.copy_(draws - self._count.together)
        else:  # the other streams stay where they are
            self._count.alone[self._rows] = draws - self._count.together
        self._count.apart = bool(self._count.alone.any())

    def take(self, shape: Sequence[int], everybody: bool = False) -> tuple[int, int, int, Tensor | None]:
        """Moves on by one draw of `shape`.

        Args:
            everybody: all ranks of a share draw the same rows.

        Returns:
            (number of rows, the first row, number of the draw, its number in each stream if these differ).
        """
        size = len(self.seeds)
        if self.per_sample and (not shape or shape[0] != size):
            raise ValueError(
                f"This Rng has {size} per-sample seeds but was asked for shape {tuple(shape)}; "
                f"the first dimension must be {size}, one seed per sample."
            )
        # a draw of a single number is the same on every rank
        rows, alike = (shape[0], everybody or self.per_sample) if shape else (1, True)
        number, own = self._count.together, None
        if self._count.apart or self._rows is not None:
            own = self.numbers()
        self.skip(1)
        return rows, 0 if alike else self.rank * rows, number, own

    def find(self, shape: Sequence[int], device: torch.device) -> Noise:
        """Moves on by one draw of `shape`, and says where its numbers are to be found from `device`."""
        _, row, number, own = self.take(shape)
        if device not in self._placed:
            self._placed[device] = self.seeds.to(device), torch.zeros(1, dtype=torch.int64, device=device)
        seeds, zero = self._placed[device]
        return Noise(seeds, zero, number, row) if own is None else Noise(seeds, own.to(device), 0, row)


class DevicePosition(Position):
    """A position in tensors on a device, which a CUDA graph reads anew whenever it is replayed.

    It counts the draws since it was made; where they begin is what the tensors hold.
    """

    def __init__(self, start: Position, device: torch.device):
        super().__init__(start.seeds, start.per_sample)
        self.rank, self.world = start.rank, start.world
        self._held = start.seeds.to(device, copy=True), start.numbers().to(device)

    def load(self, start: Position) -> None:
        """Begins where `start` stands, which moves on by the draws counted here."""
        seeds, draws = self._held
        seeds.copy_(start.seeds)
        draws.copy_(start.numbers())
        start.skip(self._count.together)

    def rewind(self) -> None:
        self._count.together = 0

    def advance(self) -> None:
        """The tensors move on by the draws counted so far."""
        self._held[1].add_(self._count.together)

    def find(self, shape: Sequence[int], device: torch.device) -> Noise:
        _, row, number, _ = self.take(shape)
        return Noise(*self._held, number, row)
