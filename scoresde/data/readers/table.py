"""Tables: columns of different units, from CSV and Parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...codecs import Codec, Standardise
from ..dataset import Dataset, Split, count_classes, given, hold_out
from .columns import Column, read_table
from .source import existing, misfit

_CHOOSING = 200  # rows that choose, at least
_FEW = 50  # an integer column with fewer values than that is dequantised
_FLOAT32 = 2.0**-24  # relative error of a rounded number


def Table(
    path: str,
    columns: Sequence[str] | None = None,
    label: str | None = None,
    condition: Sequence[str] | None = None,
    integers: Sequence[str] | None = None,
    delimiter: str | None = None,
    test_path: str | None = None,
    test_fraction: float = 0.1,
    validation_fraction: float = 0.1,
    seed: int = 0,
    codec: Codec | None = None,
) -> Dataset:
    """The rows of a CSV or Parquet file with named columns of numbers, as samples (N, D).

    Columns are standardised with mean and deviation of the training rows. A column of whole numbers with fewer than 50
    different ones is dequantised: its density is the probability of the integer.

    Args:
        path: CSV in UTF-8 whose first line has the names, or Parquet.
        columns: the columns to model, in this order; None for all that are neither label nor condition.
        label: a column of strings or integers that is the class of a row; its values, sorted, are the class names.
        condition: columns that condition the others, as a vector; of about unit variance, for nothing scales them.
        integers: the columns that are dequantised; None decides by their values, [] takes all as continuous.
        delimiter: of a CSV; None tells ',', ';' and tab apart where only one of them fits.
        test_path: file of the test split, with the same columns; None holds out `test_fraction` instead.
        test_fraction, seed: of the split, in (0, 1), and ≥ 0; by class where there is a label.
        validation_fraction: share of the other rows that is kept from training, and chooses when to stop; of small
            tables 200 rows, or a quarter. 0 for none.
        codec: of a model that is measured on these rows, in place of one that fits them; all are held out.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: pandas or pyarrow is missing.
        ValueError: a file that is damaged or another, a column that is not there, holds anything else than finite
            numbers, or is constant; path, column and the line of the file are named.
    """
    file, chosen = existing(path), _Chosen(columns, label, condition)
    names, train, values = _read(file, chosen, delimiter, None)
    if codec is not None:
        return replace(given(file.name, train, codec, values), columns=names)
    if test_path is None:
        train, test = hold_out(train, test_fraction, seed)
    else:
        _, test, values = _read(existing(test_path), chosen._replace(columns=names), delimiter, values)
    whole = _integers(torch.cat([train.raw[:], test.raw[:]]), names, integers, file)
    train, validation = _kept(train, validation_fraction, seed)
    raw = train.raw[:]
    _check_varying(raw, names, file)
    facts: dict[str, Any] = {"class_names": values, "files": (str(path), str(test_path or path)), "columns": names}
    facts |= {"validation": validation, "notes": _notes(names, whole)}
    own = Standardise.of(raw, columns=names, integers=whole)
    return Dataset(file.stem, train, test, own, count_classes(train, test), **facts)


def _kept(train: Split, fraction: float, seed: int) -> tuple[Split, Split | None]:
    """Rows to train on, and those that choose."""
    if not 0 <= fraction < 1:
        raise ValueError(f"validation_fraction lies in [0, 1); got {fraction}.")
    return hold_out(train, max(fraction, min(_CHOOSING / len(train), 0.25)), seed) if fraction else (train, None)


def _check_varying(raw: Tensor, names: Sequence[str], file: Path) -> None:
    """Refuses a constant column."""
    for name, column in zip(names, raw.T, strict=True):
        if bool((column == column[0]).all()):
            found = f"{column[0]:g} in all {len(column):,} training rows"
            cure = f"Leave it out: data.columns=[{','.join(other for other in names if other != name)}]."
            raise misfit(f"{file}, column {name!r}", "values that differ", found, cure)


def _notes(names: Sequence[str], whole: Sequence[int]) -> str:
    """Which column is taken for what."""
    parts = {"continuous": [name for k, name in enumerate(names) if k not in whole]}
    parts["whole numbers, dequantised"] = [names[k] for k in whole]
    said = "; ".join(f"{', '.join(named)}: {kind}" for kind, named in parts.items() if named)
    return f"Columns: {said} (data.integers=[…] chooses)."


class _Chosen(NamedTuple):
    """Which columns are what."""

    columns: Sequence[str] | None
    label: str | None
    condition: Sequence[str] | None

    def of(self, file: Path, names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The columns of samples and of conditions, all of which a file with these `names` has."""
        beside = (*((self.label,) if self.label else ()), *(self.condition or ()))
        mine = tuple(self.columns if self.columns is not None else (name for name in names if name not in beside))
        if absent := [name for name in (*mine, *beside) if name not in names]:
            raise misfit(file, f"a column {absent[0]!r}", f"the columns {', '.join(map(repr, names))}")
        if twice := [name for k, name in enumerate((*mine, *beside)) if name in (*mine, *beside)[:k]]:
            raise ValueError(f"{file}: the column {twice[0]!r} is named twice in columns, label and condition.")
        if not mine:
            raise misfit(file, "a column to model", "label and condition alone", "Name some: data.columns=[…].")
        return mine, tuple(self.condition or ())


def _read(
    file: Path, chosen: _Chosen, delimiter: str | None, known: tuple[str, ...] | None
) -> tuple[tuple[str, ...], Split, tuple[str, ...]]:
    """(names of the columns, the rows, names of the classes: `known` of them, if they are)."""
    table = read_table(file, delimiter, lambda names: (sum(chosen.of(file, names), ()), chosen.label))
    names, beside = chosen.of(file, table.names)
    raw = torch.stack([_numbers(file, table.column(name)) for name in names], 1)
    vector = [_numbers(file, table.column(name)) for name in beside]
    conditions = {"vector": torch.stack(vector, 1)} if vector else {}
    if chosen.label is None:
        return names, Split(raw, conditions=conditions), ()
    labels, values = _classes(file, table.column(chosen.label), known)
    return names, Split(raw, labels, conditions), values


def _numbers(file: Path, column: Column) -> Tensor:
    """A column as float32, which holds it well enough for its deviation."""
    values = column.values
    spacing = float(np.abs(values).max()) * _FLOAT32
    if not spacing < 1e32:
        raise misfit(f"{file}, column {column.name!r}", "numbers up to 1e38", f"{np.abs(values).max():g}", "Scale it.")
    if spacing > 1e-3 * (deviation := float(values.std())) > 0:
        found = f"values around {values.mean():.6g} with a deviation of {deviation:.3g}"
        cure = "Subtract a constant from it."
        raise misfit(f"{file}, column {column.name!r}", "numbers that float32 tells apart", found, cure)
    return torch.from_numpy(values.astype(np.float32))


def _integers(raw: Tensor, names: Sequence[str], integers: Sequence[str] | None, file: Path) -> tuple[int, ...]:
    """Which columns are dequantised."""
    whole = [bool((column == column.round()).all()) for column in raw.T]
    if integers is None:
        return tuple(k for k, column in enumerate(raw.T) if whole[k] and len(column.unique()) < _FEW)
    if absent := [name for name in integers if name not in names]:
        raise misfit(f"{file}: data.integers", f"some of {', '.join(map(repr, names))}", repr(absent[0]))
    for name in integers:
        column = raw[:, names.index(name)]
        if not whole[names.index(name)]:
            found = f"{float(column[column != column.round()][0]):g}"
            raise misfit(f"{file}, column {name!r}", "whole numbers, as data.integers says", found)
    return tuple(k for k, name in enumerate(names) if name in integers)


def _classes(file: Path, column: Column, known: tuple[str, ...] | None) -> tuple[Tensor, tuple[str, ...]]:
    """Class indices (N,), and the names of the classes: numbers by size, anything else by the alphabet."""
    texts, n = [str(value) for value in column.values], len(column.values)
    found = set(texts)
    order = sorted(found, key=int) if all(map(_is_integer, found)) else sorted(found)
    names = tuple(order) if known is None else known
    where = f"{file}, column {column.name!r}"
    if others := sorted(found - set(names)):
        raise misfit(where, f"the classes of the training rows ({', '.join(names[:8])} …)", repr(others[0]))
    if known is None and 2 * len(names) > n:
        cure = "A label is a column of few values; choose another, or none."
        raise misfit(where, "classes with several rows each", f"{len(names):,} values in {n:,} rows", cure)
    number = {name: k for k, name in enumerate(names)}
    return torch.tensor([number[text] for text in texts], dtype=torch.int64, device="cpu"), names


def _is_integer(text: str) -> bool:
    return text.lstrip("-").isdecimal()
