"""Signals, pictures and videos as a picture of half the size and the details that it lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..checks import whole
from ..noise.rng import Rng
from .codec import Codec, Drawn, decodable, finite
from .scaling import Scaling


@dataclass(frozen=True)
class Haar(Codec):
    r"""One level of the Haar transform along every spatial axis: (C, *sizes) becomes (2^d C, *sizes/2), d = 1 … 3.

    An orthonormal map of each block of 2^d neighbours v: channel b·C + c holds 2^{−d/2} Σ_i ±v_i of channel c, where
    bit k of i and of b together give the sign. Band b = 0 is the low band, 2^{d/2} times the mean of the block, and the
    others are the details. Its volume is 1, and white noise stays white noise. It takes floats, as model data of a
    `Scaling` are: Chain((Scaling(levels=256), Haar())).
    """

    def check(self, raw: Tensor, name: str = "raw") -> None:
        """Refuses integers, NaN and infinite values, and odd sizes."""
        finite(raw, name)
        self.encoded_shape(tuple(raw.shape[1:]))

    def encoded_shape(self, raw_shape: Sequence[int]) -> tuple[int, ...]:
        """(2^d C, *sizes/2).

        Raises:
            ValueError: no spatial axis, more than three, or an odd size.
        """
        channels, *sizes = raw_shape if len(raw_shape) else (0,)
        if not 1 <= len(sizes) <= 3 or any(n % 2 or n < 2 for n in sizes):
            raise ValueError(
                "The Haar transform takes samples (C, L), (C, H, W) or (C, T, H, W) with even sizes, which it halves; "
                f"got {tuple(raw_shape)}. Crop the data or pad them to even sizes."
            )
        return (channels << len(sizes), *(n // 2 for n in sizes))

    def transform(self, raw: Tensor, *, rng: Rng | None = None) -> Tensor:
        """All bands of floats (B, C, *sizes)."""
        bands, axes = raw[:, None], raw.ndim - 2
        for axis in range(axes):
            a, b = bands.unflatten(3 + axis, (-1, 2)).unbind(4 + axis)
            bands = torch.cat([a + b, a - b], 1)
        return bands.flatten(1, 2) * _scale(axes)

    def decode(self, x: Tensor) -> Tensor:
        """The values of all bands."""
        decodable(x)
        return self.layout(x)

    def layout(self, x: Tensor) -> Tensor:
        """The values of all bands, of noise too."""
        axes = x.ndim - 2
        values = x.unflatten(1, (1 << axes, -1))
        for axis in reversed(range(axes)):
            a, b = values.chunk(2, 1)
            values = torch.stack([a + b, a - b], 4 + axis).flatten(3 + axis, 4 + axis)
        return values[:, 0] * _scale(axes)

    def log_volume(self, raw: Tensor, x: Tensor) -> Tensor:
        """0 of each sample."""
        return torch.zeros(len(raw), dtype=torch.float64, device=x.device)


@dataclass(frozen=True)
class _Band(Codec):
    """Some of the bands of `Haar`, of the model data of another codec: a stage of a cascade is a model of them.

    A sample is not made of one band alone, so no stage has the density of a sample; log p of all bands, low first and
    then the details of each level given what is lower, add up to it. `log_volume` is the share that these bands have in
    the volume of `codec`, and bits/dim are of all numbers in a raw sample: both add up, too.

    Args:
        codec: one slope and one offset for all values, as a `Scaling`.
        level: how often the transform is taken of the low band, ≥ 1.

    Raises:
        ValueError: another codec, or a level below 1.
    """

    codec: Codec = field(default_factory=Scaling.identity)
    level: int = 1

    def __post_init__(self) -> None:
        whole(self.level, "level, how often sizes are halved,")
        if self.codec.affine is None:
            raise ValueError(
                "The stages of a Haar cascade share data that are slope · raw + offset, one pair for all values; these "
                f"are by {self.codec}. Take them as they were stored: codec=own."
            )

    def check(self, raw: Tensor, name: str = "raw") -> None:
        """Refuses what `codec` refuses, and sizes that cannot be halved so often."""
        self.codec.check(raw, name)
        self.encoded_shape(tuple(raw.shape[1:]))

    def low(self, x: Tensor, level: int) -> Tensor:
        """The low band of a level of model data of `codec`; they themselves are level 0."""
        for _ in range(level):
            x = Haar().transform(x)[:, : x.shape[1]]
        return x

    def halved(self, shape: Sequence[int], level: int) -> tuple[int, ...]:
        """The shape of that band."""
        for _ in range(level):
            shape = (shape[0], *Haar().encoded_shape(shape)[1:]) if len(shape) else Haar().encoded_shape(shape)
        return tuple(shape)

    def picture(self, low: Tensor, level: int) -> Tensor:
        """The low band of a level as means of the values that it is made of, in units of the model data of `codec`."""
        return low * _scale(low.ndim - 2) ** level

    def log_volume(self, raw: Tensor, x: Tensor) -> Tensor:
        """The share of these bands in the volume of `codec`: that of as many of its values, (B,) nats."""
        return self.codec.log_volume(raw, x) * (x[0].numel() / raw[0].numel())

    @property
    def levels(self) -> int | None:
        """How many integers every raw value may be."""
        return self.codec.levels

    @property
    def raw_dtype(self) -> torch.dtype:
        """In which `decode` returns raw values."""
        return self.codec.raw_dtype

    @property
    def raw_range(self) -> tuple[float, float] | None:
        """(least, greatest) raw value."""
        return self.codec.raw_range

    @property
    def expects(self) -> str:
        """Which raw values it takes, in words."""
        return self.codec.expects


@dataclass(frozen=True)
class HaarLow(_Band):
    """The low band of a level: the first stage of a cascade. It decodes to pictures of that size."""

    def encoded_shape(self, raw_shape: Sequence[int]) -> tuple[int, ...]:
        """(C, *sizes/2^level).

        Raises:
            ValueError: sizes that cannot be halved so often.
        """
        return self.halved(self.codec.encoded_shape(raw_shape), self.level)

    def transform(self, raw: Tensor, *, rng: Rng | None = None) -> Tensor:
        """The low band; integers are dequantised first."""
        return self.low(self.codec.transform(raw, rng=rng), self.level)

    def decode(self, x: Tensor) -> Tensor:
        """Raw values of a picture of the low resolution: means of blocks."""
        return self.codec.decode(self.layout(x))

    def layout(self, x: Tensor) -> Tensor:
        """Means of blocks, in units of the model data of `codec`."""
        return self.picture(x, self.level)


@dataclass(frozen=True)
class HaarDetails(_Band):
    """The details of a level, which are told the low band of it: a later stage of a cascade.

    Its network is told the picture of the low resolution, `HaarLow.layout`, as the condition "image". It is that of the
    same dequantised values (`drawn`), so that log p(low) + log p(details | low) is the density of one and the same
    thing. By themselves details decode to pictures whose low band is 0.
    """

    def encoded_shape(self, raw_shape: Sequence[int]) -> tuple[int, ...]:
        """((2^d − 1) C, *sizes/2^level).

        Raises:
            ValueError: sizes that cannot be halved so often.
        """
        above = self.halved(self.codec.encoded_shape(raw_shape), self.level - 1)
        bands = Haar().encoded_shape(above)
        return (bands[0] - above[0], *bands[1:])

    def transform(self, raw: Tensor, *, rng: Rng | None = None) -> Tensor:
        """The details; integers are dequantised first."""
        return self.parts(self.low(self.codec.transform(raw, rng=rng), self.level - 1))[1]

    def drawn(self, raw: Tensor, rng: Rng | None = None) -> Drawn:
        """Dequantised once, for details and low band alike."""
        x = self.codec.transform(raw, rng=rng)
        low, details = self.parts(self.low(x, self.level - 1))
        volume = self.codec.log_volume(raw, x) * (details[0].numel() / x[0].numel())
        return Drawn(x, HaarDetails(Scaling.identity(), self.level), {"image": self.picture(low, self.level)}, volume)

    @property
    def below(self) -> HaarLow:
        """The low band that they belong to."""
        return HaarLow(self.codec, self.level)

    @property
    def whole(self) -> Codec:
        """The codec of the data, or the low band of the level above."""
        return self.codec if self.level == 1 else HaarLow(self.codec, self.level - 1)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(low band, details) of model data of `whole`."""
        bands = Haar().transform(x)
        return bands[:, : x.shape[1]], bands[:, x.shape[1] :]

    def joined(self, low: Tensor, x: Tensor) -> Tensor:
        """Model data of `whole`: their low band is `low` again, to rounding."""
        return Haar().layout(torch.cat([low, x], 1))

    def decode(self, x: Tensor) -> Tensor:
        """Raw values of a picture with these details alone."""
        return self.codec.decode(self.layout(x))

    def layout(self, x: Tensor) -> Tensor:
        """A picture with these details alone, in units of the model data of `codec`."""
        channels = x.shape[1] // ((1 << (x.ndim - 2)) - 1)
        return self.picture(self.joined(torch.zeros_like(x[:, :channels]), x), self.level - 1)


def _scale(axes: int) -> float:
    """2^{−d/2}; what is a power of two is so to the last bit."""
    return 2.0 ** (-axes / 2)
