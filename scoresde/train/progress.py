"""Progress: a bar on a terminal, a few lines anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def track(
    items: Iterable[Item], label: str, total: int | None = None, *, show: bool = True, every: float = 30.0
) -> Iterator[Item]:
    """The items as they are, with the rate and the time left: a bar on a terminal, elsewhere a line now and then.

    Args:
        items, label: what passes and what to call it.
        total: how many there will be, if that is known.
        show: False for silence.
        every: seconds between two lines.
    """
    if not show:
        return iter(items)
    if not sys.stderr.isatty():
        return _lines(items, label, total, every)
    from tqdm import tqdm

    return iter(tqdm(items, desc=label, total=total, leave=False, dynamic_ncols=True))


def _lines(items: Iterable[Item], label: str, total: int | None, every: float) -> Iterator[Item]:
    start = last = time.monotonic()
    for count, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= every:
            rate, last = count / (now - start), now
            left = "" if total is None else f"  {(total - count) / rate:.0f} s left"
            done = f"{count:,}" if total is None else f"{count:,}/{total:,}"
            print(f"{label} {done}  {rate:.3g}/s{left}", file=sys.stderr, flush=True)


class Progress:
    """Shows images, rate, time left and loss.

    Args:
        total: images of the whole run.
        done: images already behind it.
        lines: lines printed over the run where stderr is no terminal.
    """

    def __init__(self, total: int, done: int = 0, lines: int = 10):
        self.total, self.done, self.lines = total, done, lines
        self._first, self._start = done, time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, unit="img", unit_scale=True, dynamic_ncols=True, desc="train")

    def update(self, images: int, loss: float | None = None) -> None:
        """`images` in all; the loss is shown when it is known."""
        if self._bar is not None:
            self._bar.update(images - self.done)
            if loss is not None:
                self._bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
        elif loss is not None and (self._line(images) > self._line(self.done) or images >= self.total):
            self._print(images, loss)
            self.done = images
        if self._bar is not None:
            self.done = images

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _line(self, images: int) -> int:
        return images * self.lines // max(self.total, 1)

    def _print(self, images: int, loss: float) -> None:
        rate = (images - self._first) / max(time.monotonic() - self._start, 1e-9)
        left = max(self.total - images, 0) / max(rate, 1e-9)
        print(
            f"train {images:,}/{self.total:,} images  loss {loss:.4g}  {rate:,.0f} img/s  {left:.0f} s left",
            file=sys.stderr, flush=True,
        )  # fmt: skip
