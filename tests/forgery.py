"""Checkpoints whose manifest fits what was put into them: `from forgery import forge`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def fingerprint(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def sign(path: Path, manifest: dict[str, Any]) -> None:
    """The manifest's own checksum keeps out accidents, not an author."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    manifest = {**rest, "sha256": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


def forge(path: Path, name: str, data: bytes) -> None:
    """Puts `data` in a checkpoint, and makes its manifest fit."""
    (path / name).write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = fingerprint(data)
    sign(path, manifest)
