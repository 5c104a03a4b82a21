"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from . import checkpoint as checkpoints
from .logger import Logger, NullLogger
from .progress import Progress
from .state import Training


class TrainingDiverged(RuntimeError):
    """Too many steps in a row had a loss or gradient that was not finite."""


class Trainer:
    """Runs a `Training` until it has seen `images` images. Every length and interval counts images, not steps.

    The learning rate rises linearly over `warmup`, stays, and falls linearly to 0 over `cooldown` at the end. A step
    whose loss or gradient is not finite changes nothing (weights, moments, average) and is counted.

    Args:
        images: length of training, ≥ 1.
        batch_size: images per forward pass, ≥ 1.
        accumulate: forward passes per optimizer step, ≥ 1.
        warmup, cooldown: rising and falling part of the learning rate, ≥ 0.
        clip: bound on the gradient norm, > 0; None for none.
        log_every, evaluate_every, sample_every, checkpoint_every: intervals, ≥ 0; 0 is never (a checkpoint is
            written at the end in any case).
        keep_last: checkpoints kept, ≥ 1.
        max_bad_steps: steps in a row that may be skipped before training stops, ≥ 1.

    Raises:
        ValueError: a value outside its range.
    """

    def __init__(
        self,
        *,
        images: int,
        batch_size: int = 128,
        accumulate: int = 1,
        warmup: int = 0,
        cooldown: int = 0,
        clip: float | None = 1.0,
        log_every: int = 5_000,
        evaluate_every: int = 0,
        sample_every: int = 0,
        checkpoint_every: int = 0,
        keep_last: int = 2,
        max_bad_steps: int = 10,
    ):
        self.images = _whole("images", images, 1)
        self.batch_size = _whole("batch_size", batch_size, 1)
        self.accumulate = _whole("accumulate", accumulate, 1)
        self.warmup, self.cooldown = _whole("warmup", warmup, 0), _whole("cooldown", cooldown, 0)
        if clip is not None and not (isinstance(clip, (int, float)) and clip > 0):
            raise ValueError(f"clip is a positive bound on the gradient norm, or null for none; got {clip!r}.")
        self.clip = math.inf if clip is None else float(clip)
        self.log_every = _whole("log_every", log_every, 0)
        self.evaluate_every = _whole("evaluate_every", evaluate_every, 0)
        self.sample_every = _whole("sample_every", sample_every, 0)
        self.checkpoint_every = _whole("checkpoint_every", checkpoint_every, 0)
        self.keep_last = _whole("keep_last", keep_last, 1)
        self.max_bad_steps = _whole("max_bad_steps", max_bad_steps, 1)

    def lr_scale(self, images: int) -> float:
        """Share of the learning rate for a step that starts at `images`: above 0 at the first and the last."""
        rise = (images + self.batch_size * self.accumulate) / self.warmup if self.warmup else 1.0
        fall = (self.images - images) / self.cooldown if self.cooldown else 1.0
        return max(0.0, min(1.0, rise, fall))

    def step(self, run: Training) -> None:
        """One optimizer step: `accumulate` batches, clipped, skipped on the device if it is not finite."""
        for group in run.optimizer.param_groups:
            group.setdefault("peak_lr", group["lr"])
            group["lr"] = group["peak_lr"] * self.lr_scale(run.images)
        total, seen = torch.zeros((), device=run.device), 0
        for _ in range(self.accumulate):
            x0, cond = run.batch()
            loss = run.loss(x0, cond, rng=run.rng).mean() / self.accumulate
            loss.backward()
            total, seen = total + loss.detach(), seen + len(x0)
        norm = torch.nn.utils.clip_grad_norm_(run.loss.parameters(), self.clip)
        keep = torch.isfinite(total) & torch.isfinite(norm)
        # the protocol of torch.amp.GradScaler: a fused step then does nothing
        run.optimizer.found_inf = (~keep).float()  # type: ignore[attr-defined]
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.step, run.images = run.step + 1, run.images + seen
        run.ema.update(run.loss, run.images, seen, keep)
        run.note(total, norm, keep)

    def fit(
        self,
        run: Training,
        *,
        logger: Logger | None = None,
        folder: Path | None = None,
        config: Mapping[str, Any] | None = None,
        evaluate: Callable[[Training], Mapping[str, float]] | None = None,
        sample: Callable[[Training], Mapping[str, Path]] | None = None,
    ) -> None:
        """Trains from where `run` stands to the end.

        Args:
            run: what is trained, in place.
            logger: takes `train/…` and `eval/…` rows.
            folder: where checkpoints go; None for none.
            config: resolved configuration, kept in each checkpoint.
            evaluate: numbers to log every `evaluate_every`.
            sample: pictures to log every `sample_every`.

        Raises:
            TrainingDiverged: `max_bad_steps` or more skipped steps in a row; the last checkpoint is intact.
        """
        logger = NullLogger() if logger is None else logger
        progress = Progress(self.images, run.images)
        clock, since = time.monotonic(), run.images
        run.loss.train()
        try:
            while run.images < self.images:
                before = run.images
                self.step(run)
                if run.step % self.max_bad_steps == 0:
                    self._refuse_divergence(run)
                if self._due(self.log_every, before, run, at_end=True):
                    self._refuse_divergence(run)
                    averages, now = run.averages(reset=True), time.monotonic()
                    rate = (run.images - since) / max(now - clock, 1e-9)
                    clock, since = now, run.images
                    logger.log(self._row(run, averages, rate), step=run.step, images=run.images)
                    progress.update(run.images, averages.loss)
                else:
                    progress.update(run.images)
                # the checkpoint comes last: a run that is resumed from it has these rows and files already
                if evaluate is not None and self._due(self.evaluate_every, before, run):
                    logger.log(evaluate(run), step=run.step, images=run.images)
                if sample is not None and self._due(self.sample_every, before, run):
                    for key, path in sample(run).items():
                        logger.image(key, path, step=run.step, images=run.images)
                if folder is not None and self._due(self.checkpoint_every, before, run, at_end=True):
                    self.save(run, folder, config)
        finally:
            progress.close()

    def save(self, run: Training, folder: Path, config: Mapping[str, Any] | None = None) -> Path:
        """Writes a checkpoint of `run` below `folder`."""
        records = {**run.records(), "config": dict(config or {})}
        return checkpoints.save(folder, run.step, run.tensors(), records, keep_last=self.keep_last)

    def _row(self, run: Training, averages: Any, rate: float) -> dict[str, float]:
        row = {
            "train/loss": averages.loss,
            "train/grad_norm": averages.grad_norm,
            "train/lr": run.optimizer.param_groups[0]["lr"],
            "train/ema_decay": run.ema.decay(run.images, self.batch_size * self.accumulate),
            "train/imgs_per_s": rate,
            "train/skipped": averages.skipped,
        }
        if run.device.type == "cuda":
            row["train/max_mem"] = torch.cuda.max_memory_allocated(run.device) / 2**30
        return row

    def _due(self, every: int, before: int, run: Training, at_end: bool = False) -> bool:
        return (every > 0 and run.images // every > before // every) or (at_end and run.images >= self.images)

    def _refuse_divergence(self, run: Training) -> None:
        streak = run.averages().streak
        if streak >= self.max_bad_steps:
            raise TrainingDiverged(
                f"Loss or gradient was not finite in {streak} steps in a row, from step {run.step - streak + 1} "
                f"({run.images:,} images) on. The weights are those before it. A smaller learning rate, a longer "
                "warmup or float32 (denoiser.autocast=null) are the usual cures; check the data for NaN."
            )


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is a whole number of at least {least}; got {value!r}.")
    return value
