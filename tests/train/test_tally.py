"""What is counted on the device against the same counted by hand, and which step, rank and parameter are blamed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from together import together
from torch import Tensor

from scoresde import VPSDE, RectifiedFlow
from scoresde.losses.loss import Terms
from scoresde.train.tally import BINS, Tally
from scoresde.train.world import World, join

CPU, NAMES = torch.device("cpu"), ["stem.weight", "stem.bias", "head.weight"]
NAN, INF = float("nan"), float("inf")


def terms(loss: Sequence[float], t: Sequence[float]) -> Terms:
    values = torch.tensor(loss, dtype=torch.float32)
    return Terms(values, values, torch.tensor(t, dtype=torch.float64))


def judge(tally: Tally, norms: Sequence[float], step: int, blame: bool = True) -> tuple[bool, float]:
    keep, norm = tally.judge(torch.tensor(norms, dtype=torch.float32), torch.tensor(blame), step)
    return bool(keep), float(norm)


def test_means_over_the_steps_that_were_kept() -> None:
    """Two steps of two passes, one of them bad: by hand, exact in binary."""
    tally = Tally(CPU, RectifiedFlow(), NAMES)
    tally.add(terms([1, 2], [0.1, 0.9]), 0.5)
    tally.add(terms([3, 6], [0.3, 0.95]), 0.5)
    assert judge(tally, [3, 4, 12], 1) == (True, 13)
    tally.add(terms([100, NAN], [0.1, 0.6]), 0.5)
    tally.add(terms([100, 100], [0.1, 0.6]), 0.5)
    assert judge(tally, [3, 4, 12], 2)[0] is False
    tally.add(terms([5, 5], [0.1, 0.2]), 0.5)
    tally.add(terms([7, 7], [0.1, 0.2]), 0.5)
    assert judge(tally, [0, 0, 1], 3) == (True, 1)
    found = tally.averages()
    assert (found.loss, found.grad_norm) == ((3 + 6) / 2, (13 + 1) / 2)
    assert found.by_time[:2] == ((1 + 5 + 5 + 7 + 7) / 5, 3) and math.isnan(found.by_time[2]) and found.by_time[3] == 4
    assert (found.skipped, found.streak) == (1, 0) and found.blame == "step 2, rank 0, first in the loss"


def test_quarters_are_of_the_sdes_own_times() -> None:
    """t_min and t_max belong to the first and the last."""
    sde = VPSDE()
    ends = torch.linspace(sde.t_min, sde.t_max, BINS + 1, dtype=torch.float64)
    tally, middles = Tally(CPU, sde, NAMES), ((ends[1:] + ends[:-1]) / 2).tolist()
    times = [sde.t_min, *middles, sde.t_max]
    tally.add(terms([10, 0, 1, 2, 3, 20], times), 1.0)
    judge(tally, [1, 1, 1], 1)
    assert tally.averages().by_time == (5, 1, 2, 11.5)


def test_a_look_forgets_the_means_and_keeps_what_was_skipped() -> None:
    tally = Tally(CPU, RectifiedFlow(), NAMES)
    for step, loss in enumerate([1.0, NAN, INF], 1):
        tally.add(terms([loss], [0.5]), 1.0)
        judge(tally, [1, 1, 1], step)
    assert tally.averages(reset=True).loss == 1 and tally.streak == 2
    found = tally.averages()
    assert math.isnan(found.loss) and math.isnan(found.grad_norm) and all(map(math.isnan, found.by_time))
    assert (found.skipped, found.streak, found.blame) == (2, 2, "step 2, rank 0, first in the loss")


@pytest.mark.parametrize(
    ("loss", "norms", "what"),
    [
        (NAN, [1, 1, 1], "the loss"),
        (-INF, [1, 1, 1], "the loss"),
        (NAN, [NAN, NAN, NAN], "the gradient of stem.weight"),
        (1.0, [1, NAN, 1], "the gradient of stem.bias"),
        (1.0, [1, 1, INF], "the gradient of head.weight"),
        (1.0, [1, INF, NAN], "the gradient of stem.bias"),
        # each norm is finite and their norm is not
        (1.0, [3e38, 3e38, 1], "the norm of the whole gradient"),
    ],
)
def test_what_was_not_finite_is_named(loss: float, norms: list[float], what: str) -> None:
    tally = Tally(CPU, RectifiedFlow(), NAMES)
    tally.add(terms([1.0], [0.5]), 1.0)
    assert judge(tally, [1, 1, 1], 6)[0]
    before = tally.sums[:3].clone()
    tally.add(terms([loss], [0.5]), 1.0)
    assert not judge(tally, norms, 7)[0]
    assert torch.equal(tally.sums[:3], before)
    assert tally.averages().blame == f"step 7, rank 0, first in {what}"


def test_the_row_that_is_named_is_the_last_one() -> None:
    """Where it began, not where it is; a step that is kept ends it."""
    tally = Tally(CPU, RectifiedFlow(), NAMES)
    for step, bad in enumerate([1, 1, 0, 0, 1, 1, 1], 1):
        tally.add(terms([1.0], [0.5]), 1.0)
        judge(tally, [1, NAN if bad else 1, 1], step)
    found = tally.averages()
    assert (found.skipped, found.streak) == (5, 3)
    assert found.blame == "step 5, rank 0, first in the gradient of stem.bias"


def among(cases: list[tuple[list[float], Any, list[bool]]]) -> list[tuple[Any, ...]]:
    """One tally per case, in each process: (losses by rank, norms, who is to blame)."""
    world: World = join(CPU, 30)
    found = []
    for losses, norms, blame in cases:
        tally = Tally(CPU, RectifiedFlow(), NAMES, world)
        tally.add(terms([losses[world.rank]], [(0.1, 0.9)[world.rank]]), 1.0)
        keep, norm = judge(tally, norms, 1, blame[world.rank])
        seen = tally.averages()
        found.append((keep, norm, seen.loss, seen.by_time[0], seen.by_time[3], seen.skipped, seen.blame))
    world.close()
    return found


def test_processes_agree() -> None:
    """The same verdict, mean and blame on each, whoever had the bad loss or the bad gradient."""
    cases: list[tuple[list[float], Any, list[bool]]] = [
        ([1.0, 3.0], [3.0, 4.0, 0.0], [False, False]),
        ([1.0, NAN], [1.0, 1.0, 1.0], [False, False]),
        ([NAN, 1.0], [1.0, 1.0, 1.0], [False, False]),
        ([1.0, 1.0], [1.0, NAN, 1.0], [False, True]),
        ([1.0, 1.0], [1.0, NAN, 1.0], [True, False]),
        ([INF, -INF], [NAN, NAN, NAN], [True, True]),
        ([1.0, 1.0], [1.0, 1.0, INF], [False, False]),  # slices, or a sum that overflowed
    ]
    first, second = together(among, cases)
    for one, other in zip(first, second, strict=True):
        assert all(a == b or (a != a and b != b) for a, b in zip(one, other, strict=True))
    assert first[0] == (True, 5, 2, 1, 3, 0, "")
    assert [row[6] for row in first[1:]] == [
        "step 1, rank 1, first in the loss",
        "step 1, rank 0, first in the loss",
        "step 1, rank 1, first in the gradient of stem.bias",
        "step 1, rank 0, first in the gradient of stem.bias",
        "step 1, rank 0, first in the gradient of stem.weight",
        "step 1, rank unknown, first in the gradient of head.weight",
    ]
    assert not any(row[0] for row in first[1:]) and all(row[5] == 1 for row in first[1:])


def test_nothing_waits_for_a_number() -> None:
    """`add` and `judge` on tensors without values: whatever had to look at one would raise."""
    with torch.device("meta"):
        tally = Tally(torch.device("meta"), RectifiedFlow(), NAMES)
        loss: Tensor = torch.ones(4)
        tally.add(Terms(loss, loss, torch.ones(4, dtype=torch.float64)), 1.0)
        keep, norm = tally.judge(torch.ones(3), torch.ones((), dtype=torch.bool), 1)
    assert keep.is_meta and norm.is_meta and keep.dtype == torch.bool
