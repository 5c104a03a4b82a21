"""Arrays in HDF5 and NetCDF files, by h5py, and of NetCDF 3 by scipy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .source import MOST_NAMES, absent, explained, misfit, only, unpacked_bytes

SUFFIXES = (".h5", ".hdf5", ".nc")
_KIND = "a whole HDF5 or NetCDF file"
_COMPRESSION = {1: "gzip", 4: "szip", 32000: "lzf"}
_FILTERS = {2: "shuffle", 3: "fletcher32", 5: "nbit", 6: "scaleoffset", **_COMPRESSION}  # that HDF5 brings along


def read_hdf5(path: Path, key: str | None, keys: Mapping[str, str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The array of samples, and by name what has a key beside it.

    No other file is opened and no plug-in loaded. Packed variables of NetCDF are unpacked, as their scale_factor and
    add_offset say.

    Args:
        path: .h5, .hdf5 or .nc.
        key: the path of an array inside, as fields/u; None if it is the only one.
        keys: of other arrays, by name.

    Raises:
        ImportError: h5py is missing.
        TypeError: compound types, text or objects.
        ValueError: a damaged file, an unknown key, links, arrays in other files, filters of others, an array that
            unpacks to far more than the file holds, or one with gaps (_FillValue).
    """
    with path.open("rb") as file:
        old = file.read(3) == b"CDF"
    return _netcdf3(path, key, keys) if old else _hdf5(path, key, keys)


def _hdf5(path: Path, key: str | None, keys: Mapping[str, str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"{path}: HDF5 needs h5py: pip install 'scoresde[science]'.") from error

    def names() -> list[str]:
        """Of the arrays, up to 51; without those that only number an axis of others."""
        found: list[str] = []

        def visit(name: str, node: Any) -> bool | None:
            if isinstance(node, h5py.Dataset) and node.attrs.get("CLASS") != b"DIMENSION_SCALE":
                found.append(name)
            return True if len(found) > MOST_NAMES else None  # which ends it

        content.visititems(visit)  # follows no links
        return found

    def array(at: str) -> np.ndarray:
        node, where = content, f"{path}[{at}]"
        for part in at.strip("/").split("/"):
            with explained(path, _KIND):
                listed = list(node) if isinstance(node, h5py.Group) else []
                link = node.get(part, getlink=True) if part in listed else None
            if link is None:
                raise absent(path, at, names())
            if not isinstance(link, h5py.HardLink):
                raise misfit(where, "an array in this file", "a link", "Copy what it leads to into the file.")
            with explained(path, _KIND):
                node = node[part]
        if not isinstance(node, h5py.Dataset):
            raise absent(path, at, names())
        _check(node, where, path.stat().st_size)
        with explained(path, _KIND):
            values, attributes = node[()], dict(node.attrs) if path.suffix == ".nc" else {}
        return _unpacked(values, attributes, where)

    with explained(path, _KIND):
        content = h5py.File(path, "r")
    with content:
        first = only(path, names()) if key is None else key
        return array(first), {name: array(at) for name, at in keys.items()}


def _check(node: Any, where: str, size: int) -> None:
    """Refuses, before it is read, what is no array of numbers in a file of `size` bytes, or grows when it is read."""
    if node.shape is None or node.dtype.kind not in "biuf":
        raise TypeError(f"{where}: expected an array of integers or real floats, found {node.dtype} {node.shape}.")
    if node.external or node.is_virtual:
        raise misfit(where, "an array in this file", "one whose values lie in other files", "Copy them into the file.")
    chunks: list[int] = []
    with explained(Path(where), _KIND):
        properties = node.id.get_create_plist()
        filters = [properties.get_filter(k)[0] for k in range(properties.get_nfilters())]
        stored = min(node.id.get_storage_size(), size)
        if node.chunks is not None:
            node.id.chunk_iter(lambda chunk: chunks.append(chunk.size))
    if foreign := [number for number in filters if number not in _FILTERS]:
        raise misfit(where, f"filters {', '.join(_FILTERS.values())}", f"filter {foreign[0]}", "Store it without.")
    whole, part = (node.dtype.itemsize * math.prod(shape or ()) for shape in (node.shape, node.chunks))
    if max(whole, part if node.chunks else 0) > unpacked_bytes(stored):
        found = f"one that unpacks to {max(whole, part):,} bytes from {stored:,}"
        raise misfit(where, "an array", found, "If that is right, store it as .npy.")
    # what a filter makes of a chunk is as long as the chunk, so what it is made of is no longer, but for a few bytes
    if sum(number in _COMPRESSION for number in filters) > 1 or max(chunks, default=0) > part + part // 16 + 4096:
        raise misfit(where, "chunks that were compressed once", "others")


def _netcdf3(path: Path, key: str | None, keys: Mapping[str, str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    from scipy.io import netcdf_file

    def array(at: str) -> np.ndarray:
        if at not in content.variables:
            raise absent(path, at, list(content.variables))
        variable = content.variables[at]
        return _unpacked(np.array(variable.data), variable._attributes, f"{path}[{at}]")

    with explained(path, _KIND):
        content = netcdf_file(path, "r", mmap=False)
    with content:
        own = [name for name, found in content.variables.items() if found.dimensions != (name,)]
        first = only(path, own) if key is None else key
        return array(first), {name: array(at) for name, at in keys.items()}


def _unpacked(values: np.ndarray, attributes: Mapping[str, Any], where: str) -> np.ndarray:
    """The values that a variable of NetCDF stands for: stored · scale_factor + add_offset."""
    scale, offset, *gaps = (
        attributes.get(name) for name in ("scale_factor", "add_offset", "_FillValue", "missing_value")
    )
    missing = sum(int((values == gap).sum()) for gap in gaps if gap is not None)
    if missing:
        advice = "Fill them, or leave those samples out."
        raise misfit(where, "a value everywhere", f"{missing} of {values.size} missing (_FillValue)", advice)
    if scale is None and offset is None:
        return values
    return values * np.float64(1 if scale is None else scale) + np.float64(0 if offset is None else offset)
