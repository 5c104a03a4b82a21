"""The conditions of samples: those that `cond` of a command says, or else those of held-out samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..config import ConfigError
from ..data.by_name import names_held_out
from ..data.kinds import NAMES, Kind, in_turn, turns_in_words
from ..diffusion.conditions import Cond, unnamed
from ..evaluate.edits import Edited
from ..evaluate.problem import Problem
from ..runs.run import Run


def choose_cond(given: Any, n: int, run: Run, *, problem: Problem | Edited | None = None) -> tuple[Cond, str]:
    """The condition of samples, and a sentence about it where there is more to know, else an empty one.

    Args:
        given: the key `cond` of a command: a mapping by kind, whose rows are repeated in turn. In place of the
            mapping or of one of its values: test:0-7, the conditions of these held-out samples, or input, those of
            the inputs of a problem.
        n: number of samples; of a problem, for each of its inputs, which follow one another.
        run: the model, or the classifier, that is given the condition.
        problem: or edit; its samples have no condition where nothing is given; others then have those of `in_turn`.

    Raises:
        ConfigError, ValueError, OSError: a kind that the model was not trained with, one that is missing, or values
            that are not of the kind; says what was given and what is expected.
    """
    known = run.kinds
    if given == "input" or names_held_out(given):
        given = dict.fromkeys(known or NAMES[:1], given)
    if not isinstance(given, Mapping) or not set(given) <= set(NAMES):
        others = "test:0-7 for all conditions of those held-out samples, or input for those of a problem's inputs"
        keys = ", ".join(NAMES)
        raise ConfigError(f"cond is a mapping with the keys {keys}, as in cond.label=7; or {others}; got {given!r}.")
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return _unsaid(n, run, known, problem is None)
    run.check_kinds(given)
    cond, notes, inputs = {}, [], 1 if problem is None else len(problem.inputs)
    for name, kind in known.items():
        if given[name] == "input":
            cond[name] = kind.rows(_held_out_inputs(name, problem, run)).repeat_interleave(n, 0)
            continue
        rows = kind.rows(given[name])
        cond[name] = rows[torch.arange(n).repeat(inputs) % len(rows)]
        if len(rows) > n:
            notes.append(f"cond.{name} has {len(rows):,} rows, of which {n:,} samples get the first {n:,}.")
    asked = set(cond["label"].tolist()) if "label" in cond else set()
    if unseen := sorted(asked - set(run.dataset.seen_classes)):
        names = ", ".join(run.dataset.names_of_classes[k] for k in unseen)
        notes.append(f"No training sample of {run.folder} has class {names}: what is drawn of it is a guess.")
    return unnamed(cond), "\n".join(notes)


def _unsaid(n: int, run: Run, known: Mapping[str, Kind], in_turns: bool) -> tuple[Cond, str]:
    """The condition of samples where nothing is given, and the sentence."""
    if in_turns or not known:
        said = turns_in_words(run.dataset, run.conditional)
        return in_turn(run.dataset, n, run.conditional), said and f"Samples are{said}."
    if run.always_conditional:
        name = next(iter(known))
        cure = f"cond.{name}=…, or cond=input for that of the inputs themselves"
        raise ConfigError(f"{run.folder} was never trained without a {name}; say which: {cure}.")
    return None, ""


def _held_out_inputs(kind: str, problem: Problem | Edited | None, run: Run) -> list[str]:
    """The inputs of a problem, all of them held-out samples of the run that knows their conditions."""
    if problem is None:
        example = "problem=inpaint input=test:0-7, …."
        raise ConfigError(f"cond.{kind}=input is the {kind} of what a problem is given; say which: {example}")
    reason, truth = "", problem.truth
    if files := [name for name in problem.inputs if not names_held_out(name)]:
        reason = f"no {kind} is known of {files[0]}, which is a file and no held-out sample"
    else:
        held, index = run.dataset.test.raw, [int(name.removeprefix("test:")) for name in problem.inputs]
        if truth is None or max(index) >= len(held) or not torch.equal(run.dataset.encode(held[index]), truth):
            reason = f"{run.folder}, which knows each {kind}, holds out other samples than the inputs are"
    if reason:
        raise ConfigError(f"cond.{kind}=input: {reason}; give it: cond.{kind}=….")
    return problem.inputs
