"""Sweeps by each launcher, really started in its local mode: jobs that are killed, asked to end, and given their turn
back."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from commands import PLAIN, TINY, command, process, rows

from scoresde.cli.run_files import find, read

SMALL = (*TINY, *PLAIN, "evaluate_at_end=false", "out=s", "allow_targets=[nets.deadly,nets.Slow]")
# a network that takes its process with it as soon as job 0 is finished, and one that takes 0.1 s a step
NETWORKS = """
import os, pathlib, time
from scoresde.nn import MLP
def deadly(**arguments):
    job = pathlib.Path("s/0/job.json")
    while not (job.exists() and "finished" in job.read_text()):
        time.sleep(0.02)
    os._exit(9)
class Slow(MLP):
    def forward(self, *inputs):
        time.sleep(0.1)
        return super().forward(*inputs)
"""


def table(folder: Path) -> dict[str, dict[str, str]]:
    with open(folder / "sweep.csv", newline="", encoding="utf-8") as file:
        return {row["job"]: row for row in csv.DictReader(file)}


def job(folder: Path) -> dict[str, Any]:
    path = folder / "job.json"
    return json.loads(path.read_text()) if path.exists() else {}


def sweep(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    (folder / "nets.py").write_text(NETWORKS)
    return process("train", "-m", *arguments, *SMALL, cwd=folder)


def until(what: Callable[[], bool], running: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while not what():
        if running.poll() is not None or time.monotonic() > end:
            running.kill()
            raise AssertionError("it never came:\n" + "\n".join(running.communicate()))
        time.sleep(0.02)


def images(folder: Path) -> list[int]:
    return [row["images"] for row in rows(folder) if "train/loss" in row]


def test_every_line_of_the_guide_composes(tmp_path: Path) -> None:
    """Each scoresde-train of docs/sweeps.md, with the first of the values that it sweeps: no key is misspelt."""
    text = (Path(__file__).parents[1] / "docs" / "sweeps.md").read_text("utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if re.match(r"(CUDA_VISIBLE_DEVICES=\d )?scoresde-train ", line)]
    assert len(lines) == 8 and {launcher for line in lines for launcher in re.findall(r"launcher=(\w+)", line)} == {
        "joblib", "submitit_local", "submitit_slurm"
    }  # fmt: skip
    for line in lines:
        words = shlex.split(line.rstrip("& "), comments=True)
        words = [re.sub(r",[^]}]*$", "", word) for word in words if word != "-m" and "DEVICES" not in word][1:]
        done = command("train", *words, "--cfg", "all", cwd=tmp_path)
        assert done.code == 0, f"{line}\n{done.err}"
    assert not list(tmp_path.iterdir())


def test_joblib_a_killed_job_is_a_row_and_the_others_finish(tmp_path: Path) -> None:
    """Job 1 takes its worker with it, and joblib gives up; job 2, which it has not come to, is done all the same."""
    arguments = "+network.extra=0,1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"
    arguments = ("network._target_=scoresde.nn.MLP,nets.deadly,scoresde.nn.MLP", *arguments[1:])
    running = sweep(tmp_path, *arguments)
    out, err = running.communicate(timeout=120)
    assert running.returncode == 1 and "1 of 3 jobs failed" in err, out + err
    found = table(tmp_path / "s")
    assert [found[name]["status"] for name in "012"] == ["finished", "failed", "finished"]
    assert "ended without a word" in found["1"]["error"] and "ended without a word" in out
    states = [(run.state, run.reason[:20]) for run in map(read, find(tmp_path / "s"))]
    assert states == [("finished", ""), ("failed", "ended without a word"), ("finished", "")]
    assert not {path.name for path in (tmp_path / "s").iterdir()} & {".stop", ".again"}


def test_basic_a_stopped_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    """SIGTERM within job 1 of 0, 1, 2: it saves, 2 does not start; the same with resume=auto does what is left."""
    slow = "network._target_=nets.Slow"
    running = sweep(tmp_path, slow, "seed=0,1,2")
    until(lambda: (tmp_path / "s" / "1" / "metrics.jsonl").exists() and len(images(tmp_path / "s" / "1")) > 1, running)
    running.send_signal(signal.SIGTERM)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 143, out + err
    found = table(tmp_path / "s")
    assert [found[name]["status"] for name in "012"] == ["finished", "stopped", "waiting"]
    assert "2 of 3 jobs are not done" in err and not (tmp_path / "s" / "2" / "config.yaml").exists()
    assert [run.state for run in map(read, find(tmp_path / "s"))] == ["finished", "resumable", "empty"]
    first = (tmp_path / "s" / "0" / "metrics.jsonl").read_bytes()
    running = sweep(tmp_path, slow, "seed=0,1,2", "resume=auto")
    out, err = running.communicate(timeout=60)
    assert running.returncode == 0, out + err
    assert "Job 0 is finished already: objective" in out and out.count("Resuming ") == 1
    assert (tmp_path / "s" / "0" / "metrics.jsonl").read_bytes() == first
    assert all(images(tmp_path / "s" / name) == list(range(64, 641, 64)) for name in "012")
    again = table(tmp_path / "s")
    assert {row["status"] for row in again.values()} == {"finished"}
    assert again["0"]["objective"] == found["0"]["objective"] and again["0"]["objective"] != again["1"]["objective"]


def test_submitit_a_job_whose_time_is_up_saves_and_has_another_turn(tmp_path: Path) -> None:
    """Job 0 gets the signal that a scheduler sends before the end of the time; job 1 is refused and ends nobody."""
    arguments = "hydra/launcher=submitit_local", "optim.lr=1e-3,-1", "network._target_=nets.Slow", "resume=auto"
    running = sweep(tmp_path, *arguments)
    folder = tmp_path / "s" / "0"
    until(lambda: (folder / "metrics.jsonl").exists() and len(images(folder)) > 1, running)
    os.kill(job(folder)["pid"], signal.SIGUSR2)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 1 and "1 of 2 jobs failed" in err, out + err
    found = table(tmp_path / "s")
    assert found["0"]["status"] == "finished" and "Invalid learning rate: -1" in found["1"]["error"]
    log = "".join(path.read_text() for path in (tmp_path / "s" / ".submitit").glob("*/*_log.out"))
    resumed = [int(line.split()[-1].rstrip(".")) for line in log.splitlines() if line.startswith("Resuming ")]
    # saved where the signal found it: not at 3, 6 or 9, where checkpoints are due
    assert len(resumed) == 1 and 2 <= resumed[0] <= 10
    assert images(folder) == list(range(64, 641, 64))
