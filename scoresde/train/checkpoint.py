"""Checkpoints: a folder of safetensors and JSON, complete or absent.

`checkpoints/step-00001234/` holds one `.safetensors` file per group of tensors, one `.json` file per record, and
`manifest.json` with the size and SHA-256 of each. It is written under a temporary name, every file and the folder
are synced, and one rename publishes it: whoever is killed at whatever instant, the newest `step-…` folder is whole (an
old one may be half removed, which the manifest shows). Nothing in it is pickled, so reading one runs no code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

_NAME = re.compile(r"step-(\d{8,})")
_ABANDONED = re.compile(r"\.(step-\d{8,})\.(new|old)")
_log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint that is not there, not whole, or not of this run: says which folder and why."""


@dataclass(frozen=True)
class Checkpoint:
    """What a folder held.

    Attributes:
        path: the folder.
        step: its step number.
        tensors: group name -> tensor name -> tensor, on the CPU.
        records: record name -> JSON value.
    """

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]] = field(repr=False)
    records: dict[str, Any] = field(repr=False)


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    records: Mapping[str, Any],
    *,
    keep_last: int = 2,
) -> Path:
    """Writes `folder/step-XXXXXXXX`, then deletes all but the `keep_last` newest up to it. Returns its path.

    Raises:
        ValueError: keep_last < 1.
        CheckpointError: it could not be written (a full disk, say); earlier checkpoints are as they were.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if keep_last < 1:
        raise ValueError(f"keep_last is at least 1, or nothing could be resumed; got {keep_last}.")
    final = folder / f"step-{step:08d}"
    new, old = folder / f".{final.name}.new", folder / f".{final.name}.old"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        new.mkdir()
        for name, group in tensors.items():
            # a copy of each, because safetensors refuses tensors that share memory (tied weights)
            save_file({k: v.detach().cpu().clone().contiguous() for k, v in group.items()}, new / f"{name}.safetensors")
        for name, record in records.items():
            (new / f"{name}.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        manifest = {path.name: _fingerprint(path) for path in sorted(new.iterdir())}
        (new / "manifest.json").write_text(json.dumps({"step": step, "files": manifest}, indent=1), encoding="utf-8")
        for path in [*new.iterdir(), new]:
            sync(path)
        if final.exists():  # a damaged one that training has come past again
            os.rename(final, old)
        os.rename(new, final)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        free = shutil.disk_usage(folder).free if folder.is_dir() else 0
        raise CheckpointError(
            f"{final} could not be written: {error}. {free / 2**20:.0f} MiB are free there."
        ) from error
    _sweep(folder)
    # a later step is a damaged one that was passed over: it must not push out a whole one
    for path in [path for path in _newest_first(folder) if _step(path) <= step][keep_last:]:
        shutil.rmtree(path, ignore_errors=True)
    return final


def load(path: Path | str) -> Checkpoint:
    """Reads one checkpoint folder after comparing every file with the manifest.

    Raises:
        CheckpointError: a file is missing, was cut or changed, or is no checkpoint.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        step, files = int(manifest["step"]), dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} has no readable manifest.json ({error}), so it is not a whole checkpoint."
        ) from error
    if _NAME.fullmatch(path.name) and _step(path) != step:
        raise CheckpointError(f"{path}: its manifest.json is of step {step}, so one of the two was changed.")
    tensors, records = {}, {}
    for name, expected in files.items():
        stem, suffix = os.path.splitext(name)
        if Path(name).name != name or suffix not in (".safetensors", ".json"):
            raise CheckpointError(f"{path}: the manifest names {name!r}, which is no file of a checkpoint.")
        try:
            if _fingerprint(path / name) != expected:
                raise CheckpointError(
                    f"{path / name} is not what was written: its size or SHA-256 differs from the manifest."
                )
            if suffix == ".json":
                records[stem] = json.loads((path / name).read_text(encoding="utf-8"))
            else:
                # copies: load_file maps the file into memory, which later saves remove
                tensors[stem] = {key: value.clone() for key, value in load_file(path / name).items()}
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{path / name} cannot be read: {error}") from error
    return Checkpoint(path, step, tensors, records)


def latest(folder: Path | str) -> Checkpoint | None:
    """The newest whole checkpoint of `folder`; a damaged one is passed over with one warning. None if there is none."""
    return next(_readable(Path(folder)), None)


def _readable(folder: Path) -> Iterator[Checkpoint]:
    for path in _newest_first(folder):
        try:
            yield load(path)
        except CheckpointError as error:
            _log.warning("Damaged checkpoint passed over: %s", error)


def _newest_first(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _sweep(folder: Path) -> None:
    """Removes what a killed save left. An `.old` whose successor never came is put back."""
    for path in folder.iterdir():
        match = _ABANDONED.fullmatch(path.name)
        if match is None:
            continue
        if match[2] == "old" and not (folder / match[1]).exists():
            os.rename(path, folder / match[1])
        else:
            shutil.rmtree(path, ignore_errors=True)


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def sync(path: Path) -> None:
    """What was written to the file or folder `path` reaches the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
