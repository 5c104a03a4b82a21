"""Loggers of a run: `metrics.jsonl` is the record; any other, like Weights & Biases, shows a copy of it."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from .publish import publish

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFacts:
    """What a logger needs to know about its run.

    Attributes:
        folder: the output folder.
        id: of the run in a view; it follows the folder, see `identity`.
        config: resolved configuration.
        group: name of the sweep the run belongs to, None for none.
        resume_step: step of the checkpoint that is continued, 0 for a fresh run.
        work: what is done: "train", "evaluate" …; W&B's job type.
    """

    folder: Path
    id: str
    config: Mapping[str, Any]
    group: str | None = None
    resume_step: int = 0
    work: str = "train"


class Logger:
    """Takes numbers, pictures and tables of a run, between `start` and `close`; this one keeps nothing of them."""

    def start(self, facts: RunFacts) -> None:
        """Begins, or continues, the run."""

    def log(self, values: Mapping[str, float], *, step: int, images: int) -> None:
        """One row: named numbers after `step` optimizer steps on `images` images."""

    def image(self, key: str, path: Path, *, step: int, images: int) -> None:
        """A picture file."""

    def table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A small table."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final numbers of the run."""

    def sync(self) -> None:
        """What was logged outlives a power cut. Called before a checkpoint is published."""

    def close(self, failed: bool = False) -> None:
        """Ends the run; nothing may be logged afterwards."""


class NullLogger(Logger):
    """Keeps nothing."""


class JsonlLogger(Logger):
    """`metrics.jsonl`: one JSON object per line; the first holds versions, hardware and commit.

    On resuming, rows after the checkpoint's step, rows of a final evaluation (marked `final`) and a line cut by a
    crash are taken out, so every row stands there once, whatever happened in between. Pictures, tables and final
    numbers are files of the output folder already.

    Every row is written to the operating system at once, so a process that is killed loses none. `sync` puts the rows
    on the disk. It is called before a checkpoint is published, so a power cut takes only rows that training from that
    checkpoint writes again. Rows that a full or failing disk refuses wait in memory and are tried again at every later
    row; one warning says so, and `close` says which are missing if they were never written.

    Args:
        view: is passed everything, too, after it was written; None for no view.

    Raises:
        OSError: from `start`, if the file cannot be written; the one that was there is left as it is.
        RuntimeError: from `log` and `sync`, before `start` or after `close`.
    """

    def __init__(self, view: Logger | None = None) -> None:
        self.view = NullLogger() if view is None else view
        self._file: FileIO | None = None
        self._waiting = bytearray()  # what the file has not taken yet; a torn line goes on where it stopped
        self._missing_from: int | None = None

    def start(self, facts: RunFacts) -> None:
        path, last = facts.folder / "metrics.jsonl", facts.resume_step
        content, kept = _content(path) if last else b"", b""
        for line, row in zip(content.splitlines(), parse_rows(content), strict=True):
            if row is None:
                _log.warning("%s: a line that was cut is left out: %.60r", path, line)
            elif not (row.get("final") or (isinstance(row.get("step"), (int, float)) and row["step"] > last)):
                kept += line + b"\n"
        publish(path, kept + _line({"header": provenance(), "id": facts.id, "step": last}))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self.view.start(facts)

    def log(self, values: Mapping[str, float], *, step: int, images: int) -> None:
        file = self._open()
        self._waiting += _line({"step": step, "images": images, "time": round(time.time(), 3), **values})
        self._write(file, step)
        self.view.log(values, step=step, images=images)

    def image(self, key: str, path: Path, *, step: int, images: int) -> None:
        self.view.image(key, path, step=step, images=images)

    def table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self.view.table(key, columns, rows)

    def summary(self, values: Mapping[str, Any]) -> None:
        self.view.summary(values)

    def sync(self) -> None:
        file = self._open()
        self._write(file)
        try:
            os.fsync(file.fileno())
        except OSError as error:
            _log.warning("metrics.jsonl may not be on the disk yet (%s); the run goes on.", error)
        self.view.sync()

    def close(self, failed: bool = False) -> None:
        if self._file is None:
            return
        self._write(self._file)
        if self._waiting:
            count = self._waiting.count(b"\n")
            _log.error("metrics.jsonl lacks its last %d rows, from step %s on.", count, self._missing_from)
        self._file.close()
        self._file, self._waiting, self._missing_from = None, bytearray(), None
        self.view.close(failed)

    def _open(self) -> FileIO:
        if self._file is None:
            raise RuntimeError("metrics.jsonl is not open: call start before log, and nothing after close.")
        return self._file

    def _write(self, file: FileIO, step: int | None = None) -> None:
        try:
            while self._waiting:
                del self._waiting[: os.write(file.fileno(), self._waiting)]
        except OSError as error:
            if self._missing_from is None:
                self._missing_from = step
                cure = "The run goes on; rows wait in memory until they can be written."
                _log.warning("metrics.jsonl does not take the row of step %d (%s). %s", step, error, cure)
            return
        if self._missing_from is not None:
            _log.warning("metrics.jsonl has every row again: those from step %d on waited.", self._missing_from)
            self._missing_from = None


def _line(row: Mapping[str, Any]) -> bytes:
    # NaN and infinity are not JSON: as text they do not make the file unreadable
    finite = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return _ENCODER.encode(finite).encode() + b"\n"


def plain(value: Any) -> float | str:
    """What JSON cannot hold: a number of NumPy or torch as a float; any other value, NaN and infinity as text."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return number if math.isfinite(number) else str(number)


_ENCODER = json.JSONEncoder(default=plain, allow_nan=False)


def parse_rows(content: bytes) -> list[dict[str, Any] | None]:
    """The rows of a metrics file, headers included, by line; None for a line that is no row, as one cut by a crash."""
    rows: list[dict[str, Any] | None] = []
    for line in content.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # so is the error of bytes that are no text
            row = None
        rows.append(row if isinstance(row, dict) else None)
    return rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, headers included; what is no row is left out. [] if there is no file."""
    return [row for row in parse_rows(_content(path)) if row is not None]


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def provenance() -> dict[str, Any]:
    """Versions, hardware and commit, without which a number cannot be reproduced."""
    import numpy
    import torch

    from .. import __version__

    return {
        "scoresde": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
    }


def _commit() -> str | None:
    """Commit of the checkout that scoresde is imported from, with '+' if it was changed; None elsewhere."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    describe = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(describe, cwd=here, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def identity(folder: Path, config: Mapping[str, Any], *, wanted: str | None = None) -> str:
    """The id of the run in `folder`: the one `wanted`, else the last that metrics.jsonl has, else a new one.

    It stays in the folder, so a run that is continued, with whatever command, is the same run in a view, and one that
    replaced another is not. A folder from before ids were kept goes by `run_id`, as it did then.

    Args:
        config: of the run, without the keys that say where and how to log.
    """
    rows = read_rows(folder / "metrics.jsonl")
    kept = [row["id"] for row in rows if "header" in row and isinstance(row.get("id"), str)]
    new = run_id(config if rows else {**config, "started": time.time_ns()}, folder)
    return wanted or next(reversed(kept), new)


def run_id(config: Mapping[str, Any], folder: Path) -> str:
    """First 12 hex digits of SHA-1 over the configuration and the last two parts of the output folder's path."""
    text = json.dumps([config, folder.resolve().parts[-2:]], sort_keys=True)
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()[:12]
