"""What a model has to know of the data that it was trained on, once they are gone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ..diffusion.conditions import PADDING
from ..diffusion.denoiser import sample_std
from .rows import Rows, chunks

_MEASURED = 1024  # samples that the standard deviation is measured on


@dataclass(frozen=True)
class Statistics:
    """Numbers of a whole data set.

    Attributes:
        data_std: standard deviation of the model data about their mean, of the first 1,024 training samples.
        span: the least and the greatest value of model data.
        conditions: the same of each condition that is no label, by name; NaN is not counted.
        gaps: some training sample or other has no condition: all of it is NaN, or its sentence is empty.
        training, held_out: numbers of samples.
        labels: classes that some training sample has; None where that was not kept.
        digests: SHA-256 of all that the splits "train" and "test" hold; empty where that was not kept.
    """

    data_std: float
    span: tuple[float, float]
    conditions: dict[str, tuple[float, float]]
    gaps: bool
    training: int
    held_out: int
    labels: tuple[int, ...] | None = None
    digests: dict[str, str] = field(default_factory=dict)


def measured(
    raw: Tensor | Rows,
    encode: Callable[[Tensor], Tensor],
    labels: Tensor | None,
    conditions: Mapping[str, Tensor],
    span: tuple[float, float] | None,
    held_out: int,
) -> Statistics:
    """Of training samples (N, *event) and what makes model data of them, of the span of these, of labels and others."""
    return Statistics(
        data_std=sample_std(encode(raw[:_MEASURED])),
        span=span or _span(raw, encode),
        conditions={name: extremes(values) for name, values in conditions.items()},
        gaps=any(bool(_absent(values).any()) for values in conditions.values()),
        training=len(raw),
        held_out=held_out,
        labels=() if labels is None else tuple(labels.unique().tolist()),
    )


def _absent(values: Tensor) -> Tensor:
    """(N,) bool, which samples have no condition."""
    return (values.isnan() if values.is_floating_point() else values == PADDING).flatten(1).all(1)


def _span(raw: Tensor | Rows, encode: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    lows, highs = zip(*(extremes(encode(part)) for part in chunks(raw)), strict=True)
    return min(lows), max(highs)


def extremes(values: Tensor) -> tuple[float, float]:
    """The least and the greatest number; NaN is not counted."""
    array = values.numpy()
    return float(np.fmin.reduce(array, axis=None)), float(np.fmax.reduce(array, axis=None))
