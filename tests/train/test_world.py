"""Two processes that tell each other things: sums, signals one step late, what one does for all, and one that dies."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from together import start, together
from torch.distributed import TCPStore

from scoresde.runs.checkpoint import CheckpointError
from scoresde.train.signals import Interrupted
from scoresde.train.world import Alone, ProcessLost, World, join

CPU = torch.device("cpu")


class Stubborn(Exception):
    """Cannot be sent: it takes two arguments and keeps none."""

    def __init__(self, a: int, b: int):
        super().__init__()


def one_raises(error: BaseException) -> Callable[[], Any]:
    def task() -> Any:
        raise error

    return task


def heard(world: World, error: BaseException) -> tuple[str, str]:
    """Kind and text of what `leader` raises here."""
    try:
        world.leader(one_raises(error))
    except BaseException as found:
        return type(found).__name__, str(found)
    raise AssertionError("nothing was raised")


def talk() -> dict[str, Any]:
    """Everything a world can do, once."""
    world = join(CPU, 300)
    rank, found = world.rank, dict[str, Any]()
    found["who"] = (rank, world.size)
    tensor = torch.tensor([1.0 + rank, 10.0 * rank], dtype=torch.float64)
    found["sum"], found["in place"] = world.sum(tensor).tolist(), tensor.tolist()
    # a signal at the third call, on rank 1 only, is heard by both at the fourth, and by nobody before
    found["agreed"] = [world.agree(143 if rank == 1 and call == 2 else 0) for call in range(6)]
    # two at once: both stop with the same status
    found["both"] = [world.agree((130, 143)[rank] if call == 0 else 0) for call in range(3)]
    # calls in between disturb nobody
    world.agree(7 * rank)
    world.sum(torch.ones(3))
    found["gathered"] = world.gather({"rank": rank, "tensor": torch.arange(2) + rank})
    found["late"] = world.agree(0)
    found["led"] = world.leader(lambda: (world.rank, {"eval/loss": 0.5}))
    found["none"] = world.leader(lambda: None)
    errors = [ValueError("no such data"), CheckpointError("torn"), KeyError("x"), Stubborn(1, 2), Interrupted()]
    found["errors"] = [heard(world, error) for error in errors]
    found["after"] = world.sum(torch.ones(())).item()
    world.agree(0)
    world.close()
    return found


def test_two_processes_talk() -> None:
    first, second = together(talk)
    assert (first.pop("who"), second.pop("who")) == ((0, 2), (1, 2))
    # what cannot be sent is told by name; on rank 0 itself it is what it was
    assert first["errors"].pop(3) == ("Stubborn", "")
    assert second["errors"].pop(3) == ("RuntimeError", "rank 0: Stubborn: ")
    assert [len(found.pop("gathered")) for found in (first, second)] == [2, 2]
    assert first == second
    assert first["sum"] == first["in place"] == [3, 10]
    assert first["agreed"] == [0, 0, 0, 143, 0, 0]
    assert first["both"][1:] == [143, 0]
    assert first["late"] == 7
    assert first["led"] == (0, {"eval/loss": 0.5}) and first["none"] is None
    assert first["errors"] == [
        ("ValueError", "no such data"), ("CheckpointError", "torn"), ("KeyError", "'x'"), ("Interrupted", ""),
    ]  # fmt: skip
    assert first["after"] == 2


def test_alone_is_the_same_without_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world, x = join(CPU), torch.ones(2)
    assert isinstance(world, Alone) and (world.rank, world.size) == (0, 1)
    assert world.sum(x) is x and world.agree(143) == 143 and world.agree(0) == 0
    assert world.gather("x") == ["x"] and world.leader(lambda: 5) == 5
    with pytest.raises(KeyError):
        world.leader(one_raises(KeyError()))
    world.close()


def patience(seconds: Any) -> None:
    join(CPU, seconds)


@pytest.mark.parametrize("seconds", [0, -1.0, True, "60"])
def test_a_timeout_is_a_positive_number(seconds: Any) -> None:
    ends = start(patience, seconds, world=2).wait()
    assert all(
        end.code == 1 and f"timeout is a number of seconds, > 0 and finite; got {seconds!r}" in end.output
        for end in ends
    )


HOUR = 3600.0


def meet() -> None:
    """Until both are here: a short timeout is then not spent on waiting for one that was started later."""
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    store.set(os.environ["RANK"], "here")
    store.wait(["0", "1"])


def lose(how: str, what: str) -> str:
    """Rank 1 is gone; rank 0 meets that in one of the calls. Returns what it was told."""
    meet()
    world = join(CPU, 5 if how == "silent" else HOUR)
    world.sum(torch.ones(1))
    world.agree(0)
    if world.rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "silent":
            time.sleep(HOUR)
        raise ValueError("it was me")
    try:
        if what == "sum":
            world.sum(torch.ones(1000))
        elif what == "agree":
            world.agree(0)
            world.agree(0)
        elif what == "gather":
            world.gather(1)
        elif what == "leader":
            world.leader(lambda: 1)
            world.leader(lambda: 2)
            world.sum(torch.ones(1))
    except ProcessLost as lost:
        return str(lost)
    raise AssertionError("nobody was missed")


@pytest.mark.parametrize(
    ("how", "what"),
    [("killed", "sum"), ("killed", "agree"), ("killed", "gather"), ("killed", "leader"), ("raised", "sum"),
     ("silent", "sum")],
)  # fmt: skip
def test_a_lost_process_is_missed(how: str, what: str) -> None:
    """By its connection, long before the timeout, if it is dead; by the timeout if it is silent: nothing else ends the
    call within the ten minutes that `wait` gives. In words that say what to do."""
    group = start(lose, how, what, world=2)
    if how == "silent":
        group.processes[0].join(600)
        group.processes[1].kill()
    first, second = group.wait()
    assert first.code == 0, first.output
    assert first.value.startswith("Rank 0 of 2 on ") and "resume=auto" in first.value
    assert second.code == {"killed": -9, "raised": 1, "silent": -9}[how]


def test_it_can_be_told_to_others() -> None:
    """Errors of rank 0 travel by pickle."""
    for error in (ProcessLost("gone"), CheckpointError("torn"), Interrupted()):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error) and again.args == error.args and again.__dict__ == error.__dict__


def slow_leader(seconds: float) -> float:
    """Rank 0 measures for longer than a sum may take."""
    meet()
    world = join(CPU, 3)
    begin = time.monotonic()
    world.leader(lambda: time.sleep(seconds))
    world.sum(torch.ones(1))
    world.close()
    return time.monotonic() - begin


def test_the_leader_may_take_longer_than_the_timeout() -> None:
    assert min(together(slow_leader, 4.5)) >= 4.5


def leave(folder: Path) -> None:
    """A process that still has to be told something when the others leave."""
    world = join(CPU, 300)
    for _ in range(3):
        world.agree(0)
    if world.rank == 1:
        time.sleep(1)
    world.close()
    (folder / str(world.rank)).write_text("")


def test_leaving_waits_for_nobody_and_loses_nobody(tmp_path: Path) -> None:
    together(leave, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}
