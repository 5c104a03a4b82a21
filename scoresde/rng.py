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

    def __len__(self) -> int:
        """Number of streams: 1, or one per sample."""
        return len(self._streams)

    def _draw(self, shape: Sequence[int], device: torch.device | str | None, one: Any) -> Tensor:
        shape = tuple(shape)
        if not self.per_sample:
            return one(shape, self._streams[0]).to(device)
        if not shape or shape[0] != len(self._streams):
            raise ValueError(
                f"This Rng has {len(self._streams)} per-sample seeds but was asked for shape {shape}; "
                f"the first dimension must be {len(self._streams)}, one seed per sample."
            )
        return torch.stack([one(shape[1:], stream) for stream in self._streams]).to(device)

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

    def permutation(self, n: int) -> Tensor:
        """A random order of 0 … n − 1, from the single stream."""
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
