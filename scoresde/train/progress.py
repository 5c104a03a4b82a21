"""Progress: a bar on a terminal, a few lines anywhere else."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Iterator

import torch
from tqdm import tqdm


class Progress:
    """Shows images, loss, rate, time left and peak memory: a bar on a terminal, a line now and then elsewhere.

    The rate is that of the last ten intervals between losses, at which the device has finished what it was given; the
    first step, which may compile, and whatever is done within `paused` do not count. Where stderr is no terminal there
    are `LINES` lines over the run at even distances, and one at the first loss that comes more than `SECONDS` seconds
    after the last line.

    Args:
        total: images of the whole run.
        done: images that had been seen before.
        device: whose memory is shown, "cuda" or "cuda:1"; any other stands for the process.
        show: False for silence, as in every process but the first.
    """

    LINES, SECONDS = 10, 300.0

    def __init__(self, total: int, done: int = 0, *, device: torch.device | str = "cpu", show: bool = True):
        self.total, self.done, self.show, self.device = total, done, show, torch.device(device)
        self._idle = 0.0
        self._start = self._shown = time.monotonic()
        self._marks: deque[tuple[float, int]] = deque(maxlen=11)  # clock and images at the end of each interval
        self._first, self._loss = done, ""
        silent = not (show and sys.stderr.isatty())
        self._bar = tqdm(total=total, initial=done, dynamic_ncols=True, bar_format="{bar:20} {desc}", disable=silent)

    def update(self, images: int, loss: float | None = None) -> None:
        """Reports that `images` images have been seen in all, and the loss where it is known."""
        if not self._marks or (loss is not None and images > self._marks[-1][1]):
            self._marks.append((self._clock(), images))
        now = time.monotonic()
        if loss is not None:
            self._loss = f"  loss {loss:.4g}"
        if not self._bar.disable:
            if now - self._shown >= 0.1 or images >= self.total:
                self._bar.n, self._shown = images, now
                self._bar.set_description_str(self._text(images))
        elif loss is not None and self.show:
            due = self._line(images) > self._line(self.done) or images >= self.total > self.done
            if due or now - self._shown >= self.SECONDS:
                print(self._text(images), file=sys.stderr, flush=True)
                self.done, self._shown = images, now

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
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        if last <= first:  # there is only the first step so far
            start, first, end, last = self._start, self._first, self._clock(), images
        return (last - first) / max(end - start, 1e-9)

    def close(self) -> None:
        self._bar.close()

    def _clock(self) -> float:
        return time.monotonic() - self._idle

    def _line(self, images: int) -> int:
        return images * self.LINES // max(self.total, 1)

    def _text(self, images: int) -> str:
        rate = self.rate(images)
        left = tqdm.format_interval(round(max(self.total - images, 0) / max(rate, 1e-9)))
        memory = peak_memory(self.device) / 2**30
        return f"train {images:,}/{self.total:,} images{self._loss}  {rate:,.0f} img/s  {left} left  {memory:.1f} GiB"


def peak_memory(device: torch.device) -> int:
    """The largest number of bytes in use so far: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
