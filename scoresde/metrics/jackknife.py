"""Standard errors of any metric, and of differences between samplers that were measured on the same seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..noise.rng import Rng

Number = float | tuple[float, float]
Metric = Callable[[Tensor, Tensor, Tensor], Number | Mapping[str, Number]]
GROUPS = 20


@dataclass(frozen=True)
class Score:
    """A number and its standard error.

    Attributes:
        value: of all samples.
        stderr: by the jackknife, or as the metric states it.
        left_out: the value without each group of the jackknife in turn; empty where the metric states its own error.
    """

    value: float
    stderr: float
    left_out: tuple[float, ...] = ()

    def minus(self, other: Score) -> Score:
        """The difference of two scores. Its error is paired where both were measured on the same groups, so what they
        share (seeds, held-out points) cancels; else errors are added in squares.
        """
        if self.left_out and len(self.left_out) == len(other.left_out):
            return _score(self.value - other.value, [a - b for a, b in zip(self.left_out, other.left_out, strict=True)])
        return Score(self.value - other.value, math.hypot(self.stderr, other.stderr))


def mean_score(values: Tensor) -> Score:
    """The mean of independent values (n,), with its standard error std/√n; NaN for a single one."""
    count = len(values)
    return Score(float(values.mean()), float(values.std()) / math.sqrt(count) if count > 1 else math.nan)


def score(
    metric: Metric,
    name: str,
    made: Tensor,
    held_out: Tensor,
    train: Tensor,
    *,
    groups: int = GROUPS,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> dict[str, Score]:
    r"""The numbers of a metric by their names, each with its standard error.

    The error is that of the delete-a-group jackknife: samples and held-out points are divided at random into G groups
    each, and with v_g the value without the g-th of both, stderr² = (G − 1)/G Σ_g (v_g − v̄)². It holds the variation
    of the samples and of the held-out points, and is itself known to one part in √(2 (G − 1)), 16 % for 20. For a
    statistic whose first-order term vanishes (a kernel distance of equal laws) it is too large rather than too small.
    The training samples are as they are: the model is one that was trained on them.

    Args:
        metric: (made, held_out, train) -> a number, or (number, its standard error), or a mapping of such by name. One
            that states its errors is called once.
        name: of a number that comes without one.
        made, held_out, train: (n, …), (m, …), (N, …), n, m ≥ 2 · groups.
        groups: G ≥ 2.
        track: passes the groups on, and may show how far they are.

    Raises:
        ValueError: too few samples, or what the metric raises.
        TypeError: it returns something else.
    """
    for what, x in (("samples", made), ("held-out points", held_out)):
        if len(x) < 2 * groups:
            raise ValueError(f"the error takes at least {2 * groups} {what}; got {len(x)}")
    whole = numbers(metric(made, held_out, train), name)
    scores = {key: Score(*value) for key, value in whole.items() if len(value) == 2}
    if len(scores) < len(whole):
        parts = [
            numbers(metric(without(made, g, groups), without(held_out, g, groups), train), name)
            for g in track(range(groups))
        ]
        scores |= {
            key: _score(*value, [part[key][0] for part in parts]) for key, value in whole.items() if len(value) == 1
        }
    return {key: scores[key] for key in whole}


def without(x: Tensor, group: int, groups: int) -> Tensor:
    """x (n, …) without one of the groups that it is divided into at random, the same at every call."""
    keep = torch.ones(len(x), dtype=torch.bool, device="cpu")
    keep[Rng(0).permutation(len(x))[group::groups]] = False
    return x[keep.to(x.device)]


def _score(value: float, left_out: list[float]) -> Score:
    parts, count = torch.tensor(left_out, dtype=torch.float64, device="cpu"), len(left_out)
    return Score(value, float((parts - parts.mean()).norm()) * math.sqrt((count - 1) / count), tuple(left_out))


def numbers(result: Number | Mapping[str, Number], name: str) -> dict[str, tuple[float, ...]]:
    """What a metric returned, by name: (value,) or (value, standard error).

    Raises:
        TypeError: it is something else.
    """
    found = dict(result) if isinstance(result, Mapping) else {name: result}
    try:
        return {
            str(key): (float(value[0]), float(value[1])) if isinstance(value, tuple) else (float(value),)
            for key, value in found.items()
        }
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise TypeError(
            f"it returned {result!r:.200}; expected a number, (number, standard error), or a mapping of such by name"
        ) from error
