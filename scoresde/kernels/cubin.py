"""Compiled kernels kept on disk, so that each is compiled once per machine and not once per process.

A cubin is code that will run. So the folder must belong to the user and be closed to others, and a file is used only if
it has the checksum of its key and content: a file that was cut short, damaged, or renamed is compiled again and
replaced. Any number of processes may work in one folder, because a file appears whole, by renaming. If the folder
cannot be used, the kernels are compiled for this process alone, and one warning says why.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import stat
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ..noise.switch import KernelWarning

FORMAT = b"scoresde cubin 1"  # 16 bytes; then 8 of length, 32 of sha256, and the cubin
HEADER = len(FORMAT) + 8 + 32
UNFINISHED = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{16}\.part")
ABANDONED = 3600.0  # seconds after which no process can still be writing a file: that takes milliseconds


def key(source: str, headers: Mapping[str, str], flags: Sequence[str], architecture: str, version: str) -> str:
    """Hexadecimal sha256 of everything that a cubin depends on."""
    parts = [FORMAT.decode(), source, *(part for item in sorted(headers.items()) for part in item)]
    digest = hashlib.sha256()
    for part in [*parts, "", *flags, "", architecture, version]:
        text = part.encode()
        digest.update(len(text).to_bytes(8, "little") + text)  # with lengths, or ("ab", "c") would equal ("a", "bc")
    return digest.hexdigest()


def folder() -> Path:
    """`$SCORESDE_CACHE`, else `$XDG_CACHE_HOME/scoresde`, else `~/.cache/scoresde`.

    Raises:
        OSError: neither variable is set, and the user has no home folder.
    """
    if os.environ.get("SCORESDE_CACHE"):
        return Path(os.path.abspath(os.path.expanduser(os.environ["SCORESDE_CACHE"])))
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the specification: a relative one is to be ignored
        base = os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(base):
        raise OSError("this user has no home folder; set SCORESDE_CACHE to a folder of its own")
    return Path(base) / "scoresde"


class Cache:
    """Cubins by key, in memory and in a folder.

    Args:
        path: the folder, which the first write makes. Default: `folder()` at the first use.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._memory: dict[str, bytes] = {}
        self._warned = False

    def get(self, name: str, make: Callable[[], bytes]) -> bytes:
        """The cubin of the key `name`: from memory, else from the folder, else from `make`, and then kept in both."""
        if name not in self._memory:
            found = None
            with self._forgiving("read from"):
                found = self._read(name)
            if found is None:
                found = make()
                with self._forgiving("written to"):
                    self._write(name, found)
            self._memory[name] = found
        return self._memory[name]

    def folder(self) -> Path:
        """Its path. Raises OSError if the user has no home folder and no variable names another."""
        self._path = self._path or folder()
        return self._path

    def _read(self, name: str) -> bytes | None:
        """None if there is no such file, or `_write` would not have written it so."""
        place = self.folder()
        try:
            refuse_shared(place)
        except FileNotFoundError:
            return None
        _sweep(place)
        try:
            with open(place / f"{name}.cubin", "rb", opener=_plain) as file:
                head, size = file.read(HEADER), os.fstat(file.fileno()).st_size - HEADER
                if head[: len(FORMAT) + 8] != FORMAT + max(size, 0).to_bytes(8, "little"):  # read no foreign gigabytes
                    return None
                found = file.read(size)
        except OSError:
            return None
        return found if head == _header(name, found) else None

    def _write(self, name: str, cubin: bytes) -> None:
        place = self.folder()
        os.makedirs(place, mode=0o700, exist_ok=True)
        refuse_shared(place)
        new = place / f".{name}.{secrets.token_hex(8)}.part"
        try:
            with open(new, "xb", opener=_private) as file:
                file.write(_header(name, cubin) + cubin)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, place / f"{name}.cubin")
        except BaseException:
            new.unlink(missing_ok=True)
            raise

    @contextlib.contextmanager
    def _forgiving(self, done: str) -> Iterator[None]:
        """Without a cache each process compiles the kernels again, which is slower: worth one warning, and no error."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"compiled kernels could not be {done} {self._path or 'a cache folder'}: {error}. "
                    "They are compiled for this process alone; SCORESDE_CACHE names another folder.",
                    KernelWarning,
                    stacklevel=1,
                )


def _header(name: str, cubin: bytes) -> bytes:
    """It binds the content to its key, so that a file under the name of another is refused as well."""
    return FORMAT + len(cubin).to_bytes(8, "little") + hashlib.sha256(name.encode() + cubin).digest()


def _plain(path: str, flags: int) -> int:
    """Opens for reading without following links or waiting for the other end of a pipe."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o600)


def refuse_shared(path: Path) -> None:
    """Raises PermissionError if another user could have put files there, which would then run as this user."""
    found = os.stat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError("it is not a folder")
    if not hasattr(os, "geteuid"):
        return  # Windows: a profile's folder is closed to others by its access list
    if found.st_uid != os.geteuid():
        raise PermissionError(f"it belongs to user {found.st_uid}, and what is in it would run as user {os.geteuid()}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(found.st_mode)
        raise PermissionError(f"others may write to it (mode {mode:o}), and what is in it would run; chmod it to 700")


def _sweep(path: Path) -> None:
    """Removes the unfinished files of processes that were killed."""
    for left in path.iterdir():
        with contextlib.suppress(OSError):
            if UNFINISHED.fullmatch(left.name) and time.time() - left.lstat().st_mtime > ABANDONED:
                left.unlink()
