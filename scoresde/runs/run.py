"""A trained model in Python: what it needs to sample and to score raw data, rebuilt from its folder."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import whole
from ..data import Dataset, Text
from ..data.excerpt import excerpt, packed
from ..diffusion.conditions import Cond, move, named, take, told
from ..diffusion.denoiser import model_device
from ..likelihood.divergence import Divergence
from ..likelihood.latent import latent_bound
from ..likelihood.ode import LogLikelihood, log_likelihood
from ..likelihood.solver import Solver
from ..noise.rng import Rng
from ..sampling.edit import interpolate
from ..sampling.sampler import Sampler
from . import bundle, samplers
from .batches import joined, streams_of
from .kept import read_data
from .model import Guidance, LoadedModel
from .progress import track


def _reread(dataset: Dataset, text: Text) -> Dataset:
    """The data set with its sentences as another text reads them."""
    splits, own = [], dataset.text
    assert own is not None
    for split in (dataset.train, dataset.test):
        sentences = [own.sentence(row) for row in split.conditions["text"]]
        told = {**split.conditions, "text": text.rows(sentences, dataset.name)}
        splits.append(dataclasses.replace(split, conditions=told))
    return dataclasses.replace(dataset, train=splits[0], test=splits[1], text=text)


@dataclass(frozen=True, eq=False)
class Run(LoadedModel):
    """A trained model with all that it needs to make and to score raw data; `scoresde.load` makes it."""

    @functools.cached_property
    def _guided_trials(self) -> dict[str, dict[Any, Any]]:
        return {}

    def __repr__(self) -> str:
        kind = "samples" if self.draws else self.denoiser.kind
        told = f" given {' and '.join(self.kinds)}" if self.kinds else ""
        return f"Run({str(self.folder)!r}: {kind} of {self.dataset.name} {self.raw_shape}{told}, step {self.step:,})"

    def encode(self, raw: Tensor, *, rng: Rng | None = None) -> Tensor:
        """Model data of raw values (B, *raw shape); `rng` dequantises integers, None takes the centres of their bins.

        Raises:
            TypeError, ValueError: values or a shape that the model was not trained on.
        """
        return self.codec.encode(self._checked(raw), rng=rng)

    def decode(self, x: Tensor) -> Tensor:
        """Raw values of model data (B, *event)."""
        return self.codec.decode(x.to(model_device(self.denoiser))).to(x.device)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Run:
        """The run with its model on another device, or with weights of another dtype; the model is moved in place.

        Samples are drawn with bfloat16 and float16 weights too, for their state stays float32. Likelihoods want
        float32 or float64.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"Weights are floating-point numbers: torch.bfloat16, torch.float32 …; got {dtype}.")
        self.denoiser.to(device=device, dtype=dtype)
        return self

    def sample(
        self,
        n: int,
        *,
        cond: Any = None,
        budget: int | None = None,
        sampler: Sampler | None = None,
        guidance: Guidance = None,
        negative: str | None = None,
        rng: Rng | None = None,
        batch_size: int = 128,
        progress: bool = True,
    ) -> Tensor:
        """n samples as raw values (n, *raw shape), on the CPU.

        Args:
            n: how many, ≥ 1.
            cond: see `Run.cond`; None goes through the classes, or the conditions of held-out samples, in turn.
            budget: network calls of a sample, by the sampler that was fitted to this run for so many, else by one that
                a trial of some hundred calls chooses the first time; default 20. Exclusive with `sampler`. Of a flow
                map, the number of its steps; default 1.
            sampler: any `Sampler`, without a budget.
            guidance: the scale of classifier-free guidance, 1 for none; or what the files of conf/guidance hold, a
                mapping with `_target_`. None is the model itself.
            negative: a sentence that classifier-free guidance leads away from, in place of none.
            rng: source of the noise, default Rng(0). A single stream gives each sample a seed of its own, and
                `Rng(seeds=[…])` has one for each; sample k depends on its own alone, and not on `batch_size`.
            batch_size: samples at a time, ≥ 1.
            progress: show a bar on a terminal, and a line now and then elsewhere.

        Raises:
            ValueError: a number outside its range, both of budget and sampler, or a condition that is not the model's.
            SolverError: a sample that is not finite.
        """
        self._check_draws()
        own, streams = self.cond(cond, whole(n, "n, the number of samples,")), streams_of(rng, n)
        how: dict[str, Any] = {"budget": budget, "sampler": sampler, "guidance": guidance, "negative": negative}
        return self.decode(self.draw(own, streams, **how, batch_size=batch_size, progress=progress))

    def embed(self, raw: Tensor) -> Tensor:
        """Embeddings (n, dim) of raw samples (n, …), by the embedder whose embeddings this run is told or draws.

        A ValueError says that it has none, or that samples are of another kind.
        """
        if self.dataset.embedder is None:
            raise ValueError(f"{self.folder} has no embedder; a run of codec=with_embedding has one.")
        return self.dataset.embedder.of(torch.as_tensor(raw))

    def variations(self, raw: Tensor, n: int, *, cond: Any = None, **how: Any) -> Tensor:
        """n samples (k, n, *raw shape) for each of k raw samples, told its embedding (Ramesh et al. 2022, sec. 3.1).

        Args:
            raw: (k, *raw shape).
            n: ≥ 1.
            cond: of other kinds, if the model is told such.
            how: as of `sample`, with its errors.
        """
        found = self.embed(raw)
        told = {**(cond or {}), "vector": found.repeat_interleave(whole(n, "n"), 0)}
        return self.sample(len(found) * n, cond=told, **how).unflatten(0, (len(found), n))

    def interpolation(self, raw: Tensor, n: int, *, cond: Any = None, rng: Rng | None = None, **how: Any) -> Tensor:
        """n samples (n, *raw shape) from one noise, told embeddings from that of raw[0] to that of raw[1], both
        included, along the great circle (Ramesh et al. 2022, sec. 3.2).

        Args:
            raw: (2, *raw shape).
            n, cond, rng, how: as of `variations`, n ≥ 2; rng has one stream.
        """
        first, second = (each.expand(whole(n, "n", 2), -1) for each in self.embed(raw))
        told = {
            **(cond or {}),
            "vector": interpolate(first, second, torch.linspace(0, 1, n, device="cpu", dtype=torch.float64)),
        }
        return self.sample(
            n, cond=told, rng=streams_of(rng, 1).rows(torch.zeros(n, dtype=torch.int64, device="cpu")), **how
        )

    def draw(
        self,
        cond: Cond,
        streams: Rng,
        *,
        budget: int | None = None,
        sampler: Sampler | None = None,
        guidance: Guidance = None,
        negative: str | None = None,
        batch_size: int = 128,
        progress: bool = True,
    ) -> Tensor:
        """Samples as model data (n, *event), on the CPU, given a condition (n, …) as the network takes it, or None.

        Args:
            cond: their conditions.
            streams: n of them, a stream for each.
            budget, sampler, guidance, negative, batch_size, progress: as in `sample`.
        """
        n = len(streams)
        if budget is not None and sampler is not None:
            raise ValueError(f"budget={budget} chooses a sampler; give budget= or sampler=, not both.")
        denoiser = self.guided(guidance, negative)
        if sampler is None:
            usual = 1 if "end" in self.denoiser.told else 20
            sampler = self.sampler(usual if budget is None else budget, cond, guidance)
        device, parts = model_device(self.denoiser), torch.arange(n).split(whole(batch_size, "batch_size"))

        def steps() -> Iterator[Tensor]:
            for part in parts:
                shape, own = (len(part), *self.event_shape), move(take(cond, part), device)
                for trace in sampler.iterate(denoiser, shape, cond=own, rng=streams.rows(part)):
                    yield trace.x
                made.append(trace.x.float().cpu())

        made: list[Tensor] = []
        ticks = len(parts) * (sampler.steps + 1 + int(sampler.denoise))
        for _ in track(steps(), "sampling", ticks, show=progress):
            pass
        return torch.cat(made)

    def sampler(self, budget: int, cond: Cond = None, guidance: Guidance = None) -> Sampler:
        """The sampler for a budget of network calls: the fitted one of the folder, or else one that is chosen by trial
        when it is first asked for (`scoresde.pilot`).

        Args:
            budget: network calls of a sample, ≥ 1.
            cond, guidance: what it is used under, as in `sample`; samplers are fitted for kinds of conditions.

        Raises:
            ValueError: a budget below 1, or a sampler that was fitted to other weights.
        """
        budget = whole(budget, "budget, the number of network calls,")
        model = samplers.Model(self.digest, self.weights, self.guidance_node(guidance), None, sorted(named(cond)))
        denoiser, own = self.guided(guidance), move(cond, model_device(self.denoiser))
        if guidance is not None and denoiser.trials is not None:  # a wrapper is made each time; what was tried is kept
            denoiser.trials = self._guided_trials.setdefault(repr(self.guidance_node(guidance)), {})
        return samplers.recall(self.folder, model, budget, denoiser, self.event_shape, own)[0]

    def log_likelihood(
        self,
        raw: Tensor,
        *,
        solver: Solver,
        cond: Any = None,
        divergence: Divergence | None = None,
        rng: Rng | None = None,
        t_min: float | None = None,
        draws: int = 1,
        batch_size: int = 64,
        progress: bool = True,
    ) -> LogLikelihood:
        """log p(raw) of each sample in nats, with `.bits_per_dim`, and what it is off by; see `log_likelihood`. Of a
        model of latents it is a lower bound, `latent_bound`.

        Args:
            raw: raw values (B, *raw shape), integers or floats as the training data were.
            solver: `Budget(calls)` or `Tolerance(rtol, atol)`; there is no default, for it is part of the result.
            cond: see `Run.cond`; None is p(raw) without a condition.
            divergence, t_min: as in `log_likelihood`.
            draws: of latents for each sample, ≥ 1, see `latent_bound`; 1 for a model without.
            rng: source of dequantisation noise and probes, as in `sample`.
            batch_size, progress: as in `sample`.

        Raises:
            TypeError, ValueError: values, a shape or a condition that the model was not trained on.
            SolverError: a solve that failed; the samples are named.
        """
        self._check_draws()
        raw = self._checked(raw)
        if draws != 1 and not self.codec.bound:
            raise ValueError(f"draws={draws} are of latents, and {self.folder} is no model of such.")
        for parameter in itertools.islice(self.denoiser.parameters(), 1):
            if parameter.dtype in (torch.bfloat16, torch.float16):
                raise ValueError(
                    f"A likelihood integrates derivatives of the network, which {parameter.dtype} is too coarse for: "
                    "run.to(dtype=torch.float32) first, or load the run again."
                )
        if cond is None and self.always_conditional and self.codec.below is None:
            raise ValueError(f"{self.folder} was never trained without its condition, so log p needs it: cond=….")
        n = len(raw)
        given, streams = None if cond is None else self.cond(cond, n), streams_of(rng, n)
        device, parts = model_device(self.denoiser), torch.arange(n).split(whole(batch_size, "batch_size"))
        found: list[LogLikelihood] = []
        for part in track(parts, "log-likelihood", len(parts), show=progress):
            rows = streams.rows(part)
            drawn = self.codec.drawn(raw[part].to(device), rows)
            own = told({} if given is None and drawn.told else move(take(given, part), device), drawn.told)
            how: dict[str, Any] = {"divergence": divergence, "scaling": drawn.codec, "t_min": t_min}
            how |= {"samples": draws} if self.codec.bound else {}
            of = latent_bound if self.codec.bound else log_likelihood
            each = of(self.denoiser, drawn.values, solver, cond=own, rng=rows, **how)
            found.append(replace(each, log_prob=each.log_prob + drawn.log_volume))
        return joined(found)

    def export(self, path: Path | str) -> Path:
        """Writes all that `scoresde.load` needs into one file: weights, codec, excerpt of the data, fitted samplers.

        It is a safetensors file, in which nothing is pickled.

        Raises:
            OSError: it could not be written.
        """
        tensors, record = packed(self.dataset if self.dataset.known else excerpt(self.dataset))
        records = {name: value for name, value in vars(self).items() if name in ("config", "step", "digest", "weights")}
        records |= {"data": record, "samplers": samplers.read(self.folder)}
        model = {f"model.{name}": value for name, value in self.denoiser.state_dict().items()}
        bundle.write(Path(path), tensors | model, records)
        return Path(path)

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
            TypeError, ValueError: values, a shape or atoms that the model was not trained on.
        """
        if dataset.raw_shape != self.raw_shape:
            raise ValueError(
                f"{dataset.name} holds samples of shape {dataset.raw_shape}, and {self.folder} was trained on "
                f"{self.raw_shape}."
            )
        theirs, ours = dataset.numbers, self.dataset.numbers
        if theirs and ours and theirs != ours:
            raise ValueError(f"{dataset.name} holds the atoms {theirs}, and {self.folder} was trained on {ours}.")
        text = self.dataset.text
        if text is not None and dataset.text is not None and dataset.text.record() != text.record():
            dataset = _reread(dataset, text)
        return dataclasses.replace(dataset, codec=self.codec)

    def _checked(self, raw: Tensor) -> Tensor:
        """Raw values, a tensor or a NumPy array, as a tensor: integers as they are, floats as the network computes."""
        raw = torch.as_tensor(raw)
        if raw.is_floating_point():
            weights = next((p.dtype for p in self.denoiser.parameters()), torch.float32)
            raw = raw.to(torch.promote_types(weights, torch.float32))
        if len(raw) == 0 or tuple(raw.shape[1:]) != self.raw_shape:
            one = tuple(raw.shape) == self.raw_shape
            raise ValueError(
                f"{self.folder} was trained on samples of shape {self.raw_shape}, so a batch of them is "
                f"({', '.join(map(str, ('B', *self.raw_shape)))}); got {tuple(raw.shape)}."
                f"{' A single sample is a batch of one: raw[None].' if one else ''}"
            )
        self.codec.check(raw)
        return raw

    def _check_draws(self) -> None:
        if self.denoiser.encodes:
            raise ValueError(
                f"{self.folder} is an autoencoder, of which there are no samples and no likelihood; a model of its "
                f"latents has both: scoresde-train codec={self.folder}."
            )
        if self.embeds:
            raise ValueError(
                f"{self.folder} is an embedder, of which there are no samples and no likelihood; a model of its "
                f"embeddings has both: scoresde-train codec=embeddings codec.run={self.folder}."
            )
        if not self.draws:
            raise ValueError(
                f"{self.folder} is a classifier, of which there are no samples and no likelihood; it guides those of "
                "another run: scoresde.Classifier(run.denoiser, judge.denoiser, scale)."
            )
