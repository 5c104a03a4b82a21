"""Data sets under another codec than they come with, fitted to their training samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..codecs import Centred, Chain, Patches, Standardise
from ..codecs.fit import Columns
from .dataset import Dataset


def standardised(
    dataset: Dataset,
    *,
    integers: Columns | None = None,
    log: Columns = (),
    quantile: Columns = (),
    low: Mapping[Any, float] | None = None,
    high: Mapping[Any, float] | None = None,
    knots: int = 33,
) -> Dataset:
    """By `Standardise.of` the training samples, in place of its own codec, whose range integers keep.

    Args:
        dataset: of features (D,), or channels (D, *sizes).
        integers, log, quantile, low, high, knots: as in `Standardise.of`.

    Raises:
        ValueError: as `Standardise.of`.
    """
    bounds = dict.fromkeys(range(dataset.raw_shape[0]), dataset.codec.raw_range) if dataset.codec.discrete else {}
    lows, highs = ({k: ends[side] for k, ends in bounds.items() if ends} for side in (0, 1))
    codec = Standardise.of(
        dataset.train.raw,
        columns=dataset.columns,
        integers=integers,
        log=log,
        quantile=quantile,
        low=lows | dict(low or {}),
        high=highs | dict(high or {}),
        knots=knots,
    )
    return replace(dataset, codec=codec)


def patched(dataset: Dataset, *, size: int | Sequence[int] = 4) -> Dataset:
    """Its own codec, and then `Patches` of this size."""
    whole = size if isinstance(size, int) else tuple(size)
    return replace(dataset, codec=Chain((dataset.codec, Patches(whole))))


def centred(dataset: Dataset, *, slack: float = 1e-3, move: bool = False) -> Dataset:
    """By `Centred.of` the training samples, in place of its own codec."""
    return replace(dataset, codec=Centred.of(dataset.train.raw, slack=slack, move=move))
