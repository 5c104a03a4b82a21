"""Samples that stay in their files until they are asked for, and how all of them are looked at: in chunks."""

from __future__ import annotations

import abc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

KEPT = 1 << 30  # bytes of samples that are read into memory unless the user says otherwise
_FEW = 1 << 28  # values of model data that are compared with others at once
_CHUNK = 1 << 24  # bytes that are looked at at a time
_HASHED = 1 << 34  # bytes up to which a digest is of every value: ten seconds for 10 GB
_SPOTS, _SPOT = 1024, 1 << 18  # a digest of more is of so many places of so many bytes, evenly spaced


class DataLost(RuntimeError):
    """Samples can no longer be read: a file is not what it was, or a process that reads has ended."""


class Rows(abc.ABC):
    """Samples (N, *event) that are read as they are asked for: what `Split.raw` may be in place of a tensor.

    It has the length, shape, dtype and number of values of that tensor, and `rows[index]` is a tensor on the CPU: for
    a slice, a mask, a list or a tensor of indices; the same values as often as they are asked for, in any process. What
    looks at all samples goes through `chunks`, what picks some of them for good through `select`; `len` and `rows[…]`
    are all that a batch needs. It can be pickled, so that other processes read too.

    Args:
        shape: (N, *event).
        dtype: of the tensors.

    Attributes:
        costly: a sample takes so long to read that not even a digest reads all of them.
    """

    costly = False

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        self.shape, self.dtype = shape, dtype
        self.device, self.ndim = torch.device("cpu"), len(shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Tensor:
        if not isinstance(index, Tensor) or index.dtype != torch.int64:
            index = torch.arange(len(self), device="cpu")[index]
        index = index.cpu()
        if index.numel() and not -len(self) <= int(index.min()) <= int(index.max()) < len(self):
            raise IndexError(f"index {int(index.min())} … {int(index.max())} of {len(self)} samples")
        flat = self.read(index.flatten() % len(self)) if index.numel() else self._nothing()
        return flat.reshape(*index.shape, *self.shape[1:])

    @abc.abstractmethod
    def read(self, index: Tensor) -> Tensor:
        """The samples `index` (n ≥ 1,), int64 in 0 … N − 1.

        Raises:
            DataLost: a file changed since this object was made, or can no longer be read.
        """

    @abc.abstractmethod
    def sizes(self) -> Iterator[str]:
        """What a digest that leaves out samples has of all of them: the sizes of their files."""

    def numel(self) -> int:
        """The number of values."""
        return int(np.prod(self.shape, dtype=np.int64))

    def element_size(self) -> int:
        """Bytes of a value."""
        return self.dtype.itemsize

    def select(self, index: Tensor) -> Rows:
        """The samples `index` (n,), none of which is read."""
        return Selected(self, index)

    def per_chunk(self) -> int:
        """How many samples are looked at at a time."""
        return max(1, _CHUNK * len(self) // (self.numel() * self.element_size()))

    def _nothing(self) -> Tensor:
        return torch.empty((0, *self.shape[1:]), dtype=self.dtype, device="cpu")


class Selected(Rows):
    """Some samples of others, in an order of their own."""

    def __init__(self, rows: Rows, index: Tensor):
        super().__init__((len(index), *rows.shape[1:]), rows.dtype)
        self.rows, self.index, self.costly = rows, index, rows.costly

    def read(self, index: Tensor) -> Tensor:
        return self.rows.read(self.index[index])

    def sizes(self) -> Iterator[str]:
        return self.rows.sizes()

    def select(self, index: Tensor) -> Rows:
        return Selected(self.rows, self.index[index])


class Stored(Rows):
    """An array in C order, stored in a file as it is. Nothing is mapped: a mapped file that becomes shorter ends the
    process that reads it (SIGBUS), where a read says so.

    Args:
        path: the file.
        offset: of the first value, in bytes.
        shape, dtype: of the array.
        arrange: rows of the array -> the samples as they are used; it can be pickled.

    Raises:
        ValueError: what `arrange` refuses in the first row.
    """

    def __init__(
        self,
        path: Path,
        offset: int,
        shape: tuple[int, ...],
        dtype: np.dtype,
        arrange: Callable[[np.ndarray], Tensor] = torch.from_numpy,
    ):
        self.path, self.offset, self.stored, self.kind, self.arrange = path, offset, shape, dtype, arrange
        self._file, self._stamp = _Open(), stamp(os.stat(path))
        first = arrange(self._values(np.zeros(1, np.int64)))
        super().__init__((shape[0], *first.shape[1:]), first.dtype)

    def read(self, index: Tensor) -> Tensor:
        return self.arrange(self._values(index.numpy()))

    def sizes(self) -> Iterator[str]:
        yield str(self._stamp[2])

    def _values(self, index: np.ndarray) -> np.ndarray:
        """Rows of the array; those that follow each other are read at once."""
        values = np.empty((len(index), *self.stored[1:]), self.kind)
        size = values.nbytes // len(index)
        out = memoryview(values.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        starts = np.flatnonzero(np.diff(index, prepend=-2) != 1).tolist()
        number = self._file.of(self.path)
        for start, end in zip(starts, [*starts[1:], len(index)], strict=True):
            done, place = start * size, self.offset + (int(index[start]) - start) * size
            while done < end * size:
                got = os.preadv(number, [out[done : end * size]], place + done)
                if not got:
                    raise self._changed("shorter")
                done += got
        if stamp(os.fstat(number)) != self._stamp:  # after reading, so that nothing else was read
            raise self._changed("another")
        return values

    def _changed(self, how: str) -> DataLost:
        return DataLost(
            f"{self.path}: expected the file that was opened, found {how} one: it has changed since. Put back what it "
            "was; a run goes on from its last checkpoint by resume=auto."
        )


class _Open:
    """An open file of this process; a copy in another process opens it again."""

    def __init__(self) -> None:
        self._number: int | None = None

    def of(self, path: Path) -> int:
        if self._number is None:
            try:
                self._number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise DataLost(f"{path}: it can no longer be opened ({error.strerror}). Put it back.") from error
        return self._number

    def __reduce__(self) -> tuple[type[_Open], tuple[()]]:
        return _Open, ()

    def __del__(self) -> None:
        if self._number is not None:
            os.close(self._number)


def stamp(status: os.stat_result) -> tuple[int, int, int, int]:
    """What a file has that is another once it changed: device, inode, bytes, time."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class Each(Rows):
    """Samples of which each is read by itself, as pictures are.

    Args:
        items: one for each sample: a path, a name; pickled as they are.
        one: reads an item, (*event).
        shape, dtype: (N, *event).
    """

    costly = True

    def __init__(self, items: Any, one: Callable[[Any], Tensor], shape: tuple[int, ...], dtype: torch.dtype):
        super().__init__(shape, dtype)
        self.items, self.one = items, one

    def read(self, index: Tensor) -> Tensor:
        read = []
        for k in index.tolist():
            try:
                sample = self.one(self.items[k])
            except (ValueError, OSError) as error:
                raise DataLost(str(error)) from error
            if tuple(sample.shape) != self.shape[1:] or sample.dtype != self.dtype:
                found = f"{sample.dtype} {tuple(sample.shape)}"
                raise DataLost(
                    f"{self.items[k]}: expected {self.dtype} {self.shape[1:]}, found {found}: it has changed."
                )
            read.append(sample)
        return torch.stack(read)

    def sizes(self) -> Iterator[str]:
        for item in self.items:
            yield f"{item} {os.stat(item).st_size}" if isinstance(item, (str, os.PathLike)) else str(item)


def chunks(raw: Tensor | Rows) -> Iterator[Tensor]:
    """All samples, one part after another: a tensor is one, of `Rows` each has about 16 MiB."""
    if isinstance(raw, Tensor):
        yield raw
        return
    for start in range(0, len(raw), raw.per_chunk()):
        yield raw[torch.arange(start, min(start + raw.per_chunk(), len(raw)), device="cpu")]


def checked(check: Callable[[Tensor, str], None], raw: Tensor | Rows, name: str) -> None:
    """`check(part, name)` of all samples; where they are looked at in parts, the name says from which sample on. Of
    costly ones it is of the first: each has its shape and type checked whenever it is read.
    """
    if not isinstance(raw, Tensor) and raw.costly:
        return check(raw[:1], name)
    start = 0
    for part in chunks(raw):
        check(part, f"{name}[{start}:]" if start else name)
        start += len(part)


def extent(raw: Tensor | Rows) -> tuple[float | int, float | int]:
    """The least and the greatest value, NaN if there is one; of the samples of a digest where it is of some."""
    ends = torch.stack([torch.stack(tuple(part.aminmax())) for part in spots(raw) or chunks(raw)])
    return ends[:, 0].min().item(), ends[:, 1].max().item()


def few(raw: Tensor | Rows) -> Tensor:
    """A tensor as it is; of `Rows` evenly spaced ones, of at most 2^28 values: a GiB as floats."""
    if isinstance(raw, Tensor):
        return raw
    n = how_few(raw)
    return raw[torch.arange(n, device="cpu") * len(raw) // n]


def how_few(raw: Tensor | Rows) -> int:
    """The number of samples of `few`."""
    return len(raw) if isinstance(raw, Tensor) else max(1, min(len(raw), _FEW * len(raw) // raw.numel()))


def select(raw: Tensor | Rows, index: Tensor) -> Tensor | Rows:
    """The samples `index` (n,): a tensor of a tensor; of `Rows` none is read."""
    return raw[index] if isinstance(raw, Tensor) else raw.select(index)


def spots(raw: Tensor | Rows) -> Iterator[Tensor] | None:
    """What a digest is of where it cannot be of all samples: evenly spaced ones; None where it can be of all."""
    if isinstance(raw, Tensor) or not (raw.costly or raw.numel() * raw.element_size() > _HASHED):
        return None
    most = 1 if raw.costly else max(1, _SPOT * len(raw) // (raw.numel() * raw.element_size()))
    places = np.unique(np.linspace(0, len(raw) - most, _SPOTS).astype(np.int64))
    return (raw[torch.arange(int(k), int(k) + most, device="cpu")] for k in places)
