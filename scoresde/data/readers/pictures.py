"""One picture of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from .source import existing, misfit

_GREY = {"1": "L", "L": "L", "I;16": "I;16", "I;16B": "I;16"}


def read_image(path: str | Path, channels: int, *, deep: bool = False) -> Tensor:
    """One 8-bit image without transparency, (channels, H, W) uint8, turned as its orientation tag says.

    Args:
        path: the file.
        channels: 1 for grey (also stored as colour), 3 for colour.
        deep: a grey image may have 16 bits; it is int32 then.

    Raises:
        ImportError: pillow is missing.
        FileNotFoundError: no such file.
        ValueError: it is something else; path, expected and found are named.
    """
    file = existing(path)
    image = opened(file)
    values = pixels(file, image, None, channels == 1)
    if values.dtype != np.uint8:
        if not deep:
            raise misfit(file, "a single 8-bit image", "16 bits a channel", "Convert it first.")
        return torch.from_numpy(values.astype(np.int32))
    if channels == 1 and (np.asarray(image.convert("RGB")) != values.transpose(1, 2, 0)).any():
        raise misfit(file, "a grey image", "colours", "Convert it first.")
    return torch.from_numpy(values)


def in_pixels(image: Any) -> str:
    """The size of an image (C, H, W), as it is written."""
    return f"{image.shape[2]} × {image.shape[1]}"


def in_words(image: np.ndarray) -> str:
    """What an image (C, H, W) is."""
    if len(image) == 3:
        return "an 8-bit RGB image"
    return "an 8-bit grey image (mode L)" if image.dtype == np.uint8 else "a grey image of 16 bits a channel"


def pixels(file: Path, image: Any, size: int | None, grey: bool | None) -> np.ndarray:
    """(C, H, W) uint8, or uint16 of a grey image that has as many bits.

    Args:
        file: where it is, for messages.
        image: see `opened`.
        size: of the largest central square, to which it is resized; None for all of it.
        grey: make one channel, or refuse grey ones; None for what the image is of itself.
    """
    transparent = "A" in image.getbands() or "transparency" in image.info
    own = _GREY.get(image.mode, "RGB")
    wanted = ("L", "I;16", "RGB") if grey else ("RGB",) if grey is not None else (own,)
    if image.mode not in (*_GREY, "RGB", "P") or transparent or own not in wanted:
        depth = " (16 bits a channel)" if own == "I;16" else ""
        found = f"mode {image.mode}{depth}{' with transparency' if transparent else ''}"
        advice = " A folder of grey images is read with grey=True." if own != "RGB" and not transparent else ""
        expected = "an 8-bit RGB image" if grey is False else "a grey or RGB image"
        raise misfit(file, expected, found, f"Convert it first.{advice}")
    image = image if own == "I;16" else image.convert("L" if grey else own)
    if size is not None:
        image = squared(image, size)
    values = np.array(image)
    if own == "I;16":
        return np.rint(values).clip(0, 65535).astype(np.uint16)[None]
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)


def squared(image: Any, size: int) -> Any:
    """The largest central square, resized to size × size."""
    from PIL.Image import Resampling

    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image if image.mode in ("L", "RGB") else image.convert("F")
    return image.resize((size, size), Resampling.LANCZOS, box=(left, top, left + side, top + side))


def opened(file: Path, content: BinaryIO | None = None, *, decode: bool = True) -> Any:
    """The image, decoded and turned as its orientation tag says; one that is not read whole is refused.

    Args:
        file: where it is, for messages.
        content: what is read in its place.
        decode: False to look at the head alone, and return None.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("Images are read with pillow: pip install 'scoresde[data]'.") from error
    try:
        with Image.open(content or file) as image:
            lost = _lost(image)
            whole = ImageOps.exif_transpose(image) if decode and not lost else None
    except Exception as error:  # a damaged file may raise anything
        raise misfit(file, "an image", f"a damaged or other file ({error})") from error
    if lost:
        raise misfit(file, "a single image of 8 bits (or 16, if it is grey)", lost, "Convert it first.")
    return whole


def _lost(image: Any) -> str:
    """What pillow would leave out without a word, of an image that is opened and not yet decoded."""
    if (frames := getattr(image, "n_frames", 1)) > 1:
        return f"{frames} frames"
    if image.format == "TIFF":
        bits, formats, extra = (
            image.tag_v2.get(tag, default) for tag, default in ((258, (1,)), (339, (1,)), (338, ()))
        )
        if max(bits) > 8 and image.mode not in _GREY:
            return f"{max(bits)} bits a channel"
        if set(formats) != {1}:
            return "signed or other numbers"
        return "further channels" if extra and "A" not in image.mode else ""
    deep = image.mode not in _GREY and any(str(tile[3]).endswith(";16B") for tile in image.tile)
    return "16 bits a channel" if deep else ""
