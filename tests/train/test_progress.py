"""Progress: a bar with rate and time left on a terminal, a few lines elsewhere, and never a change to what passes."""

from __future__ import annotations

import io
import re
import resource

import pytest

from scoresde.runs import progress as module
from scoresde.runs.progress import Lines
from scoresde.train.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """`time.monotonic` that moves when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 1000.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)


LINE = re.compile(
    r"train (?P<done>[\d,]+)/(?P<total>[\d,]+) images(  loss (?P<loss>\S+))?  (?P<rate>[\d,]+) img/s  "
    r"(?P<left>[\d:?]+) left  (?P<memory>\d+\.\d) GiB"
)


def test_a_bar_shows_images_loss_rate_time_left_and_memory(monkeypatch) -> None:
    """40 images a second, resumed at 200 of 1000; drawn ten times a second, with the last loss."""
    stderr, clock = Terminal(), Clock(monkeypatch)
    monkeypatch.setattr("sys.stderr", stderr)
    found = shown(clock, stderr)
    at = {int(line["done"].replace(",", "")): line for line in found if line["loss"]}
    assert all(line["total"] == "1,000" and line["rate"] == "40" for line in at.values())
    assert at[604]["loss"] == "75" and at[604]["left"] == "00:10"  # 396 images at 40 a second
    assert at[1000]["left"] == "00:00"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kibibytes on Linux
    # half a digit of rounding, and what this process has grown by since the last line
    assert float(found[-1]["memory"]) == pytest.approx(peak, abs=0.06)


def shown(clock: Clock, stderr: io.StringIO) -> list[dict[str, str]]:
    """What is shown of 800 images in 20 s, with a loss each second."""
    progress = Progress(total=1000, done=200)
    for images in range(204, 1001, 4):
        clock.now += 0.1
        progress.update(images)
        if images % 40 == 0:
            progress.update(images, loss=images / 8)
    progress.close()
    return [match.groupdict() for match in LINE.finditer(stderr.getvalue())]


def test_elsewhere_the_lines_tell_the_same_by_time_and_the_end_has_one(monkeypatch) -> None:
    """Asked at 10 s, as the thread does: 600 of 1000 images; with no first step yet nothing is known of the time."""
    stderr, clock, lines = io.StringIO(), Clock(monkeypatch), Lines()
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setattr("scoresde.train.progress.LINES", lines)
    monkeypatch.setattr(lines, "write", lambda: None)
    (end,) = shown(clock, stderr)
    assert (end["done"], end["loss"], end["rate"], end["left"]) == ("1,000", "125", "40", "00:00")
    progress = Progress(total=1000, done=200)
    clock.now += module.FIRST
    start = lines._next()
    assert start is not None and start.startswith("train 200/1,000 images  0 img/s  ? left")
    for images in range(240, 640, 40):
        clock.now += 1
        progress.update(images, loss=images / 8)
    clock.now += module.EVERY
    match = LINE.fullmatch(lines._next() or "")
    assert match and match.group("done", "loss", "rate", "left") == ("600", "75", "40", "00:10")
    progress.close()
    assert lines._next() is None


def test_the_rate_is_of_training_alone_and_of_late(monkeypatch) -> None:
    """Neither a first step of a minute, nor evaluations of 100 s, nor the speed of an hour ago are in it."""
    clock = Clock(monkeypatch)
    progress = Progress(total=10**6, done=500)
    clock.now += 60
    progress.update(510, 1.0)
    assert progress.rate(510) == pytest.approx(10 / 60)  # nothing else is known yet
    for images in range(520, 1010, 10):
        clock.now += 1
        progress.update(images, 1.0)
        with progress.paused():
            clock.now += 100
    assert progress.rate(1000) == pytest.approx(10)
    for images in range(1010, 1210, 10):
        clock.now += 0.5
        progress.update(images, 1.0)
    assert progress.rate(1200) == pytest.approx(20)


def test_an_end_that_was_shown_is_not_shown_again(monkeypatch) -> None:
    """Training that ends at a loss, and is told of the end once more."""
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    progress = Progress(total=100)
    for _ in range(3):
        progress.update(100, 1.0)
    assert len(stderr.getvalue().splitlines()) == 1


def test_other_processes_show_nothing(capfd) -> None:
    progress = Progress(total=100, show=False)
    with progress.paused():
        progress.update(100, 1.0)
    progress.close()
    assert capfd.readouterr() == ("", "")
