"""What a command makes of an inverse problem: restored samples, their mean and spread, and how far they are off."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import ConfigError, build, taken
from ..data import Dataset
from ..diffusion.denoiser import Cond, Denoiser, model_device
from ..inverse import WithoutMeasurement
from ..sampling import Sampler
from . import figures
from .conditions import by_name, told_arrays
from .evaluation import Samples
from .problem import Problem, raw_measurement, raw_values


@dataclass(frozen=True)
class Method:
    """How a problem is solved: what is sampled, by what, and how many at a time."""

    denoiser: Denoiser
    samplers: dict[str, Sampler]
    batch_size: int


def choose_method(
    problem: Problem | None, node: Any, denoiser: Denoiser, samplers: Mapping[str, Sampler], allow: Sequence[str], *,
    cond: Cond, n: int, batch_size: int,
) -> Method:  # fmt: skip
    """The posterior method that `node` describes: a denoiser around `denoiser`, or steps around or instead of those of
    the samplers. Particles of one input move together, in a batch of their own. Without a problem all stays as it is.

    Raises:
        ConfigError, ValueError: it cannot be built, or does not fit; or n particles are more than a batch, or are told
            different things by `cond`.
    """
    if problem is None:
        return Method(denoiser, dict(samplers), batch_size)
    observation = copy.deepcopy(problem.observation).to(model_device(denoiser))
    asks = taken(node, allow, key="posterior")[0]
    if "denoiser" in asks:
        told = build(node, allow, key="posterior", denoiser=denoiser, observation=observation)
        return Method(told, dict(samplers), batch_size)
    facts: dict[str, Any] = {}
    if "particles" in asks:
        if n > batch_size:
            raise ConfigError(f"The n={n} particles of an input move together: batch_size is at least {n}.")
        for name, rows in by_name(cond).items():
            each = rows.unflatten(0, (-1, n)).nan_to_num()
            if not torch.equal(each, each[:, :1].expand_as(each)):
                raise ConfigError(
                    f"The n={n} particles of an input move together and are told the same: cond.{name} has one row, or "
                    "is input."
                )
        batch_size, facts = n, {} if node.get("particles") else {"particles": n}

    def around(sampler: Sampler) -> Sampler:
        own = {"step": sampler.step} if "step" in asks else {}
        step = build(node, allow, key="posterior", observation=observation, **own, **facts)
        return Sampler(step, sampler.grid, sampler.steps, sampler.denoise)

    return Method(
        WithoutMeasurement(denoiser, observation),
        {name: around(sampler) for name, sampler in samplers.items()},
        batch_size,
    )


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
    problem: Problem, made: Mapping[str, Samples], dataset: Dataset, folder: Path, *,
    cond: Cond, seeds: Sequence[int], pictures: bool,
) -> None:  # fmt: skip
    """`samples.npz` and pictures, of the first sampler without its name, of others with it.

    Arrays, in the coordinates of the raw data: given (k, *y), NaN where nothing is seen; mask (*event); truth
    (k, *event), where there is one; samples (k, n, *event); mean and std (k, *event), not rounded; and what
    samples were told, `labels` (k, n), `cond_vector`, `cond_image`, `cond_tokens` (k, n, …).
    """
    arrays: dict[str, Any] = {
        "given": raw_measurement(problem, dataset).numpy(), "inputs": np.asarray(problem.inputs),
        "seeds": np.asarray(list(seeds)), **told_arrays(cond, len(problem.inputs)),
    }  # fmt: skip
    if problem.mask is not None:
        arrays["mask"] = problem.mask.numpy()
    if problem.truth is not None:
        arrays["truth"] = dataset.decode(problem.truth).numpy()
    for index, (name, samples) in enumerate(made.items()):
        suffix, x = f"-{name}" if index else "", _by_input(samples.x, problem)
        slope = raw_values(torch.ones(()), dataset) - raw_values(torch.zeros(()), dataset)
        arrays |= {
            f"samples{suffix}": dataset.decode(x).numpy(),
            f"mean{suffix}": raw_values(x.mean(1), dataset).numpy(),
            f"std{suffix}": (slope * x.std(1, correction=0)).numpy(),
        }
        if pictures:
            figures.restored(
                problem.y, x, problem.truth, folder / f"restored{suffix}.png",
                seen=problem.seen if problem.mask is not None else None, limits=data_range(dataset),
            )  # fmt: skip
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
