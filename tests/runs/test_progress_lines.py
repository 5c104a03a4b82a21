"""Where there is no terminal: a line about what is under way within 15 s, then at least every 30 s, whatever stalls."""

from __future__ import annotations

import io
import threading
from itertools import pairwise

import pytest

from scoresde.runs import progress as module
from scoresde.runs.progress import Lines, doing, track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO], ids=["terminal", "file"])
def test_items_pass_unchanged(stream, monkeypatch) -> None:
    stderr = stream()
    monkeypatch.setattr("sys.stderr", stderr)
    assert list(track(range(5), "points", total=5)) == [0, 1, 2, 3, 4]
    assert ("points" in stderr.getvalue()) is stderr.isatty()


class Spoken(Lines):
    """Lines whose waiting moves a clock instead: `said` are the times at which each was due, and the lines."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        super().__init__()
        self.now, self.said = 1000.0, []
        monkeypatch.setattr("time.monotonic", lambda: self.now)
        monkeypatch.setattr(module, "LINES", self)
        monkeypatch.setattr("sys.stderr", io.StringIO())
        self._change.wait = self.wait  # type: ignore[method-assign]

    def write(self) -> None:
        """No thread: `until` asks for the lines."""

    def wait(self, seconds: float) -> None:
        self.now += seconds
        if self.now >= self.end:
            raise TimeoutError

    def until(self, end: float) -> None:
        """What is said until `end` seconds after the start."""
        self.end = 1000 + end
        with pytest.raises(TimeoutError):
            while line := self._next():
                self.said.append((self.now - 1000, line))
        self.now = self.end


def test_one_item_that_takes_minutes_is_spoken_of_all_along(monkeypatch) -> None:
    lines = Spoken(monkeypatch)
    steps = track(range(3), "steps", 3)
    next(steps)
    lines.until(100)
    assert lines.said == [(at, "steps: 0/3") for at in (10, 35, 60, 85)]
    assert lines.said[0][0] < 15 and max(b - a for (a, _), (b, _) in pairwise(lines.said)) < 30
    next(steps)
    lines.until(120)
    assert lines.said[4:] == [(110, "steps: 1/3  0.00909/s  220 s left")]  # one in 110 s, two more
    assert list(steps) == [2]
    assert lines._next() is None


def test_short_works_one_after_another_share_the_clock(monkeypatch) -> None:
    """Each takes 4 s, less than the wait for a first line."""
    lines = Spoken(monkeypatch)
    for number in range(25):
        work = track([None, None], f"work {number}", None)
        next(work)
        lines.until(4 * number + 4)
        work.close()
    assert [at for at, _ in lines.said] == [10, 35, 61, 86]  # at 60 one was over, and the next has its first second
    assert [line for _, line in lines.said] == ["work 2: 0", "work 8: 0", "work 15: 0", "work 21: 0"]


def test_what_is_within_another_stands_behind_it_in_one_line(monkeypatch) -> None:
    lines = Spoken(monkeypatch)
    outer, inner, silent = (track(range(2), name, 2, show=name != "silent") for name in ("outer", "inner", "silent"))
    for work in (outer, inner, silent):
        next(work)
    lines.until(12)
    inner.close()
    lines.until(40)
    assert [line for _, line in lines.said] == ["outer: 0/2; inner: 0/2", "outer: 0/2"]


def test_what_does_not_come_in_parts_is_named_too(monkeypatch) -> None:
    lines = Spoken(monkeypatch)
    with doing("reading the data"):
        lines.until(20)
        monkeypatch.setattr("sys.stderr", Terminal())
        with doing("on a terminal"):
            lines.until(40)
    assert lines.said == [(10, "reading the data"), (35, "reading the data")]


def test_after_a_long_silence_a_line_comes_soon_but_not_at_once(monkeypatch) -> None:
    lines = Spoken(monkeypatch)
    first = track(range(2), "first", 2)
    next(first)
    lines.until(11)
    first.close()
    lines.now += 1000
    second = track(range(2), "second", 2)
    next(second)
    lines.until(1030)
    assert lines.said == [(10, "first: 0/2"), (1012, "second: 0/2")]


def test_the_thread_speaks_while_the_work_stands_still_and_ends_with_it(monkeypatch) -> None:
    """Nothing but the line lets this work go on. A stream that is closed costs the line and nothing else."""
    monkeypatch.setattr(module, "FIRST", 0.0)
    monkeypatch.setattr(module, "EVERY", 0.0)
    monkeypatch.setattr(module, "LINES", Lines())
    spoken = threading.Event()

    class Heard(io.StringIO):
        def write(self, text: str) -> int:
            if "work: 0/2" in text:
                spoken.set()
            raise BrokenPipeError

    monkeypatch.setattr("sys.stderr", Heard())
    before = set(threading.enumerate())
    for _ in track(range(2), "work", 2):
        assert spoken.wait(60)
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
        assert not thread.is_alive()
