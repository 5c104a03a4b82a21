"""`metrics.jsonl` is whole and holds each row once whatever happened; W&B is a view that can fail without harm."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from offline import OfflineRun, offline_runs

import scoresde
from scoresde import VPSDE, DenoisingLoss, Eps, Preconditioned, Rng
from scoresde.codecs import Scaling
from scoresde.data import Dataset, EpochOrder, Split
from scoresde.nn import MLP
from scoresde.runs import logger as module
from scoresde.runs import wandb_view
from scoresde.runs.checkpoint import latest
from scoresde.runs.logger import JsonlLogger, Logger, NullLogger, RunFacts, identity, provenance
from scoresde.runs.wandb_logger import WandbLogger
from scoresde.train.ema import EMA
from scoresde.train.state import TrainingState
from scoresde.train.trainer import Trainer

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
    """A header that costs no process, and no waiting for the disk, for tests that start hundreds of times."""
    monkeypatch.setattr(module, "provenance", lambda: {"torch": torch.__version__})
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


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


def test_numbers_of_other_libraries_do_not_stop_a_run(tmp_path: Path, no_git: None) -> None:
    values = {"a": np.float32(0.5), "b": np.int64(3), "c": torch.tensor(2.0), "d": np.float32("nan"), "e": Path("x")}
    logger = start(JsonlLogger(), tmp_path)
    logger.log(values, step=1, images=8)
    (row,) = rows_of(tmp_path / "metrics.jsonl")
    assert {name: row[name] for name in values} == {"a": 0.5, "b": 3, "c": 2.0, "d": "nan", "e": "x"}


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


def log_steps(logger: Logger, first: int, last: int) -> None:
    """Rows that depend on the step alone, as those of a bit-exact resume do."""
    for step in range(first, last + 1):
        logger.log({"train/loss": math.sin(step)}, step=step, images=8 * step)


def test_three_crashes_after_a_checkpoint_leave_each_step_once(tmp_path: Path, no_git: None) -> None:
    """Checkpoint at 200, crash at 212 in the middle of a row, three times; then to the end at 300."""
    path, resume_step = tmp_path / "metrics.jsonl", 0
    for _ in range(3):
        logger = start(JsonlLogger(), tmp_path, resume_step)
        log_steps(logger, resume_step + 1, 212)
        logger.close()
        path.write_bytes(path.read_bytes()[:-20])
        resume_step = 200
    logger = start(JsonlLogger(), tmp_path, 200)
    log_steps(logger, 201, 300)
    logger.close()
    rows = rows_of(path)
    assert [row["step"] for row in rows] == list(range(1, 301))
    assert [row["train/loss"] for row in rows] == [math.sin(step) for step in range(1, 301)]


@pytest.mark.parametrize("death", ["fsync", "replace"])
def test_a_crash_while_the_file_is_made_anew_keeps_the_old_one(tmp_path: Path, monkeypatch, death: str) -> None:
    """What dies before the rename has changed nothing, and what it left does not disturb the next start."""
    log_steps(logger := start(JsonlLogger(), tmp_path), 1, 20)
    logger.close()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    program = (
        "import os, pathlib\n"
        "from scoresde.runs.logger import JsonlLogger, RunFacts\n"
        f"os.{death} = lambda *args: os._exit(9)\n"
        f"JsonlLogger().start(RunFacts(pathlib.Path({str(tmp_path)!r}), 'a', {{}}, resume_step=10))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(scoresde.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", program], env=environment).returncode == 9
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    start(JsonlLogger(), tmp_path, 20).close()
    assert [row["step"] for row in rows_of(tmp_path / "metrics.jsonl")] == list(range(1, 21))


class Disk:
    """`os.write` on a disk with so many bytes of room; other descriptors are left alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int = errno.ENOSPC):
        self.room, self.code, self.write = math.inf, code, os.write
        monkeypatch.setattr(os, "write", self)

    def __call__(self, descriptor: int, data: bytes) -> int:
        if self.room <= 0:
            raise OSError(self.code, os.strerror(self.code))
        written = self.write(descriptor, bytes(data[: int(min(self.room, len(data)))]))
        self.room -= written
        return written


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT], ids=errno.errorcode.get)
def test_rows_that_found_no_room_are_written_when_there_is(
    tmp_path: Path, monkeypatch, caplog, no_git: None, code: int
) -> None:
    """The disk fills up at each byte of row 3 and is freed before row 6: nothing raised, nothing lost, nothing torn."""
    path, disk = tmp_path / "metrics.jsonl", Disk(monkeypatch, code)
    for room in range(0, 75, 1 if code == errno.ENOSPC else 25):
        caplog.clear()
        logger = start(JsonlLogger(), tmp_path)
        log_steps(logger, 1, 2)
        disk.room = room
        log_steps(logger, 3, 5)
        logger.sync()
        assert [row["step"] for row in module.read_rows(path) if "images" in row] == [1, 2]
        disk.room = math.inf
        log_steps(logger, 6, 7)
        logger.close()
        assert [row["step"] for row in rows_of(path)] == list(range(1, 8))
        said = [record.message for record in caplog.records if "cut" not in record.message]
        assert said[0].startswith(f"metrics.jsonl does not take the row of step 3 ([Errno {code}]")
        assert said[1:] == ["metrics.jsonl has every row again: those from step 3 on waited."]


def test_rows_that_never_found_room_are_named(tmp_path: Path, monkeypatch, caplog, no_git: None) -> None:
    logger, disk = start(JsonlLogger(), tmp_path), Disk(monkeypatch)
    log_steps(logger, 1, 2)
    disk.room = 10
    log_steps(logger, 3, 7)
    logger.close()
    assert caplog.messages[-1] == "metrics.jsonl lacks its last 5 rows, from step 3 on." and len(caplog.messages) == 2
    assert caplog.records[-1].levelno == logging.ERROR
    disk.room = math.inf
    start(JsonlLogger(), tmp_path, 2).close()  # what is torn does not disturb the next start
    assert [row["step"] for row in rows_of(tmp_path / "metrics.jsonl")] == [1, 2]


def test_sync_puts_rows_and_the_name_of_the_file_on_the_disk(tmp_path: Path, monkeypatch) -> None:
    """What is not followed by an fsync, a power cut may take: the order of calls is the promise."""
    calls: list[str] = []

    def spy(name: str) -> None:
        real = getattr(os, name)

        def act(*args: Any) -> Any:
            target = os.readlink(f"/proc/self/fd/{args[0]}") if isinstance(args[0], int) else str(args[-1])
            calls.append(f"{name} {re.sub('[0-9a-f]{8}', '…', Path(target).name)}")
            return real(*args)

        monkeypatch.setattr(os, name, act)

    for name in ("write", "fsync", "replace"):
        spy(name)
    logger = start(JsonlLogger(), tmp_path)
    assert calls == ["fsync .metrics.jsonl.….new", "replace metrics.jsonl", f"fsync {tmp_path.name}"]
    calls.clear()
    log_steps(logger, 1, 2)
    logger.sync()
    assert calls == ["write metrics.jsonl", "write metrics.jsonl", "fsync metrics.jsonl"]
    logger.close()
    with pytest.raises(RuntimeError, match="call start before log"):
        logger.sync()


def test_a_disk_that_does_not_sync_costs_one_line(tmp_path: Path, monkeypatch, caplog, no_git: None) -> None:
    logger = start(JsonlLogger(), tmp_path)
    log_steps(logger, 1, 1)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "bad disk")))
    logger.sync()
    (line,) = caplog.messages
    assert line == "metrics.jsonl may not be on the disk yet ([Errno 5] bad disk); the run goes on."


@pytest.mark.parametrize("garbage", [b"\x00" * 40, b"\xff\xfe{", b"17", b"null", b'["step"]', b'{"step": 2'], ids=repr)
def test_a_line_that_is_no_row_is_left_out(tmp_path: Path, no_git: None, garbage: bytes) -> None:
    """Also what a file system leaves of a block that never reached the disk: it must not stop a restart."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + garbage + b'\n{"step": 2}')
    start(JsonlLogger(), tmp_path, 2).close()
    assert rows_of(path) == [{"step": 1}, {"step": 2}]


def training() -> TrainingState:
    torch.manual_seed(0)
    loss = DenoisingLoss(Preconditioned(MLP((2,), width=8, depth=1), VPSDE(), Eps()))
    split = Split(torch.randn(40, 2))
    return TrainingState(
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
        def evaluate(run: TrainingState) -> Mapping[str, float]:
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
    for row in stopped:
        assert set(row) == {"step", "images", "eval/loss"} or set(row) >= TRAIN_KEYS - {"train/imgs_per_s"}


def test_the_id_follows_the_folder(tmp_path: Path, no_git: None) -> None:
    """It outlives other commands, a start before the first checkpoint, and a move; a run in its place has another."""
    folder = tmp_path / "a"
    folder.mkdir()

    def begin(config: dict[str, Any], step: int, wanted: str | None = None) -> str:
        name = identity(folder, config, wanted=wanted)
        logger = JsonlLogger()
        logger.start(RunFacts(folder, name, config, resume_step=step))
        logger.log({"train/loss": 1.0}, step=step + 1, images=8)
        logger.close()
        return name

    name = begin(CONFIG, 0)
    assert len(name) == 12 and int(name, 16) >= 0
    assert [begin({**CONFIG, "images": n}, step) for n, step in ((1, 1), (2, 2), (3, 3), (4, 0))] == [name] * 4
    folder = folder.rename(tmp_path / "b")
    assert begin(CONFIG, 1) == name
    assert begin(CONFIG, 2, wanted="mine") == "mine"
    assert begin(CONFIG, 1) == "mine"
    (folder / "metrics.jsonl").unlink()  # as overwrite=true does
    assert begin(CONFIG, 0) != name


def test_a_folder_from_before_ids_were_kept_has_the_one_of_then(tmp_path: Path, no_git: None, monkeypatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "metrics.jsonl").write_text('{"header": {}, "step": 0}\n{"step": 1, "images": 8}\n')
    name = identity(tmp_path / "a" / "b", CONFIG)
    monkeypatch.chdir(tmp_path)
    assert identity(Path("a/b"), dict(reversed(CONFIG.items()))) == name  # another order, another spelling
    # by its definition: SHA-1 of the JSON text, keys in order
    text = json.dumps([CONFIG, ["a", "b"]], sort_keys=True)
    assert name == hashlib.sha1(text.encode()).hexdigest()[:12]


CANARIES = {
    "WANDB_API_KEY": "5ec2e7" + "a" * 34, "DATABASE_PASSWORD": "correct-horse", "HTTPS_PROXY": "http://me:staple@proxy",
}  # fmt: skip


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[OfflineRun]]]:
    """One W&B run, started twice at once: 20 rows, a table, a picture, final numbers; the second ends in failure.

    In a checkout whose remote holds a password, with secrets in the environment and on the command line.
    """
    folder, checkout = tmp_path_factory.mktemp("sweep") / "7", tmp_path_factory.mktemp("checkout")
    folder.mkdir()
    from matplotlib.figure import Figure

    Figure(figsize=(1, 1)).savefig(folder / "picture.png")
    remote = "https://git-user:git-token@example.org/private-name.git"
    for command in (["init", "-b", "main"], ["remote", "add", "origin", remote]):
        subprocess.run(["git", *command], cwd=checkout, check=True, capture_output=True)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CANARIES.items():
            patch.setenv(name, value)
        patch.chdir(checkout)
        patch.setattr(sys, "argv", ["scoresde-train", "token=battery-staple"])
        for attempt in range(2):
            logger = WandbLogger(tags=["test"], project="mine", finish_timeout=600)
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
        # W&B's readings are of this process, with torch in it (over 200 MB), and not of the view (70 MB)
        assert all(reading.get("proc.memory.rssMB", 200) > 150 for reading in run.stats)
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
    """Neither environment nor command line nor the remote of the checkout nor any code; not the machine's name."""
    files = [path for path in offline[0].rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    secrets = [*CANARIES.values(), "staple", "git-user", "git-token", "private-name"]
    for path in files:
        data = path.read_bytes()
        for secret in secrets:
            assert secret.encode() not in data, (secret, path)
        assert path.suffix != ".py"
    assert [run.host for run in offline[1]] == ["", ""]


def test_nothing_of_wandb_is_in_the_training_process() -> None:
    """Not the module, at no time, nor a thread; `disabled` is the mode without any files."""
    program = (
        "import sys, scoresde.cli.train, pathlib, tempfile, threading\n"
        "from scoresde.runs import WandbLogger\nfrom scoresde.runs.logger import JsonlLogger, RunFacts\n"
        "for mode in ('disabled', 'offline'):\n"
        "    facts = RunFacts(pathlib.Path(tempfile.mkdtemp()), 'a', {})\n"
        "    logger = JsonlLogger(WandbLogger(mode=mode, finish_timeout=600))\n"
        "    logger.start(facts)\n"
        "    logger.log({'train/loss': 1.0}, step=1, images=8)\n"
        "    logger.close()\n"
        "    assert (facts.folder / 'wandb').exists() == (mode == 'offline')\n"
        "assert 'wandb' not in sys.modules and threading.active_count() == 1\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(scoresde.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class FakeWandb(types.ModuleType):
    """Stands for wandb and raises at the chosen call, then at every later one; remembers what it was asked."""

    def __init__(self, fault: str, error: Exception, only: str = ""):
        super().__init__("wandb")
        self.fault, self.error, self.only, self.calls = fault, error, only, []
        self.summary = types.SimpleNamespace(update=self.call("summary"))
        self.settings = types.SimpleNamespace(sync_dir="runs/a/wandb/offline-run-1")
        self.url = "https://wandb.ai/us/scoresde/runs/0123456789ab"
        for name in ("Settings", "init", "define_metric", "log", "Image", "Table", "finish", "teardown"):
            setattr(self, name, self.call(name))
        self.Settings.model_fields = {"silent": None, "finish_timeout": None}

    def call(self, name: str) -> Any:
        def act(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            if name == self.fault and self.only in ("", kwargs.get("mode")):
                raise self.error
            return self

        return act


FAULTS = ("import", "Settings", "init", "define_metric", "log", "Image", "Table", "summary", "finish")


def messages(folder: Path, mode: str = "offline") -> Iterator[list[Any]]:
    """What the view of a short run reads: all that `WandbLogger` can send."""
    run = {"id": "0123456789ab", "dir": str(folder), "config": CONFIG, "group": "g", "entity": "us", "tags": ["a"]}
    run["resume"] = "allow"
    row = {"train/loss": 1.0, "step": 1, "images": 8}
    yield ["start", {"run": run, "mode": mode, "pid": 1, "patience": 4.0}]
    yield ["log", row]
    yield ["image", "eval/samples", "x.png", {"step": 1, "images": 8}]
    yield ["table", "eval/summary", ["a"], [["b"]]]
    yield ["summary", {"bpd/ode": 1.0}]
    yield ["close", 1]


def show(fake: FakeWandb | None, folder: Path, monkeypatch: pytest.MonkeyPatch, mode: str = "offline") -> list[str]:
    """Lines for the user."""
    told: list[tuple[str, str]] = []
    monkeypatch.setitem(sys.modules, "wandb", fake)
    wandb_view.show(messages(folder, mode), lambda *line: told.append(line))
    return [text for kind, text in told if kind == "say"]


@pytest.mark.parametrize("error", [ValueError("bad value"), OSError(28, "disk full"), AssertionError()], ids=repr)
@pytest.mark.parametrize("fault", FAULTS)
def test_wandb_may_fail_anywhere(tmp_path: Path, monkeypatch, fault: str, error) -> None:
    """One line for the user, and W&B is left alone from then on."""
    fake = FakeWandb(fault, error)
    (line,) = show(None if fault == "import" else fake, tmp_path, monkeypatch)
    assert "the run goes on, metrics.jsonl has every row" in line and "\n" not in line
    begun = FAULTS.index(fault) > FAULTS.index("define_metric")
    assert line.endswith("wandb sync runs/a/wandb/offline-run-1") == begun
    names = [name for name, *_ in fake.calls]
    assert names[-1:] == ([] if fault == "import" else [fault])


def test_an_online_run_that_does_not_begin_is_kept_offline(tmp_path: Path, monkeypatch) -> None:
    """The service that holds the failed run goes first; every message reaches the second."""
    fake = FakeWandb("init", ConnectionError("no route\nand a trace"), only="online")
    (line,) = show(fake, tmp_path, monkeypatch, mode="online")
    assert line == (
        "W&B cannot be reached (ConnectionError: no route). The run is kept offline; "
        "later: wandb sync runs/a/wandb/offline-run-1"
    )
    names = [name for name, *_ in fake.calls]
    assert names[:5] == ["Settings", "init", "teardown", "Settings", "init"]
    assert names[-7:] == ["log", "Image", "log", "Table", "log", "summary", "finish"]


def test_wandb_is_told_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in ("offline", "online"):
        fake = FakeWandb("", ValueError())
        assert show(fake, tmp_path, monkeypatch, mode) == []
        given = {name: kwargs for name, _, kwargs in fake.calls if name in ("init", "finish", "Settings")}
        init = given["init"]
        assert (init["mode"], init["resume"], init["id"], init["config"]) == (mode, "allow", "0123456789ab", CONFIG)
        assert (init["dir"], init["entity"], init["tags"], init["group"]) == (str(tmp_path), "us", ["a"], "g")
        assert given["finish"] == {"exit_code": 1}
        # those that this version of W&B knows; the network's patience is not that of W&B's own service
        patience = 4.0 if mode == "online" else wandb_view.LOCAL
        assert given["Settings"] == {"silent": True, "finish_timeout": patience}


def test_a_timeout_that_is_not_positive_is_refused() -> None:
    for wrong in (0, -1.0, True, math.nan, math.inf, "60", None):
        with pytest.raises(ValueError, match="finish_timeout is a number of seconds, > 0 and finite; got"):
            WandbLogger(finish_timeout=wrong)  # type: ignore[arg-type]


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="mode is 'offline', 'online' or 'disabled'; got 'dryrun'"):
        WandbLogger(mode="dryrun")


def test_a_view_is_passed_everything(tmp_path: Path, no_git: None) -> None:
    """Each call once and in order, after the record has it: what a view shows is in the file already."""
    heard: list[tuple[str, tuple[Any, ...], dict[str, Any], int]] = []
    methods = {name for name in vars(Logger) if not name.startswith("_")}
    view = NullLogger()

    def hear(method: str, *args: Any, **kwargs: Any) -> None:
        heard.append((method, args, kwargs, len(rows_of(tmp_path / "metrics.jsonl"))))

    for method in methods:
        setattr(view, method, partial(hear, method))
    logger, calls = JsonlLogger(view), {
        "start": ((RunFacts(tmp_path, "id", {}),), {}),
        "log": (({"a": 1.0},), {"step": 1, "images": 8}),
        "image": (("k", Path("p")), {"step": 1, "images": 8}),
        "table": (("k", ["a"], [[1]]), {}),
        "summary": (({"a": 1},), {}),
        "sync": ((), {}),
        "close": ((True,), {}),
    }  # fmt: skip
    assert set(calls) == methods
    for method, (args, kwargs) in calls.items():
        getattr(logger, method)(*args, **kwargs)
    assert heard == [(m, a, k, int(m != "start")) for m, (a, k) in calls.items()]
