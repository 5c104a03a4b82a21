"""The files of a folder: in sub-folders for training and for testing, in sub-folders for classes, or as they lie."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..dataset import Split, hold_out
from .source import existing, misfit

_log = logging.getLogger(__name__)
_TRAIN = ("train", "training")
_HELD_OUT = ("test", "testing", "validation", "valid", "val")  # the first that is there is the held-out split


class Tree(NamedTuple):
    """Files of samples, in order.

    Attributes:
        files: where they are.
        labels: (N,) int64, or None where they lie in no sub-folders for classes.
        names: of the classes.
        test: (N,) bool, those in a folder for held-out samples; None where there is none.
    """

    files: list[Path]
    labels: Tensor | None
    names: tuple[str, ...]
    test: Tensor | None

    def split(self, samples: Split, fraction: float, seed: int) -> tuple[Split, Split]:
        """(train, test) of the samples of these files: by their folders, or else held out by chance."""
        if self.test is None:
            return hold_out(samples, fraction, seed)
        return samples.select((~self.test).nonzero()[:, 0]), samples.select(self.test.nonzero()[:, 0])

    def held_out(self, samples: Split) -> Split:
        """Those that a model is measured on: of a folder for them, or all."""
        return samples if self.test is None else samples.select(self.test.nonzero()[:, 0])


def listed(folder: Path, suffixes: Collection[str], what: str, alike: Collection[str] = ()) -> Tree:
    """The files of a folder with one of the suffixes.

    They lie in it (no labels), or all in its sub-folders: one class each, in the order of their names. Or its
    sub-folders are train, and test or validation (val, valid), which hold them so, with the same classes in both: then
    test, or else validation, is held out. Hidden files and those with other suffixes are passed over; in a warning,
    where their suffix is among those `alike`.

    Args:
        folder: where they are.
        suffixes: of the files, in small letters.
        what: the files, for messages.
        alike: suffixes of files that may be meant too and are not read.

    Raises:
        ValueError: none, some in the folder and some below, or some deeper; classes without a training sample, or
            splits beside classes.
    """
    passed: list[Path] = []
    splits = {path.name.lower(): path for path in _folders(folder) if path.name.lower() in (*_TRAIN, *_HELD_OUT)}
    train = next((splits[name] for name in _TRAIN if name in splits), None)
    test = next((splits[name] for name in _HELD_OUT if name in splits), None)
    if train is None or test is None:
        files, classes = _part(folder, suffixes, what, alike, passed)
        held = None
    else:
        if others := [path.name for path in _folders(folder) if path.name.lower() not in splits]:
            advice = "Move them elsewhere, or rename these splits if they are classes."
            raise misfit(folder, f"{train.name} and {test.name} alone, as splits", ", ".join(others[:5]), advice)
        parts = [_part(path, suffixes, what, alike, passed) for path in (train, test)]
        files, classes = [[*a, *b] for a, b in zip(*parts, strict=True)]
        held = torch.arange(len(files), device="cpu") >= len(parts[0][0])
        if (None in parts[0][1]) != (None in parts[1][1]):
            raise misfit(folder, f"sub-folders for classes in both {train.name} and {test.name}", "them in one only")
        if unseen := sorted(set(filter(None, parts[1][1])) - set(filter(None, parts[0][1]))):
            raise misfit(test, f"classes of {train}", ", ".join(unseen[:5]))
        left = [path.name for path in splits.values() if path not in (train, test)]
        ignored = f"; {', '.join(left)} is left out" if left else ""
        _log.info("%s: trained on %s, %s is held out%s", folder, train.name, test.name, ignored)
    if passed:
        some = f"{', '.join(path.name for path in passed[:5])}{', …' if len(passed) > 5 else ''}"
        _log.warning("%s: %d files are passed over that are not read: %s. Convert them.", folder, len(passed), some)
    names = sorted(set(filter(None, classes)))
    labels = (
        torch.tensor([names.index(name) for name in classes if name], dtype=torch.int64, device="cpu")
        if names
        else None
    )
    return Tree(files, labels, tuple(names), held)


def _part(
    folder: Path, suffixes: Collection[str], what: str, alike: Collection[str], passed: list[Path]
) -> tuple[list[Path], list[str | None]]:
    """The files of one split, and the class of each."""

    def inside(entry: Path) -> list[Path]:
        files = [path for path in _visible(entry) if not path.is_dir()]
        passed.extend(path for path in files if path.suffix.lower() in alike)
        return [path for path in files if path.suffix.lower() in suffixes]

    here, below = inside(folder), _folders(folder)
    if deeper := [file for entry in below for inner in _folders(entry) for file in inside(inner)]:
        raise misfit(deeper[0], f"{what} in the folder or in its sub-folders", "one that lies deeper", "Move it up.")
    found = {entry: inside(entry) for entry in below}
    files = [file for entry in below for file in found[entry]]
    if here and files:
        raise ValueError(
            f"{folder}: {len(here)} {what} in the folder itself and more in {files[0].parent.name}/. Expected all in "
            "the folder (no labels) or all in sub-folders (one per class)."
        )
    if here:
        return here, [None] * len(here)
    if not files:
        raise misfit(folder, f"{what} ({', '.join(suffixes)}) in it or in its sub-folders", "none")
    if empty := [entry.name for entry, inner in found.items() if not inner]:
        raise ValueError(f"{folder}: the sub-folders are classes, but {', '.join(empty[:5])} holds no {what}.")
    return files, [file.parent.name for file in files]


def _folders(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if path.is_dir()]


def _visible(folder: Path) -> list[Path]:
    """What is in a folder besides hidden files, in order; a link that leads nowhere is refused."""
    paths = sorted(folder.glob("[!.]*"))
    for path in paths:
        if path.is_symlink() and not path.exists():
            existing(path)
    return paths
