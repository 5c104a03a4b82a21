"""The bands of integers as integers: stages of a cascade that keep the low resolution to the last level."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..noise.rng import Rng
from .codec import Codec, Drawn, Edges
from .haar import HaarDetails, HaarLow


def split(raw: Tensor) -> Tensor:
    """All bands (B, 2^d, C, *sizes/2) int64 of integers (B, C, *sizes): along each axis ⌊(a + b)/2⌋ and a − b."""
    bands = raw.long()[:, None]
    for axis in range(3, raw.ndim + 1):
        a, b = bands.unflatten(axis, (-1, 2)).unbind(axis + 1)
        bands = torch.cat([(a + b) >> 1, a - b], 1)
    return bands


def joined(bands: Tensor, most: int) -> Tensor:
    """Integers (B, C, *sizes) in 0 … most of all their bands (B, 2^d, C, *sizes/2), as `split` makes them.

    Where details would lead out of the range, they are cut to the nearest that do not: of values with ⌊(a + b)/2⌋ = l,
    |a − b| is at most 2l + 1 and 2(most − l). The low band stays what it is.
    """
    for axis in reversed(range(3, bands.ndim)):
        low, high = bands.chunk(2, 1)
        room = torch.minimum(2 * low[:, :1] + 1, 2 * (most - low[:, :1]))  # only the first are values themselves
        high = torch.cat([high[:, :1].clamp(-room, room), high[:, 1:]], 1)
        a = low + ((high + 1) >> 1)
        bands = torch.stack([a, a - high], axis + 1).flatten(axis, axis + 1)
    return bands[:, 0]


@dataclass(frozen=True)
class LiftedLow(HaarLow):
    """`HaarLow` of integers: along each axis ⌊(a + b)/2⌋, a picture of as many levels (Said & Pearlman 1996, the S
    transform).

    One integer goes to one integer and back, so that P(raw) = P(low) P(details | low) of integers, each of which owns a
    bin in model data and is dequantised by itself; the Haar transform of dequantised values mixes their bins.

    Raises:
        ValueError: a codec of floats, and as `HaarLow`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.codec.levels is None:
            raise ValueError(f"Integers become integers by lifting; {self.codec} takes floats: use HaarLow.")

    def transform(self, raw: Tensor, *, rng: Rng | None = None) -> Tensor:
        """The low band of integers, dequantised as they are."""
        return self.codec.transform(lowered(raw, self.level), rng=rng)

    def decode(self, x: Tensor) -> Tensor:
        """Integers of a picture of the low resolution."""
        return self.codec.decode(x)

    def layout(self, x: Tensor) -> Tensor:
        """The centres of the bins that x lies in: what a later stage is told."""
        return self.codec.transform(self.codec.decode(x))

    def bins(self, raw: Tensor, *, open_ends: bool = False) -> Edges | None:
        """Those of the integers of the low band."""
        return self.codec.bins(lowered(raw, self.level), open_ends=open_ends)


@dataclass(frozen=True)
class LiftedDetails(HaarDetails):
    """`HaarDetails` of integers, given the integers of the low band: differences a − b along each axis, of ⌊(a + b)/2⌋
    along the others. Integers k own bins of the width that they have in `codec`, and 0 has its centre at 0.

    Raises:
        ValueError: as `LiftedLow`.
    """

    def __post_init__(self) -> None:
        LiftedLow(self.codec, self.level)

    def transform(self, raw: Tensor, *, rng: Rng | None = None) -> Tensor:
        """The details of integers, dequantised."""
        details = self._integers(raw).float()
        u = 0.0 if rng is None else rng.uniform(details.shape, dtype=torch.float32, device=raw.device) - 0.5
        return (details + u) * self._affine[0]

    def drawn(self, raw: Tensor, rng: Rng | None = None) -> Drawn:
        """The low band is told as it is: its integers have no noise."""
        return Drawn(raw, self, {"image": self.below.transform(raw)}, 0.0)

    @property
    def below(self) -> LiftedLow:
        """The low band that they belong to."""
        return LiftedLow(self.codec, self.level)

    @property
    def whole(self) -> Codec:
        """The codec of the data, or the low band of the level above."""
        return self.codec if self.level == 1 else LiftedLow(self.codec, self.level - 1)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(low band, details), centres of bins, of model data of `whole`."""
        slope, offset = self._affine
        bands = split(((x.double() - offset) / slope).round())
        return (bands[:, 0] * slope + offset).to(x.dtype), (bands[:, 1:].flatten(1, 2) * slope).to(x.dtype)

    def joined(self, low: Tensor, x: Tensor) -> Tensor:
        """Model data of `whole`, centres of bins: the integers of their low band are those of `low`."""
        assert self.codec.raw_range is not None  # integers have one
        (slope, offset), (first, last) = self._affine, map(int, self.codec.raw_range)
        details = (x.double() / slope).round().long().unflatten(1, (-1, low.shape[1]))
        whole = joined(torch.cat([self.below.decode(low).long()[:, None] - first, details], 1), last - first) + first
        return (whole * slope + offset).to(x.dtype)

    def layout(self, x: Tensor) -> Tensor:
        """A picture with these details alone, on grey."""
        channels = x.shape[1] // ((1 << (x.ndim - 2)) - 1)
        return self.whole.layout(self.joined(torch.zeros_like(x[:, :channels]), x))

    def bins(self, raw: Tensor, *, open_ends: bool = False) -> Edges | None:
        """Half a level to both sides of each; the outer ones have ends, too."""
        k, slope = self._integers(raw).double(), self._affine[0]
        return (k - 0.5) * slope, (k + 0.5) * slope

    def _integers(self, raw: Tensor) -> Tensor:
        return split(lowered(raw, self.level - 1))[:, 1:].flatten(1, 2)

    @property
    def _affine(self) -> tuple[float, float]:
        assert self.codec.affine is not None  # says `__post_init__`
        return self.codec.affine


def lowered(raw: Tensor, level: int) -> Tensor:
    """The low band of a level, of the dtype of the integers `raw`, which are level 0."""
    for _ in range(level):
        raw = split(raw)[:, 0].to(raw.dtype)
    return raw
