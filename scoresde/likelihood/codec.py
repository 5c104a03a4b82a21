"""What a likelihood asks of the codec of a data set, which every `scoresde.codecs.Codec` answers."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..noise.rng import Rng


class RawCodec(Protocol):
    """How raw data became model data, and the volume of that map; of integers, the bins that they own there."""

    @property
    def discrete(self) -> bool: ...

    @property
    def bound(self) -> bool: ...

    def encode(self, raw: Tensor, *, rng: Rng | None = None) -> Tensor: ...

    def log_volume(self, raw: Tensor, x: Tensor) -> Tensor: ...

    def bins(self, raw: Tensor, *, open_ends: bool = False) -> tuple[Tensor, Tensor] | None: ...
