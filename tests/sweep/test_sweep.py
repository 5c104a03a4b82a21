"""Sweeps: one folder, one closed view and one row of the table per job, whatever became of the others."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import socket
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import pytest
from commands import PLAIN, TINY, Done, command, rows, same, tree, weights
from hydra.experimental.callback import Callback
from offline import offline_runs
from omegaconf import OmegaConf

from scoresde.sweep.job import Turn, objective_of, read_job, write_job
from scoresde.sweep.sweep import Sweep


class Probe(Callback):
    """Keeps what each job returned to Hydra."""

    returned: ClassVar[list[Any]] = []

    def on_job_end(self, config: Any, job_return: Any, **kwargs: Any) -> None:
        Probe.returned.append(job_return.return_value)


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "sweep.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done, list[Any]]:
    """Three SDEs, two samplers, two seeds."""
    cwd = tmp_path_factory.mktemp("cwd")
    Probe.returned = []
    done = command(
        "train", "-m", "sde=vp,subvp,ve", "sampler=pc,ode", "seed=0,1", *TINY, "sampler.steps=3", "out=sweeps/all",
        "logger=jsonl", f"+hydra.callbacks.probe._target_={__name__}.Probe", f"allow_targets=[{__name__}.Probe]",
        cwd=cwd,
    )  # fmt: skip
    return cwd / "sweeps" / "all", done, list(Probe.returned)


def test_a_sweep_makes_one_table_of_all_its_jobs(sweep: tuple[Path, Done, list[Any]]) -> None:
    """12 rows, best first, each with the number that its own folder holds; the same order is printed."""
    folder, done, returned = sweep
    assert done.code == 0, done.err
    found = table(folder)
    assert sorted((row["sde"], row["sampler"], row["seed"]) for row in found) == sorted(
        product(("vp", "subvp", "ve"), ("pc", "ode"), ("0", "1"))
    )
    objectives = [float(row["objective"]) for row in found]
    assert objectives == sorted(objectives) and all(row["status"] == "finished" for row in found)
    for row in found:
        summary = json.loads((folder / row["job"] / "summary.json").read_text())
        assert float(row["objective"]) == float(row["bits_per_dim"]) == summary["bits_per_dim"]["mean"]
        assert float(row["loss"]) == summary["loss"]
        assert Path(row["folder"]).resolve() == folder / row["job"]
        assert returned[int(row["job"])] == float(row["objective"])
    page = (folder / "report.html").read_text()
    shown = re.findall(r'<tr data-run="\d+"><td class="name" data-value="(\d+)">', page)
    assert shown == [row["job"] for row in found] and "<svg" in page
    lines = done.out.splitlines()
    start = max(i for i, line in enumerate(lines) if line.split()[:3] == ["job", "status", "objective"])
    printed = [line.split() for line in lines[start + 2 : start + 14]]
    assert [cells[0] for cells in printed] == [row["job"] for row in found]
    wanted = [
        [f"{value:.4f}", "±", f"{float(row['stderr']):.4f}"] for value, row in zip(objectives, found, strict=True)
    ]
    assert [cells[2:5] for cells in printed] == wanted


def test_each_job_of_a_sweep_has_its_folder(sweep: tuple[Path, Done, list[Any]]) -> None:
    folder = sweep[0]
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {str(job) for job in range(12)}
    for job in range(12):
        logged = rows(folder / str(job))
        assert [row["images"] for row in logged if "train/loss" in row] == list(range(64, 641, 64))
        assert {k for k in logged[-1] if "/" in k} == {"eval/loss", "eval/bpd/ode", "eval/bpd_stderr"}


def test_each_job_of_a_sweep_has_its_closed_view(tmp_path: Path) -> None:
    done = command("train", "-m", "sde=vp,ve", "sampler=pc", "sampler.steps=3", *TINY, "out=sweeps/seen",
                   "logger.finish_timeout=600", cwd=tmp_path)  # fmt: skip
    assert done.code == 0, done.err
    ids = set()
    for job in ("0", "1"):
        one = tmp_path / "sweeps" / "seen" / job
        (view,) = offline_runs(one)
        assert (view.exit_code, view.group, view.name, view.project) == (0, "seen", job, "scoresde")
        config = OmegaConf.to_container(OmegaConf.load(one / "config.yaml"))
        assert {k: v for k, v in view.config.items() if k != "_wandb"} == config
        assert view.config["sde"]["_target_"] and view.config["sampler"]["steps"] == 3
        logged = [row for row in rows(one) if "train/loss" in row]
        shown = [row for row in view.history if "train/loss" in row]
        assert [row["train/loss"] for row in shown] == [row["train/loss"] for row in logged]
        assert view.summary["bpd/ode"] == json.loads((one / "summary.json").read_text())["bits_per_dim"]["mean"]
        ids.add(view.id)
    assert len(ids) == 2


def test_the_sampler_of_a_job_changes_its_samples_and_nothing_else(sweep: tuple[Path, Done, list[Any]]) -> None:
    """Jobs that differ in the sampler alone end with the same bits, although others ran in between; seeds differ."""
    folder = sweep[0]
    jobs = {(row["sde"], row["sampler"], row["seed"]): row for row in table(folder)}
    for sde, seed in product(("vp", "subvp", "ve"), ("0", "1")):
        pc, ode = jobs[sde, "pc", seed], jobs[sde, "ode", seed]
        assert pc["objective"] == ode["objective"] and pc["loss"] == ode["loss"]
        assert same(weights(folder / pc["job"]), weights(folder / ode["job"]))
    assert len({row["objective"] for row in jobs.values()}) == 6


def test_a_sweep_that_is_there_is_not_touched(sweep: tuple[Path, Done, list[Any]]) -> None:
    folder = sweep[0]
    before = tree(folder)
    done = command("train", "-m", "seed=0,1", *TINY, f"out={folder}", cwd=folder.parent)
    assert done.code == 1 and "holds a sweep already" in done.err and "resume=auto" in done.err
    assert tree(folder) == before


def test_a_failed_job_does_not_end_the_others(tmp_path: Path) -> None:
    """One is refused, one diverges while it trains, one finishes; the next, smaller sweep over it has its own rows."""
    common = (*TINY, *PLAIN, "evaluate_at_end=false", "trainer.max_bad_steps=2", "out=s")
    done = command("train", "-m", "optim.lr=-1,1e38,1e-3", *common, cwd=tmp_path)
    found = table(tmp_path / "s")
    assert done.code == 1 and "2 of 3 jobs failed" in done.err
    assert [(float(row["optim.lr"]), row["status"]) for row in found] == [
        (1e-3, "finished"), (-1, "failed"), (1e38, "failed")
    ]  # fmt: skip
    assert "optim: Invalid learning rate: -1" in found[1]["error"] and "TrainingDiverged" in found[2]["error"]
    assert "Invalid learning rate" in done.out and float(found[0]["objective"]) == float(found[0]["loss"]) < 10
    records = {path: path.read_bytes() for path in (tmp_path / "s").glob("*/job.json")}
    done = command("train", "-m", "optim.lr=-1,1e38", "sde=vpp", *common, "resume=auto", cwd=tmp_path)
    assert done.code == 1 and "There is no sde=vpp" in done.err  # refused, and nothing that was there is lost
    assert {path: path.read_bytes() for path in (tmp_path / "s").glob("*/job.json")} == records
    done = command("train", "-m", "seed=1,2", *common, "overwrite=true", cwd=tmp_path)
    assert done.code == 0, done.err
    assert {(row["seed"], row["status"]) for row in table(tmp_path / "s")} == {("1", "finished"), ("2", "finished")}
    (tmp_path / "s" / "sweep.csv").unlink()  # as if it had been stopped
    before = tree(tmp_path)
    done = command("train", "-m", "seed=1,2", *common, cwd=tmp_path)
    assert done.code == 1 and "holds a sweep already" in done.err and tree(tmp_path) == before


def test_a_sweep_that_is_running_is_refused(tmp_path: Path) -> None:
    """Its records say which process is at work; nothing is touched, whatever is asked for."""
    write_job(tmp_path / "s" / "0", "0", ["seed=0"], "running", pid=os.getpid(), host=socket.gethostname())
    before = tree(tmp_path)
    for how in ("resume=auto", "overwrite=true"):
        done = command("train", "-m", "seed=0,1", *TINY, *PLAIN, "out=s", how, cwd=tmp_path)
        assert done.code == 1 and f"job 0 of the sweep in s is running (process {os.getpid()})" in done.err
    assert tree(tmp_path) == before


def test_what_makes_a_job_the_same(tmp_path: Path) -> None:
    """Its overrides, but for those that say how it is run; and it must have finished with a number."""
    write_job(tmp_path, "0", ["sde=vp", "+a.b=1", "out=x", "device=cpu"], "finished", objective=1.5)
    assert objective_of(tmp_path, ["+a.b=1", "sde=vp", "resume=auto", "threads=2"]) == 1.5
    for other in (["sde=ve", "+a.b=1"], ["sde=vp"], ["sde=vp", "+a.b=1", "seed=1"]):
        assert objective_of(tmp_path, other) is None
    for status, objective in (("failed", 1.5), ("running", 1.5), ("finished", None), ("finished", "x"),
                              ("finished", 10**400)):  # fmt: skip
        write_job(tmp_path, "0", ["sde=vp"], status, objective=objective)
        assert objective_of(tmp_path, ["sde=vp"]) is None
    (tmp_path / "job.json").write_text("{")
    assert objective_of(tmp_path, ["sde=vp"]) is None and read_job(tmp_path) == {}


@pytest.mark.parametrize("harm", ["cut", "pipe", "of another type", "400 digits"])
def test_a_job_whose_record_is_damaged_stays_on_the_page(tmp_path: Path, harm: str, capsys: Any) -> None:
    """In the table, on the page and in the exit status, wherever it lies."""
    for name, objective in (("0", 1.5), ("1", 2.5), ("deep/2", 3.5)):
        write_job(tmp_path / name, name, [f"seed={name}"], "finished", objective=objective)
    for name in ("1", "deep/2"):
        path = tmp_path / name / "job.json"
        content = path.read_text()
        path.unlink()
        os.mkfifo(path) if harm == "pipe" else path.write_text(
            {"cut": content[:-9], "of another type": "[1]", "400 digits": '{"overrides": 9' + 5000 * "9" + "}"}[harm]
        )
    assert Sweep(tmp_path, None, keep=True).close() == 1
    rows = {row["job"]: row for row in table(tmp_path)}
    assert [rows[name]["status"] for name in ("0", "1", "deep/2")] == ["finished", "damaged", "damaged"]
    assert rows["1"]["error"] == "job.json is damaged" and "2 of 3 jobs are not done" in capsys.readouterr().err
    page = (tmp_path / "report.html").read_text()
    assert page.count("damaged: job.json") >= 2 and page.count("<tr data-run=") == 3


def test_a_turn_is_given_back_after_the_run_has_saved() -> None:
    """SIGUSR2 becomes SIGUSR1 while a run listens to it, and reaches its first handler only when that is asked for."""
    heard: list[str] = []
    before = signal.signal(signal.SIGUSR2, lambda *_: heard.append("scheduler"))
    ordinary = signal.getsignal(signal.SIGUSR1)
    try:
        with Turn() as turn:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert heard == ["scheduler"]  # nobody to be asked to save: as if there were no block
            signal.signal(signal.SIGUSR1, lambda *_: heard.append("run"))
            os.kill(os.getpid(), signal.SIGUSR2)
            os.kill(os.getpid(), signal.SIGUSR2)  # a second SIGUSR1 would end the run on the spot
            assert heard == ["scheduler", "run"]
        turn.give_back()
        assert heard == ["scheduler", "run", "scheduler"]
        with Turn() as turn:
            pass
        turn.give_back()
        os.kill(os.getpid(), signal.SIGUSR2)
        assert heard == ["scheduler", "run", "scheduler", "scheduler"]
    finally:
        signal.signal(signal.SIGUSR2, before)
        signal.signal(signal.SIGUSR1, ordinary)


DEEP = (*TINY, *PLAIN, "evaluate_at_end=false", "trainer.images=64", "out=a/b/c")


def test_jobs_lie_at_any_depth(tmp_path: Path) -> None:
    """They are counted, kept by resume=auto, and stand in the table; a sweep in a folder below is another one."""
    subdir = "hydra.sweep.subdir=one/${hydra.job.num}"
    write_job(tmp_path / "a/b/c/other/0", "0", ["seed=9"], "finished", objective=1.0)
    done = command("train", "-m", "seed=0,1", *DEEP, subdir, cwd=tmp_path)
    assert done.code == 0, done.err
    assert sorted((row["job"], row["seed"]) for row in table(tmp_path / "a/b/c")) == [("one/0", "0"), ("one/1", "1")]
    before = tree(tmp_path / "a/b/c/one/1/checkpoints")
    again = command("train", "-m", "seed=0,1", *DEEP, subdir, "resume=auto", cwd=tmp_path)
    assert again.code == 0 and again.out.count("is finished already") == 2, again.err
    assert tree(tmp_path / "a/b/c/one/1/checkpoints") == before
    assert read_job(tmp_path / "a/b/c/other/0")["status"] == "finished"


def test_a_deep_sweep_fails_with_its_jobs(tmp_path: Path) -> None:
    words = ("data=arrays", "data.path=/nowhere/a.npy,/nowhere/b.npy", "logger=jsonl", "out=s")
    done = command("train", "-m", *words, "hydra.sweep.subdir=${hydra.job.override_dirname}", cwd=tmp_path)
    assert done.code == 1 and "2 of 2 jobs failed" in done.err, done.err
    assert len(table(tmp_path / "s")) == 2 and {row["status"] for row in table(tmp_path / "s")} == {"failed"}


@pytest.mark.parametrize(
    ("subdir", "words"), [("../x", "leads out of"), ("/x", "leads out of"), ("one", "gives all jobs one folder")]
)
def test_jobs_that_would_lie_elsewhere_or_on_one_another_are_refused(subdir: str, words: str, tmp_path: Path) -> None:
    done = command("train", "-m", "seed=0,1", *DEEP, f"hydra.sweep.subdir={subdir}", cwd=tmp_path)
    assert done.code == 1 and words in done.err and not (tmp_path / "a").exists(), done.err
