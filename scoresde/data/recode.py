"""Data sets under another codec than they come with, fitted to their training samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..codecs import Centred, Chain, HaarDetails, HaarLow, LiftedDetails, LiftedLow, Patches, Standardise
from ..codecs.fit import Columns
from .dataset import Dataset, Split
from .rows import chunks


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


def haar_low(dataset: Dataset, *, level: int = 1) -> Dataset:
    """The low band alone, `HaarLow`, of integers `LiftedLow`: of this a cascade begins.

    Raises:
        ValueError: sizes that cannot be halved so often, or a codec that is not affine.
    """
    return replace(dataset, codec=_low(dataset, level))


def haar_details(dataset: Dataset, *, level: int = 1) -> Dataset:
    """The details alone, `HaarDetails`, of integers `LiftedDetails`, with the picture below as the condition "image".

    Raises:
        ValueError: as `haar_low`; or data that have an image as a condition.
    """
    details = (LiftedDetails if dataset.codec.levels else HaarDetails)(dataset.codec, level)
    return _told_low(replace(dataset, codec=details), _low(dataset, level))


def upsampled(dataset: Dataset, *, level: int = 1) -> Dataset:
    """Under its own codec, with its pictures at 1/2^level of the size as the condition "image": means of blocks.

    Raises:
        ValueError: as `haar_details`.
    """
    return _told_low(dataset, _low(dataset, level))


def _low(dataset: Dataset, level: int) -> HaarLow:
    return (LiftedLow if dataset.codec.levels else HaarLow)(dataset.codec, level)


def _told_low(dataset: Dataset, low: HaarLow) -> Dataset:
    """With the low band of each sample, of integers that of the centres of their bins, as a condition."""
    low.encoded_shape(dataset.raw_shape)

    def told(split: Split) -> Split:
        if "image" in split.conditions:
            raise ValueError(f"{dataset.name} has an image as a condition, where that of the low resolution would be.")
        image = torch.cat([low.layout(low.transform(part)) for part in chunks(split.raw)])
        return replace(split, conditions={**split.conditions, "image": image})

    train, test, validation = told(dataset.train), told(dataset.test), dataset.validation
    return replace(dataset, train=train, test=test, validation=None if validation is None else told(validation))
