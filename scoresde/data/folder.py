"""A folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import whole
from ..codecs.scaling import Scaling
from .dataset import Dataset, Split, count_classes, hold_out
from .source import existing, misfit

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
    files, labels, names = _list(folder)
    images = [_pixels(file, _opened(existing(file)), size, grey) for file in files]
    for file, image in zip(files, images, strict=True):
        if image.shape != images[0].shape:
            expected = f"{in_pixels(images[0])} pixels as in {files[0].name}"
            raise misfit(file, expected, in_pixels(image), "Give size=… to cut and resize all of them.")
    samples = Split(torch.from_numpy(np.stack(images)), labels)
    splits, scaling = hold_out(samples, test_fraction, seed), Scaling(levels=256)
    return Dataset(folder.resolve().name, *splits, scaling, count_classes(samples), class_names=names)


def _list(folder: Path) -> tuple[list[Path], Tensor | None, tuple[str, ...]]:
    """(files, labels (N,) or None, names of the classes)."""
    here, below = _images(folder), [entry for entry in sorted(folder.glob("[!.]*")) if entry.is_dir()]
    files = [file for entry in below for file in _images(entry)]
    if here and files:
        raise ValueError(
            f"{folder}: {len(here)} images in the folder itself and more in {files[0].parent.name}/. Expected all in "
            "the folder (no labels) or all in sub-folders (one per class)."
        )
    if here:
        return here, None, ()
    if not files:
        raise misfit(folder, f"images ({', '.join(_SUFFIXES)}) in it or in its sub-folders", "none")
    number = {entry: k for k, entry in enumerate(below)}
    labels = torch.tensor([number[file.parent] for file in files])
    if empty := [entry.name for entry in below if number[entry] not in labels]:
        raise ValueError(f"{folder}: the sub-folders are classes, but {', '.join(empty[:5])} holds no images.")
    return files, labels, tuple(entry.name for entry in below)


def _images(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("[!.]*") if file.suffix.lower() in _SUFFIXES and file.is_file())


def in_pixels(image: Any) -> str:
    """The size of an image (C, H, W), as it is written."""
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
    image = _opened(file)
    pixels = _pixels(file, image, None, channels == 1)
    if channels == 1 and (np.asarray(image.convert("RGB")) != pixels.transpose(1, 2, 0)).any():
        raise misfit(file, "a grey image", "colours", "Convert it first.")
    return torch.from_numpy(pixels)


def _pixels(file: Path, image: Any, size: int | None, grey: bool) -> np.ndarray:
    """(C, H, W) uint8."""
    transparent = "A" in image.getbands() or "transparency" in image.info
    if image.mode not in (("L", "RGB", "P", "1") if grey else ("RGB", "P")) or transparent:
        found = f"mode {image.mode}{' with transparency' if transparent else ''}"
        advice = "Set grey=True for grey images." if image.mode in ("L", "1") else "Convert it first."
        raise misfit(file, "an 8-bit grey or colour image" if grey else "an 8-bit RGB image", found, advice)
    image = image.convert("L" if grey else "RGB")
    if size is not None:
        from PIL.Image import Resampling

        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.resize((size, size), Resampling.LANCZOS, box=(left, top, left + side, top + side))
    pixels = np.array(image, dtype=np.uint8)
    return pixels[None] if grey else pixels.transpose(2, 0, 1)


def _opened(file: Path) -> Any:
    """The image, decoded."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("Images are read with pillow: pip install 'scoresde[data]'.") from error
    try:
        with Image.open(file) as image:
            return image.copy()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise misfit(file, "an image", f"a damaged or other file ({error})") from error
