"""A trained model in Python: what it needs to sample and to score raw data, rebuilt from its folder."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import whole
from ..codecs import Codec
from ..config import ConfigError
from ..data import Dataset
from ..data import kinds as conditions
from ..data.kinds import Kind
from ..diffusion.conditions import Cond, move, named, take, unnamed
from ..diffusion.denoiser import Denoiser, model_device
from ..likelihood.divergence import Divergence
from ..likelihood.ode import LogLikelihood, log_likelihood
from ..likelihood.solver import Solver
from ..noise.rng import Rng
from ..sampling.sampler import Sampler
from .kept import read_data
from .progress import track
from .samplers import Model, recall


@dataclass(frozen=True, eq=False)
class Run:
    """A trained model with all that it needs to make and to score raw data; `scoresde.load` makes it.

    Attributes:
        folder: of the run, or the file that it was exported to.
        config: its resolved configuration.
        step: optimizer step of the checkpoint.
        digest: SHA-256 of the checkpoint's manifest, so of its weights.
        dataset: the samples that the folder keeps; all of the data where `whole_data` was called or the folder,
            written by an older scoresde, keeps none.
        denoiser: in eval mode, on the device, and measured; a classifier's run has that in its place.
        conditional: the network takes conditions.
        weights: which of the weights it has: "ema", "weights", or a length of average.
        allow: targets of the user's own that its configuration may name.
    """

    folder: Path
    config: dict[str, Any]
    step: int
    digest: str
    dataset: Dataset
    denoiser: Denoiser
    conditional: bool
    weights: str = "ema"
    allow: Sequence[str] = ()

    def __repr__(self) -> str:
        kind = "samples" if self.draws else "a classifier"
        told = f" given {' and '.join(self.kinds)}" if self.kinds else ""
        return f"Run({str(self.folder)!r}: {kind} of {self.dataset.name} {self.event_shape}{told}, step {self.step:,})"

    @property
    def draws(self) -> bool:
        """Whether samples can be drawn from its model, which is no classifier."""
        return self.denoiser.draws

    @property
    def codec(self) -> Codec:
        """Raw values to model data and back."""
        return self.dataset.scaling

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.dataset.event_shape

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their labels; empty where the data have none."""
        return self.dataset.names_of_classes

    @property
    def always_conditional(self) -> bool:
        """Whether the network is known never to have been trained without its condition; a classifier never is."""
        if not self.draws:
            return self.conditional
        gaps = self.dataset.statistics.gaps
        return self.conditional and self.config["network"].get("cond_dropout") == 0 and not gaps

    @functools.cached_property
    def kinds(self) -> dict[str, Kind]:
        """The conditions that the model was trained with, by name; none for an unconditional one."""
        return conditions.kinds_of(self.dataset, always=self.always_conditional) if self.conditional else {}

    def encode(self, raw: Tensor, *, rng: Rng | None = None) -> Tensor:
        """Model data of raw values (B, *event); `rng` dequantises integers, None takes the centres of their bins.

        Raises:
            TypeError, ValueError: values or a shape that the model was not trained on.
        """
        self._check_raw(raw)
        return self.codec.encode(raw, rng=rng)

    def decode(self, x: Tensor) -> Tensor:
        """Raw values of model data (B, *event)."""
        return self.codec.decode(x)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Run:
        """The run with its model on another device, or with weights of another dtype; the model is moved in place.

        Samples are drawn with bfloat16 and float16 weights too, for their state stays float32. Likelihoods want
        float32 or float64.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"Weights are floating-point numbers: torch.bfloat16, torch.float32 …; got {dtype}.")
        self.denoiser.to(device=device, dtype=dtype)
        return self

    def cond(self, given: Any, n: int) -> Cond:
        """The conditions of n samples.

        Args:
            given: the name or number of a class, a list or tensor of such, or a mapping by kind ("label", "vector",
                "image", "tokens") of numbers, tensors or file names. Rows are repeated in turn. None goes through the
                classes, or through the conditions of held-out samples, in turn.

        Raises:
            ValueError, OSError: a kind that the model was not trained with, one that is missing, or values that are
                not of the kind.
        """
        if given is None:
            return conditions.in_turn(self.dataset, n, self.conditional)
        given = given if isinstance(given, Mapping) else {"label": given}
        self.check_kinds(given)
        rows = {name: kind.rows(given[name]) for name, kind in self.kinds.items()}
        for name, values in rows.items():
            if len(values) > n:
                raise ValueError(f"cond has {len(values)} rows of {name} for {n} samples.")
        return unnamed({name: values[torch.arange(n) % len(values)] for name, values in rows.items()})

    def check_kinds(self, given: Mapping[str, Any]) -> None:
        """Refuses kinds of conditions that the model was not trained with, and some without others that it was.

        Raises:
            ConfigError: it is one of these.
        """
        listed = " and ".join(map(str, self.kinds.values()))
        for name, value in given.items():
            if name not in self.kinds:
                none = "without labels or other conditions (conditional=true)"
                what = f"with {listed}, and no {name}" if self.kinds else none
                raise ConfigError(f"cond.{name}={value}: {self.folder} was trained {what}.")
        if absent := [name for name in self.kinds if name not in given]:
            cure = f"give cond.{absent[0]}=… too, or cond=test:0-7 for all conditions of those held-out samples"
            raise ConfigError(f"{self.folder} was trained with {listed} together: {cure}.")

    def sample(
        self,
        n: int,
        *,
        cond: Any = None,
        budget: int | None = None,
        sampler: Sampler | None = None,
        rng: Rng | None = None,
        batch_size: int = 128,
        progress: bool = True,
    ) -> Tensor:
        """n samples as raw values (n, *event), on the CPU.

        Args:
            n: how many, ≥ 1.
            cond: see `Run.cond`; None goes through the classes, or the conditions of held-out samples, in turn.
            budget: network calls of a sample, by the sampler that was fitted to this run for so many, else by a generic
                one; default 20. Exclusive with `sampler`.
            sampler: any `Sampler`, without a budget.
            rng: source of the noise, default Rng(0). A single stream gives each sample a seed of its own, and
                `Rng(seeds=[…])` has one for each; sample k depends on its own alone, and not on `batch_size`.
            batch_size: samples at a time, ≥ 1.
            progress: show a bar on a terminal, and a line now and then elsewhere.

        Raises:
            ValueError: a number outside its range, both of budget and sampler, or a condition that is not the model's.
            SolverError: a sample that is not finite.
        """
        self._check_draws()
        told, streams = self.cond(cond, whole(n, "n, the number of samples,")), _streams(rng, n)
        if budget is not None and sampler is not None:
            raise ValueError(f"budget={budget} chooses a sampler; give budget= or sampler=, not both.")
        if sampler is None:
            sampler = self.sampler(20 if budget is None else budget, told)
        device, parts = model_device(self.denoiser), torch.arange(n).split(whole(batch_size, "batch_size"))

        def steps() -> Iterator[Tensor]:
            for part in parts:
                shape, own = (len(part), *self.event_shape), move(take(told, part), device)
                for trace in sampler.iterate(self.denoiser, shape, cond=own, rng=streams.rows(part)):
                    yield trace.x
                made.append(self.decode(trace.x.float().cpu()))

        made: list[Tensor] = []
        ticks = len(parts) * (sampler.steps + 1 + int(sampler.denoise))
        for _ in track(steps(), "sampling", ticks, show=progress):
            pass
        return torch.cat(made)

    def sampler(self, budget: int, cond: Cond = None) -> Sampler:
        """The sampler for a budget of network calls: the fitted one of the folder, or else a generic one.

        Raises:
            ValueError: a budget below 1, or a sampler that was fitted to other weights.
        """
        budget = whole(budget, "budget, the number of network calls,")
        model = Model(self.digest, self.weights, None, None, sorted(named(cond)))
        return recall(self.folder, model, budget, self.denoiser)[0]

    def log_likelihood(
        self,
        raw: Tensor,
        *,
        solver: Solver,
        cond: Any = None,
        divergence: Divergence | None = None,
        rng: Rng | None = None,
        t_min: float | None = None,
        batch_size: int = 64,
        progress: bool = True,
    ) -> LogLikelihood:
        """log p(raw) of each sample in nats, with `.bits_per_dim`, and what it is off by; see `log_likelihood`.

        Args:
            raw: raw values (B, *event), integers or floats as the training data were.
            solver: `Budget(calls)` or `Tolerance(rtol, atol)`; there is no default, for it is part of the result.
            cond: see `Run.cond`; None is p(raw) without a condition.
            divergence, t_min: as in `log_likelihood`.
            rng: source of dequantisation noise and probes, as in `sample`.
            batch_size, progress: as in `sample`.

        Raises:
            TypeError, ValueError: values, a shape or a condition that the model was not trained on.
            SolverError: a solve that failed; the samples are named.
        """
        self._check_draws()
        self._check_raw(raw)
        for parameter in itertools.islice(self.denoiser.parameters(), 1):
            if parameter.dtype in (torch.bfloat16, torch.float16):
                raise ValueError(
                    f"A likelihood integrates derivatives of the network, which {parameter.dtype} is too coarse for: "
                    "run.to(dtype=torch.float32) first, or load the run again."
                )
        if cond is None and self.always_conditional:
            raise ValueError(f"{self.folder} was never trained without its condition, so log p needs it: cond=….")
        n = len(raw)
        told, streams = None if cond is None else self.cond(cond, n), _streams(rng, n)
        device, parts = model_device(self.denoiser), torch.arange(n).split(whole(batch_size, "batch_size"))
        found: list[LogLikelihood] = []
        for part in track(parts, "log-likelihood", len(parts), show=progress):
            x0, own = raw[part].to(device), move(take(told, part), device)
            how: dict[str, Any] = {"divergence": divergence, "scaling": self.dataset.scaling, "t_min": t_min}
            found.append(log_likelihood(self.denoiser, x0, solver, cond=own, rng=streams.rows(part), **how))
        return _joined(found)

    def whole_data(self) -> Run:
        """The run with all of its data, read again as the configuration says, where the folder keeps a part.

        Raises:
            CheckpointError: they cannot be read.
        """
        if self.dataset.known is None:
            return self
        return replace(self, dataset=self.adopt(read_data(self.folder, self.config, self.allow, self.dataset.known)))

    def adopt(self, dataset: Dataset) -> Dataset:
        """The raw samples of a data set under the codec of this run, which a model is to be measured on.

        Raises:
            TypeError, ValueError: values or a shape that the model was not trained on.
        """
        if dataset.event_shape != self.event_shape:
            raise ValueError(
                f"{dataset.name} holds samples of shape {dataset.event_shape}, and {self.folder} was trained on "
                f"{self.event_shape}."
            )
        return dataclasses.replace(dataset, scaling=self.dataset.scaling)

    def _check_raw(self, raw: Tensor) -> None:
        if len(raw) == 0 or tuple(raw.shape[1:]) != self.event_shape:
            one = tuple(raw.shape) == self.event_shape
            raise ValueError(
                f"{self.folder} was trained on samples of shape {self.event_shape}, so a batch of them is "
                f"({', '.join(map(str, ('B', *self.event_shape)))}); got {tuple(raw.shape)}."
                f"{' A single sample is a batch of one: raw[None].' if one else ''}"
            )
        self.codec.check(raw)

    def _check_draws(self) -> None:
        if not self.draws:
            raise ValueError(
                f"{self.folder} is a classifier, of which there are no samples and no likelihood; it guides those of "
                "another run: scoresde.Classifier(run.denoiser, judge.denoiser, scale)."
            )


def _streams(rng: Rng | None, n: int) -> Rng:
    """One stream for each of n samples."""
    rng = Rng(0) if rng is None else rng
    if not rng.per_sample:
        return Rng(seeds=rng.integers(2**63 - 1, (n,)).tolist())
    if len(rng) != n:
        raise ValueError(f"Rng(seeds=[…]) has one seed for each sample; got {len(rng)} for {n}.")
    return rng


def _joined(parts: Sequence[LogLikelihood]) -> LogLikelihood:
    """The results of batches as that of all, on the CPU; the network calls are those of all batches."""

    def of(get: Callable[[LogLikelihood], Tensor]) -> Tensor:
        return torch.cat([get(part).cpu() for part in parts])

    return LogLikelihood(
        of(lambda r: r.log_prob),
        of(lambda r: r.stderr),
        of(lambda r: r.latent),
        sum(part.evaluations for part in parts),
        of(lambda r: r.divergence_error),
        of(lambda r: r.solver_error),
        parts[0].name,
    )
