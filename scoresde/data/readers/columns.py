"""Named columns of CSV and Parquet files, and which line of a file holds what does not belong there."""

from __future__ import annotations

import codecs
import csv
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .source import explained, misfit, unpacked_bytes

_LINE = 1 << 20  # bytes of a line
_SNIFFED = 100  # lines that a delimiter is told by
_PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}
_MARKS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}

Choose = Callable[[Sequence[str]], tuple[Sequence[str], str | None]]
"""Names of a file -> (columns of numbers that are wanted, one of text or integers besides, or None)."""


@dataclass(frozen=True)
class Column:
    """A column: (N,) float64, or text of the label."""

    name: str
    values: Any


@dataclass(frozen=True)
class Columns:
    """All names of a file, and the columns that were read."""

    names: tuple[str, ...]
    read: tuple[Column, ...]

    def column(self, name: str) -> Column:
        """The column of that name."""
        return next(column for column in self.read if column.name == name)


def read_table(file: Path, delimiter: str | None, choose: Choose) -> Columns:
    """The chosen columns of a CSV or Parquet file.

    Raises:
        ImportError: pandas or pyarrow is missing.
        ValueError: it is damaged, or a value does not belong there.
    """
    with file.open("rb") as stream:
        start = stream.read(8)
    if start.startswith(b"PAR1"):
        return _parquet(file, choose)
    if file.suffix.lower() in (".parquet", ".pq"):
        raise misfit(file, "a Parquet file", f"one that begins with {start!r}")
    for magic, kind in _PACKED.items():
        if start.startswith(magic):
            raise misfit(file, "a CSV or Parquet file", f"one packed by {kind}", "Unpack it first.")
    return _csv(file, delimiter, choose)


def _parquet(file: Path, choose: Choose) -> Columns:
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError("Parquet files need pyarrow: pip install 'scoresde[tables]'.") from error

    with explained(file, "a Parquet file"):
        content = parquet.ParquetFile(file, memory_map=True)
        names, rows = tuple(content.schema_arrow.names), content.metadata.num_rows
    _check_names(file, names)
    wanted, label = choose(names)
    wanted = [*wanted, *([label] if label else [])]
    for name in wanted:
        kind = content.schema_arrow.field(name).type
        if not (pa.types.is_integer(kind) or (pa.types.is_floating(kind) and name != label)):
            texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_dictionary, pa.types.is_boolean)
            if name != label or not any(test(kind) for test in texts):
                raise _alien(file, name, "numbers" if name != label else "strings or integers", str(kind))
    # runs and dictionaries pack a billion rows into a kilobyte
    if 8 * rows * len(wanted) > unpacked_bytes(size := file.stat().st_size):
        raise misfit(file, "a table", f"{rows:,} rows in {size:,} bytes", "If that is right, store it as CSV.")
    with explained(file, "a Parquet file"):
        table = content.read(columns=wanted)
    if len(table) != rows or not rows:
        raise misfit(file, "rows", f"{len(table):,} of the {rows:,} that its end tells of")
    return Columns(names, tuple(_of_parquet(file, name, table[name], name == label) for name in wanted))


def _of_parquet(file: Path, name: str, column: Any, text: bool) -> Column:
    where = f"{file}, column {name!r}"
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise misfit(f"{where}, row {row + 1:,}", _expected(text), "nothing (null)", _CURE)
    if text:
        return Column(name, column.to_pylist())
    values = column.to_numpy().astype(np.float64)
    if len(bad := np.flatnonzero(~np.isfinite(values))):
        raise misfit(f"{where}, row {bad[0] + 1:,}", _expected(text), f"{values[bad[0]]}", _CURE)
    return Column(name, values)


_CURE = "Remove such rows, or fill them."
_AMISS = "Turn it into numbers, take it as data.label={name}, or name the others in data.columns=[…]."


def _expected(text: bool) -> str:
    return "a class" if text else "a finite number"


def _alien(file: Path, name: str, expected: str, found: str) -> ValueError:
    return misfit(f"{file}, column {name!r}", expected, found, _AMISS.format(name=name))


def _csv(file: Path, delimiter: str | None, choose: Choose) -> Columns:
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError("CSV files need pandas: pip install 'scoresde[tables]'.") from error

    head = _head(file)
    sign = _delimiter(file, head) if delimiter is None else delimiter
    if len(sign) != 1 or sign in '\n\r"':
        raise ValueError(f"delimiter is one sign, such as ';' or a tab; got {sign!r}.")
    names = tuple(name.strip() for name in next(csv.reader(head, delimiter=sign)))
    _check_names(file, names)
    wanted, label = choose(names)
    places: dict[int, type] = {names.index(name): np.float64 for name in wanted}
    places |= {names.index(label): str} if label else {}
    how: dict[str, Any] = {"sep": sign, "names": range(len(names)), "skiprows": 1, "header": None, "index_col": False}
    how |= {"na_filter": False, "encoding": "utf-8-sig", "compression": None}
    try:
        frame = pd.read_csv(file, usecols=list(places), dtype=places, **how)
        read = tuple(Column(names[k], frame[k].to_numpy()) for k in places)
        whole = len(frame) > 0 and all(_sound(column, column.name == label) for column in read)
    except (ValueError, OverflowError, MemoryError, UnicodeError) as error:  # the parser's own errors are ValueErrors
        whole, said = False, str(error)
    else:
        said = "values that are not finite"
    if not whole or not _even(file, sign, len(names)):
        _blame(file, sign, names, places)
        raise misfit(file, "a CSV file", f"a damaged or other one ({said:.300})")
    return Columns(names, read)


def _sound(column: Column, text: bool) -> bool:
    """Whether no value is missing."""
    return all(value.strip() for value in column.values) if text else bool(np.isfinite(column.values).all())


def _head(file: Path) -> list[str]:
    """The first lines."""
    head: list[str] = []
    for text in lines(file):
        if text.strip():
            head.append(text)
        elif not head:
            raise misfit(f"{file}, line 1", "the names of the columns", "an empty line")
        if len(head) == _SNIFFED:
            break
    if len(head) < 2:
        raise misfit(file, "a line of names and rows of numbers", "one line" if head else "none")
    return head


def lines(file: Path) -> Iterator[str]:
    """Lines in UTF-8, of bounded length."""
    with file.open("rb") as stream:
        yield from _decoded(file, stream)


def _decoded(file: Path, stream: BinaryIO) -> Iterator[str]:
    number = 0
    while line := stream.readline(_LINE + 1):
        number += 1
        if number == 1:
            for mark, kind in _MARKS.items():
                if line.startswith(mark):
                    raise misfit(file, "text in UTF-8", kind, "Save it as UTF-8.")
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) > _LINE or b"\0" in line:
            found = "bytes of 0, as in no text" if b"\0" in line else "one that is longer"
            raise misfit(f"{file}, line {number:,}", "a line of text of up to a mebibyte", found)
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            found = f"the byte 0x{line[error.start]:02x} after {line[: error.start][-20:].decode(errors='ignore')!r}"
            cure = "Save it as UTF-8; it may be in Latin-1 or Windows-1252."
            raise misfit(f"{file}, line {number:,}", "text in UTF-8", found, cure) from error


def _delimiter(file: Path, head: Sequence[str]) -> str:
    """The one sign that cuts each of the first lines into equally many parts."""
    fitting = []
    for sign in (",", ";", "\t"):
        counts = {len(row) for row in csv.reader(head, delimiter=sign) if row}
        if counts == {max(counts)} and counts != {1}:
            fitting.append(sign)
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        # of a ragged file: the only one that is there; of a single column: any
        there = [sign for sign in (",", ";", "\t") if sign in head[0]]
        if len(there) <= 1:
            return there[0] if there else ","
        fitting = there
    cure = "Name it: data.delimiter=';'."
    raise misfit(f"{file}, line 1", "one delimiter", f"{' and '.join(map(repr, fitting))}, which both fit", cure)


def _check_names(file: Path, names: Sequence[str]) -> None:
    if twice := [name for k, name in enumerate(names) if name in names[:k]]:
        raise misfit(f"{file}, line 1", "names of columns that differ", f"{twice[0]!r} twice")
    if any(not name for name in names):
        found = f"none for column {list(names).index('') + 1} of {len(names)}"
        raise misfit(f"{file}, line 1", "a name for each column", found)
    if all(_number(name) is not None for name in names):
        cure = "Put a line of names on top."
        raise misfit(f"{file}, line 1", "the names of the columns", f"numbers ({', '.join(names[:4])} …)", cure)


def _even(file: Path, sign: str, width: int) -> bool:
    """Whether each line has as many parts as there are names; the parser fills what is missing at the end of one."""
    return all(len(row) in (0, width) for row in csv.reader(lines(file), delimiter=sign))


def _number(text: str) -> float | None:
    """The number that a field of a CSV holds; None for anything else."""
    try:
        return None if "_" in text else float(text)
    except ValueError:
        return None


def _blame(file: Path, sign: str, names: Sequence[str], places: dict[int, type]) -> None:
    """Names the first line that is not as it should be.

    Raises:
        ValueError: with file, line, column, expected and found.
    """
    rows = csv.reader(lines(file), delimiter=sign)
    try:
        for row in rows:
            where, first = f"{file}, line {rows.line_num:,}", rows.line_num == 1
            if row and len(row) != len(names):
                raise misfit(where, f"{len(names)} columns, as there are names", f"{len(row)} ({sign.join(row):.60})")
            for k, kind in places.items() if row and not first else ():
                _check_field(f"{where}, column {names[k]!r}", row[k].strip(), kind is str, names[k])
    except csv.Error as error:
        raise misfit(f"{file}, line {rows.line_num:,}", "a line of a CSV file", f"another ({error})") from error


def _check_field(where: str, text: str, label: bool, name: str) -> None:
    if label:
        if not text:
            raise misfit(where, "a class", "nothing", _CURE)
        return
    value = _number(text)
    if value is None and text:
        comma = "," in text and _number(text.replace(",", ".")) is not None
        cure = "Write decimals with a point." if comma else _AMISS.format(name=name)
        raise misfit(where, "a number", repr(text[:40]), cure)
    if value is None or not math.isfinite(value):
        raise misfit(where, "a finite number", repr(text) if text else "nothing", _CURE)
