"""What a trained model is asked for: held-out loss, held-out bits/dim, samples with their cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import Dataset, Split
from ..denoiser import Denoiser
from ..divergence import Divergence
from ..likelihood import bits_per_dim, log_likelihood
from ..loss import DenoisingLoss
from ..ode import check_solver
from ..rng import Rng
from ..sampling import Sampler
from .progress import track


def model_device(denoiser: Denoiser) -> torch.device:
    """Where the parameters of `denoiser` live; the CPU if it has none."""
    return next((parameter.device for parameter in denoiser.parameters()), torch.device("cpu"))


@torch.no_grad()
def held_out_loss(loss: DenoisingLoss, dataset: Dataset, *, conditional: bool = False, batch_size: int = 256) -> float:
    """Mean of the training loss over the test split, with noise and times that are the same at every call."""
    rng, total, split = Rng(0), 0.0, dataset.test
    device = model_device(loss.denoiser)
    for index in torch.arange(len(split)).split(batch_size):
        x0 = dataset.encode(split.raw[index], rng).to(device)
        total += float(loss(x0, split.cond(index, conditional, device), rng=rng).sum())
    return total / len(split)


@dataclass(frozen=True)
class BitsPerDim:
    """Held-out bits/dim by the probability-flow ODE.

    Attributes:
        mean: over the points.
        stderr: standard deviation over the points / √points: sampling of the points, of the dequantisation noise and
            of the probes.
        values: (points,), in the order of the split.
        points: number of points.
        evaluations: network calls per batch, on average.
        seconds: wall time.
    """

    mean: float
    stderr: float
    values: Tensor
    points: int
    evaluations: float
    seconds: float


class OdeLikelihood:
    """How likelihoods are measured: raw integers, uniform dequantisation, one adaptive solve per batch.

    Point i of n gets its own noise, of seed·n + i, so its value depends on neither batch size nor neighbours.

    Args:
        divergence: `Hutchinson(probes, kind)` or `Exact()`; default Hutchinson with one Rademacher probe.
        rtol, atol: tolerances of the solver, > 0.
        batch_size: points per solve, ≥ 1.
        backend, method: of the solver, see `scoresde.ode.integrate`.
        t_min: likelihood cut-off; None for the SDE's own.

    Raises:
        ValueError: tolerances, a batch size, a backend or a method that cannot work.
    """

    def __init__(
        self,
        divergence: Divergence | None = None,
        *,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        batch_size: int = 64,
        backend: str = "native",
        method: str | None = None,
        t_min: float | None = None,
    ):
        self.method = check_solver(backend, method, rtol, atol)
        if batch_size < 1:
            raise ValueError(f"batch_size is at least 1; got {batch_size}.")
        self.divergence, self.rtol, self.atol, self.batch_size = divergence, float(rtol), float(atol), batch_size
        self.backend, self.t_min = backend, t_min

    def __call__(
        self,
        denoiser: Denoiser,
        dataset: Dataset,
        *,
        split: str = "test",
        points: int | None = None,
        seed: int = 0,
        conditional: bool = False,
    ) -> BitsPerDim:
        """Bits/dim of `points` points of a split (None: all; else spread evenly over it).

        Raises:
            ValueError: an unknown split, or more points than it has.
            SolverError: a solve that failed; never a number instead.
        """
        data = choose_split(dataset, split)
        index = spread(len(data), points)
        device, start = model_device(denoiser), time.monotonic()
        values, calls = [], []
        for part in track(index.split(self.batch_size), "bits/dim"):
            result = log_likelihood(
                denoiser, data.raw[part].to(device), rtol=self.rtol, atol=self.atol, divergence=self.divergence,
                cond=data.cond(part, conditional, device),
                rng=Rng(seeds=[seed * len(data) + i for i in part.tolist()]),
                scaling=dataset.scaling, t_min=self.t_min, backend=self.backend, method=self.method,
            )  # fmt: skip
            values.append(bits_per_dim(result.log_prob, dataset.event_shape).double().cpu())
            calls.append(result.evaluations)
        bits = torch.cat(values)
        stderr = float(bits.std() / len(bits) ** 0.5) if len(bits) > 1 else float("nan")
        seconds = time.monotonic() - start
        return BitsPerDim(float(bits.mean()), stderr, bits, len(bits), sum(calls) / len(calls), seconds)


@dataclass(frozen=True)
class Samples:
    """What a sampler made, and at what cost.

    Attributes:
        x: (n, *event), model coordinates, on the CPU.
        labels: (n,) or None.
        frames: (f, k, *event): states of the first k samples along the way, noise first.
        times: (f,) their times.
        evaluations: network calls per batch, on average.
        seconds: wall time for all n.
    """

    x: Tensor
    labels: Tensor | None
    frames: Tensor
    times: list[float]
    evaluations: float
    seconds: float


def draw(
    denoiser: Denoiser,
    sampler: Sampler,
    event_shape: Sequence[int],
    *,
    seeds: Sequence[int],
    labels: Tensor | None = None,
    batch_size: int = 128,
    frames: int = 8,
    watched: int = 8,
) -> Samples:
    """One sample per seed. Sample k depends on `seeds[k]` alone.

    Args:
        denoiser, sampler: the model and the way back.
        event_shape: of one sample.
        seeds: one per sample.
        labels: (n,) class labels, None for none.
        batch_size: samples at a time.
        frames, watched: how many states of how many samples to keep for a trajectory.
    """
    device, start = model_device(denoiser), time.monotonic()
    parts, calls, kept, times = [], [], [], []
    watch = _frame_indices(denoiser, sampler, frames)
    for first in range(0, len(seeds), batch_size):
        part = list(seeds[first : first + batch_size])
        cond = None if labels is None else labels[first : first + batch_size].to(device)
        run = sampler.iterate(denoiser, (len(part), *event_shape), cond=cond, rng=Rng(seeds=part))
        for trace in track(run, f"samples {first}–{first + len(part) - 1}", sampler.steps + 1 + int(sampler.denoise)):
            if first == 0 and trace.index in watch:
                kept.append(trace.x[:watched].cpu())
                times.append(trace.t)
        parts.append(trace.x.cpu())
        calls.append(trace.evaluations)
    seconds = time.monotonic() - start
    return Samples(torch.cat(parts), labels, torch.stack(kept), times, sum(calls) / len(calls), seconds)


def _frame_indices(denoiser: Denoiser, sampler: Sampler, frames: int) -> set[int]:
    """Steps spread evenly in log-SNR, where things happen, and the final denoising."""
    log_snr = denoiser.sde.log_snr(sampler.grid(denoiser.sde, sampler.steps).double())
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


def spread(n: int, points: int | None) -> Tensor:
    """`points` indices spread evenly over range(n); all of them for None.

    Raises:
        ValueError: points outside 1 … n.
    """
    if points is None:
        return torch.arange(n)
    if not (1 <= points <= n):
        raise ValueError(f"n is between 1 and the {n} points of the split, or null for all; got {points}.")
    return torch.arange(points) * n // points
