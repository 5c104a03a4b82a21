"""Kinds of conditions that a model was trained with, and how one is read: from numbers, files and held-out samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..diffusion.conditions import PADDING, Cond, filled
from .by_name import held_out, is_picture, names_held_out
from .dataset import Dataset
from .readers.columns import lines
from .readers.pictures import read_image
from .readers.source import existing, read_array
from .statistics import extremes
from .text import Text

NAMES = ("label", "vector", "image", "tokens", "text")


@dataclass(frozen=True)
class Kind:
    """One of the conditions that a model was trained with.

    Attributes:
        name: label, vector, image, tokens or text.
        shape: of one; −1 is any length.
        classes: the names of the labels.
        test: (N, *shape), the conditions of the held-out samples.
        span: the least and the greatest number among the training samples.
        always: the network never was without it.
    """

    name: str
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    test: Tensor
    span: tuple[float, float]
    always: bool

    def __str__(self) -> str:
        if self.name == "label":
            last = len(self.classes) - 1
            ours = "" if self.classes == tuple(map(str, range(last + 1))) else f" (called {_listed(self.classes)})"
            return f"a class 0 … {last}{ours}"
        article = {"vector": "a ", "image": "an ", "tokens": ""}[self.name]
        return f"{article}{self.name} of shape {_shown(self.shape)}"

    def rows(self, given: Any) -> Tensor:
        """(m, *shape) of numbers as they are typed or in a tensor, of the name of a class, of a file, of test:0-7, or
        of a list of names.

        Raises:
            ValueError, OSError: they are not of this kind.
        """
        words = given if isinstance(given, list) else [given]
        if not words or not all(isinstance(word, str) for word in words):
            values = given.cpu().numpy() if isinstance(given, Tensor) else _typed(given)
            return self._checked(values, f"cond.{self.name}", repr(given), f" of shape {values.shape}")
        rows = [row for word in words for row in self._named(word)]
        if self.name == "label":
            return torch.stack(rows)
        return pad_sequence(rows, batch_first=True, padding_value=torch.nan)  # tokens get one length

    def _named(self, word: str) -> Tensor:
        """Rows of held-out samples or of a file."""
        where = f"cond.{self.name}"
        if names_held_out(word):
            return self.test[held_out(word, len(self.test), where)]
        if self.name == "label" and word in self.classes:
            return torch.tensor([self.classes.index(word)], device="cpu")
        if not Path(word).suffix:
            raise self._unlike(where, repr(word))
        file = existing(word)
        if is_picture(file):
            if len(self.shape) != 3 or self.shape[0] not in (1, 3):
                raise ValueError(f"{where}={word}: expected {self}, which no picture holds; give it as .npy.")
            low, high = self.span
            values = (low + read_image(file, self.shape[0]) / 255 * (high - low)).numpy()
        else:
            values = read_array(file)
        return self._checked(values, str(file), f"{values.dtype} of shape {values.shape}")

    def _checked(self, values: np.ndarray, where: str, found: str, of_shape: str = "") -> Tensor:
        """`values` as (m, *shape), or what is wrong with them: `found`, which `of_shape` follows where that is it."""
        if not values.size or values.dtype.kind not in ("iu" if self.name == "label" else "iuf"):
            raise self._unlike(where, found)
        if self.name == "label":
            if values.ndim > 1 or values.min() < 0 or values.max() >= len(self.classes):
                raise self._unlike(where, found if of_shape else f"{found} with values {values.min()} … {values.max()}")
            labels = values.astype(np.int64).reshape(-1)
            self._check_names(labels.tolist(), where)
            return torch.from_numpy(labels)
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused below
            rows = torch.from_numpy(values.astype(np.float32))
        if rows.ndim <= len(self.shape):
            # one for all; or with an axis of size 1 left out, perhaps several
            short = self.shape[0] == 1 and tuple(rows.shape)[rows.ndim - len(self.shape) + 1 :] == self.shape[1:]
            rows = rows.reshape(-1, *self.shape) if short else rows[None]
        sizes = [size if own == -1 else own for own, size in zip(self.shape, rows.shape[1:], strict=False)]
        if list(rows.shape[1:]) != sizes or len(sizes) != len(self.shape):
            raise self._unlike(where, found + of_shape)
        self._check_values(rows, where)
        return rows

    def _check_names(self, labels: list[int], where: str) -> None:
        """Refuses a number that is the name of another class."""
        for label in labels:
            if str(label) in self.classes and self.classes[label] != str(label):
                raise ValueError(
                    f"{where}: class {label} is called {self.classes[label]!r}, and another is called '{label}'. Give "
                    f"the name as text: cond='{label}' in Python, 'cond.label=\"{label}\"' on the command line."
                )

    def _check_values(self, rows: Tensor, where: str) -> None:
        known, there = filled(rows, 2 if self.name == "tokens" else 1)
        if not bool(known.isfinite().all()):
            raise self._unlike(where, "NaN or infinite numbers among others")
        if self.always and not bool(there.reshape(len(rows), -1).any(1).all()):
            raise self._unlike(where, "only NaN, the null condition, which the run never saw")
        (least, most), (low, high) = extremes(rows), self.span
        if least < 2 * low - high or most > 2 * high - low:
            raise ValueError(
                f"{where}: numbers from {least:.3g} to {most:.3g} are far from those that the run was trained with, "
                f"{low:.3g} … {high:.3g}."
            )

    def _unlike(self, where: str, found: str) -> ValueError:
        if self.name == "label":
            return ValueError(f"{where} is {self}, or a list; got {found}.")
        return ValueError(
            f"{where}: expected {self}, or several, {_shown(('n', *self.shape))}, as numbers, in a file, or those of "
            f"test:0-7; got {found}."
        )


@dataclass(frozen=True)
class Sentences(Kind):
    """Sentences, as a text of the data reads them.

    Attributes:
        text: that text.
    """

    text: Text

    def __str__(self) -> str:
        return f"a sentence of up to {self.text.length} tokens ({self.text.tokenizer.kind})"

    def rows(self, given: Any) -> Tensor:
        """(m, length) int32 of a sentence or a list of such, of a file.txt with one in each line, of test:0-7, or of
        tokens in a tensor (m, length) or (length,).

        Raises:
            ValueError, OSError: they are no sentences that the model can read.
        """
        where = "cond.text"
        if isinstance(given, Tensor):
            fits = not given.is_floating_point() and given.ndim in (1, 2) and given.shape[-1] <= self.text.length
            if not fits or given.min() < PADDING or given.max() >= self.text.tokenizer.size:
                raise self._unlike(where, f"{given.dtype} of shape {tuple(given.shape)}")
            rows = given.cpu().int().reshape(-1, given.shape[-1])
            return torch.nn.functional.pad(rows, (0, self.text.length - rows.shape[1]), value=PADDING)
        words = list(given) if isinstance(given, (list, tuple)) else [given]
        if not words or any(isinstance(word, (bool, dict, list, NoneType)) for word in words):
            raise self._unlike(where, repr(given))
        rows = torch.cat([self._named(str(word)) for word in words])
        if self.always and bool((rows == PADDING).all(1).any()):
            raise self._unlike(where, "an empty sentence, the null condition, which the run never saw")
        return rows

    def _named(self, word: str) -> Tensor:
        where = "cond.text"
        if names_held_out(word):
            return self.test[held_out(word, len(self.test), where)]
        if word.endswith(".txt") and " " not in word:
            return self.text.rows([line.strip() for line in lines(existing(word))], word)
        return self.text.rows([word], where)

    def _unlike(self, where: str, found: str) -> ValueError:
        return ValueError(
            f"{where}: expected {self}, or a list of sentences, sentences.txt with one in each line, or those of "
            f"test:0-7; got {found}."
        )


def kinds_of(dataset: Dataset, *, always: bool) -> dict[str, Kind]:
    """The conditions that a data set has, by name; `always`: a network never was trained without them."""
    kinds, test, spans = dict[str, Kind](), dataset.test.named, dataset.statistics.conditions
    for name in (name for name in NAMES if name in test):
        shape = (-1, test[name].shape[2]) if name == "tokens" else tuple(test[name].shape[1:])
        facts = (name, shape, dataset.names_of_classes, test[name], spans.get(name, (0.0, 0.0)), always)
        kinds[name] = Sentences(*facts, dataset.text) if name == "text" and dataset.text else Kind(*facts)
    return kinds


def in_turn(dataset: Dataset, n: int, conditional: bool) -> Cond:
    """The default conditions of n samples: each class that training samples had, in turn, or if there are others than
    labels, the condition of held-out sample k mod their number. None for an unconditional model.
    """
    if not conditional:
        return None
    if dataset.test.conditions:
        return dataset.test.cond(torch.arange(n, device="cpu") % len(dataset.test), True, torch.device("cpu"))
    if not dataset.classes:
        return None
    classes = torch.tensor(dataset.seen_classes, device="cpu")
    return classes[torch.arange(n, device="cpu") % len(classes)]


def turns_in_words(dataset: Dataset, conditional: bool) -> str:
    """The default of `in_turn` in words, for sentences; empty where samples have classes, or no condition."""
    if not conditional or not dataset.test.conditions:
        return ""
    return f" given the {' and '.join(dataset.test.named)} of the {len(dataset.test):,} held-out samples in turn"


def _listed(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:5])}{', …' if len(names) > 5 else ''}"


def _typed(given: Any) -> np.ndarray:
    """Numbers and lists of them as an array; of objects for anything else, and for rows that differ in length."""
    objects = np.array(given, dtype=object)
    return np.asarray(given) if all(type(leaf) in (int, float) for leaf in objects.ravel()) else objects


def _shown(shape: tuple[Any, ...]) -> str:
    return str(shape).replace("-1", "L").replace("'", "")
