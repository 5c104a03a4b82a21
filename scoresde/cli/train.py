"""scoresde-train: trains, then samples and evaluates; returns the objective to a sweeper."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ..config import ConfigError, build, plain
from ..data import EpochOrder
from ..rng import Rng
from ..sampling import Sampler
from ..train import (
    Checkpoint,
    JsonlLogger,
    Logger,
    OdeLikelihood,
    RunFacts,
    Tee,
    Trainer,
    Training,
    draw,
    figures,
    held_out_loss,
)
from ..train.evaluation import spread
from ..train.logger import read_rows, run_id
from . import folder as folders
from ._hydra import Refusal, allowed, build_samplers, in_sweep, launch, output_folder, refusing
from .model import build_dataset, build_denoiser, check_fit, choose_device, set_threads
from .report import Evaluation, announce, check_samplers, labels_for, list_files, measuring_jobs, report
from .sweep import write_job

_UNSAVED = ("out", "resume", "overwrite", "allow_targets")
_RESULTS = {
    "samples": "samples.png", "trajectory": "trajectory.png", "loss curve": "loss.png", "arrays": "samples.npz",
    "metrics": "metrics.jsonl", "summary": "summary.md", "checkpoints": "checkpoints", "W&B": "wandb",
}  # fmt: skip


def main() -> None:
    """Entry point of `scoresde-train`."""
    launch(train, "train")


def train(cfg: DictConfig) -> float:
    """One job. In a sweep a job that fails is recorded and the next one runs."""
    if not in_sweep():
        return run(cfg)["objective"]
    folder, start = output_folder(), time.monotonic()
    overrides = list(HydraConfig.get().overrides.task)

    def failed(reason: str, trace: bool) -> float:
        logging.getLogger(__name__).error("job %s failed: %s", folder.name, reason, exc_info=trace)
        write_job(folder, overrides, "failed", error=reason, seconds=round(time.monotonic() - start, 1))
        return float("nan")

    try:
        result = run(cfg)
    except Refusal as error:
        return failed(str(error), trace=False)
    except Exception as error:
        return failed(f"{type(error).__name__}: {error}", trace=True)
    write_job(folder, overrides, "finished", seconds=round(time.monotonic() - start, 1), **result)
    return result["objective"]


@dataclass
class Plan:
    """Everything a run needs, built and checked before a file is written."""

    config: dict[str, Any]
    trainer: Trainer
    training: Training
    samplers: dict[str, Sampler]
    likelihood: OdeLikelihood
    evaluation: Evaluation
    logger: Logger


def run(cfg: DictConfig) -> dict[str, float]:
    """Trains and evaluates. Returns the objective and what it was made of."""
    folder = output_folder()
    with refusing():
        plan = assemble(cfg)
        checkpoint = folders.prepare(folder, plan.config, resume=cfg.resume, overwrite=cfg.overwrite)
        if checkpoint is not None:
            plan.training.restore(checkpoint)
            print(f"Resuming {folder} at step {checkpoint.step}.", flush=True)
    command = " ".join(["scoresde-train", *HydraConfig.get().overrides.task])
    folders.write_config(folder, plan.config, command)
    logger, failed = start_logger(plan, folder, checkpoint), True
    try:
        result = fit_and_report(plan, folder, logger)
        failed = False
        return result
    finally:
        logger.close(failed)


def assemble(cfg: DictConfig) -> Plan:
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
    for name in ("conditional", "evaluate_at_end"):
        if not isinstance(config[name], bool):
            raise ConfigError(f"{name} is true or false; got {config[name]!r}.")
    set_threads(config["threads"])
    device = choose_device(config["device"])
    evaluation = Evaluation(**config["evaluation"])
    if evaluation.pictures:
        figures.require()
    trainer = build(cfg.trainer, allow)
    samplers = build_samplers(cfg, allow)
    torch.manual_seed(seed)  # initial weights and dropout; everything else takes an Rng
    dataset = build_dataset(config, allow)
    denoiser = build_denoiser(config, dataset, allow).to(device)
    check_fit(denoiser, dataset, conditional=config["conditional"])
    check_samplers(samplers, denoiser)
    spread(len(dataset.test), evaluation.points)  # refused now rather than after training
    loss = build(cfg.loss, allow, denoiser=denoiser)
    ema = build(cfg.ema, allow, module=loss)
    ema.module.denoiser.autocast = None  # the average is measured in full precision, however it is trained
    training = Training(
        loss, build(cfg.optim, allow, params=list(loss.parameters())), ema, dataset,
        EpochOrder(len(dataset.train), trainer.batch_size, seed),
        Rng(seed), conditional=config["conditional"],
    )  # fmt: skip
    likelihood = build(cfg.likelihood, allow)
    return Plan(config, trainer, training, samplers, likelihood, evaluation, build(cfg.logger, allow))


def start_logger(plan: Plan, folder: Path, checkpoint: Checkpoint | None) -> Logger:
    """metrics.jsonl, and beside it the view that the configuration asks for."""
    config, step = plan.config, 0
    if checkpoint is not None:
        config, step = checkpoint.records["config"], checkpoint.step
    identity = run_id({name: value for name, value in config.items() if name != "logger"}, folder)
    logger = Tee(JsonlLogger(), plan.logger)
    logger.start(RunFacts(folder, identity, plan.config, folder.parent.name if in_sweep() else None, step))
    return logger


def measure(plan: Plan, run: Training) -> Mapping[str, float]:
    """Held-out numbers of the average, during training."""
    conditional, points = plan.config["conditional"], min(plan.evaluation.points_during, len(run.dataset.test))
    loss = held_out_loss(run.average, run.dataset, conditional=conditional)
    bits = plan.likelihood(
        run.average.denoiser, run.dataset, points=points, seed=plan.config["seed"], conditional=conditional
    )  # fmt: skip
    name = f"eval/{bits.estimator}"
    return {"eval/loss": loss, name: bits.mean, "eval/bpd_stderr": bits.stderr, "eval/nfe": bits.evaluations}


def picture(plan: Plan, run: Training, folder: Path) -> Mapping[str, Path]:
    """Samples of the average beside real ones, during training."""
    dataset, n = run.dataset, min(plan.evaluation.samples, len(run.dataset.test))
    made = draw(
        run.average.denoiser, next(iter(plan.samplers.values())), dataset.event_shape, seeds=range(n),
        labels=labels_for(dataset, n, plan.config["conditional"]), batch_size=plan.evaluation.batch_size,
    )  # fmt: skip
    real = dataset.encode(dataset.test.raw[spread(len(dataset.test), n)])
    return {"eval/samples": figures.sample_grid(made.x, real, folder / "progress" / f"step-{run.step:08d}.png")}


def fit_and_report(plan: Plan, folder: Path, logger: Logger) -> dict[str, float]:
    """Training, then the pictures, the numbers and the table."""
    training, config, pictures = plan.training, plan.config, plan.evaluation.pictures
    size = sum(p.numel() for p in training.loss.parameters())
    print(
        f"Training {size:,} parameters on {len(training.dataset.train):,} samples of {training.dataset.name}, shape "
        f"{training.dataset.event_shape}, until {plan.trainer.images:,} have been seen. Run in {folder}",
        flush=True,
    )
    start = time.monotonic()
    plan.trainer.fit(
        training, logger=logger, folder=folder / "checkpoints", config=config,
        evaluate=lambda run: measure(plan, run),
        sample=(lambda run: picture(plan, run, folder)) if pictures else None,
    )  # fmt: skip
    seconds = time.monotonic() - start
    at = {"step": training.step, "images": training.images}
    loss = held_out_loss(training.average, training.dataset, conditional=config["conditional"])
    if not config["evaluate_at_end"]:
        logger.log({"eval/loss": loss, "final": 1}, **at)
        print(f"Held-out loss {loss:.5g} after {training.images:,} images. Run in {folder}", flush=True)
        return {"objective": loss, "loss": loss}
    facts = {"folder": str(folder), **at, "train_seconds": seconds, "loss": loss}
    announce(plan.evaluation, training.dataset, plan.samplers)
    measured, draws = measuring_jobs(
        training.average.denoiser, training.dataset, plan.samplers, plan.likelihood, evaluation=plan.evaluation,
        seed=config["seed"], conditional=config["conditional"],
    )  # fmt: skip
    summary = report(
        measured.run(), {name: job.run() for name, job in draws.items()}, training.dataset, seed=config["seed"],
        evaluation=plan.evaluation, accuracy=plan.likelihood.accuracy, folder=folder, facts=facts, logger=logger,
    )  # fmt: skip
    bits = summary["bits_per_dim"]
    name = f"eval/{bits['estimator']}"
    logger.log({"eval/loss": loss, name: bits["mean"], "eval/bpd_stderr": bits["stderr"], "final": 1}, **at)
    if pictures:
        figures.loss_curve(read_rows(folder / "metrics.jsonl"), folder / "loss.png")
        for name in ("samples", "trajectory", "loss"):
            logger.image(f"eval/{name}", folder / f"{name}.png", **at)
    print(list_files(folder, _RESULTS), flush=True)
    objective = bits["mean"] if plan.evaluation.objective == "bits_per_dim" else loss
    return {"objective": objective, "bits_per_dim": bits["mean"], "stderr": bits["stderr"], "loss": loss}


if __name__ == "__main__":
    main()
