"""A folder of images."""

from __future__ import annotations

import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...checks import whole
from ...codecs import Codec, Scaling
from ..dataset import Dataset, Split, count_classes, given
from ..rows import KEPT, Each
from .captions import Captions, beside
from .pictures import in_pixels, in_words, opened, pixels
from .source import existing, misfit
from .tree import listed

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif")
# Pictures as well, which are not read.
_OTHERS = (
    ".heic", ".heif", ".jfif", ".jpe", ".jp2", ".jxl", ".avif", ".svg", ".psd", ".tga", ".ppm", ".pgm", ".exr", ".hdr",
    ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw", ".dcm",
)  # fmt: skip
_MANY = 10_000  # files up to which each has a checksum in a run folder


def ImageFolder(
    path: str,
    size: int | None = None,
    grey: bool | None = None,
    test_fraction: float = 0.1,
    seed: int = 0,
    codec: Codec | None = None,
    lazy: bool | None = None,
    captions: str | Captions | None = None,
) -> Dataset:
    """Images of a folder, decoded once and kept in memory, or whenever they are seen: of 8 bits, or grey ones of 16.

    Images lie in the folder itself (no labels), or all in its sub-folders: one class each, in the order of their
    names. Or so in two sub-folders train and test (validation, valid, val), of which the second is held out. Hidden
    files and files that are not named like images are passed over. Images are turned as their orientation tags say.

    Args:
        path: the folder.
        size: cut each image to its largest central square and resize it to size × size (Lanczos); None takes images
            as they are, all of one size.
        grey: one channel (colour becomes luma), or three (grey images are then refused); None is what they all are.
        test_fraction, seed: of the split, in (0, 1), and ≥ 0; by class where there are labels. Not used where folders
            say it.
        codec: of a model that is measured on these images; all are held out, or those of a folder for that.
        captions: a file of sentences, one for each image, see `Captions`; in the order of their names if it has none.
        lazy: they stay in their files, of which at the start only the heads are read; None: above 1 GiB of pixels.

    Returns:
        raw (N, 1 or 3, H, W): uint8 in 256 levels, or int32 in 65,536.

    Raises:
        ImportError: pillow is missing.
        FileNotFoundError: no such folder.
        ValueError: no images, images in the folder and below, mixed sizes or kinds, a file that is not a single image
            without transparency; path, expected and found are named.
    """
    size = None if size is None else whole(size, "size in pixels", otherwise="None to keep images as they are")
    folder = existing(path, folder=True)
    tree, checksums = listed(folder, _SUFFIXES, "images", _OTHERS), dict[str, str]()
    first = (read := partial(_image, size=size, grey=grey, first=None))(tree.files[0])
    read, deep = partial(read, first=(first, tree.files[0].name)), first.dtype != torch.uint8
    if lazy or (lazy is None and len(tree.files) * first.numel() > KEPT):
        for file in tree.files:
            opened(existing(file), decode=False)
        shape = (len(tree.files), *first.shape)
        samples = Split(Each([str(file) for file in tree.files], read, shape, first.dtype), tree.labels)
    else:
        samples = Split(torch.stack([read(file) for file in tree.files]), tree.labels)
        if len(tree.files) <= _MANY:
            checksums = {str(file.relative_to(folder)): f"{zlib.crc32(file.read_bytes()):08x}" for file in tree.files}
    levels, own, both = 65_536 if deep else 256, folder.resolve().name, (str(path), str(path))
    (samples,), text = beside(captions, samples, names=[str(file.relative_to(folder)) for file in tree.files])
    if codec is not None:
        if codec.levels != levels:
            kind, cure = f"{16 if deep else 8}-bit images", "Give the values themselves: data=arrays."
            raise misfit(folder, f"samples of {codec}", kind, cure)
        return replace(given(own, tree.held_out(samples), codec, tree.names), text=text)
    splits, scaling = tree.split(samples, test_fraction, seed), Scaling(levels=levels)
    facts: dict[str, Any] = {"class_names": tree.names, "files": both, "checksums": checksums, "text": text}
    return Dataset(own, *splits, scaling, count_classes(samples), **facts)


def _image(file: Path | str, size: int | None, grey: bool | None, first: tuple[Tensor, str] | None) -> Tensor:
    """(C, H, W) uint8 or int32 of the same size and kind as `first`."""
    file = existing(file)
    image = pixels(file, opened(file), size, grey)
    if first is not None:
        like = first[0].numpy()
        _check(image, like if like.dtype == np.uint8 else like.astype(np.uint16), file, first[1])
    return torch.from_numpy(image if image.dtype == np.uint8 else image.astype(np.int32))


def _check(image: np.ndarray, first: np.ndarray, file: Path, name: str) -> None:
    """Refuses an image of another kind or size than the first, which is called `name`."""
    if image.dtype != first.dtype or len(image) != len(first):
        cure = ", or make all of them grey by grey=True" if image.dtype == first.dtype else ""
        raise misfit(file, f"{in_words(first)} as {name} is", in_words(image), f"Convert it first{cure}.")
    if image.shape != first.shape:
        expected = f"{in_pixels(first)} pixels as in {name}"
        raise misfit(file, expected, in_pixels(image), "Give size=… to cut and resize all of them.")
