"""A data set: raw values in memory, two splits, one scaling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..codecs.scaling import Scaling
from ..diffusion.conditions import Cond, move, take, unnamed
from ..noise.rng import Rng


@dataclass(frozen=True, eq=False)
class Split:
    """Samples as they were stored.

    Attributes:
        raw: (N, *event), integers or float32.
        labels: (N,) int64 class indices, or None.
        conditions: others than labels, by name: "vector" (N, d), "image" (N, C, *sizes) and "tokens" (N, L, d),
            float32 and of about unit variance, for nothing scales them; all NaN for a sample or token without one.
    """

    raw: Tensor
    labels: Tensor | None = None
    conditions: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.raw)

    def to(self, device: torch.device) -> Split:
        """The split on `device`."""
        return self._each(lambda values: values.to(device))

    def take(self, index: Tensor) -> Split:
        """The samples `index` (n,)."""
        return self._each(lambda values: values[index])

    @property
    def named(self) -> dict[str, Tensor]:
        """All conditions by name, the labels as "label" among them."""
        return ({} if self.labels is None else {"label": self.labels}) | dict(self.conditions)

    def cond(self, index: Tensor | slice, conditional: bool, device: torch.device) -> Cond:
        """The condition of the samples `index` for a network, on the device; None for one that is not conditional.

        The labels themselves if there are no others, else all by name.
        """
        if not conditional:
            return None
        return move(take(unnamed(self.named), index), device)

    def _each(self, fn: Callable[[Tensor], Tensor]) -> Split:
        labels = None if self.labels is None else fn(self.labels)
        return Split(fn(self.raw), labels, {name: fn(values) for name, values in self.conditions.items()})


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and held-out samples, and how they become model data. Everything is checked here, once.

    Attributes:
        name: for logs and error messages.
        train, test: see `Split`; same event shape, labels and conditions in both or in neither.
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
            _check_conditions(split, where)
        if self.train.raw.shape[1:] != self.test.raw.shape[1:]:
            raise ValueError(
                f"{self.name}: a training sample has shape {tuple(self.train.raw.shape[1:])}, a test sample "
                f"{tuple(self.test.raw.shape[1:])}; they must agree."
            )

        kinds = [
            {name: tuple(v.shape[1:]) for name, v in split.conditions.items()} for split in (self.train, self.test)
        ]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"{self.name}: training samples have the conditions {kinds[0]}, test samples {kinds[1]}; names and "
                "shapes must agree (pad tokens with NaN)."
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
        raise ValueError(f"{where}: labels have shape {tuple(labels.shape)}, expected ({len(split.raw)},), one each.")
    low, high = (int(value) for value in labels.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(f"{where}: labels span {low} … {high}, expected 0 … {classes - 1} (classes={classes}).")


_RANKS = {"vector": (2,), "image": (3, 4, 5), "tokens": (3,)}


def _check_conditions(split: Split, where: str) -> None:
    for name, values in split.conditions.items():
        if name not in _RANKS:
            raise ValueError(f"{where}: conditions beside labels are {', '.join(_RANKS)}; got {name!r}.")
        if values.dtype != torch.float32:
            raise TypeError(f"{where}: the condition {name!r} holds {values.dtype}; pass .float().")
        if values.ndim not in _RANKS[name] or len(values) != len(split.raw):
            raise ValueError(
                f"{where}: the condition {name!r} has shape {tuple(values.shape)}; a vector is (N, d), an image "
                f"(N, C, *sizes), tokens (N, L, d), with N = {len(split.raw)}."
            )
