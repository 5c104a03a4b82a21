"""Progress: a bar with rate and time left on a terminal, a few lines elsewhere, and never a change to what passes."""

from __future__ import annotations

import io

import pytest

from scoresde.train.progress import Progress, track


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


@everywhere
def test_a_run_shows_images_loss_rate_and_time_left(stream, monkeypatch) -> None:
    """On a terminal the bar holds the last loss; elsewhere there is a line at each tenth."""
    stderr = stream()
    monkeypatch.setattr("sys.stderr", stderr)
    progress = Progress(total=1000, done=200)
    for images in range(240, 1001, 40):
        progress.update(images, loss=images / 8)
    progress.close()
    text = stderr.getvalue()
    if stderr.isatty():
        assert "1.00k/1.00k" in text and "loss=125" in text and "img/s" in text
    else:
        lines = text.splitlines()
        assert len(lines) == 8 and lines[-1].startswith("train 1,000/1,000 images  loss 125 ")
        assert all("img/s" in line and line.endswith("s left") for line in lines)
