"""What every map between raw data and model data can do."""

from __future__ import annotations

import abc
from collections.abc import Sequence

from torch import Tensor

from ..noise.rng import Rng


class Codec(abc.ABC):
    """An invertible map from raw data to the values that a network sees, which knows its volume.

    A codec is a frozen dataclass of numbers, so that a run folder can keep it.
    """

    @abc.abstractmethod
    def check(self, raw: Tensor, name: str = "raw") -> None:
        """Refuses raw values that this codec was not made for, by a TypeError or a ValueError."""

    @abc.abstractmethod
    def encode(self, raw: Tensor, *, rng: Rng | None = None) -> Tensor:
        """Model data of raw values (B, *event); `rng` dequantises integers, None takes the centres of their bins."""

    @abc.abstractmethod
    def decode(self, x: Tensor) -> Tensor:
        """Raw values of model data (B, *event)."""

    @abc.abstractmethod
    def log_volume(self, event_shape: Sequence[int]) -> float:
        """Σ_dims log |dx/d raw| in nats for one sample of `event_shape`: add it to log p(x) for log p(raw)."""
