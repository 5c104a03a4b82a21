"""Data sets of Hugging Face's `datasets` that lie on this machine: a folder of `save_to_disk`, or one .arrow file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..rows import DataLost, Rows, stamp
from .source import absent, explained, misfit, only


def is_arrow(path: Path) -> bool:
    """Whether it is an .arrow file, or a folder of `save_to_disk`."""
    return path.suffix == ".arrow" or (path / "state.json").is_file()


def read_arrow(
    path: Path, key: str | None, keys: Mapping[str, str], arrange: Callable[[np.ndarray], Tensor]
) -> tuple[Rows, dict[str, np.ndarray]]:
    """The samples, which stay in their files, and by name the columns beside them; with the names of the classes where
    the file has them. Nothing is fetched.

    Raises:
        ImportError: `datasets` is missing.
        TypeError, ValueError: a damaged file, an unknown column, or one that does not hold numbers or pictures.
    """
    try:
        from datasets import Dataset, load_from_disk
    except ImportError as error:
        raise ImportError("Arrow files are read with datasets: pip install 'scoresde[arrow]'.") from error
    with explained(path, "a data set of the package datasets"):
        content = load_from_disk(str(path)) if path.is_dir() else Dataset.from_file(str(path))
    names = list(content.column_names)
    left = [name for name in names if name not in keys.values()]
    first = only(path, left) if key is None else key
    if unknown := [name for name in (first, *keys.values()) if name not in names]:
        raise absent(path, unknown[0], names)
    others = {name: np.asarray(content.with_format("numpy")[column][:]) for name, column in keys.items()}
    if "label" in keys and (classes := getattr(content.features[keys["label"]], "names", None)):
        others["class_names"] = np.array(classes)
    return ArrowRows(path, content, first, arrange), others


class ArrowRows(Rows):
    """A column of a data set of `datasets`, read and decoded as it is asked for.

    The package maps its files, and a mapped file that is cut ends the process: their sizes and times are looked at
    before each batch and after it.
    """

    def __init__(self, path: Path, content: Any, column: str, arrange: Callable[[np.ndarray], Tensor]):
        self.path, self.content, self.column = path, content.with_format("numpy", columns=[column]), column
        self.arrange, self.files = arrange, [entry["filename"] for entry in content.cache_files]
        self.kind = _kind(content.features[column])
        self._stamps = [stamp(os.stat(file)) for file in self.files]
        if not len(content):
            raise misfit(path, "at least one sample", "none")
        first = self._values([0])
        super().__init__((len(content), *first.shape[1:]), first.dtype)
        self.costly = self.kind is None  # pictures

    def read(self, index: Tensor) -> Tensor:
        self._check()
        try:
            found = self._values(index.tolist())
        except (ValueError, TypeError, OSError) as error:
            raise DataLost(f"{self.path}: {error}") from error
        self._check()
        if found.shape[1:] != self.shape[1:]:
            expected, shape = f"samples of shape {self.shape[1:]} in {self.column}", tuple(found.shape[1:])
            raise DataLost(
                f"{self.path}: expected {expected}, found {shape}. Pictures of several sizes are packed first."
            )
        return found

    def sizes(self) -> Iterator[str]:
        return (str(number) for _, _, number, _ in self._stamps)

    def _values(self, index: list[int]) -> Tensor:
        values = np.asarray(self.content[index][self.column])
        # the package makes integers int64
        return self.arrange(values if self.kind is None or values.dtype.kind == "O" else values.astype(self.kind))

    def _check(self) -> None:
        for file, before in zip(self.files, self._stamps, strict=True):
            if not os.path.exists(file) or stamp(os.stat(file)) != before:
                raise DataLost(f"{file}: expected the file that was opened, found another one: it has changed since.")


def _kind(feature: Any) -> np.dtype | None:
    """The type of the numbers of a column; None for pictures, and for what is no number."""
    while (inner := getattr(feature, "feature", None)) is not None:
        feature = inner
    try:
        return np.dtype(getattr(feature, "dtype", "object"))
    except TypeError:
        return None
