"""A cascade measured and drawn: one stage after another, each in batches that a command goes on with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..codecs import Codec
from ..codecs.codec import Drawn
from ..diffusion.conditions import Cond
from ..diffusion.denoiser import Denoiser
from ..diffusion.sde import SDE
from ..noise.rng import Rng
from ..runs.cascade import Cascade
from ..runs.run import Run
from ..runs.stage import kind_of
from ..sampling import Sampler
from .calibration import Level
from .evaluation import Drawing, Samples
from .likelihood import BitsPerDim, Likelihood, Measured
from .report import Report
from .shards import Shards


@dataclass
class Stages:
    """Samples of a cascade. Sample k depends on `seeds[k]` alone, in every stage.

    Attributes:
        cascade: the runs.
        denoisers: of each stage, guided.
        samplers: of each stage, by name; all have the same names.
        seeds: one per sample.
        cond: the condition of each sample, of which each stage is told what it knows.
        levels: of the noise in what each stage is told.
        batch_size: samples at a time.
        low, x: by sampler, what the last stage was told, as model data, and what it made of it, once they are drawn.
    """

    cascade: Cascade
    denoisers: Sequence[Denoiser]
    samplers: Sequence[Mapping[str, Sampler]]
    seeds: Sequence[int]
    cond: Cond
    levels: Sequence[float]
    batch_size: int = 128
    low: dict[str, Tensor] = field(default_factory=dict)
    x: dict[str, Tensor] = field(default_factory=dict)

    def made(self, shards: Shards) -> dict[str, Samples]:
        """The samples by each sampler, of the whole; every rank makes its share of each stage, and waits for the others
        before the next.
        """
        return {name: self._drawn(name, shards) for name in self.samplers[0]}

    def _drawn(self, name: str, shards: Shards) -> Samples:
        calls, seconds = 0.0, 0.0
        for stage, run in enumerate(self.cascade.runs):
            below = self.x.get(name)
            cond = self.cascade.begin(stage, self.cond, below, self.levels[stage], Rng(seeds=self.seeds))
            skip = self.cascade.skipped(stage)
            drawing = Drawing(run.event_shape, self.seeds, cond, self.batch_size, skip=skip)
            job = drawing.job(self.denoisers[stage], self.samplers[stage][name], f"stage-{stage + 1}-{name}")
            shards.work(job)
            made = shards.result(job)
            calls, seconds = calls + made.evaluations, seconds + made.seconds
            if below is None:
                self.x[name] = made.x
                continue
            self.low[name], self.x[name] = below, run.codec.joined(below, made.x)
            shown = below[: made.frames.shape[1]]
            frames = torch.stack([run.codec.joined(shown, frame) for frame in made.frames])
        return replace(made, x=self.x[name], cond=self.cond, frames=frames, evaluations=calls, seconds=seconds)

    def residual(self, name: str) -> dict[str, float]:
        """The greatest distance of the low resolution of samples from that which the last stage was told, in raw units:
        of samples as they were drawn, and `rounded` and clamped to raw values. Of a decoder that was told embeddings,
        the mean cosine between these and those of its samples.
        """
        cascade, x = self.cascade, self.x[name]
        told, embedder = cascade.picture(len(cascade.runs) - 2, self.low[name]).double(), cascade.dataset.embedder
        if embedder is not None and kind_of(cascade.runs[-1]) == "vector":
            return {"cosine": float(torch.cosine_similarity(embedder.of(cascade.codec.decode(x)), told).mean())}
        slope = cascade.codec.affine[0] if cascade.codec.affine else 1.0
        found = {}
        for key, each in (("residual", x), ("rounded", cascade.codec.encode(cascade.codec.decode(x)))):
            found[key] = float((cascade.low(each).double() - told).abs().max()) / slope
        return found


@dataclass(frozen=True)
class CascadeReport(Report):
    """The report of a cascade: its `likelihood` is one `OfCascade`, and its samples are those of `stages`."""

    stages: Stages | None = None

    def measure(self, shards: Shards) -> tuple[BitsPerDim, dict[str, Samples]] | None:
        assert self.stages is not None
        how: dict[str, Any] = {"points": self.evaluation.points, "seed": self.seed, "conditional": self.conditional}
        bits, cost = (
            self.likelihood.job(self.denoiser, self.dataset, **how),
            self.likelihood.cost((), self.denoiser.sde),
        )
        if shards.rank == 0:
            print(f"Measuring bits/dim ({cost}), drawing {len(self.seeds):,} samples …", flush=True)
        shards.work(bits)
        made = self.stages.made(shards)
        return None if shards.rank else (shards.result(bits), made)

    def levels(self) -> list[Level]:
        """None: each stage has noise levels of its own, which its own evaluation shows."""
        return []


class OfCascade(Likelihood):
    """The chain rule over the stages of a cascade, each measured by another likelihood.

    Args:
        of_stage: how.
        cascade: the runs.

    Raises:
        ConfigError: a cascade without an exact likelihood.
        ValueError: a bound on the probability of integers, of bands that are none.
    """

    def __init__(self, of_stage: Likelihood, cascade: Cascade):
        super().__init__(of_stage.batch_size, of_stage.t_min)
        cascade.check_exact()
        for run in cascade.runs:
            of_stage.whose(run.denoiser)
            of_stage.calls_on(run.denoiser.sde)  # both refuse, the one a cut-off that is outside its times
        through_bins = of_stage.estimator == "bpd/ode-bound" or not of_stage.dequantises
        if through_bins and any(run.codec.bins(run.dataset.test.raw[:1]) is None for run in cascade.runs):
            raise ValueError(
                "These bands are no integers of their own, so that there is no bound through the noise at t_min. The "
                "density of dequantised data bounds their log-probability: likelihood.bound=null; of "
                "likelihood=elbo, likelihood.bound=dequantised."
            )
        self.of_stage, self.cascade, self.calls = of_stage, cascade, None
        self.estimator, self.dequantises = of_stage.estimator, of_stage.dequantises
        self.how = f"{of_stage.how}, stage by stage"

    @property
    def accuracy(self) -> Mapping[str, float]:
        return self.of_stage.accuracy

    @property
    def settings(self) -> dict[str, Any]:
        return self.of_stage.settings

    def named(self, codec: Codec) -> str:
        return self.of_stage.named(codec)

    def whose(self, denoiser: Denoiser) -> str:
        return " ".join(sorted({self.of_stage.whose(run.denoiser) for run in self.cascade.runs}))

    def cost(self, event_shape: Sequence[int], sde: SDE) -> str:
        return "; ".join(self.of_stage.cost(run.event_shape, run.denoiser.sde) for run in self.cascade.runs)

    def measure(self, denoiser: Denoiser, raw: Tensor, codec: Codec, cond: Cond, rng: Rng) -> Measured:
        def of(run: Run, drawn: Drawn, told: Cond, rows: Rng) -> Measured:
            one = self.of_stage.measure(run.denoiser, drawn.values, drawn.codec, told, rows)
            return one._replace(log_prob=one.log_prob + drawn.log_volume)

        found = self.cascade.measured(raw, cond, rng, of)
        log_prob = torch.stack([each.log_prob for each in found]).sum(0)
        of_all, of_solver = (
            torch.stack(each).square().sum(0).sqrt()
            for each in ([m.stderr for m in found], [m.of_solver for m in found])
        )
        return Measured(log_prob, of_all, of_solver, sum(each.evaluations for each in found))
