"""W&B over a network, and a process, that fail: the run never notices, and one line says how to upload what is left.

`benchmarks/reliability/views.py` runs the same cases with larger counts and measures the seconds.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from offline import closed_runs, offline_runs
from wandb_server import Server

import scoresde
from scoresde.runs import wandb_view
from scoresde.runs.logger import RunFacts, read_rows
from scoresde.runs.wandb_logger import WandbLogger

KEY = "c0ffee" + "0" * 34


# Imported by the view's interpreter: SIGUSR1 writes what each of its threads is doing.
STACKS = """
import faulthandler, os, signal
if "VIEW_STACKS" in os.environ:
    faulthandler.register(signal.SIGUSR1, file=open(os.environ["VIEW_STACKS"], "w"))
"""


class Run:
    """A view of a run that logs row after row, as training does; `said` are the warnings."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, url: str, finish_timeout: float, mode: str = "online"
    ):
        self.folder, self.step = folder, 0
        folder.mkdir(parents=True)
        self.logger = WandbLogger(mode=mode, finish_timeout=finish_timeout)
        self.said: list[str] = []
        monkeypatch.setattr(self.logger, "_warn", self.warn)
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        (folder / "sitecustomize.py").write_text(STACKS)
        monkeypatch.setenv("PYTHONPATH", str(folder))
        monkeypatch.setenv("VIEW_STACKS", str(folder / "stacks"))
        self.logger.start(RunFacts(folder, "0123456789ab", {"seed": 1}))

    def warn(self, text: str) -> None:
        self.logger._warned = True
        self.said.append(text)

    def log(self, rows: int = 1) -> None:
        for _ in range(rows):
            self.step += 1
            self.logger.log({"train/loss": 1 / self.step}, step=self.step, images=8 * self.step)

    def settle(self) -> None:
        """Logs rows until the view has begun the run, online or offline.

        An online start has its patience and W&B's 10 s of grace, its service 5 s to end, an offline start `LOCAL`; the
        rest is for the interpreter to start on a machine under load.
        """
        seconds = 0.4 * self.logger.finish_timeout + 10 + 5 + wandb_view.LOCAL + 60
        end = time.monotonic() + seconds
        while self.logger._folder.endswith("*"):
            self.log()
            assert self.logger._view is not None, self.said
            assert time.monotonic() < end, f"{self.folder.name} has not begun in {seconds:g} s: {self.doing()}"
            time.sleep(0.02)

    def doing(self) -> str:
        """What each thread of the view is doing, and the processes that it started."""
        assert self.logger._view is not None
        view = self.logger._view.pid
        os.kill(view, signal.SIGUSR1)
        time.sleep(1)
        children = subprocess.run(["ps", "-o", "pid,stat,wchan,etime,args", "--ppid", str(view)], capture_output=True)
        return f"{(self.folder / 'stacks').read_text()}\n{children.stdout.decode()}"

    def close(self) -> bool:
        """Whether it kept to its time: to kill a view that has not ended may take 1 s more, the rest is the load's."""
        start = time.monotonic()
        self.logger.close()
        return time.monotonic() - start < self.logger.finish_timeout + 1 + 9

    def kept(self) -> list[int]:
        """Steps in the transaction log that the user is told of."""
        (run,) = [run for run in offline_runs(self.folder, "*run-*") if str(run.folder) == self.logger._folder]
        return [row["step"] for row in run.history if "step" in row]


def begun(folder: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> Run:
    """A run that is online. W&B takes 0.6 s to begin and has 6.4 s; where the machine is busy, four times as long."""
    for finish_timeout in (16, 64, 256):
        run = Run(folder / f"{finish_timeout}", monkeypatch, url, finish_timeout)
        run.settle()
        if "/run-" in run.logger._folder:
            return run
        run.close()
    raise AssertionError(run.said)


def test_a_sound_server_gets_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    server = Server()
    caplog.set_level(logging.INFO)
    run = Run(tmp_path / "run", monkeypatch, server.url, finish_timeout=600)
    run.log(200)
    run.close()
    assert run.said == []
    assert caplog.messages == [f"W&B shows the run at {server.url}/entity/scoresde/runs/0123456789ab"]
    assert [row["step"] for row in server.rows] == run.kept() == list(range(1, 201))
    assert not any("otel" in path for path in server.paths)  # telemetry can hold up the end of a run by 15 s
    asked = len(server.paths)
    offline = Run(tmp_path / "offline", monkeypatch, server.url, finish_timeout=600, mode="offline")
    offline.log(20)
    offline.close()
    assert offline.kept() == list(range(1, 21)) and len(server.paths) == asked


def test_a_network_that_fails_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run is kept offline, with every row, and one line says where."""
    servers = {fault: Server(fault) for fault in ("500", "400", "hang", "refused")}
    runs = {fault: Run(tmp_path / fault, monkeypatch, servers[fault].url, finish_timeout=10) for fault in servers}
    for fault, run in runs.items():
        run.settle()
        run.log(50)
        run.logger.finish_timeout = 150.0  # from here on nothing waits for the network
        run.close()
        assert run.kept() == list(range(1, run.step + 1)), fault
        (line,) = run.said
        assert line.startswith("W&B cannot be reached (") and line.endswith(f"wandb sync {run.logger._folder}")
        assert "offline-run-" in run.logger._folder and Path(run.logger._folder).is_dir()


@pytest.mark.parametrize("ends", ["never", "with SystemExit"])
def test_a_service_that_does_not_end_as_it_should(
    ends: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """W&B's teardown may wait for its service without a bound, or raise SystemExit: the run is kept offline."""
    called = threading.Event()

    def teardown() -> None:
        called.set()
        if ends == "with SystemExit":
            sys.exit(3)
        threading.Event().wait()

    def init(*, mode: str, **options: Any) -> Any:
        if mode == "online":
            raise OSError("no network")
        return SimpleNamespace(define_metric=lambda *args, **options: None, settings=SimpleNamespace(sync_dir="here"))

    monkeypatch.setattr("wandb.teardown", teardown)
    monkeypatch.setattr("wandb.init", init)
    leave = wandb_view.leave_service
    monkeypatch.setattr(wandb_view, "leave_service", lambda: leave(0.2 if ends == "never" else 60))
    said: list[tuple[str, str]] = []
    run = {"id": "a", "dir": str(tmp_path), "config": {}}
    start = time.monotonic()
    wandb_view.begin({"run": run, "mode": "online", "pid": 1, "patience": 4}, lambda *message: said.append(message))
    assert called.is_set() and time.monotonic() - start < 30
    assert [kind for kind, _ in said] == ["folder", "say"]
    assert said[1][1].startswith("W&B cannot be reached (OSError: no network). The run is kept offline")
    assert not recwarn.list


def test_a_network_that_is_lost_during_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end comes in the stated time; the transaction log has every row, and one line says where it is."""
    servers, runs = {}, {}
    for fault in ("500", "400", "hang", "refused"):
        servers[fault] = Server()
        runs[fault] = begun(tmp_path / fault, monkeypatch, servers[fault].url)
    for fault, run in runs.items():
        servers[fault].fault = fault
        if fault == "refused":
            servers[fault].cut()
        run.log(50)
    with ThreadPoolExecutor() as pool:
        assert all(pool.map(Run.close, runs.values()))
    for fault, run in runs.items():
        assert run.kept() == list(range(1, run.step + 1)), fault
        (line,) = run.said
        assert line.startswith("W&B ") and line.endswith(f"later: wandb sync {run.logger._folder}")
        assert "/run-" in run.logger._folder


def test_a_server_that_answers_nonsense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    """W&B's service dies of it (a nil pointer in 0.31): not a word of its panic, one line of ours."""
    server = Server()
    run = Run(tmp_path / "run", monkeypatch, server.url, finish_timeout=30)
    run.settle()
    server.fault = "nonsense"
    run.log(50)
    assert run.close()
    assert len(run.said) <= 1 and all("wandb sync" in line for line in run.said)
    assert capfd.readouterr() == ("", "")


def test_a_view_that_hangs_takes_no_time_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped dead, it reads nothing: 2 MB of rows are taken without waiting, and `close` leaves it after 1 s."""
    run = Run(tmp_path / "run", monkeypatch, "http://127.0.0.1:9", finish_timeout=1, mode="offline")
    view = run.logger._view
    assert view is not None
    os.kill(view.pid, signal.SIGSTOP)
    row = {f"metric-{i}": 0.1 for i in range(100)}
    for step in range(1, 1001):
        run.logger.log(row, step=step, images=step)
    assert run.close()
    (line,) = run.said
    later = f"wandb sync {run.folder}/wandb/*run-*"
    assert line == f"W&B did not end within 1 s; metrics.jsonl has every row; later: {later}"
    assert view.wait(300) == -signal.SIGKILL
    run.log()  # nothing is sent to a view that has ended, and nothing is said


def test_a_view_that_is_killed_is_missed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path / "run", monkeypatch, "http://127.0.0.1:9", finish_timeout=30, mode="offline")
    view = run.logger._view
    assert view is not None
    view.kill()
    view.wait()
    run.log(10)
    assert run.close()
    (line,) = run.said
    assert line.startswith("W&B's process ended with code -9; metrics.jsonl has every row; later: wandb sync ")


def test_a_view_that_is_killed_at_the_end_is_missed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path / "run", monkeypatch, "http://127.0.0.1:9", finish_timeout=30, mode="offline")
    view = run.logger._view
    assert view is not None
    os.kill(view.pid, signal.SIGSTOP)
    run.log(10)
    send = run.logger._send

    def send_and_kill(*message: Any) -> None:
        send(*message)
        view.kill()

    monkeypatch.setattr(run.logger, "_send", send_and_kill)  # `close` is all that is sent from now on
    run.close()
    (line,) = run.said
    assert line.startswith("W&B's process ended with code -9; metrics.jsonl has every row; later: wandb sync ")


def test_a_row_that_was_cut_ends_the_view(tmp_path: Path) -> None:
    """Training was killed while it wrote: the view closes its log as that of a failed run."""
    start = {"run": {"id": "a", "dir": str(tmp_path), "config": {}}, "mode": "offline", "pid": 1, "patience": 4}
    text = json.dumps(["start", start]) + "\n" + json.dumps(["log", {"step": 1}]) + '\n["log", {"ste'
    view = [sys.executable, "-P", wandb_view.__file__]
    done = subprocess.run(view, input=text, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    (run,) = offline_runs(tmp_path)
    assert ([row["step"] for row in run.history], run.exit_code) == ([1], 1)


def test_a_log_may_be_read_while_it_is_written(tmp_path: Path) -> None:
    """Cut at any byte, as a reader finds it whom the writer is a page ahead of, it holds the rows before the cut."""
    start = {"run": {"id": "a", "dir": str(tmp_path), "config": {}}, "mode": "offline", "pid": 1, "patience": 4}
    lines = [["start", start], *(["log", {"step": step}] for step in range(1, 6))]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    subprocess.run([sys.executable, "-P", wandb_view.__file__], input=text, text=True, check=True, timeout=600)
    (whole,) = offline_runs(tmp_path)
    (log,) = whole.folder.glob("*.wandb")
    data, seen = log.read_bytes(), []
    for size in range(len(data) + 1):
        log.write_bytes(data[:size])
        (run,) = offline_runs(tmp_path)
        assert run.history == whole.history[: len(run.history)]
        seen.append(len(run.history))
    assert seen == sorted(seen) and set(seen) == {0, 1, 2, 3, 4, 5}
    assert [row["step"] for row in whole.history] == [1, 2, 3, 4, 5]


TRAINING = """
import os, pathlib, signal, sys
from scoresde.runs import WandbLogger
from scoresde.runs.logger import JsonlLogger, RunFacts
folder = pathlib.Path(sys.argv[1])
for rows in map(int, sys.argv[2:]):
    child = os.fork()
    if not child:
        logger = JsonlLogger(WandbLogger())
        (folder / str(rows)).mkdir(exist_ok=True)
        logger.start(RunFacts(folder / str(rows), "0123456789ab", {"seed": 1}))
        for step in range(1, rows + 1):
            logger.log({"train/loss": 1 / step}, step=step, images=8 * step)
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
"""


def test_training_that_is_killed_loses_no_row(tmp_path: Path) -> None:
    """kill -9 after the last row, three starts of one run at once: W&B has each in a log of its own, marked failed."""
    again = ["10", "10", "10", "1000"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment["PYTHONPATH"] = str(Path(scoresde.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", TRAINING, str(tmp_path), *again], capture_output=True, text=True, env=environment,
        timeout=600,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for rows, starts in ((10, 3), (1000, 1)):
        steps = list(range(1, rows + 1))
        folder = tmp_path / str(rows)
        assert [row["step"] for row in read_rows(folder / "metrics.jsonl") if "header" not in row] == steps
        runs = closed_runs(folder, starts)
        assert [run.exit_code for run in runs] == [1] * starts
        assert [[row["step"] for row in run.history] for run in runs] == [steps] * starts
        assert {run.id for run in runs} == {"0123456789ab"}
