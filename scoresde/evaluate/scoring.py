"""Samplers scored by metrics, each number with its error: what is measured, and on what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..data import Dataset
from ..data.rows import few, how_few
from ..metrics import Metric, Score, score
from ..metrics.jackknife import GROUPS, numbers, without
from ..runs.progress import track
from .evaluation import evenly_spaced
from .features import Features

TRAINING = "(training data)"  # the row of training samples in place of drawn ones
_FAILURES = (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError, AttributeError)


@dataclass(frozen=True)
class Scoring:
    """Which metrics samples get, and on which features.

    Attributes:
        metrics: by name, (samples, held out, training) -> numbers; see `scoresde.metrics.score`.
        features: of all three.
        settings: of both as they were configured, to be written beside the numbers.
        optional: what cannot be measured on so many samples is left out, in words, and nothing is refused.
        skipped: what is left out, and why.
        names: of the numbers that there will be, once they are `tried`.
        data: held-out points and training samples as the metrics get them, once they are `tried`.
    """

    metrics: Mapping[str, Metric]
    features: Features = field(default_factory=Features)
    settings: Mapping[str, Any] = field(default_factory=dict)
    optional: bool = False
    skipped: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    data: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    def tried(self, dataset: Dataset, samples: int) -> Scoring:
        """These metrics, after each was called once on as few samples as it will be, with held-out data in place of
        drawn ones: what would fail after an hour of sampling fails now.

        Raises:
            ValueError: the features, or a metric, cannot be had of so many; the keys to change are named.
        """
        if not self.metrics:
            return self
        train = few(dataset.train.raw if trained_on(dataset) else dataset.train.raw[:0])
        held, train = (self.features.of(raw, dataset) for raw in (few(dataset.test.raw), train))
        made = held[torch.arange(samples) % len(held)]
        counted = f"evaluation.samples={samples} and {len(held)} held-out points, less a twentieth for the error"
        metrics, skipped, names = dict(self.metrics), [], list[str]()
        for name, metric in self.metrics.items():
            try:
                if min(len(made), len(held)) < 2 * GROUPS:
                    raise ValueError(f"it takes at least {2 * GROUPS} of either")
                names += numbers(metric(without(made, 0, GROUPS), without(held, 0, GROUPS), train), name)
            except _FAILURES as error:
                why = f"metrics.{name} on {counted}: {error}"
                if not self.optional:
                    raise ValueError(f"{why}. Change these numbers, or leave it out: '~metrics.{name}'.") from error
                skipped.append(why)
                del metrics[name]
        if doubled := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"metrics: two of them return a number called {min(doubled)!r}; give one another name.")
        return replace(self, metrics=metrics, skipped=tuple(skipped), names=tuple(names), data=(held, train))

    def of(self, made: Mapping[str, Tensor], dataset: Dataset) -> dict[str, dict[str, Score]]:
        """The scores of each sampler's samples (n, *event), model data; and of as many training samples, which is what
        a model can reach that has learnt the law of the data.
        """
        if not self.metrics:
            return {name: {} for name in made}
        found, (held, train) = dict[str, dict[str, Score]](), self.data
        rows = {name: self.features(x, dataset) for name, x in made.items()}
        if len(train) >= 2 * GROUPS:
            rows[TRAINING] = train[evenly_spaced(len(train), min(len(train), *map(len, made.values())))]
        for row, x in rows.items():
            found[row] = {}
            for name, metric in self.metrics.items():
                shown = partial(track, label=f"{name} of {row}", total=GROUPS)
                found[row] |= score(metric, name, x, held, train, track=shown)
        return found

    def protocol(self, dataset: Dataset, samples: int) -> dict[str, Any]:
        """All that has to agree for two numbers to be compared."""
        (low, high), codec = dataset.pixels.statistics.span, dataset.pixels.codec
        rounding = f", rounded to {codec.rounding}" if codec.discrete else ""
        return {
            "features": self.features.name,
            "coordinates": f"model data in [{low:g}, {high:g}]{rounding}",
            "samples": samples,
            "held_out": how_few(dataset.test.raw),
            "training": how_few(dataset.train.raw) if trained_on(dataset) else 0,
            "split": "test",
            "error": f"jackknife without one of {GROUPS} groups; of memorisation and c2st in closed form",
            "settings": dict(self.settings),
        }


def trained_on(dataset: Dataset) -> bool:
    """Whether all training samples are there, of which a run folder alone keeps a few."""
    return len(dataset.train) == dataset.statistics.training


def rank_name(names: Iterable[str], by: str | None) -> str:
    """The number that rows are sorted by: the one that is named, or else the first; empty where there is none."""
    return (by or next(iter(names), "")).removeprefix("-")


def ranked(scores: Mapping[str, Mapping[str, Score]], by: str | None) -> list[str]:
    """The rows from the best to the worst: by the first number, least first, or by the one that is named; "-recall"
    puts the greatest first. Training data come last.
    """
    rows = [row for row in scores if row != TRAINING]
    if not (name := rank_name(scores[rows[0]], by)):
        return rows
    sign = -1.0 if by and by.startswith("-") else 1.0
    return [*sorted(rows, key=lambda row: sign * scores[row][name].value), *(row for row in scores if row == TRAINING)]


def check_rank(by: str | None, names: Sequence[str]) -> None:
    """Refuses to sort by a number that is not measured."""
    if by is not None and str(by).removeprefix("-") not in names:
        raise ValueError(f"evaluation.rank_by={by} is none of the numbers that are measured: {', '.join(names)}.")
