"""Where in a file the values of an array lie, so that they need not be read to begin with."""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torch import Tensor

from ..rows import KEPT, Stored
from .source import explained, misfit

_MAGIC = b"\x93NUMPY"
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def stored(path: Path, name: str | None, arrange: Callable[[np.ndarray], Tensor], lazy: bool | None) -> Stored | None:
    """The array of a .npy file (`name` None) or one of an .npz as samples that stay there; None for one that is to be
    read as a whole, or for another file.

    Args:
        path, name: file, and member with or without ".npy".
        arrange: see `Stored`.
        lazy: None decides by size: it stays in the file above 1 GiB.

    Raises:
        ValueError: the file is shorter than it says; or it has to stay there, and is compressed or in another order.
    """
    if lazy is False:
        return None
    with explained(path, "a .npy or .npz file"), open(path, "rb") as file:
        start, size, packed = (0, path.stat().st_size, "") if name is None else _member(file, name)
        file.seek(start)
        known = not packed and file.read(len(_MAGIC)) == _MAGIC
        file.seek(start)
        read = _HEADERS.get(np.lib.format.read_magic(file)) if known else None
        shape, columns_first, dtype = ((), False, np.dtype("V")) if read is None else read(file)
        offset = file.tell()
    if packed and lazy:
        raise _unfit(path, packed)
    needed = math.prod(shape) * dtype.itemsize
    if dtype.kind not in "uif" or not shape or not needed or not (lazy or needed > KEPT):
        return None
    if offset + needed > start + size:
        raise misfit(
            path, f"{needed:,} bytes for the shape {shape}", f"{start + size - offset:,}: it is truncated or damaged"
        )
    if columns_first and len(shape) > 1:
        if lazy:
            raise _unfit(path, "in the order of Fortran")
        return None
    return Stored(path, offset, shape, dtype, arrange)


def _member(file: BinaryIO, name: str) -> tuple[int, int, str]:
    """(place of the first byte, bytes, what keeps it from being read in place) of a member of a zip."""
    with zipfile.ZipFile(file) as content:
        (entry,) = (info for info in content.infolist() if info.filename in (name, f"{name}.npy"))
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        return 0, 0, "compressed"
    file.seek(entry.header_offset)
    # the names and notes before the values are given once more there, and may differ in length
    lengths = struct.unpack("<HH", file.read(30)[26:])
    return entry.header_offset + 30 + sum(lengths), entry.file_size, ""


def _unfit(path: Path, found: str) -> ValueError:
    advice = "np.save and np.savez store one, of np.ascontiguousarray(x); or leave out data.lazy."
    return misfit(path, "an uncompressed array in C order to be read from where it is", f"one that is {found}", advice)
