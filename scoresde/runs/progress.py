"""Progress of what takes a while: a bar on a terminal, anywhere else a line now and then."""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TypeVar

from torch import Tensor

from ..diffusion.conditions import Cond
from ..diffusion.denoiser import CountingDenoiser, Denoiser
from ..diffusion.prediction import Prediction

# Seconds until the first line, which is to come within 15, and from one to the next, which is to come within 30.
FIRST, EVERY = 10.0, 25.0

Item = TypeVar("Item")


class Lines:
    """Writes a line about everything that is under way, the outermost first: `FIRST` seconds after this process began
    its first work, and then every `EVERY` seconds while there is any.

    A thread writes them, so none is late where one step takes minutes, and it alone asks for the texts.
    """

    def __init__(self) -> None:
        self._under_way: list[Callable[[], str]] = []
        self._change = threading.Condition()
        self._due: float | None = None
        self._writes = False

    @contextlib.contextmanager
    def about(self, text: Callable[[], str]) -> Iterator[None]:
        """Within this block `text()` is in the lines."""
        with self._change:
            now = time.monotonic()
            if not self._under_way:  # what begins when a line is overdue says so soon, but not if it is over at once
                self._due = now + FIRST if self._due is None else max(self._due, now + 1)
            self._under_way.append(text)
            if not self._writes:
                self._writes = True
                threading.Thread(target=self.write, daemon=True).start()
        try:
            yield
        finally:
            with self._change:
                self._under_way.remove(text)
                self._change.notify()

    def write(self) -> None:
        while (line := self._next()) is not None:
            say(line)

    def _next(self) -> str | None:
        """Waits for the next line; None once nothing is under way."""
        with self._change:
            while self._under_way:
                now = time.monotonic()
                if self._due is None or now >= self._due:
                    self._due = now + EVERY
                    return "; ".join(text() for text in self._under_way)
                self._change.wait(self._due - now)
            self._writes = False
        return None


LINES = Lines()


def say(line: str) -> None:
    """Prints a line to stderr, if it can be printed: no line is worth a run."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Says, where there is no terminal, that this is being done; of what comes in parts `track` says more."""
    with LINES.about(lambda: what) if not sys.stderr.isatty() else contextlib.nullcontext():
        yield


def track(items: Iterable[Item], label: str, total: int | None, *, show: bool = True) -> Generator[Item]:
    """Passes the items on and shows how many, their rate and the time left.

    Args:
        items, label, total: the items, their name and about how many there will be; None where that is not known.
        show: False for silence.
    """
    from tqdm import tqdm

    terminal, count, start = sys.stderr.isatty(), 0, time.monotonic()
    bar = tqdm(items, desc=label, total=total, leave=False, dynamic_ncols=True, disable=not (show and terminal))

    def text() -> str:
        of, rate = "" if total is None else f"/{total:,}", count / max(time.monotonic() - start, 1e-9)
        left = "" if total is None or not count else f"  {max(total - count, 0) / rate:.0f} s left"
        return f"{label}: {count:,}{of}" + (f"  {rate:.3g}/s{left}" if count else "")

    with LINES.about(text) if show and not terminal else contextlib.nullcontext():
        for item in bar:
            yield item
            count += 1


class CallsShown(CountingDenoiser):
    """Shows the network calls of something that takes a denoiser, as they come, within a `with` block.

    Args:
        denoiser: what is called.
        label, total, show: as in `track`.
    """

    def __init__(self, denoiser: Denoiser, label: str, total: int | None, *, show: bool = True):
        super().__init__(denoiser)
        self._calls = track(itertools.repeat(None), label, total, show=show)

    def __enter__(self) -> CallsShown:
        return self

    def __exit__(self, *_: object) -> None:
        self._calls.close()

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        next(self._calls)
        return super().forward(x, t, cond)
