"""The end of a run: samples by each sampler, held-out bits/dim, pictures, and one table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import whole
from ..data import Dataset
from ..data.kinds import in_turn, turns_in_words
from ..data.rows import few
from ..diffusion.denoiser import Cond, Denoiser
from ..likelihood.ode import bits_per_dim
from ..metrics import Score, score, sliced_score
from ..metrics.jackknife import GROUPS
from ..runs.folder import finish
from ..runs.listing import layout
from ..runs.logger import Logger
from ..runs.progress import doing
from ..runs.publish import publish, replacing
from ..runs.run import Run
from ..sampling import Sampler
from . import figures
from .calibration import Level, by_split, noise_levels
from .columns import moments, pairs, write_csv
from .conditions import alike, condition_arrays
from .evaluation import Drawing, Samples, by_suffix, evenly_spaced
from .likelihood import BitsPerDim, Likelihood
from .scoring import TRAINING, Scoring, ranked
from .shards import Job, Shards
from .sound import write_sounds
from .strips import animation
from .table import columns_of, markdown, printed, record_of, shown, verdict

_LOGGED = {"sliced-W2": "w2"}  # under which name a number has always been logged


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
        rank_by: the number by which samplers are sorted, least first; "-recall" puts the greatest first; None for the
            first number of the table.
        levels: noise levels at which the loss is measured on held-out and training points, 0 for none.

    Raises:
        ValueError: a value outside its range.
    """

    points: int | None = None
    points_during: int = 64
    samples: int = 64
    batch_size: int = 128
    pictures: bool = True
    objective: str = "bits_per_dim"
    rank_by: str | None = None
    levels: int = 0

    def __post_init__(self) -> None:
        for name in ("points", "points_during", "samples", "batch_size"):
            if name != "points" or self.points is not None:
                whole(getattr(self, name), f"evaluation.{name}")
        if whole(self.levels, "evaluation.levels", 0) == 1:
            raise ValueError("evaluation.levels is 0 or at least 2: from t_max to t_min; got 1.")
        if not isinstance(self.pictures, bool):
            raise ValueError(f"evaluation.pictures is true or false; got {self.pictures!r}.")
        if self.objective not in ("bits_per_dim", "loss"):
            raise ValueError(f"evaluation.objective is bits_per_dim or loss; got {self.objective!r}.")


def check_samplers(samplers: Mapping[str, Sampler], denoiser: Denoiser) -> None:
    """Refuses a sampler whose grid does not fit the SDE, before anything is computed. A classifier is not sampled."""
    for name, sampler in samplers.items() if denoiser.draws else ():
        try:
            sampler.times(denoiser)
        except ValueError as error:
            raise ValueError(f"sampler {name}: {error}") from error


def write_samples(
    made: Mapping[str, Samples], dataset: Dataset, folder: Path, *, seeds: Sequence[int], pictures: bool = True
) -> None:
    """Writes arrays and pictures.

    `samples.npz` holds `<sampler>` (n, *event) in the coordinates of the raw data, and the conditions of the samples as
    `labels`, `cond_vector`, `cond_image`, `cond_tokens`. The pictures of the first sampler are `samples.png` and
    `trajectory.png`; those of the others have its name besides. Of a table there is also `samples.csv`, with the names
    of its columns; of sound there is what `write_sounds` writes.
    """
    cond = next(iter(made.values())).cond
    if pictures:
        real = real_beside(cond, dataset, len(seeds))
        for (suffix, samples), name in zip(by_suffix(made), made, strict=True):
            made_raw, real_raw = dataset.decode(samples.x), dataset.decode(real)
            draw_samples(made_raw, real_raw, dataset, folder / f"samples{suffix}.png", sampler=name)
            frames = torch.stack([dataset.codec.layout(x) for x in samples.frames])
            frames = frames[..., :2] if dataset.columns else frames
            figures.trajectory(frames, samples.times, folder / f"trajectory{suffix}.png")
            if made_raw.ndim == 5:
                limits = float(real_raw.min()), float(real_raw.max())
                animation(made_raw, folder / f"samples{suffix}.gif", limits)
    if dataset.rate:
        write_sounds(made, dataset, folder, pictures=pictures)
    arrays: dict[str, Any] = {"seeds": seeds, **condition_arrays(cond)}
    arrays |= {name: dataset.decode(samples.x) for name, samples in made.items()}
    with replacing(folder / "samples.npz") as file:
        np.savez_compressed(file, **arrays)
    for (suffix, _), name in zip(by_suffix(made), made, strict=True) if dataset.columns else ():
        write_csv(arrays[name], dataset, folder / f"samples{suffix}.csv", labels=arrays.get("labels"))


def draw_samples(made: Tensor, real: Tensor, dataset: Dataset, path: Path, *, sampler: str) -> Path:
    """Raw samples beside real ones: columns of a table by their names, anything else by `figures.sample_grid`."""
    if dataset.columns:
        return pairs(made, real, dataset.columns, path, sampler=sampler)
    return figures.sample_grid(made, real, path, sampler=sampler)


def real_beside(cond: Cond, dataset: Dataset, n: int) -> Tensor:
    """At most n held-out samples, as model data: those with a condition of `cond` if there are any."""
    real = alike(cond, dataset).nonzero()[:, 0]
    return dataset.encode(dataset.test.raw[real[evenly_spaced(len(real), min(n, len(real)))]])


def distances_of(made: Mapping[str, Tensor], dataset: Dataset) -> dict[str, dict[str, Score]]:
    """Sliced-W2 distance of vectors, model data, to the held-out ones, in raw units, with an error where there are
    enough; of other events there is none.
    """
    found: dict[str, dict[str, Score]] = {name: {} for name in made}
    if len(dataset.raw_shape) > 1:
        return found
    real = few(dataset.test.raw).float()
    for name, x in made.items():
        raw = dataset.decode(x).float()
        if min(len(raw), len(real)) >= 2 * GROUPS:
            found[name] = score(sliced_score, "sliced-W2", raw, real, real)
        elif len(raw) > 1:
            found[name]["sliced-W2"] = Score(sliced_score(raw, real, real), math.nan)
    return found


def exact_bits(dataset: Dataset, points: int | None) -> float | None:
    """Bits/dim of the true density on the points that the model is measured on, where it is known."""
    if dataset.log_prob is None:
        return None
    raw = dataset.test.raw[evenly_spaced(len(dataset.test), points)]
    return float(bits_per_dim(dataset.log_prob(raw), dataset.raw_shape).mean())


@dataclass(frozen=True)
class Report:
    """The final measurement of a model: held-out bits/dim, and samples by each sampler.

    Attributes:
        denoiser, dataset: the model, and the data whose held-out part it is compared with.
        conditional: whether the model gets the conditions of the data.
        samplers, likelihood: how samples are drawn, and how likelihoods are measured.
        evaluation: the numbers of samples and of points.
        scoring: the metrics of the samples, `tried` on these data.
        versus: another run, whose samples by the same samplers and from the same seeds are scored, too.
        seed: n samples have the seeds seed · n … (seed + 1) · n − 1.
    """

    denoiser: Denoiser
    dataset: Dataset
    conditional: bool
    samplers: Mapping[str, Sampler]
    likelihood: Likelihood
    evaluation: Evaluation
    seed: int
    scoring: Scoring = field(default_factory=lambda: Scoring({}))
    versus: Run | None = None

    def measure(self, shards: Shards) -> tuple[BitsPerDim, dict[str, Samples]] | None:
        """(bits/dim, samples by sampler) on rank 0, which waits for the others; they do their share and get None."""
        points, conditional = self.evaluation.points, self.conditional
        bits = self.likelihood.job(self.denoiser, self.dataset, points=points, seed=self.seed, conditional=conditional)
        event, draws = self.dataset.event_shape, self.drawn()
        if shards.rank == 0:
            said = turns_in_words(self.dataset, conditional)
            print(
                f"Measuring bits/dim on {points or len(self.dataset.test):,} held-out points "
                f"({self.likelihood.cost(event, self.denoiser.sde)}), drawing "
                f"{len(self.seeds):,} samples by each of {', '.join(draws)}{said and ','}{said} …",
                flush=True,
            )
        jobs: list[Job[Any]] = [bits, *draws.values()]
        for job in jobs:
            shards.work(job)
        if shards.rank:
            return None
        return shards.result(bits), {name: shards.result(job) for name, job in draws.items()}

    def drawn(self) -> dict[str, Job[Samples]]:
        """The work of every sampler, on this model, and on the other with its name behind an @."""
        models, made = {"": (self.denoiser, self.conditional)}, dict[str, Job[Samples]]()
        if self.versus is not None:
            models[f"@{self.versus.folder.name}"] = (self.versus.denoiser, self.versus.conditional)
        for label, (denoiser, conditional) in models.items():
            cond = in_turn(self.dataset, len(self.seeds), conditional)
            drawing = Drawing(self.dataset.event_shape, self.seeds, cond, self.evaluation.batch_size)
            made |= drawing.jobs(denoiser, {f"{name}{label}": sampler for name, sampler in self.samplers.items()})
        return made

    @property
    def seeds(self) -> range:
        n = self.evaluation.samples
        return range(self.seed * n, (self.seed + 1) * n)

    @doing("scores and pictures")
    def write(
        self, bits: BitsPerDim, made: Mapping[str, Samples], folder: Path, facts: Mapping[str, Any], logger: Logger
    ) -> dict[str, Any]:
        """Writes samples and pictures, `summary.md` and at last `summary.json`, logs and prints the table.

        Returns what `summary.json` holds: `facts` and what was measured.
        """
        dataset, evaluation, by = self.dataset, self.evaluation, self.evaluation.rank_by
        write_samples(made, dataset, folder, seeds=self.seeds, pictures=evaluation.pictures)
        scores = self.scores(made)
        best, levels = ranked(scores, by)[0], self.levels()
        columns = columns_of(made, scores, by)
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        logger.table("eval/summary", list(columns), rows)
        nfe = {name: samples.evaluations for name, samples in made.items()}
        numbers: dict[str, Any] = {bits.estimator: bits.mean, "bpd_stderr": bits.stderr, "nfe": nfe}
        for name in dict.fromkeys(name for row in scores.values() for name in row):
            numbers[_LOGGED.get(name, f"scores/{name}")] = {row: each[name].value for row, each in scores.items()}
        logger.summary(numbers)
        noise = {"noise σ/α": [f"{level.noise:.3g}" for level in levels]}
        noise |= {what: [shown(score) for score in found] for what, found in by_split(levels).items()}
        notes = [verdict(made, scores, by), *self.notes(), self.bits_note(bits)]
        table = self.moments(made)
        text = [printed(columns), printed(table) if table else "", *notes, layout(noise, None)[0] if levels else ""]
        lines = [markdown(columns), markdown(table) if table else "", *notes, markdown(noise) if levels else ""]
        publish(folder / "summary.md", "\n\n".join(filter(None, lines)) + "\n")
        if evaluation.pictures:
            for path in self.draw(made, scores, levels, folder):
                logger.image(f"eval/{path.stem}", path, step=facts.get("step", 0), images=facts.get("images", 0))
        summary = {
            **facts,
            "bits_per_dim": {
                **bits.record,
                **self.likelihood.accuracy,
                "exact": exact_bits(dataset, evaluation.points),
            },
            "best": best,
            "protocol": self.scoring.protocol(dataset, evaluation.samples),
            "samplers": [
                {"sampler": name, "nfe": nfe[name], "seconds": samples.seconds, "samples": len(samples.x)}
                | {"sliced_w2": scores[name]["sliced-W2"].value if "sliced-W2" in scores[name] else None}
                for name, samples in made.items()
            ],
            "scores": record_of(scores, best),
            "noise_levels": [asdict(level) for level in levels],
        }
        finish(folder / "summary.json", summary)
        print("\n" + "\n\n".join(filter(None, text)), flush=True)
        return summary

    def scores(self, made: Mapping[str, Samples]) -> dict[str, dict[str, Score]]:
        """Of each sampler, and of training data where the scoring has metrics."""
        drawn = {name: samples.x for name, samples in made.items()}
        found = self.scoring.of(drawn, self.dataset)
        if TRAINING in found:
            raw = self.dataset.train.raw
            drawn[TRAINING] = self.dataset.encode(raw[evenly_spaced(len(raw), min(len(raw), len(self.seeds)))])
        return {row: of_row | found[row] for row, of_row in distances_of(drawn, self.dataset).items()}

    def moments(self, made: Mapping[str, Samples]) -> dict[str, list[str]]:
        """Means and deviations of the columns of a table, held-out rows beside samples; empty for other data."""
        if not self.dataset.columns:
            return {}
        raw = {name: self.dataset.decode(samples.x) for name, samples in made.items()}
        return moments(raw, self.dataset.test.raw[:], self.dataset.columns)

    def levels(self) -> list[Level]:
        """The loss at each noise level, where it is asked for."""
        if not self.evaluation.levels:
            return []
        return noise_levels(self.denoiser, self.dataset, self.evaluation.levels, conditional=self.conditional)

    def notes(self) -> list[str]:
        """On what the numbers were measured, and which were not."""
        protocol, skipped = self.scoring.protocol(self.dataset, self.evaluation.samples), self.scoring.skipped
        said = [f"Not measured: {'; '.join(skipped)}."] if skipped else []
        said += [f"@{self.versus.folder.name} is the run {self.versus.folder}."] if self.versus else []
        if self.scoring.metrics:
            said.append(
                f"Scores on {protocol['features']} ({protocol['coordinates']}) of {protocol['samples']:,} samples, "
                f"{protocol['held_out']:,} held-out and {protocol['training']:,} training points; "
                f"{protocol['error']}. "
                f"{TRAINING} shows what samples of the law of the data score, and what copies do."
            )
        return said

    def bits_note(self, bits: BitsPerDim) -> str:
        """Bits/dim, which no sampler changes."""
        exact, accuracy = exact_bits(self.dataset, self.evaluation.points), self.likelihood.accuracy
        nats = math.prod(self.dataset.event_shape) * math.log(2)
        rows = f" log p of a row: {-nats * bits.mean:.4f} ± {nats * bits.stderr:.4f} nats."
        return (
            f"bits/dim of the model: {bits.mean:.4f} ± {bits.stderr:.4f} on {bits.points} held-out points: "
            f"{bits.meaning}, {self.likelihood.how}, "
            f"{'uniform dequantisation, ' if self.likelihood.dequantises and self.dataset.codec.discrete else ''}"
            f"{', '.join(f'{name}={value:g}' for name, value in accuracy.items())}, {bits.evaluations:.0f} "
            f"evaluations, {bits.seconds:.1f} s."
            f"{'' if exact is None else f' The true density has {exact:.4f} on the same points.'}"
            f"{rows if self.dataset.columns else ''}"
        )

    def draw(
        self,
        made: Mapping[str, Samples],
        scores: Mapping[str, Mapping[str, Score]],
        levels: Sequence[Level],
        folder: Path,
    ) -> Iterator[Path]:
        """`scores.png` and `noise.png`, where there is something to draw."""
        values = {row: {name: (each.value, each.stderr) for name, each in of.items()} for row, of in scores.items()}
        costs = {
            "network calls": {name: samples.evaluations for name, samples in made.items()},
            f"seconds for {len(self.seeds):,} samples": {name: samples.seconds for name, samples in made.items()},
        }
        if self.scoring.metrics:
            yield figures.score_chart(costs, values, folder / "scores.png")
        if levels:
            losses = {what: [(each.value, each.stderr) for each in found] for what, found in by_split(levels).items()}
            losses.pop("held out − training")
            yield figures.noise_chart([level.noise for level in levels], losses, folder / "noise.png")


def list_files(folder: Path) -> str:
    """What a command has left in its folder, a line each."""
    return "\n".join([f"Results in {folder}:", *(f"  {path}" for path in sorted(folder.glob("[!.]*")))])
