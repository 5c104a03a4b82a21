"""Files as users name them, and those that are not what their name says."""

from __future__ import annotations

from pathlib import Path

import numpy as np

_LFS = b"version https://git-lfs"


def misfit(where: object, expected: object, found: object, advice: str = "") -> ValueError:
    """The error of a file or an option `where` that holds something else than expected; `advice` is a sentence."""
    return ValueError(f"{where}: expected {expected}, found {found}.{advice and f' {advice}'}")


def existing(path: str | Path, *, folder: bool = False) -> Path:
    """`path` with `~` expanded, or an error that says what is there instead.

    A file that is empty, or the text stub that a Git-LFS checkout leaves where the file was not fetched, is refused.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a file where a folder is expected, or the reverse; or a file without data.
    """
    path = Path(path).expanduser()
    kind, other = ("folder", "file") if folder else ("file", "folder")
    if not path.exists():
        near = next(parent for parent in path.absolute().parents if parent.exists())
        raise FileNotFoundError(f"There is no {kind} {path.absolute()} (the nearest folder that exists is {near}).")
    if path.is_dir() != folder:
        raise misfit(path, f"a {kind}", f"a {other}")
    if not folder:
        with path.open("rb") as file:
            start = file.read(len(_LFS))
        if start == _LFS:
            raise ValueError(f"{path} is a Git-LFS pointer, not the data: run 'git lfs pull' in its repository.")
        if not start:
            raise ValueError(f"{path} is empty (0 bytes).")
    return path


def read_array(file: Path) -> np.ndarray:
    """The numbers of a .npy file; nothing is unpickled.

    Raises:
        ValueError: a damaged or other file, or an array of anything else.
    """
    try:
        values = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise misfit(file, "an array of numbers", f"a damaged or other file ({error})") from error
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf":
        found = f"dtype {values.dtype}" if isinstance(values, np.ndarray) else "several arrays (.npz)"
        raise misfit(file, "an array of numbers", found)
    return values
