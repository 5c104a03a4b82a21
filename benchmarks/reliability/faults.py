"""Faults at the calls of a process that reach its disk, and at a few of its trainer's: no hook in the library."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# The bindings before anything is wrapped: faults and the trace use these.
_write, _kill, _open = os.write, os.kill, os.open


class Faults:
    """Counts the calls by name, and does what `specs` say at some of them.

    A point is the n-th call of a name on a path below `folder`: `mkdir`, `save_file` (safetensors), `chmod`, `open`
    (for writing), `fsync`, `rename`, `rmtree`, `unlink`, `rmdir`; and of `terms` (a forward pass), `log` (a row) and
    `evaluate`, which `child` wraps. They are numbered from 1 in each process.

    Args:
        specs: "name:n:action", the action taken before the call. `SIGKILL`, `SIGTERM`, … sends that signal and goes
            on; `half` makes the call, cuts the file to half its size, and kills; `after` makes the call and kills;
            `ENOSPC`, `EIO`, … raises that OSError; `limit=N` refuses files beyond N bytes (RLIMIT_FSIZE); `fill=N`
            writes a file that leaves N bytes on the disk; `free` ends both; `sleep=S` waits.
            n may be `a-b`: at each of those.
        folder: below which calls count.
        trace: file that takes a line "name n path" for each point passed; "" for none.
    """

    def __init__(self, specs: Sequence[str], folder: Path, trace: str = ""):
        self.actions: dict[tuple[str, int], str] = {}
        for spec in specs:
            name, numbers, action = spec.split(":")
            first, _, last = numbers.partition("-")
            for n in range(int(first), int(last or first) + 1):
                self.actions[name, n] = action
        self.folder, self.counts, self.lock = os.path.abspath(folder), dict[str, int](), threading.Lock()
        self.trace = _open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666) if trace else None

    def install(self) -> None:
        """Wraps the calls, in this process and until it ends."""
        import safetensors.torch

        for name in ("mkdir", "chmod", "rename", "unlink", "rmdir"):
            setattr(os, name, self.wrap(name, getattr(os, name), _named))
        os.fsync = self.wrap("fsync", os.fsync, lambda fd: os.readlink(f"/proc/self/fd/{fd}"))
        shutil.rmtree = self.wrap("rmtree", shutil.rmtree, _named)
        safetensors.torch.save_file = self.wrap("save_file", safetensors.torch.save_file, lambda _, path: str(path))
        builtins.open = io.open = self.wrap("open", builtins.open, _written)

    def wrap(self, name: str, call: Callable[..., Any], where: Callable[..., str | None]) -> Callable[..., Any]:
        """`call` with a point before it; `where` takes its arguments and gives the path, None for no point."""

        def wrapped(*args: Any, **options: Any) -> Any:
            path = where(*args, **options)
            if path is None or not os.path.abspath(path).startswith(self.folder):
                return call(*args, **options)
            action = self.passed(name, path)
            if action in ("half", "after"):
                call(*args, **options)
                if action == "half":
                    os.truncate(path, os.path.getsize(path) // 2)
                _kill(os.getpid(), signal.SIGKILL)
            elif action:
                self.act(name, action, path)
            return call(*args, **options)

        return wrapped

    def passed(self, name: str, path: str) -> str:
        """Counts a point; what is to be done there."""
        with self.lock:
            n = self.counts[name] = self.counts.get(name, 0) + 1
        if self.trace is not None:
            _write(self.trace, f"{name} {n} {path}\n".encode())
        return self.actions.get((name, n), "")

    def act(self, name: str, action: str, path: str) -> None:
        kind, _, value = action.partition("=")
        if kind.startswith("SIG"):
            _kill(os.getpid(), signal.Signals[kind])
        elif kind.startswith("E"):
            raise _refused(name, kind, path)
        elif kind == "sleep":
            time.sleep(float(value))
        elif kind == "limit":
            _limit(int(value))
        elif kind == "fill":
            _fill(Path(self.folder), int(value))
        elif kind == "free":
            _limit(resource.RLIM_INFINITY)
            with contextlib.suppress(FileNotFoundError):
                os.remove(f"{self.folder}/filler")
        else:
            sys.exit(f"no action {action}")


def _named(path: Any, *_: Any, dir_fd: int | None = None, **__: Any) -> str:
    return os.fspath(path) if dir_fd is None else f"{os.readlink(f'/proc/self/fd/{dir_fd}')}/{path}"


def _written(path: Any, mode: str = "r", *_: Any, **__: Any) -> str | None:
    return None if isinstance(path, int) or not set(mode) & set("wax+") else os.fspath(path)


def _refused(name: str, kind: str, path: str) -> Exception:
    """As the call itself reports it: safetensors has an error of its own."""
    from safetensors import SafetensorError

    number = getattr(errno, kind)
    if name == "save_file":
        return SafetensorError(f"I/O error: {os.strerror(number)} (os error {number})")
    return OSError(number, os.strerror(number), path)


def _limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def _fill(folder: Path, left: int) -> None:
    """Written, not reserved: a file with holes takes no room."""
    size = max(0, shutil.disk_usage(folder).free - left)
    filler = _open(f"{folder}/filler", os.O_WRONLY | os.O_CREAT, 0o666)
    while size > 0:
        size -= _write(filler, bytes(min(size, 1 << 16)))
    os.close(filler)
