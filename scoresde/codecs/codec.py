"""What every map between raw data and model data can do."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
from torch import Tensor

from ..noise.rng import Rng

Edges = tuple[Tensor, Tensor]
"""The least and the greatest model values of a bin, (B, *event) float64 each; of a continuous value both are itself."""


class Codec(abc.ABC):
    """An invertible map from raw data to the values that a network sees, which knows its volume.

    A codec is a frozen dataclass of numbers, strings, tuples of these, and other codecs, so that a run folder can keep
    it.
    """

    @abc.abstractmethod
    def check(self, raw: Tensor, name: str = "raw") -> None:
        """Refuses raw values (B, *raw shape) that this codec was not made for, by a TypeError or a ValueError."""

    @abc.abstractmethod
    def transform(self, raw: Tensor, *, rng: Rng | None = None) -> Tensor:
        """`encode` of values that were checked before, without looking at them: nothing waits for the device."""

    @abc.abstractmethod
    def decode(self, x: Tensor) -> Tensor:
        """Raw values of model data (B, *event)."""

    @abc.abstractmethod
    def log_volume(self, raw: Tensor, x: Tensor) -> Tensor:
        """Σ log |dx/d raw| of each sample, (B,) float64 nats, where x is model data of `raw`:
        log p(raw) = log p(x) + log_volume."""

    def encode(self, raw: Tensor, *, rng: Rng | None = None) -> Tensor:
        """Model data of raw values (B, *raw shape); `rng` dequantises integers, None takes the centres of their bins.

        Raises:
            TypeError, ValueError: see `check`.
        """
        raw = raw if not raw.is_floating_point() or raw.dtype == torch.float64 else raw.float()
        self.check(raw)
        return self.transform(raw, rng=rng)

    def encoded_shape(self, raw_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of a sample as the network sees it."""
        return tuple(raw_shape)

    def bins(self, raw: Tensor, *, open_ends: bool = False) -> Edges | None:
        """The edges of the bins that raw integers own in model space, over which dequantisation is uniform.

        Args:
            raw: (B, *raw shape).
            open_ends: the outer bins have no end.

        Returns:
            None for continuous data, and where a bin is not an interval for each dimension of model data.
        """
        return None

    def carry(self, edges: Edges | None) -> Edges | None:
        """The edges, in model data, of bins in raw data of another codec's making; None as in `bins`."""
        return None

    def layout(self, x: Tensor) -> Tensor:
        """Model data (B, *event) in the places that raw data have, in their own units: what pictures show of noise."""
        return x

    @property
    def discrete(self) -> bool:
        """Whether some raw values are integers, which are dequantised."""
        return self.levels is not None

    @property
    def levels(self) -> int | None:
        """How many integers every raw value may be; None for continuous ones, and where that differs."""
        return None

    @property
    def rounding(self) -> str:
        """To what decoded values are rounded, in words."""
        return f"{self.levels} levels" if self.levels else "integers" if self.discrete else "none"

    @property
    def raw_dtype(self) -> torch.dtype:
        """In which `decode` returns raw values."""
        return torch.float32

    @property
    def raw_range(self) -> tuple[float, float] | None:
        """(least, greatest) raw value; None where they have no bounds, or have bounds of their own."""
        return None

    @property
    def model_range(self) -> tuple[float, float] | None:
        """(least, greatest) value of model data; None where they have no bounds."""
        return None

    @property
    def affine(self) -> tuple[float, float] | None:
        """(slope, offset) where every x is slope · raw + offset in its own place, of integers the centre of the bin;
        None for another map."""
        return None

    @property
    def expects(self) -> str:
        """Which raw values it takes, in words."""
        return "floats"
