"""What a likelihood asks of the scaling of a data set, which `scoresde.codecs.Scaling` answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ..noise.rng import Rng


class RawScaling(Protocol):
    """How raw data became model data; of integers, `levels` bins from `low` to `high`."""

    @property
    def low(self) -> float: ...

    @property
    def high(self) -> float: ...

    @property
    def levels(self) -> int | None: ...

    def encode(self, raw: Tensor, *, rng: Rng | None = None) -> Tensor: ...

    def log_volume(self, event_shape: Sequence[int]) -> float: ...
