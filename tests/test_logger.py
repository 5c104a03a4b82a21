"""`metrics.jsonl` is whole and holds each row once whatever happened; W&B is a view that can fail without harm."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import time
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from offline import OfflineRun, offline_runs

import scoresde
from scoresde import VPSDE, DenoisingLoss, Eps, Preconditioned, Rng
from scoresde.data import Dataset, EpochOrder, Scaling, Split
from scoresde.nn import MLP
from scoresde.train import EMA, JsonlLogger, Logger, NullLogger, RunFacts, Tee, Trainer, Training, WandbLogger
from scoresde.train import logger as module
from scoresde.train.checkpoint import latest
from scoresde.train.logger import provenance, run_id

CONFIG: dict[str, Any] = {"seed": 3, "sde": {"_target_": "scoresde.VPSDE", "beta_max": 20.0}, "samplers": {}}


def strict(path: Path) -> list[dict[str, Any]]:
    """The rows by a parser that knows JSON and nothing more (Python's own reads NaN)."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def start(logger: Logger, folder: Path, resume_step: int = 0) -> Logger:
    logger.start(RunFacts(folder, "0123456789ab", CONFIG, resume_step=resume_step))
    return logger


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "time"} for row in strict(path) if "header" not in row]


@pytest.fixture
def no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    """A header that costs no process, for tests that start hundreds of times."""
    monkeypatch.setattr(module, "provenance", lambda: {"torch": torch.__version__})


def test_the_first_row_says_what_made_the_numbers(tmp_path: Path) -> None:
    start(JsonlLogger(), tmp_path).close()
    (row,) = strict(tmp_path / "metrics.jsonl")
    header = row["header"]
    assert header == provenance()
    assert (header["scoresde"], header["torch"]) == (scoresde.__version__, torch.__version__)
    here = Path(scoresde.__file__).parents[1]
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
    checkout = (here / ".git").exists() and git.returncode == 0
    assert (header["commit"] or "").rstrip("+") == (git.stdout.strip() if checkout else "")


def test_every_row_is_json_and_on_disk_at_once(tmp_path: Path, no_git: None) -> None:
    """Read while the file is open, NaN and infinity as text, so that a crash or a divergence loses nothing."""
    logger = start(JsonlLogger(), tmp_path)
    values = {"train/loss": math.nan, "train/grad_norm": math.inf, "eval/loss": 0.1 + 0.2, "n": 3}
    logger.log(values, step=1, images=8)
    assert rows_of(tmp_path / "metrics.jsonl") == [
        {"step": 1, "images": 8, "train/loss": "nan", "train/grad_norm": "inf", "eval/loss": 0.1 + 0.2, "n": 3}
    ]
    logger.close()
    with pytest.raises(RuntimeError, match="call start before log"):
        logger.log(values, step=2, images=16)


def test_a_crash_at_any_byte_loses_no_row_before_the_checkpoint(tmp_path: Path, no_git: None) -> None:
    """The file is cut at each byte after row 4 and continued from step 4: rows 1 … 4 and 5 … 6, each once, in order."""
    path = tmp_path / "metrics.jsonl"
    logger = start(JsonlLogger(), tmp_path)
    for step in range(1, 7):
        logger.log({"train/loss": step / 7}, step=step, images=8 * step)
    logger.log({"eval/loss": 1.0, "final": 1}, step=6, images=48)
    logger.close()
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    safe = sum(map(len, lines[:5]))
    for size in range(safe, len(whole) + 1):
        path.write_bytes(whole[:size])
        again = start(JsonlLogger(), tmp_path, resume_step=4)
        for step in (5, 6):
            again.log({"train/loss": step / 7}, step=step, images=8 * step)
        again.close()
        rows = rows_of(path)
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
        assert [row["train/loss"] for row in rows] == [step / 7 for step in range(1, 7)]
        assert path.read_bytes().startswith(b"".join(lines[:5]))
        assert sum("header" in row for row in strict(path)) == 2


def test_final_rows_of_the_same_step_are_made_anew(tmp_path: Path, no_git: None) -> None:
    """A finished run that is resumed evaluates again at its last step: one final row, not two."""
    for resume_step in (0, 6):
        logger = start(JsonlLogger(), tmp_path, resume_step)
        if not resume_step:
            logger.log({"train/loss": 1.0}, step=6, images=48)
        logger.log({"eval/loss": 0.5, "final": 1}, step=6, images=48)
        logger.close()
    assert [row.get("final") for row in rows_of(tmp_path / "metrics.jsonl")] == [None, 1]


def test_a_fresh_start_keeps_nothing_and_a_failed_one_everything(tmp_path: Path, no_git: None, monkeypatch) -> None:
    path = tmp_path / "metrics.jsonl"
    logger = start(JsonlLogger(), tmp_path)
    logger.log({"train/loss": 1.0}, step=1, images=8)
    logger.close()
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            start(JsonlLogger(), tmp_path, resume_step=1)
    assert path.read_bytes() == before
    start(JsonlLogger(), tmp_path).close()
    assert rows_of(path) == []


def training() -> Training:
    torch.manual_seed(0)
    loss = DenoisingLoss(Preconditioned(MLP((2,), width=8, depth=1), VPSDE(), Eps()))
    split = Split(torch.randn(40, 2))
    return Training(
        loss, torch.optim.Adam(loss.parameters(), fused=True), EMA(loss),
        Dataset("normal", split, split, Scaling.identity()), EpochOrder(40, 8, 0), Rng(0),
    )  # fmt: skip


TRAIN_KEYS = {f"train/{name}" for name in ("loss", "grad_norm", "lr", "ema_decay", "imgs_per_s", "skipped")}


class Stop(Exception):
    pass


def test_a_run_that_was_stopped_has_the_rows_of_one_that_was_not(tmp_path: Path, no_git: None) -> None:
    """Rows of training and of evaluation, stopped between a checkpoint and the next, continued, finished."""
    trainer = Trainer(images=240, batch_size=8, log_every=16, evaluate_every=40, checkpoint_every=64)

    def fit(folder: Path, until: int | None, resume: bool = False) -> None:
        def evaluate(run: Training) -> Mapping[str, float]:
            if until is not None and run.images > until:
                raise Stop
            return {"eval/loss": float(run.images)}

        run, saved = training(), latest(folder / "checkpoints") if resume else None
        if saved is not None:
            run.restore(saved)
        logger = start(JsonlLogger(), folder, saved.step if saved else 0)
        try:
            trainer.fit(run, logger=logger, folder=folder / "checkpoints", evaluate=evaluate)
        finally:
            logger.close()

    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    fit(tmp_path / "whole", None)
    with pytest.raises(Stop):
        fit(tmp_path / "stopped", 150)
    fit(tmp_path / "stopped", None, resume=True)
    whole, stopped = (
        [{k: v for k, v in row.items() if k != "train/imgs_per_s"} for row in rows_of(tmp_path / n / "metrics.jsonl")]
        for n in ("whole", "stopped")
    )
    assert whole == stopped and len(whole) == 15 + 6
    assert sorted(row["images"] for row in stopped if "train/loss" in row) == list(range(16, 241, 16))
    assert all(set(row) - {"step", "images"} in (TRAIN_KEYS - {"train/imgs_per_s"}, {"eval/loss"}) for row in stopped)


def test_run_id_names_configuration_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = run_id(CONFIG, tmp_path / "a" / "b")
    assert len(name) == 12 and int(name, 16) >= 0
    monkeypatch.chdir(tmp_path)
    assert run_id(dict(reversed(CONFIG.items())), Path("a/b")) == name  # another order, another spelling
    assert run_id(CONFIG, tmp_path / "moved" / "a" / "b") == name
    assert len({name, run_id({**CONFIG, "seed": 4}, tmp_path / "a" / "b"), run_id(CONFIG, tmp_path / "a" / "c")}) == 3


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[OfflineRun]]]:
    """One W&B run, started twice: 20 rows, a table, a picture, final numbers; the second ends in failure."""
    folder = tmp_path_factory.mktemp("sweep") / "7"
    folder.mkdir()
    from matplotlib.figure import Figure

    Figure(figsize=(1, 1)).savefig(folder / "picture.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", "5ec2e7" + "a" * 34)
        patch.setenv("DATABASE_PASSWORD", "correct-horse")
        patch.setattr(sys, "argv", ["scoresde-train", "token=battery-staple"])
        for attempt in range(2):
            time.sleep(1.1 * attempt)  # W&B names the folder by the second; no process restarts within one
            logger = WandbLogger(tags=["test"], project="mine")
            logger.start(RunFacts(folder, "0123456789ab", CONFIG, group="sweep", resume_step=20 * attempt))
            for step in range(20 * attempt + 1, 20 * attempt + 21):
                logger.log({"train/loss": 1 / step, "eval/bpd/ode": math.nan}, step=step, images=8 * step)
            logger.image("eval/samples", folder / "picture.png", step=20, images=160)
            logger.table("eval/summary", ["sampler", "NFE"], [["pc", "500"]])
            logger.summary({"bpd/ode": 1.5, "nfe": {"pc": 500}})
            logger.close(failed=bool(attempt))
    yield folder, offline_runs(folder)


def test_offline_runs_are_in_the_folder_and_closed(offline: tuple[Path, list[OfflineRun]]) -> None:
    folder, runs = offline
    assert [run.exit_code for run in runs] == [0, 1]
    for run in runs:  # the same run twice: W&B joins them when they are synced
        assert (run.id, run.group, run.name) == ("0123456789ab", "sweep", "7")
        assert (run.project, run.job_type) == ("mine", "train")
        assert {name: value for name, value in run.config.items() if name != "_wandb"} == CONFIG
    assert not (folder.parent / "wandb").exists()


def test_offline_history_has_every_row_in_order(offline: tuple[Path, list[OfflineRun]]) -> None:
    rows = [row for run in offline[1] for row in run.history if "train/loss" in row]
    assert [(row["step"], row["images"]) for row in rows] == [(step, 8 * step) for step in range(1, 41)]
    assert [row["train/loss"] for row in rows] == [1 / step for step in range(1, 41)]
    for run in offline[1]:
        assert run.summary["bpd/ode"] == 1.5 and run.summary["nfe"] == {"pc": 500}
        media = {path.suffix for path in (run.folder / "files" / "media").rglob("*.*")}
        assert media == {".png", ".json"}


def test_no_secret_is_in_the_offline_files(offline: tuple[Path, list[OfflineRun]]) -> None:
    """Neither keys and passwords of the environment nor the command line nor any code."""
    files = [path for path in offline[0].rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        data = path.read_bytes()
        for secret in (b"5ec2e7", b"correct-horse", b"battery-staple"):
            assert secret not in data, path
        assert path.suffix != ".py"


def test_wandb_is_imported_when_a_view_starts_and_not_before() -> None:
    """Neither by the command's module nor by building the logger; `disabled` is the mode without any files."""
    program = (
        "import sys, scoresde.cli.train, pathlib, tempfile\n"
        "from scoresde.train import JsonlLogger, NullLogger, RunFacts, Tee, WandbLogger\n"
        "facts = RunFacts(pathlib.Path(tempfile.mkdtemp()), 'a', {})\n"
        "view = WandbLogger(mode='disabled')\n"
        "Tee(JsonlLogger(), NullLogger()).start(facts)\n"
        "assert 'wandb' not in sys.modules\n"
        "view.start(facts)\n"
        "assert 'wandb' in sys.modules\n"
        "view.close()\n"
        "assert not (facts.folder / 'wandb').exists()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(scoresde.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


class FakeWandb(types.ModuleType):
    """Stands for wandb and raises at the chosen call, then at every later one; remembers what it was asked."""

    def __init__(self, fault: str, error: Exception):
        super().__init__("wandb")
        self.fault, self.error, self.calls = fault, error, []
        self.summary = types.SimpleNamespace(update=self.call("summary"))
        for name in ("Settings", "init", "define_metric", "log", "Image", "Table", "finish"):
            setattr(self, name, self.call(name))

    def call(self, name: str) -> Any:
        def act(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            if name == self.fault:
                raise self.error
            return self

        return act


FAULTS = ("import", "Settings", "init", "define_metric", "log", "Image", "Table", "summary", "finish")


@pytest.mark.parametrize("error", [ValueError("bad value"), OSError(28, "disk full"), AssertionError()], ids=repr)
@pytest.mark.parametrize("fault", FAULTS)
def test_wandb_may_fail_anywhere(tmp_path: Path, monkeypatch, caplog, no_git: None, fault: str, error) -> None:
    """Training goes on with one warning, metrics.jsonl has every row, and W&B is left alone from then on."""
    fake = FakeWandb(fault, error)
    monkeypatch.setitem(sys.modules, "wandb", None if fault == "import" else fake)
    logger = start(Tee(JsonlLogger(), WandbLogger()), tmp_path)
    with caplog.at_level(logging.WARNING):
        Trainer(images=80, batch_size=8, log_every=8, sample_every=40).fit(
            training(), logger=logger, sample=lambda run: {"eval/samples": tmp_path / "x.png"}
        )
        logger.table("eval/summary", ["a"], [["b"]])
        logger.summary({"bpd/ode": 1.0})
        logger.close()
    assert [row["step"] for row in rows_of(tmp_path / "metrics.jsonl")] == list(range(1, 11))
    assert len(caplog.records) == 1 and "the run goes on" in caplog.text
    names = [name for name, *_ in fake.calls]
    assert names[-1:] == ([] if fault == "import" else [fault])


def test_wandb_is_told_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for mode, resume in (("offline", None), ("online", "allow")):
        fake = FakeWandb("", ValueError())
        monkeypatch.setitem(sys.modules, "wandb", fake)
        logger = WandbLogger(mode=mode, entity="us", tags=["a"])
        logger.start(RunFacts(tmp_path, "id", CONFIG, group="g"))
        (given,) = [kwargs for name, _, kwargs in fake.calls if name == "init"]
        assert (given["mode"], given["resume"], given["id"], given["config"]) == (mode, resume, "id", CONFIG)
        assert (given["dir"], given["entity"], given["tags"]) == (str(tmp_path), "us", ["a"])


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="mode is 'offline', 'online' or 'disabled'; got 'dryrun'"):
        WandbLogger(mode="dryrun")


def test_tee_passes_everything_in_order() -> None:
    heard: list[tuple[str, str, tuple[Any, ...], dict[str, Any]]] = []

    class Ear(NullLogger):
        pass

    def ear(name: str) -> Logger:
        one = Ear()
        for method in Logger.__abstractmethods__:
            setattr(one, method, lambda *a, _m=method, **k: heard.append((name, _m, a, k)))
        return one

    tee, calls = Tee(ear("first"), ear("second")), {
        "start": ((RunFacts(Path("."), "id", {}),), {}),
        "log": (({"a": 1.0},), {"step": 1, "images": 8}),
        "image": (("k", Path("p")), {"step": 1, "images": 8}),
        "table": (("k", ["a"], [[1]]), {}),
        "summary": (({"a": 1},), {}),
        "close": ((True,), {}),
    }  # fmt: skip
    assert set(calls) == set(Logger.__abstractmethods__)
    for method, (args, kwargs) in calls.items():
        getattr(tee, method)(*args, **kwargs)
    assert heard == [(name, m, a, k) for m, (a, k) in calls.items() for name in ("first", "second")]
