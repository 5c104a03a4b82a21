"""One process per folder: a second is refused by name, a dead one holds nothing, also without kernel locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.hydra_config import HydraConfig
from together import Ended, start

from scoresde.cli._hydra import alone
from scoresde.config import Refusal
from scoresde.runs.lock import Locked, alive, hold, holder, note


def take(folder: Path, seconds: float = 0.0) -> None:
    """Holds the folder for a while."""
    with hold(folder):
        time.sleep(seconds)


def in_turn(folder: Path, rounds: int) -> int:
    """Takes and leaves the folder again and again, and counts what it saw of others while it held it."""
    collisions, inside = 0, folder / "inside"
    while rounds:
        try:
            with hold(folder):
                try:
                    os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    collisions += 1
                rounds -= 1
                inside.unlink(missing_ok=True)
        except Locked:
            pass
    return collisions


def died_holding(folder: Path) -> int:
    """A process that was killed while it held the folder. Returns its number."""
    group = start(take, folder, 600.0)
    pid = group.processes[0].pid
    while (found := holder(folder)) is None or found.get("pid") != pid:
        assert group.processes[0].is_alive()
        time.sleep(0.01)
    group.processes[0].kill()
    (end,) = group.wait()
    assert end.code == -9 and (folder / ".lock").exists()
    return int(pid or 0)


def test_a_second_process_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    with hold(folder):
        mine = {"pid": os.getpid(), "host": socket.gethostname()}
        found = holder(folder)
        assert found is not None and {key: found[key] for key in mine} == mine
        assert abs(found["started"] - time.time()) < 60
        ends: list[Ended] = start(take, folder, world=2).wait()
        for end in ends:
            assert end.code == 1  # and did not wait: the folder is held until it has ended
            assert re.search(
                rf"Locked: Process {os.getpid()} on {socket.gethostname()} \(since 20\d\d-.*out=…", end.output
            )
        # a refusal takes nothing away
        assert holder(folder) == found
        with pytest.raises(Locked, match=re.escape(str(folder))), hold(folder):  # nor may the same process
            pass
    assert holder(folder) is None and not (folder / ".lock").exists()
    take(folder)


def test_no_two_are_ever_inside_at_once(tmp_path: Path) -> None:
    """Four processes, which remove the file as they leave: the moment between an open and a lock is met often."""
    ends = start(in_turn, tmp_path, 100, world=4).wait()
    assert [end.value for end in ends] == [0, 0, 0, 0]


def test_a_lock_on_a_file_that_is_gone_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever held the folder leaves, and removes the file, between our open and our lock: it is opened once more."""
    lock, calls = fcntl.flock, 0

    def late(descriptor: int, operation: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            (tmp_path / ".lock").unlink()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with hold(tmp_path):
        found = holder(tmp_path)
        assert found is not None and found["pid"] == os.getpid()
        with pytest.raises(Locked), hold(tmp_path):
            pass


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    died_holding(tmp_path)
    assert holder(tmp_path) is None
    take(tmp_path)


def test_whoever_looks_refuses_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`holder` shares the lock while it looks; who wants the folder then waits for the look, and gets it."""
    looking = os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(looking, fcntl.LOCK_SH)
    waits: list[float] = []

    def pause(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:  # the look is over
            os.close(looking)

    monkeypatch.setattr(time, "sleep", pause)
    take(tmp_path)
    assert len(waits) == 3 + 1  # and the one within `take`


def test_it_is_left_also_by_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), hold(tmp_path):
        _ = 1 / 0
    assert holder(tmp_path) is None
    take(tmp_path)


@pytest.fixture(params=["ENOLCK", "ENOTSUP", "EINVAL"])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without flock (NFS without its lock service, Lustre without -o flock)."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(getattr(errno, request.param), "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_without_kernel_locks_the_note_decides(tmp_path: Path, no_locks: None) -> None:
    pid = died_holding(tmp_path)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert holder(tmp_path) is None, "a dead process of this host holds nothing"
    with hold(tmp_path):
        found = holder(tmp_path)
        assert found is not None and found["pid"] == os.getpid()
        with pytest.raises(Locked, match=f"Process {os.getpid()} "), hold(tmp_path):
            pass
    assert holder(tmp_path) is None
    # whether a process of another host is alive cannot be seen from here
    (tmp_path / ".lock").write_text(json.dumps({"pid": pid, "host": "node7.cluster", "started": 0}))
    assert holder(tmp_path) == {"pid": pid, "host": "node7.cluster", "started": 0}
    with pytest.raises(Locked, match=f"Process {pid} on node7.cluster"), hold(tmp_path):
        pass
    assert (tmp_path / ".lock").exists()


@pytest.mark.parametrize("note", ["", "{", "[1]", "null", '{"pid": "x"}', '{"started": "x", "pid": 1, "host": "h"}'])
def test_a_strange_note_under_a_kernel_lock_still_refuses(tmp_path: Path, note: str) -> None:
    with hold(tmp_path):
        (tmp_path / ".lock").write_text(note)
        assert holder(tmp_path) is not None
        with pytest.raises(Locked, match=re.escape(str(tmp_path))), hold(tmp_path):
            pass
    take(tmp_path)


def test_a_folder_that_cannot_be_made_says_which(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"), hold(tmp_path / "file"):
        pass


def test_an_error_that_is_no_lock_of_another_is_not_called_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails (EIO) is not another process."""

    def fail(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output error"), hold(tmp_path):
        pass


def test_commands_hold_their_folder_and_the_ranks_of_one_job_are_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 holds it while the task runs; the others, which come and go as they like, ask for nothing."""
    hydra = SimpleNamespace(runtime=SimpleNamespace(output_dir=str(tmp_path)))
    monkeypatch.setattr(HydraConfig, "get", lambda: hydra)
    task = alone(lambda cfg: holder(tmp_path), "take a copy")
    assert task(None)["pid"] == os.getpid() and not list(tmp_path.iterdir())
    with hold(tmp_path):
        with pytest.raises(Refusal, match=rf"Process {os.getpid()} on .* works in {tmp_path}.*, or take a copy\."):
            task(None)
        monkeypatch.setenv("RANK", "1")
        assert task(None)["pid"] == os.getpid()  # who holds it is rank 0


@pytest.mark.parametrize("pid", [-1, 0, "x", None, 10**400, -(2**31)])
def test_a_number_that_no_process_has_is_not_alive(pid: object) -> None:
    """A signal to −1 would reach every process, and whoever is found alive may be sent one."""
    assert alive({**note(), "pid": pid}) is None


def test_a_number_that_another_process_has_now_is_not_alive() -> None:
    """A restarted container gives the same host name and numbers; a note of before, without a birth, counts."""
    mine = note()
    assert alive(mine) is True and mine["pid"] == os.getpid()
    boot, tick = str(mine["born"]).split()
    assert alive({**mine, "born": f"{boot} {int(tick) - 1}"}) is False
    assert alive({**mine, "born": f"another-boot {tick}"}) is False
    assert alive({name: value for name, value in mine.items() if name != "born"}) is True
    assert alive({**mine, "host": "another"}) is None and alive(note() | {"pid": "x"}) is None
