"""Randomness as an argument: one stream, or one stream per sample."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Rng:
    r"""A source of random numbers that is passed, saved and restored like any other value.

    `Rng(seed)` is one stream for a whole batch. `Rng(seeds=[…])` holds one stream per sample: entry k of every draw
    depends on `seeds[k]` and on how often it was asked before, never on the batch size or on its neighbours, so a
    sample can be made again alone (after Karras et al. 2022, `StackedRandomGenerator`).

    `Rng(seed).share(rank, world)` draws one process's rows of what the whole batch would have drawn, so a batch that is
    divided among processes meets the same noise as one that is not.

    Numbers are drawn on the CPU and then moved, so a seed means the same on every device.

    Args:
        seed: seed of the single stream, an integer in [0, 2^63).
        seeds: one seed per sample; exclusive with `seed`.

    Raises:
        ValueError: neither or both given, no seeds, or a seed out of range.
    """

    def __init__(self, seed: int | None = None, *, seeds: Sequence[int] | None = None):
        if (seed is None) == (seeds is None):
            raise ValueError(f"Rng needs a seed or a list of seeds, one of the two; got seed={seed}, seeds={seeds}.")
        if seeds is not None and len(seeds) == 0:
            raise ValueError("Rng(seeds=[]) has no stream; give one seed per sample.")
        values: list[Any] = [seed] if seeds is None else list(seeds)
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
                raise ValueError(f"A seed is an integer in [0, 2^63); got {value!r}.")
        self.per_sample = seeds is not None
        self._streams = [torch.Generator().manual_seed(_fold(value)) for value in values]
        self._rank, self._world = 0, 1

    def __len__(self) -> int:
        """Number of streams: 1, or one per sample."""
        return len(self._streams)

    def _draw(self, shape: Sequence[int], device: torch.device | str | None, one: Any) -> Tensor:
        shape = tuple(shape)
        if not self.per_sample:
            return self._own(one((shape[0] * self._world, *shape[1:]) if shape else shape, self._streams[0])).to(device)
        if not shape or shape[0] != len(self._streams):
            raise ValueError(
                f"This Rng has {len(self._streams)} per-sample seeds but was asked for shape {shape}; "
                f"the first dimension must be {len(self._streams)}, one seed per sample."
            )
        return torch.stack([one(shape[1:], stream) for stream in self._streams]).to(device)

    def _own(self, whole: Tensor) -> Tensor:
        """This share's rows of a draw for the whole batch; a single number is everybody's."""
        return whole.chunk(self._world)[self._rank] if whole.ndim and self._world > 1 else whole

    def share(self, rank: int, world: int) -> Rng:
        """The same stream, of which each draw of n rows gives rows rank·n … (rank+1)·n − 1 of a draw of world·n.

        Every process has to draw the same shapes in the same order; all streams then stand at the same place.

        Raises:
            ValueError: per-sample seeds, which need no sharing, or a rank outside 0 … world − 1.
        """
        if self.per_sample or not 0 <= rank < world:
            raise ValueError(f"share is of a single stream, with 0 <= rank < world; got rank={rank}, world={world}.")
        part = copy.copy(self)
        part._rank, part._world = rank, world
        return part

    def rows(self, rows: Tensor) -> Rng:
        """The streams of the samples `rows` (n,), shared with this Rng: a draw moves those on and no others.

        A single stream is returned as it is.
        """
        if not self.per_sample:
            return self
        part = copy.copy(self)
        part._streams = [self._streams[row] for row in rows.tolist()]
        return part

    def normal(
        self, shape: Sequence[int], *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Standard normals of `shape`; with per-sample seeds `shape[0]` must be their number."""
        return self._draw(shape, device, lambda s, g: torch.randn(s, generator=g, dtype=dtype))

    def normal_like(self, x: Tensor) -> Tensor:
        return self.normal(x.shape, dtype=x.dtype, device=x.device)

    def uniform(
        self, shape: Sequence[int], *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Uniforms in [0, 1)."""
        return self._draw(shape, device, lambda s, g: torch.rand(s, generator=g, dtype=dtype))

    def integers(self, high: int, shape: Sequence[int], *, device: torch.device | str | None = None) -> Tensor:
        """Integers in {0, …, high − 1}."""
        return self._draw(shape, device, lambda s, g: torch.randint(high, s, generator=g))

    def rademacher_like(self, x: Tensor) -> Tensor:
        """Signs −1 or +1 with equal probability."""
        return (2 * self.integers(2, x.shape, device=x.device) - 1).to(x.dtype)

    def stratified(self, n: int, *, device: torch.device | str | None = None) -> Tensor:
        """n float64 numbers in [0, 1), one in each n-th, in random order: each is uniform, their mean varies far less.

        For a share, the strata are those of the whole batch.
        """
        whole = n * self._world
        u = torch.rand(whole, generator=self._streams[0], dtype=torch.float64)
        return self._own((self.permutation(whole) + u) / whole).to(device)

    def permutation(self, n: int) -> Tensor:
        """A random order of 0 … n − 1, from the single stream: the same for every share."""
        if self.per_sample:
            raise ValueError("A permutation is one draw for all samples; use Rng(seed), not Rng(seeds=[…]).")
        return torch.randperm(n, generator=self._streams[0])

    def state_dict(self) -> dict[str, Tensor]:
        """Every stream's position, as one (streams, bytes) uint8 tensor."""
        return {"streams": torch.stack([stream.get_state() for stream in self._streams])}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        streams = state["streams"]
        if len(streams) != len(self._streams):
            raise ValueError(f"The saved state has {len(streams)} streams, this Rng has {len(self._streams)}.")
        for stream, saved in zip(self._streams, streams, strict=True):
            stream.set_state(saved.cpu().clone())  # torch 2.13 crashes on a row that is a view into a larger storage


def _fold(seed: int) -> int:
    """32 bits, all that torch's CPU generator reads of a seed: the low ones, shuffled by a hash of the high ones."""
    high, low = divmod(seed, 2**32)
    return low ^ int.from_bytes(hashlib.sha256(high.to_bytes(4, "big")).digest()[:4], "big") if high else low
