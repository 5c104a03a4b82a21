"""The sampler for a budget of network calls."""

from __future__ import annotations

from ..checks import whole
from ..config import ConfigError
from ..diffusion.conditions import Cond, move
from ..diffusion.denoiser import Denoiser, model_device
from ..runs.run import Run
from ..runs.samplers import Model, recall
from ..sampling.sampler import Sampler
from ._hydra import Command


def of_budget(command: Command, run: Run, denoiser: Denoiser, model: Model, cond: Cond) -> tuple[Sampler, str]:
    """The sampler for the key `budget`, and a sentence that says which it is.

    Raises:
        ConfigError: a sampler is named besides, or a problem, which no sampler is fitted to.
        ValueError: no number of calls, or a sampler that was fitted to other weights.
    """
    budget = whole(command.options["budget"], "budget, the number of network calls,")
    if command.options["problem"] is not None:
        raise ConfigError("budget= is of samples alone; a problem takes a sampler: sampler=ddim sampler.steps=….")
    if named := [word for word in command.typed if word.startswith(("sampler=", "sampler.", "grid=", "grid."))]:
        raise ConfigError(f"budget={budget} chooses sampler and grid; leave {named[0]} or budget= away.")
    return recall(run.folder, model, budget, denoiser, run.event_shape, move(cond, model_device(denoiser)))
