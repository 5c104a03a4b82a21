"""What a user names in place of numbers: a file of them, a picture, held-out samples, or a mask."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .readers.pictures import in_pixels, read_image
from .readers.source import existing, misfit, read_array


def names_held_out(word: object) -> bool:
    """Whether a word is meant to name samples of the test split, as test:3 or test:0-7 do."""
    return isinstance(word, str) and word.startswith("test:")


def held_out(word: str, count: int, what: str) -> Tensor:
    """The indices of the samples that test:3 or test:0-7 names in a split of `count` samples.

    Raises:
        ValueError: the word names no samples, or more than are there; the message begins with `what`=`word`.
    """
    found = re.fullmatch(r"test:(\d+)(?:-(\d+))?", word)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if not first <= last < count:
        raise ValueError(f"{what}={word}: held-out samples are test:0 … test:{count - 1}, or a range test:0-7.")
    return torch.arange(first, last + 1, device="cpu")


def is_picture(path: str | Path) -> bool:
    """Whether a file holds a picture; any other holds an array of numbers, as .npy."""
    return Path(path).suffix != ".npy"


def read_sample(path: str, shape: Sequence[int], what: str, *, deep: bool = False) -> Tensor:
    """The values of one array of numbers or of one picture, float32 of `shape`.

    Args:
        path: the file, see `is_picture`.
        shape: expected; axes of size 1 in front may be left out or added.
        what: name of what is expected, for the messages.
        deep: values of a picture are of 16 bits, and one of 8 bits is brought there; else it has to have 8 bits.

    Raises:
        FileNotFoundError: no such file.
        ValueError: something else is in the file; the message names it, what was expected, and what was found.
    """
    file, shape = existing(path), tuple(shape)
    if is_picture(file):
        values = _pixels(file, shape, what, deep=deep)
        return 256 * values.float() + 127.5 if deep and values.dtype == torch.uint8 else values.float()
    array = read_array(file)
    if array.shape == (1, *shape) or (shape[0] == 1 and array.shape == shape[1:]):
        array = array.reshape(shape)
    if array.shape != shape:
        raise misfit(file, f"{what} of shape {shape}", array.shape)
    return torch.from_numpy(array.astype(np.float32))


def mask_in_file(path: str, event: Sequence[int]) -> Tensor:
    """(*event) bool, True where a sample is seen, of a file that is not 0 there.

    Args:
        path: .npy of the shape of a sample, or of one channel, or a picture for all channels.
        event: the shape of a sample.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the mask has another size, more than two values, or nothing is seen.
    """
    file, event, channel = existing(path), tuple(event), (1, *event[1:])
    if is_picture(file):
        values = _pixels(file, channel if len(event) == 3 else event, "a mask", " as the samples have", deep=True)
    else:
        values = torch.from_numpy(read_array(file).astype(np.float32))
        if not values.ndim or tuple(values.shape) not in {event, channel[1:], channel}:
            raise misfit(file, f"a mask of shape {event} as the samples have", tuple(values.shape))
    levels = values.unique().tolist()
    if len(levels) > 2 or (len(levels) == 2 and 0 not in levels):
        found = f"{len(levels)}: {', '.join(f'{v:g}' for v in levels[:4])}{' …' if len(levels) > 4 else ''}"
        raise misfit(file, "a mask of two values, 0 (not seen) and another", found, "JPEG blurs masks; use PNG.")
    if levels == [0]:
        raise misfit(file, "a mask that is not 0 where the input is seen", "nothing seen")
    return (values != 0).expand(event).clone()


def hole(words: str, event: Sequence[int]) -> Tensor:
    """(*event) bool, False in a rectangle and True elsewhere: hole:0-13x7-20 are rows 0 to 13 and columns 7 to 20.

    Raises:
        ValueError: the rectangle is not inside a sample, or hides all of it.
    """
    match = re.fullmatch(r"hole:(\d+)-(\d+)x(\d+)-(\d+)", words)
    top, bottom, left, right = map(int, match.groups()) if match else (1, 0, 1, 0)
    if len(event) != 3 or not (top <= bottom < event[1] and left <= right < event[2]):
        raise ValueError(
            f"mask={words}: expected rows and columns of samples of shape {tuple(event)}, counted from 0, as in "
            "hole:0-13x7-20."
        )
    seen = torch.ones(tuple(event), dtype=torch.bool, device="cpu")
    seen[:, top : bottom + 1, left : right + 1] = False
    if not bool(seen.any()):
        raise misfit(f"mask={words}", "some pixels that are seen", "none")
    return seen


def _pixels(file: Path, shape: tuple[int, ...], what: str, why: str = "", *, deep: bool = False) -> Tensor:
    """Values of a picture of `shape`: uint8, or int32 if it has 16 bits, which only `deep` allows."""
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(f"{file}: expected {what} of shape {shape}, as .npy; no picture holds it.")
    pixels = read_image(file, shape[0], deep=deep)
    if tuple(pixels.shape) != shape:
        raise misfit(file, f"{what} of {shape[2]} × {shape[1]} pixels{why}", in_pixels(pixels))
    return pixels
