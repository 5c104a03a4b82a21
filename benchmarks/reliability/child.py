"""The run that the campaigns break: a small training, as the command does it, in a process of its own.

    python child.py '{"folder": "…", "steps": 60}'    # one run; a second one resumes it

A `Nursery` imports everything once and forks for each run, so a run costs a fifth of a second and not five.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [path for path in (str(HERE), str(HERE.parents[1])) if path not in sys.path]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from faults import Faults  # noqa: E402

from scoresde import VESDE, VPSDE, DenoisingLoss, Eps, Preconditioned, Rng  # noqa: E402
from scoresde.codecs import Scaling  # noqa: E402
from scoresde.data import Dataset, EpochOrder, Split  # noqa: E402
from scoresde.data.readers.npy import stored  # noqa: E402
from scoresde.nn import MLP, UNet  # noqa: E402
from scoresde.runs import lock  # noqa: E402
from scoresde.runs.checkpoint import CheckpointError, latest, load  # noqa: E402
from scoresde.runs.logger import (  # noqa: E402
    JsonlLogger,
    RunFacts,
    read_rows,
)
from scoresde.runs.publish import replacing  # noqa: E402
from scoresde.train.ema import EMA, PowerEMA  # noqa: E402
from scoresde.train.signals import Signals  # noqa: E402
from scoresde.train.state import TrainingState  # noqa: E402
from scoresde.train.trainer import Trainer  # noqa: E402

SAMPLES, BATCH = 200, 16  # 12 batches and 8 samples left over in an epoch


@dataclass(frozen=True)
class Job:
    """A run: the standard subject of the campaigns, and what goes wrong in it.

    Attributes:
        folder: of the run.
        steps, every, evaluate: steps of training, between checkpoints, and between measurements (0 for never).
        network: "mlp", 10 k parameters for points, or "unet", 50 k for 8 × 8 pictures.
        sde, autocast, ema, dropout, accumulate: "vp" or "ve"; None or "bfloat16"; "default" or "power"; …
        seed: of weights and noise.
        trainer: more arguments of `Trainer`.
        faults, trace: see `Faults`; files count below folder/checkpoints.
        command: arguments of scoresde-train, which is run instead.
        threads: of torch.
        workers: None for samples in memory; else they lie in a file beside the folder, read by so many processes.
    """

    folder: str
    steps: int = 60
    every: int = 10
    evaluate: int = 0
    network: str = "mlp"
    sde: str = "vp"
    autocast: str | None = None
    ema: str = "default"
    dropout: float = 0.0
    accumulate: int = 1
    seed: int = 0
    trainer: dict[str, Any] = field(default_factory=dict)
    faults: tuple[str, ...] = ()
    trace: str = ""
    command: tuple[str, ...] = ()
    threads: int = 1
    workers: int | None = None

    @property
    def checkpoints(self) -> Path:
        return Path(self.folder) / "checkpoints"

    def but(self, **changes: Any) -> Job:
        return dataclasses.replace(self, **changes)


def build(job: Job) -> tuple[Trainer, TrainingState]:
    """Everything of a run. Length and intervals are in steps here and in images there."""
    torch.manual_seed(job.seed)
    g = torch.Generator().manual_seed(1)
    if job.network == "mlp":
        network: torch.nn.Module = MLP((2,), width=32)
        raw, scaling = torch.randn(SAMPLES, 2, generator=g), Scaling.identity()
    else:
        network = UNet((1, 8, 8), width=8, multipliers=(1, 2), blocks=1, dropout=job.dropout)
        raw, scaling = torch.randint(256, (SAMPLES, 1, 8, 8), generator=g, dtype=torch.uint8), Scaling(levels=256)
    held = Split(raw[:32])
    if job.workers is not None:
        raw = in_file(Path(f"{job.folder}.npy"), raw)
    sde = VPSDE() if job.sde == "vp" else VESDE()
    loss = DenoisingLoss(Preconditioned(network, sde, Eps(), autocast=job.autocast))
    ema = EMA(loss, half_life=500) if job.ema == "default" else PowerEMA(loss)
    images = BATCH * job.accumulate
    trainer = Trainer(**{
        "images": images * job.steps, "batch_size": BATCH, "accumulate": job.accumulate, "warmup": 10 * images,
        "log_every": images, "evaluate_every": images * job.evaluate, "checkpoint_every": images * job.every,
        **job.trainer,
    })  # fmt: skip
    training = TrainingState(
        loss, torch.optim.AdamW(loss.parameters(), 2e-3, fused=True), ema,
        Dataset("random", Split(raw), held, scaling), EpochOrder(SAMPLES, BATCH, 0), Rng(job.seed),
        workers=job.workers or 0,
    )  # fmt: skip
    return trainer, training


def in_file(path: Path, raw: torch.Tensor) -> Any:
    """The same samples, which stay in a file."""
    if not path.exists():
        with replacing(path) as file:
            np.save(file, raw.numpy())
    return stored(path, None, torch.from_numpy, True)


def score(run: TrainingState) -> float:
    """Up and down, from the number of images alone: which checkpoint is best is known, and seldom the newest."""
    return (run.images * 7919 % 1009) / 1009


def train(job: Job) -> None:
    """What scoresde-train does: lock, resume, train to the end, end on a signal."""
    folder = Path(job.folder)
    faults = Faults(job.faults, job.checkpoints, job.trace)
    faults.install()
    if job.command:
        return command(job)
    trainer, run = build(job)
    logger = JsonlLogger()
    here = functools.partial(faults.wrap, where=lambda *_, **__: str(job.checkpoints))
    run.terms, logger.log = here("terms", run.terms), here("log", logger.log)  # type: ignore[method-assign]
    measure = here("evaluate", lambda run: {"eval/loss": score(run)})
    with Signals() as signals, lock.hold(folder):
        saved = latest(job.checkpoints)
        if saved is not None:
            run.restore(saved)
        logger.start(RunFacts(folder, "child", {}, None, 0 if saved is None else saved.step))
        try:
            trainer.fit(run, logger=logger, folder=job.checkpoints, evaluate=measure, signals=signals)
        finally:
            logger.close()


def command(job: Job) -> None:
    from scoresde.cli.train import main

    sys.argv = ["scoresde-train", *job.command, f"out={job.folder}"]
    main()


def perform(job: Job) -> int:
    """The exit status of a run."""
    torch.set_num_threads(job.threads)
    try:
        train(job)
        return 0
    except SystemExit as end:
        print(getattr(end, "message", end.code if isinstance(end.code, str) else ""), file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1


class Ended(NamedTuple):
    """How a run ended: exit status (−9 for SIGKILL), what it printed, and seconds."""

    code: int
    text: str
    seconds: float


class Nursery:
    """Forks runs off a process that has imported everything. One at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            env={name: value for name, value in os.environ.items() if not name.startswith("WANDB")},
        )  # fmt: skip

    def run(
        self, job: Job, *, watch: Callable[[], Any] | None = None, kill_after: float | None = None, limit: float = 600
    ) -> Ended:
        """Runs `job` to its end.

        Args:
            job: what to run.
            watch: called about a thousand times a second until then.
            kill_after: seconds after which SIGKILL comes.
            limit: seconds after which it comes anyway, and an error is raised.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        log = f"{job.folder}.log"
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        Path(log).touch()  # a run may be killed before it can
        self.process.stdin.write(json.dumps([log, dataclasses.asdict(job)]) + "\n")
        pid, start, killed = int(self.process.stdout.readline()), time.monotonic(), False
        pause = 0.001 if watch or kill_after is not None else 1.0
        while not select.select([self.process.stdout], [], [], pause)[0]:
            passed = time.monotonic() - start
            if not killed and passed > (limit if kill_after is None else kill_after):
                killed = True
                os.kill(pid, signal.SIGKILL)  # unreaped until the line below is read, so the number is its own
            if watch:
                watch()
        code = int(self.process.stdout.readline())
        seconds = time.monotonic() - start
        text = Path(log).read_text(encoding="utf-8", errors="replace")
        if killed and kill_after is None:
            raise TimeoutError(f"{job} did not end in {limit} s:\n{text}")
        return Ended(code, text, seconds)


@functools.cache
def nursery() -> Nursery:
    """The one of this process; it ends when this process does."""
    return Nursery()


def serve() -> None:
    """The other end of `Nursery`."""
    import torch._dynamo  # noqa: F401 (optimizers import it at their first step)

    for line in sys.stdin:
        log, fields = json.loads(line)
        pid = os.fork()
        if not pid:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(out, 1)
            os.dup2(out, 2)
            code = perform(Job(**fields))
            for thread in threading.enumerate():
                if not thread.daemon and thread is not threading.current_thread():
                    thread.join()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(pid, flush=True)
        # the code is told before the number is free for another process
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(code, flush=True)


def manifest(checkpoint: Path) -> dict[str, Any]:
    """What is in a checkpoint, as SHA-256 of each of its files: equal for equal weights, averages, moments, generators,
    order and counters.
    """
    files = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["files"]
    return {name: entry["sha256"] for name, entry in files.items()}


def newest(job: Job) -> int:
    """Step of the newest whole checkpoint, 0 if there is none."""
    saved = latest(job.checkpoints)
    return 0 if saved is None else saved.step


def final(job: Job) -> dict[str, Any]:
    """`manifest` of the last checkpoint of a finished run, {} where there is none that is whole."""
    path = job.checkpoints / f"step-{job.steps:08d}"
    try:
        load(path)
    except CheckpointError:
        return {}
    return manifest(path)


def rows(job: Job) -> list[dict[str, Any]]:
    """metrics.jsonl without headers and without what a clock says."""
    found = [row for row in read_rows(Path(job.folder) / "metrics.jsonl") if "header" not in row]
    return [{key: v for key, v in row.items() if key not in ("time", "train/imgs_per_s")} for row in found]


EVERY_FILE = ("mkdir", "save_file", "chmod", "open", "fsync", "rename", "rmtree", "unlink", "rmdir")


def points(trace: Path) -> list[tuple[str, int, str]]:
    """(name, n, path) of each line of a trace."""
    lines = [line.split(" ", 2) for line in trace.read_text(encoding="utf-8").splitlines()]
    return [(name, int(n), path) for name, n, path in lines]


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        sys.exit(perform(Job(**json.loads(sys.argv[1]))))
