"""What every map between raw data and model data can do."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from ..noise.rng import Rng

Edges = tuple[Tensor, Tensor]
"""The least and the greatest model values of a bin, (B, *event) float64 each; of a continuous value both are itself."""


class Stored(Protocol):
    """Samples (N, *raw shape), in memory or in a file, from which some are taken by their numbers."""

    shape: Any
    dtype: torch.dtype

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> Tensor: ...


class Drawn(NamedTuple):
    """Samples that were dequantised once, where the same draw is told as a condition, too: log p(raw) is log p(values)
    under `codec`, given `told`, plus `log_volume`.
    """

    values: Tensor
    codec: Codec
    told: Mapping[str, Tensor]
    log_volume: Tensor | float


class Codec(abc.ABC):
    """An invertible map from raw data to the values that a network sees, which knows its volume.

    A codec is a frozen dataclass of numbers, strings, tuples of these, and other codecs, so that a run folder can keep
    it; the one that has weights too says what they are (`recipe`, `tensors`, `restored`).
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
        log p(raw) = log p(x) + log_volume; or ≥ in the mean over `transform`, if it is a `bound`."""

    def recipe(self) -> dict[str, Any]:
        """Its fields by name, as a configuration has them: what is no tensor of what a run folder keeps."""
        return {each.name: getattr(self, each.name) for each in dataclasses.fields(cast(Any, self))}

    def tensors(self) -> dict[str, Tensor]:
        """Its weights by name; none but for an autoencoder."""
        return {}

    def restored(self, tensors: Mapping[str, Tensor]) -> Codec:
        """The codec of a `recipe` with its weights again."""
        return self

    def moments(self, raw: Tensor) -> Tensor | None:
        """What can be stored of raw values, so that `redraw.transform` makes model data of it without them; None where
        `transform` itself is as fast."""
        return None

    def unfold(self, x: Tensor) -> Tensor:
        """Model data as model data of `pixels`, differentiable: what an operator on samples acts on."""
        return x

    def encode(self, raw: Tensor, *, rng: Rng | None = None) -> Tensor:
        """Model data of raw values (B, *raw shape); `rng` dequantises integers, None takes the centres of their bins.

        Raises:
            TypeError, ValueError: see `check`.
        """
        raw = raw if not raw.is_floating_point() or raw.dtype == torch.float64 else raw.float()
        self.check(raw)
        return self.transform(raw, rng=rng)

    def drawn(self, raw: Tensor, rng: Rng | None = None) -> Drawn:
        """Raw values that were checked, and what the network is told of them: nothing, but by `HaarDetails`."""
        return Drawn(raw, self, {}, 0.0)

    @property
    def below(self) -> Codec | None:
        """Of details: the codec of the picture that they are added to. None for model data that are a whole."""
        return None

    @property
    def whole(self) -> Codec:
        """The codec of what `joined` makes."""
        return self

    def joined(self, low: Tensor, x: Tensor) -> Tensor:
        """Model data of `whole`: x itself, or details x on model data `low` of `below`."""
        return x

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What `joined` made x of: model data of `below` and of this codec.

        Raises:
            ValueError: they are a whole.
        """
        raise ValueError(f"Model data of {self} are a whole, and have no part.")

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
    def bound(self) -> bool:
        """Whether log p(x) + log_volume is, in the mean over x, a lower bound on log p(raw) and no equality."""
        return False

    @property
    def digest(self) -> str:
        """SHA-256 of its weights; empty where it has none."""
        return ""

    @property
    def redraw(self) -> Any:
        """What makes model data of `moments`: transform(moments, rng=) -> x."""
        return None

    @property
    def pixels(self) -> Codec:
        """The codec whose model data are places of raw data, below an autoencoder; itself elsewhere."""
        return self

    @property
    def subspace(self) -> bool:
        """Whether raw data fill a subspace, on which their density is."""
        return False

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


def finite(raw: Tensor, name: str) -> None:
    """Refuses raw values that are no floating-point numbers, or not finite; names the first sample with such a one.

    Raises:
        TypeError, ValueError: it is one of these.
    """
    if not raw.is_floating_point():
        raise TypeError(
            f"{name} holds {raw.dtype}{range_of(raw)}, expected floating-point values. Integers are points, "
            "which have no density: use Scaling(levels=…), which dequantises them."
        )
    bad = ~raw.isfinite()
    if bool(bad.any()):
        row = int(bad.flatten(1).any(1).nonzero()[0]) if raw.ndim > 1 else int(bad.nonzero()[0])
        raise ValueError(
            f"{name} holds {int(bad.sum())} NaN or infinite values of {raw.numel()}, the first in row {row}; remove "
            "those samples first."
        )


def decodable(x: Tensor) -> None:
    """Refuses what no sampler makes.

    Raises:
        TypeError: x is not floating point.
        ValueError: x holds NaN or infinite values.
    """
    if not x.is_floating_point():
        raise TypeError(f"decode expects model data in floating point; got {x.dtype}.")
    bad = int((~x.isfinite()).sum())
    if bad:
        raise ValueError(f"decode was given {bad} NaN or infinite values of {x.numel()}: sampling failed before.")


def range_of(raw: Tensor) -> str:
    """The least and the greatest value, in words; empty where there are none."""
    if raw.numel() == 0 or raw.dtype == torch.bool or raw.is_complex():
        return ""
    return f" (min {raw.min().item():g}, max {raw.max().item():g})"


def refuse(bad: Tensor, raw: Tensor, name: str, why: str, columns: Sequence[str] = (), first: int = 0) -> None:
    """Refuses raw values (N, D, *sizes) where any of `bad` (N, *sizes, D) is true, by column and row.

    Args:
        why: what is said of the first such value.
        columns: D names; () for their numbers.
        first: the number of the first row.

    Raises:
        ValueError: there is one.
    """
    if not bool(bad.any()):
        return
    row, *place, column = bad.nonzero()[0].tolist()
    called = repr(columns[column]) if columns else str(column)
    count, value = int(bad.sum()), float(raw.movedim(1, -1)[(row, *place, column)])
    more = f" {count} values in all are refused." if count > 1 else ""
    raise ValueError(f"{name}, column {called}, row {first + row}: {value:.7g} {why}.{more}")
