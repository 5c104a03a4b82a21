"""A sweep from start to end: which jobs of an earlier one are kept, how it is stopped, `sweep.csv` and the report."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from ..runs.files import natural, read, values
from ..runs.listing import differing, layout, number, window
from ..runs.lock import alive
from ..runs.publish import content_of, publish
from ..train.signals import Signals, heard
from .job import AGAIN, STOP, Turn, jobs_of, objective_of, read_job, record_of, write_job
from .page import write_page

_FIXED = ("job", "status", "objective")
_MEASURED = ("bits_per_dim", "stderr", "loss", "seconds", "folder", "error")
_CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_log = logging.getLogger(__name__)


class SweepSummary(Callback):
    """Hydra calls this around a multirun; each job leaves a `job.json` in its folder."""

    # set in the process of the sweep only, not in those of its jobs
    current: ClassVar[Sweep | None] = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(str(config.hydra.sweep.dir))
        if SweepSummary.current is not None:  # started again for the jobs that wait
            return
        subdir, resume = Path(str(config.hydra.sweep._get_node("subdir"))), OmegaConf.select(config, "resume") == "auto"
        if subdir.is_absolute() or ".." in subdir.parts:
            raise SystemExit(f"error: hydra.sweep.subdir={subdir} leads out of the sweep's folder, {folder}.")
        there = (folder / "sweep.csv").exists() or jobs_of(folder)
        if there and not resume and OmegaConf.select(config, "overwrite") is not True:
            cure = "Continue it with resume=auto, replace it with overwrite=true, or choose another folder: out=…."
            # Hydra swallows any other exception of a callback
            raise SystemExit(f"error: {folder} holds a sweep already. {cure}")
        for job in map(read, jobs_of(folder)):
            if job.state == "running":
                where = f"job {job.folder.relative_to(folder)} of the sweep in {folder} is running ({job.reason})"
                raise SystemExit(f"error: {where}. Wait for it to end, or choose another folder: out=….")
        SweepSummary.current = Sweep(folder, planned(config), keep=resume)
        # jobs in a queue wait for their turn also when the command that sent them there is stopped
        if config.hydra.runtime.choices.get("hydra/launcher") != "submitit_slurm":
            SweepSummary.current.install_handlers()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if SweepSummary.current is not None and (code := SweepSummary.current.close()):
            raise SystemExit(code)


class Sweep:
    """The sweep that this process runs.

    Args:
        folder: with one folder per job.
        jobs: the folder of each job in it, and its overrides; None if they are not known beforehand.
        keep: leave the records of jobs that have finished with the same overrides.
    """

    def __init__(self, folder: Path, jobs: dict[str, list[str]] | None, *, keep: bool):
        self.folder, self.jobs = folder, jobs
        self.clear_stop_marker()
        self._before: dict[Any, Any] = {}
        self._removed: dict[Path, bytes] = {}
        for job in jobs_of(folder):
            if not (keep and self._finished(job)):
                path = job / "job.json"
                self._removed[path] = content_of(path) if path.is_file() else b""
                path.unlink()
        self._kept = set(jobs_of(folder))

    def _finished(self, job: Path) -> bool:
        if self.jobs is None:
            return record_of(self.folder, job).get("status") in ("finished", "damaged")
        overrides = self.jobs.get(str(job.relative_to(self.folder)))
        return overrides is not None and objective_of(job, overrides) is not None

    def clear_stop_marker(self) -> None:
        for name in (STOP, AGAIN):
            (self.folder / name).unlink(missing_ok=True)

    def undo(self) -> bool:
        """Puts back the records that were removed, unless a job has started. Returns whether it did."""
        if set(jobs_of(self.folder)) - self._kept:
            return False
        for path, content in self._removed.items():
            publish(path, content)
        return True

    def install_handlers(self) -> None:
        """On SIGTERM, SIGINT and SIGHUP the jobs that run save and end, and no other job starts."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._stop) for number in _CAUGHT if heard(number)}

    def restore_handlers(self) -> None:
        """Puts back the handlers that `install_handlers` replaced."""
        for caught, handler in self._before.items():
            signal.signal(caught, handler)
        self._before = {}

    def _stop(self, number: int, frame: FrameType | None) -> None:
        code = Signals.CODES[signal.Signals(number)]
        self.restore_handlers()  # a second signal ends this process at once
        publish(self.folder / STOP, str(code))
        with contextlib.suppress(OSError):  # the terminal may be what has ended
            text = f"\n{signal.Signals(number).name}: the sweep ends when the jobs that run have saved.\n"
            os.write(2, text.encode())
        if Turn.taken:
            raise SystemExit(code)
        # the terminal has sent Ctrl-C to the jobs as well, and a second signal would end them at once
        if number != signal.SIGINT:
            for job in map(read_job, jobs_of(self.folder)):
                if job.get("status") == "running" and alive(job):
                    with contextlib.suppress(OSError):
                        os.kill(int(job["pid"]), signal.SIGTERM)

    def wait(self) -> None:
        """Waits for the processes of submitit's local jobs, which go on when the launcher has given up."""
        for path in self.folder.glob(".submitit/*"):
            if path.name.isdigit() and not list(path.glob("*_result.pkl")):
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(int(path.name), 0)

    def jobs_left(self) -> bool:
        """Whether jobs are left that a launcher which gave up never started. Those it broke off have failed."""
        self.mark_dead()
        left = [name for name in self.jobs or () if not (self.folder / name / "job.json").exists()]
        if not left or (self.folder / STOP).exists():
            return False
        (self.folder / AGAIN).touch()
        return True

    def mark_dead(self) -> None:
        """Marks as failed the jobs on record as running whose process has ended."""
        for folder in jobs_of(self.folder):
            job = read_job(folder)
            if job.get("status") == "running" and read(folder).state != "running":
                reason = "ended without a word (killed? out of memory? or another job beside it)"
                write_job(folder, job["job"], job["overrides"], "failed", error=reason)

    def close(self) -> int:
        """Writes `sweep.csv` and `report.html`, prints the table. Returns the exit status: 0 if all jobs finished."""
        for name, overrides in (self.jobs or {}).items():
            if not (self.folder / name / "job.json").exists():
                write_job(self.folder / name, name, overrides, "waiting")
        self.mark_dead()
        rows = gather(self.folder)
        if not rows:
            print(f"error: no job of the sweep in {self.folder} has left a record", file=sys.stderr)
            return 1
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        publish(self.folder / "sweep.csv", text.getvalue())
        runs = [read(self.folder / row["job"]) for row in rows]
        write_page(self.folder / "report.html", runs, title=self.folder.name)
        swept = [name for name in rows[0] if name not in (*_FIXED, *_MEASURED)]
        names = [*_FIXED, *swept, *(["error"] if any(row["error"] for row in rows) else [])]
        table, _ = layout({name: [_cell(row, name) for row in rows] for name in names}, window(), optional=swept)
        print(f"\n{table}")
        print(f"Sweep in {self.folder / 'sweep.csv'}, pictures in {self.folder / 'report.html'}", flush=True)
        states = [row["status"] for row in rows]
        failed, left = states.count("failed"), sum(state not in ("finished", "failed") for state in states)
        if failed:
            print(f"error: {failed} of {len(states)} jobs failed", file=sys.stderr)
        if left:
            print(f"{left} of {len(states)} jobs are not done; the same with resume=auto does them", file=sys.stderr)
        code = int(failed + left > 0)
        with contextlib.suppress(OSError, ValueError):
            code = int((self.folder / STOP).read_text(encoding="utf-8"))
        self.clear_stop_marker()
        return code


def launching(start: Callable[[], Any]) -> None:
    """Starts Hydra. A launcher that gives up because a worker was killed is started again for the jobs that wait."""
    try:
        while True:
            try:
                start()
                return
            except Exception as error:
                sweep = SweepSummary.current
                if sweep is None or sweep.undo():
                    raise
                _log.error("the launcher ended (%s); the jobs that it did not start follow", type(error).__name__)
                sweep.wait()
                if not sweep.jobs_left():
                    raise SystemExit(sweep.close() or 1) from error
    finally:
        if SweepSummary.current is not None:
            SweepSummary.current.restore_handlers()
            SweepSummary.current = None


def planned(config: DictConfig) -> dict[str, list[str]] | None:
    """Folder and overrides of each job; None if a folder has more than the number, or the sweeper chooses."""
    subdir = str(config.hydra.sweep._get_node("subdir"))
    named = "${" in subdir.replace("${hydra.job.num}", "")
    if named or config.hydra.runtime.choices.get("hydra/sweeper") != "basic":
        return None
    words = [f"{name}={value}" for name, value in (config.hydra.sweeper.params or {}).items()]
    try:
        choices = {}
        for override in OverridesParser.create().parse_overrides([*words, *config.hydra.overrides.task]):
            key, swept = override.get_key_element(), override.is_sweep_override()
            found = override.sweep_string_iterator() if swept else [override.get_value_element_as_str()]
            # a later override of a key takes the place of an earlier one
            choices[key] = [f"{key}={value}" for value in found]
        jobs = [list(job) for job in itertools.product(*choices.values())]
    except Exception:  # sde=glob(*) needs the folder of the configuration, which a callback does not know
        return None
    plan = {os.path.normpath(subdir.replace("${hydra.job.num}", str(n))): job for n, job in enumerate(jobs)}
    if len(plan) < len(jobs):
        cure = "Let it have the number of the job: 'hydra.sweep.subdir=mine/${hydra.job.num}'."
        raise SystemExit(f"error: hydra.sweep.subdir={subdir} gives all jobs one folder. {cure}")
    return plan


def gather(folder: Path) -> list[dict[str, Any]]:
    """One row per job of the sweep in `folder`, best objective first, then those without, failed jobs last."""
    jobs = [{**record_of(folder, path), "job": os.path.relpath(path, folder)} for path in jobs_of(folder)]
    tables = [values(job["overrides"]) for job in jobs]
    swept, _ = differing(tables)
    rows = []
    for job, table in zip(jobs, tables, strict=True):
        measured = {name: job.get(name, "") for name in _MEASURED}
        rows.append({n: job.get(n, "") for n in _FIXED} | {n: table.get(n, "") for n in swept} | measured)

    def rank(row: dict[str, Any]) -> tuple[Any, ...]:
        objective = number(row["objective"])
        return row["status"] == "failed", objective is None, objective, natural(row["job"])

    return sorted(rows, key=rank)


def _cell(row: dict[str, Any], name: str) -> str:
    value, error = row[name], number(row["stderr"])
    if name == "objective" and error is not None and value == row["bits_per_dim"]:
        return f"{value:.4f} ± {error:.4f}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
