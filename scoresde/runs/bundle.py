"""One safetensors file of tensors and records, which is checked when it is read. Nothing in it is pickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import CheckpointError, NewerFormat
from .publish import publish

FORMAT = 1


def write(path: Path, tensors: Mapping[str, Tensor], records: Mapping[str, Any]) -> None:
    """Publishes a file of tensors and JSON values, and a SHA-256 of them all.

    Raises:
        OSError: it could not be written; what was there before is unchanged.
    """
    from safetensors.torch import save

    # a copy of each, because safetensors refuses tensors that share memory (tied weights)
    whole = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    text = json.dumps(records, sort_keys=True)
    stamp = {"format": str(FORMAT), "records": text, "sha256": _digest(whole, text)}
    publish(path, save(whole, stamp))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, records) of such a file.

    Raises:
        CheckpointError: it is no such file, or is not what was written.
        NewerFormat: a later version of scoresde wrote it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if not path.is_file():
            raise OSError("it is no regular file")
        with safe_open(path, "pt") as file:
            stamp = file.metadata() or {}
            # copies, because what is read is mapped from the file, which may be replaced
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if int(stamp["format"]) > FORMAT:
            raise NewerFormat(f"{path} has format {stamp['format']}, and this scoresde reads up to {FORMAT}.")
        if stamp["sha256"] != _digest(tensors, stamp["records"]):
            raise ValueError("its SHA-256 differs from what was written")
        records = json.loads(stamp["records"])
        if not isinstance(records, dict):
            raise ValueError("its records are no mapping")
    except (OSError, ValueError, KeyError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{path} is no whole file of scoresde: {error!s:.500}.") from error
    return tensors, records


def records_of(path: Path) -> dict[str, Any]:
    """The records of a file that `read` has found to be whole; its tensors are not read."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["records"])
    return found


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    found = hashlib.sha256(text.encode())
    for name, value in sorted(tensors.items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.flatten().view(torch.uint8).numpy().data if value.numel() else b"")
    return found.hexdigest()
