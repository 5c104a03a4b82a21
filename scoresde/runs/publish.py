"""Files that are there whole or not at all, and reading what may be anything."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file under a temporary name; at the end of the `with` block it is synced and renamed to `path`.

    Whoever looks sees the old file or the new one, also after a kill or a power cut, and any number of processes may
    replace the same file at once. The folder of `path` exists.

    Raises:
        OSError: the file could not be written; what was there before is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        with open(temporary, "wb") as file:
            yield file
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def publish(path: Path, content: bytes | str) -> None:
    """`content` as the file `path`, by `replacing`; text is written as UTF-8."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync(path: Path) -> None:
    """Waits until what was written to the file or folder `path` is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def content_of(path: Path, limit: int = 16 << 20) -> bytes:
    """The bytes of a regular file. It waits for nobody: a pipe of this name is refused, and never opened for long.

    Raises:
        OSError: there is no such file, it is no regular one, or it cannot be read.
        ValueError: it has more than `limit` bytes.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is no regular file")
        if status.st_size > limit:
            raise ValueError(f"{path} has {status.st_size:,} bytes, more than the {limit:,} that are read of it")
        return file.read()
