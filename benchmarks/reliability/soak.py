"""R31: a long run grows by nothing: memory, open files, threads, files that were meant to go; and one large checkpoint.

What may grow is derived from what a leak would cost. One checkpoint of the subject is 0.2 MB: kept once a save, it
would be 100 MB after 500 saves (20 MB in the short form). A row kept once a step is 1 kB, and 50 MB after 50,000. The
allowance of 8 MB between the second tenth of the run and the last is above what malloc's arenas wander (2 MB), and
below either.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from child import HERE, Job
from result import Result

ALLOWANCE = 8 << 20


def state(folder: Path) -> dict[str, float]:
    """What this process holds, in bytes and numbers."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return {
        "rss": pages * resource.getpagesize(),
        "fds": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "files": sum(len(files) for _, _, files in os.walk(folder)),
        "time": time.monotonic(),
    }


def inside(job: Job, every: int) -> dict[str, Any]:
    """Runs `job`, looking at the process every so many steps and at the length of each save."""
    from child import build

    from scoresde.evaluate.evaluation import held_out_loss
    from scoresde.runs import lock
    from scoresde.runs.logger import JsonlLogger, RunFacts
    from scoresde.train import trainer as training
    from scoresde.train.signals import Signals

    looks, saves, write = list[dict[str, float]](), list[float](), training.save

    def timed(*args: Any, **options: Any) -> Path:
        start = time.perf_counter()
        try:
            return write(*args, **options)
        finally:
            saves.append(time.perf_counter() - start)

    class Looking(JsonlLogger):
        def log(self, values: Any, *, step: int, images: int) -> None:
            super().log(values, step=step, images=images)
            if step % every == 0 and "train/loss" in values:
                looks.append(state(Path(job.folder)))

    training.save = timed
    trainer, run = build(job)
    logger = Looking()
    with Signals() as signals, lock.hold(Path(job.folder)):
        logger.start(RunFacts(Path(job.folder), "soak", {}))
        trainer.fit(
            run, logger=logger, folder=job.checkpoints, signals=signals,
            evaluate=lambda run: {"eval/loss": held_out_loss(run.average, run.dataset)},
        )  # fmt: skip
        logger.close()
    return {"looks": looks, "saves": saves, "rows": sum(1 for _ in open(Path(job.folder) / "metrics.jsonl", "rb"))}


def large(folder: Path) -> dict[str, float]:
    """500 MB saved and loaded once."""
    import torch

    from scoresde.runs.checkpoint import load, save

    tensors = {"weights": {f"{k}": torch.full((1 << 20,), float(k)) for k in range(125)}}
    start = time.monotonic()
    path = save(folder, 1, tensors, {})
    saved = time.monotonic()
    found = load(path).tensors["weights"]
    same = all(torch.equal(found[name], value) for name, value in tensors["weights"].items())
    return {"same": same, "save": saved - start, "load": time.monotonic() - saved,
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}  # fmt: skip


def elsewhere(*arguments: str) -> Any:
    """What this file prints as a process of its own: its memory is then nobody else's."""
    done = subprocess.run([sys.executable, HERE / "soak.py", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def campaign(full: bool, scratch: Path) -> list[Result]:
    """The long run, and in the full form the large checkpoint."""
    steps, every, evaluate = (50_000, 100, 500) if full else (2_000, 20, 100)
    found = elsewhere("run", str(scratch / "run"), str(steps), str(every), str(evaluate))
    looks, saves = found["looks"], sorted(found["saves"])
    tenth = len(looks) // 10
    early, late = looks[tenth : 2 * tenth], looks[-tenth:]
    growth = {key: max(x[key] for x in late) - max(x[key] for x in early) for key in ("rss", "fds", "threads", "files")}
    # a save may be under way at a look: its thread, the file that it writes or, while it deletes, a folder that is open
    # twice, and a checkpoint's files in two folders; what leaks is there once a save
    kept = {"rss": ALLOWANCE, "fds": 2, "threads": 1, "files": 2 * len(list((scratch / "run").glob("checkpoints/*/*")))}
    grown = [f"{key} by {value:,.0f}" for key, value in growth.items() if value > kept[key]]
    left = [str(path) for path in (scratch / "run").rglob(".*")]
    whole = found["rows"] == 1 + steps + steps // evaluate and len(saves) == steps // every
    seconds = [b["time"] - a["time"] for a, b in itertools.pairwise(looks)]
    ratio = statistics.median(seconds[-tenth:]) / statistics.median(seconds[:tenth])
    note = (
        f"{steps:,} steps, {len(saves)} saves; memory {growth['rss'] / 2**20:+.1f} MiB, open files "
        f"{growth['fds']:+.0f}, threads {growth['threads']:+.0f}, temporary files {len(left)}; a step of the last "
        f"tenth takes {ratio:.2f} of one of the first; save {1e3 * statistics.median(saves):.0f} ms "
        f"(p99 {1e3 * saves[int(0.99 * len(saves))]:.0f})"
        f"{'; grown: ' if grown else ''}{', '.join(grown)}"
    )
    results = [Result("R31 a long run", 1, int(not grown and not left and whole), 0, note)]
    if full:
        big = elsewhere("large", str(scratch / "large"))
        note = f"saved in {big['save']:.1f} s, loaded in {big['load']:.1f} s, {big['peak'] / 2**30:.1f} GiB of memory"
        results.append(Result("R31 a checkpoint of 500 MB", 1, int(big["same"]), int(not big["same"]), note))
    return results


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    what, folder, *numbers = sys.argv[1:]
    if what == "large":
        print(json.dumps(large(Path(folder))))
    else:
        steps, every, evaluate = map(int, numbers)
        print(json.dumps(inside(Job(folder, steps, every, evaluate), steps // 100)))
