"""Training on samples that stay in a file: the same bits for any number of workers and processes, and after kills."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from together import of_session, start, together
from torch import Tensor, nn

from scoresde import VPSDE, DenoisingLoss, Eps, Preconditioned, Rng
from scoresde.data import Arrays, EpochOrder
from scoresde.data.rows import DataLost, Rows
from scoresde.runs.checkpoint import latest
from scoresde.train.ema import EMA
from scoresde.train.parallel import spread_over
from scoresde.train.signals import Signals, Stopped
from scoresde.train.state import TrainingState
from scoresde.train.trainer import Trainer
from scoresde.train.world import Alone, World, join

CPU = torch.device("cpu")


@pytest.fixture
def path(tmp_path: Path) -> str:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (200, 6), dtype=np.uint8))
    return str(tmp_path / "x.npy")


class Net(nn.Module):
    """Two layers, and dropout, which draws from torch's own generator."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.drop, self.outlet = nn.Linear(7, 16), nn.Dropout(0.1), nn.Linear(16, 6)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Any = None) -> Tensor:
        return self.outlet(self.drop(torch.tanh(self.inlet(torch.cat([x, c_noise[:, None]], 1)))))


def training(path: str, workers: int, world: World | None = None, lazy: bool = True) -> TrainingState:
    torch.manual_seed(0)
    dataset, world = Arrays(path, lazy=lazy), Alone() if world is None else world
    assert isinstance(dataset.train.raw, Rows) == lazy
    loss = DenoisingLoss(Preconditioned(Net(), VPSDE(), Eps()))
    ema = EMA(loss, half_life=100)
    parallel = spread_over(world, loss, ema, "ddp")
    optimizer, order = torch.optim.AdamW(loss.parameters(), 1e-2, fused=True), EpochOrder(180, 16, 0)
    how: dict[str, Any] = {"world": world, "parallel": parallel, "workers": workers}
    return TrainingState(loss, optimizer, ema, dataset, order, Rng(0), **how)


def trainer(steps: int) -> Trainer:
    return Trainer(images=16 * steps, batch_size=16, checkpoint_every=16 * 4, log_every=0)


def bits(run: TrainingState) -> bytes:
    groups = run.tensors()
    return b"".join(groups[group][name].numpy().tobytes() for group in sorted(groups) for name in sorted(groups[group]))


def batches_and_weights(path: str) -> list[tuple[np.ndarray, bytes]]:
    """For 0, 1 and 4 workers and for data in memory: this process's rows of 14 batches, and what is learned."""
    world, found = join(CPU), []
    for workers, lazy in ((0, False), (0, True), (1, True), (4, True)):
        run = training(path, workers, world, lazy)
        rows = torch.stack([run.batch()[0] for _ in range(14)]).numpy()
        run.loader.close()
        run = training(path, workers, world, lazy)
        trainer(14).fit(run)
        found.append((rows, bits(run)))
    world.close()
    return found


def test_batches_and_weights_depend_neither_on_workers_nor_on_where_the_data_are(path: str) -> None:
    alone, (first, second) = (
        together(batches_and_weights, path, world=1)[0],
        together(batches_and_weights, path, world=2),
    )
    expected = alone[0][0]
    for one, left, right in zip(alone, first, second, strict=True):
        assert np.array_equal(one[0], expected)
        assert np.array_equal(np.concatenate([left[0], right[0]], 1), expected)
        # two processes round sums of gradients in another way, see test_parallel.py
        assert one[1] == alone[0][1] and left[1] == first[0][1] and right[1] == second[0][1]


def resumed(path: str, folder: Path, workers: int, steps: int, pause: float = 0.0) -> bytes:
    """What scoresde-train does: goes on from the last checkpoint, if there is one, to the end."""
    run = training(path, workers)
    if (checkpoint := latest(folder)) is not None:
        run.restore(checkpoint)
    terms = run.terms

    def slowly() -> Any:
        time.sleep(pause)
        return terms()

    run.terms = slowly  # type: ignore[method-assign]
    trainer(steps).fit(run, folder=folder)
    return bits(run)


def gone(leader: int | None, limit: float) -> bool:
    """Whether no process of a session is left within `limit` seconds."""
    deadline = time.monotonic() + limit
    while of_session(leader) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not of_session(leader)


def test_a_run_that_is_killed_with_four_workers_goes_on_to_the_same_bits(path: str, tmp_path: Path) -> None:
    steps, draw = 30, random.Random(0)
    expected, folder, killed = resumed(path, tmp_path / "whole", 0, steps), tmp_path / "killed", 0
    for _ in range(2):
        group = start(resumed, path, folder, 4, steps, 0.05)
        pid = group.processes[0].pid
        deadline = time.monotonic() + 60
        # once it trains: the first of these checkpoints, or the next one
        before = latest(folder)
        while (now := latest(folder)) is None or (before is not None and now.step == before.step):
            assert time.monotonic() < deadline and group.processes[0].is_alive()
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.4))
        group.processes[0].kill()
        killed += group.wait()[0].code == -9
        assert gone(pid, 20)
    assert killed == 2
    group = start(resumed, path, folder, 4, steps)
    (end,) = group.wait()
    assert end.code == 0 and gone(group.processes[0].pid, 20), end.output
    assert end.value == expected


def test_a_worker_that_dies_is_named(path: str) -> None:
    run = training(path, 1)
    run.batch()
    (worker,) = run.loader._processes
    os.kill(worker.pid or 0, signal.SIGKILL)
    with pytest.raises(DataLost, match=r"reads samples ahead has ended.*resume=auto"):
        for _ in range(20):
            run.batch()


def stopped(path: str, folder: Path) -> tuple[int, int]:
    """A run that is asked to end, as a scheduler does: every process of it gets SIGTERM."""
    run = training(path, 2)
    log = trainer(40)
    terms = run.terms

    def signalled() -> Any:
        if run.step == 6:
            for pid in of_session(os.getsid(0)):
                os.kill(pid, signal.SIGTERM)
        return terms()

    run.terms = signalled  # type: ignore[method-assign]
    try:
        with Signals() as signals:
            log.fit(run, folder=folder, signals=signals)
    except Stopped as end:
        return int(end.code or 0), run.step
    return 0, run.step


def test_a_signal_to_all_of_its_processes_ends_a_run_in_good_order(path: str, tmp_path: Path) -> None:
    group = start(stopped, path, tmp_path / "run")
    (end,) = group.wait(60)
    assert end.code == 0 and gone(group.processes[0].pid, 20), end.output
    assert end.value == (143, 7)
    found = latest(tmp_path / "run")
    assert found is not None and found.step == 7
    assert resumed(path, tmp_path / "run", 0, 40) == resumed(path, tmp_path / "whole", 0, 40)
