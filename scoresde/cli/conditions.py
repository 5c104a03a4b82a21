"""What samples are told: as `cond` of a command says, or else what held-out samples are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError
from ..data import Dataset
from ..denoiser import Cond
from .kinds import NAMES, Kind, always_told, kinds_of
from .model import LoadedRun

_CPU = torch.device("cpu")


def choose_cond(given: Any, n: int, run: LoadedRun, *, needed: bool) -> tuple[Cond, str]:
    """What n samples are told, as `cond` of a command says, rows being gone through again and again; and a sentence
    about it where more is to be known, else an empty one.

    Args:
        given: the mapping of that key; or test:0-7, all that these held-out samples are told.
        n: number of samples.
        run: the model.
        needed: where nothing is given, what `in_turn` says; else nothing.

    Raises:
        ConfigError, ValueError, OSError: a kind that the model was not trained with, one that is missing, or values
            that are not of the kind; says what was given and what is expected.
    """
    kinds = kinds_of(run)
    if isinstance(given, str) and given.startswith("test:"):
        given = dict.fromkeys(kinds or NAMES[:1], given)
    if not isinstance(given, Mapping) or not set(given) <= set(NAMES):
        raise ConfigError(
            f"cond is a mapping with the keys {', '.join(NAMES)}, as in cond.label=7, or test:0-7 for all that "
            f"held-out samples are told; got {given!r}."
        )
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        if needed or not kinds:
            said = told_in_turn(run.dataset, run.conditional)
            return in_turn(run.dataset, n, run.conditional), said and f"Samples are{said}."
        if always_told(run):
            name = next(iter(kinds))
            raise ConfigError(f"{run.folder} was never trained without a {name}; say which: cond.{name}=…")
        return None, ""
    for name, value in given.items():
        if not kinds:
            raise ConfigError(
                f"cond.{name}={value}: {run.folder} was trained without labels or other conditions; a model that is "
                "told them is trained with conditional=true."
            )
        if name not in kinds:
            raise ConfigError(f"cond.{name}={value}: {run.folder} was trained with {_listed(kinds)}, and no {name}.")
    if absent := [name for name in kinds if name not in given]:
        raise ConfigError(
            f"{run.folder} was trained with {_listed(kinds)} together: give cond.{absent[0]}=… too, or cond=test:0-7 "
            "for all that held-out samples are told."
        )
    rows = {name: kind.rows(given[name]) for name, kind in kinds.items()}
    told = {name: values[torch.arange(n) % len(values)] for name, values in rows.items()}
    notes = [
        f"cond.{name} has {len(values):,} rows, of which {n:,} samples are told the first {n:,}."
        for name, values in rows.items()
        if len(values) > n
    ]
    return (told["label"] if set(told) == {"label"} else told), "\n".join(notes)


def in_turn(dataset: Dataset, n: int, conditional: bool) -> Cond:
    """What sample k of n is told where nobody says: class k mod classes, or if there is more than labels, what held-out
    sample k mod their number is told. None for an unconditional model.
    """
    if not conditional:
        return None
    if dataset.test.told:
        return dataset.test.cond(torch.arange(n) % len(dataset.test), True, _CPU)
    return torch.arange(n) % dataset.classes if dataset.classes else None


def told_in_turn(dataset: Dataset, conditional: bool) -> str:
    """The same in words, for sentences; empty where classes are gone through, or nothing is told."""
    if not conditional or not dataset.test.told:
        return ""
    names = [*([] if dataset.test.labels is None else ["label"]), *dataset.test.told]
    return f" told the {' and '.join(names)} of the {len(dataset.test):,} held-out samples in turn"


def alike(cond: Cond, dataset: Dataset) -> Tensor:
    """(N,) bool, the held-out samples that are told the same as one of `cond`; all where none is."""
    own = dataset.test.cond(slice(None), True, _CPU)
    if cond is not None and own is not None:
        asked = set(_entries(cond))
        found = torch.tensor([entry in asked for entry in _entries(own)])
        if bool(found.any()):
            return found
    return torch.ones(len(dataset.test), dtype=torch.bool)


def by_name(cond: Cond) -> dict[str, Tensor]:
    """A condition by the names of its kinds; labels have none where they are all."""
    return {"label": cond} if isinstance(cond, Tensor) else dict(cond or {})


def beside(measured: Mapping[str, Tensor], cond: Cond, inputs: int) -> dict[str, Tensor]:
    """A measurement, and for each of its inputs anew what else samples are told, as one condition."""
    told = {"cond": cond} if isinstance(cond, Tensor) else cond or {}
    return {**measured, **{name: value.repeat(inputs, *[1] * (value.ndim - 1)) for name, value in told.items()}}


def _listed(kinds: Mapping[str, Kind]) -> str:
    return " and ".join(map(str, kinds.values()))


def _entries(cond: Tensor | Mapping[str, Tensor]) -> list[bytes]:
    """What each sample is told, to be compared."""
    parts = [cond] if isinstance(cond, Tensor) else [cond[name] for name in sorted(cond)]
    return [b"".join(part[k].numpy().tobytes() for part in parts) for k in range(len(parts[0]))]
