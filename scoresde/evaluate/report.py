"""The end of a run: samples by each sampler, held-out bits/dim, pictures, and one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..checks import whole
from ..data import Dataset
from ..diffusion.denoiser import Cond, Denoiser
from ..diffusion.grids import check_grid
from ..likelihood.ode import bits_per_dim
from ..metrics import sliced_w2
from ..noise.rng import Rng
from ..runs.folder import finish
from ..runs.logger import Logger
from ..sampling import Sampler
from . import figures
from .conditions import alike, in_turn, told_arrays, told_in_turn
from .evaluation import BitsPerDim, OdeLikelihood, Samples, drawing, evenly_spaced
from .shards import Job


@dataclass(frozen=True)
class Evaluation:
    """How much to measure at the end.

    Args:
        points: held-out points for bits/dim, None for all.
        points_during: the same during training.
        samples: per sampler, ≥ 1.
        batch_size: samples at a time, ≥ 1.
        pictures: draw PNGs, which needs matplotlib.
        objective: "bits_per_dim" or "loss", what a sweep is sorted by.

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
            value = getattr(self, name)
            if value is None and name == "points":
                continue
            whole(value, f"evaluation.{name}")
        if not isinstance(self.pictures, bool):
            raise ValueError(f"evaluation.pictures is true or false; got {self.pictures!r}.")
        if self.objective not in ("bits_per_dim", "loss"):
            raise ValueError(f"evaluation.objective is bits_per_dim or loss; got {self.objective!r}.")


def check_samplers(samplers: Mapping[str, Sampler], denoiser: Denoiser) -> None:
    """Refuses, before training, a sampler whose grid does not fit the SDE."""
    for name, sampler in samplers.items():
        try:
            check_grid(sampler.grid(denoiser.sde, sampler.steps), denoiser.sde)
        except ValueError as error:
            raise ValueError(f"sampler {name}: {error}") from error


def sampling_jobs(
    samplers: Mapping[str, Sampler], denoiser: Denoiser, event_shape: Sequence[int], *,
    seeds: Sequence[int], cond: Cond, batch_size: int,
) -> dict[str, Job[Samples]]:  # fmt: skip
    """Samples by every sampler from the same seeds: what is to be done."""
    watched = 8 if len(event_shape) > 1 else 500
    return {
        name: drawing(
            denoiser, sampler, event_shape, seeds=seeds, cond=cond, batch_size=batch_size, watched=watched,
            name=f"samples-{name}",
        )
        for name, sampler in samplers.items()
    }  # fmt: skip


def write_samples(
    made: Mapping[str, Samples], dataset: Dataset, folder: Path, *, seeds: Sequence[int], pictures: bool = True
) -> None:
    """Arrays and pictures. `samples.npz` holds `<sampler>` (n, *event) in the coordinates of the raw data, and what the
    samples were told, `labels`, `cond_vector`, `cond_image`, `cond_tokens`; the first sampler's pictures are
    `samples.png` and `trajectory.png`, the others carry its name.
    """
    cond = next(iter(made.values())).cond
    real = real_beside(cond, dataset, len(seeds)) if pictures else None
    for index, (name, samples) in enumerate(made.items()):
        if real is not None:
            suffix = f"-{name}" if index else ""
            figures.sample_grid(samples.x, real, folder / f"samples{suffix}.png")
            figures.trajectory(samples.frames, samples.times, folder / f"trajectory{suffix}.png")
    arrays: dict[str, Any] = {name: np.asarray(dataset.decode(samples.x)) for name, samples in made.items()}
    np.savez_compressed(folder / "samples.npz", seeds=np.asarray(list(seeds)), **told_arrays(cond), **arrays)


def real_beside(cond: Cond, dataset: Dataset, n: int) -> Tensor:
    """At most n held-out samples, model data, that are told what samples were told, if there are such."""
    real = dataset.test.raw[alike(cond, dataset)]
    return dataset.encode(real[evenly_spaced(len(real), min(n, len(real)))])


def table(
    made: Mapping[str, Samples], bits: BitsPerDim, distances: Mapping[str, float]
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the summary: one row per sampler. Bits/dim is the model's, by the probability-flow ODE."""
    columns = ["sampler", "NFE", "seconds", *(["sliced-W2"] if distances else []), "bits/dim"]
    score = f"{bits.mean:.4f} ± {bits.stderr:.4f}"
    rows = [
        [name, f"{s.evaluations:.0f}", f"{s.seconds:.1f}", *([f"{distances[name]:.4f}"] if distances else []), score]
        for name, s in made.items()
    ]
    return columns, rows


def distances_of(made: Mapping[str, Samples], dataset: Dataset) -> dict[str, float]:
    """Sliced-W2 distance of each sampler's vectors to the held-out ones, in raw units; none for other events."""
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


def measuring_jobs(
    denoiser: Denoiser, dataset: Dataset, samplers: Mapping[str, Sampler], likelihood: OdeLikelihood, *,
    evaluation: Evaluation, seed: int, conditional: bool,
) -> tuple[Job[BitsPerDim], dict[str, Job[Samples]]]:  # fmt: skip
    """What a report needs: held-out bits/dim, and samples by each sampler."""
    seeds = range(seed * evaluation.samples, (seed + 1) * evaluation.samples)
    draws = sampling_jobs(
        samplers, denoiser, dataset.event_shape, seeds=seeds, cond=in_turn(dataset, len(seeds), conditional),
        batch_size=evaluation.batch_size,
    )  # fmt: skip
    return likelihood.job(denoiser, dataset, points=evaluation.points, seed=seed, conditional=conditional), draws


def announce(evaluation: Evaluation, dataset: Dataset, samplers: Mapping[str, Sampler], *, conditional: bool) -> None:
    """Prints what is about to be measured."""
    points, said = evaluation.points or len(dataset.test), told_in_turn(dataset, conditional)
    print(
        f"Measuring bits/dim on {points:,} held-out points, drawing {evaluation.samples:,} samples by each of "
        f"{', '.join(samplers)}{said and ','}{said} …",
        flush=True,
    )


def report(
    bits: BitsPerDim, made: Mapping[str, Samples], dataset: Dataset, *, seed: int, evaluation: Evaluation,
    accuracy: Mapping[str, float], folder: Path, facts: Mapping[str, Any], logger: Logger,
) -> dict[str, Any]:  # fmt: skip
    """Writes samples and pictures, `summary.md` and at last `summary.json`, prints the table. Returns what
    summary.json holds.
    """
    seeds = range(seed * evaluation.samples, (seed + 1) * evaluation.samples)
    write_samples(made, dataset, folder, seeds=seeds, pictures=evaluation.pictures)
    distances, exact = distances_of(made, dataset), exact_bits(dataset, evaluation.points)
    summary = {
        **facts,
        "bits_per_dim": {**{k: v for k, v in asdict(bits).items() if k != "values"}, **accuracy, "exact": exact},
        "samplers": [
            {"sampler": name, "nfe": s.evaluations, "seconds": s.seconds, "samples": len(s.x),
             "sliced_w2": distances.get(name)}
            for name, s in made.items()
        ],
    }  # fmt: skip
    columns, rows = table(made, bits, distances)
    logger.table("eval/summary", columns, rows)
    logger.summary(
        {bits.estimator: bits.mean, "bpd_stderr": bits.stderr, "nfe": {n: s.evaluations for n, s in made.items()}}
        | ({"w2": distances} if distances else {})
    )
    text = layout(columns, rows)
    note = (
        f"bits/dim of the model on {bits.points} held-out points: probability-flow ODE, "
        f"{'uniform dequantisation, ' if dataset.scaling.levels else ''}"
        f"{', '.join(f'{name}={value:g}' for name, value in accuracy.items())}, {bits.evaluations:.0f} evaluations, "
        f"{bits.seconds:.1f} s."
        f"{'' if exact is None else f' The true density has {exact:.4f} on the same points.'}"
    )
    (folder / "summary.md").write_text(markdown(columns, rows) + f"\n{note}\n", encoding="utf-8")
    finish(folder / "summary.json", summary)
    print(f"\n{text}\n{note}", flush=True)
    return summary


def layout(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal: first column to the left, the others to the right."""
    widths = [max(len(str(row[i])) for row in [columns, *rows]) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        cells = [
            str(c).ljust(w) if i == 0 else str(c).rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([line(columns), "  ".join("-" * w for w in widths), *map(line, rows)])


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as a Markdown table."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [columns, ["---"] * len(columns), *rows]]
    return "\n".join(lines) + "\n"


def list_files(folder: Path, what: Mapping[str, str]) -> str:
    """Lines 'meaning  path' for the files that exist."""
    lines = [f"  {label:<14} {folder / name}" for label, name in what.items() if (folder / name).exists()]
    return "\n".join([f"Results in {folder}:", *lines])
