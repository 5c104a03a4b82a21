"""One process per run folder: a lock that a dead process cannot leave behind."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .publish import content_of

NAME = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)


class Locked(RuntimeError):
    """Another process works in the folder; the message says which."""


@contextlib.contextmanager
def hold(folder: Path, instead: str = "choose another folder: out=…") -> Iterator[None]:
    """Holds `folder` (made if it is not there) while the `with` block runs.

    The lock is the kernel's (`flock` on `folder/.lock`), so it ends with the process that holds it, however that ends;
    the file's text only says which process that is. On a file system without locks the text decides: a process of this
    host that has ended holds nothing. `instead` is what else the user may do.

    Raises:
        Locked: another process holds it; names its host, number and start.
        OSError: the folder cannot be made, or the lock cannot be asked for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _take(descriptor)
        except OSError as error:
            found = _read(path)
            if not (error.errno in _NO_LOCKS and (found is None or alive(found) is False)):
                os.close(descriptor)
                if error.errno not in (errno.EWOULDBLOCK, *_NO_LOCKS):
                    raise
                raise Locked(_refusal(folder, found, instead)) from None
        # the former holder may have removed the file between our open and our lock: then this locks nothing
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(note()).encode())
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _take(descriptor: int) -> None:
    """Takes the exclusive lock; retries while `holder` probes.

    Raises:
        OSError: another process holds it, or the file system has no locks.
    """
    for _ in range(500):  # 5 s, where a probe takes microseconds
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # raises where another holds it exclusively
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        time.sleep(0.01)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def holder(folder: Path) -> dict[str, Any] | None:
    """`note()` of the process that holds `folder` now; None if no process does."""
    path = folder / NAME
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe of this name would keep us waiting
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except OSError as error:
        found = _read(path) or {}
        return None if error.errno in _NO_LOCKS and alive(found) is False else found
    finally:
        os.close(descriptor)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(content_of(path))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def note() -> dict[str, Any]:
    """Which process this is: its number, its host, and when it began, for a restarted container gives both again."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": round(time.time(), 3),
        "born": _born(os.getpid()),
    }


def _born(number: int) -> str | None:
    """The boot of the machine, and the clock tick at which the process began; None where the kernel does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path(f'/proc/{number}/stat').read_bytes().rpartition(b')')[2].split()[19].decode()}"
    except (OSError, IndexError):
        return None


def alive(note: Mapping[str, Any]) -> bool | None:
    """Whether the process of a note still runs; None where that is not known: on another host, or without a number."""
    if note.get("host") != socket.gethostname():
        return None
    try:
        if int(note["pid"]) <= 0:  # of a damaged note: to the kernel these are groups of processes, −1 all of them
            return None
        os.kill(int(note["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    born = _born(int(note["pid"]))
    return born is None or note.get("born") in (None, born)


def _refusal(folder: Path, note: dict[str, Any] | None, instead: str) -> str:
    who = "Another process"
    if note:
        who = f"Process {note.get('pid')} on {note.get('host')}"
        with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
            who += time.strftime(" (since %Y-%m-%d %H:%M:%S)", time.localtime(float(note["started"])))
    return f"{who} works in {folder}. Wait for it, end it, or {instead}."
