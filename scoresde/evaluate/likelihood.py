"""Bits/dim of given data under a trained model, point by point: by the probability-flow ODE, or a bound."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..checks import whole
from ..codecs import Codec
from ..data import Dataset
from ..diffusion.conditions import Cond, told
from ..diffusion.denoiser import Denoiser, model_device
from ..diffusion.sde import SDE
from ..likelihood.bounds import elbo, ode_bound
from ..likelihood.divergence import Divergence, Hutchinson
from ..likelihood.latent import latent_bound
from ..likelihood.ode import LogLikelihood, bits_per_dim, log_likelihood
from ..likelihood.solver import Solver, whose_at_rest
from ..likelihood.terms import Bound
from ..likelihood.tolerance import Tolerance
from ..metrics.jackknife import mean_score
from ..noise.rng import Rng
from ..runs.progress import CallsShown
from .evaluation import choose_split, costs, evenly_spaced, joined
from .shards import Job, Tensors, ranks

_MEANINGS = {
    "bpd/ode": "the density at t_min",
    "bpd/flow-map": "the density of what the map's steps make",
    "bpd/ode-bound": "a bound for the data",
    "bpd/elbo": "a bound for the data by the reverse SDE",
    "bpd/latent-bound": "a bound for the data, through their latents",
    "bpd/latent-elbo": "a bound for the data by the reverse SDE, through their latents",
    "bpd/vlb": "a bound for the data by the steps of its table",
}


@dataclass(frozen=True)
class BitsPerDim:
    """Bits/dim of points.

    Attributes:
        mean: over the points.
        stderr: standard deviation over the points / √points: sampling of the points, of the dequantisation noise and
            of the probes or draws.
        solver_error: what the solver may have added to the mean: mean over the points of its own upper estimate, NaN
            where it has none.
        values: (points,), in the order of the split.
        errors: (points,) standard error of each value: of its probes or draws, and of the solver; NaN where it is not
            known.
        points: number of points.
        evaluations: network calls per batch, on average.
        seconds: time of all batches, added up.
        estimator: the name under which it is logged.
    """

    mean: float
    stderr: float
    solver_error: float
    values: Tensor
    errors: Tensor
    points: int
    evaluations: float
    seconds: float
    estimator: str = "bpd/ode"

    @property
    def meaning(self) -> str:
        """Of what this is the number."""
        return _MEANINGS[self.estimator]

    @property
    def record(self) -> dict[str, Any]:
        """All but what there is for each point."""
        return {name: value for name, value in asdict(self).items() if name not in ("values", "errors")}


class Measured(NamedTuple):
    """Of a batch, in nats, (B,): log p, its standard error, the solver's own part of it (NaN: unknown), and calls."""

    log_prob: Tensor
    stderr: Tensor
    of_solver: Tensor
    evaluations: int


class Likelihood(abc.ABC):
    """How likelihoods are measured, in batches.

    Point i of n gets its own noise, of seed·n + i, so its value depends on neither batch size nor neighbours.

    Attributes:
        batch_size: points at a time, ≥ 1.
        t_min: likelihood cut-off; None for the SDE's own.
        estimator: the name under which the number is logged.
        how: what measures it, in words.
        dequantises: integers get uniform noise.
        calls: network calls of a batch; None where the tolerance says.
    """

    estimator: str
    how: str
    dequantises: bool
    calls: int | None

    def __init__(self, batch_size: int, t_min: float | None):
        self.batch_size, self.t_min = whole(batch_size, "batch_size"), t_min

    @property
    @abc.abstractmethod
    def accuracy(self) -> Mapping[str, float]:
        """The settings that a number has to be quoted with."""

    @property
    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """All settings that a value depends on, as JSON takes them."""

    @abc.abstractmethod
    def named(self, codec: Codec) -> str:
        """The estimator that data under this codec have.

        Raises:
            ValueError: there is none.
        """

    @abc.abstractmethod
    def cost(self, event_shape: Sequence[int], sde: SDE) -> str:
        """What a batch costs, in words."""

    def calls_on(self, sde: SDE) -> int | None:
        """Network calls of a batch; None where the tolerance says.

        Raises:
            ValueError: a cut-off outside the times of the SDE, or a process that it is no likelihood of.
        """
        sde.cut_off(self.t_min, "likelihood")
        return self.calls

    def whose(self, denoiser: Denoiser) -> str:
        """Whose density it is, in words; "" where that goes without saying.

        Raises:
            ValueError: a model that it is no likelihood of, whatever its SDE.
        """
        return whose_at_rest(denoiser)

    @abc.abstractmethod
    def measure(self, denoiser: Denoiser, raw: Tensor, codec: Codec, cond: Cond, rng: Rng) -> Measured:
        """log p of raw samples (B, *raw shape), in their own coordinates."""

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
            ValueError: an unknown split, more points than it has, a cut-off outside the SDE's times, a seed too large.
        """
        self.whose(denoiser)  # refuses one that it has no density of
        data, estimator = choose_split(dataset, split), self.named(dataset.codec)
        calls = self.calls_on(denoiser.sde)
        whole((whole(seed, "seed", 0) + 1) * len(data), f"seed + 1, times the {len(data)} points that draw from it,")
        parts = evenly_spaced(len(data), points).split(self.batch_size)
        device, event = model_device(denoiser), dataset.raw_shape

        def batch(index: int) -> Iterator[Tensors]:
            part = parts[index]
            x, cond = data.raw[part].to(device), data.cond(part, conditional, device)
            rng = Rng(seeds=[seed * len(data) + i for i in part.tolist()])
            label, show = f"network calls, batch {index + 1}", ranks()[0] == 0
            drawn = dataset.codec.drawn(x, rng)
            with CallsShown(denoiser, label, calls, show=show) as shown:
                found = self.measure(shown, drawn.values, drawn.codec, told(cond, drawn.told), rng)
            nats = {"bits": found.log_prob + drawn.log_volume, "errors": -found.stderr, "of_solver": -found.of_solver}
            bits = {name: bits_per_dim(each, event).double().cpu() for name, each in nats.items()}
            yield {**bits, "evaluations": torch.tensor(found.evaluations)}

        def merge(batches: list[Tensors]) -> BitsPerDim:
            bits, errors, of_solver = (joined(batches, name) for name in ("bits", "errors", "of_solver"))
            mean = mean_score(bits)
            means = (mean.value, mean.stderr, float(of_solver.mean()))
            return BitsPerDim(*means, bits, errors, len(bits), *costs(batches), estimator)

        what = {"split": split, "points": points, "of": len(data), "seed": seed, "conditional": conditional}
        settings = {**what, "batch_size": self.batch_size, **self.settings, "t_min": self.t_min, "errors": True}
        return Job("bits_per_dim", len(parts), 1, batch, merge, settings)


class OdeLikelihood(Likelihood):
    """By the probability-flow ODE: raw integers, uniform dequantisation, one solve per batch.

    Args:
        divergence: `Hutchinson(probes, kind)`, `Exact()` …; default Hutchinson with one Rademacher probe.
        solver: `Tolerance(rtol, atol)`, by default to 1e-5, or `Budget(calls)`; `FlowMapSteps(n)` of a flow map.
        batch_size: points per solve, ≥ 1.
        t_min: likelihood cut-off; None for the SDE's own.
        bound: "dequantised" or "centres" for a bound on the probability of integers (`ode_bound`) that the network was
            trained on with uniform noise or as centres of their bins; None for the density of the data at t_min.
        draws: of latents, draws of z for each point (`latent_bound`), ≥ 1; None for one.

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
        draws: int | None = None,
    ):
        if bound not in (None, "dequantised", "centres"):
            raise ValueError(f"bound is 'dequantised', 'centres' or null; got {bound!r}.")
        super().__init__(batch_size, t_min)
        self.divergence, self.solver, self.bound = divergence or Hutchinson(), solver or Tolerance(1e-5, 1e-5), bound
        self.estimator, self.calls = self.solver.estimator, self.solver.settings.get("budget")
        if bound is not None and self.estimator != "bpd/ode":
            raise ValueError(f"bound={bound!r} is of the ODE, and a flow map's steps have a density: bound=null.")
        if bound is not None:
            self.estimator = "bpd/ode-bound"
        self.how, self.dequantises = self.solver.how, bound != "centres"
        self.draws = None if draws is None else whole(draws, "draws", otherwise="null for one")

    @property
    def accuracy(self) -> Mapping[str, float]:
        return {**self.solver.accuracy, **({} if self.draws is None else {"draws": self.draws})}

    @property
    def settings(self) -> dict[str, Any]:
        return {**self.solver.settings, "bound": self.bound} | ({} if self.draws is None else {"draws": self.draws})

    def whose(self, denoiser: Denoiser) -> str:
        return self.solver.whose(denoiser)

    def named(self, codec: Codec) -> str:
        if codec.bound and self.bound is not None:
            raise ValueError(
                f"likelihood.bound={self.bound} is of integers with uniform noise; latents are a bound by themselves, "
                "which takes integers as they are: likelihood.bound=null."
            )
        if self.draws is not None and not codec.bound:
            raise ValueError(f"likelihood.draws={self.draws} is of latents, and these data have none: null.")
        return "bpd/latent-bound" if codec.bound else self.estimator

    def cost(self, event_shape: Sequence[int], sde: SDE) -> str:
        calls = self.solver.accuracy.get("budget", "as many as the tolerance takes")
        products = self.divergence.products(math.prod(event_shape))
        return f"network calls for each {self.batch_size} points: {calls}, each with {products:,} backward products"

    def measure(self, denoiser: Denoiser, raw: Tensor, codec: Codec, cond: Cond, rng: Rng) -> Measured:
        solve: Callable[..., LogLikelihood] = log_likelihood
        if self.bound is not None:
            solve = partial(ode_bound, dequantised=self.bound == "dequantised")
        elif codec.bound and self.draws is not None:
            solve = partial(latent_bound, samples=self.draws)
        how: dict[str, Any] = {"divergence": self.divergence, "scaling": codec, "t_min": self.t_min}
        found = solve(denoiser, raw, self.solver, cond=cond, rng=rng, **how)
        return Measured(found.log_prob, found.stderr, found.solver_error, found.evaluations)


class Elbo(Likelihood):
    """By the variational bound of continuous time (`elbo`), which no ODE and no backward product goes into.

    Args:
        samples: draws of noise and its level for each point, ≥ 1; a single one has no standard error.
        batch_size: points at a time, ≥ 1.
        t_min: likelihood cut-off; None for the SDE's own.
        bound: how the network was trained on integers, "dequantised" by uniform noise or as "centres" of their bins. It
            cannot tell where in a bin a value is if that was noise, and the bound of the centres is then bits too high.

    Raises:
        ValueError: a batch size or number of samples below 1, another bound.
    """

    estimator, how = "bpd/elbo", "by the variational bound of continuous time"

    def __init__(
        self,
        *,
        samples: int = 64,
        batch_size: int = 64,
        t_min: float | None = None,
        bound: Literal["dequantised", "centres"] = "dequantised",
    ):
        super().__init__(batch_size, t_min)
        self.calls = self.samples = whole(samples, "samples")
        self.bound, self.dequantises = bound, bound == "dequantised"

    @property
    def accuracy(self) -> Mapping[str, float]:
        return {"samples": self.samples}

    @property
    def settings(self) -> dict[str, Any]:
        return {"samples": self.samples, "bound": f"elbo, {self.bound}"}

    def named(self, codec: Codec) -> str:
        if codec.bound and not self.dequantises:
            raise ValueError(
                "likelihood.bound=centres is of integers; latents are drawn: likelihood.bound=dequantised."
            )
        return "bpd/latent-elbo" if codec.bound else self.estimator

    def cost(self, event_shape: Sequence[int], sde: SDE) -> str:
        return f"network calls for each {self.batch_size} points: {self.calls_on(sde)}"

    def measure(self, denoiser: Denoiser, raw: Tensor, codec: Codec, cond: Cond, rng: Rng) -> Measured:
        how: dict[str, Any] = {"cond": cond, "rng": rng}
        if self.dequantises:  # log P(raw) is at least the mean of log p(raw + u), and that of its bound
            x = codec.encode(raw, rng=rng)
            found = self.bound_of(denoiser, x, **how)
            log_prob = found.log_prob + codec.log_volume(raw, x)
        else:
            found = self.bound_of(denoiser, raw, scaling=codec, **how)
            log_prob = found.log_prob
        return Measured(log_prob, found.stderr, torch.full_like(log_prob, math.nan), found.evaluations)

    def bound_of(self, denoiser: Denoiser, x: Tensor, **how: Any) -> Bound:
        """The bound of a batch."""
        return elbo(denoiser, x, samples=self.samples, t_min=self.t_min, **how)
