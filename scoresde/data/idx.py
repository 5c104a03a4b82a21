"""The IDX format of MNIST and its relatives."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from ..codecs.scaling import Scaling
from .dataset import Dataset, Split
from .source import existing, refuse_lfs_pointer

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
    splits = []
    for part in ("train", "t10k"):
        images = read_idx(_find(folder, f"{part}-images-idx3-ubyte"), dims=3)[:, None]
        splits.append(Split(images, _labels(folder, part, len(images)) if labels else None))
    classes = max(int(split.labels.max()) for split in splits if split.labels is not None) + 1 if labels else 0
    return Dataset(folder.resolve().name, splits[0], splits[1], Scaling(levels=256), classes)


def _labels(folder: Path, part: str, images: int) -> Tensor:
    path = _find(folder, f"{part}-labels-idx1-ubyte")
    values = read_idx(path, dims=1).long()
    if len(values) != images:
        raise ValueError(f"{path}: {len(values)} labels, expected {images}, one for each of the {part} images.")
    return values


def _find(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
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
    refuse_lfs_pointer(path)
    with path.open("rb") as stored:
        zipped = stored.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if zipped else path.open("rb") as file:
            return _parse(cast(BinaryIO, file), path, dims)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: the gzip stream is truncated or damaged ({error}). Fetch it again.") from error


def _parse(file: BinaryIO, path: Path, dims: int) -> Tensor:
    header = file.read(4)
    if len(header) < 4 or header[:2] != b"\x00\x00":
        raise ValueError(f"{path}: not an IDX file. Expected it to begin 00 00 08 {dims:02x}, found {header.hex(' ')}.")
    if header[2] != 0x08:
        kind = _KINDS.get(header[2], "unknown")
        raise ValueError(f"{path}: expected values of type 0x08 (uint8), found 0x{header[2]:02x} ({kind}).")
    if header[3] != dims:
        raise ValueError(f"{path}: expected {dims} dimensions, found {header[3]}. Are images and labels exchanged?")
    sizes = file.read(4 * dims)
    if len(sizes) < 4 * dims:
        raise ValueError(f"{path}: truncated. Expected {4 * dims} bytes of sizes, found {len(sizes)}.")
    shape = np.frombuffer(sizes, ">u4").tolist()
    count = math.prod(shape)
    if count == 0:
        raise ValueError(f"{path}: expected at least one value, found shape {tuple(shape)}.")
    values = file.read(count)
    if len(values) < count:
        raise ValueError(f"{path}: truncated. Shape {tuple(shape)} needs {count} bytes, found {len(values)}.")
    if file.read(1):
        raise ValueError(f"{path}: too long. Shape {tuple(shape)} needs {count} bytes, found more after them.")
    return torch.frombuffer(bytearray(values), dtype=torch.uint8).reshape(shape)
