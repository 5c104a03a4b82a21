"""Weights & Biases, its network and its processes fail; training goes on, and `metrics.jsonl` has every row."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [path for path in (str(HERE), str(HERE.parents[1])) if path not in sys.path]
sys.path.append(str(HERE.parents[1] / "tests"))

import torch  # noqa: E402
from offline import closed_runs, offline_runs  # noqa: E402
from result import Result  # noqa: E402
from wandb_server import FAULTS, Server  # noqa: E402

from scoresde import VPSDE, DenoisingLoss, Eps, Preconditioned, Rng  # noqa: E402
from scoresde.codecs import Scaling  # noqa: E402
from scoresde.data import Dataset, EpochOrder, Split  # noqa: E402
from scoresde.nn import MLP  # noqa: E402
from scoresde.runs.logger import (  # noqa: E402
    JsonlLogger,
    Logger,
    NullLogger,
    RunFacts,
    read_rows,
)
from scoresde.runs.wandb_logger import WandbLogger  # noqa: E402
from scoresde.train.ema import EMA  # noqa: E402
from scoresde.train.state import TrainingState  # noqa: E402
from scoresde.train.trainer import Trainer  # noqa: E402

STEPS, BATCH, TIMEOUT = 300, 8, 10.0
LIMIT = TIMEOUT + 1 + 9  # to kill a view that has not ended may take 1 s; the rest is for a machine under load


def train(logger: Logger, halfway: Callable[[], None] = lambda: None, pause: float = 0.0) -> list[torch.Tensor]:
    """The weights after 300 steps, a row each; `halfway` is called once, `pause` seconds after the half."""
    torch.manual_seed(0)
    loss = DenoisingLoss(Preconditioned(MLP((2,), width=8, depth=1), VPSDE(), Eps()))
    split = Split(torch.randn(40, 2))
    run = TrainingState(
        loss, torch.optim.Adam(loss.parameters(), fused=True), EMA(loss),
        Dataset("normal", split, split, Scaling.identity()), EpochOrder(40, BATCH, 0), Rng(0),
    )  # fmt: skip
    calls = []

    def evaluate(run: TrainingState) -> Mapping[str, float]:
        calls.append(run.images)
        if len(calls) == 1:
            time.sleep(pause)
            halfway()
        return {"eval/loss": 0.0}

    every = STEPS * BATCH // 2
    Trainer(images=STEPS * BATCH, batch_size=BATCH, log_every=BATCH, evaluate_every=every).fit(
        run, logger=logger, evaluate=evaluate
    )
    return [p.detach().clone() for p in loss.parameters()]


class Outcome(NamedTuple):
    """What became of one run: seconds of `start` and `close`, lines for the user, rows that W&B's log lacks."""

    start: float
    close: float
    said: list[str]
    lost: int
    whole: bool

    @property
    def silent(self) -> bool:
        return not self.whole or (self.lost > 0 and not self.said)


@contextmanager
def hearing() -> Iterator[list[str]]:
    """The warnings that a view gives the user."""
    said: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    log, ear = logging.getLogger("scoresde.runs.wandb_logger"), Ear(logging.WARNING)
    log.addHandler(ear)
    log.propagate = False
    try:
        yield said
    finally:
        log.removeHandler(ear)
        log.propagate = True


def broken_run(
    folder: Path, weights: list[torch.Tensor], *, url: str, pause: float, damage: Callable[[WandbLogger], None]
) -> Outcome:
    """A run that is logged online to `url`, with `damage` done halfway."""
    folder.mkdir(parents=True)
    os.environ |= {"WANDB_BASE_URL": url, "WANDB_API_KEY": "c0ffee" + "0" * 34}
    view = WandbLogger(mode="online", finish_timeout=TIMEOUT)
    logger = JsonlLogger(view)
    with hearing() as said:
        began = time.monotonic()
        logger.start(RunFacts(folder, "0123456789ab", {"seed": 0}))
        start = time.monotonic() - began
        reached = train(logger, lambda: damage(view), pause)
        began = time.monotonic()
        logger.close()
        close = time.monotonic() - began
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "header" not in row]
    whole = all(map(torch.equal, weights, reached)) and len(rows) == STEPS + 2
    shown = max((len(run.history) for run in offline_runs(folder, "*run-*")), default=0)
    return Outcome(start, close, said, len(rows) - shown, whole)


def network(full: bool, scratch: Path) -> list[Result]:
    """R25: the server fails from the start, or halfway."""
    weights, results = train(NullLogger()), []
    for when in ("start", "half"):
        outcomes: dict[str, list[Outcome]] = {}
        for fault in FAULTS if full else (("refused",) if when == "start" else ("400",)):
            for attempt in range(3 if full else 1):
                server = Server(fault if when == "start" else "")

                def damage(view: WandbLogger, fault: str = fault, server: Server = server) -> None:
                    if fault == "refused" and not server.fault:
                        server.cut()
                    server.fault = fault

                outcome = broken_run(
                    scratch / when / f"{fault}-{attempt}", weights, url=server.url,
                    pause=0.0 if when == "start" else 3.0, damage=damage,
                )  # fmt: skip
                outcomes.setdefault(fault, []).append(outcome)
        flat = [outcome for each in outcomes.values() for outcome in each]
        good = sum(o.whole and o.close < LIMIT and len(o.said) <= 1 for o in flat)
        seconds = ", ".join(f"{fault} {max(o.close for o in each):.1f}" for fault, each in outcomes.items())
        lost = ", ".join(f"{fault} {max(o.lost for o in each)}" for fault, each in outcomes.items())
        results.append(
            Result(
                f"R25 W&B's network fails from the {when}", len(flat), good, sum(o.silent for o in flat),
                f"weights equal; `start` took at most {1000 * max(o.start for o in flat):.0f} ms, `close` at most (s, "
                f"{TIMEOUT:g} allowed): {seconds}; rows that W&B's own log lacks of {STEPS + 2}: {lost}",
            )
        )  # fmt: skip
    return results


def children_of(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]


def processes(full: bool, scratch: Path) -> Result:
    """R25: W&B's processes are killed or stopped during the run."""
    weights, server, outcomes = train(NullLogger()), Server(), {}

    cases = {
        "view killed": lambda view: os.kill(view._view.pid, signal.SIGKILL),
        "view stopped": lambda view: os.kill(view._view.pid, signal.SIGSTOP),
        "service killed": lambda view: os.kill(children_of(view._view.pid)[0], signal.SIGKILL),
        "service stopped": lambda view: os.kill(children_of(view._view.pid)[0], signal.SIGSTOP),
        "signals of the job": lambda view: [os.killpg(view._view.pid, s) for s in (signal.SIGINT, signal.SIGTERM)],
    }
    for name, damage in cases.items() if full else list(cases.items())[:1]:
        folder = scratch / "processes" / name.replace(" ", "-")
        outcomes[name] = broken_run(folder, weights, url=server.url, pause=3.0, damage=damage)
    good = sum(o.whole and o.close < LIMIT and len(o.said) <= 1 for o in outcomes.values())
    figures = ", ".join(f"{name} {o.close:.1f} s, {o.lost} rows" for name, o in outcomes.items())
    return Result(
        "R25 W&B's processes are killed or stopped", len(outcomes), good, sum(o.silent for o in outcomes.values()),
        f"`close` took, and W&B's log lacks of {STEPS + 2}: {figures}",
    )  # fmt: skip


def logged_and_killed(folder: Path, rows: int, *, everything: bool) -> None:
    """A process that logs offline, then kills itself; `everything`: and first W&B's two, 2 s after the last row."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    try:
        view = WandbLogger()
        logger = JsonlLogger(view)
        logger.start(RunFacts(folder, "0123456789ab", {"seed": 0}))
        for step in range(1, rows + 1):
            logger.log({"train/loss": 1 / step}, step=step, images=BATCH * step)
        while everything and view._view is not None and view._folder.endswith("*"):  # until it says where the run is
            time.sleep(0.1)
            view._listen()
        if everything and view._view is not None:
            time.sleep(2.0)
            for pid in [*children_of(view._view.pid), view._view.pid]:
                os.kill(pid, signal.SIGKILL)
    finally:  # also what raises must not go on as a second one of the process that it was forked from
        os.kill(os.getpid(), signal.SIGKILL)


def kills(full: bool, scratch: Path, everything: bool) -> Result:
    """R27: kill -9 after some rows, started four times under one id, at once."""
    lost: dict[int, int] = {}
    tried = survived = 0
    starts = 4 if full else 2
    for rows in (1, 10, 1000) if full else (10,):
        folder = scratch / f"killed-{everything}" / str(rows)
        folder.mkdir(parents=True)
        for _ in range(starts):
            logged_and_killed(folder, rows, everything=everything)
            own = [row["step"] for row in read_rows(folder / "metrics.jsonl") if "header" not in row]
            tried, survived = tried + 1, survived + (own == list(range(1, rows + 1)))
        runs = offline_runs(folder) if everything else closed_runs(folder, starts)
        survived -= starts - len(runs)
        lost[rows] = rows - min((len(run.history) for run in runs), default=0)
    figures = ", ".join(f"{count} of {rows}" for rows, count in lost.items())
    who = "training and W&B's processes, 2 s after the last row" if everything else "training, at the last row"
    return Result(
        f"R27 kill -9 of {who}", tried, survived, 0,
        f"metrics.jsonl lacks 0 rows, W&B's own log at most {figures}; each of {starts} starts has a log of its own",
    )  # fmt: skip


def cost(full: bool, scratch: Path) -> Result:
    """Microseconds that a row takes from training, between steps of 5 ms of computing that leave it no cache."""
    x, row = torch.randn(256, 256), {f"train/{k}": 0.123456789 + k for k in range(8)}
    wall: dict[str, list[float]] = {}
    busy: dict[str, list[float]] = {}
    for attempt in range(5 if full else 2):
        for name, logger in (("metrics.jsonl", JsonlLogger()), ("both", JsonlLogger(WandbLogger()))):
            folder = scratch / f"cost-{attempt}-{name}"
            folder.mkdir(parents=True)
            logger.start(RunFacts(folder, "0123456789ab", {"seed": 0}))
            time.sleep(2.0)  # W&B has begun
            calls = []
            for k in range(200):
                end = time.perf_counter() + 0.005
                while time.perf_counter() < end:
                    x @ x
                began, used = time.perf_counter(), time.thread_time()
                logger.log(row, step=k, images=k)
                calls.append((time.thread_time() - used, time.perf_counter() - began))
            logger.close()
            for kept, values in zip((busy, wall), zip(*calls, strict=True), strict=True):
                kept.setdefault(name, []).append(sorted(values)[100])
    part = min(busy["both"]) / 0.005  # the processor's time: other work on the machine adds to the clock's
    alone, both, clock = 1e6 * min(busy["metrics.jsonl"]), 1e6 * min(busy["both"]), 1e6 * min(wall["both"])
    return Result(
        "R25 logging takes less than 2 % of a step of 5 ms", 1, int(part < 0.02), 0,
        f"a row of 11 numbers takes {alone:.0f} µs in metrics.jsonl, {both:.0f} µs with W&B ({clock:.0f} µs by the "
        f"clock): {100 * part:.1f} % (medians of 200, least of {len(wall['both'])})",
    )  # fmt: skip


def campaign(full: bool, scratch: Path) -> list[Result]:
    """The network, the processes, kills of training, and what a row costs."""
    kept = {name: os.environ.get(name) for name in ("WANDB_BASE_URL", "WANDB_API_KEY")}
    try:
        results = [*network(full, scratch), processes(full, scratch)]
    finally:
        for name, value in kept.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
    results.append(kills(full, scratch, True))
    # tests/runs/test_wandb_faults.py kills training alone, too; and a time does not matter to the tests
    return [*results, kills(full, scratch, False), cost(full, scratch)] if full else results
