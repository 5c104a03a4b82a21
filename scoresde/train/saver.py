"""Checkpoints written while training goes on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..runs.checkpoint import CheckpointError, save, sweep

_log = logging.getLogger(__name__)


class Saver:
    """Writes one checkpoint at a time, in a thread of its own.

    What it is given must not change any more: `Training.tensors` are copies. A write that failed is told at the next
    call, or when the writer is closed; training then stops, or goes on with a warning until the next one.

    Args:
        folder: of the checkpoints.
        keep_last, keep_best: see `save`.
        background: False writes before `save` returns.
        go_on: a write that failed is a warning.
    """

    def __init__(
        self, folder: Path, *, keep_last: int = 2, keep_best: int = 0, background: bool = True, go_on: bool = False
    ):
        self.folder, self.keep_last, self.keep_best = folder, keep_last, keep_best
        self.background, self.go_on = background, go_on
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        if folder.is_dir():
            sweep(folder)  # a run that was killed after its last save makes no other

    def save(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], records: Mapping[str, Any],
        score: float | None = None,
    ) -> None:  # fmt: skip
        """Waits for the write before this one, and starts.

        Raises:
            CheckpointError: a write failed and `go_on` is False.
        """
        self.wait()

        def write() -> None:
            try:
                save(
                    self.folder, step, tensors, records, keep_last=self.keep_last, keep_best=self.keep_best, score=score
                )
            except BaseException as error:  # told by `wait`, in the thread that trains
                self._error = error

        if not self.background:
            write()
            self.wait()
            return
        self._thread = threading.Thread(target=write, name="checkpoint", daemon=False)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            CheckpointError: a write failed and `go_on` is False.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._tell(self.go_on)

    def check(self) -> None:
        """The same without waiting."""
        if self._thread is None or not self._thread.is_alive():
            self.wait()

    def close(self) -> None:
        """Until the last one is written; what is lost now is lost, so an error is raised in any case."""
        go_on, self.go_on = self.go_on, False
        try:
            self.wait()
        finally:
            self.go_on = go_on

    def _tell(self, go_on: bool) -> None:
        error, self._error = self._error, None
        if error is None:
            return
        try:
            raise error
        except CheckpointError:
            if not go_on:
                raise
            _log.warning("%s Training goes on; the next checkpoint tries again.", error)
