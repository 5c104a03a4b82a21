"""What samples are told: as `cond` of a command says, or else what held-out samples are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError
from ..diffusion.denoiser import Cond
from ..evaluate.conditions import in_turn, told_in_turn
from ..runs.load import LoadedRun
from .kinds import NAMES, Kind, always_told, kinds_of
from .problem import Problem


def choose_cond(given: Any, n: int, run: LoadedRun, *, problem: Problem | None = None) -> tuple[Cond, str]:
    """What samples are told, as `cond` of a command says, rows being gone through again and again; and a sentence
    about it where more is to be known, else an empty one.

    Args:
        given: the mapping of that key; or in place of it or of a value, test:0-7, what these held-out samples are told,
            or input, what each input of a problem is told itself.
        n: number of samples; of a problem, for each of its inputs, which follow one another.
        run: the model, or whatever is told.
        problem: is told nothing where nothing is given; without one it is what `in_turn` says.

    Raises:
        ConfigError, ValueError, OSError: a kind that the model was not trained with, one that is missing, or values
            that are not of the kind; says what was given and what is expected.
    """
    kinds = kinds_of(run)
    if given == "input" or (isinstance(given, str) and given.startswith("test:")):
        given = dict.fromkeys(kinds or NAMES[:1], given)
    if not isinstance(given, Mapping) or not set(given) <= set(NAMES):
        raise ConfigError(
            f"cond is a mapping with the keys {', '.join(NAMES)}, as in cond.label=7, or test:0-7 for all that "
            f"held-out samples are told, or input for all that those of a problem are; got {given!r}."
        )
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return _unsaid(n, run, kinds, problem is None)
    _check_kinds(given, kinds, run)
    told, notes, k = {}, [], 1 if problem is None else len(problem.inputs)
    for name, kind in kinds.items():
        if given[name] == "input":
            told[name] = kind.rows(_held_out_inputs(name, problem, run)).repeat_interleave(n, 0)
            continue
        rows = kind.rows(given[name])
        told[name] = rows[torch.arange(n).repeat(k) % len(rows)]
        if len(rows) > n:
            notes.append(f"cond.{name} has {len(rows):,} rows, of which {n:,} samples are told the first {n:,}.")
    return (told["label"] if set(told) == {"label"} else told), "\n".join(notes)


def _unsaid(n: int, run: LoadedRun, kinds: Mapping[str, Kind], in_turns: bool) -> tuple[Cond, str]:
    """What samples are told where nothing is given, and the sentence."""
    if in_turns or not kinds:
        said = told_in_turn(run.dataset, run.conditional)
        return in_turn(run.dataset, n, run.conditional), said and f"Samples are{said}."
    if always_told(run):
        name = next(iter(kinds))
        raise ConfigError(
            f"{run.folder} was never trained without a {name}; say which: cond.{name}=…, or cond=input for that of "
            "the inputs themselves."
        )
    return None, ""


def _check_kinds(given: Mapping[str, Any], kinds: Mapping[str, Kind], run: LoadedRun) -> None:
    """Refuses a kind that the model was not trained with, and others without one that it was."""
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


def _held_out_inputs(kind: str, problem: Problem | None, run: LoadedRun) -> list[str]:
    """The inputs of a problem, if it is known of them what they are told themselves."""
    if problem is None:
        raise ConfigError(
            f"cond.{kind}=input is the {kind} of what a problem is given; say which: problem=inpaint input=test:0-7, …."
        )
    if files := [name for name in problem.inputs if not name.startswith("test:")]:
        raise ConfigError(
            f"cond.{kind}=input: no {kind} is known of {files[0]}, which is a file and no held-out sample; give it: "
            f"cond.{kind}=…."
        )
    held, index = run.dataset.test.raw, [int(name.removeprefix("test:")) for name in problem.inputs]
    truth = problem.truth
    if truth is None or max(index) >= len(held) or not torch.equal(run.dataset.encode(held[index]), truth):
        raise ConfigError(
            f"cond.{kind}=input: {run.folder}, which knows each {kind}, holds out other samples than the inputs are; "
            f"give it: cond.{kind}=…."
        )
    return problem.inputs


def beside(measured: Mapping[str, Tensor], cond: Cond) -> dict[str, Tensor]:
    """A measurement of each sample, and what else it is told, as one condition."""
    return {**measured, **({"cond": cond} if isinstance(cond, Tensor) else cond or {})}


def _listed(kinds: Mapping[str, Kind]) -> str:
    return " and ".join(map(str, kinds.values()))
