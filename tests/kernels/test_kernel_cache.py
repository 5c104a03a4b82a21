"""The cache of compiled kernels: never half a file, never another's, never in the way."""

from __future__ import annotations

import errno
import functools
import itertools
import multiprocessing
import os
import pwd
import resource
import shutil
import signal
import stat
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import forked, start, wait

from scoresde.kernels import cubin
from scoresde.kernels.cubin import Cache, KernelWarning, key

CUBIN = b"\x7fELF" + bytes(range(128))  # short, as each of its bytes is damaged in turn
NAME = key("source", {}, (), "sm_90", "13.0")
NOBODY = 65534


@pytest.fixture(autouse=True)
def _strict() -> Iterator[None]:
    """A warning that no test expects is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", KernelWarning)
        yield


class Compile:
    """Counts how often it is asked to compile."""

    def __init__(self, made: bytes = CUBIN) -> None:
        self.made, self.calls = made, 0

    def __call__(self) -> bytes:
        self.calls += 1
        return self.made


def compiles(folder: Path, made: bytes = CUBIN) -> int:
    """How often a new process, which must get the right cubin, has to compile it: 0 if the folder has it."""
    compile = Compile(made)
    assert Cache(folder).get(NAME, compile) == made
    return compile.calls


def file(folder: Path) -> Path:
    return folder / f"{NAME}.cubin"


def filled(folder: Path) -> bytes:
    """What is on disk after one compilation."""
    assert compiles(folder) == 1 and compiles(folder) == 0
    return file(folder).read_bytes()


def test_key_depends_on_everything() -> None:
    """A key depends on nothing else: not on the order of headers, nor on a process's hash seed."""
    headers = {"a.h": "one", "b.h": "two"}
    base = ("source", headers, ("-DX=1", "-DY"), "sm_90", "13.0")
    changed = [
        ("sourcf", headers, ("-DX=1", "-DY"), "sm_90", "13.0"),
        ("source", headers, ("-DX=2", "-DY"), "sm_90", "13.0"),
        ("source", headers, ("-DX=1",), "sm_90", "13.0"),
        ("source", headers, ("-DX=1", "-D", "Y"), "sm_90", "13.0"),
        ("source", headers, ("-DX=1", "-DY", "sm_90"), "", "13.0"),
        ("source", headers, ("-DX=1", "-DY"), "sm_80", "13.0"),
        ("source", headers, ("-DX=1", "-DY"), "sm_90", "13.1"),
        ("source", headers, ("-DX=1", "-DY"), "sm_901", "3.0"),
        ("source", {"a.h": "one"}, ("-DX=1", "-DY"), "sm_90", "13.0"),
        ("source", {"a.h": "two", "b.h": "one"}, ("-DX=1", "-DY"), "sm_90", "13.0"),
        ("source", {"a.h": "on", "b.h": "etwo"}, ("-DX=1", "-DY"), "sm_90", "13.0"),
        ("sourcea.h", {"one": "b.h", "two": ""}, ("-DX=1", "-DY"), "sm_90", "13.0"),
        ("source", {}, ("-DX=1", "-DY"), "sm_90", "13.0"),
    ]
    assert len({key(*parts) for parts in (base, *changed)}) == 1 + len(changed)
    assert key("source", dict(reversed(headers.items())), *base[2:]) == key(*base)


def test_compiled_once_for_all_processes(tmp_path: Path) -> None:
    compile, cache = Compile(), Cache(tmp_path / "new" / "cache")
    assert [cache.get(NAME, compile) for _ in range(3)] == [CUBIN] * 3
    assert compile.calls == 1
    assert compiles(tmp_path / "new" / "cache") == 0
    assert [path.name for path in (tmp_path / "new" / "cache").iterdir()] == [f"{NAME}.cubin"]


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_folder_and_files_are_closed_to_others(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        assert compiles(tmp_path / "cache") == 1
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    assert stat.S_IMODE(file(tmp_path / "cache").stat().st_mode) == 0o600


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of files that need not survive a loss of power."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.usefixtures("hasty")
def test_a_file_cut_short_anywhere_is_replaced(tmp_path: Path) -> None:
    whole = filled(tmp_path)
    for length in range(len(whole)):
        file(tmp_path).write_bytes(whole[:length])
        assert compiles(tmp_path) == 1, f"the first {length} bytes were believed"
        assert file(tmp_path).read_bytes() == whole


@pytest.mark.usefixtures("hasty")
def test_a_file_with_any_byte_changed_is_replaced(tmp_path: Path) -> None:
    """sha256 of the content, and the header's every byte is compared."""
    whole = filled(tmp_path)
    for place in range(len(whole)):
        file(tmp_path).write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        assert compiles(tmp_path) == 1, f"byte {place} may be wrong"
    assert file(tmp_path).read_bytes() == whole


@pytest.mark.parametrize("content", [b"", b"\x7fELF and more", b"\0" * 4096, b"scoresde cubin 1", CUBIN])
def test_a_foreign_file_is_replaced(content: bytes, tmp_path: Path) -> None:
    whole = filled(tmp_path)
    for wrong in (content, whole + content + b"\0"):
        file(tmp_path).write_bytes(wrong)
        assert compiles(tmp_path) == 1 and compiles(tmp_path) == 0


def test_a_file_of_another_key_is_replaced(tmp_path: Path) -> None:
    """Whole, and made by us, but for another GPU."""
    filled(tmp_path)
    Cache(tmp_path).get(other := key("source", {}, (), "sm_80", "13.0"), Compile(b"other"))
    shutil.copy(tmp_path / f"{other}.cubin", file(tmp_path))
    assert compiles(tmp_path) == 1 and compiles(tmp_path) == 0


def test_links_and_pipes_are_not_followed(tmp_path: Path) -> None:
    """They are replaced, and what they pointed to is left as it was; to read a pipe would be to wait for ever."""
    whole = filled(tmp_path)
    target = tmp_path / "target"
    target.write_bytes(whole)
    for make in (
        lambda place: place.symlink_to(target),
        lambda place: place.symlink_to(place),
        lambda place: place.symlink_to(tmp_path / "missing"),
        os.mkfifo,
    ):
        file(tmp_path).unlink()
        make(file(tmp_path))
        assert forked(lambda: filled(tmp_path)) == 0
        assert stat.S_ISREG(file(tmp_path).lstat().st_mode)
    assert target.read_bytes() == whole and not (tmp_path / "missing").exists()


def test_a_folder_in_its_place_is_told_and_worked_around(tmp_path: Path) -> None:
    (file(tmp_path) / "inside").mkdir(parents=True)
    tmp_path.chmod(0o700)
    with pytest.warns(KernelWarning, match=f"written to {tmp_path}: .*[Dd]irectory"):
        assert compiles(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == [f"{NAME}.cubin"]


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o707, 0o1777, 0o720])
def test_a_folder_open_to_others_is_not_believed(mode: int, tmp_path: Path) -> None:
    """The file in it is a whole one, as anyone could have made it; it would run as this user."""
    filled(tmp_path)
    (planted := tmp_path / "open").mkdir()
    assert Cache(tmp_path / "forge").get(NAME, Compile(b"evil")) == b"evil"
    shutil.copy(file(tmp_path / "forge"), file(planted))
    planted.chmod(mode)
    cache, compile = Cache(planted), Compile()
    with pytest.warns(KernelWarning, match=f"{planted}: others may write to it .mode {mode:o}") as warned:
        assert cache.get(NAME, compile) == cache.get(NAME, compile) == CUBIN
    assert compile.calls == 1 and len(warned) == 1
    assert [path.name for path in planted.iterdir()] == [f"{NAME}.cubin"]
    assert file(planted).read_bytes() == file(tmp_path / "forge").read_bytes(), "it was written to"


def test_a_folder_of_another_user_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path)
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.warns(KernelWarning, match=f"{tmp_path}: it belongs to user {owner}, .* run as user {owner + 1}"):
        assert compiles(tmp_path) == 1


def test_a_read_only_folder_is_worked_around() -> None:
    """It acts as a user whom permissions bind; root gives up its rights in a child."""
    path = Path(tempfile.mkdtemp())
    if os.geteuid() == 0:
        os.chown(path, NOBODY, NOBODY)
    path.chmod(0o500)

    def child() -> None:
        if os.geteuid() == 0:
            os.setuid(NOBODY)
        for folder in (path, path / "new"):
            cache, compile = Cache(folder), Compile()
            with pytest.warns(KernelWarning, match=f"{folder}: .*Permission denied.* SCORESDE_CACHE") as warned:
                assert cache.get(NAME, compile) == cache.get(NAME, compile) == CUBIN
            assert compile.calls == 1 and len(warned) == 1

    try:
        assert forked(child) == 0 and not list(path.iterdir())
    finally:
        path.chmod(0o700)
        shutil.rmtree(path)


@pytest.mark.parametrize("call", ["makedirs", "open", "fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
def test_a_disk_that_refuses_is_worked_around(
    call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache, compile = tmp_path / "cache", Cache(tmp_path / "cache"), Compile()

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.warns(KernelWarning, match=f"written to {folder}: .*{os.strerror(code)}") as warned:
            assert cache.get(NAME, compile) == cache.get(NAME, compile) == CUBIN
            cache.get(key("another", {}, (), "sm_90", "13.0"), compile)
    assert compile.calls == 2 and len(warned) == 1
    assert not folder.exists() or not list(folder.iterdir()), "an unfinished file was left"
    assert compiles(folder) == 1 and compiles(folder) == 0


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    """The system itself refuses, in the middle of the file."""

    def child() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        with pytest.warns(KernelWarning, match="File too large"):
            assert compiles(tmp_path) == 1

    assert forked(child) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["/dev/null", "/dev/null/cache", "/proc/cache"])
def test_no_folder_at_all_is_worked_around(folder: str) -> None:
    with pytest.warns(KernelWarning, match=f"{folder}: .*compiled for this process alone") as warned:
        assert compiles(Path(folder)) == 1
    assert len(warned) == 1


def test_where_the_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SCORESDE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cubin.folder() == tmp_path / ".cache" / "scoresde"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the specification tells to ignore
    assert cubin.folder() == tmp_path / ".cache" / "scoresde"
    monkeypatch.setenv("XDG_CACHE_HOME", "/other")
    assert cubin.folder() == Path("/other/scoresde")
    monkeypatch.setenv("SCORESDE_CACHE", "~/mine")
    assert cubin.folder() == tmp_path / "mine"
    monkeypatch.setenv("SCORESDE_CACHE", "mine")
    monkeypatch.chdir(tmp_path)
    assert cubin.folder() == tmp_path / "mine"
    monkeypatch.setenv("SCORESDE_CACHE", "")
    assert cubin.folder() == Path("/other/scoresde")
    assert Cache().folder() == cubin.folder()


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is so in a container whose user is in no password file."""

    def unknown(_: int) -> None:
        raise KeyError

    for name in ("SCORESDE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    compile, cache = Compile(), Cache()
    with pytest.warns(KernelWarning, match="no home folder; set SCORESDE_CACHE") as warned:
        assert cache.get(NAME, compile) == cache.get(NAME, compile) == CUBIN
    assert compile.calls == 1 and len(warned) == 1


def test_only_old_unfinished_files_of_ours_are_swept(tmp_path: Path) -> None:
    ours, old = f".{NAME}.{'0' * 16}.part", time.time() - 2 * cubin.ABANDONED
    names = {ours: old, ours.replace("0.part", "1.part"): None, ".notes.part": old, f"{'a' * 64}.cubin": old}
    for name, when in names.items():
        (tmp_path / name).write_bytes(b"half")
        if when:
            os.utime(tmp_path / name, (when, when))
    filled(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*names, f"{NAME}.cubin"} - {ours}


def killed(folder: Path, call: str, number: int, after: bool, left: int | None) -> None:
    """Writes to the cache until that call of os, and dies there: before it or after, with `left` bytes of the
    unfinished file (None: as it is)."""
    real, calls = getattr(os, call), itertools.count(1)

    def die(*args: Any, **options: Any) -> Any:
        if next(calls) < number:
            return real(*args, **options)
        if after:
            real(*args, **options)
        for part in folder.glob(".*.part"):
            if left is not None:
                os.truncate(part, left)
        return os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, call, die)
    Cache(folder).get(NAME, lambda: CUBIN)


def test_killed_at_every_point_of_a_write(tmp_path: Path) -> None:
    """Before and after each call, and with every 8th length of the file: the next process has the right cubin."""
    calls = (("makedirs", 1), ("open", 1), ("open", 2), ("fsync", 1), ("replace", 1))  # the first opens for reading
    points = [
        *((*call, after, None) for call in calls for after in (False, True)),
        *(("fsync", 1, False, left) for left in range(0, len(CUBIN) + cubin.HEADER, 8)),
    ]
    for case, point in enumerate(points):
        folder = tmp_path / str(case)
        if point[0] == "open":
            folder.mkdir(mode=0o700)
        assert forked(functools.partial(killed, folder, *point)) == -signal.SIGKILL, point
        published = point == ("replace", 1, True, None)
        assert compiles(folder) == (0 if published else 1), point
        assert compiles(folder) == 0
        for part in folder.glob(".*"):
            os.utime(part, (0, 0))
        assert compiles(folder) == 0
        assert [path.name for path in folder.iterdir()] == [f"{NAME}.cubin"], "what was left was not swept"


def test_killed_at_any_time(tmp_path: Path) -> None:
    """Writers that write over and over, killed from outside after 1 to 25 ms; large files, so that most are hit
    while they write."""
    large = CUBIN * 16000  # 2 MB

    def child() -> None:
        while True:
            file(tmp_path).unlink(missing_ok=True)
            Cache(tmp_path).get(NAME, lambda: large)

    for milliseconds in range(1, 26):
        pid = start(child)
        time.sleep(milliseconds / 1000)
        os.kill(pid, signal.SIGKILL)
        assert wait(pid) == -signal.SIGKILL
        assert compiles(tmp_path, large) in (0, 1)
        assert compiles(tmp_path, large) == 0


@pytest.mark.parametrize("processes", [2, 8])
def test_many_processes_at_once(processes: int, tmp_path: Path) -> None:
    """All find nothing, all compile, each its own, and each gets a whole one; nothing unfinished is left."""
    barrier, log = multiprocessing.get_context("fork").Barrier(processes), tmp_path / "log"

    def child(number: int) -> Callable[[], None]:
        def work() -> None:
            own = bytes([number]) * 300_000
            for turn in range(10):
                name = key(str(turn), {}, (), "sm_90", "13.0")
                barrier.wait(100)
                found = Cache(tmp_path / "cache").get(name, lambda: own)
                again = Cache(tmp_path / "cache").get(name, lambda: b"compiled again")
                for got in (found, again):
                    assert len(set(got)) == 1 and len(got) == 300_000, "not whole"
                with log.open("a") as file:
                    file.write(f"{turn} {found == own}\n")

        return work

    assert [wait(pid) for pid in [start(child(number)) for number in range(processes)]] == [0] * processes
    lines = log.read_text().splitlines()
    assert len(lines) == 10 * processes
    assert {line.split()[0] for line in lines if line.endswith("True")} == {str(turn) for turn in range(10)}
    assert all(path.suffix == ".cubin" for path in (tmp_path / "cache").iterdir())
