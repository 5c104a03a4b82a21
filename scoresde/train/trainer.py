"""The training loop."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..checks import whole
from ..runs.logger import Logger, NullLogger
from .progress import Progress, Silent
from .saver import Saver
from .signals import Interrupted, Signals, Stopped
from .slices import local
from .state import Training
from .tally import Averages

_log = logging.getLogger(__name__)


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
        snapshot_every: the same for snapshots of the averages, from which any other average can be made.
        keep_last: newest checkpoints kept, ≥ 1.
        keep_best: checkpoints kept besides for the lowest `best`, ≥ 0. A checkpoint has a score if it is written when
            `evaluate` was called.
        best: which of the numbers of `evaluate` decides.
        background: checkpoints are copied first and written while training goes on; a kill meanwhile costs up to two
            intervals instead of one.
        on_save_error: "stop", or "warn" to go on without it and try again at the next.
        max_bad_steps: steps in a row that may be skipped before training stops, ≥ 1.
        loss_scale: first value of the loss scale that float16 needs (65536, say); None for none.

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
        snapshot_every: int = 0,
        keep_last: int = 2,
        keep_best: int = 0,
        best: str = "eval/loss",
        background: bool = True,
        on_save_error: str = "stop",
        max_bad_steps: int = 10,
        loss_scale: float | None = None,
    ):
        self.images = whole(images, "images", 1)
        self.batch_size = whole(batch_size, "batch_size", 1)
        self.accumulate = whole(accumulate, "accumulate", 1)
        self.warmup, self.cooldown = whole(warmup, "warmup", 0), whole(cooldown, "cooldown", 0)
        if clip is not None and not (isinstance(clip, (int, float)) and clip > 0):
            raise ValueError(f"clip is a positive bound on the gradient norm, or null for none; got {clip!r}.")
        self.clip = math.inf if clip is None else float(clip)
        self.log_every = whole(log_every, "log_every", 0)
        self.evaluate_every = whole(evaluate_every, "evaluate_every", 0)
        self.sample_every = whole(sample_every, "sample_every", 0)
        self.checkpoint_every = whole(checkpoint_every, "checkpoint_every", 0)
        self.snapshot_every = whole(snapshot_every, "snapshot_every", 0)
        self.keep_last, self.keep_best = whole(keep_last, "keep_last", 1), whole(keep_best, "keep_best", 0)
        if keep_best and not evaluate_every:
            raise ValueError("keep_best compares measurements, and evaluate_every=0 makes none.")
        if on_save_error not in ("stop", "warn"):
            raise ValueError(f"on_save_error is 'stop' or 'warn'; got {on_save_error!r}.")
        if not isinstance(background, bool):
            raise ValueError(f"background is true or false; got {background!r}.")
        if loss_scale is not None and not (isinstance(loss_scale, (int, float)) and loss_scale > 0):
            raise ValueError(f"loss_scale is a number above 0, or null for none; got {loss_scale!r}.")
        self.best, self.background, self.on_save_error = str(best), background, on_save_error
        self.loss_scale = loss_scale
        self.max_bad_steps = whole(max_bad_steps, "max_bad_steps", 1)

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
        for left in reversed(range(self.accumulate)):
            with run.parallel.exchange(now=left == 0):
                terms = run.terms()
                run.scale.up(terms.objective.mean() / self.accumulate).backward()
            run.tally.add(terms, 1 / self.accumulate)
        keep = self._clip(run)
        # the protocol of torch.amp.GradScaler: a fused step then does nothing
        run.optimizer.found_inf = (~keep).float()  # type: ignore[attr-defined]
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.scale.update(keep)
        seen = self.accumulate * run.order.batch_size
        run.step, run.images = run.step + 1, run.images + seen
        run.ema.update(run.loss, run.images, seen, keep)

    def _clip(self, run: Training) -> torch.Tensor:
        """Scales gradients to the bound, in place; whether the step is kept (a bool scalar on the device)."""
        grads = [local(torch.zeros_like(p) if p.grad is None else p.grad) for p in run.parameters]
        norms, factor = run.parallel.norms(grads), run.scale.factor()
        if factor is not None:
            norms = norms * factor
        keep, norm = run.tally.judge(norms, run.parallel.blame(), run.step + 1)
        if self.clip < math.inf:
            # clip_grad_norm_ of torch adds the same 1e-6
            bound = (self.clip / (norm.float() + 1e-6)).clamp(max=1.0)
            factor = bound if factor is None else factor * bound
        if factor is not None:
            torch._foreach_mul_(grads, factor)
        return keep

    def fit(
        self,
        run: Training,
        *,
        logger: Logger | None = None,
        folder: Path | None = None,
        config: Mapping[str, Any] | None = None,
        evaluate: Callable[[Training], Mapping[str, float]] | None = None,
        sample: Callable[[Training], Mapping[str, Path]] | None = None,
        snapshot: Callable[[Training], Any] | None = None,
        signals: Signals | None = None,
    ) -> None:
        """Trains from where `run` stands to the end.

        Args:
            run: what is trained, in place.
            logger: takes `train/…` and `eval/…` rows.
            folder: where checkpoints go; None for none.
            config: resolved configuration, kept in each checkpoint.
            evaluate: numbers to log every `evaluate_every`.
            sample: pictures to log every `sample_every`.
            snapshot: called every `snapshot_every`, to keep the averages.
            signals: what asks the run to end; None for nothing.

        With several processes all call it; rank 0 logs, measures, draws and writes while the others wait.

        Raises:
            TrainingDiverged: `max_bad_steps` or more skipped steps in a row; the last checkpoint is intact.
            Stopped: a signal came; the state after the last step is saved.
            CheckpointError: a checkpoint could not be written.
        """
        work = _Work(self, run, NullLogger() if logger is None else logger, config, signals or Signals())
        actions = {
            "log": (self.log_every, True, work.log),
            "evaluate": (self.evaluate_every, False, work.measure(evaluate)),
            "sample": (self.sample_every, False, work.draw(sample)),
            "snapshot": (self.snapshot_every, True, work.keep(snapshot)),
        }
        saver = None if folder is None or run.world.rank else self.saver(folder)
        run.loss.train()
        try:
            while True:
                for name, (every, at_end, action) in actions.items():
                    if self._due(name, every, run, at_end):
                        action()
                        run.marks[name] = run.images
                # the checkpoint comes last: a run that is resumed from it has these rows and files already
                if folder is not None and self._due("checkpoint", self.checkpoint_every, run, at_end=True):
                    work.save(saver)
                if run.images >= self.images:
                    break
                if code := run.world.agree(work.signals.code):
                    work.stop(saver, code)
                if saver is not None:
                    saver.check()
                work.step()
        except Interrupted:
            work.stop(saver, max(run.world.gather(work.signals.code)))
        finally:
            work.progress.close()
            if saver is not None:
                saver.close()

    def saver(self, folder: Path) -> Saver:
        """What writes checkpoints below `folder`."""
        return Saver(
            folder, keep_last=self.keep_last, keep_best=self.keep_best, background=self.background,
            go_on=self.on_save_error == "warn",
        )  # fmt: skip

    def _due(self, name: str, every: int, run: Training, at_end: bool) -> bool:
        done = run.marks.get(name, 0)
        passed = every > 0 and run.images // every > done // every
        return passed or (at_end and done < run.images >= self.images)


class _Work:
    """What one call of `fit` does between steps."""

    def __init__(self, trainer: Trainer, run: Training, logger: Logger, config: Any, signals: Signals):
        self.trainer, self.run, self.logger, self.signals = trainer, run, logger, signals
        self.config, self.first = dict(config or {}), run.step
        self.progress = Progress(trainer.images, run.images, device=run.device) if run.world.rank == 0 else Silent()
        self.skipped = run.tally.averages().skipped

    def step(self) -> None:
        run = self.run
        # the first compiles, perhaps for minutes, and nothing is lost if it is broken off; where the compiler swallows
        # what a signal raises, the step is finished and saved as any other
        alone = run.world.size == 1
        with self.signals.interruptible() if alone and run.step == self.first else run.world.watch():
            self.trainer.step(run)
        if run.step % self.trainer.max_bad_steps == 0:
            self.refuse_divergence(run.tally.streak())
        self.progress.update(run.images)

    def log(self) -> None:
        run, averages = self.run, self.run.averages(reset=True)
        self.progress.update(run.images, averages.loss)
        if averages.skipped > self.skipped:
            _log.warning("%d steps skipped so far, not finite; the last row of them from %s", averages.skipped,
                         averages.blame)  # fmt: skip
            self.skipped = averages.skipped
        self.refuse_divergence(averages.streak)
        if run.world.rank == 0:
            self.logger.log(self.row(averages), step=run.step, images=run.images)

    def row(self, averages: Averages) -> dict[str, float]:
        run, trainer = self.run, self.trainer
        row = {
            "train/loss": averages.loss,
            "train/grad_norm": averages.grad_norm,
            "train/lr": run.optimizer.param_groups[0]["lr"],
            "train/ema_decay": run.ema.decay(run.images, run.order.batch_size * trainer.accumulate),
            "train/imgs_per_s": self.progress.rate(run.images),
            "train/skipped": averages.skipped,
            **{f"train/loss_t{k}": loss for k, loss in enumerate(averages.by_time) if not math.isnan(loss)},
        }
        if run.device.type == "cuda":
            row["train/max_mem"] = torch.cuda.max_memory_allocated(run.device) / 2**30
        return row

    def measure(self, evaluate: Callable[[Training], Mapping[str, float]] | None) -> Callable[[], None]:
        def action() -> None:
            if evaluate is None:
                return
            values = self.lead(lambda: dict(evaluate(self.run)))
            if self.trainer.best in values:
                self.run.score = float(values[self.trainer.best]), self.run.images
            elif self.trainer.keep_best:
                raise ValueError(f"best={self.trainer.best} is none of what is measured: {', '.join(values)}.")
            if self.run.world.rank == 0:
                self.logger.log(values, step=self.run.step, images=self.run.images)

        return action

    def draw(self, sample: Callable[[Training], Mapping[str, Path]] | None) -> Callable[[], None]:
        def action() -> None:
            pictures = {} if sample is None else self.lead(lambda: dict(sample(self.run)))
            for key, path in pictures.items() if self.run.world.rank == 0 else ():
                self.logger.image(key, path, step=self.run.step, images=self.run.images)

        return action

    def keep(self, snapshot: Callable[[Training], Any] | None) -> Callable[[], None]:
        return lambda: None if snapshot is None else snapshot(self.run)

    def lead(self, task: Callable[[], Any]) -> Any:
        """`task` on rank 0, which a signal may break off."""
        self.run.refresh()

        def guarded() -> Any:
            with self.signals.interruptible():
                return task()

        with self.progress.paused():
            return self.run.world.leader(guarded)

    def save(self, saver: Saver | None) -> None:
        """Hands everything to the writer. Every process calls it, the writer is rank 0's."""
        run = self.run
        run.marks["checkpoint"] = run.images
        with self.progress.paused():
            tensors, records = run.tensors(), {**run.records(), "config": self.config}
            if saver is not None:
                self.logger.sync()  # no checkpoint is ahead of its rows
                score = None if run.score is None or run.score[1] != run.images else run.score[0]
                saver.save(run.step, tensors, records, score)

    def stop(self, saver: Saver | None, code: int) -> None:
        """Saves what is not saved yet, and raises `Stopped`."""
        run = self.run
        if run.step > self.first and run.marks.get("checkpoint", 0) != run.images:
            self.save(saver)
        if saver is not None:
            saver.close()
        raise Stopped(code, f"Stopped at step {run.step} ({run.images:,} images); everything is saved.")

    def refuse_divergence(self, streak: int) -> None:
        if streak < self.trainer.max_bad_steps:
            return
        run = self.run
        raise TrainingDiverged(
            f"Loss or gradient was not finite in {streak} steps in a row, from {run.averages().blame} "
            f"({run.images:,} images seen). The weights are those before it. A smaller learning rate, a longer warmup "
            "or float32 (denoiser.autocast=null) are the usual cures; check the data for NaN."
        )
