"""Checkpoints written while training goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from ..runs.checkpoint import CheckpointError

_log = logging.getLogger(__name__)


class Saver:
    """Runs one write at a time, in a thread of its own.

    A write that failed is reported at the next call, or when the saver is closed; training then stops, or goes on with
    a warning until the next one.

    Args:
        background: False finishes a write before `start` returns.
        go_on: a write that failed is a warning.
    """

    def __init__(self, *, background: bool = True, go_on: bool = False):
        self.background, self.go_on = background, go_on
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[object] | None = None

    def start(self, write: Callable[[], object]) -> None:
        """Waits for the write before this one, and starts. What `write` reads must not change any more.

        Raises:
            CheckpointError: a write failed and `go_on` is False.
        """
        self.wait()
        self._pending = self._thread.submit(write)
        if not self.background:
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written.

        Raises:
            CheckpointError: a write failed and `go_on` is False.
        """
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except CheckpointError as error:
            if not self.go_on:
                raise
            _log.warning("%s Training goes on; the next checkpoint tries again.", error)

    def check(self) -> None:
        """Reports a write that has failed, without waiting for one that goes on.

        Raises:
            CheckpointError: a write failed and `go_on` is False.
        """
        if self._pending is not None and self._pending.done():
            self.wait()

    def close(self) -> None:
        """Waits for the last write; no later one makes up for it, so its error is raised in any case."""
        self.go_on = False
        try:
            self.wait()
        finally:
            self._thread.shutdown()
