"""Measurements of a trained model: held-out loss, held-out bits/dim, samples with their cost."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..checks import whole
from ..data import Dataset, Split
from ..diffusion.conditions import Cond, move, named, take
from ..diffusion.denoiser import CountingDenoiser, Denoiser, model_device
from ..diffusion.prediction import Prediction
from ..likelihood.bounds import ode_bound
from ..likelihood.divergence import Divergence, Hutchinson
from ..likelihood.ode import LogLikelihood, bits_per_dim, log_likelihood
from ..likelihood.solver import Solver
from ..likelihood.tolerance import Tolerance
from ..losses.loss import Loss
from ..noise.rng import Rng
from ..runs.progress import track
from ..sampling import Sampler
from .shards import Job, Tensors, ranks


def held_out_loss(loss: Loss, dataset: Dataset, *, conditional: bool = False, batch_size: int = 256) -> float:
    """Mean of the training loss over the test split, with noise and times that are the same at every call."""
    return held_out(loss, dataset, conditional=conditional, batch_size=batch_size)["loss"]


@torch.no_grad()
def held_out(loss: Loss, dataset: Dataset, *, conditional: bool = False, batch_size: int = 256) -> dict[str, float]:
    """Mean held-out metrics by name, see `Loss.measured`, with noise and times that are the same at every call."""
    rng, split, device = Rng(0), dataset.test, model_device(loss.denoiser)
    totals: dict[str, float] = {}
    for index in torch.arange(len(split)).split(batch_size):
        x0 = dataset.encode(split.raw[index], rng).to(device)
        for name, values in loss.measured(x0, split.cond(index, conditional, device), rng=rng).items():
            totals[name] = totals.get(name, 0.0) + float(values.sum())
    return {name: total / len(split) for name, total in totals.items()}


@dataclass(frozen=True)
class BitsPerDim:
    """Held-out bits/dim by the probability-flow ODE.

    Attributes:
        mean: over the points.
        stderr: standard deviation over the points / √points: sampling of the points, of the dequantisation noise and
            of the probes.
        solver_error: what the solver may have added to the mean: mean over the points of its own upper estimate, NaN
            where it has none.
        values: (points,), in the order of the split.
        points: number of points.
        evaluations: network calls per batch, on average.
        seconds: time of all batches, added up.
        estimator: the name under which it is logged.
    """

    mean: float
    stderr: float
    solver_error: float
    values: Tensor
    points: int
    evaluations: float
    seconds: float
    estimator: str = "bpd/ode"

    @property
    def meaning(self) -> str:
        """Of what this is the number."""
        return "a bound for the data" if self.estimator == "bpd/ode-bound" else "the density at t_min"


class _Shown(CountingDenoiser):
    """Shows the network calls of one solve as they come."""

    def __init__(self, denoiser: Denoiser, label: str, total: int | None):
        super().__init__(denoiser)
        self.calls = track(itertools.repeat(None), label, total, show=ranks()[0] == 0)

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        next(self.calls)
        return super().forward(x, t, cond)


class OdeLikelihood:
    """How likelihoods are measured: raw integers, uniform dequantisation, one solve per batch.

    Point i of n gets its own noise, of seed·n + i, so its value depends on neither batch size nor neighbours.

    Args:
        divergence: `Hutchinson(probes, kind)`, `Exact()` …; default Hutchinson with one Rademacher probe.
        solver: `Tolerance(rtol, atol)`, by default to 1e-5, or `Budget(calls)`.
        batch_size: points per solve, ≥ 1.
        t_min: likelihood cut-off; None for the SDE's own.
        bound: "dequantised" or "centres" for a bound on the probability of integers (`ode_bound`) that the network was
            trained on with uniform noise or as centres of their bins; None for the density of the data at t_min.

    Raises:
        ValueError: a batch size below 1, another bound.
    """

    def __init__(
        self,
        divergence: Divergence | None = None,
        *,
        solver: Solver | None = None,
        batch_size: int = 64,
        t_min: float | None = None,
        bound: str | None = None,
    ):
        if bound not in (None, "dequantised", "centres"):
            raise ValueError(f"bound is 'dequantised', 'centres' or null; got {bound!r}.")
        self.divergence, self.solver, self.t_min = divergence or Hutchinson(), solver or Tolerance(1e-5, 1e-5), t_min
        self.batch_size, self.bound = whole(batch_size, "batch_size"), bound

    def cost(self, event_shape: Sequence[int]) -> str:
        """What a batch costs, in words."""
        calls = self.solver.accuracy.get("budget", "as many as the tolerance takes")
        products = self.divergence.products(math.prod(event_shape))
        return f"network calls for each {self.batch_size} points: {calls}, each with {products:,} backward products"

    def job(
        self,
        denoiser: Denoiser,
        dataset: Dataset,
        *,
        split: str = "test",
        points: int | None = None,
        seed: int = 0,
        conditional: bool = False,
    ) -> Job[BitsPerDim]:
        """The work of measuring bits/dim on `points` evenly spaced points of a split, None for all of them.

        Its batches raise `SolverError` where a solve fails; there is never a number instead.

        Raises:
            ValueError: an unknown split, or more points than it has.
        """
        data = choose_split(dataset, split)
        parts = evenly_spaced(len(data), points).split(self.batch_size)
        device = model_device(denoiser)
        solve: Callable[..., LogLikelihood]
        solve = log_likelihood if self.bound is None else partial(ode_bound, dequantised=self.bound == "dequantised")
        how: dict[str, Any] = {"divergence": self.divergence, "scaling": dataset.scaling, "t_min": self.t_min}

        def batch(index: int) -> Iterator[Tensors]:
            part = parts[index]
            x, cond = data.raw[part].to(device), data.cond(part, conditional, device)
            rng = Rng(seeds=[seed * len(data) + i for i in part.tolist()])
            shown = _Shown(denoiser, f"network calls, batch {index + 1}", self.solver.settings.get("budget"))
            result = solve(shown, x, self.solver, cond=cond, rng=rng, **how)
            yield {
                "bits": bits_per_dim(result.log_prob, dataset.event_shape).double().cpu(),
                "solver_error": bits_per_dim(-result.solver_error, dataset.event_shape).double().cpu(),
                "evaluations": torch.tensor(result.evaluations),
            }

        what = {"split": split, "points": points, "of": len(data), "seed": seed, "conditional": conditional}
        settings = {
            **what,
            "batch_size": self.batch_size,
            **self.solver.settings,
            "t_min": self.t_min,
            "bound": self.bound,
        }
        estimator = "bpd/ode" if self.bound is None else "bpd/ode-bound"
        return Job("bits_per_dim", len(parts), 1, batch, partial(_bits_per_dim, estimator), settings)


def _bits_per_dim(estimator: str, batches: list[Tensors]) -> BitsPerDim:
    bits, errors = _joined(batches, "bits"), _joined(batches, "solver_error")
    stderr = float(bits.std() / len(bits) ** 0.5) if len(bits) > 1 else float("nan")
    return BitsPerDim(float(bits.mean()), stderr, float(errors.mean()), bits, len(bits), *_costs(batches), estimator)


def _joined(batches: list[Tensors], name: str) -> Tensor:
    return torch.cat([torch.atleast_1d(batch[name]) for batch in batches])


def _costs(batches: list[Tensors]) -> tuple[float, float]:
    """(network calls per batch, on average; seconds of all)."""
    return float(_joined(batches, "evaluations").double().mean()), float(_joined(batches, "seconds").sum())


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
    """

    event_shape: Sequence[int]
    seeds: Sequence[int]
    cond: Cond = None
    batch_size: int = 128
    frames: int = 8
    watched: int | None = None

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
            for trace in sampler.iterate(denoiser, shape, cond=cond, rng=Rng(seeds=seeds[part])):
                if index == 0 and trace.index in watch:
                    kept.append(trace.x[:watched].cpu())
                    times.append(trace.t)
                yield {}
            made = {"x": trace.x.cpu(), "evaluations": torch.tensor(trace.evaluations)}
            if index == 0:
                made |= {"frames": torch.stack(kept), "times": torch.tensor(times, dtype=torch.float64)}
            yield made

        def merge(batches: list[Tensors]) -> Samples:
            x, first = _joined(batches, "x"), batches[0]
            return Samples(x, self.cond, first["frames"], first["times"].tolist(), *_costs(batches))

        digest = None if self.cond is None else digest_of(self.cond)
        settings = {**vars(self), "seeds": seeds, "cond": digest, "steps": sampler.steps, "watched": watched}
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


def evenly_spaced(n: int, points: int | None) -> Tensor:
    """`points` evenly spaced indices of range(n); all of them for None.

    Raises:
        ValueError: points outside 1 … n.
    """
    if points is None:
        return torch.arange(n)
    if not (1 <= points <= n):
        raise ValueError(f"n is between 1 and the {n} points of the split, or null for all; got {points}.")
    return torch.arange(points) * n // points
