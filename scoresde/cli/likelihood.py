"""scoresde-likelihood: held-out bits/dim of a trained run."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from torch import Tensor

from ..config import ConfigError
from ..evaluate.cascade import OfCascade
from ..evaluate.evaluation import choose_split, evenly_spaced
from ..evaluate.likelihood import BitsPerDim, Likelihood
from ..metrics.jackknife import mean_score
from ..runs import folder as folders
from ..runs.load import chosen_run
from ..runs.publish import publish, replacing
from ..runs.run import Run
from ._hydra import Command, launch, read, refusing
from .cascade import chosen_cascade
from .given import measured_on, with_given


def main() -> None:
    """Entry point of `scoresde-likelihood`."""
    launch(likelihood, "likelihood")


def likelihood(cfg: DictConfig) -> float:
    """Writes likelihood.json and the value of each point; returns the mean for sweepers (NaN on ranks above 0)."""
    with refusing():
        command = read(cfg)
        folder, options = command.folder, command.options
        if not command.is_due("likelihood.json"):
            return float("nan")
        measure, logger = command.build("likelihood"), command.build("logger")
        runs, measure = choose_runs(command, measure)
        split = "test" if options["data"] is not None else options["split"]
        points = choose_split(runs[0].dataset, split)
        index = evenly_spaced(len(points), options["n"])
        shards = command.shards(runs[0], points=points.digest(), versus=runs[-1].digest)
        what = {"split": split, "points": options["n"], "seed": options["seed"]}
        jobs = [measure.job(run.denoiser, run.dataset, **what, conditional=run.conditional) for run in runs]
    jobs[1:] = [replace(job, name="versus") for job in jobs[1:]]
    if shards.rank == 0:
        print(f"Batches: {jobs[0].count}; {measure.cost(runs[0].event_shape, runs[0].denoiser.sde)} …", flush=True)
    for job in jobs:
        shards.work(job)
    if shards.rank:
        return float("nan")
    found = [shards.result(job) for job in jobs]
    record = {name: options[name] for name in ("weights", "split", "seed", "likelihood", "data")}
    each = [{"run": str(run.folder), "step": run.step} | bits.record for run, bits in zip(runs, found, strict=True)]
    record |= each[0] | {"versus": each[1] | difference(*found) if each[1:] else None}
    write_points(folder, index, found, points.labels)
    folders.finish(folder / "likelihood.json", record)
    shards.clear()
    with command.logging(logger):
        gap = record["versus"] or {}
        numbers = {record["estimator"]: record["mean"], "bpd_stderr": record["stderr"], "points": record["points"]}
        logger.summary(numbers | {name: gap[name] for name in ("difference", "difference_stderr") if gap})
    where = f"{split} of {runs[0].dataset.name}" if options["data"] is None else runs[0].dataset.name
    for run, bits in zip(runs, found, strict=True):
        print(
            f"{run.folder}: {bits.mean:.4f} ± {bits.stderr:.4f} bits/dim on {bits.points} points of {where} "
            f"({bits.evaluations:.0f} evaluations, {bits.seconds:.1f} s), of {bits.meaning}"
        )
        if of := measure.whose(run.denoiser):
            print(of)
    if gap:
        value = f"{gap['difference']:+.4f} ± {gap['difference_stderr']:.4f}"
        print(f"{runs[1].folder} less {runs[0].folder}: {value} bits/dim, point by point")
    print(f"Values in {folder}")
    return found[0].mean


def choose_runs(command: Command, measure: Likelihood) -> tuple[list[Run], Likelihood]:
    """The run with the points that it is measured on, and the one that it is compared with on the same, if any; and how
    they are measured, which of a cascade is stage by stage."""
    options, other = command.options, command.options["versus"]
    if options["then"] is not None:
        cascade = chosen_cascade(options, command.allow, whole_data=options["data"] is None)
        return [with_given(command, cascade.whole)], OfCascade(measure, cascade)
    run = with_given(command, chosen_run(options, command.allow, whole_data=options["data"] is None))
    runs = [run]
    if other is not None:
        second = measured_on(chosen_run({**options, "run": other}, command.allow), run.dataset)
        if (own := run.codec.rounding) != (its := second.codec.rounding):
            raise ConfigError(f"versus={other} counts {its} of the same values, and run={run.folder} {own}.")
        runs.append(second)
    return runs, measure


def difference(first: BitsPerDim, second: BitsPerDim) -> dict[str, float]:
    """How much more bits/dim the second run needs, with the standard error of the mean over pairs."""
    gap = mean_score(second.values - first.values)
    return {"difference": gap.value, "difference_stderr": gap.stderr}


def write_points(folder: Path, index: Tensor, found: Sequence[BitsPerDim], labels: Tensor | None) -> None:
    """`bits_per_dim.npz` and `.csv`: index, bits/dim, standard error, label, and those of `versus`."""
    columns = {"index": index, "bits_per_dim": found[0].values, "stderr": found[0].errors}
    columns |= {} if labels is None else {"label": labels[index]}
    for bits in found[1:]:
        columns |= {"versus": bits.values, "versus_stderr": bits.errors}
    arrays: dict[str, Any] = {name: values.numpy() for name, values in columns.items()}
    with replacing(folder / "bits_per_dim.npz") as file:
        np.savez_compressed(file, **arrays)
    csv.writer(text := io.StringIO(newline="")).writerows([list(arrays), *zip(*arrays.values(), strict=True)])
    publish(folder / "bits_per_dim.csv", text.getvalue())


if __name__ == "__main__":
    main()
