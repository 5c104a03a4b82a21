"""The training loop."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from ..checks import positive, whole
from ..runs.checkpoint import save, sweep
from ..runs.logger import Logger, NullLogger
from .half import fast_half
from .progress import Progress
from .saver import Saver
from .signals import Interrupted, Signals, Stopped
from .slices import local
from .state import ACTIONS, TrainingState
from .tally import Averages

_log = logging.getLogger(__name__)


class TrainingDiverged(RuntimeError):
    """Too many steps in a row had a loss or gradient that was not finite."""


@dataclass(kw_only=True)
class Trainer:
    """Runs training until `images` images have been seen. Every length and interval counts images, not steps.

    The learning rate rises linearly over `warmup`, stays, and falls linearly to 0 over `cooldown` at the end. Where the
    two are longer than the whole training, both are scaled so that they fill it: it reaches its full rate. A step whose
    loss or gradient is not finite changes nothing (weights, moments, buffers, average) and is counted.

    Args:
        images: length of training, ≥ 1.
        batch_size: images per forward pass, ≥ 1.
        accumulate: forward passes per optimizer step, ≥ 1.
        warmup, cooldown: rising and falling part of the learning rate, ≥ 0.
        clip: bound on the gradient norm, > 0; None for none.
        log_every, evaluate_every, sample_every, checkpoint_every: intervals, ≥ 0; 0 is never (a checkpoint is
            written at the end in any case).
        snapshot_every: interval between snapshots of the averages, from which averages of other lengths can be made.
        keep_last: number of newest checkpoints that are kept, ≥ 1.
        keep_best: number of checkpoints kept besides for the lowest `best`, ≥ 0. A checkpoint has a score if it is
            written when `evaluate` was called.
        best: which of the numbers of `evaluate` is the score.
        final: "best" ends with the averages of the checkpoint with the lowest score, "last" with those of the last.
        background: copy checkpoints first and write them while training goes on; a kill meanwhile costs up to two
            intervals instead of one.
        on_save_error: "stop", or "warn" to go on without that checkpoint and try again at the next.
        max_bad_steps: steps in a row that may be skipped before training stops, ≥ 1.
        loss_scale: first value of the loss scale that float16 needs (65536, say); None for none.
        workers: processes that read samples ahead, ≥ 0, where they stay in files; no number depends on it.

    Raises:
        ValueError: a value outside its range.
    """

    images: int
    batch_size: int = 128
    accumulate: int = 1
    warmup: int = 0
    cooldown: int = 0
    clip: float | None = 1.0
    log_every: int = 5_000
    evaluate_every: int = 0
    sample_every: int = 0
    checkpoint_every: int = 0
    snapshot_every: int = 0
    keep_last: int = 2
    keep_best: int = 0
    best: str = "eval/loss"
    final: Literal["last", "best"] = "last"
    background: bool = True
    on_save_error: Literal["stop", "warn"] = "stop"
    max_bad_steps: int = 10
    loss_scale: float | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        above = ("images", "batch_size", "accumulate", "keep_last", "max_bad_steps")
        for name in (*above, "warmup", "cooldown", "keep_best", "workers", *(f"{action}_every" for action in ACTIONS)):
            setattr(self, name, whole(getattr(self, name), name, least=int(name in above)))
        if self.clip is not None:
            positive(self.clip, "clip", "null or a number")
        if self.keep_best and not self.evaluate_every:
            raise ValueError("keep_best compares measurements, and evaluate_every=0 makes none.")
        if self.final not in ("last", "best") or (self.final == "best" and not self.keep_best):
            raise ValueError(f"final is last, or best with keep_best=1 or more; got {self.final!r}.")

    def lr_scale(self, images: int) -> float:
        """Factor on the learning rate for a step that starts at `images`: above 0 at the first step and the last."""
        warmup, cooldown = self.ramps()
        rise = (images + self.batch_size * self.accumulate) / warmup if warmup else 1.0
        fall = (self.images - images) / cooldown if cooldown else 1.0
        return max(0.0, min(1.0, rise, fall))

    def ramps(self) -> tuple[float, float]:
        """Images over which the learning rate rises and falls: warmup and cooldown, scaled to fit into the training."""
        share = min(1.0, self.images / max(self.warmup + self.cooldown, 1))
        return self.warmup * share, self.cooldown * share

    def step(self, state: TrainingState) -> None:
        """One optimizer step: `accumulate` batches, clipped, skipped on the device if it is not finite."""
        for group in state.optimizer.param_groups:
            group.setdefault("peak_lr", group["lr"])
            group["lr"] = group["peak_lr"] * self.lr_scale(state.images)
        state.buffers.keep()
        for left in reversed(range(self.accumulate)):
            with state.parallel.exchange(now=left == 0), fast_half(state.device):
                terms = state.terms()
                state.scale.up(terms.objective.mean() / self.accumulate).backward()
            state.tally.add(terms, 1 / self.accumulate)
        keep = self._clip(state)
        # the protocol of torch.amp.GradScaler: a fused step then does nothing
        state.optimizer.found_inf = (~keep).float()  # type: ignore[attr-defined]
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.scale.update(keep)
        state.buffers.restore(unless=keep)
        seen = self.accumulate * state.order.batch_size
        state.step, state.images = state.step + 1, state.images + seen
        state.ema.update(state.loss, state.images, seen, keep)

    def _clip(self, state: TrainingState) -> torch.Tensor:
        """Scales gradients to the bound, in place. Returns whether the step is kept, a bool scalar on the device."""
        grads = [local(torch.zeros_like(p) if p.grad is None else p.grad) for p in state.parameters]
        norms, factor = state.parallel.norms(grads), state.scale.factor()
        if factor is not None:
            norms = norms * factor
        keep, norm = state.tally.judge(norms, state.parallel.blame(), state.step + 1)
        if self.clip is not None:
            # clip_grad_norm_ of torch adds the same 1e-6
            bound = (self.clip / (norm.float() + 1e-6)).clamp(max=1.0)
            factor = bound if factor is None else factor * bound
        if factor is not None:
            torch._foreach_mul_(grads, factor)
        return keep

    def fit(
        self,
        state: TrainingState,
        *,
        logger: Logger | None = None,
        folder: Path | None = None,
        config: Mapping[str, Any] | None = None,
        evaluate: Callable[[TrainingState], Mapping[str, float]] | None = None,
        sample: Callable[[TrainingState], Mapping[str, Path]] | None = None,
        snapshot: Callable[[TrainingState], Any] | None = None,
        signals: Signals | None = None,
    ) -> None:
        """Trains from where `state` stands to the end.

        Args:
            state: trained in place.
            logger: takes `train/…` and `eval/…` rows.
            folder: where checkpoints go; None for none.
            config: resolved configuration, kept in each checkpoint.
            evaluate: measures numbers to log, every `evaluate_every`.
            sample: draws pictures to log, every `sample_every`.
            snapshot: keeps the averages, every `snapshot_every`.
            signals: ask the run to end; None for no signals.

        With several processes all of them call it; rank 0 logs, measures, draws and writes while the others wait.

        Raises:
            TrainingDiverged: `max_bad_steps` or more skipped steps in a row; the last checkpoint is intact.
            Stopped: a signal came; the state after the last step is saved.
            CheckpointError: a checkpoint could not be written.
        """
        if self.warmup + self.cooldown > self.images > state.images and state.world.rank == 0:
            text = "warmup and cooldown (%s and %s images) are longer than the training of %s: scaled to %s and %s."
            lengths = (self.warmup, self.cooldown, self.images, *map(round, self.ramps()))
            _log.warning(text, *(f"{length:,}" for length in lengths))
        logger, signals = NullLogger() if logger is None else logger, signals or Signals()
        _FitLoop(self, state, logger, folder, dict(config or {}), evaluate, sample, snapshot, signals).run()


@dataclass
class _FitLoop:
    """One call of `Trainer.fit`: the steps, and what happens between them."""

    trainer: Trainer
    state: TrainingState
    logger: Logger
    folder: Path | None
    config: dict[str, Any]
    evaluate: Callable[[TrainingState], Mapping[str, float]] | None
    sample: Callable[[TrainingState], Mapping[str, Path]] | None
    snapshot: Callable[[TrainingState], Any] | None
    signals: Signals

    def __post_init__(self) -> None:
        trainer, state, leads = self.trainer, self.state, self.state.world.rank == 0
        self.first, self.skipped = state.step, state.tally.averages().skipped
        self.score: float | None = None  # what was measured after this step
        self.progress = Progress(trainer.images, state.images, device=state.device, show=leads)
        self.logger = self.logger if leads else NullLogger()
        self.saver = Saver(background=trainer.background, go_on=trainer.on_save_error == "warn")
        if leads and self.folder is not None and self.folder.is_dir():
            sweep(self.folder)  # a run that was killed after its last save makes no other

    def run(self) -> None:
        world = self.state.world
        self.state.loss.train()
        try:
            while True:
                self.act()
                if self.state.images >= self.trainer.images:
                    break
                if code := world.agree(self.signals.code):
                    self.stop(code)
                self.saver.check()
                self.step()
        except Interrupted:
            self.stop(max(world.gather(self.signals.code)))
        finally:
            self.progress.close()
            self.saver.close()
            self.state.loader.close()

    def act(self) -> None:
        """Does whatever is due at this number of images."""
        trainer, state = self.trainer, self.state
        # the checkpoint comes last: a run that is resumed from it has these rows and files already
        for name, every, at_end, action in (
            ("log", trainer.log_every, True, self.log),
            ("evaluate", trainer.evaluate_every, False, self.measure),
            ("sample", trainer.sample_every, False, self.draw),
            ("snapshot", trainer.snapshot_every, True, self.keep_averages),
            ("checkpoint", trainer.checkpoint_every, True, self.save),
        ):
            done = state.marks.get(name, 0)
            passed = every > 0 and state.images // every > done // every
            due = passed or (at_end and done < state.images >= trainer.images)
            if due and (name != "checkpoint" or self.folder is not None):
                action()
                state.marks[name] = state.images

    def step(self) -> None:
        state, self.score = self.state, None
        # the first compiles, perhaps for minutes, and nothing is lost if it is broken off; where the compiler swallows
        # what a signal raises, the step is finished and saved as any other
        alone = state.world.size == 1
        with self.signals.interruptible() if alone and state.step == self.first else state.world.watch():
            self.trainer.step(state)
        if state.step % self.trainer.max_bad_steps == 0:
            self.refuse_divergence(int(state.tally.streak))
        self.progress.update(state.images)

    def log(self) -> None:
        state, averages = self.state, self.state.tally.averages(reset=True)
        self.progress.update(state.images, averages.loss)
        if (skipped := averages.skipped) > self.skipped:
            self.skipped = skipped
            _log.warning("%d steps skipped so far, not finite; the last row of them from %s", skipped, averages.blame)
        self.refuse_divergence(averages.streak)
        self.logger.log(self.row(averages), step=state.step, images=state.images)

    def row(self, averages: Averages) -> dict[str, float]:
        state = self.state
        row = {
            "train/loss": averages.loss,
            "train/grad_norm": averages.grad_norm,
            "train/lr": state.optimizer.param_groups[0]["lr"],
            "train/ema_decay": state.ema.decays(state.images, state.order.batch_size * self.trainer.accumulate)[0],
            "train/imgs_per_s": self.progress.rate(state.images),
            "train/skipped": averages.skipped,
            **{f"train/loss_t{k}": loss for k, loss in enumerate(averages.by_time) if not math.isnan(loss)},
        }
        if state.device.type == "cuda":
            row["train/max_mem"] = torch.cuda.max_memory_allocated(state.device) / 2**30
        return row

    def measure(self) -> None:
        if self.evaluate is None:
            return
        state, values = self.state, self.lead(self.evaluate)
        if self.trainer.best in values:
            self.score = float(values[self.trainer.best])
        elif self.trainer.keep_best:
            raise ValueError(f"best={self.trainer.best} is not among what is measured: {', '.join(values)}.")
        self.logger.log(values, step=state.step, images=state.images)

    def draw(self) -> None:
        pictures = {} if self.sample is None else self.lead(self.sample)
        for key, path in pictures.items():
            self.logger.image(key, path, step=self.state.step, images=self.state.images)

    def keep_averages(self) -> None:
        if self.snapshot is not None:
            self.snapshot(self.state)

    def lead(self, task: Callable[[TrainingState], Mapping[str, Any]]) -> dict[str, Any]:
        """What `task` returns on rank 0, where a signal may break it off."""
        self.state.refresh()

        def interruptible() -> dict[str, Any]:
            with self.signals.interruptible():
                return dict(task(self.state))

        with self.progress.paused():
            return self.state.world.leader(interruptible)

    def save(self) -> None:
        """Hands copies of everything to the writer. Every process calls it, rank 0 writes."""
        if self.folder is None:
            return
        trainer, state = self.trainer, self.state
        if trainer.final == "best" and state.images >= trainer.images:
            self.saver.wait()
            self.score = state.take_best(self.folder, self.score)
        state.marks["checkpoint"] = state.images
        with self.progress.paused():
            tensors, records = state.tensors(), {**state.records(), "config": self.config}
            self.logger.sync()  # no checkpoint is ahead of its rows
            keep = {"keep_last": trainer.keep_last, "keep_best": trainer.keep_best}
            if state.world.rank == 0:
                self.saver.start(partial(save, self.folder, state.step, tensors, records, score=self.score, **keep))

    def stop(self, code: int) -> None:
        """Saves unless that is done already, and raises `Stopped`."""
        state = self.state
        if state.step > self.first and state.marks.get("checkpoint", 0) != state.images:
            self.save()
        self.saver.close()
        raise Stopped(code, f"Stopped at step {state.step} ({state.images:,} images); everything is saved.")

    def refuse_divergence(self, streak: int) -> None:
        if streak < self.trainer.max_bad_steps:
            return
        state = self.state
        raise TrainingDiverged(
            f"Loss or gradient was not finite in {streak} steps in a row, from {state.tally.averages().blame} "
            f"({state.images:,} images seen). The weights are those before it. A smaller learning rate, a longer "
            "warmup or float32 (denoiser.autocast=null) are the usual cures; check the data for NaN."
        )
