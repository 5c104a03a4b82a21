"""Weights & Biases, kept at arm's length: the training process writes to a file and never waits."""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checks import positive
from . import wandb_view
from .logger import Logger, RunFacts, plain
from .redact import redacted

_log = logging.getLogger(__name__)
_ENCODER = json.JSONEncoder(default=plain)
_VARIABLES = {"group": "WANDB_RUN_GROUP", "id": "WANDB_RUN_ID"}  # others are named as the argument
_OLD_MODES = {"dryrun": "offline", "run": "online"}  # that W&B still understands


class WandbLogger(Logger):
    """A Weights & Biases view of the run, in a process of its own (`wandb_view`).

    Nothing of W&B runs in the training process, and no call but `close` waits for it: what is logged goes to a
    temporary file, which the view reads to its end also when training has been killed. So a failure of W&B or of the
    network costs one warning and at most `finish_timeout` seconds at the end, and metrics.jsonl has every row. Offline,
    the view opens no connection, not even for W&B's own telemetry.

    What is None is what W&B's own variable says, so that WANDB_MODE=disabled or WANDB_PROJECT=… work as everywhere;
    WANDB_DIR, WANDB_RUN_ID and WANDB_RESUME are taken as well. WANDB_SILENT=true prints neither the line that uploads
    an offline run nor where an online one is shown.

    Args:
        mode: "offline" (no account, no network; `wandb sync` later), "online" or "disabled". None: WANDB_MODE, else
            "online" for a run that `wandb agent` starts, else "offline".
        project, entity, name, group, tags, notes, job_type: as in `wandb.init`. None: WANDB_PROJECT, WANDB_ENTITY,
            WANDB_NAME, WANDB_RUN_GROUP, WANDB_TAGS (a,b), WANDB_NOTES, WANDB_JOB_TYPE, else project "scoresde", the
            folder's name, the sweep as the group and the command.
        finish_timeout: seconds that `close` waits at most, > 0. W&B has two fifths of it to begin an online run, which
            is kept offline otherwise, and two fifths to upload the rest at the end. Rows that were not uploaded by then
            are on the disk, and one line says how to upload them.

    Raises:
        ValueError: the mode is unknown, a project or run id is none of W&B's, or the timeout is not positive.
    """

    def __init__(
        self,
        *,
        mode: str | None = None,
        project: str | None = None,
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: Sequence[str] | None = None,
        notes: str | None = None,
        job_type: str | None = None,
        finish_timeout: float = 60.0,
    ):
        self.mode = _mode() if mode is None else mode
        if self.mode not in ("offline", "online", "disabled"):
            which = "WANDB_MODE" if mode is None else "mode"
            raise ValueError(f"{which} is 'offline', 'online' or 'disabled'; got {self.mode!r}.")
        variables = {} if self.mode == "disabled" else {key: _told(key) for key in ("resume", "project", "id")}
        if (resume := variables.get("resume")) not in (None, "", "allow", "must", "never", "auto"):
            raise ValueError(f"WANDB_RESUME is 'allow', 'must', 'never' or 'auto'; got {resume!r}.")
        if tags is not None:
            tags = [str(tag) for tag in (tags if isinstance(tags, (list, tuple)) else str(tags).split(","))]
            if wrong := [tag for tag in tags if not 1 <= len(tag) <= 64]:
                raise ValueError(f"A tag has 1 to 64 characters; got {wrong[0]!r}.")
        said = {"project": project, "entity": entity, "name": name, "group": group, "tags": tags, "notes": notes}
        said |= {"job_type": job_type}
        self.said: dict[str, Any] = redacted({key: value for key, value in said.items() if value is not None})
        for key, refused in (("project", "/\\#?%:"), ("id", ":;,#?/'")):
            value = self.said.get(key) or variables.get(key, "")
            if found := sorted(set(value) & set(refused)):
                raise ValueError(f"The {key} of a W&B run holds none of {refused}; got {value!r} with {found[0]!r}.")
        self.finish_timeout = positive(finish_timeout, "finish_timeout", "a number of seconds")
        self._view: subprocess.Popen[bytes] | None = None
        self._folder, self._warned = "", False

    def start(self, facts: RunFacts) -> None:
        self.close()
        if self.mode == "disabled":
            return
        self._id = facts.id if facts.group is not None else _told("id") or facts.id
        if _told("id") not in ("", self._id):
            _log.warning("WANDB_RUN_ID=%s is the name of one run; the jobs of a sweep have their own.", _told("id"))
        usual = {"project": "scoresde", "name": facts.folder.name, "group": facts.group, "job_type": facts.work}
        usual["resume"] = "allow"
        # what is left away W&B takes from its variable
        run = {key: value for key, value in usual.items() if not _told(key)} | self.said
        run |= {"id": self._id, "dir": os.path.abspath(_told("dir") or facts.folder), "config": dict(facts.config)}
        command = [sys.executable, "-P", wandb_view.__file__, str(os.getpid())]
        environment = {"WANDB_ERROR_REPORTING": "false", **os.environ}  # telemetry, which can hold up the exit by 15 s
        self._folder, self._warned = f"{facts.folder}/wandb/*run-*", False
        self._cut, self._listened = b"", 0.0
        try:
            # each end opens a file for itself, so that it has a position of its own; the names go at once
            with tempfile.NamedTemporaryFile() as sent, tempfile.NamedTemporaryFile() as said:
                self._sent, self._said = open(sent.name, "ab"), open(said.name, "rb")  # noqa: SIM115 (closed by close)
                self._view = subprocess.Popen(
                    command, stdin=sent, stdout=said, stderr=subprocess.DEVNULL, start_new_session=True, env=environment
                )
        except OSError as error:
            self._warn(f"W&B cannot be started ({error}); the run goes on, metrics.jsonl has every row.")
            return
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
        self._send("close", int(failed))
        if self._view is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._view.wait(self.finish_timeout)
            self._end(f"W&B did not end within {self.finish_timeout:g} s")
            if not self._warned and "/offline-run-" in self._folder and not _silent():
                earlier = Path(self._folder).parent.glob(f"offline-run-*-{glob.escape(self._id)}*")
                _log.info("To upload the run to W&B: wandb sync %s", shlex.join(sorted(map(str, earlier))))

    def _send(self, *message: Any) -> None:
        """Leaves a message for the view and now and then passes on what that has said, without waiting."""
        if self._view is None:
            return
        try:
            self._sent.write(_ENCODER.encode(message).encode() + b"\n")
            self._sent.flush()
        except OSError as error:
            self._end(f"W&B's process cannot be told more ({error})")
            return
        if time.monotonic() - self._listened >= 1:  # listening takes as long as sending
            self._listen()
            if self._view.poll() is not None:
                self._end("")

    def _listen(self) -> None:
        self._listened = time.monotonic()
        *lines, self._cut = (self._cut + self._said.read()).split(b"\n")
        for line in lines:
            kind, text = json.loads(line)
            if kind == "folder":
                self._folder = text
            elif kind == "url":
                if not _silent():
                    _log.info("W&B shows the run at %s", text)
            else:
                self._warn(text)

    def _end(self, trouble: str) -> None:
        """Leaves the view; one that has not ended is made to, and `trouble` says why."""
        view, self._view = self._view, None
        assert view is not None
        if view.returncode is not None:
            trouble = f"W&B's process ended with code {view.returncode}" if view.returncode else ""
        view.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            view.wait(1)
        self._listen()
        for file in (self._sent, self._said):
            with contextlib.suppress(OSError):
                file.close()
        if trouble and not self._warned:
            self._warn(f"{trouble}; metrics.jsonl has every row; later: wandb sync {self._folder}")

    def _warn(self, text: str) -> None:
        self._warned = True
        _log.warning("%s", text)


def _told(key: str) -> str:
    """What W&B's variable of an argument says, empty where it is not set."""
    return os.environ.get(_VARIABLES.get(key, f"WANDB_{key.upper()}"), "")


def _silent() -> bool:
    return _told("silent").lower() in ("1", "true", "yes", "on", "t", "y")


def _mode() -> str:
    return _OLD_MODES.get(_told("mode"), _told("mode")) or ("online" if _told("sweep_id") else "offline")
