"""Kinds of conditions that a run was trained with, and how one is read: from numbers, files and held-out samples."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import ConfigError
from ..data.folder import read_image
from ..data.source import existing, read_array
from ..runs.load import LoadedRun

NAMES = ("label", "vector", "image", "tokens")


@dataclass(frozen=True)
class Kind:
    """One of the conditions that a run was trained with.

    Attributes:
        name: label, vector, image or tokens.
        shape: of one; −1 is any length.
        classes: number of labels.
        train, test: (N, *shape), what the samples of the run's data are told.
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
            ConfigError, ValueError, OSError: they are not of this kind.
        """
        words = given if isinstance(given, list) else [given]
        if not words or not all(isinstance(word, str) for word in words):
            return self._checked(_typed(given), f"cond.{self.name}", given)
        parts = [self._named(word) for word in words]
        if self.name == "tokens":  # filled up to one length
            most = max(part.shape[1] for part in parts)
            parts = [F.pad(part, (0, 0, 0, most - part.shape[1]), value=torch.nan) for part in parts]
        return torch.cat(parts)

    def _named(self, word: str) -> Tensor:
        if word.startswith("test:"):
            return self.test[held_out(f"cond.{self.name}={word}", word, len(self.test))]
        if not Path(word).suffix:
            raise ConfigError(self._expected(f"cond.{self.name}", repr(word)))
        file = existing(word)
        if file.suffix == ".npy":
            return self._checked(read_array(file), str(file))
        if len(self.shape) != 3 or self.shape[0] not in (1, 3):
            raise ConfigError(f"cond.{self.name}={word}: expected {self}, which no picture holds; give it as .npy.")
        low, high = self._range()
        return self._checked((low + read_image(file, self.shape[0]) / 255 * (high - low)).numpy(), str(file))

    def _checked(self, values: np.ndarray | None, where: str, given: Any = None) -> Tensor:
        """`values` as (m, *shape), or what is wrong with them."""
        found = repr(given) if given is not None else "" if values is None else f"{values.dtype} {values.shape}"
        if values is None or not values.size:
            raise ConfigError(self._expected(where, found))
        if self.name == "label":
            whole = values.dtype.kind in "iu" and values.ndim < 2
            if not whole or values.min() < 0 or values.max() >= self.classes:
                bad = f"{found} with values {values.min()} … {values.max()}" if given is None else found
                raise ConfigError(self._expected(where, bad))
            return torch.from_numpy(values.astype(np.int64).reshape(-1))
        if values.dtype.kind not in "iuf":
            raise ConfigError(self._expected(where, found))
        with np.errstate(over="ignore"):  # told as infinite below
            rows = torch.from_numpy(values.astype(np.float32))
        if rows.ndim <= len(self.shape):
            # one for all; or with an axis of size 1 left out, perhaps several
            short = self.shape[0] == 1 and tuple(rows.shape)[rows.ndim - len(self.shape) + 1 :] == self.shape[1:]
            rows = rows.reshape(-1, *self.shape) if short else rows[None]
        if rows.ndim != 1 + len(self.shape) or any(
            size not in (-1, own) for size, own in zip(self.shape, rows.shape[1:], strict=True)
        ):
            raise ConfigError(self._expected(where, f"{found + ' of ' if given else ''}shape {values.shape}"))
        self._check_values(rows, where)
        return rows

    def _check_values(self, rows: Tensor, where: str) -> None:
        gaps = rows.isnan().flatten(2 if self.name == "tokens" else 1)
        if bool(rows.isinf().any()) or bool((gaps.any(-1) & ~gaps.all(-1)).any()):
            raise ConfigError(self._expected(where, "NaN or infinite numbers among others"))
        if self.always and bool(rows.isnan().flatten(1).all(1).any()):
            raise ConfigError(self._expected(where, "nothing but NaN, which is none, and the run never was without"))
        low, high = self._range()
        known = rows[~rows.isnan()]
        if known.numel() and (float(known.min()) < 2 * low - high or float(known.max()) > 2 * high - low):
            raise ConfigError(
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


def kinds_of(run: LoadedRun) -> dict[str, Kind]:
    """What the model was trained with, by name; nothing for an unconditional one."""
    data, always = run.dataset, always_told(run)
    if not run.conditional:
        return {}
    kinds: dict[str, Kind] = {}
    if data.train.labels is not None and data.test.labels is not None:
        kinds["label"] = Kind("label", (), data.classes, data.train.labels, data.test.labels, always)
    for name in (name for name in NAMES if name in data.train.told):
        train, test = data.train.told[name], data.test.told[name]
        shape = (-1, train.shape[2]) if name == "tokens" else tuple(train.shape[1:])
        kinds[name] = Kind(name, shape, 0, train, test, always)
    return kinds


def always_told(run: LoadedRun) -> bool:
    """Whether the network is known never to have been without its condition; a classifier never is."""
    if not run.draws:
        return run.conditional
    gaps = any(bool(values.isnan().flatten(1).all(1).any()) for values in run.dataset.train.told.values())
    return run.conditional and run.config["network"].get("cond_dropout") == 0 and not gaps


def held_out(what: str, word: str, count: int) -> Tensor:
    """Indices of test:3, or of test:0-7.

    Raises:
        ConfigError: it is neither, or samples are not there; names `what`.
    """
    found = re.fullmatch(r"test:(\d+)(?:-(\d+))?", word)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if not first <= last < count:
        raise ConfigError(f"{what}: held-out samples are test:0 … test:{count - 1}, or a range test:0-7.")
    return torch.arange(first, last + 1)


def _typed(given: Any) -> np.ndarray | None:
    """Numbers and lists of them as an array; None for anything else, and for rows that differ in length."""
    if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in _leaves(given)):
        return None
    try:
        return np.asarray(given)
    except ValueError:
        return None


def _leaves(given: Any) -> Iterator[Any]:
    for value in given if isinstance(given, list) else [given]:
        yield from _leaves(value) if isinstance(value, list) else [value]


def _shown(shape: tuple[Any, ...]) -> str:
    return str(shape).replace("-1", "L").replace("'", "")
