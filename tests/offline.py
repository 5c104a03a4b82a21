"""Reads what an offline Weights & Biases run left: `from offline import offline_runs`."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class OfflineRun:
    """The transaction log of one run.

    Attributes:
        folder: `wandb/offline-run-…`.
        id, group, name, project, entity, job_type, tags, notes: as given to `wandb.init`.
        host: of the machine, as W&B shows it.
        config: key -> value.
        history: one dict per `log`.
        summary: key -> value of explicit updates.
        stats: one dict per reading of the machine.
        exit_code: None if the run was never closed.
    """

    folder: Path
    id: str = ""
    group: str = ""
    name: str = ""
    project: str = ""
    entity: str = ""
    job_type: str = ""
    tags: list[str] = field(default_factory=list)
    notes: str = ""
    host: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    stats: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None


def offline_runs(folder: Path, pattern: str = "offline-run-*") -> list[OfflineRun]:
    """The offline runs below `folder/wandb`, oldest first; `*run-*` takes the logs of online ones, too."""
    return [_read(path) for path in sorted(folder.glob(f"wandb/{pattern}/*.wandb"))]


def closed_runs(folder: Path, count: int, seconds: float = 600.0) -> list[OfflineRun]:
    """`offline_runs`, once there are `count` and each is closed: a view outlives a training that was killed."""
    deadline = time.monotonic() + seconds
    while len(runs := offline_runs(folder)) < count or any(run.exit_code is None for run in runs):
        assert time.monotonic() < deadline, f"after {seconds} s: {[(run.folder.name, run.exit_code) for run in runs]}"
        time.sleep(0.1)
    return runs


def _read(path: Path) -> OfflineRun:
    from wandb.proto.wandb_internal_pb2 import Record

    run = OfflineRun(path.parent)
    for data in _records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            new = record.run
            run.id, run.group, run.name = new.run_id, new.run_group, new.display_name
            run.project, run.entity, run.job_type, run.host = new.project, new.entity, new.job_type, new.host
            run.tags, run.notes = list(new.tags), new.notes
            run.config |= {item.key: json.loads(item.value_json) for item in new.config.update}
        elif kind == "history":
            run.history.append(_items(record.history.item))
        elif kind == "summary":
            run.summary |= _items(record.summary.update)
        elif kind == "stats":
            run.stats.append({item.key: json.loads(item.value_json) for item in record.stats.item})
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def _items(items: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def _records(data: bytes) -> Iterator[bytes]:
    """LevelDB log format in blocks of 32 KiB: CRC (4), length (2), type (1): 1 whole, 2 first, 3 middle, 4 last.

    A log that is being written may end within a record: what is not whole yet is left out.
    """
    position, parts = 7, b""  # after W&B's own header
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # too little is left of a block for a header
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        part = data[position + 7 : position + 7 + length]
        position += 7 + length
        if position > len(data):
            return
        if kind in (1, 2):
            parts = b""
        parts += part
        if kind in (1, 4):
            yield parts
