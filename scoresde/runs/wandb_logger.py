"""Weights & Biases, kept at arm's length: the training process writes to a pipe and never waits."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import wandb_view
from .logger import Logger, RunFacts, plain

_log = logging.getLogger(__name__)
_ENCODER = json.JSONEncoder(default=plain)
_MOST = 2**26  # bytes that may wait for a view that has stopped reading: about 300,000 rows


class WandbLogger(Logger):
    """A Weights & Biases view of the run, in a process of its own (`wandb_view`).

    Nothing of W&B runs in the training process, and no call but `close` waits for it: what the pipe to the view does
    not take at once waits in memory. So a failure of W&B or of the network costs one warning and at most
    `finish_timeout` seconds at the end, and metrics.jsonl has every row. Offline, the view opens no connection, not
    even for W&B's own telemetry.

    Args:
        mode: "offline" (default: no account, no network; `wandb sync` later), "online" or "disabled".
        project, entity, tags: as in `wandb.init`.
        finish_timeout: seconds that `close` waits at most, > 0. W&B has two fifths of it to begin an online run, which
            is kept offline otherwise, and two fifths to upload the rest at the end. Rows that were not uploaded by then
            are on the disk, and one line says how to upload them.

    Raises:
        ValueError: the mode is unknown, or the timeout is not positive.
    """

    def __init__(
        self,
        *,
        mode: str = "offline",
        project: str = "scoresde",
        entity: str | None = None,
        tags: Sequence[str] = (),
        finish_timeout: float = 60.0,
    ):
        if mode not in ("offline", "online", "disabled"):
            raise ValueError(f"mode is 'offline', 'online' or 'disabled'; got {mode!r}.")
        number = isinstance(finish_timeout, (int, float)) and not isinstance(finish_timeout, bool)
        if not (number and 0 < finish_timeout < math.inf):
            raise ValueError(f"finish_timeout is a positive number of seconds; got {finish_timeout!r}.")
        self.mode, self.project, self.entity, self.tags = mode, project, entity, list(tags)
        self.finish_timeout = float(finish_timeout)
        self._view: subprocess.Popen[bytes] | None = None
        self._waiting, self._heard = bytearray(), bytearray()
        self._folder, self._warned, self._listened = "", False, 0.0

    def start(self, facts: RunFacts) -> None:
        self.close()
        if self.mode == "disabled":
            return
        run = {
            "project": self.project,
            "entity": self.entity,
            "tags": self.tags,
            "id": facts.id,
            "name": facts.folder.name,
            "group": facts.group,
            "dir": str(facts.folder.absolute()),
            "config": dict(facts.config),
        }
        self._folder, self._warned = f"{facts.folder}/wandb/*run-*", False
        self._waiting, self._heard = bytearray(), bytearray()
        try:
            self._view = subprocess.Popen(
                [sys.executable, "-P", wandb_view.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                bufsize=0,
                env={"WANDB_ERROR_REPORTING": "false", **os.environ},  # telemetry, which can hold up the exit by 15 s
            )
        except OSError as error:
            self._warn(f"W&B cannot be started ({error}); the run goes on, metrics.jsonl has every row.")
            return
        for pipe in self._pipes():
            os.set_blocking(pipe, False)
        with contextlib.suppress(OSError, ImportError):  # room for 5,000 rows, which outlive a kill of training
            from fcntl import F_SETPIPE_SZ, fcntl

            fcntl(self._pipes()[0], F_SETPIPE_SZ, 2**20)
        self._send("start", {"run": run, "mode": self.mode, "pid": os.getpid(), "patience": 0.4 * self.finish_timeout})

    def log(self, values: Mapping[str, float], *, step: int, images: int) -> None:
        self._send("log", {**values, "step": step, "images": images})

    def image(self, key: str, path: Path, *, step: int, images: int) -> None:
        self._send("image", key, str(path.absolute()), {"step": step, "images": images})

    def table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self._send("table", key, list(columns), [list(row) for row in rows])

    def summary(self, values: Mapping[str, Any]) -> None:
        self._send("summary", dict(values))

    def close(self, failed: bool = False) -> None:
        deadline = time.monotonic() + self.finish_timeout
        self._send("close", int(failed))
        while self._view is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                self._end(f"W&B did not end within {self.finish_timeout:g} s")
                break
            stdin, stdout = self._pipes()
            events = select.poll()
            events.register(stdout, select.POLLIN)
            if self._waiting:
                events.register(stdin, select.POLLOUT)
            events.poll(1000 * left)
            self._exchange(max(deadline - time.monotonic(), 0.0))

    def _send(self, *message: Any) -> None:
        if self._view is not None:
            self._waiting += _ENCODER.encode(message).encode() + b"\n"
            self._exchange()

    def _exchange(self, left: float | None = None) -> None:
        """Writes what the pipe takes and, now and then, passes on what the view says, without waiting.

        Args:
            left: seconds that `close` has left; None during training.
        """
        (stdin, stdout), gone = self._pipes(), len(self._waiting) > _MOST
        try:
            while self._waiting:
                del self._waiting[: os.write(stdin, self._waiting)]
        except BlockingIOError:
            pass
        except OSError:
            gone = True
        now = time.monotonic()
        if not gone and left is None and now - self._listened < 1:  # listening takes as long as sending
            return
        self._listened = now
        with contextlib.suppress(BlockingIOError):
            while said := os.read(stdout, 65536):
                self._heard += said
            gone = True
        while (end := self._heard.find(b"\n")) >= 0:
            kind, text = json.loads(self._heard[:end])
            del self._heard[: end + 1]
            if kind == "folder":
                self._folder = text
            else:
                self._warn(text)
        if gone:
            self._end("W&B's process ended, or reads no more" if left is None else "", left or 0.0)

    def _end(self, trouble: str, left: float = 0.0) -> None:
        """Leaves the view, which ends within `left` seconds or is made to."""
        view, self._view, self._waiting = self._view, None, bytearray()
        assert view is not None and view.stdin is not None and view.stdout is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            view.wait(left)
        if view.returncode is None:
            view.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                view.wait(1)
        view.stdin.close()
        view.stdout.close()
        if view.returncode:
            trouble = trouble or f"W&B's process ended with code {view.returncode}"
        if trouble and not self._warned:
            self._warn(f"{trouble}; metrics.jsonl has every row; later: wandb sync {self._folder}")

    def _pipes(self) -> tuple[int, int]:
        """File numbers of the pipe to the view and of the one from it."""
        view = self._view
        assert view is not None and view.stdin is not None and view.stdout is not None
        return view.stdin.fileno(), view.stdout.fileno()

    def _warn(self, text: str) -> None:
        self._warned = True
        _log.warning("%s", text)
