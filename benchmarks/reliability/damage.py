"""R6: checkpoints that were cut, flipped, swapped or lost after they were written: none is loaded as if whole."""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from child import Job, final, nursery
from result import Result

from scoresde.runs.checkpoint import Checkpoint, latest, load

STEPS, EVERY = 24, 4
PREVIOUS = STEPS - EVERY


class Warnings(logging.Handler):
    """Keeps the warnings of scoresde."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())

    @contextlib.contextmanager
    def listening(self) -> Iterator[list[str]]:
        log = logging.getLogger("scoresde")
        log.addHandler(self)
        log.propagate, propagate = False, log.propagate
        try:
            yield self.told
        finally:
            log.removeHandler(self)
            log.propagate = propagate


@dataclass
class Trials:
    """Damages the newest checkpoint of `folder` in one file at a time, and puts it back."""

    folder: Path
    whole: Checkpoint
    tried: int = 0
    equal: int = 0  # damage that leaves what the file says as it was
    silent: int = 0
    problems: list[str] = field(default_factory=list)

    def damage(self, path: Path, content: bytes | None, what: str) -> None:
        """One file replaced by `content`, or removed: the previous checkpoint is taken, with one warning of it."""
        before = path.read_bytes()
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        with Warnings().listening() as told:
            found = latest(self.folder)
        path.write_bytes(before)
        self.tried += 1
        if found is not None and found.step == STEPS:
            same = identical(found, self.whole)
            self.equal += same
            self.silent += not same
            if not same:
                self.problems.append(f"{path.name} {what}: loaded")
        elif found is None or found.step != PREVIOUS or len(told) != 1 or path.name not in told[0]:
            self.problems.append(f"{path.name} {what}: {found and found.step}, {told}")


def identical(a: Checkpoint, b: Checkpoint) -> bool:
    return a.records == b.records and all(
        torch.equal(a.tensors[group][name], value)
        for group, values in b.tensors.items()
        for name, value in values.items()
    )


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def files(full: bool, scratch: Path) -> list[Result]:
    """Cuts, flips, files of another step, and files that are gone."""
    job = Job(str(scratch / "run"), STEPS, EVERY, EVERY, trainer={"keep_last": 2})
    assert nursery().run(job).code == 0
    newest, older = job.checkpoints / f"step-{STEPS:08d}", job.checkpoints / f"step-{PREVIOUS:08d}"
    paths = sorted(newest.iterdir())
    content = {path: path.read_bytes() for path in paths}
    draw, trials = random.Random(0), Trials(job.checkpoints, load(newest))
    for path, k in itertools.product(paths, range(8) if full else (0, 7)):
        size = len(content[path])
        length = (0, 1, size - 1)[k - 5] if k > 4 else size * (k + 1) // 7
        trials.damage(path, content[path][:length], f"cut to {length} of {size} bytes")
    cuts = trials.tried
    for path, _ in itertools.product(paths, range(125 if full else 10)):
        bit = draw.randrange(8 * len(content[path]))
        trials.damage(path, flipped(content[path], bit), f"bit {bit}")
    flips = trials.tried - cuts
    manifest = newest / "manifest.json"
    for bit in range(0, 8 * len(content[manifest]), 1 if full else 89):
        trials.damage(manifest, flipped(content[manifest], bit), f"bit {bit}")
    every = trials.tried - cuts - flips
    for path in paths:
        other = (older / path.name).read_bytes()
        if other != content[path]:
            trials.damage(path, other, "of another step")
        trials.damage(path, None, "gone")
    note = (
        f"{cuts} cuts, {flips:,} random flips, {every:,} flips of the manifest, "
        f"{trials.tried - cuts - flips - every} files swapped or gone; {trials.equal} left the content equal"
        f"{': ' if trials.problems else ''}{'; '.join(trials.problems[:5])}"
    )
    return [Result("R6 damaged files", trials.tried, trials.tried - len(trials.problems), trials.silent, note)]


# Without the view and the measurements at the end: what is tested is the start.
COMMAND = (
    "data=8gaussians", "data.train=256", "data.test=32", "network=mlp", "network.width=8", "network.depth=1",
    "trainer.images=640", "trainer.batch_size=64", "trainer.warmup=0", "trainer.evaluate_every=0",
    "trainer.checkpoint_every=192", "evaluate_at_end=false", "evaluation.pictures=false", "logger=jsonl", "threads=1",
    "device=cpu",
)  # fmt: skip


def command(scratch: Path) -> Result:
    """scoresde-train resume=auto: goes on from the checkpoint before with one warning; ends if none is whole."""
    job = Job(str(scratch / "run"), 10, command=(*COMMAND, "resume=auto"))
    first = nursery().run(job)
    assert first.code == 0, first.text
    expected, problems = final(job), []
    victim = job.checkpoints / "step-00000010" / "weights.safetensors"
    victim.write_bytes(flipped(victim.read_bytes(), 12_345))
    second = nursery().run(job)
    warnings = [line for line in second.text.splitlines() if "Damaged" in line]
    if second.code or final(job) != expected or len(warnings) != 1 or str(victim) not in warnings[0]:
        problems.append(f"one damaged: {second.code}, {warnings}")
    for path in job.checkpoints.glob("step-*/weights.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    before = {path: path.read_bytes() for path in Path(job.folder).rglob("*.json*")}
    third = nursery().run(job)
    same = before == {path: path.read_bytes() for path in Path(job.folder).rglob("*.json*")}
    if third.code == 0 or "No checkpoint in" not in third.text or not same:
        problems.append(f"all damaged: {third.code}, {third.text[-300:]}, untouched={same}")
    shutil.rmtree(job.folder)
    told = third.text.strip().splitlines()[-1].replace(str(scratch), "…")
    note = "; ".join(problems) or f"one damaged: same end; all damaged: exit {third.code}, {told}"
    return Result("R6 the command", 2, 2 - len(problems), int(third.code == 0), note)


def campaign(full: bool, scratch: Path) -> list[Result]:
    """Every kind of damage to every file, and what the command makes of it."""
    return [*files(full, scratch / "files"), command(scratch / "command")]
