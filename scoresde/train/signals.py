"""Signals that ask a run to end: it finishes its step, saves, and leaves with the exit code of the signal."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, ClassVar


class Interrupted(BaseException):
    """Raised within `Signals.interruptible` when a signal arrives. What it interrupts does not change the run."""


class Stopped(SystemExit):
    """The run was asked to end, and did: everything is saved. `code` is the exit status, 128 + the signal's number
    (143 also for SIGUSR1, which schedulers send some time before SIGTERM).
    """

    def __init__(self, code: int, message: str):
        super().__init__(code)
        self.message = message


def heard(number: signal.Signals) -> bool:
    """Whether a signal is one to this process: `nohup` has SIGHUP ignored, and it is to stay so."""
    return number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN


class Signals:
    """SIGTERM, SIGINT, SIGHUP and SIGUSR1 while the `with` block runs; handlers are restored after it.

        with Signals() as signals:
            while not signals.code: …

    The first sets `code`; a second one ends the process at once, with the same exit status. Those of the first `GRACE`
    seconds count as one: a scheduler signals every process of a job, and `torchrun` then passes on its own. Outside the
    main thread Python takes no handlers, and nothing is caught; nor is SIGHUP where it is ignored (`nohup`).

    Attributes:
        code: exit status that was asked for, 0 for none.
    """

    CODES: ClassVar[dict[signal.Signals, int]] = {
        signal.SIGTERM: 143,
        signal.SIGUSR1: 143,
        signal.SIGINT: 130,
        signal.SIGHUP: 129,
    }
    GRACE: ClassVar[float] = 2.0

    def __init__(self) -> None:
        self.code = 0
        self._raising, self._since = False, 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in self.CODES if heard(number)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.code:
            if time.monotonic() - self._since > self.GRACE:
                os._exit(self.code)
            return
        self._since = time.monotonic()
        self.code = self.CODES[signal.Signals(number)]
        name = signal.Signals(number).name
        # os.write, because print may be what was interrupted; a Ctrl-C also ends the `tee` that would read it
        with contextlib.suppress(OSError, ValueError):
            text = f"\n{name}: ending as soon as this step is saved; once more, 2 s from now, ends at once.\n"
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())
        if self._raising:
            raise Interrupted

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """A signal raises `Interrupted` in here. It is for work that takes long and does not change the run."""
        self._raising = True
        try:
            if self.code:
                raise Interrupted
            yield
        finally:
            self._raising = False
