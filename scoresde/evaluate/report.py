"""The end of a run: samples by each sampler, held-out bits/dim, pictures, and one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..checks import whole
from ..data import Dataset
from ..data.kinds import in_turn, turns_in_words
from ..diffusion.denoiser import Cond, Denoiser
from ..diffusion.grids import check_grid
from ..likelihood.ode import bits_per_dim
from ..metrics import sliced_w2
from ..noise.rng import Rng
from ..runs.folder import finish
from ..runs.listing import layout
from ..runs.logger import Logger
from ..runs.publish import publish, replacing
from ..sampling import Sampler
from . import figures
from .conditions import alike, condition_arrays
from .evaluation import Drawing, Samples, by_suffix, evenly_spaced
from .likelihood import BitsPerDim, Likelihood
from .shards import Job, Shards


@dataclass(frozen=True)
class Evaluation:
    """How much is measured at the end of a run.

    Args:
        points: held-out points for bits/dim, None for all.
        points_during: held-out points for bits/dim during training.
        samples: number of samples by each sampler, ≥ 1.
        batch_size: number of samples at a time, ≥ 1.
        pictures: draw PNGs, which needs matplotlib.
        objective: "bits_per_dim" or "loss", by which a sweep is sorted.

    Raises:
        ValueError: a value outside its range.
    """

    points: int | None = None
    points_during: int = 64
    samples: int = 64
    batch_size: int = 128
    pictures: bool = True
    objective: str = "bits_per_dim"

    def __post_init__(self) -> None:
        for name in ("points", "points_during", "samples", "batch_size"):
            if name != "points" or self.points is not None:
                whole(getattr(self, name), f"evaluation.{name}")
        if not isinstance(self.pictures, bool):
            raise ValueError(f"evaluation.pictures is true or false; got {self.pictures!r}.")
        if self.objective not in ("bits_per_dim", "loss"):
            raise ValueError(f"evaluation.objective is bits_per_dim or loss; got {self.objective!r}.")


def check_samplers(samplers: Mapping[str, Sampler], denoiser: Denoiser) -> None:
    """Refuses a sampler whose grid does not fit the SDE, before anything is computed."""
    for name, sampler in samplers.items():
        try:
            check_grid(sampler.grid(denoiser.sde, sampler.steps), denoiser.sde)
        except ValueError as error:
            raise ValueError(f"sampler {name}: {error}") from error


def write_samples(
    made: Mapping[str, Samples], dataset: Dataset, folder: Path, *, seeds: Sequence[int], pictures: bool = True
) -> None:
    """Writes arrays and pictures.

    `samples.npz` holds `<sampler>` (n, *event) in the coordinates of the raw data, and the conditions of the samples as
    `labels`, `cond_vector`, `cond_image`, `cond_tokens`. The pictures of the first sampler are `samples.png` and
    `trajectory.png`; those of the others have its name besides.
    """
    cond = next(iter(made.values())).cond
    if pictures:
        real = real_beside(cond, dataset, len(seeds))
        for suffix, samples in by_suffix(made):
            figures.sample_grid(samples.x, real, folder / f"samples{suffix}.png")
            figures.trajectory(samples.frames, samples.times, folder / f"trajectory{suffix}.png")
    arrays: dict[str, Any] = {"seeds": seeds, **condition_arrays(cond)}
    arrays |= {name: dataset.decode(samples.x) for name, samples in made.items()}
    with replacing(folder / "samples.npz") as file:
        np.savez_compressed(file, **arrays)


def real_beside(cond: Cond, dataset: Dataset, n: int) -> Tensor:
    """At most n held-out samples, as model data: those with a condition of `cond` if there are any."""
    real = dataset.test.raw[alike(cond, dataset)]
    return dataset.encode(real[evenly_spaced(len(real), min(n, len(real)))])


def distances_of(made: Mapping[str, Samples], dataset: Dataset) -> dict[str, float]:
    """Sliced-W2 distance of each sampler's vectors to the held-out ones, in raw units; empty for other events."""
    if len(dataset.event_shape) > 1:
        return {}
    real = dataset.test.raw.float()
    return {
        name: sliced_w2(dataset.decode(samples.x).float(), real, rng=Rng(0))
        for name, samples in made.items()
        if len(samples.x) > 1
    }


def exact_bits(dataset: Dataset, points: int | None) -> float | None:
    """Bits/dim of the true density on the points that the model is measured on, where it is known."""
    if dataset.log_prob is None:
        return None
    raw = dataset.test.raw[evenly_spaced(len(dataset.test), points)]
    return float(bits_per_dim(dataset.log_prob(raw), dataset.event_shape).mean())


@dataclass(frozen=True)
class Report:
    """The final measurement of a model: held-out bits/dim, and samples by each sampler.

    Attributes:
        denoiser, dataset: the model, and the data whose held-out part it is compared with.
        conditional: whether the model gets the conditions of the data.
        samplers, likelihood: how samples are drawn, and how likelihoods are measured.
        evaluation: the numbers of samples and of points.
        seed: n samples have the seeds seed · n … (seed + 1) · n − 1.
    """

    denoiser: Denoiser
    dataset: Dataset
    conditional: bool
    samplers: Mapping[str, Sampler]
    likelihood: Likelihood
    evaluation: Evaluation
    seed: int

    def measure(self, shards: Shards) -> tuple[BitsPerDim, dict[str, Samples]] | None:
        """(bits/dim, samples by sampler) on rank 0, which waits for the others; they do their share and get None."""
        points, conditional = self.evaluation.points, self.conditional
        bits = self.likelihood.job(self.denoiser, self.dataset, points=points, seed=self.seed, conditional=conditional)
        event, cond = self.dataset.event_shape, in_turn(self.dataset, len(self.seeds), conditional)
        draws = Drawing(event, self.seeds, cond, self.evaluation.batch_size).jobs(self.denoiser, self.samplers)
        if shards.rank == 0:
            said = turns_in_words(self.dataset, conditional)
            print(
                f"Measuring bits/dim on {points or len(self.dataset.test):,} held-out points "
                f"({self.likelihood.cost(event)}), drawing "
                f"{len(self.seeds):,} samples by each of {', '.join(self.samplers)}{said and ','}{said} …",
                flush=True,
            )
        jobs: list[Job[Any]] = [bits, *draws.values()]
        for job in jobs:
            shards.work(job)
        if shards.rank:
            return None
        return shards.result(bits), {name: shards.result(job) for name, job in draws.items()}

    @property
    def seeds(self) -> range:
        n = self.evaluation.samples
        return range(self.seed * n, (self.seed + 1) * n)

    def write(
        self, bits: BitsPerDim, made: Mapping[str, Samples], folder: Path, facts: Mapping[str, Any], logger: Logger
    ) -> dict[str, Any]:
        """Writes samples and pictures, `summary.md` and at last `summary.json`, logs and prints the table.

        Bits/dim stand in every row: they are the model's. Returns what `summary.json`
        holds: `facts` and what was measured.
        """
        dataset, accuracy = self.dataset, self.likelihood.accuracy
        write_samples(made, dataset, folder, seeds=self.seeds, pictures=self.evaluation.pictures)
        distances, exact = distances_of(made, dataset), exact_bits(dataset, self.evaluation.points)
        columns = {
            "sampler": list(made),
            "NFE": [f"{samples.evaluations:.0f}" for samples in made.values()],
            "seconds": [f"{samples.seconds:.1f}" for samples in made.values()],
            **({"sliced-W2": [f"{distances[name]:.4f}" for name in made]} if distances else {}),
            "bits/dim": [f"{bits.mean:.4f} ± {bits.stderr:.4f}"] * len(made),
        }
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        logger.table("eval/summary", list(columns), rows)
        nfe = {name: samples.evaluations for name, samples in made.items()}
        numbers = {bits.estimator: bits.mean, "bpd_stderr": bits.stderr, "nfe": nfe}
        logger.summary(numbers | ({"w2": distances} if distances else {}))
        note = (
            f"bits/dim of the model on {bits.points} held-out points: {bits.meaning}, {self.likelihood.how}, "
            f"{'uniform dequantisation, ' if self.likelihood.dequantises and dataset.scaling.levels else ''}"
            f"{', '.join(f'{name}={value:g}' for name, value in accuracy.items())}, {bits.evaluations:.0f} "
            f"evaluations, {bits.seconds:.1f} s."
            f"{'' if exact is None else f' The true density has {exact:.4f} on the same points.'}"
        )
        lines = ["| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows)]
        publish(folder / "summary.md", "\n".join([*lines, "", note, ""]))
        summary = {
            **facts,
            "bits_per_dim": {**bits.record, **accuracy, "exact": exact},
            "samplers": [
                {"sampler": name, "nfe": nfe[name], "seconds": samples.seconds, "samples": len(samples.x)}
                | {"sliced_w2": distances.get(name)}
                for name, samples in made.items()
            ],
        }
        finish(folder / "summary.json", summary)
        print(f"\n{layout(columns, None)[0]}\n{note}", flush=True)
        return summary


def list_files(folder: Path) -> str:
    """What a command has left in its folder, a line each."""
    return "\n".join([f"Results in {folder}:", *(f"  {path}" for path in sorted(folder.glob("[!.]*")))])
