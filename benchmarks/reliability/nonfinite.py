"""R7: numbers that are not finite, wherever they come from, change nothing, are named, and end a run in time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from result import Result
from small import CPU, digest, training
from torch import Tensor

from scoresde.losses.denoising import Terms
from scoresde.runs.checkpoint import latest
from scoresde.runs.logger import NullLogger
from scoresde.train.state import TrainingState
from scoresde.train.trainer import Trainer, TrainingDiverged
from scoresde.train.world import Alone, World, join

FIRST, STEPS, LIMIT = 6, 18, 10
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Case:
    """A fault.

    Attributes:
        where: "loss", "gradient" (of one parameter), "output" (in the backward pass at the network's output), "data",
            "norm" (gradients that are finite and whose norm is not).
        value: what appears there.
        row: in how many steps, from step `FIRST` on.
        rank, how: of two processes the one that meets it, and what they are; None for one process.
        accumulate, part: passes per step, and the one that meets it.
        words: what the message says.
    """

    where: str
    words: str
    value: float = NAN
    row: int = 1
    rank: int | None = None
    how: str = "ddp"
    accumulate: int = 1
    part: int = 0

    @property
    def name(self) -> str:
        ranks = "" if self.rank is None else f", rank {self.rank} of 2, {self.how}"
        parts = "" if self.accumulate == 1 else f", pass {self.part + 1} of {self.accumulate}"
        return f"{self.value} in {self.where}{ranks}{parts}, {self.row} in a row"


@dataclass
class Seen:
    """What one process saw: digests and images after each step, rows, the error."""

    digests: list[str] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    rows: list[Mapping[str, float]] = field(default_factory=list)
    blame: str = ""
    error: str = ""
    saved: tuple[int, str] | None = None
    went_on: str = ""


class _Spoil(torch.autograd.Function):
    """Nothing forward, `value` backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: float) -> Tensor:
        ctx.value = value
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        spoiled = grads[0].clone()
        spoiled[0] = ctx.value
        return spoiled, None


def inject(case: Case, run: TrainingState) -> None:
    """Puts the fault where it belongs."""
    calls = 0

    def now() -> bool:
        here = case.rank is None or run.world.rank == case.rank
        return here and FIRST <= run.step + 1 < FIRST + case.row and (calls - 1) % case.accumulate == case.part

    def spoil(gradient: Tensor) -> Tensor:
        spoiled = gradient.clone()
        spoiled.view(-1)[0] = case.value
        return spoiled if now() else gradient

    terms, batch, network = run.terms, run.batch, run.loss.denoiser.network

    def spoiled_terms() -> Terms:
        nonlocal calls
        calls += 1
        found = terms()
        # added, so that no gradient knows
        return (
            Terms(found.objective + case.value, found.loss + case.value, found.t)
            if now() and case.where == "loss"
            else found
        )

    def spoiled_batch() -> tuple[Tensor, Tensor | None]:
        x0, cond = batch()
        if now():
            x0 = x0.clone()
            x0[-1, 0] = case.value
        return x0, cond

    run.terms = spoiled_terms  # type: ignore[method-assign]
    if case.where == "data":
        run.batch = spoiled_batch  # type: ignore[method-assign]
    elif case.where == "output":
        network.register_forward_hook(lambda module, given, made: _Spoil.apply(made, case.value) if now() else made)
    elif case.where == "gradient":
        dict(run.loss.named_parameters())[case.words.removeprefix("the gradient of ")].register_hook(spoil)
    elif case.where == "norm":
        for parameter in run.loss.parameters():
            parameter.register_hook(spoil)


class _Rows(NullLogger):
    def __init__(self, rows: list[Mapping[str, float]]):
        self.rows = rows

    def log(self, values: Mapping[str, float], *, step: int, images: int) -> None:
        self.rows.append({"step": step, **values})


def meet(case: Case, world: World, folder: Path) -> Seen:
    """One process's part of a case."""
    run, seen = training(world, case.how), Seen()
    images = 8 * case.accumulate
    trainer = Trainer(
        images=images * STEPS, batch_size=8, accumulate=case.accumulate, warmup=4 * images, log_every=images,
        snapshot_every=images, checkpoint_every=images * (FIRST - 1), max_bad_steps=LIMIT, keep_last=9,
    )  # fmt: skip
    inject(case, run)

    def look(run: TrainingState) -> None:
        seen.digests.append(digest(run.tensors()))
        seen.images.append(run.images)
        seen.blame = run.tally.averages().blame or seen.blame

    try:
        trainer.fit(run, logger=_Rows(seen.rows), folder=folder, snapshot=look)
    except TrainingDiverged as error:
        seen.error = str(error)
    world.gather(None)
    checkpoint = latest(folder)
    if checkpoint is not None:
        seen.saved = checkpoint.step, digest(checkpoint.tensors)
        again = training(world, case.how)
        again.restore(checkpoint)
        trainer.fit(again)
        seen.went_on = digest(again.tensors())
    return seen


def meet_all(cases: list[Case], scratch: Path) -> list[Seen]:
    """In this process: all cases, one after the other."""
    world = Alone() if cases[0].rank is None else join(CPU, 600)
    found = [meet(case, world, scratch / f"{world.size}-{i}") for i, case in enumerate(cases)]
    world.close()
    return found


def wrong(case: Case, ranks: list[Seen]) -> list[str]:
    """What was not as it should be."""
    seen, found = ranks[0], list[str]()

    def check(holds: bool, text: str) -> None:
        found.extend([] if holds else [text])

    bad = range(FIRST, FIRST + case.row)
    stopped = case.row >= LIMIT
    check(all(other.digests == seen.digests for other in ranks), "ranks differ")
    check(
        all(other.blame == seen.blame and other.error == seen.error for other in ranks), "ranks tell different things"
    )
    # the look comes after the row, so the step whose row stops training is not looked at
    check(len(seen.digests) == (FIRST + LIMIT - 2 if stopped else STEPS), f"{len(seen.digests)} steps")
    for step in range(2, len(seen.digests) + 1):
        changed = seen.digests[step - 1] != seen.digests[step - 2]
        check(changed != (step in bad), f"step {step} {'changed' if changed else 'did not change'} the state")
    rank = "unknown" if case.how == "fsdp" and case.where == "output" else str(case.rank or 0)
    blame = f"step {FIRST}, rank {rank}, first in {case.words}"
    check(seen.blame == blame, f"blamed {seen.blame!r}")
    check(bool(seen.error) == stopped, f"error {seen.error!r}")
    if stopped:
        check(blame in seen.error and "10 steps in a row" in seen.error, f"said {seen.error!r}")
        check(
            seen.saved is not None and seen.saved[1] == seen.digests[FIRST - 2],
            "no whole checkpoint of the last good step",
        )
        check(seen.went_on not in ("", seen.digests[-1]), "did not go on from it")
    else:
        check(seen.rows[-1]["train/skipped"] == case.row, f"counted {seen.rows[-1]['train/skipped']}")
        check(
            all(row["train/loss"] == row["train/loss"] for row in seen.rows if row["step"] not in bad),
            "NaN in other rows",
        )
    return found


def cases(full: bool) -> list[Case]:
    """The fourteen of the list; at full counts with −∞ and ∞ for NaN, and in rows of 1, 3 and 11."""
    first, last = (
        "the gradient of denoiser.network.conditioning.inner.weight",
        "the gradient of denoiser.network.outlet.bias",
    )
    chosen = [
        Case("loss", "the loss"),
        Case("loss", "the loss", INF, 3),
        Case("gradient", last),
        Case("gradient", last, -INF, 3),
        Case("data", first),
        Case("data", first, INF, 11),
        Case("norm", first, 1e25),
        Case("norm", "the norm of the whole gradient", 1.5e19, 11),
        Case("loss", "the loss", accumulate=3, part=1),
        Case("gradient", last, accumulate=3, part=0, row=3),
        Case("loss", "the loss", rank=1),
        Case("gradient", last, rank=1, row=3),
        Case("output", first, rank=1, how="fsdp"),
        Case("loss", "the loss", rank=1, row=11, how="fsdp"),
    ]
    if not full:
        return chosen
    more = [
        Case(case.where, case.words, value, row, case.rank, case.how, case.accumulate, case.part)
        for case in chosen
        for value in ((case.value,) if case.where == "norm" else (NAN, INF, -INF))
        for row in (1, 3, 11)
    ]
    return list(dict.fromkeys([*chosen, *more]))


def campaign(full: bool, scratch: Path) -> list[Result]:
    from together import together

    begin, chosen = time.monotonic(), cases(full)
    alone, paired = ([case for case in chosen if (case.rank is None) is one] for one in (True, False))
    seen: dict[Case, list[Seen]] = {}
    for group, world in ((alone, 1), (paired, 2)):
        ranks = together(meet_all, group, scratch, world=world, limit=600)
        seen |= {case: [rank[i] for rank in ranks] for i, case in enumerate(group)}
    faults = {case.name: found for case in chosen if (found := wrong(case, seen[case]))}
    silent = sum(any("changed the state" in text for text in found) for found in faults.values())
    note = f"{time.monotonic() - begin:.0f} s; bytes changed by a bad step: {'0' if not silent else 'some'}"
    return [
        Result("R7 numbers that are not finite", len(chosen), len(chosen) - len(faults), silent, _told(note, faults))
    ]


def _told(note: str, faults: dict[str, Any]) -> str:
    return "; ".join([note, *(f"{name}: {', '.join(found)}" for name, found in faults.items())])
