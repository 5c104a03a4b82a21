"""What a run folder keeps of its data, in one file that training writes at its start."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..config import build
from ..data import Dataset
from ..data.excerpt import excerpt, packed, unpacked
from . import bundle
from .checkpoint import CheckpointError

FILE = "excerpt.safetensors"


def keep(folder: Path, dataset: Dataset) -> None:
    """Writes the file, unless it is there.

    Raises:
        OSError: it could not be written.
    """
    if not (folder / FILE).exists():
        bundle.write(folder / FILE, *packed(excerpt(dataset)))


def recall(folder: Path, allow: Sequence[str] = ()) -> Dataset | None:
    """The excerpt in a run folder; None where there is none, as in folders of older versions.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return None
    tensors, record = bundle.read(path)
    try:
        return unpacked(tensors, record, build(record["codec"], allow, key="codec"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} holds no excerpt of data: {error!r:.300}.") from error
