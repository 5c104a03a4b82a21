"""A folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import whole
from ..codecs import Codec, Scaling
from .dataset import Dataset, Split, count_classes, given, hold_out
from .source import existing, misfit

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif")


def ImageFolder(
    path: str,
    size: int | None = None,
    grey: bool = False,
    test_fraction: float = 0.1,
    seed: int = 0,
    codec: Codec | None = None,
) -> Dataset:
    """8-bit images of a folder, decoded once and kept in memory.

    Images lie in the folder itself (no labels), or all in its sub-folders: one class each, in the order of their
    names. Hidden files and files that are not named like images are passed over. Images are turned as their orientation
    tags say.

    Args:
        path: the folder.
        size: cut each image to its largest central square and resize it to size × size (Lanczos); None takes images
            as they are, all of one size.
        grey: one channel (colour becomes luma) instead of three (grey images are then refused).
        test_fraction, seed: of the split, in (0, 1), and ≥ 0; by class where there are labels.
        codec: of a model that is measured on these images, of 256 levels; all are held out.

    Returns:
        raw (N, 1 or 3, H, W) uint8 in 256 levels.

    Raises:
        ImportError: pillow is missing.
        FileNotFoundError: no such folder.
        ValueError: no images, images both in the folder and below, mixed sizes, a file that is not an image or not a
            single 8-bit one without transparency; path, expected and found are named.
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
    if codec is not None:
        if codec.levels != 256:
            raise misfit(folder, f"samples of {codec}", "8-bit images", "Give the values themselves: data=arrays.")
        return given(folder.resolve().name, samples, codec, names)
    splits, scaling = hold_out(samples, test_fraction, seed), Scaling(levels=256)
    classes, both = count_classes(samples), (str(path), str(path))
    return Dataset(folder.resolve().name, *splits, scaling, classes, class_names=names, files=both)


def _list(folder: Path) -> tuple[list[Path], Tensor | None, tuple[str, ...]]:
    """(files, labels (N,) or None, names of the classes)."""
    here, below = _images(folder), _folders(folder)
    if deeper := [file for entry in below for inner in _folders(entry) for file in _images(inner)]:
        raise misfit(deeper[0], "images in the folder or in its sub-folders", "one that lies deeper", "Move it up.")
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
    labels = torch.tensor([number[file.parent] for file in files], device="cpu")
    if empty := [entry.name for entry in below if number[entry] not in labels]:
        raise ValueError(f"{folder}: the sub-folders are classes, but {', '.join(empty[:5])} holds no images.")
    return files, labels, tuple(entry.name for entry in below)


def _images(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if path.suffix.lower() in _SUFFIXES and not path.is_dir()]


def _folders(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if path.is_dir()]


def _visible(folder: Path) -> list[Path]:
    """What is in a folder besides hidden files, in order; a link that leads nowhere is refused."""
    paths = sorted(folder.glob("[!.]*"))
    for path in paths:
        if path.is_symlink() and not path.exists():
            existing(path)
    return paths


def in_pixels(image: Any) -> str:
    """The size of an image (C, H, W), as it is written."""
    return f"{image.shape[2]} × {image.shape[1]}"


def read_image(path: str | Path, channels: int) -> Tensor:
    """One 8-bit image without transparency, (channels, H, W) uint8, turned as its orientation tag says.

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
    grey_for_colour = image.mode in ("L", "1") and not transparent
    if image.mode not in (("L", "RGB", "P", "1") if grey else ("RGB", "P")) or transparent:
        found = f"mode {image.mode}{' with transparency' if transparent else ''}"
        advice = (
            "Convert it first; a folder of grey images is read with grey=True."
            if grey_for_colour
            else "Convert it first."
        )
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
    """The image, decoded and turned as its orientation tag says; one that is not read whole is refused."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("Images are read with pillow: pip install 'scoresde[data]'.") from error
    try:
        with Image.open(file) as image:
            lost = _lost(image)
            whole = None if lost else ImageOps.exif_transpose(image)
    except Exception as error:  # a damaged file may raise anything
        raise misfit(file, "an image", f"a damaged or other file ({error})") from error
    if lost:
        raise misfit(file, "a single 8-bit image", lost, "Convert it first.")
    return whole


def _lost(image: Any) -> str:
    """What pillow would leave out without a word, of an image that is opened and not yet decoded."""
    if (frames := getattr(image, "n_frames", 1)) > 1:
        return f"{frames} frames"
    if image.format == "TIFF":
        bits, formats, extra = (
            image.tag_v2.get(tag, default) for tag, default in ((258, (1,)), (339, (1,)), (338, ()))
        )
        if max(bits) > 8:
            return f"{max(bits)} bits a channel"
        if set(formats) != {1}:
            return "signed or other numbers"
        return "further channels" if extra and "A" not in image.mode else ""
    return "16 bits a channel" if any(str(tile[3]).endswith(";16B") for tile in image.tile) else ""
