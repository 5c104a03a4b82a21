"""scoresde-train: trains, then samples and evaluates; returns the objective to a sweeper."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ..config import ConfigError
from ..data.kinds import in_turn
from ..diffusion.conditions import named
from ..evaluate import figures
from ..evaluate.evaluation import Drawing, held_out
from ..evaluate.reconstruction import logged, reconstructed
from ..evaluate.report import Report, draw_samples, list_files, real_beside
from ..evaluate.shards import Shards
from ..ode import SolverError
from ..runs import folder as folders
from ..runs import load as loading
from ..runs import lock
from ..runs.checkpoint import Checkpoint, load
from ..runs.kept import keep, under_kept_codec
from ..runs.logger import JsonlLogger, Logger, NullLogger, RunFacts, identity, read_rows
from ..runs.samplers import Model
from ..sampling.fit_sampler import samples_for
from ..sweep.job import one_job
from ..sweep.sweep import SweepSummary
from ..train.signals import Interrupted, Signals, Stopped
from ..train.state import TrainingState
from ..train.world import World, join
from ._hydra import Command, OutputFolder, in_sweep, launch, read, refusing
from .fit import fit_or_try
from .plan import Lesson, Plan, assemble
from .typed import in_shell

Learn = Callable[[Command], tuple[Command, Lesson]]


def main() -> None:
    """Entry point of `scoresde-train`."""
    launch(train, "train")


def train(cfg: DictConfig, learn: Learn | None = None) -> float:
    """One job. In a sweep its end is recorded, whatever it is, and the next one runs.

    Args:
        cfg: the command.
        learn: makes a whole training command of it, and says what a flow map learns from.
    """
    if not in_sweep():
        return run(cfg, learn)["objective"]
    return one_job(lambda: run(cfg, learn), resume=cfg.resume == "auto", in_process=SweepSummary.current is not None)


def run(cfg: DictConfig, learn: Learn | None = None) -> dict[str, float]:
    """Trains and evaluates. Returns the objective and what it was made of."""
    with refusing():
        command, lesson = read(cfg), None
        if learn is not None:
            command, lesson = learn(command)
        device = loading.choose_device(command.options["device"])
        loading.choose_kernels(command.options["kernels"], device)
        world = join(device, command.options["timeout"])
        if world.size > 1 and in_sweep():
            raise ConfigError("torchrun starts one run; a sweep (-m) starts many: give each of its jobs a GPU instead.")
    # the lock ends last, so that whoever waits for it finds everything written
    with contextlib.closing(world), contextlib.ExitStack() as stack, Signals() as signals:
        with refusing():
            plan = assembled(command, world, signals, lesson)
            world.leader(lambda: stack.enter_context(lock.hold(plan.folder)))
            checkpoint = find(plan, command.options["resume"], command.options["overwrite"])
            if checkpoint is not None:
                plan.training.dataset = under_kept_codec(plan.training.dataset, plan.folder, plan.allow)
                plan.training.restore(checkpoint)
                plan.say(f"Resuming {plan.folder} at step {checkpoint.step}.")
        with folders.blamed(plan.folder, lambda: plan.training.step) if world.rank == 0 else contextlib.nullcontext():
            return follow(plan, checkpoint, signals)


def assembled(command: Command, world: World, signals: Signals, lesson: Lesson | None) -> Plan:
    """`assemble`, which a signal breaks off: reading the data may take minutes."""
    try:
        with signals.interruptible():
            return assemble(command, world, lesson)
    except Interrupted:
        OutputFolder.remove_created()
        raise Stopped(signals.code, "Stopped before training began; nothing was written.") from None


def find(plan: Plan, resume: str | bool, overwrite: bool) -> Checkpoint | None:
    """The checkpoint to continue from: rank 0 looks for it, and all read it."""

    def look() -> Path | None:
        found = folders.prepare(plan.folder, plan.config, resume=resume, overwrite=overwrite)
        return None if found is None else found.path

    path = plan.training.world.leader(look)
    return None if path is None else load(path)


def follow(plan: Plan, checkpoint: Checkpoint | None, signals: Signals) -> dict[str, float]:
    """The run itself, in a folder that is its own."""
    if plan.training.world.rank == 0:
        folders.write_config(plan.folder, plan.config, in_shell(*plan.words))
        keep(plan.folder, plan.training.dataset, resumed=checkpoint is not None)
    logger, failed = start_logger(plan, checkpoint), True
    try:
        result = fit_and_report(plan, logger, signals)
        failed = False
        return result
    except Stopped as stopped:
        failed = False
        words = [word for word in plan.words if not word.startswith(("resume=", "overwrite="))]
        words += [] if any(word.startswith("out=") for word in words) else [f"out={plan.folder}"]
        again = "" if in_sweep() else f" To go on: {in_shell(*words, 'resume=auto')}"
        plan.say(stopped.message + again)
        raise
    finally:
        logger.close(failed)


def start_logger(plan: Plan, checkpoint: Checkpoint | None) -> Logger:
    """metrics.jsonl, and beside it the view that the configuration asks for."""
    if plan.training.world.rank:
        return NullLogger()
    config, step = (checkpoint.records["config"], checkpoint.step) if checkpoint else (plan.config, 0)
    config = {name: value for name, value in config.items() if name != "logger"}
    # in a sweep that name of one run would be that of all jobs
    sweep, wanted = (
        (Path(HydraConfig.get().sweep.dir).name, None) if in_sweep() else (None, os.environ.get("WANDB_RUN_ID"))
    )
    logger = JsonlLogger(plan.view)
    logger.start(RunFacts(plan.folder, identity(plan.folder, config, wanted=wanted), plan.config, sweep, step))
    return logger


def measure(plan: Plan, run: TrainingState) -> Mapping[str, float]:
    """Held-out numbers of the average, during training; of a classifier there are no bits/dim."""
    average, dataset, conditional = run.average, run.dataset, plan.config["conditional"]
    losses = held_out(average, dataset, conditional=conditional, choosing=True)
    found = {f"eval/{name}": value for name, value in losses.items()}
    if average.denoiser.draws:
        points, seed = min(plan.evaluation.points_during, len(dataset.test)), plan.config["seed"]
        job = plan.likelihood.job(average.denoiser, dataset, points=points, seed=seed, conditional=conditional)
        bits = job.run()
        found[f"eval/{bits.estimator}"] = bits.mean
        found |= {"eval/bpd_stderr": bits.stderr, "eval/nfe": bits.evaluations}
    return found


def picture(plan: Plan, run: TrainingState) -> Mapping[str, Path]:
    """Samples of the average beside real ones, during training."""
    dataset, n = run.dataset, min(plan.evaluation.samples, len(run.dataset.test))
    cond, (name, sampler) = in_turn(dataset, n, plan.config["conditional"]), next(iter(plan.samplers.items()))
    job = Drawing(dataset.event_shape, range(n), cond, plan.evaluation.batch_size).job(run.average.denoiser, sampler)
    path = plan.folder / "progress" / f"step-{run.step:08d}.png"
    made, real = (dataset.decode(x) for x in (job.run().x, real_beside(cond, dataset, n)))
    return {"eval/samples": draw_samples(made, real, dataset, path, sampler=name)}


def fit_and_report(plan: Plan, logger: Logger, signals: Signals) -> dict[str, float]:
    """Training, then the pictures, the numbers and the table."""
    training, trainer, start = plan.training, plan.trainer, time.monotonic()
    size = sum(p.numel() for p in training.loss.parameters())
    others, dataset = "" if training.world.size == 1 else f" by {training.world.size} processes", training.dataset
    if training.augment:
        plan.say(str(training.augment))
    plan.say(
        f"Training {size:,} parameters on {len(dataset.train):,} samples of {dataset.name}, shape {dataset.raw_shape}, "
        f"until {trainer.images:,} have been seen{others}. Run in {plan.folder}{plan.start}"
    )
    trainer.fit(
        training,
        logger=logger,
        folder=plan.folder / "checkpoints",
        config=plan.config,
        signals=signals,
        evaluate=lambda run: measure(plan, run),
        sample=(lambda run: picture(plan, run)) if plan.evaluation.pictures else None,
        snapshot=(lambda run: run.snapshot(plan.folder / "averages")) if trainer.snapshot_every else None,
    )
    seconds = time.monotonic() - start
    training.refresh()
    try:
        with signals.interruptible():
            result = finish(plan, logger, seconds)
            fit_samplers(plan)
            return result
    except Interrupted:
        raise Stopped(signals.code, "Stopped while measuring; training is complete and saved.") from None


def fit_samplers(plan: Plan) -> None:
    """Samplers of the average for few calls, on rank 0; a model that cannot be sampled is left without."""
    wanted = plan.budgets or plan.config["evaluate_at_end"]
    if plan.training.world.rank or not wanted or not plan.training.average.denoiser.draws:
        return
    run = loading.load_run(plan.folder, allow=plan.allow, device=plan.config["device"])
    cond = in_turn(run.dataset, samples_for(run.event_shape), run.conditional)
    model = Model(run.digest, "ema", None, None, sorted(named(cond)))
    try:
        fit_or_try(plan.folder, model, run.denoiser, run.event_shape, plan.budgets, cond=cond)
    except SolverError as error:
        plan.say(f"No sampler was fitted: {error}")


def finish(plan: Plan, logger: Logger, seconds: float) -> dict[str, float]:
    """What is measured and drawn at the end, in batches that a stop does not lose, shared by all processes."""
    training, config, folder = plan.training, plan.config, plan.folder
    average, dataset, world = training.average, training.dataset, training.world
    at = {"step": training.step, "images": training.images}
    found = held_out(average, dataset, conditional=config["conditional"])
    loss = found["loss"]
    if not config["evaluate_at_end"]:
        logger.log({f"eval/{name}": value for name, value in found.items()} | {"final": 1}, **at)
        said = ", ".join(f"{name} {value:.5g}" for name, value in found.items())
        plan.say(f"Held-out {said} after {training.images:,} images. Run in {folder}")
        return {"objective": loss, "loss": loss}
    facts = {"folder": str(folder), **at, "train_seconds": seconds, "loss": loss}
    if average.denoiser.encodes:
        if world.rank:
            return {"objective": loss, "loss": loss}
        summary = reconstructed(average, dataset, plan.evaluation, config["seed"], folder, facts)
        logged(logger, summary, folder, pictures=plan.evaluation.pictures)
        bits = summary["bits_per_dim"]
        return {"objective": bits["mean"], "bits_per_dim": bits["mean"], "stderr": bits["stderr"], "loss": loss}
    model = (average.denoiser, dataset, config["conditional"])
    report = Report(*model, plan.samplers, plan.likelihood, plan.evaluation, config["seed"])
    measured = report.measure(Shards(folder / "batches" / f"step-{training.step:08d}", at, world.rank, world.size))
    if measured is None:
        return {"objective": loss, "loss": loss}
    bits = report.write(*measured, folder, facts, logger)["bits_per_dim"]
    name = f"eval/{bits['estimator']}"
    logger.log({"eval/loss": loss, name: bits["mean"], "eval/bpd_stderr": bits["stderr"], "final": 1}, **at)
    if plan.evaluation.pictures:
        figures.loss_curve(read_rows(folder / "metrics.jsonl"), folder / "loss.png")
        for name in ("samples", "trajectory", "loss"):
            logger.image(f"eval/{name}", folder / f"{name}.png", **at)
    shutil.rmtree(folder / "batches", ignore_errors=True)
    print(list_files(folder), flush=True)
    objective = bits["mean"] if plan.evaluation.objective == "bits_per_dim" else loss
    return {"objective": objective, "bits_per_dim": bits["mean"], "stderr": bits["stderr"], "loss": loss}


if __name__ == "__main__":
    main()
