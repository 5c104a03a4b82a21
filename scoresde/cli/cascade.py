"""The stages of a cascade as commands name them: run=runs/low then=runs/details."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..config import ConfigError
from ..diffusion.conditions import Cond
from ..evaluate.cascade import Stages
from ..evaluate.evaluation import digest_of
from ..evaluate.report import check_samplers
from ..runs.cascade import Cascade
from ..runs.load import chosen_run
from ..runs.samplers import Model
from ..sampling import Sampler
from ._hydra import Command
from .budget import of_budget

_ALONE = ("problem", "edit", "guide", "versus")  # of one model, not of several


def chosen_cascade(options: Mapping[str, Any], allow: Sequence[str], *, whole_data: bool = False) -> Cascade:
    """The runs of the keys run and then.

    Args:
        whole_data: the last one has all of its data.

    Raises:
        ConfigError: `then` is no name of a folder or list of such, a key of a single model is given besides, or stages
            do not fit.
    """
    then = options["then"] if isinstance(options["then"], list) else [options["then"]]
    if not then or not all(isinstance(name, str) and name for name in then):
        raise ConfigError(f"then is a run that refines what run= draws, or a list from coarse to fine; got {then}.")
    for key in _ALONE:
        if options.get(key) is not None:
            raise ConfigError(f"{key}= is of one model, and a cascade has several: leave {key}= or then= away.")
    runs = [chosen_run(options, allow)]
    for k, name in enumerate(then, 1):
        runs.append(chosen_run({**options, "run": name}, allow, whole_data=whole_data and k == len(then)))
    return Cascade(runs)


def stages_of(
    command: Command, cascade: Cascade, samplers: Mapping[str, Sampler], seeds: Sequence[int], cond: Cond
) -> tuple[Stages, dict[str, str]]:
    """How a command draws from a cascade, and digests of what its options only name.

    Raises:
        ConfigError: guidance or a level that does not suit a stage.
    """
    options, given = command.options, command.options["stage"]
    if not isinstance(given, dict) or not {"guidance", "level"} <= given.keys():
        raise ConfigError(f"stage is a mapping with the keys guidance and level; got {given!r}.")
    nodes = [node or options.get("guidance") for node in cascade.each("stage.guidance", given["guidance"])]
    denoisers = [run.guided(node) for run, node in zip(cascade.runs, nodes, strict=True)]
    digests = {} if cond is None else {"told": digest_of(cond)}
    each: list[Mapping[str, Sampler]] = []
    for stage, (run, denoiser) in enumerate(zip(cascade.runs, denoisers, strict=True)):
        own = dict(samplers)
        if options.get("budget") is not None:
            told = run.cond(None, len(seeds)) if stage else cond
            how = {**options, "guidance": run.guidance_node(nodes[stage])}
            sampler, said = of_budget(command, run, denoiser, Model.of(run.digest, how, None, told), told)
            own = {f"budget-{options['budget']}": sampler, **dict(list(own.items())[1:])}
            digests[f"sampler-{stage + 1}"] = said
        check_samplers(own, denoiser)
        each.append(own)
    levels = cascade.levels(given["level"])
    return Stages(cascade, denoisers, each, seeds, cond, levels, options["batch_size"]), digests
