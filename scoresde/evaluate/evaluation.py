"""Measurements of a trained model: held-out loss, and samples with their cost."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import whole
from ..data import Dataset, Split
from ..diffusion.conditions import Cond, move, named, take
from ..diffusion.denoiser import CountingDenoiser, Denoiser, model_device
from ..losses.loss import Loss
from ..noise.rng import Rng
from ..runs.progress import track
from ..sampling import Sampler
from .shards import Job, Tensors, ranks

_DRAWS = 4096  # of noise in a loss that something is chosen by


def held_out_loss(loss: Loss, dataset: Dataset, *, conditional: bool = False, batch_size: int = 256) -> float:
    """Mean of the training loss over the test split, with noise and times that are the same at every call."""
    return held_out(loss, dataset, conditional=conditional, batch_size=batch_size)["loss"]


@torch.no_grad()
def held_out(
    loss: Loss, dataset: Dataset, *, conditional: bool = False, batch_size: int = 256, choosing: bool = False
) -> dict[str, float]:
    """Mean held-out metrics by name, see `Loss.measured`, with noise and times that are the same at every call.

    Args:
        loss, dataset, conditional, batch_size: what is measured, and how many samples at a time.
        choosing: what is found decides something (which checkpoint is kept). Then the validation split is measured, if
            there is one, and each of few samples with several draws of noise.
    """
    rng, split, device = Rng(0), dataset.test, model_device(loss.denoiser)
    totals: dict[str, float] = {}
    every = torch.arange(len(split))
    if choosing and dataset.validation is not None:
        split = dataset.validation
        every = torch.arange(len(split)).repeat(-(-_DRAWS // len(split)))
    parts = every.split(batch_size)
    for index in track(parts, "held-out loss, batches", len(parts), show=ranks()[0] == 0):
        x0, cond = dataset.drawn(split.raw[index], split.cond(index, conditional, device), rng, device)
        for name, values in loss.measured(x0, cond, rng=rng).items():
            totals[name] = totals.get(name, 0.0) + float(values.sum())
    return {name: total / len(every) for name, total in totals.items()}


def joined(batches: list[Tensors], name: str) -> Tensor:
    """What all batches have under a name, one after another."""
    return torch.cat([torch.atleast_1d(batch[name]) for batch in batches])


def costs(batches: list[Tensors]) -> tuple[float, float]:
    """(network calls per batch, on average; seconds of all)."""
    return float(joined(batches, "evaluations").double().mean()), float(joined(batches, "seconds").sum())


@dataclass(frozen=True)
class Samples:
    """Samples, and their cost.

    Attributes:
        x: (n, *event), model coordinates, on the CPU.
        cond: the condition of each, (n, …) or a mapping of such; None for none.
        frames: (f, k, *event): states of the first k samples along the way, noise first.
        times: (f,) their times.
        evaluations: network calls per batch, on average.
        seconds: time of all batches, added up.
    """

    x: Tensor
    cond: Cond
    frames: Tensor
    times: list[float]
    evaluations: float
    seconds: float


def by_suffix(made: Mapping[str, Samples]) -> Iterator[tuple[str, Samples]]:
    """The samples of each sampler, with what is put behind the names of its files: nothing for the first sampler."""
    for index, (name, samples) in enumerate(made.items()):
        yield f"-{name}" if index else "", samples


@dataclass(frozen=True)
class Drawing:
    """Which samples are drawn, one per seed. Sample k depends on `seeds[k]` alone.

    Attributes:
        event_shape: of one sample.
        seeds: one per sample.
        cond: the condition of each sample, (n, …) or a mapping of such; None for none.
        batch_size: samples at a time.
        frames, watched: how many states of how many samples of the first batch are kept, for a trajectory; None watches
            500 vectors, or 8 of other events.
        start: (denoiser, slice of the samples, their conditions, their Rng, device) -> the state that they start from;
            None draws it from the prior.
        skip: draws of each sample's stream that are not its own, as those of other stages of a cascade.
    """

    event_shape: Sequence[int]
    seeds: Sequence[int]
    cond: Cond = None
    batch_size: int = 128
    frames: int = 8
    watched: int | None = None
    start: Callable[[Denoiser, slice, Cond, Rng, torch.device], Tensor] | None = None
    skip: int = 0

    def jobs(self, denoiser: Denoiser, samplers: Mapping[str, Sampler]) -> dict[str, Job[Samples]]:
        """The work of every sampler, all from the same seeds."""
        return {name: self.job(denoiser, sampler, f"samples-{name}") for name, sampler in samplers.items()}

    def job(self, denoiser: Denoiser, sampler: Sampler, name: str = "samples") -> Job[Samples]:
        """The work of one sampler, under a name that tells it from others."""
        device, seeds, size = model_device(denoiser), list(self.seeds), self.batch_size
        watched = self.watched or (8 if len(self.event_shape) > 1 else 500)
        watch = _frame_indices(denoiser, sampler, self.frames)

        def batch(index: int) -> Iterator[Tensors]:
            part, kept, times = slice(index * size, (index + 1) * size), [], []
            shape, cond = (len(seeds[part]), *self.event_shape), move(take(self.cond, part), device)
            rng, counted = Rng(seeds=seeds[part]), CountingDenoiser(denoiser)
            rng.skip(self.skip)
            start = shape if self.start is None else self.start(counted, part, cond, rng, device)
            for trace in sampler.iterate(denoiser, start, cond=cond, rng=rng):
                if index == 0 and trace.index in watch:
                    kept.append(trace.x[:watched].cpu())
                    times.append(trace.t)
                yield {}
            made = {"x": trace.x.cpu(), "evaluations": torch.tensor(trace.evaluations + counted.evaluations)}
            if index == 0:
                made |= {"frames": torch.stack(kept), "times": torch.tensor(times, dtype=torch.float64)}
            yield made

        def merge(batches: list[Tensors]) -> Samples:
            x, first = joined(batches, "x"), batches[0]
            return Samples(x, self.cond, first["frames"], first["times"].tolist(), *costs(batches))

        digest = None if self.cond is None else digest_of(self.cond)
        settings = {**vars(self), "seeds": seeds, "cond": digest, "steps": sampler.steps, "watched": watched}
        del settings["start"]  # which the caller vouches for
        if not self.skip:
            del settings["skip"]
        count = math.ceil(len(seeds) / size)
        return Job(name, count, sampler.steps + 2 + int(sampler.denoise), batch, merge, settings)


def digest_of(cond: Cond) -> str:
    """SHA-256 of the numbers in a condition, their shapes and names."""
    found = hashlib.sha256()
    for name, value in sorted(named(cond, "").items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode() + value.cpu().numpy().tobytes())
    return found.hexdigest()


def _frame_indices(denoiser: Denoiser, sampler: Sampler, frames: int) -> set[int]:
    """Steps that are evenly spaced in log-SNR, where things happen, and the final denoising."""
    log_snr = denoiser.sde.log_snr(sampler.times(denoiser))
    wanted = torch.linspace(float(log_snr[0]), float(log_snr[-1]), frames, dtype=torch.float64)
    nearest = (log_snr[:, None] - wanted).abs().argmin(0)
    return {*nearest.tolist(), sampler.steps + 1}


def choose_split(dataset: Dataset, split: str) -> Split:
    """The split of that name.

    Raises:
        ValueError: it is neither train nor test.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is 'train' or 'test'; got {split!r}.")
    return dataset.train if split == "train" else dataset.test


def evenly_spaced(n: int, points: int | None, key: str = "n") -> Tensor:
    """`points` evenly spaced indices of range(n); all of them for None. `key` is what messages call them.

    Raises:
        ValueError: points outside 1 … n.
    """
    if points is None:
        return torch.arange(n)
    if not (1 <= points <= n):
        raise ValueError(f"{key} is between 1 and the {n} points of the split, or null for all; got {points}.")
    return torch.arange(whole(points, key)) * n // points
