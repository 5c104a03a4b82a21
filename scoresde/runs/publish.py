"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def publish(path: Path, content: bytes | str) -> None:
    """Writes a file under a temporary name, syncs it and renames it to `path`, whose folder exists.

    Whoever looks sees the old file or the new one, also after a kill or a power cut, and any number of processes may
    publish the same file at once. Text is written as UTF-8.

    Raises:
        OSError: the file could not be written; what was there before is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until what was written to the file or folder `path` is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
