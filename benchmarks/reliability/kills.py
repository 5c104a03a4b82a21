"""R2 and R16: SIGKILL at every call of a save that reaches the disk, and at random times; and deletions that fail.

After each kill the same command is started again and has to end with the checkpoint and the rows of a run that was
never killed. All the while an observer looks for a whole checkpoint.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from child import EVERY_FILE, Ended, Job, final, newest, nursery, points, rows
from result import Result

POLICIES = (
    {"keep_last": 1}, {"keep_last": 2}, {"keep_last": 3}, {"keep_last": 1, "keep_best": 1},
    {"keep_last": 2, "background": False},
)  # fmt: skip
STEPS, EVERY = 24, 4


class Observer:
    """Looks whether `folder` holds a whole checkpoint, from the first one on."""

    def __init__(self, folder: Path):
        self.folder, self.looks, self.missed, self.begun = folder, 0, 0, False

    def __call__(self) -> None:
        listed, before, found = self._listed(), None, False
        # one that was deleted between listing and reading is no miss: the next listing has its successor
        while not found and listed != before:
            found = any(map(whole, listed))
            listed, before = self._listed(), listed
        self.begun |= found
        self.looks += self.begun
        self.missed += self.begun and not found

    def _listed(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), reverse=True)


def whole(path: Path) -> bool:
    """Whether every file of the manifest is there, with its size."""
    try:
        files = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["files"]
        return all((path / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (OSError, ValueError):
        return False


class Killed:
    """Runs that were killed and started again, counted.

    Args:
        reference: the same run, never killed.
    """

    def __init__(self, reference: Job, observer: Observer):
        self.reference, self.expected, self.rows = reference, final(reference), rows(reference)
        self.observer, self.problems = observer, list[str]()
        self.lost, self.seconds, self.tried, self.silent = list[int](), list[float](), 0, 0

    def restart(self, job: Job, what: str, killed: Ended) -> None:
        """Starts a killed run again, once, and compares."""
        self.tried += 1
        before = rows(job)[-1:] if (Path(job.folder) / "metrics.jsonl").exists() else []
        self.lost.append((before[0]["step"] if before else 0) - newest(job))
        ended = nursery().run(job.but(faults=()), watch=self.observer)
        self.seconds.append(ended.seconds)
        same = final(job) == self.expected and rows(job) == self.rows
        left = [path.name for path in job.checkpoints.iterdir() if path.name.startswith(".")]
        if killed.code not in (-9, 0) or ended.code or "Damaged" in ended.text or left or not same:
            self.problems.append(f"{what}: {killed.code}, then {ended.code}, same={same}, left {left}")
            self.silent += ended.code == 0 and not same
        else:
            shutil.rmtree(job.folder)


def saving_points(trace: Path, which: int) -> Iterator[tuple[str, int]]:
    """The calls of the save number `which`, from 0, with its deletions, up to the next one."""
    # the writer makes the folder, if it is not there, before it makes its own in it
    calls = [(name, n, path) for name, n, path in points(trace) if name in EVERY_FILE]
    starts = [i for i, (name, _, path) in enumerate(calls) if name == "mkdir" and path.endswith("checkpoints")]
    yield from ((name, n) for name, n, _ in calls[starts[which] : [*starts, None][which + 1]])


def enumerated(policy: dict[str, Any], full: bool, scratch: Path) -> tuple[Killed, int]:
    """Kills at every call of a save that deletes; for the first policy also of the first save and of the last."""
    evaluate = EVERY if policy.get("keep_best") else 0
    reference = Job(str(scratch / "reference"), STEPS, EVERY, evaluate, trainer=policy, trace=str(scratch / "trace"))
    assert nursery().run(reference).code == 0
    specs = [
        f"{name}:{n}:{action}"
        for save in ((0, 3, STEPS // EVERY - 1) if policy == POLICIES[0] else (3,))
        for name, n in saving_points(scratch / "trace", save)
        for action in (("SIGKILL", "half") if name in ("save_file", "open") else ("SIGKILL",))
    ]
    chosen = specs if full else random.Random(0).sample(specs, 2)
    observer = Observer(Path())
    killed = Killed(reference.but(trace=""), observer)
    for k, spec in enumerate(chosen):
        job = reference.but(folder=str(scratch / f"kill-{k}"), faults=(spec,), trace="")
        observer.folder, observer.begun = job.checkpoints, False
        killed.restart(job, f"{policy} {spec}", nursery().run(job, watch=observer))
    return killed, len(specs)


def at_random(count: int, scratch: Path, workers: int | None = None) -> Killed:
    """Kills at times drawn evenly from the whole run; with workers the samples lie in a file."""
    # with workers longer, or most kills would come while they start
    reference = Job(str(scratch / "reference"), STEPS if workers is None else 8 * STEPS, EVERY, workers=workers)
    seconds = nursery().run(reference).seconds
    if workers is not None:  # of all runs the bits are those from memory
        reference = reference.but(folder=str(scratch / "memory"), workers=None)
        assert nursery().run(reference).code == 0
        assert final(reference) == final(reference.but(folder=str(scratch / "reference")))
    observer = Observer(Path())
    killed, draw = Killed(reference, observer), random.Random(1)
    for k in range(count):
        job = reference.but(folder=str(scratch / f"kill-{k}"), trainer={"keep_last": 1 + k % 3}, workers=workers)
        observer.folder, observer.begun = job.checkpoints, False
        after = draw.uniform(0, seconds)
        killed.restart(job, f"after {after:.3f} s", nursery().run(job, watch=observer, kill_after=after))
    return killed


def undeletable(full: bool, scratch: Path) -> Result:
    """Deletions that are refused: logged, and the next save deletes what it can."""
    reference = Job(str(scratch / "reference"), STEPS, EVERY, trainer={"keep_last": 1}, trace=str(scratch / "trace"))
    assert nursery().run(reference).code == 0
    hidden = [n for name, n, path in points(scratch / "trace") if name == "rename" and not path.endswith(".new")]
    once = [f"rename:{hidden[0]}:EACCES", "rmtree:1:EACCES", "unlink:3:EACCES", "rmdir:1:EACCES"]
    specs = [*once, "unlink:1-9999:EACCES"] if full else [once[0], "unlink:1-9999:EACCES"]
    problems = []
    for k, spec in enumerate(specs):
        job = reference.but(folder=str(scratch / f"refused-{k}"), faults=(spec,), trace="")
        ended = nursery().run(job)
        listed = sorted(path.name for path in job.checkpoints.iterdir())
        kept = [name for name in listed if not name.startswith(".") or spec in once]
        logged = re.search(r"An old checkpoint, \S+, could not be deleted: .*Permission denied", ended.text)
        if ended.code or not logged or final(job) != final(reference) or kept != [f"step-{STEPS:08d}"]:
            problems.append(f"{spec}: {ended.code}, {listed}")
    note = "; ".join(problems) or "each is logged, none stops the run, and a later save deletes what was left"
    return Result("R16 deletions that are refused (EACCES)", len(specs), len(specs) - len(problems), 0, note)


def line(name: str, all_killed: list[Killed], extra: str) -> Result:
    tried, problems = sum(k.tried for k in all_killed), [p for k in all_killed for p in k.problems]
    waiting = [lost for k in all_killed if k.reference.trainer.get("background") is False for lost in k.lost]
    lost = [lost for k in all_killed for lost in k.lost]
    looks, missed = sum(k.observer.looks for k in all_killed), sum(k.observer.missed for k in all_killed)
    seconds = [s for k in all_killed for s in k.seconds]
    # a save that goes on in the background is waited for by the next one, so at most two intervals are at stake
    bounded = max(lost) <= 2 * EVERY and max(waiting, default=0) <= EVERY
    note = (
        f"{extra}; steps lost at most {max(lost)} of an interval of {EVERY}"
        f"{f' ({max(waiting)} without the background writer)' if waiting else ''}, median {statistics.median(lost):g}; "
        f"restart {statistics.median(seconds):.2f} s (max {max(seconds):.2f}); no whole checkpoint at {missed} of "
        f"{looks:,} looks{': ' if problems else ''}{'; '.join(problems[:5])}"
    )
    survived = tried - len(problems) if bounded and not missed else 0
    return Result(name, tried, survived, sum(k.silent for k in all_killed), note)


def campaign(full: bool, scratch: Path) -> list[Result]:
    """Kills at points, kills at random times, and deletions that fail."""
    by_point, count = [], 0
    for k, policy in enumerate(POLICIES):
        folder = scratch / f"points-{k}"
        killed, of = enumerated(policy, full, folder)
        by_point.append(killed)
        count += of
    policies = "keep_last 1, 2, 3, keep_best, and in the foreground"
    return [
        line("R2 SIGKILL at each call of a save", by_point, f"{count} points: {policies}"),
        line("R2 SIGKILL at random times", [at_random(200 if full else 4, scratch / "random")], "keep_last 1, 2, 3"),
        line(
            "R2 SIGKILL at random times, four workers", [at_random(24 if full else 1, scratch / "workers", 4)], "a file"
        ),
        undeletable(full, scratch / "refused"),
    ]
