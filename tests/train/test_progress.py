"""Progress: a bar with rate and time left on a terminal, a few lines elsewhere, and never a change to what passes."""

from __future__ import annotations

import io
import re
import resource

import pytest

from scoresde.runs.progress import track
from scoresde.train.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


everywhere = pytest.mark.parametrize("stream", [Terminal, io.StringIO], ids=["terminal", "file"])


@everywhere
def test_items_pass_unchanged(stream, monkeypatch) -> None:
    stderr = stream()
    monkeypatch.setattr("sys.stderr", stderr)
    assert list(track(range(5), "points", total=5)) == [0, 1, 2, 3, 4]
    assert ("points" in stderr.getvalue()) is stderr.isatty()


class Clock:
    """`time.monotonic` that moves when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 1000.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)


LINE = re.compile(
    r"train (?P<done>[\d,]+)/(?P<total>[\d,]+) images  loss (?P<loss>\S+)  (?P<rate>[\d,]+) img/s  "
    r"(?P<left>[\d:]+) left  (?P<memory>\d+\.\d) GiB"
)


@everywhere
def test_a_run_shows_images_loss_rate_time_left_and_memory(stream, monkeypatch) -> None:
    """40 images a second, resumed at 200 of 1000: a line at each tenth, or a bar with the same figures."""
    stderr, clock = stream(), Clock(monkeypatch)
    monkeypatch.setattr("sys.stderr", stderr)
    progress = Progress(total=1000, done=200)
    for images in range(204, 1001, 4):
        clock.now += 0.1
        progress.update(images)
        if images % 40 == 0:
            progress.update(images, loss=images / 8)
    progress.close()
    found = [match.groupdict() for match in LINE.finditer(stderr.getvalue())]
    assert all(line["total"] == "1,000" and line["rate"] == "40" for line in found)
    at = {int(line["done"].replace(",", "")): line for line in found}
    known = 604 if stderr.isatty() else 600  # the bar is drawn ten times a second, with the last loss
    assert at[known]["loss"] == "75" and at[known]["left"] == "00:10"  # 400 images at 40 a second
    assert at[1000]["left"] == "00:00"
    if not stderr.isatty():
        assert list(at) == [320, 400, 520, 600, 720, 800, 920, 1000]  # the first losses of each tenth
        assert LINE.fullmatch(stderr.getvalue().splitlines()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kibibytes on Linux
    # half a digit of rounding, and what this process has grown by since the last line
    assert float(found[-1]["memory"]) == pytest.approx(peak, abs=0.06)


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


def test_a_slow_run_shows_a_line_every_five_minutes(monkeypatch) -> None:
    stderr, clock = io.StringIO(), Clock(monkeypatch)
    monkeypatch.setattr("sys.stderr", stderr)
    progress = Progress(total=10**6)
    for images in range(100, 1300, 100):
        clock.now += 100
        progress.update(images, 1.0)
    done = [line.split("/")[0] for line in stderr.getvalue().splitlines()]
    assert done == ["train 300", "train 600", "train 900", "train 1,200"]


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
