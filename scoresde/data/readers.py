"""What a user names in place of numbers: a file of them, a picture, held-out samples, or a mask."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .folder import read_image
from .source import existing, read_array


@dataclass(frozen=True)
class HeldOut:
    """Samples of the test split, in words: test:3, or test:0-7."""

    words: str

    @staticmethod
    def named(word: object) -> bool:
        """Whether a word is meant to name held-out samples."""
        return isinstance(word, str) and word.startswith("test:")

    def index(self, count: int, what: str) -> Tensor:
        """Their indices in a split of `count` samples.

        Raises:
            ValueError: the words name no samples, or more than are there; the message begins with `what`.
        """
        found = re.fullmatch(r"test:(\d+)(?:-(\d+))?", self.words)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if not first <= last < count:
            raise ValueError(f"{what}: held-out samples are test:0 … test:{count - 1}, or a range test:0-7.")
        return torch.arange(first, last + 1)


@dataclass(frozen=True)
class SampleFile:
    """One array of numbers, as .npy, or one picture."""

    path: str

    @property
    def is_picture(self) -> bool:
        return Path(self.path).suffix != ".npy"

    def read(self, shape: Sequence[int], what: str) -> Tensor:
        """Its values, float32 of `shape`; axes of size 1 in front may be left out or added.

        Args:
            shape: expected.
            what: name of what is expected, for the messages.

        Raises:
            FileNotFoundError: no such file.
            ValueError: something else is in the file; the message names it, what was expected, and what was found.
        """
        file, shape = existing(self.path), tuple(shape)
        if self.is_picture:
            return _pixels(file, shape, what).float()
        values = read_array(file)
        if values.shape == (1, *shape) or (shape[0] == 1 and values.shape == shape[1:]):
            values = values.reshape(shape)
        if values.shape != shape:
            raise ValueError(f"{file}: expected {what} of shape {shape}, found {values.shape}.")
        return torch.from_numpy(values.astype(np.float32))


@dataclass(frozen=True)
class MaskFile:
    """A mask in a file, not 0 where a sample is seen: .npy of the shape of a sample, or a picture for all channels."""

    path: str

    def read(self, event: Sequence[int]) -> Tensor:
        """(*event) bool, True where a sample is seen.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the mask has another size, more than two values, or nothing is seen.
        """
        file, channel = existing(self.path), (1, *event[1:])
        if file.suffix == ".npy":
            values = torch.from_numpy(read_array(file).astype(np.float32))
            if tuple(values.shape) not in {tuple(event), channel[1:], channel} - {()}:
                raise ValueError(
                    f"{file}: expected a mask of shape {tuple(event)} as the samples have, found {tuple(values.shape)}."
                )
        else:
            expected = channel if len(event) == 3 else tuple(event)
            values = _pixels(file, expected, "a mask", " as the samples have")
        levels = values.unique().tolist()
        if len(levels) > 2 or (len(levels) == 2 and 0 not in levels):
            raise ValueError(
                f"{file}: expected a mask of two values, 0 (not seen) and another, found {len(levels)}: "
                f"{', '.join(f'{v:g}' for v in levels[:4])}{' …' if len(levels) > 4 else ''}. "
                "JPEG blurs masks; use PNG."
            )
        if levels == [0]:
            raise ValueError(f"{file}: expected a mask that is not 0 where the input is seen, found nothing seen.")
        return (values != 0).expand(tuple(event)).clone()


@dataclass(frozen=True)
class Hole:
    """A mask that hides one rectangle, in words: hole:0-13x7-20 are rows 0 to 13 and columns 7 to 20."""

    words: str

    def read(self, event: Sequence[int]) -> Tensor:
        """(*event) bool, True where a sample is seen.

        Raises:
            ValueError: the rectangle is not inside a sample, or hides all of it.
        """
        match = re.fullmatch(r"hole:(\d+)-(\d+)x(\d+)-(\d+)", self.words)
        top, bottom, left, right = map(int, match.groups()) if match else (1, 0, 1, 0)
        if len(event) != 3 or not (top <= bottom < event[1] and left <= right < event[2]):
            raise ValueError(
                f"mask={self.words}: expected rows and columns of samples of shape {tuple(event)}, counted from 0, as "
                "in hole:0-13x7-20."
            )
        seen = torch.ones(tuple(event), dtype=torch.bool)
        seen[:, top : bottom + 1, left : right + 1] = False
        if not bool(seen.any()):
            raise ValueError(f"mask={self.words}: expected some pixels that are seen, found none.")
        return seen


def _pixels(file: Path, shape: tuple[int, ...], what: str, why: str = "") -> Tensor:
    """uint8 values of a picture of `shape`."""
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(f"{file}: expected {what} of shape {shape}, as .npy; no picture holds it.")
    pixels = read_image(file, shape[0])
    if tuple(pixels.shape) != shape:
        found = f"{pixels.shape[2]} × {pixels.shape[1]}"
        raise ValueError(f"{file}: expected {what} of {shape[2]} × {shape[1]} pixels{why}, found {found}.")
    return pixels
