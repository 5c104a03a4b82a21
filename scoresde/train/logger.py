"""Where numbers go: `metrics.jsonl` is the record, Weights & Biases a view of it."""

from __future__ import annotations

import abc
import hashlib
import json
import logging
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFacts:
    """What a logger needs to know about the run it follows.

    Attributes:
        folder: the output folder.
        id: stable over restarts, see `run_id`.
        config: resolved configuration.
        group: name of the sweep the run belongs to, None for none.
        resume_step: step of the checkpoint that is continued, 0 for a fresh run.
    """

    folder: Path
    id: str
    config: Mapping[str, Any]
    group: str | None = None
    resume_step: int = 0


class Logger(abc.ABC):
    """Takes numbers, pictures and tables of a run, between `start` and `close`."""

    @abc.abstractmethod
    def start(self, facts: RunFacts) -> None:
        """Begins, or continues, the run."""

    @abc.abstractmethod
    def log(self, values: Mapping[str, float], *, step: int, images: int) -> None:
        """One row: named numbers after `step` optimizer steps on `images` images."""

    @abc.abstractmethod
    def image(self, key: str, path: Path, *, step: int, images: int) -> None:
        """A picture file."""

    @abc.abstractmethod
    def table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A small table."""

    @abc.abstractmethod
    def summary(self, values: Mapping[str, Any]) -> None:
        """Final numbers of the run."""

    @abc.abstractmethod
    def close(self, failed: bool = False) -> None:
        """Ends the run; nothing may be logged afterwards."""


class NullLogger(Logger):
    """Keeps nothing."""

    def start(self, facts: RunFacts) -> None:
        pass

    def log(self, values: Mapping[str, float], *, step: int, images: int) -> None:
        pass

    def image(self, key: str, path: Path, *, step: int, images: int) -> None:
        pass

    def table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        pass

    def summary(self, values: Mapping[str, Any]) -> None:
        pass

    def close(self, failed: bool = False) -> None:
        pass


class JsonlLogger(Logger):
    """`metrics.jsonl`: one JSON object per line, flushed at once; the first holds versions, hardware and commit.

    On resuming, rows after the checkpoint's step, rows of a final evaluation (marked `final`) and a line cut by a
    crash are taken out, so every row stands there once, whatever happened in between. Pictures, tables and final
    numbers are files of the output folder already.
    """

    def __init__(self) -> None:
        self._file: TextIO | None = None

    def start(self, facts: RunFacts) -> None:
        path, last = facts.folder / "metrics.jsonl", facts.resume_step
        rows = [row for row in read_rows(path) if row.get("step", 0) <= last and not row.get("final")] if last else []
        rows.append({"header": provenance(), "step": last})
        temporary = path.with_suffix(".new")
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(_line(row) for row in rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def log(self, values: Mapping[str, float], *, step: int, images: int) -> None:
        if self._file is None:
            raise RuntimeError("metrics.jsonl is not open: call start before log, and nothing after close.")
        self._file.write(_line({"step": step, "images": images, "time": round(time.time(), 3), **values}))
        self._file.flush()

    def image(self, key: str, path: Path, *, step: int, images: int) -> None:
        pass

    def table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        pass

    def summary(self, values: Mapping[str, Any]) -> None:
        pass

    def close(self, failed: bool = False) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _line(row: Mapping[str, Any]) -> str:
    # NaN and infinity are not JSON: they are written as text, so that a row never makes the file unreadable
    finite = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite) + "\n"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, headers included; a line cut by a crash is left out. [] if there is no file."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            _log.warning("%s: a line that was cut is left out: %.60r", path, line)
    return rows


def provenance() -> dict[str, Any]:
    """Versions, hardware and commit: what a number needs beside it to be believed."""
    import numpy
    import torch

    from .. import __version__

    return {
        "scoresde": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
    }


def _commit() -> str | None:
    """Commit of the checkout that scoresde is imported from, with '+' if it was changed; None elsewhere."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=here, capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def run_id(config: Mapping[str, Any], folder: Path) -> str:
    """First 12 hex digits of SHA-1 over the configuration and the last two parts of the output folder's path.

    The same command in the same folder is the same run, also after a restart. `config` comes without the keys that
    say where and how to log.
    """
    text = json.dumps([config, folder.resolve().parts[-2:]], sort_keys=True)
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()[:12]


class WandbLogger(Logger):
    """A Weights & Biases run; any trouble with it costs one warning and the view, never the training.

    Args:
        mode: "offline" (default: no account, no network; `wandb sync` later), "online" or "disabled".
        project, entity, tags: as in `wandb.init`.

    Raises:
        ValueError: an unknown mode.
    """

    def __init__(
        self,
        *,
        mode: str = "offline",
        project: str = "scoresde",
        entity: str | None = None,
        tags: Sequence[str] = (),
    ):
        if mode not in ("offline", "online", "disabled"):
            raise ValueError(f"mode is 'offline', 'online' or 'disabled'; got {mode!r}.")
        self.mode, self.project, self.entity, self.tags = mode, project, entity, list(tags)
        self._run: Any = None

    def start(self, facts: RunFacts) -> None:
        def begin() -> None:
            import wandb

            # no argv and no code in the upload: secrets end up there
            settings = wandb.Settings(
                console="off", silent=True, x_disable_meta=True, save_code=False, init_timeout=60
            )  # fmt: skip
            self._run = wandb.init(
                project=self.project, entity=self.entity, tags=self.tags, mode=cast(Any, self.mode), id=facts.id,
                name=facts.folder.name, group=facts.group, dir=str(facts.folder), config=dict(facts.config),
                resume="allow" if self.mode == "online" else None, job_type="train", reinit="finish_previous",
                settings=settings,
            )  # fmt: skip
            # one axis for all: W&B drops rows whose own step goes back, as it does after a restart
            self._run.define_metric("images")
            self._run.define_metric("*", step_metric="images")

        self._guard(begin)

    def log(self, values: Mapping[str, float], *, step: int, images: int) -> None:
        self._send(lambda run: run.log({**values, "step": step, "images": images}))

    def image(self, key: str, path: Path, *, step: int, images: int) -> None:
        def send(run: Any) -> None:
            import wandb

            run.log({key: wandb.Image(str(path)), "step": step, "images": images})

        self._send(send)

    def table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        def send(run: Any) -> None:
            import wandb

            run.log({key: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

        self._send(send)

    def summary(self, values: Mapping[str, Any]) -> None:
        self._send(lambda run: run.summary.update(dict(values)))

    def close(self, failed: bool = False) -> None:
        self._send(lambda run: run.finish(exit_code=int(failed)))
        self._run = None

    def _send(self, action: Callable[[Any], Any]) -> None:
        """`action` on the W&B run, if there is one still."""
        if self._run is not None:
            self._guard(lambda: action(self._run))

    def _guard(self, action: Callable[[], Any]) -> None:
        """The edge: whatever W&B raises ends its view of the run, with one warning."""
        try:
            action()
        except Exception as error:  # W&B raises anything, from network to pydantic errors
            self._run = None
            _log.warning(
                "W&B stopped (%s: %s); the run goes on, metrics.jsonl has every row.", type(error).__name__, error
            )


class Tee(Logger):
    """Passes everything to several loggers, in order."""

    def __init__(self, *loggers: Logger):
        self.loggers = loggers

    def start(self, facts: RunFacts) -> None:
        for logger in self.loggers:
            logger.start(facts)

    def log(self, values: Mapping[str, float], *, step: int, images: int) -> None:
        for logger in self.loggers:
            logger.log(values, step=step, images=images)

    def image(self, key: str, path: Path, *, step: int, images: int) -> None:
        for logger in self.loggers:
            logger.image(key, path, step=step, images=images)

    def table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        for logger in self.loggers:
            logger.table(key, columns, rows)

    def summary(self, values: Mapping[str, Any]) -> None:
        for logger in self.loggers:
            logger.summary(values)

    def close(self, failed: bool = False) -> None:
        for logger in self.loggers:
            logger.close(failed)
