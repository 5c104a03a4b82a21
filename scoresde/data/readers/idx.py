"""The IDX format of MNIST and its relatives."""

from __future__ import annotations

import gzip
import io
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...codecs.scaling import Scaling
from ..dataset import Dataset, Split, count_classes
from .source import existing, misfit, unpacked_bytes

_KINDS = {0x08: "uint8", 0x09: "int8", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}


def Idx(path: str, labels: bool = True) -> Dataset:
    """Grey images of a folder that holds the four IDX files of MNIST, Fashion-MNIST, KMNIST …

    The files are train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and
    t10k-labels-idx1-ubyte, each as it is or with .gz.

    Args:
        path: the folder.
        labels: read the label files; with False they need not be there.

    Returns:
        raw (N, 1, H, W) uint8 in 256 levels; as many classes as the largest label says.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is not IDX, truncated, too long, or not of bytes; path, expected and found are named.
    """
    folder = existing(path, folder=True)
    train, test = (_read_split(folder, part, labels) for part in ("train", "t10k"))
    files = tuple(str(folder / f"{part}-images-idx3-ubyte") for part in ("train", "t10k"))
    return Dataset(folder.resolve().name, train, test, Scaling(levels=256), count_classes(train, test), files=files)


def _read_split(folder: Path, part: str, labels: bool) -> Split:
    images = read_idx(_find(folder, f"{part}-images-idx3-ubyte"), dims=3)[:, None]
    if not labels:
        return Split(images)
    path = _find(folder, f"{part}-labels-idx1-ubyte")
    values = read_idx(path, dims=1).long()
    if len(values) != len(images):
        raise ValueError(f"{path}: {len(values)} labels, expected {len(images)}, one for each of the {part} images.")
    return Split(images, values)


def _find(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return existing(candidate)
    found = sorted(entry.name for entry in folder.iterdir())[:8]
    raise FileNotFoundError(f"{folder}: expected {name} or {name}.gz; found {', '.join(found) or 'an empty folder'}.")


def read_idx(path: Path, dims: int) -> Tensor:
    """The uint8 array of one IDX file: bytes 0, 0, type, number of dimensions; their sizes as big-endian int32; values.

    Args:
        path: raw or gzip; its content says which.
        dims: number of dimensions expected.

    Raises:
        ValueError: see `Idx`.
    """
    content, start = path.read_bytes(), 4 + 4 * dims
    if content.startswith(b"\x1f\x8b"):
        most = unpacked_bytes(len(content))
        try:
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(most + 1)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: the gzip stream is truncated or damaged ({error}). Fetch it again.") from error
        if len(content) > most:
            raise misfit(
                path, f"at most {most:,} bytes when it is unpacked", "more", "If that is right, unpack it first."
            )
    header = content[:4]
    if len(header) < 4 or not header.startswith(b"\x00\x00"):
        raise ValueError(f"{path}: not an IDX file. Expected it to begin 00 00 08 {dims:02x}, found {header.hex(' ')}.")
    if header[2] != 0x08:
        kind = _KINDS.get(header[2], "unknown")
        raise misfit(path, "values of type 0x08 (uint8)", f"0x{header[2]:02x} ({kind})")
    if header[3] != dims:
        raise misfit(path, f"{dims} dimensions", header[3], "Are images and labels exchanged?")
    if len(content) < start:
        raise ValueError(f"{path}: truncated. Expected {4 * dims} bytes of sizes, found {len(content) - 4}.")
    shape = tuple(np.frombuffer(content, ">u4", dims, offset=4).tolist())
    count, found = math.prod(shape), len(content) - start
    if count == 0:
        raise misfit(path, "at least one value", f"shape {shape}")
    if found != count:
        fault = "truncated" if found < count else "too long"
        raise ValueError(f"{path}: {fault}. Shape {shape} needs {count} bytes, found {found}.")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).reshape(shape)
