"""Sweeps by each launcher, really started in its local mode: jobs that are killed, asked to end, and given their turn
back."""

from __future__ import annotations

import csv
import re
import shlex
import subprocess
from pathlib import Path

from commands import PLAIN, TINY, command, process, rows

from scoresde.runs.files import find, read

TARGETS = ("deadly", "lingering", "Struck")
SMALL = (*TINY, *PLAIN, "evaluate_at_end=false", "out=s",
         f"allow_targets=[{','.join(f'nets.{name}' for name in TARGETS)}]")  # fmt: skip
# Nobody outside has to hit the moment: a network that takes its process with it as soon as job 0 is finished; one that
# keeps its worker from taking another job when it has finished one; one that signals its own process, once, in the
# fourth step of the job, by the signal, that the file `strike` names.
NETWORKS = """
import os, pathlib, signal, time
from scoresde.sweep import job
from scoresde.nn import MLP
def deadly(**arguments):
    record = pathlib.Path("s/0/job.json")
    while not (record.exists() and "finished" in record.read_text()):
        time.sleep(0.02)
    os._exit(9)
def lingering(**arguments):
    write = job.write_job
    def write_and_stay(folder, name, overrides, status, **measured):
        write(folder, name, overrides, status, **measured)
        if status == "finished":
            time.sleep(3600)
    job.write_job = write_and_stay
    return MLP(**arguments)
class Struck(MLP):
    def forward(self, *inputs):
        plan = pathlib.Path("strike")
        if plan.exists():
            number, name = plan.read_text().split()
            rows = pathlib.Path("s", number, "metrics.jsonl")
            if rows.exists() and rows.read_text().count("train/grad_norm") == 3:
                plan.unlink()
                os.kill(os.getpid(), signal.Signals[name])
        return super().forward(*inputs)
"""


def table(folder: Path) -> dict[str, dict[str, str]]:
    with open(folder / "sweep.csv", newline="", encoding="utf-8") as file:
        return {row["job"]: row for row in csv.DictReader(file)}


def sweep(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    (folder / "nets.py").write_text(NETWORKS)
    return process("train", "-m", *arguments, *SMALL, cwd=folder)


def images(folder: Path) -> list[int]:
    return [row["images"] for row in rows(folder) if "train/loss" in row]


def test_every_line_of_the_guide_composes(tmp_path: Path) -> None:
    """Each scoresde-train of docs/sweeps.md, with the first of the values that it sweeps: no key is misspelt."""
    text = (Path(__file__).parents[2] / "docs" / "sweeps.md").read_text("utf-8").replace("\\\n", " ")
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
    """Job 1 takes its worker with it, and joblib gives up; job 2, which it has not come to, is done all the same.

    It cannot have come to job 2: of its two workers one lingers in job 0, whose record says that it is finished.
    """
    arguments = "+network.extra=0,1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"
    arguments = ("network._target_=nets.lingering,nets.deadly,scoresde.nn.MLP", *arguments[1:])
    running = sweep(tmp_path, *arguments)
    out, err = running.communicate(timeout=900)
    assert running.returncode == 1 and "1 of 3 jobs failed" in err, out + err
    found = table(tmp_path / "s")
    assert [found[name]["status"] for name in "012"] == ["finished", "failed", "finished"]
    assert "ended without a word" in found["1"]["error"] and "ended without a word" in out
    states = [(run.state, run.reason[:20]) for run in map(read, find(tmp_path / "s"))]
    assert states == [("finished", ""), ("failed", "ended without a word"), ("finished", "")]
    assert not {path.name for path in (tmp_path / "s").iterdir()} & {".stop", ".again"}


def test_basic_a_stopped_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    """SIGTERM within job 1 of 0, 1, 2: it saves, 2 does not start; the same with resume=auto does what is left."""
    struck = "network._target_=nets.Struck"
    (tmp_path / "strike").write_text("1 SIGTERM")
    running = sweep(tmp_path, struck, "seed=0,1,2")
    out, err = running.communicate(timeout=900)
    assert running.returncode == 143, out + err
    found = table(tmp_path / "s")
    assert [found[name]["status"] for name in "012"] == ["finished", "stopped", "waiting"]
    assert "2 of 3 jobs are not done" in err and not (tmp_path / "s" / "2" / "config.yaml").exists()
    assert [run.state for run in map(read, find(tmp_path / "s"))] == ["finished", "resumable", "empty"]
    first = (tmp_path / "s" / "0" / "metrics.jsonl").read_bytes()
    running = sweep(tmp_path, struck, "seed=0,1,2", "resume=auto")
    out, err = running.communicate(timeout=900)
    assert running.returncode == 0, out + err
    assert "Job 0 is finished already: objective" in out and out.count("Resuming ") == 1
    assert (tmp_path / "s" / "0" / "metrics.jsonl").read_bytes() == first
    assert all(images(tmp_path / "s" / name) == list(range(64, 641, 64)) for name in "012")
    again = table(tmp_path / "s")
    assert {row["status"] for row in again.values()} == {"finished"}
    assert again["0"]["objective"] == found["0"]["objective"] and again["0"]["objective"] != again["1"]["objective"]


def test_submitit_a_job_whose_time_is_up_saves_and_has_another_turn(tmp_path: Path) -> None:
    """Job 0 gets the signal that a scheduler sends before the end of the time; job 1 is refused and ends nobody."""
    arguments = "hydra/launcher=submitit_local", "optim.lr=1e-3,-1", "network._target_=nets.Struck", "resume=auto"
    (tmp_path / "strike").write_text("0 SIGUSR2")
    running = sweep(tmp_path, *arguments)
    folder = tmp_path / "s" / "0"
    out, err = running.communicate(timeout=900)
    assert running.returncode == 1 and "1 of 2 jobs failed" in err, out + err
    found = table(tmp_path / "s")
    assert found["0"]["status"] == "finished" and "Invalid learning rate: -1" in found["1"]["error"]
    log = "".join(path.read_text() for path in (tmp_path / "s" / ".submitit").glob("*/*_log.out"))
    resumed = [int(line.split()[-1].rstrip(".")) for line in log.splitlines() if line.startswith("Resuming ")]
    assert resumed == [4]  # saved where the signal found it: not at 3, 6 or 9, where checkpoints are due
    assert images(folder) == list(range(64, 641, 64))
