"""Signals, pictures and videos with fewer places and more channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import whole
from ..noise.rng import Rng
from .codec import Codec, Edges, decodable, finite


@dataclass(frozen=True)
class Patches(Codec):
    """Neighbouring values become channels: (C, L) becomes (C·p, L/p), (C, H, W) becomes (C·p², H/p, W/p).

    Channel (c·p + i)·p + j of a picture holds the values (c, h·p + i, w·p + j). A rearrangement, of volume 1. Behind a
    `Scaling` it takes its integers: Chain((Scaling(levels=256), Patches(4))).

    Args:
        size: p ≥ 1, or one for each spatial axis, as (1, 4, 4) of a video (C, T, H, W).

    Raises:
        ValueError: a size below 1.
    """

    size: int | tuple[int, ...] = 2

    def __post_init__(self) -> None:
        if isinstance(self.size, Sequence):
            object.__setattr__(self, "size", tuple(self.size))
        for size in self._sizes(1):
            whole(size, "size")

    def check(self, raw: Tensor, name: str = "raw") -> None:
        """Refuses integers, NaN and infinite values, and sizes that the patches do not divide."""
        finite(raw, name)
        self.encoded_shape(tuple(raw.shape[1:]))

    def encoded_shape(self, raw_shape: Sequence[int]) -> tuple[int, ...]:
        """(C·p^d, *sizes/p).

        Raises:
            ValueError: no spatial axis, another number of them than of sizes, or sizes that are not divisible.
        """
        channels, *places = raw_shape if len(raw_shape) else (0,)
        sizes = self._sizes(len(places))
        if not places or len(sizes) != len(places) or any(n % p for n, p in zip(places, sizes, strict=True)):
            raise ValueError(
                f"Patches(size={self.size}) take samples (C, L), (C, H, W) or (C, T, H, W) whose sizes they divide; "
                f"got {tuple(raw_shape)}. Crop or pad the data, or choose another size."
            )
        for p in sizes:
            channels *= p
        return (channels, *(n // p for n, p in zip(places, sizes, strict=True)))

    def transform(self, raw: Tensor, *, rng: Rng | None = None) -> Tensor:
        """The same values, rearranged."""
        d, shape = raw.ndim - 2, self.encoded_shape(raw.shape[1:])
        cut = [side for p, n in zip(self._sizes(d), shape[1:], strict=True) for side in (n, p)]
        x = raw.reshape(*raw.shape[:2], *cut)
        return x.permute(0, 1, *range(3, 3 + 2 * d, 2), *range(2, 2 + 2 * d, 2)).reshape(len(raw), *shape)

    def decode(self, x: Tensor) -> Tensor:
        """The values where they were."""
        decodable(x)
        return self.layout(x)

    def layout(self, x: Tensor) -> Tensor:
        """The values where they were."""
        d, sizes = x.ndim - 2, self._sizes(x.ndim - 2)
        parts = x.unflatten(1, (-1, *sizes))
        order = [axis for k in range(d) for axis in (2 + d + k, 2 + k)]
        return parts.permute(0, 1, *order).reshape(
            len(x), parts.shape[1], *(n * p for n, p in zip(x.shape[2:], sizes, strict=True))
        )

    def log_volume(self, raw: Tensor, x: Tensor) -> Tensor:
        """0 of each sample."""
        return torch.zeros(len(raw), dtype=torch.float64, device=x.device)

    def carry(self, edges: Edges | None) -> Edges | None:
        """Edges, rearranged."""
        return None if edges is None else (self.transform(edges[0]), self.transform(edges[1]))

    def _sizes(self, axes: int) -> tuple[int, ...]:
        return self.size if isinstance(self.size, tuple) else (self.size,) * axes
