"""R17: a checkpoint that is written while training goes on holds one step, and a writer that fails is heard."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from child import EVERY_FILE, Job, build, final, newest, nursery, points
from result import Result

from scoresde.runs.checkpoint import Checkpoint, CheckpointError, latest, load, save
from scoresde.train.saver import Saver
from scoresde.train.state import TrainingState

RECORDS: dict[str, Any] = {"config": {}}


def everything(run: TrainingState) -> Iterator[torch.Tensor]:
    """Weights, averages, moments and sums, in place."""
    for module in (run.loss, *run.ema.shadows.values()):
        yield from (*module.parameters(), *module.buffers())
    for state in run.optimizer.state.values():
        yield from state.values()
    yield run.tally.sums


def fill(run: TrainingState, step: int) -> None:
    """Every number of the run becomes `step`."""
    with torch.no_grad():
        for tensor in everything(run):
            tensor.fill_(step)
    run.step, run.images = step, step


def steps_in(checkpoint: Checkpoint) -> set[float]:
    """The different numbers in a checkpoint of a run that was filled: one, if it is of one step."""
    filled = [value for group in ("weights", "ema", "optimizer") for value in checkpoint.tensors[group].values()]
    numbers = {float(x) for tensor in [*filled, checkpoint.tensors["random"]["stats"]] for x in tensor.unique()}
    return numbers | {float(checkpoint.step), float(checkpoint.records["counters"]["step"])}


def mixed(count: int, scratch: Path) -> Result:
    """Weights, moments and averages change as soon as `save` returns, while the writer is made slow."""
    trainer, run = build(Job(str(scratch)))
    trainer.step(run)  # so that the optimizer has moments
    saver, problems, inside = Saver(), list[str](), 0
    for step in range(1, count + 1):
        fill(run, step)
        saver.start(partial(save, scratch, step, run.tensors(), {**run.records(), **RECORDS}, keep_last=count))
        fill(run, -step)  # at once
        inside += saver._pending is not None and not saver._pending.done()
    saver.close()
    for step in range(1, count + 1):
        found = steps_in(load(scratch / f"step-{step:08d}"))
        if found != {float(step)}:
            problems.append(f"step {step} holds {sorted(found)[:4]}")
    note = f"changed at once after save returned, {inside} of {count} times while it was being written"
    survived = count - len(problems) if inside else 0
    return Result("R17 no checkpoint mixes two steps", count, survived, len(problems), "; ".join(problems[:4]) or note)


def one_after_the_other(scratch: Path) -> list[str]:
    """Two saves without a pause: the second waits, both are whole, and nothing unfinished has a name."""
    trainer, run = build(Job(str(scratch)))
    trainer.step(run)
    saver, seen, rename = Saver(), list[str](), os.rename

    def watched(old: Any, new: Any) -> None:
        if str(old).endswith(".new"):
            seen.append(" ".join(sorted(path.name for path in scratch.glob(".step-*"))))
        rename(old, new)

    # to read the umask is to set it, for every thread, and another one may just then create a file
    untouched = mock.patch("os.umask", side_effect=AssertionError("the umask was changed"))
    with mock.patch("os.rename", watched), untouched:
        for step in (1, 2):
            fill(run, step)
            saver.start(partial(save, scratch, step, run.tensors(), {**run.records(), **RECORDS}))
        saver.close()
    whole = [steps_in(load(scratch / f"step-{step:08d}")) == {float(step)} for step in (1, 2)]
    alone = seen == [".step-00000001.new", ".step-00000002.new"]
    return [] if all(whole) and alone else [f"two saves: {whole}, {seen}"]


def told(scratch: Path, error: BaseException, go_on: bool, how: str) -> list[str]:
    """A writer that raises is heard by `check`, by the next `start`, or when the saver is closed."""
    trainer, run = build(Job(str(scratch)))
    trainer.step(run)
    saver = Saver(go_on=go_on)
    groups, records = run.tensors(), {**run.records(), **RECORDS}
    saver.start(partial(save, scratch, 1, groups, records))
    saver.wait()
    raising = mock.patch("safetensors.torch.save_file", side_effect=error)
    with raising:
        saver.start(partial(save, scratch, 2, groups, records))
        if saver._pending is not None:
            saver._pending.exception()
    calls: dict[str, Callable[[], None]] = {
        "check": saver.check,
        "start": lambda: saver.start(partial(save, scratch, 3, groups, records)),
        "close": saver.close,
    }
    expected = CheckpointError if isinstance(error, OSError) else type(error)
    try:
        calls[how]()
        heard = False
    except expected:
        heard = True
    saver.go_on = False
    saver.close()
    quiet = (
        go_on and isinstance(error, OSError) and how != "close"
    )  # at the end no save follows that could make it good
    last = latest(scratch)
    whole = last is not None and last.step == (3 if quiet and how == "start" else 1)
    return [] if heard == (not quiet) and whole else [f"{error!r}, go_on={go_on}, {how}: heard={heard}, {last}"]


def killed_between(full: bool, scratch: Path) -> tuple[int, list[str]]:
    """SIGKILL after the first save was published and before, or while, the second one is."""
    job = Job(str(scratch / "reference"), 8, 4, trace=str(scratch / "trace"))
    assert nursery().run(job).code == 0
    calls = [(name, n) for name, n, path in points(scratch / "trace") if name in EVERY_FILE]
    published = [i for i, (name, _) in enumerate(calls) if name == "rename"]
    between = calls[published[0] + 1 : published[1] + 1]
    chosen, problems = between if full else between[:: len(between) // 2], []
    for k, (name, n) in enumerate(chosen):
        killed = job.but(folder=str(scratch / f"{k}"), faults=(f"{name}:{n}:SIGKILL",), trace="")
        code, at = nursery().run(killed).code, newest(killed)
        again = nursery().run(killed.but(faults=()))
        if (code, at, again.code) != (-9, 4, 0) or final(killed) != final(job):
            problems.append(f"killed at {name} {n}: {code}, at step {at}, then {again.code}")
    return len(chosen), problems


def campaign(full: bool, scratch: Path) -> list[Result]:
    """Snapshots, order, errors, and kills in between."""
    problems, tried = one_after_the_other(scratch / "two"), 1
    for error in (OSError(errno.ENOSPC, "No space left on device"), MemoryError("no memory")):
        for go_on in (False, True):
            for how in ("check", "start", "close"):
                tried += 1
                problems += told(scratch / f"told-{tried}", error, go_on, how)
    kills, lost = killed_between(full, scratch / "between")
    note = "two without a pause, 12 writers that raise (ENOSPC, MemoryError; stop, warn; heard by check, save, close), "
    problems += lost
    return [
        mixed(50, scratch / "mixed"),
        Result("R17 the writer's errors and order", tried + kills, tried + kills - len(problems), 0,
               "; ".join(problems[:4]) or f"{note}{kills} kills between two saves"),
    ]  # fmt: skip
