"""Checkpoints written while training goes on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from ..runs.checkpoint import CheckpointError, save, sweep

_log = logging.getLogger(__name__)


class Saver:
    """Writes one checkpoint at a time, in a thread of its own.

    What it is given must not change any more: `TrainingState.tensors` are copies. A write that failed is reported at
    the next call, or when the writer is closed; training then stops, or goes on with a warning until the next one.

    Args:
        folder: of the checkpoints; None writes nothing.
        keep_last, keep_best: see `save`.
        background: False writes before `save` returns.
        go_on: a write that failed is a warning.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        keep_last: int = 2,
        keep_best: int = 0,
        background: bool = True,
        go_on: bool = False,
    ):
        self.folder, self.keep_last, self.keep_best = folder, keep_last, keep_best
        self.background, self.go_on = background, go_on
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[Path] | None = None
        if folder is not None and folder.is_dir():
            sweep(folder)  # a run that was killed after its last save makes no other

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        records: Mapping[str, Any],
        score: float | None = None,
    ) -> None:
        """Waits for the write before this one, and starts.

        Raises:
            CheckpointError: a write failed and `go_on` is False.
        """
        if self.folder is None:
            return
        self.wait()
        keep = {"keep_last": self.keep_last, "keep_best": self.keep_best}
        self._pending = self._thread.submit(save, self.folder, step, tensors, records, score=score, **keep)
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
        """Waits for the last write; there is no later one to make up for it, so its error is raised in any case."""
        self.go_on = False
        try:
            self.wait()
        finally:
            self._thread.shutdown()
