"""scoresde-train: trains, then samples and evaluates; returns the objective to a sweeper."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ..config import ConfigError, build, plain
from ..data import EpochOrder
from ..evaluate import figures
from ..evaluate.conditions import in_turn
from ..evaluate.evaluation import OdeLikelihood, drawing, evenly_spaced, held_out
from ..evaluate.report import (
    Evaluation,
    Report,
    check_samplers,
    list_files,
    real_beside,
)
from ..evaluate.shards import Shards
from ..noise.rng import Rng
from ..runs import folder as folders
from ..runs import lock
from ..runs.checkpoint import Checkpoint, load
from ..runs.load import (
    build_dataset,
    build_denoiser,
    build_loss,
    check_classifier,
    check_fit,
    choose_device,
    choose_kernels,
    draws,
    set_threads,
)
from ..runs.logger import JsonlLogger, Logger, NullLogger, RunFacts, Tee, read_rows, run_id
from ..runs.redact import redacted
from ..sampling import Sampler
from ..sweep.job import one_job
from ..sweep.sweep import SweepSummary
from ..train.parallel import spread_over
from ..train.signals import Interrupted, Signals, Stopped
from ..train.state import TrainingState
from ..train.trainer import Trainer
from ..train.world import World, join
from ._hydra import allowed, build_samplers, in_sweep, launch, output_folder, refusing

_UNSAVED = ("out", "resume", "overwrite", "allow_targets")
_RESULTS = {
    "samples": "samples.png", "trajectory": "trajectory.png", "loss curve": "loss.png", "arrays": "samples.npz",
    "metrics": "metrics.jsonl", "summary": "summary.md", "checkpoints": "checkpoints", "W&B": "wandb",
}  # fmt: skip


def main() -> None:
    """Entry point of `scoresde-train`."""
    launch(train, "train")


def train(cfg: DictConfig) -> float:
    """One job. In a sweep its end is recorded, whatever it is, and the next one runs."""
    if not in_sweep():
        return run(cfg)["objective"]
    return one_job(lambda: run(cfg), resume=cfg.resume == "auto", in_process=SweepSummary.current is not None)


@dataclass
class Plan:
    """Everything a run needs, built and checked before a file is written."""

    config: dict[str, Any]
    trainer: Trainer
    training: TrainingState
    samplers: dict[str, Sampler]
    likelihood: OdeLikelihood
    evaluation: Evaluation
    logger: Logger


def run(cfg: DictConfig) -> dict[str, float]:
    """Trains and evaluates. Returns the objective and what it was made of."""
    folder = output_folder()
    with refusing():
        set_threads(cfg.threads)
        device = choose_device(cfg.device)
        choose_kernels(cfg.kernels, device)
        world = join(device, cfg.timeout)
        if world.size > 1 and in_sweep():
            raise ConfigError("torchrun starts one run; a sweep (-m) starts many: give each of its jobs a GPU instead.")
    # the lock ends last, so that whoever waits for it finds everything written
    with contextlib.closing(world), contextlib.ExitStack() as stack, Signals() as signals:
        with refusing():
            plan = assemble(cfg, world)
            world.leader(lambda: stack.enter_context(lock.hold(folder)))
            checkpoint = find(plan, folder, resume=cfg.resume, overwrite=cfg.overwrite)
            if checkpoint is not None:
                plan.training.restore(checkpoint)
                say(world, f"Resuming {folder} at step {checkpoint.step}.")
        with folders.blamed(folder, lambda: plan.training.step) if world.rank == 0 else contextlib.nullcontext():
            return follow(plan, folder, checkpoint, signals)


def find(plan: Plan, folder: Path, *, resume: str | bool, overwrite: bool) -> Checkpoint | None:
    """The checkpoint to continue from; rank 0 looks, and the others read the one that it found."""
    found: Checkpoint | None = None

    def look() -> Path | None:
        nonlocal found
        found = folders.prepare(folder, plan.config, resume=resume, overwrite=overwrite)
        return None if found is None else found.path

    path = plan.training.world.leader(look)
    return found if found is not None or path is None else load(path)


def follow(plan: Plan, folder: Path, checkpoint: Checkpoint | None, signals: Signals) -> dict[str, float]:
    """The run itself, in a folder that is its own."""
    world, command = plan.training.world, " ".join(["scoresde-train", *HydraConfig.get().overrides.task])
    if world.rank == 0:
        folders.write_config(folder, plan.config, command)
    logger, failed = start_logger(plan, folder, checkpoint), True
    try:
        result = fit_and_report(plan, folder, logger, signals)
        failed = False
        return result
    except Stopped as stopped:
        failed = False
        again = "" if in_sweep() else f" To go on: {command}{'' if 'resume=auto' in command else ' resume=auto'}"
        say(world, stopped.message + again)
        raise
    finally:
        logger.close(failed)


def say(world: World, text: str) -> None:
    """Prints, on rank 0."""
    if world.rank == 0:
        print(text, flush=True)


def assemble(cfg: DictConfig, world: World) -> Plan:
    """Builds every object of the configuration.

    Raises:
        ConfigError: something in it cannot be built.
        ValueError: parts that do not fit each other, or data that cannot be read.
    """
    allow = allowed(cfg)
    config = {name: value for name, value in plain(cfg).items() if name not in _UNSAVED}
    seed = config["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise ConfigError(f"seed is a whole number from 0 to 2^31 - 1; got {seed!r}.")
    for name in ("conditional", "evaluate_at_end", "compile", "channels_last"):
        if not isinstance(config[name], bool):
            raise ConfigError(f"{name} is true or false; got {config[name]!r}.")
    if config["parallel"] not in ("ddp", "fsdp"):
        raise ConfigError(f"parallel is ddp (a copy on each process) or fsdp (slices); got {config['parallel']!r}.")
    device = choose_device(config["device"])
    evaluation = Evaluation(**config["evaluation"])
    if evaluation.pictures:
        figures.require()
    trainer = build(cfg.trainer, allow)
    samplers = build_samplers(cfg, allow)
    torch.manual_seed(seed)  # initial weights and dropout; everything else takes an Rng
    check_classifier(config, allow)
    dataset = build_dataset(config, allow)
    denoiser = build_denoiser(config, dataset, allow).to(device)
    loss: Any = build_loss(config, denoiser, allow).to(device)
    check_fit(denoiser, dataset, conditional=config["conditional"])
    check_samplers(samplers, denoiser)
    evenly_spaced(len(dataset.test), evaluation.points)  # refused now rather than after training
    if config["channels_last"]:
        loss = loss.to(memory_format=torch.channels_last)
    ema = build(cfg.ema, allow, module=loss)
    for average in ema.shadows.values():
        average.denoiser.autocast = None  # averages are measured in full precision, however they are trained
    if trainer.snapshot_every and not ema.sigma_rel:
        raise ConfigError("trainer.snapshot_every keeps averages of known length, which ema=power makes.")
    parallel = spread_over(world, loss, ema, config["parallel"])
    if config["compile"]:
        cast(torch.nn.Module, denoiser.network).compile()  # in place, so that no name changes
    optimizer = build(cfg.optim, allow, params=list(loss.parameters()))
    if world.rank:
        torch.manual_seed(seed + world.rank)  # other dropout on each
    training = TrainingState(
        loss, optimizer, ema, dataset, EpochOrder(len(dataset.train), trainer.batch_size, seed), Rng(seed),
        conditional=config["conditional"], world=world, parallel=parallel, loss_scale=trainer.loss_scale,
    )  # fmt: skip
    likelihood = build(cfg.likelihood, allow)
    # what is kept of it, in whatever file, holds no secret
    return Plan(redacted(config), trainer, training, samplers, likelihood, evaluation, build(cfg.logger, allow))


def start_logger(plan: Plan, folder: Path, checkpoint: Checkpoint | None) -> Logger:
    """metrics.jsonl, and beside it the view that the configuration asks for."""
    config, step = plan.config, 0
    if plan.training.world.rank:
        return NullLogger()
    if checkpoint is not None:
        config, step = checkpoint.records["config"], checkpoint.step
    identity = run_id({name: value for name, value in config.items() if name != "logger"}, folder)
    logger = Tee(JsonlLogger(), plan.logger)
    logger.start(RunFacts(folder, identity, plan.config, folder.parent.name if in_sweep() else None, step))
    return logger


def measure(plan: Plan, run: TrainingState) -> Mapping[str, float]:
    """Held-out numbers of the average, during training; of a classifier there are no bits/dim."""
    conditional, points = plan.config["conditional"], min(plan.evaluation.points_during, len(run.dataset.test))
    found = {
        f"eval/{name}": value for name, value in held_out(run.average, run.dataset, conditional=conditional).items()
    }
    if not draws(run.average.denoiser):
        return found
    bits = plan.likelihood(
        run.average.denoiser, run.dataset, points=points, seed=plan.config["seed"], conditional=conditional
    )  # fmt: skip
    name = f"eval/{bits.estimator}"
    return {**found, name: bits.mean, "eval/bpd_stderr": bits.stderr, "eval/nfe": bits.evaluations}


def picture(plan: Plan, run: TrainingState, folder: Path) -> Mapping[str, Path]:
    """Samples of the average beside real ones, during training."""
    dataset, n = run.dataset, min(plan.evaluation.samples, len(run.dataset.test))
    cond = in_turn(dataset, n, plan.config["conditional"])
    sampler = next(iter(plan.samplers.values()))
    job = drawing(
        run.average.denoiser, sampler, dataset.event_shape, range(n), cond, batch_size=plan.evaluation.batch_size
    )
    real = real_beside(cond, dataset, n)
    return {"eval/samples": figures.sample_grid(job.run().x, real, folder / "progress" / f"step-{run.step:08d}.png")}


def fit_and_report(plan: Plan, folder: Path, logger: Logger, signals: Signals) -> dict[str, float]:
    """Training, then the pictures, the numbers and the table."""
    training, config, pictures = plan.training, plan.config, plan.evaluation.pictures
    world, start = training.world, time.monotonic()
    size = sum(p.numel() for p in training.loss.parameters())
    others = "" if world.size == 1 else f" by {world.size} processes"
    say(
        world,
        f"Training {size:,} parameters on {len(training.dataset.train):,} samples of {training.dataset.name}, shape "
        f"{training.dataset.event_shape}, until {plan.trainer.images:,} have been seen{others}. Run in {folder}",
    )
    plan.trainer.fit(
        training, logger=logger, folder=folder / "checkpoints", config=config, signals=signals,
        evaluate=lambda run: measure(plan, run),
        sample=(lambda run: picture(plan, run, folder)) if pictures else None,
        snapshot=(lambda run: run.snapshot(folder / "averages")) if plan.trainer.snapshot_every else None,
    )  # fmt: skip
    seconds = time.monotonic() - start
    training.refresh()
    try:
        with signals.interruptible():
            return finish(plan, folder, logger, seconds)
    except Interrupted:
        raise Stopped(signals.code, "Stopped while measuring; training is complete and saved.") from None


def finish(plan: Plan, folder: Path, logger: Logger, seconds: float) -> dict[str, float]:
    """What is measured and drawn at the end, in batches that a stop does not lose, shared by all processes."""
    training, config, pictures = plan.training, plan.config, plan.evaluation.pictures
    at = {"step": training.step, "images": training.images}
    found = held_out(training.average, training.dataset, conditional=config["conditional"])
    loss = found["loss"]
    if not config["evaluate_at_end"]:
        logger.log({f"eval/{name}": value for name, value in found.items()} | {"final": 1}, **at)
        said = ", ".join(f"{name} {value:.5g}" for name, value in found.items())
        say(training.world, f"Held-out {said} after {training.images:,} images. Run in {folder}")
        return {"objective": loss, "loss": loss}
    report = Report(
        training.average.denoiser, training.dataset, config["conditional"], plan.samplers, plan.likelihood,
        plan.evaluation, config["seed"],
    )  # fmt: skip
    shards = Shards(folder / "batches" / f"step-{training.step:08d}", at, training.world.rank, training.world.size)
    measured = report.measure(shards)
    if measured is None:
        return {"objective": loss, "loss": loss}
    facts = {"folder": str(folder), **at, "train_seconds": seconds, "loss": loss}
    summary = report.write(*measured, folder, facts, logger)
    bits = summary["bits_per_dim"]
    name = f"eval/{bits['estimator']}"
    logger.log({"eval/loss": loss, name: bits["mean"], "eval/bpd_stderr": bits["stderr"], "final": 1}, **at)
    if pictures:
        figures.loss_curve(read_rows(folder / "metrics.jsonl"), folder / "loss.png")
        for name in ("samples", "trajectory", "loss"):
            logger.image(f"eval/{name}", folder / f"{name}.png", **at)
    shutil.rmtree(folder / "batches", ignore_errors=True)
    print(list_files(folder, _RESULTS), flush=True)
    objective = bits["mean"] if plan.evaluation.objective == "bits_per_dim" else loss
    return {"objective": objective, "bits_per_dim": bits["mean"], "stderr": bits["stderr"], "loss": loss}


if __name__ == "__main__":
    main()
