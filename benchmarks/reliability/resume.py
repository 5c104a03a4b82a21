"""R1 and R26: a run that was stopped and continued is the run that was not, bit for bit; and checkpoints of before.

Every stop is a SIGTERM at a stated place, every continuation a new process that is built from the same arguments.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from child import HERE, Job, newest, nursery, rows
from result import Result
from torch import Tensor

from scoresde import Rng
from scoresde.runs.checkpoint import (
    FORMAT,
    CheckpointError,
    _digest,
    _fingerprint,
    latest,
    load,
    save,
)
from scoresde.train.trainer import Trainer

ROOT = HERE.parents[1]
STEPS, EVALUATE = 30, 10
# Two passes a step and 12 batches an epoch make 6 steps an epoch. Rows: one a step, and one more after steps 10 and 20.
STOPS = {  # name -> (where SIGTERM comes, step that has to be saved)
    "in an epoch": ("terms:27", 14),
    "at its end": ("terms:35", 18),
    "between the passes of a step": ("terms:32", 16),
    "after an evaluation": ("log:22", 20),
    "at step 1": ("log:1", 1),
    "before the last step": ("terms:57", 29),
}
SETTINGS = tuple(itertools.product((None, "bfloat16"), ("default", "power"), (0.0, 0.2)))


def tensors(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    for group, values in load(checkpoint).tensors.items():
        yield from ((f"{group}/{name}", value) for name, value in values.items())


def differing(a: Path, b: Path) -> tuple[list[str], int, float]:
    """Names of the tensors that are not equal bit for bit, how many there are, and the largest difference."""
    mine, theirs = dict(tensors(a)), dict(tensors(b))
    names, largest = sorted(mine.keys() ^ theirs.keys()), 0.0
    for name in mine.keys() & theirs.keys():
        if not torch.equal(mine[name], theirs[name]):
            names.append(name)
            largest = max(largest, float((mine[name].double() - theirs[name].double()).abs().max()))
    return names, len(mine), largest


def matrix(full: bool, scratch: Path) -> list[Result]:
    """6 places x {float32, bfloat16 autocast} x {EMA with VP, PowerEMA with VE} x {MLP, U-Net with dropout}."""
    problems, tried, compared, largest, controls = list[str](), 0, 0, 0.0, list[tuple[int, int]]()
    silent = 0
    for index, (autocast, ema, dropout) in enumerate(SETTINGS):
        if not full and index not in (3, 4):
            continue
        base = Job(
            str(scratch / f"{index}" / "whole"), STEPS, 10, EVALUATE, "unet" if dropout else "mlp",
            "ve" if ema == "power" else "vp", autocast, ema, dropout, accumulate=2,
        )  # fmt: skip
        whole = nursery().run(base)
        assert whole.code == 0, whole.text
        end = base.checkpoints / f"step-{STEPS:08d}"
        for k, (name, (point, step)) in enumerate(STOPS.items()):
            if not full and k % 2 != index % 2:
                continue
            tried += 1
            job = base.but(folder=str(scratch / f"{index}" / f"{k}"), faults=(f"{point}:SIGTERM",))
            stopped = nursery().run(job)
            saved = newest(job)
            ended = nursery().run(job.but(faults=()))
            names, count, difference = (
                differing(end, job.checkpoints / end.name) if ended.code == 0 else (["all"], 0, 1)
            )
            compared, largest = compared + count, max(largest, difference)
            records = ended.code == 0 and load(end).records == load(job.checkpoints / end.name).records
            same = not names and records and rows(job) == rows(base)
            if (stopped.code, saved, ended.code, same) != (143, step, 0, True):
                silent += ended.code == 0 and not same
                problems.append(
                    f"{name}, {base.autocast}, {ema}, dropout {dropout}: {stopped.code} at {saved}, {names}"
                )
            if step == STEPS - 1:  # the comparison must tell these two apart
                names, count, _ = differing(end, job.checkpoints / f"step-{step:08d}")
                controls.append((len(names), count))
    unlike, of = (sum(column) for column in zip(*controls, strict=True))
    survived = tried - len(problems) if unlike > of / 2 else 0
    note = (
        f"{compared:,} tensors and every row compared, largest difference {largest:g}; control: steps {STEPS - 1} and "
        f"{STEPS} differ in {unlike:,} of {of:,} tensors{': ' if problems else ''}{'; '.join(problems[:4])}"
    )
    return [Result("R1 resume, bit for bit", tried, survived, silent, note)]


class Before(Rng):
    """Numbers as they were drawn before they were counted: from one `torch.Generator`."""

    def __init__(self, seed: int):
        super().__init__(seed)
        high, low = divmod(seed, 2**32)
        folded = low ^ int.from_bytes(hashlib.sha256(high.to_bytes(4, "big")).digest()[:4], "big") if high else low
        self.generator = torch.Generator().manual_seed(folded)

    def normal(self, shape, *, dtype=None, device=None):
        return torch.randn(tuple(shape), generator=self.generator, dtype=dtype)

    def uniform(self, shape, *, dtype=None, device=None):
        return torch.rand(tuple(shape), generator=self.generator, dtype=dtype)

    def permutation(self, n):
        return torch.randperm(n, generator=self.generator)


def earlier_format() -> Result:
    """tests/data/format-0 and the ten losses that followed it when it was written, with the numbers of that time.

    The tolerance is 1e-5 of a loss: float32 sums of 8 samples in an order that another build of torch may choose, 6e-8
    each, grown by ten optimizer steps. A wrong moment, time or noise changes a loss by more than 1e-2.
    """
    sys.path[:0] = [path for path in (str(ROOT / "tests"),) if path not in sys.path]
    from tiny_training import Rows, training

    expected = json.loads((ROOT / "tests" / "data" / "format-0.json").read_text(encoding="utf-8"))
    saved, run, kept = latest(ROOT / "tests" / "data" / "format-0"), training(seed=5), Rows()
    assert saved is not None and saved.step == 10
    with mock.patch("scoresde.data.order.Rng", Before):
        run.restore(saved)
        run.rng = noise = Before(5)
        noise.generator.set_state(saved.tensors["random"]["noise"][0].clone())
        Trainer(images=240, batch_size=8, warmup=50, log_every=8).fit(run, logger=kept)
    found = kept.of("train/loss")[: len(expected)]
    # ten steps before it were counted and not logged, so the first row is the mean of eleven
    found[0] = 11 * found[0] - float(saved.tensors["random"]["stats"][0])
    worst = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
    survived = int(worst < 1e-5)
    return Result(
        "R26 a checkpoint of format 0", 1, survived, 1 - survived, f"its next ten losses differ by {worst:.1e}"
    )


def rewritten(path: Path, **changes: Any) -> None:
    """Changes entries of a manifest, as a version that knows them would have written it."""
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8")) | changes
    manifest["files"] = {p.name: _fingerprint(p) for p in sorted(path.iterdir()) if p.name != "manifest.json"}
    manifest["sha256"] = _digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def other_versions(scratch: Path) -> list[Result]:
    """Formats of the future, and keys that this version does not know."""
    job = Job(str(scratch / "run"), 8, 4)
    assert nursery().run(job).code == 0
    path = job.checkpoints / "step-00000008"
    whole = load(path)

    def extended(group: str, key: str) -> dict[str, dict[str, Tensor]]:
        return {**whole.tensors, group: {**whole.tensors.get(group, {}), key: torch.zeros(3)}}

    counters = {**whole.records["counters"], "tomorrow": 1}
    cases: dict[str, tuple[Any, Any, str]] = {
        "an entry of the manifest": (whole.tensors, whole.records, "ignored"),
        "a record": (whole.tensors, {**whole.records, "tomorrow": 1}, "ignored"),
        "a counter": (whole.tensors, {**whole.records, "counters": counters}, "ignored"),
        "a group of tensors": (extended("tomorrow", "x"), whole.records, "ignored"),
        "a generator": (extended("random", "tomorrow"), whole.records, "ignored"),
        "a weight": (extended("weights", "tomorrow.x"), whole.records, "refused"),
        "a moment": (extended("optimizer", "tomorrow/exp_avg"), whole.records, "refused"),
    }
    told = {}
    for k, (name, (groups, records, _)) in enumerate(cases.items()):
        longer = job.but(folder=str(scratch / f"unknown-{k}"), steps=10)
        rewritten(save(longer.checkpoints, 8, groups, records), **({"tomorrow": 1} if k == 0 else {}))
        ended = nursery().run(longer)
        refused = ended.code == 1 and "does not fit this run" in ended.text and "tomorrow" in ended.text
        told[name] = (
            "ignored" if ended.code == 0 and newest(longer) == 10 else "refused" if refused else ended.text[-300:]
        )
    right = sum(told[name] == expected for name, (_, _, expected) in cases.items())
    by = {what: ", ".join(name for name, was in told.items() if was == what) for what in sorted(set(told.values()))}
    unknown = Result("R26 keys of the future", len(cases), right, 0, "; ".join(f"{k}: {v}" for k, v in by.items()))

    rewritten(path, format=FORMAT + 1)
    before, error = path.stat().st_mtime_ns, refusal(lambda: load(path))
    both = f"format {FORMAT + 1}" in error and f"up to {FORMAT}" in error
    # a run that has one is not continued from an older one: that would write over what the newer version did
    ended = nursery().run(job.but(steps=10))
    stopped = ended.code == 1 and error in ended.text and before == path.stat().st_mtime_ns
    future = Result("R26 a format of the future", 2, both + stopped, int(not error) + int(ended.code == 0),
                    f"load, resume: {error.partition(path.name)[2].strip()}")  # fmt: skip
    return [unknown, future]


def refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except CheckpointError as error:
        return str(error)
    return ""


def campaign(full: bool, scratch: Path) -> list[Result]:
    """The matrix of stops; formats of the past and of the future."""
    return [*matrix(full, scratch / "matrix"), earlier_format(), *other_versions(scratch / "versions")]
