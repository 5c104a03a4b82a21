"""Training on more than memory holds: private memory and speed beside the same network on samples in memory.

    python benchmarks/large.py                       # 10 GB of noise, made in /tmp and deleted
    python benchmarks/large.py --gigabytes 2 --rounds 10

Three runs of one small U-Net take turns, a few steps each: on the first 50,000 samples in memory, on the whole file by
itself, and on the whole file by four workers. `Anonymous` of /proc/PID/smaps_rollup is the memory that no file stands
behind; that of a run is the sum over all of its processes. Writes results/large/README.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import numpy as np  # noqa: E402
import report  # noqa: E402

SHAPE, KEPT, BATCH, STEPS, MIB = (3, 32, 32), 50_000, 32, 4, 1 << 20
WAYS = {"in memory": None, "in the file, no workers": 0, "in the file, four workers": 4}


def make(path: Path, n: int) -> None:
    """Noise of 8 bits."""
    values = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(n, *SHAPE))
    g = np.random.default_rng(0)
    for start in range(0, n, 50_000):
        part = values[start : start + 50_000]
        part[:] = g.integers(0, 256, part.shape, dtype=np.uint8)


def private(leader: int) -> float:
    """MiB that no file stands behind, of all processes of a session."""
    total = 0.0
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int((path / "stat").read_text().rpartition(")")[2].split()[3]) == leader:
                text = (path / "smaps_rollup").read_text()
                total += int(text.partition("Anonymous:")[2].split()[0]) / 1024
        except OSError:
            continue
    return total


def child(path: str, workers: int | None, pipe: Connection) -> None:
    """A run that takes `STEPS` steps whenever it is asked to, and says how long they took, in seconds."""
    os.setsid()
    import torch

    from scoresde import VPSDE, DenoisingLoss, Eps, Preconditioned, Rng
    from scoresde.data import Arrays, EpochOrder
    from scoresde.nn import UNet
    from scoresde.train.ema import EMA
    from scoresde.train.state import TrainingState
    from scoresde.train.trainer import Trainer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    begin = time.perf_counter()
    dataset = Arrays(path, lazy=workers is not None, test_fraction=0.01)
    dataset.statistics  # noqa: B018
    opened = time.perf_counter() - begin
    loss = DenoisingLoss(Preconditioned(UNet(SHAPE, width=32, multipliers=(1, 2), blocks=1), VPSDE(), Eps()))
    optimizer = torch.optim.AdamW(loss.parameters(), 1e-3, fused=True)
    how: dict[str, Any] = {"workers": workers or 0}
    run = TrainingState(
        loss, optimizer, EMA(loss, half_life=1000), dataset, EpochOrder(len(dataset.train), BATCH, 0), Rng(0), **how
    )
    trainer = Trainer(images=10**9, batch_size=BATCH)
    trainer.step(run)
    pipe.send(opened)
    while pipe.recv():
        begin = time.perf_counter()
        for _ in range(STEPS):
            trainer.step(run)
        pipe.send(time.perf_counter() - begin)
    run.loader.close()
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def measure(path: Path, small: Path, rounds: int) -> tuple[list[list[str]], float]:
    """A row for each way, and the GiB of the file."""
    context, runs = multiprocessing.get_context("spawn"), {}
    for name, workers in WAYS.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=child, args=(str(small if workers is None else path), workers, theirs))
        process.start()
        runs[name] = (process, ours, ours.recv())
        print(f"{name}: opened in {runs[name][2]:.1f} s", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    most = dict.fromkeys(runs, 0.0)
    for k in range(rounds):
        for name in list(runs) if k % 2 else reversed(runs):  # what else the machine does falls on all alike
            process, pipe, _ = runs[name]
            pipe.send(True)
            seconds[name].append(pipe.recv())
            most[name] = max(most[name], private(process.pid or 0))
    rows = []
    for name, (process, pipe, opened) in runs.items():
        ratios = [a / b for a, b in zip(seconds["in memory"], seconds[name], strict=True)]
        low, mid, high = statistics.quantiles(ratios, n=4)
        rate = BATCH * STEPS / statistics.median(seconds[name])
        pipe.send(False)
        peak = pipe.recv()
        process.join()
        speed = f"{100 * mid:.1f} % ({100 * low:.1f} … {100 * high:.1f})"
        rows.append([name, f"{opened:.1f}", f"{rate:.1f}", speed, f"{most[name]:.0f}", f"{peak:.0f}"])
    return rows, path.stat().st_size / (1 << 30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument(
        "--path", type=Path, help="a .npy of uint8 samples (N, 3, 32, 32), which is left; else one is made"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scoresde-large-") as folder:
        path, small = options.path or Path(folder) / "large.npy", Path(folder) / "small.npy"
        if options.path is None:
            make(path, int(options.gigabytes * 1e9 / np.prod(SHAPE)))
        np.save(small, np.load(path, mmap_mode="r")[:KEPT])
        rows, size = measure(path, small, options.rounds)
    head = [
        "samples",
        "opened, s",
        "images/s",
        "speed beside memory (quartiles)",
        "private, MiB",
        "resident at most, MiB",
    ]
    table = report.table([head, *rows])
    text = (
        f"# More than memory holds\n\n`python benchmarks/large.py`: {size:.1f} GiB of 8-bit noise, 3 × 32 × 32, one "
        f"thread, batches of {BATCH}, {options.rounds} turns of {STEPS} steps each. In memory are the first {KEPT:,} "
        "samples alone. \"Opened\" is every check and the digest of all values. Private is what no file stands behind "
        "(`Anonymous` of smaps_rollup), the most that was seen, of all processes of the run; resident, of the run,"
        f" with the pages of libraries.\n\n{table}\n"
    )  # fmt: skip
    target = Path(__file__).resolve().parent / "results" / "large" / "README.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
