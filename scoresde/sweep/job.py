"""One job of a sweep: its `job.json` records how it ended, and a failure does not stop the next job."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig

from ..config import Refusal
from ..runs import lock
from ..runs.files import find, values
from ..runs.folder import finish
from ..runs.listing import number
from ..runs.publish import content_of, publish
from ..runs.redact import guard, redacted
from ..train.signals import Signals

# In the sweep's folder. STOP holds an exit status: no further job starts. AGAIN: the launcher was started once more
# within one command, for the jobs that wait; those that have failed are not tried twice.
STOP, AGAIN = ".stop", ".again"
_log = logging.getLogger(__name__)


def one_job(work: Callable[[], Mapping[str, float]], *, resume: bool, in_process: bool) -> float:
    """Runs a job and records its end. Returns its objective: NaN if it failed or was stopped.

    A job that has finished already with the same overrides is not run again. Neither an error nor a signal that ends
    the job is raised, because launchers take both for the end of the sweep and kill the other jobs.

    Args:
        work: trains and measures; returns "objective" and the numbers that it was made of.
        resume: keep the jobs that an earlier sweep has finished.
        in_process: whether jobs run in the process of the sweep itself, one after the other.
    """
    hydra, start = HydraConfig.get(), time.monotonic()
    folder, sweep, overrides = Path(hydra.runtime.output_dir), Path(str(hydra.sweep.dir)), list(hydra.overrides.task)
    if not in_process:  # the sweep's own process has a guard already
        guard()

    name = os.path.relpath(folder, sweep)

    def ended(status: str, **measured: Any) -> None:
        write_job(folder, name, overrides, status, seconds=round(time.monotonic() - start, 1), **measured)

    if (resume or (sweep / AGAIN).exists()) and (objective := objective_of(folder, overrides)) is not None:
        print(f"Job {name} is finished already: objective {objective:.6g}.", flush=True)
        return objective
    if (sweep / AGAIN).exists() and read_job(folder).get("status") == "failed":
        return float("nan")
    # this order matters: whoever stops the sweep writes STOP first, and then signals the jobs on record
    write_job(folder, name, overrides, "running", **lock.note())
    if (sweep / STOP).exists():
        write_job(folder, name, overrides, "waiting")
        return float("nan")
    turn = Turn()
    try:
        with turn:
            result = work()
    except Refusal as error:
        _log.error("job %s failed: %s", name, error)
        ended("failed", error=str(error))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        _log.error("job %s failed: %s", name, reason, exc_info=True)
        ended("failed", error=reason)
    except (SystemExit, KeyboardInterrupt) as error:
        code = error.code if isinstance(error, SystemExit) else 130
        if code not in Signals.CODES.values():
            ended("failed", error=f"left with exit status {code}")
            return float("nan")
        ended("stopped")
        turn.give_back()
        if in_process:
            publish(sweep / STOP, str(code))
    else:
        ended("finished", **result)
        return result["objective"]
    return float("nan")


def jobs_of(sweep: Path) -> list[Path]:
    """The folders with a record of a job of this sweep, however deep they lie; not those of sweeps in folders below."""
    found = [folder for folder in find(sweep) if os.path.lexists(folder / "job.json")]
    return [at for at in found if at.parent == sweep or record_of(sweep, at)["job"] == os.path.relpath(at, sweep)]


def record_of(sweep: Path, folder: Path) -> dict[str, Any]:
    """What the record of a job says; of one that is damaged, that it is."""
    damaged = {"overrides": [], "status": "damaged", "folder": str(folder), "error": "job.json is damaged"}
    return {"job": os.path.relpath(folder, sweep), **(read_job(folder) or damaged)}


def write_job(folder: Path, name: str, overrides: Sequence[str], status: str, **measured: Any) -> None:
    """Publishes what is known of one job in its folder; `name` is the folder as the sweep sees it."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"job": name, "status": status, "overrides": list(overrides), "folder": str(folder), **measured}
    finish(folder / "job.json", record)


def read_job(folder: Path) -> dict[str, Any]:
    """The record in `job.json`; empty if the file is missing or damaged."""
    try:
        found = json.loads(content_of(folder / "job.json"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("overrides"), list) else {}


def objective_of(folder: Path, overrides: Sequence[str]) -> float | None:
    """Objective of the job in `folder` if it has finished with these overrides; None otherwise."""
    job = read_job(folder)
    same = job.get("status") == "finished" and values(job["overrides"]) == values(redacted(overrides))
    objective = number(job.get("objective")) if same else None
    return None if objective is None else float(objective)


class Turn:
    """The time in which a process works on a job; lets a run save before submitit hands the turn to the scheduler.

    The scheduler sends SIGUSR2 some time before a job's time is over. submitit's handler of it asks for another turn
    and ends the process at once. Within this block the run gets SIGUSR1 instead, on which it saves and ends;
    `give_back` then calls submitit's handler.
    """

    taken: ClassVar[bool] = False  # whether this process is within a job

    def __enter__(self) -> Turn:
        Turn.taken, self.asked = True, False
        self._requeue: Any = signal.getsignal(signal.SIGUSR2)
        self._shared = callable(self._requeue) and threading.current_thread() is threading.main_thread()
        if self._shared:
            signal.signal(signal.SIGUSR2, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        Turn.taken = False
        if self._shared:
            signal.signal(signal.SIGUSR2, self._requeue)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if not callable(signal.getsignal(signal.SIGUSR1)):
            self._requeue(number, frame)  # there is nothing to save yet
        elif not self.asked:
            self.asked = True
            os.kill(os.getpid(), signal.SIGUSR1)

    def give_back(self) -> None:
        """Leaves the process, if the scheduler was to be asked for another turn."""
        if self.asked:
            self._requeue(signal.SIGUSR2, None)
