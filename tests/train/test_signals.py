"""A first signal asks, a second one ends at once, and whatever handled signals before does so again afterwards."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from together import Ended, start

from scoresde.train.signals import Interrupted, Signals, Stopped

CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 143, "SIGHUP": 129}
BY_NAME = pytest.mark.parametrize("name", CODES)


@pytest.fixture(autouse=True)
def _not_under_nohup() -> Iterator[None]:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@BY_NAME
def test_the_first_signal_asks(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """No exception, nothing else than a code, the same for as long as the block runs, and a line for who waits."""
    with Signals() as signals:
        assert signals.code == 0
        os.kill(os.getpid(), signal.Signals[name])
        assert signals.code == CODES[name]
    assert signals.code == CODES[name]
    assert name in capfd.readouterr().err


def test_handlers_are_restored() -> None:
    """Also by an error, and from within another block."""
    heard: list[int] = []
    numbers = [signal.Signals[name] for name in CODES]
    before = {number: signal.signal(number, lambda number, frame: heard.append(number)) for number in numbers}
    try:
        with pytest.raises(KeyError), Signals():
            raise KeyError
        with Signals() as outer, Signals() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
        assert (outer.code, inner.code, heard) == (0, 143, [])
        for number in numbers:
            os.kill(os.getpid(), number)
        assert heard == numbers
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_hangup_that_is_ignored_stays_so() -> None:
    """As `nohup` has it; what else is ignored is heard."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGTERM)}
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.code == 0 and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.code == 143
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_another_thread_takes_no_handlers() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with Signals() as signals:
            seen.append((signals.code, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(0, before)] and signal.getsignal(signal.SIGTERM) is before


@BY_NAME
def test_within_interruptible_it_raises(name: str) -> None:
    """There and nowhere else: before it the signal waits for the block, after it nothing raises."""
    with Signals() as signals:
        with pytest.raises(Interrupted), signals.interruptible():
            os.kill(os.getpid(), signal.Signals[name])
            raise AssertionError("went on")
        assert signals.code == CODES[name]
        with pytest.raises(Interrupted), signals.interruptible():
            raise AssertionError("entered although a signal had come")
    with Signals() as signals:
        with signals.interruptible():
            pass
        os.kill(os.getpid(), signal.Signals[name])
        assert signals.code == CODES[name]


def test_it_breaks_off_what_waits() -> None:
    """A sleep or a join would take up where it left off: the exception gets out of it."""
    begin = time.monotonic()
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
    with Signals() as signals:
        timer.start()
        with pytest.raises(Interrupted), signals.interruptible():
            time.sleep(600)
    assert time.monotonic() - begin < 300


def test_no_handler_for_errors_takes_it_for_one() -> None:
    """`except Exception` in a solver or a logger must not swallow what ends the run."""
    assert not issubclass(Interrupted, Exception) and not issubclass(Stopped, Exception)
    assert Stopped(143, "why").code == 143 and Stopped(143, "why").message == "why"


def twice(first: str, second: str, busy: Path) -> None:
    """Asked twice while something refuses to end. The clock moves when it is told to, however busy the machine is."""
    now = 0.0
    with mock.patch("time.monotonic", lambda: now), Signals() as signals:
        os.kill(os.getpid(), signal.Signals[first])
        assert signals.code
        now = Signals.GRACE
        os.kill(os.getpid(), signal.Signals[second])  # as soon as this, it is the same once more
        busy.write_text("")
        now += 0.1
        try:
            os.kill(os.getpid(), signal.Signals[second])
            time.sleep(600)
        finally:  # not even this is waited for
            (busy.parent / "ended in order").write_text("")


@pytest.mark.parametrize(("first", "second"), [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGINT"), ("SIGUSR1", "SIGTERM")])
def test_a_second_one_ends_at_once(tmp_path: Path, first: str, second: str) -> None:
    """With the status of the first, so that a scheduler sees what it asked for."""
    end: Ended
    (end,) = start(twice, first, second, tmp_path / "busy").wait()
    assert end.code == CODES[first] and end.orphans == 0
    assert (tmp_path / "busy").exists() and not (tmp_path / "ended in order").exists()


def with_stderr_closed() -> int:
    """As under nohup, or after the terminal went away."""
    os.close(2)
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        return signals.code


def test_nobody_listening_is_no_obstacle() -> None:
    (end,) = start(with_stderr_closed).wait()
    assert (end.code, end.value) == (0, 143)
