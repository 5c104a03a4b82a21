"""An edit as a command gives it: the change, and the samples that are changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from ..config import ConfigError
from ..evaluate.edits import Edited
from ..evaluate.problem import Measurement
from ..inverse.observation import Observation
from ..runs.run import Run
from ..runs.stage import kind_of
from ._hydra import Command
from .conditions import choose_cond
from .problem import names_of

_CHOSEN = ("sampler=", "sampler.", "grid=", "grid.", "+sampler@")


def read_edit(command: Command, run: Run, n: int) -> Edited | None:
    """The edit that a command describes, None for edit=none.

    Raises:
        ConfigError, ValueError, OSError: what was given does not fit; says what was expected and found.
    """
    options = command.options
    if options["edit"] is None:
        return None
    for key in ("problem", "budget"):
        if options[key] is not None:
            raise ConfigError(f"edit= starts from given samples, which {key}= does not; leave one of them away.")
    edit = command.build("edit")
    if edit.flow and (typed := [word for word in command.typed if word.startswith(_CHOSEN)]):
        raise ConfigError(f"This edit goes along the probability flow, set by edit.flow; leave {typed[0]} away.")
    if edit.from_noise and kind_of(run) != "vector":
        raise ConfigError(
            f"This edit tells a run the embedding of its input, and {run.folder} is told none: codec=with_embedding "
            "codec.run=runs/embedder conditional=true, as in experiment=unclip_decoder, trains one that is."
        )
    reader = Measurement(run.dataset, Observation(None, nn.Identity(), std=1e-3, linear=True))
    names = {key: names_of(words, len(run.dataset.test), f"edit.{key}") for key, words in edit.words.items()}
    x = {key: torch.stack([reader.clean(name) for name in found]) for key, found in names.items()}
    rows, changed = edit.rows(names["input"], x["input"])
    edited = Edited(edit, x, rows, changed, n)
    if edit.needs_cond and not any(_values(options["cond"])):
        raise ConfigError("This edit draws its input anew under a condition; say which: 'cond.text=a 7', cond.label=7.")
    if edit.before is None:
        return edited
    try:
        return replace(edited, before=choose_cond(edit.before, 1, run, problem=edited)[0])
    except ConfigError as error:
        raise ConfigError(str(error).replace("cond.", "edit.before.")) from error


def _values(cond: object) -> list[bool]:
    """Which of its kinds a `cond` says."""
    return [value is not None for value in cond.values()] if isinstance(cond, Mapping) else [True]
