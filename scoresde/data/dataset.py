"""A data set: raw values in memory, two splits, one scaling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..rng import Rng
from .scaling import Scaling


@dataclass(frozen=True, eq=False)
class Split:
    """Samples as they were stored.

    Attributes:
        raw: (N, *event), integers or float32.
        labels: (N,) int64 class indices, or None.
    """

    raw: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.raw)

    def to(self, device: torch.device) -> Split:
        """The same on `device`."""
        return Split(self.raw.to(device), None if self.labels is None else self.labels.to(device))

    def cond(self, index: Tensor | slice, conditional: bool, device: torch.device) -> Tensor | None:
        """What a conditional network is told of the samples `index`: their labels, on the device. Else None."""
        return self.labels[index].to(device) if conditional and self.labels is not None else None


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and held-out samples, and how they become model data. Everything is checked here, once.

    Attributes:
        name: for logs and error messages.
        train, test: see `Split`; same event shape, labels in both or in neither.
        scaling: raw ↔ model data.
        classes: labels are 0 … classes − 1; 0 for no labels.
        log_prob: raw samples (B, *event) -> exact log-density (B,) in nats, where it is known (the toys).

    Raises:
        TypeError: a dtype that the scaling cannot read, or labels that are not int64.
        ValueError: an empty split, NaN, values or labels out of range, or shapes that differ.
    """

    name: str
    train: Split
    test: Split
    scaling: Scaling
    classes: int = 0
    log_prob: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        for part, split in (("train", self.train), ("test", self.test)):
            where = f"{self.name}, {part} split"
            _check_raw(split.raw, self.scaling, where)
            _check_labels(split, self.classes, where)
        if self.train.raw.shape[1:] != self.test.raw.shape[1:]:
            raise ValueError(
                f"{self.name}: a training sample has shape {tuple(self.train.raw.shape[1:])}, a test sample "
                f"{tuple(self.test.raw.shape[1:])}; they must agree."
            )

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.train.raw.shape[1:])

    def encode(self, raw: Tensor, rng: Rng | None = None) -> Tensor:
        """Model data of raw samples (B, *event); `rng` dequantises, None takes bin centres."""
        return self.scaling.encode(raw, rng=rng)

    def decode(self, x: Tensor) -> Tensor:
        """Raw values of model data (B, *event)."""
        return self.scaling.decode(x)


def _check_raw(raw: Tensor, scaling: Scaling, where: str) -> None:
    if raw.ndim < 2 or raw.numel() == 0:
        raise ValueError(f"{where}: expected at least one sample (N, *event); got shape {tuple(raw.shape)}.")
    if raw.is_floating_point() and raw.dtype != torch.float32:
        raise TypeError(f"{where}: raw holds {raw.dtype}; networks compute in float32, so pass raw.float().")
    scaling.check(raw, f"{where}: raw")


def _check_labels(split: Split, classes: int, where: str) -> None:
    labels = split.labels
    if labels is None:
        if classes:
            raise ValueError(f"{where}: classes={classes} was declared but there are no labels; use classes=0.")
        return
    if classes < 1:
        raise ValueError(f"{where}: there are labels but classes={classes}; give the number of classes.")
    if labels.dtype != torch.int64:
        raise TypeError(f"{where}: labels hold {labels.dtype}, expected int64 class indices; pass labels.long().")
    if labels.shape != split.raw.shape[:1]:
        raise ValueError(
            f"{where}: labels have shape {tuple(labels.shape)}, expected ({len(split.raw)},), one per sample."
        )
    low, high = (int(value) for value in labels.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(f"{where}: labels span {low} … {high}, expected 0 … {classes - 1} (classes={classes}).")
