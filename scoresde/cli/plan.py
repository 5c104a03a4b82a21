"""What `scoresde-train` needs before it writes a file: every object of a configuration, built and checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from ..config import ConfigError
from ..data import EpochOrder
from ..diffusion.denoiser import Denoiser
from ..evaluate import figures
from ..evaluate.evaluation import evenly_spaced
from ..evaluate.likelihood import Likelihood
from ..evaluate.report import Evaluation, check_samplers
from ..noise.rng import Rng
from ..runs import load as loading
from ..runs.kept import coded, network_behind
from ..runs.logger import Logger
from ..runs.objective import build_loss, check_objective
from ..runs.progress import doing
from ..runs.redact import redacted
from ..runs.run import Run
from ..sampling import Sampler
from ..train.parallel import spread_over
from ..train.state import TrainingState
from ..train.trainer import Trainer
from ..train.world import World
from ._hydra import Command
from .fit import choose_budgets

_UNSAVED = ("out", "resume", "overwrite", "allow_targets")


@dataclass
class Plan:
    """Everything a run needs, built and checked before a file is written.

    Attributes:
        folder: the output folder.
        config: the resolved configuration, without secrets.
        trainer, training: how to train, and what is trained.
        samplers, likelihood, evaluation: how the model is measured.
        view: what is kept of the metrics besides `metrics.jsonl`.
        budgets: of network calls, for which samplers are fitted at the end.
        allow: further names that a configuration may build from.
        words: the command.
        start: what the reader decided, and what the model took from the data before its first step: a line each.
    """

    folder: Path
    config: dict[str, Any]
    trainer: Trainer
    training: TrainingState
    samplers: dict[str, Sampler]
    likelihood: Likelihood
    evaluation: Evaluation
    view: Logger
    budgets: list[int]
    allow: list[str]
    words: list[str]
    start: str

    def say(self, text: str) -> None:
        """Prints, on rank 0."""
        if self.training.world.rank == 0:
            print(text, flush=True)


@dataclass(frozen=True)
class Lesson:
    """What a flow map learns from.

    Attributes:
        run: whose weights it starts from, on whose data.
        teacher: its model, guided.
    """

    run: Run
    teacher: Denoiser


def assemble(command: Command, world: World, lesson: Lesson | None = None) -> Plan:
    """Builds every object of the configuration.

    Args:
        command: with every key of conf/train.yaml.
        world: the processes.
        lesson: of a flow map that is distilled.

    Raises:
        ConfigError: something in it cannot be built.
        ValueError: parts that do not fit each other, or data that cannot be read.
    """
    config = {name: value for name, value in command.options.items() if name not in _UNSAVED}
    seed, conditional, device = config["seed"], config["conditional"], loading.choose_device(config["device"])
    check_options(config)
    evaluation = Evaluation(**config["evaluation"])
    if evaluation.pictures:
        figures.require()
    trainer, samplers = command.build("trainer"), command.samplers()
    torch.manual_seed(seed)  # initial weights and dropout; everything else takes an Rng
    with doing("reading the data"):
        dataset = lesson.run.dataset if lesson else coded(command.build("data"), config, command.allow, command.folder)
        if (read_by := network_behind(dataset)) and not lesson:
            config["codec"] = {**config["codec"], "digest": read_by}
        dataset.statistics  # noqa: B018  # looks at all samples, once; here a signal may break it off
    denoiser = loading.build_denoiser(config, dataset, command.allow).to(device)
    if lesson:
        start = f"\nIt starts from {lesson.run}."
        loading.start_from(denoiser, lesson.run.denoiser)
    else:
        start = loading.prepare(denoiser, dataset, seed)
    loss: Any = build_loss(config, denoiser, command.allow, lesson.teacher if lesson else None).to(device)
    loading.check_fit(denoiser, dataset, conditional=conditional)
    check_samplers(samplers, denoiser)
    evenly_spaced(len(dataset.test), evaluation.points, "evaluation.points")  # refused now rather than after training
    if config["channels_last"]:
        loss = loss.to(memory_format=torch.channels_last)
    ema = command.build("ema", module=loss)
    for average in ema.shadows.values():
        average.denoiser.autocast = None  # averages are measured in full precision, however they are trained
    if trainer.snapshot_every and not ema.sigma_rel:
        raise ConfigError("trainer.snapshot_every keeps averages of known length, which ema=power makes.")
    parallel = spread_over(world, loss, ema, config["parallel"])
    if config["compile"]:
        cast(torch.nn.Module, denoiser.network).compile()  # in place, so that no name changes
    optimizer = command.build("optim", params=list(loss.parameters()))
    if world.rank:
        torch.manual_seed(seed + world.rank)  # other dropout on each
    order = EpochOrder(len(dataset.train), trainer.batch_size, seed, repeat=bool(dataset.columns))
    augment = None if lesson or not config["augment"] else command.build("augment")
    how: dict[str, Any] = {"conditional": conditional, "world": world, "parallel": parallel, "augment": augment}
    how["workers"] = trainer.workers
    training = TrainingState(loss, optimizer, ema, dataset, order, Rng(seed), loss_scale=trainer.loss_scale, **how)
    likelihood, view = command.build("likelihood"), command.build("logger")
    if denoiser.draws:
        likelihood.job(denoiser, dataset, seed=seed)  # refused now rather than after training
    # what is kept of it, in whatever file, holds no secret
    how = {"budgets": choose_budgets(config["fit"]), "allow": command.allow, "words": command.words, "start": start}
    return Plan(command.folder, redacted(config), trainer, training, samplers, likelihood, evaluation, view, **how)


def check_options(config: dict[str, Any]) -> None:
    """Refuses values that are no part of an object.

    Raises:
        ConfigError: one of another type or outside its range, or a run that cannot be sampled and is to be.
    """
    seed, parallel = config["seed"], config["parallel"]
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise ConfigError(f"seed is a whole number from 0 to 2^31 - 1; got {seed!r}.")
    for name in ("conditional", "evaluate_at_end", "compile", "channels_last"):
        if not isinstance(config[name], bool):
            raise ConfigError(f"{name} is true or false; got {config[name]!r}.")
    if parallel not in ("ddp", "fsdp"):
        raise ConfigError(f"parallel is ddp (a copy on each process) or fsdp (slices); got {parallel!r}.")
    check_objective(config)
