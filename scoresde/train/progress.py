"""Progress of training: a bar on a terminal, anywhere else a line now and then."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Iterator

import torch
from tqdm import tqdm

from ..runs.progress import LINES, say


class Progress:
    """Shows images, loss, rate, time left and peak memory: a bar on a terminal, a line now and then elsewhere.

    The rate is that of the last ten intervals between losses, at which the device has finished what it was given; the
    first step, which may compile, and whatever is done within `paused` do not count. Where stderr is no terminal it is
    in the lines of `runs.progress`, and the end has one of its own.

    Args:
        total: images of the whole run.
        done: images that had been seen before.
        device: whose memory is shown, "cuda" or "cuda:1"; any other stands for the process.
        show: False for silence, as in every process but the first.
    """

    def __init__(self, total: int, done: int = 0, *, device: torch.device | str = "cpu", show: bool = True):
        self.total, self.images, self.device = total, done, torch.device(device)
        self._idle = 0.0
        self._start = self._drawn = time.monotonic()
        self._marks: deque[tuple[float, int]] = deque(maxlen=11)  # clock and images at the end of each interval
        self._first, self._loss = done, ""
        terminal = sys.stderr.isatty()
        silent = not (show and terminal)
        self._bar = tqdm(total=total, initial=done, dynamic_ncols=True, bar_format="{bar:20} {desc}", disable=silent)
        self._lines = contextlib.ExitStack()
        self._ends = show and not terminal and done < total  # whether a line about the end is to come
        if show and not terminal:
            self._lines.enter_context(LINES.about(lambda: self._text(self.images)))

    def update(self, images: int, loss: float | None = None) -> None:
        """Reports that `images` images have been seen in all, and the loss where it is known."""
        if not self._marks or (loss is not None and images > self._marks[-1][1]):
            self._marks.append((self._clock(), images))
        now, self.images = time.monotonic(), images
        if loss is not None:
            self._loss = f"  loss {loss:.4g}"
        if not self._bar.disable and (now - self._drawn >= 0.1 or images >= self.total):
            self._bar.n, self._drawn = images, now
            self._bar.set_description_str(self._text(images))
        if self._ends and loss is not None and images >= self.total:
            self._ends = False
            say(self._text(images))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time spent in here, on an evaluation say, does not count for the rate."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._idle += time.monotonic() - start

    def rate(self, images: int) -> float:
        """Images per second over the last intervals."""
        marks = list(self._marks) or [(self._start, self._first)]
        (start, first), (end, last) = marks[0], marks[-1]
        if last <= first:  # there is only the first step so far
            start, first, end, last = self._start, self._first, self._clock(), images
        return (last - first) / max(end - start, 1e-9)

    def close(self) -> None:
        self._lines.close()
        self._bar.close()

    def _clock(self) -> float:
        return time.monotonic() - self._idle

    def _text(self, images: int) -> str:
        rate = self.rate(images)
        left = tqdm.format_interval(round(max(self.total - images, 0) / rate)) if rate else "?"
        memory = peak_memory(self.device) / 2**30
        return f"train {images:,}/{self.total:,} images{self._loss}  {rate:,.0f} img/s  {left} left  {memory:.1f} GiB"


def peak_memory(device: torch.device) -> int:
    """The largest number of bytes in use so far: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
