"""A folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import whole
from ..codecs.scaling import Scaling
from .dataset import Dataset, Split
from .hold_out import hold_out
from .source import existing, refuse_lfs_pointer

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif")


def ImageFolder(
    path: str, size: int | None = None, grey: bool = False, test_fraction: float = 0.1, seed: int = 0
) -> Dataset:
    """8-bit images of a folder, decoded once and kept in memory.

    Images lie in the folder itself (no labels), or all in its sub-folders: one class each, in the order of their
    names. Hidden files and files that are not named like images are passed over; orientation tags are not applied.

    Args:
        path: the folder.
        size: cut each image to its largest central square and resize it to size × size (Lanczos); None takes images
            as they are, all of one size.
        grey: one channel (colour becomes luma) instead of three (grey images are then refused).
        test_fraction, seed: of the split, in (0, 1), and ≥ 0; by class where there are labels.

    Returns:
        raw (N, 1 or 3, H, W) uint8 in 256 levels.

    Raises:
        ImportError: pillow is missing.
        FileNotFoundError: no such folder.
        ValueError: no images, images both in the folder and below, mixed sizes, a file that is not an image or not an
            8-bit one without transparency; path, expected and found are named.
    """
    if size is not None:
        size = whole(size, "size in pixels", otherwise="None to keep images as they are")
    folder = existing(path, folder=True)
    files, labels, classes = _list(folder)
    images = [_read(file, size, grey) for file in files]
    for file, image in zip(files, images, strict=True):
        if image.shape != images[0].shape:
            raise ValueError(
                f"{file}: expected {_size(images[0])} pixels as in {files[0].name}, found {_size(image)}. "
                "Give size=… to cut and resize all of them."
            )
    splits = hold_out(Split(torch.from_numpy(np.stack(images)), labels), test_fraction, seed)
    return Dataset(folder.resolve().name, *splits, Scaling(levels=256), classes)


def _list(folder: Path) -> tuple[list[Path], Tensor | None, int]:
    """(files, labels (N,) or None, number of classes)."""
    here = _images(folder)
    below = {entry: _images(entry) for entry in sorted(folder.iterdir()) if entry.is_dir() and entry.name[0] != "."}
    found = {entry: files for entry, files in below.items() if files}
    if here and found:
        raise ValueError(
            f"{folder}: {len(here)} images in the folder itself and more in {next(iter(found)).name}/. Expected all in "
            "the folder (no labels) or all in sub-folders (one per class)."
        )
    if here:
        return here, None, 0
    if not found:
        raise ValueError(f"{folder}: expected images ({', '.join(_SUFFIXES)}) in it or in its sub-folders, found none.")
    empty = [entry.name for entry, files in below.items() if not files]
    if empty:
        raise ValueError(f"{folder}: the sub-folders are classes, but {', '.join(empty[:5])} holds no images.")
    labels = torch.cat([torch.full((len(files),), k) for k, files in enumerate(found.values())])
    return [file for files in found.values() for file in files], labels, len(found)


def _images(folder: Path) -> list[Path]:
    return sorted(
        entry
        for entry in folder.iterdir()
        if entry.is_file() and entry.name[0] != "." and entry.suffix.lower() in _SUFFIXES
    )


def _size(image: np.ndarray) -> str:
    return f"{image.shape[2]} × {image.shape[1]}"


def read_image(path: str | Path, channels: int) -> Tensor:
    """One 8-bit image without transparency, (channels, H, W) uint8; orientation tags are not applied.

    Args:
        path: the file.
        channels: 1 for grey (also stored as colour), 3 for colour.

    Raises:
        ImportError: pillow is missing.
        FileNotFoundError: no such file.
        ValueError: it is something else; path, expected and found are named.
    """
    file = existing(path)
    pixels = _read(file, None, channels == 1)
    if channels == 1 and (np.asarray(_opened(file).convert("RGB")) != pixels.transpose(1, 2, 0)).any():
        raise ValueError(f"{file}: expected a grey image, found colours. Convert it first.")
    return torch.from_numpy(pixels)


def _read(file: Path, size: int | None, grey: bool) -> np.ndarray:
    """(C, H, W) uint8."""
    image = _opened(file)
    transparent = "A" in image.getbands() or "transparency" in image.info
    if image.mode not in (("L", "RGB", "P", "1") if grey else ("RGB", "P")) or transparent:
        found = f"mode {image.mode}{' with transparency' if transparent else ''}"
        advice = " Set grey=True for grey images." if image.mode in ("L", "1") else " Convert it first."
        expected = "an 8-bit grey or colour image" if grey else "an 8-bit RGB image"
        raise ValueError(f"{file}: expected {expected}, found {found}.{advice}")
    image = image.convert("L" if grey else "RGB")
    if size is not None:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), _pillow().Resampling.LANCZOS, box=box)
    pixels = np.array(image, dtype=np.uint8)
    return pixels[None] if grey else pixels.transpose(2, 0, 1)


def _opened(file: Path) -> Any:
    """The image, decoded."""
    refuse_lfs_pointer(file)
    pillow = _pillow()
    try:
        with pillow.open(file) as image:
            return image.copy()
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
        raise ValueError(f"{file}: expected an image, found a damaged or other file ({error}).") from error


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("Images are read with pillow: pip install 'scoresde[data]'.") from error
    return Image
