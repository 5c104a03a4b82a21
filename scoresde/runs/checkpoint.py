"""Checkpoints: a folder of safetensors and JSON, complete or absent.

`checkpoints/step-00001234/` holds one `.safetensors` file per group of tensors, one `.json` file per record, and
`manifest.json` with the size and SHA-256 of each. It is written under a temporary name, every file and the folder
are synced, and one rename publishes it: at whatever instant training is killed, the newest `step-…` folder is whole (an
old one may be half removed, which the manifest shows). Nothing in it is pickled, so reading one runs no code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checks import whole
from .publish import sync

_NAME = re.compile(r"step-([0-9]{8,})")
_ABANDONED = re.compile(r"\.(step-[0-9]{8,})\.(new|old|gone)")
_RECORD_BYTES = 16 << 20  # a record is a configuration or some counters
FORMAT = 1
Groups = Mapping[str, Mapping[str, Tensor]]  # name of the group -> name of the tensor -> tensor
_log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or of another run; the message names the folder and the reason."""


class NewerFormat(CheckpointError):
    """A later version of scoresde wrote the checkpoint; resuming from an older one would overwrite it."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint folder.

    Attributes:
        path: the folder.
        step: its step number.
        tensors: group name -> tensor name -> tensor, on the CPU.
        records: record name -> JSON value.
        score: what it was saved with.
    """

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]] = field(repr=False)
    records: dict[str, Any] = field(repr=False)
    score: float | None = None


def save(
    folder: Path,
    step: int,
    tensors: Groups,
    records: Mapping[str, Any],
    *,
    keep_last: int = 2,
    keep_best: int = 0,
    score: float | None = None,
) -> Path:
    """Writes `folder/step-XXXXXXXX`, then deletes what need not be kept. Returns its path.

    Args:
        folder, step, tensors, records: see `Checkpoint`.
        keep_last: how many of the newest up to this one stay, ≥ 1.
        keep_best: how many of those with the lowest score stay besides, ≥ 0.
        score: of this checkpoint; None if it has none.

    Raises:
        ValueError: keep_last < 1 or keep_best < 0.
        CheckpointError: it could not be written (a full disk, say); earlier checkpoints are unchanged.
    """
    from safetensors import SafetensorError

    whole(keep_last, "keep_last")
    whole(keep_best, "keep_best", 0)
    final = folder / f"step-{step:08d}"
    new, old = folder / f".{final.name}.new", folder / f".{final.name}.old"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        _write(new, step, tensors, records, score)
        if final.exists():  # a damaged one that training has come past again
            os.rename(final, old)
        os.rename(new, final)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        raise CheckpointError(f"{final} could not be written: {error}. {_room(folder, tensors)}") from error
    sweep(folder)
    # a later step is a damaged one that was passed over: it must not push out a whole one
    found = [path for path in _newest_first(folder) if _step(path) <= step]
    kept = {*found[:keep_last], *_best_first(found)[:keep_best]}
    for path in found:
        if path not in kept:
            _delete(path)
    return final


def _write(new: Path, step: int, tensors: Groups, records: Mapping[str, Any], score: float | None) -> None:
    """Makes the folder `new` with every file of a checkpoint, and waits until all of it is on the disk."""
    from safetensors.torch import save_file

    new.mkdir()
    for name, group in tensors.items():
        # a copy of each, because safetensors refuses tensors that share memory (tied weights)
        path = new / f"{name}.safetensors"
        save_file({k: v.detach().cpu().clone().contiguous() for k, v in group.items()}, path)
        # safetensors makes files that only their owner can read; what the umask allows is read from the folder,
        # because asking for the umask changes it, for every thread
        os.chmod(path, new.stat().st_mode & 0o666)
    for name, record in records.items():
        (new / f"{name}.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    files = {path.name: _fingerprint(path) for path in sorted(new.iterdir())}
    manifest: dict[str, Any] = {"format": FORMAT, "step": step, "score": score, "files": files}
    manifest["sha256"] = _digest(manifest)
    (new / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in [*new.iterdir(), new]:
        sync(path)


def _room(folder: Path, tensors: Groups) -> str:
    needed = sum(value.numel() * value.element_size() for group in tensors.values() for value in group.values())
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    return f"It takes {needed / 2**20:.1f} MiB, and {free / 2**20:.1f} MiB are free there."


def _best_first(paths: Iterable[Path]) -> list[Path]:
    """The checkpoints that have a score that can be read, the lowest first."""
    scores: dict[Path, float] = {}
    for path in paths:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, OverflowError):
            score = _read(path / "manifest.json")["score"]
            if math.isfinite(score):
                scores[path] = score
    return sorted(scores, key=scores.__getitem__)


def best(folder: Path | str) -> Checkpoint | None:
    """The whole checkpoint with the lowest score, None if none has one."""
    return next(_readable(_best_first(_newest_first(Path(folder)))), None)


def _delete(path: Path) -> None:
    """Hides the folder by a rename before it is removed, so that nobody sees half a checkpoint."""
    gone = path.with_name(f".{path.name}.gone")
    try:
        os.rename(path, gone)
        shutil.rmtree(gone)
    except OSError as error:
        _log.warning("An old checkpoint, %s, could not be deleted: %s", path, error)


def load(path: Path | str) -> Checkpoint:
    """Reads one checkpoint folder after comparing every file with the manifest.

    Raises:
        CheckpointError: a file is missing, was cut or changed, or is no checkpoint.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    try:
        manifest = _read(path / "manifest.json")
        version, step, files = manifest.get("format", 0), manifest["step"], manifest["files"]
        if not (type(version) is type(step) is int and step >= 0 and isinstance(files, dict)):
            raise TypeError(f"format={version!r:.40}, step={step!r:.40}, files={files!r:.40}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no whole checkpoint: its manifest.json cannot be read: {error}") from error
    # format 0 had none, so a manifest that has one and says 0 is damaged; later formats have to keep it
    if (version or "sha256" in manifest) and manifest.get("sha256") != _digest(manifest):
        raise CheckpointError(f"{path / 'manifest.json'} is not what was written: its own SHA-256 differs.")
    if version > FORMAT:
        raise NewerFormat(
            f"{path} has format {version}, and this version of scoresde reads up to {FORMAT}: use a newer scoresde."
        )
    if _NAME.fullmatch(path.name) and _step(path) != step:
        raise CheckpointError(f"{path}: its manifest.json is of step {step}, so one of the two was changed.")
    tensors, records = {}, {}
    for name, expected in files.items():
        stem, suffix = os.path.splitext(name)
        if Path(name).name != name or suffix not in (".safetensors", ".json"):
            raise CheckpointError(f"{path}: the manifest names {name!r:.80}, which is no file of a checkpoint.")
        try:
            _compare(path / name, expected)
            if suffix == ".json":
                records[stem] = _read(path / name)
            else:
                # copies: what is loaded is mapped from the file, which later saves remove
                mapped = load_file(path / name)
                tensors[stem] = {key: value.clone() for key, value in mapped.items()}
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{path}{os.sep}{name:.80} cannot be used: {error!s:.500}") from error
    return Checkpoint(path, step, tensors, records, manifest.get("score"))


def latest(folder: Path | str) -> Checkpoint | None:
    """The newest whole checkpoint of `folder`; a damaged one is passed over with one warning. None if there is none.

    Raises:
        NewerFormat: a later version of scoresde wrote the newest one.
    """
    return next(_readable(_newest_first(Path(folder))), None)


def _readable(paths: Iterable[Path]) -> Iterator[Checkpoint]:
    for path in paths:
        try:
            yield load(path)
        except NewerFormat:
            raise
        except CheckpointError as error:
            _log.warning("Damaged checkpoint passed over: %s", error)


def _newest_first(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def sweep(folder: Path) -> None:
    """Removes what a killed save left. An `.old` folder is put back if no new one took its place."""
    for path in folder.iterdir():
        match = _ABANDONED.fullmatch(path.name)
        if match is None:
            continue
        if match[2] == "old" and not (folder / match[1]).exists():
            os.rename(path, folder / match[1])
        else:
            shutil.rmtree(path, ignore_errors=True)


def _digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without the line that holds it."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> Any:
    """The JSON value in a file.

    Raises:
        OSError: it is not a regular file, or cannot be read.
        ValueError: it is not JSON, or not as `save` writes it: it is huge, nested too deep, or has a key twice.
    """
    if _size(path) > _RECORD_BYTES:
        raise ValueError(f"{path.name} is larger than {_RECORD_BYTES >> 20} MiB")
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deep") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _size(path: Path) -> int:
    """Bytes of a regular file: a link may lead anywhere, and a pipe would keep the reader for ever."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{path.name} is no regular file")
    return status.st_size


def _compare(path: Path, expected: Any) -> None:
    """Refuses (by a ValueError) a file that is not the one in the manifest; a file of another size is not read."""
    size = _size(path)
    if not (isinstance(expected, dict) and expected.get("bytes") == size and _fingerprint(path) == expected):
        raise ValueError("it is not what was written: its size or SHA-256 differs from the manifest")


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
