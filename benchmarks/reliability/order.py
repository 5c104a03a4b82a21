"""R22: wherever an epoch is interrupted, what came before and what comes after are one permutation."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

from result import Result
from small import CPU, training
from torch import Tensor

from scoresde.data import EpochOrder
from scoresde.runs.checkpoint import latest
from scoresde.train.trainer import Trainer
from scoresde.train.world import Alone, World, join

SAMPLES, BATCH, EPOCHS = 23, 4, 3


class Case(NamedTuple):
    """Interrupted after `step` steps of `accumulate` passes, by `before` processes, continued by `after`."""

    drop_last: bool
    step: int
    accumulate: int = 1
    before: int = 1
    after: int = 1


class Watched(EpochOrder):
    """Remembers what it gave, by epoch."""

    seen: list[tuple[int, list[int]]]

    def next(self) -> Tensor:
        batch = super().next()
        self.seen.append((self.epoch, batch.tolist()))
        return batch


def visit(case: Case, world: World, part: int, folder: Path) -> list[tuple[int, list[int]]]:
    """(epoch, this process's own indices) of the passes before the interruption (part 0) or after it (1)."""
    run = training(world, samples=SAMPLES, batch=BATCH, drop_last=case.drop_last)
    # of another seed, so that only what is restored can be right
    run.order = run.loader.order = Watched(SAMPLES, BATCH, 0, case.drop_last)
    run.order.seen = []
    images, steps = BATCH * case.accumulate, EPOCHS * (SAMPLES // BATCH + (not case.drop_last)) // case.accumulate
    if part and (checkpoint := latest(folder)) is not None:
        run.restore(checkpoint)
    end = steps if part else case.step
    trainer = Trainer(images=images * end, batch_size=BATCH, accumulate=case.accumulate, log_every=0)
    trainer.fit(run, folder=folder)
    own = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
    return [(epoch, indices[own]) for epoch, indices in run.order.seen]


def visit_all(cases: list[Case], part: int, scratch: Path) -> list[list[tuple[int, list[int]]]]:
    """The cases whose `part` is this number of processes' business."""
    paired = cases[0][3 + part] == 2
    world = join(CPU, 600) if paired else Alone()
    found = []
    for case in cases:
        found.append(visit(case, world, part, scratch / "-".join(map(str, case))))
        world.gather(None)
    world.close()
    return found


def wrong(case: Case, passes: list[tuple[int, list[int]]]) -> list[str]:
    """Duplicates and gaps of a run from its beginning to its end."""
    found, length = [], SAMPLES // BATCH * BATCH if case.drop_last else SAMPLES
    given = EpochOrder(SAMPLES, BATCH, 0, case.drop_last)
    if [indices for _, indices in passes] != [given.next().tolist() for _ in passes]:
        found.append("another order")
    whole = max(epoch for epoch, _ in passes)
    for epoch in range(whole):
        indices = [i for e, batch in passes if e == epoch for i in batch]
        if len(set(indices)) < len(indices):
            found.append(f"duplicates in epoch {epoch}")
        if len(indices) != length:
            found.append(f"{len(indices)} of {length} in epoch {epoch}")
    return found


def cases(full: bool) -> list[Case]:
    """Every step of the first epoch that has one after it; then two passes a step, and other numbers of processes."""
    plain = [Case(drop, step) for drop in (False, True) for step in range(1, SAMPLES // BATCH + 1 + (not drop))]
    parts = [Case(drop, step, 2) for drop in (False, True) for step in range(1, 4)]
    ranks = [Case(True, step, 1, *change) for change in ((1, 2), (2, 1)) for step in range(1, 6)]
    return [*plain, *parts, *ranks] if full else [*plain, *parts[::2], *ranks[1::3]]


def campaign(full: bool, scratch: Path) -> list[Result]:
    from together import together

    begin, chosen = time.monotonic(), cases(full)
    seen: dict[Case, list[tuple[int, list[int]]]] = {case: [] for case in chosen}
    for part in (0, 1):
        for world in (1, 2):
            group = [case for case in chosen if case[3 + part] == world]
            ranks = together(visit_all, group, part, scratch, world=world, limit=600)
            for i, case in enumerate(group):
                for passes in zip(*(rank[i] for rank in ranks), strict=True):
                    seen[case].append((passes[0][0], [index for _, indices in passes for index in indices]))
    faults = {case: found for case, passes in seen.items() if (found := wrong(case, passes))}
    note = f"duplicates and gaps: {sum(map(len, faults.values()))}; {time.monotonic() - begin:.0f} s"
    told = "; ".join([note, *(f"{case}: {', '.join(found)}" for case, found in faults.items())])
    # whatever is wrong here would be noticed by nobody
    return [Result("R22 order of the data", len(chosen), len(chosen) - len(faults), len(faults), told)]
