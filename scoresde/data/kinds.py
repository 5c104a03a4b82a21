"""Kinds of conditions that a model was trained with, and how one is read: from numbers, files and held-out samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .dataset import Dataset
from .folder import read_image
from .readers import HeldOut
from .source import existing, read_array

NAMES = ("label", "vector", "image", "tokens")


@dataclass(frozen=True)
class Kind:
    """One of the conditions that a model was trained with.

    Attributes:
        name: label, vector, image or tokens.
        shape: of one; −1 is any length.
        classes: number of labels.
        train, test: (N, *shape), the conditions of the samples of a data set.
        always: the network never was without it.
    """

    name: str
    shape: tuple[int, ...]
    classes: int
    train: Tensor
    test: Tensor
    always: bool

    def __str__(self) -> str:
        if self.name == "label":
            return f"a class 0 … {self.classes - 1}"
        article = {"vector": "a ", "image": "an ", "tokens": ""}[self.name]
        return f"{article}{self.name} of shape {_shown(self.shape)}"

    def rows(self, given: Any) -> Tensor:
        """(m, *shape) of numbers as they are typed, of the name of a file, of test:0-7, or of a list of names.

        Raises:
            ValueError, OSError: they are not of this kind.
        """
        words = given if isinstance(given, list) else [given]
        if not words or not all(isinstance(word, str) for word in words):
            return self._checked(_typed(given), f"cond.{self.name}", given)
        parts = [self._named(word) for word in words]
        if self.name == "tokens":  # filled up to one length
            longest = max(part.shape[1] for part in parts)
            parts = [F.pad(part, (0, 0, 0, longest - part.shape[1]), value=torch.nan) for part in parts]
        return torch.cat(parts)

    def _named(self, word: str) -> Tensor:
        """Rows of held-out samples or of a file."""
        where = f"cond.{self.name}"
        if HeldOut.named(word):
            return self.test[HeldOut(word).index(len(self.test), f"{where}={word}")]
        if not Path(word).suffix:
            raise ValueError(self._expected(where, repr(word)))
        file = existing(word)
        if file.suffix == ".npy":
            return self._checked(read_array(file), str(file))
        if len(self.shape) != 3 or self.shape[0] not in (1, 3):
            raise ValueError(f"{where}={word}: expected {self}, which no picture holds; give it as .npy.")
        low, high = self._range()
        return self._checked((low + read_image(file, self.shape[0]) / 255 * (high - low)).numpy(), str(file))

    def _checked(self, values: np.ndarray | None, where: str, given: Any = None) -> Tensor:
        """`values` as (m, *shape), or what is wrong with them."""
        found = repr(given) if given is not None else "" if values is None else f"{values.dtype} {values.shape}"
        if values is None or not values.size or values.dtype.kind not in ("iu" if self.name == "label" else "iuf"):
            raise ValueError(self._expected(where, found))
        if self.name == "label":
            if values.ndim > 1 or values.min() < 0 or values.max() >= self.classes:
                span = f" with values {values.min()} … {values.max()}" if given is None else ""
                raise ValueError(self._expected(where, found + span))
            return torch.from_numpy(values.astype(np.int64).reshape(-1))
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused below
            rows = torch.from_numpy(values.astype(np.float32))
        if rows.ndim <= len(self.shape):
            # one for all; or with an axis of size 1 left out, perhaps several
            short = self.shape[0] == 1 and tuple(rows.shape)[rows.ndim - len(self.shape) + 1 :] == self.shape[1:]
            rows = rows.reshape(-1, *self.shape) if short else rows[None]
        sizes = [own if own != -1 else size for own, size in zip(self.shape, rows.shape[1:], strict=False)]
        if list(rows.shape[1:]) != sizes or len(sizes) != len(self.shape):
            raise ValueError(self._expected(where, f"{found + ' of ' if given else ''}shape {values.shape}"))
        self._check_values(rows, where)
        return rows

    def _check_values(self, rows: Tensor, where: str) -> None:
        gaps = rows.isnan().flatten(2 if self.name == "tokens" else 1)
        if bool(rows.isinf().any()) or bool((gaps.any(-1) & ~gaps.all(-1)).any()):
            raise ValueError(self._expected(where, "NaN or infinite numbers among others"))
        if self.always and bool(rows.isnan().flatten(1).all(1).any()):
            raise ValueError(self._expected(where, "only NaN, the null condition, which the run never saw"))
        low, high = self._range()
        known = rows[~rows.isnan()]
        if known.numel() and (float(known.min()) < 2 * low - high or float(known.max()) > 2 * high - low):
            raise ValueError(
                f"{where}: numbers from {float(known.min()):.3g} to {float(known.max()):.3g} are far from those that "
                f"the run was trained with, {low:.3g} … {high:.3g}."
            )

    def _range(self) -> tuple[float, float]:
        """Least and greatest number that the run was trained with."""
        values = self.train.numpy()  # NaN is not counted
        return float(np.fmin.reduce(values, axis=None)), float(np.fmax.reduce(values, axis=None))

    def _expected(self, where: str, found: str) -> str:
        if self.name == "label":
            return f"{where} is {self}, or a list; got {found}."
        return (
            f"{where}: expected {self}, or several, {_shown(('n', *self.shape))}, as numbers, in a file, or those of "
            f"test:0-7; got {found}."
        )


def kinds_of(dataset: Dataset, *, always: bool) -> dict[str, Kind]:
    """The conditions that a data set has, by name; `always`: a network never was trained without them."""
    kinds, train, test = {}, dataset.train.named, dataset.test.named
    for name in (name for name in NAMES if name in train):
        shape = (-1, train[name].shape[2]) if name == "tokens" else tuple(train[name].shape[1:])
        kinds[name] = Kind(name, shape, dataset.classes, train[name], test[name], always)
    return kinds


def _typed(given: Any) -> np.ndarray | None:
    """Numbers and lists of them as an array; None for anything else, and for rows that differ in length."""
    leaves = np.array(given, dtype=object).ravel()
    return np.asarray(given) if all(type(leaf) in (int, float) for leaf in leaves) else None


def _shown(shape: tuple[Any, ...]) -> str:
    return str(shape).replace("-1", "L").replace("'", "")
