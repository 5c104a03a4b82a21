"""Which format a file is of, and its network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import diffusers_folder, edm
from .imported import Imported
from .pickles import ForeignFileError
from .torch_files import load, refusing

FORMATS = ("edm", "diffusers")


def read(path: Path | str, *, args: Mapping[str, Any] | None = None, format: str | None = None) -> Imported:
    """The network in a file of another project. Nothing in the file is executed.

    Args:
        path: of the file.
        args: what the file does not say: the constructor's arguments, flags or configuration, as its project has them.
        format: one of `FORMATS`; None finds out.

    Raises:
        ForeignFileError: it cannot be read, is of none of the formats, or needs arguments that are not given.
    """
    path = Path(path)
    if format is not None and format not in FORMATS:
        raise ForeignFileError(f"format is one of {', '.join(FORMATS)}; got {format!r}.")
    if path.is_dir():
        with refusing(path):
            return diffusers_folder.read(path, args)
    content = load(path)
    if not isinstance(content, dict):
        raise ForeignFileError(f"{path} holds a {type(content).__name__}, and no network.")
    with refusing(path):
        return edm.read(path, content)
