"""Files as users name them, and those that are not what their name says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

MOST_NAMES = 50
"""How many arrays of a file a message names."""

_LFS = b"version https://git-lfs"


def misfit(where: object, expected: object, found: object, advice: str = "") -> ValueError:
    """The error of a file or an option `where` that holds something else than expected; `advice` is a sentence."""
    return ValueError(f"{where}: expected {expected}, found {found}.{advice and f' {advice}'}")


def existing(path: str | Path, *, folder: bool = False) -> Path:
    """`path` with `~` expanded, or an error that says what is there instead.

    A file that is empty, or the text stub that a Git-LFS checkout leaves where the file was not fetched, is refused.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a file where a folder is expected, or the reverse; a file without data; or no file at all.
    """
    path = Path(path).expanduser()
    kind, other = ("folder", "file") if folder else ("file", "folder")
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(f"{path} is a link to {os.readlink(path)}, and nothing is there. Mend or remove it.")
    if not path.exists():
        near = next(parent for parent in path.absolute().parents if parent.exists())
        raise FileNotFoundError(f"There is no {kind} {path.absolute()} (the nearest folder that exists is {near}).")
    if path.is_dir() != folder:
        raise misfit(path, f"a {kind}", f"a {other}")
    if not folder:
        if not path.is_file():  # a pipe would keep us waiting
            raise misfit(path, "a file", "a pipe or a device")
        with path.open("rb") as file:
            start = file.read(len(_LFS))
        if start == _LFS:
            raise ValueError(f"{path} is a Git-LFS pointer, not the data: run 'git lfs pull' in its repository.")
        if not start:
            raise ValueError(f"{path} is empty (0 bytes).")
    return path


def unpacked_bytes(packed: int) -> int:
    """How many bytes a compressed file of `packed` bytes may unpack to: 256 MiB, or 200 times as many.

    Zeros pack a thousandfold, and a small file of them would fill the memory; no data that are worth a model do.
    """
    return max(1 << 28, 200 * packed)


def only(path: Path, names: list[str]) -> str:
    """The name of the one array that a file holds beside those that have a key.

    Raises:
        ValueError: it holds none, or several.
    """
    if len(names) != 1:
        raise ValueError(f"{path} holds {_listed(names)}; choose one: data.key={next(iter(names), '…')}.")
    return names[0]


def absent(path: Path, key: str, names: list[str]) -> ValueError:
    """The error of a key that no array of a file has."""
    return ValueError(f"{path} has no array {key!r}; found {_listed(names)}.")


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:MOST_NAMES])}{', …' if len(names) > MOST_NAMES else ''}" or "no array"


@contextmanager
def explained(path: Path, expected: str) -> Iterator[None]:
    """NumPy's many ways to fail on a file, in two sentences.

    Raises:
        TypeError: it holds Python objects.
        ValueError: anything else is wrong.
    """
    try:
        yield
    except Exception as error:  # of zip, zlib, the header's parser, or of memory that a header asks for
        if "Object arrays" in str(error):
            raise TypeError(
                f"{path}: expected numbers, found dtype object (samples of several shapes, or Python objects). "
                "Store one array of numbers, all samples of one shape."
            ) from error
        said = str(error) or type(error).__name__
        raise misfit(path, expected, f"a damaged or other one ({said:.300})") from error


def read_array(file: Path, content: BinaryIO | None = None) -> np.ndarray:
    """The numbers of a .npy file, or of `content` in its place; nothing is unpickled.

    Raises:
        TypeError: it holds Python objects.
        ValueError: a damaged or other file, or an array of anything else than numbers.
    """
    with explained(file, "an array of numbers"):
        values = np.load(content or file, allow_pickle=False)
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf":
        found = f"dtype {values.dtype}" if isinstance(values, np.ndarray) else "several arrays (.npz)"
        raise misfit(file, "an array of numbers", found)
    return values
