"""The endless order in which training visits its samples."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..noise.rng import Rng


class EpochOrder:
    """Batches of indices, epoch after epoch. Epoch e is a permutation of 0 … n − 1 from (seed, e) alone.

    The position counts samples, so it can be saved anywhere and restored exactly, also with another batch size.

    Args:
        n: number of samples, ≥ 1.
        batch_size: indices per batch, in [1, n].
        seed: ≥ 0.
        drop_last: skip the n mod batch_size samples that do not fill a batch (others are skipped in each epoch);
            with False they form a smaller last batch.
        repeat: where the samples do not fill a batch, an epoch goes over all of them as often as fills one.

    Raises:
        ValueError: a batch larger than the data set, or a value out of range.
    """

    def __init__(self, n: int, batch_size: int, seed: int, drop_last: bool = True, repeat: bool = False):
        if batch_size < 1 or n < 1 or seed < 0:
            raise ValueError(f"Expected n ≥ 1, batch_size ≥ 1, seed ≥ 0; got {n}, {batch_size}, {seed}.")
        if n < batch_size and not repeat:
            raise ValueError(
                f"The data set has {n} samples, fewer than trainer.batch_size={batch_size}: no batch can be filled. "
                f"Set trainer.batch_size to at most {n}, or add data."
            )
        self.n, self.batch_size, self.seed, self.drop_last = n, batch_size, seed, drop_last
        self._times = -(-batch_size // n)
        self._go_to(0, 0)

    def _go_to(self, epoch: int, position: int) -> None:
        self.epoch, self.position = epoch, position
        mixed = np.random.SeedSequence((self.seed, epoch)).generate_state(1, np.uint64)[0]
        rng = Rng(int(mixed) >> 1)
        self._permutation = torch.cat([rng.permutation(self.n) for _ in range(self._times)])

    def next(self) -> Tensor:
        """The next indices: (batch_size,) int64, fewer only in a last batch with drop_last=False."""
        if len(self._permutation) - self.position < (self.batch_size if self.drop_last else 1):
            self._go_to(self.epoch + 1, 0)
        batch = self._permutation[self.position : self.position + self.batch_size]
        self.position += len(batch)
        return batch

    def state_dict(self) -> dict[str, int]:
        """Epoch, position in it (samples), and what the order depends on."""
        return {"epoch": self.epoch, "position": self.position, "n": self.n, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues where `state` was saved.

        Raises:
            ValueError: saved for another number of samples or another seed, or not a position.
        """
        if (state["n"], state["seed"]) != (self.n, self.seed):
            raise ValueError(
                f"The saved order is of n={state['n']} samples with seed={state['seed']}, this one of n={self.n} with "
                f"seed={self.seed}: resume with the same data and seed, or start anew."
            )
        epoch, position = int(state["epoch"]), int(state["position"])
        if epoch < 0 or not (0 <= position <= len(self._permutation)):
            raise ValueError(f"Expected epoch ≥ 0, position in [0, {self.n}]; got {epoch}, {position}.")
        self._go_to(epoch, position)
