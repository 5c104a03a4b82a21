"""Codecs one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..noise.rng import Rng
from .codec import Codec, Edges


@dataclass(frozen=True)
class Chain(Codec):
    """Each codec encodes what the one before it made; the volumes add up.

    Args:
        codecs: at least one; the first is nearest to the raw data, and the only one that may take integers or remove a
            centre.

    Raises:
        ValueError: none, or a later one that does this.
    """

    codecs: tuple[Codec, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "codecs", tuple(self.codecs))
        if not self.codecs or any(codec.discrete or codec.subspace for codec in self.codecs[1:]):
            raise ValueError(
                "A chain has a codec, and its first one alone takes integers, or removes a centre (the volume of what "
                f"comes before would be that of too many dimensions); got {self.codecs}."
            )

    def check(self, raw: Tensor, name: str = "raw") -> None:
        """Refuses what any of the codecs refuses."""
        for codec in self.codecs[:-1]:
            codec.check(raw, name)
            raw = codec.transform(raw)
        self.codecs[-1].check(raw, name)

    def transform(self, raw: Tensor, *, rng: Rng | None = None) -> Tensor:
        """Model data of the last codec."""
        for codec in self.codecs:
            raw = codec.transform(raw, rng=rng)
        return raw

    def decode(self, x: Tensor) -> Tensor:
        """Raw values of the first codec."""
        for codec in reversed(self.codecs):
            x = codec.decode(x)
        return x

    def log_volume(self, raw: Tensor, x: Tensor) -> Tensor:
        """The sum of the volumes; what lies between raw and model data is decoded."""
        total = torch.zeros(len(raw), dtype=torch.float64, device=x.device)
        for codec in reversed(self.codecs[1:]):
            before = codec.decode(x)
            total, x = total + codec.log_volume(before, x), before
        return total + self.codecs[0].log_volume(raw, x)

    def encoded_shape(self, raw_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of a sample as the network sees it."""
        for codec in self.codecs:
            raw_shape = codec.encoded_shape(raw_shape)
        return tuple(raw_shape)

    def bins(self, raw: Tensor, *, open_ends: bool = False) -> Edges | None:
        """Edges of the bins of the first codec, carried through the others."""
        edges = self.codecs[0].bins(raw, open_ends=open_ends)
        for codec in self.codecs[1:]:
            edges = codec.carry(edges)
        return edges

    def layout(self, x: Tensor) -> Tensor:
        """Model data in the places that raw data have."""
        for codec in reversed(self.codecs):
            x = codec.layout(x)
        return x

    @property
    def discrete(self) -> bool:
        """Whether raw values are integers."""
        return self.codecs[0].discrete

    @property
    def subspace(self) -> bool:
        """Whether raw data fill a subspace."""
        return self.codecs[0].subspace

    @property
    def levels(self) -> int | None:
        """How many integers every raw value may be."""
        return self.codecs[0].levels

    @property
    def raw_dtype(self) -> torch.dtype:
        """In which `decode` returns raw values."""
        return self.codecs[0].raw_dtype

    @property
    def raw_range(self) -> tuple[float, float] | None:
        """(least, greatest) raw value."""
        return self.codecs[0].raw_range

    @property
    def expects(self) -> str:
        """Which raw values it takes, in words."""
        return self.codecs[0].expects
