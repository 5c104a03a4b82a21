"""Restored samples of an inverse problem: their mean and deviation, how far they are off, arrays and pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import Dataset
from ..diffusion.denoiser import Cond
from . import figures
from .conditions import condition_arrays
from .evaluation import Samples
from .problem import Problem, raw_measurement, raw_values


def measured(problem: Problem, made: Mapping[str, Samples], dataset: Dataset) -> dict[str, dict[str, float]]:
    """By sampler: `residual` beside `std`, and where the truth is known, `psnr_mean` and `psnr_sample`, in dB.

    PSNR is 10 log₁₀ (range² / mean squared error), of the mean of the samples, and of one sample on average.
    """
    low, high = data_range(dataset)
    found: dict[str, dict[str, float]] = {}
    for name, samples in made.items():
        x = _by_input(samples.x, problem)
        found[name] = {"residual": problem.residual(x), "std": float(problem.observation.std.max())}
        if problem.truth is not None:
            for key, of in (("psnr_mean", x.mean(1, keepdim=True)), ("psnr_sample", x)):
                error = float((of - problem.truth[:, None]).double().square().mean())
                found[name][key] = 10 * math.log10((high - low) ** 2 / max(error, 1e-20))
    return found


def write_restored(
    problem: Problem,
    made: Mapping[str, Samples],
    dataset: Dataset,
    folder: Path,
    *,
    cond: Cond,
    seeds: Sequence[int],
    pictures: bool,
) -> None:
    """`samples.npz` and pictures, of the first sampler without its name, of others with it.

    Arrays, in the coordinates of the raw data: given (k, *y), NaN where nothing is seen; mask (*event); truth
    (k, *event), where there is one; samples (k, n, *event); mean and std (k, *event), not rounded; and the conditions
    of the samples, `labels` (k, n), `cond_vector`, `cond_image`, `cond_tokens` (k, n, …).
    """
    arrays: dict[str, Any] = {
        "given": raw_measurement(problem, dataset).numpy(),
        "inputs": np.asarray(problem.inputs),
        "seeds": np.asarray(seeds),
        **condition_arrays(cond, len(problem.inputs)),
    }
    if problem.mask is not None:
        arrays["mask"] = problem.mask.numpy()
    if problem.truth is not None:
        arrays["truth"] = dataset.decode(problem.truth).numpy()
    slope = raw_values(torch.ones(()), dataset) - raw_values(torch.zeros(()), dataset)
    seen, limits = problem.seen if problem.mask is not None else None, data_range(dataset)
    for index, (name, samples) in enumerate(made.items()):
        suffix, x = f"-{name}" if index else "", _by_input(samples.x, problem)
        arrays[f"samples{suffix}"] = dataset.decode(x).numpy()
        arrays[f"mean{suffix}"] = raw_values(x.mean(1), dataset).numpy()
        arrays[f"std{suffix}"] = (slope * x.std(1, correction=0)).numpy()
        if pictures:
            path = folder / f"restored{suffix}.png"
            figures.restored(problem.y, x, problem.truth, path, seen=seen, limits=limits)
            figures.trajectory(samples.frames, samples.times, folder / f"trajectory{suffix}.png")
    np.savez_compressed(folder / "samples.npz", **arrays)


def data_range(dataset: Dataset) -> tuple[float, float]:
    """(least, greatest) value of model data: those of the scaling, or those that the training data have."""
    scaling = dataset.scaling
    if scaling.levels is not None or scaling.bounded:
        return scaling.low, scaling.high
    x = dataset.encode(dataset.train.raw)
    return float(x.min()), float(x.max())


def _by_input(x: Tensor, problem: Problem) -> Tensor:
    """(k·n, *event) -> (k, n, *event)."""
    return x.unflatten(0, (len(problem.inputs), -1))
