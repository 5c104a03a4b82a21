"""Files as users name them, and those that are not what their name says."""

from __future__ import annotations

from pathlib import Path

import numpy as np

_LFS = b"version https://git-lfs"


def existing(path: str | Path, *, folder: bool = False) -> Path:
    """`path` with `~` expanded, or an error that says what is there instead.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a file where a folder is expected, or the reverse.
    """
    path = Path(path).expanduser()
    kind = "folder" if folder else "file"
    if not path.exists():
        near = next(parent for parent in path.absolute().parents if parent.exists())
        raise FileNotFoundError(f"There is no {kind} {path.absolute()} (the nearest folder that exists is {near}).")
    if path.is_dir() != folder:
        raise ValueError(f"{path}: expected a {kind}, found a {'folder' if path.is_dir() else 'file'}.")
    return path


def refuse_lfs_pointer(path: Path) -> None:
    """Refuses the text stub that a Git-LFS checkout leaves where the file itself was not fetched.

    Raises:
        ValueError: it is one, or the file is empty.
    """
    with path.open("rb") as file:
        start = file.read(len(_LFS))
    if start.startswith(_LFS):
        raise ValueError(f"{path} is a Git-LFS pointer, not the data: run 'git lfs pull' in its repository.")
    if not start:
        raise ValueError(f"{path} is empty (0 bytes).")


def read_array(file: Path) -> np.ndarray:
    """The numbers of a .npy file; nothing is unpickled.

    Raises:
        ValueError: a damaged or other file, or an array of anything else.
    """
    refuse_lfs_pointer(file)
    try:
        values = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{file}: expected an array of numbers, found a damaged or other file ({error}).") from error
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf":
        found = f"dtype {values.dtype}" if isinstance(values, np.ndarray) else "several arrays (.npz)"
        raise ValueError(f"{file}: expected an array of numbers, found {found}.")
    return values
