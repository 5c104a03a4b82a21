"""scoresde-likelihood: held-out bits/dim of a trained run."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from torch import Tensor

from ..evaluate.evaluation import choose_split, evenly_spaced
from ..evaluate.likelihood import BitsPerDim
from ..runs import folder as folders
from ..runs.load import chosen_run
from ..runs.publish import publish, replacing
from ._hydra import launch, read, refusing


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
        measure = command.build("likelihood")
        run = chosen_run(options, command.allow, whole_data=True)
        index = evenly_spaced(len(choose_split(run.dataset, options["split"])), options["n"])
        shards = command.shards(run)
    what = {"split": options["split"], "points": options["n"], "seed": options["seed"], "conditional": run.conditional}
    job = measure.job(run.denoiser, run.dataset, **what)
    if shards.rank:
        shards.work(job)
        return float("nan")
    print(f"Batches: {job.count}; {measure.cost(run.dataset.event_shape)} …", flush=True)
    bits = shards.result(job)
    record = {"run": str(run.folder), "step": run.step}
    record |= {name: options[name] for name in ("weights", "split", "seed", "likelihood")}
    record |= bits.record
    write_points(folder, index, bits, choose_split(run.dataset, options["split"]).labels)
    folders.finish(folder / "likelihood.json", record)
    shards.clear()
    print(
        f"{bits.mean:.4f} ± {bits.stderr:.4f} bits/dim on {bits.points} points of {options['split']} "
        f"({bits.evaluations:.0f} evaluations, {bits.seconds:.1f} s), of {bits.meaning}. Values in {folder}"
    )
    return bits.mean


def write_points(folder: Path, index: Tensor, bits: BitsPerDim, labels: Tensor | None) -> None:
    """`bits_per_dim.npz` and `.csv`: index in the split, bits/dim, its standard error and label of each point."""
    columns = {"index": index, "bits_per_dim": bits.values, "stderr": bits.errors}
    columns |= {} if labels is None else {"label": labels[index]}
    arrays: dict[str, Any] = {name: values.numpy() for name, values in columns.items()}
    with replacing(folder / "bits_per_dim.npz") as file:
        np.savez_compressed(file, **arrays)
    csv.writer(text := io.StringIO(newline="")).writerows([list(arrays), *zip(*arrays.values(), strict=True)])
    publish(folder / "bits_per_dim.csv", text.getvalue())


if __name__ == "__main__":
    main()
