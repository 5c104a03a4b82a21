"""An inverse problem in model coordinates: how it is measured, and how good restored samples are."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..codecs import Codec
from ..data import Dataset
from ..data.by_name import held_out, is_picture, names_held_out, read_sample
from ..data.readers.source import misfit
from ..diffusion.conditions import Cond, named
from ..inverse import Observation
from ..noise.rng import Rng
from ..runs.publish import replacing
from . import figures
from .conditions import condition_arrays
from .evaluation import Samples, by_suffix
from .strips import animation

_NOISE = 2**62  # seeds of the noise in measurements are above those of samples


@dataclass(frozen=True)
class Problem:
    """What is known, in model coordinates.

    Attributes:
        observation: operator and noise level; y comes with the condition.
        y: (k, *y), one for each input; 0 where nothing is seen.
        seen: (*y) bool, the entries of y on which x has any influence.
        mask: (*event) bool, True where x is seen; None where there is no mask.
        truth: (k, *event), None where it is not known.
        inputs: k names.
    """

    observation: Observation
    y: Tensor
    seen: Tensor
    mask: Tensor | None
    truth: Tensor | None
    inputs: list[str]

    @property
    def digest(self) -> str:
        """SHA-256 of what was measured: another picture under the same name is another problem."""
        found = hashlib.sha256(self.y.numpy().tobytes())
        if self.mask is not None:
            found.update(self.mask.numpy().tobytes())
        return found.hexdigest()

    def condition(self, n: int, cond: Cond) -> dict[str, Tensor]:
        """The condition of n samples of each input for a posterior denoiser: y beside what else they have, `cond`."""
        return {"y": self.y.repeat_interleave(n, 0), **named(cond, "cond")}

    def by_input(self, samples: Samples) -> Tensor:
        """(k, n, *event), the samples of each input."""
        return samples.x.unflatten(0, (len(self.inputs), -1))


class Decoded(nn.Module):
    """An operator on samples as one on their latents, A(D(z)): not linear, but differentiable.

    Args:
        codec: with `unfold`, D.
        operator: A.
    """

    linear = False

    def __init__(self, codec: Codec, operator: Callable[[Tensor], Tensor]):
        super().__init__()
        self.codec, self.operator = codec, operator

    def forward(self, x: Tensor) -> Tensor:
        """A(D(x)), (B, *y)."""
        return self.operator(self.codec.unfold(x))


def through(codec: Codec, observation: Observation) -> Observation:
    """The observation as the model sees it: through the decoder, where it is of latents."""
    if codec.pixels is codec:
        return observation
    return Observation(observation.y, Decoded(codec, observation.operator), observation.std, linear=False)


def decoded(codec: Codec, made: Mapping[str, Samples]) -> Mapping[str, Samples]:
    """Samples of latents as those of what an operator acts on."""
    if codec.pixels is codec:
        return made
    with torch.no_grad():
        # noise is no latent: what is shown of it on the way lies within four deviations
        return {
            name: replace(
                each,
                x=codec.unfold(each.x),
                frames=codec.unfold(each.frames.flatten(0, 1).clamp(-4, 4)).unflatten(0, each.frames.shape[:2]),
            )
            for name, each in made.items()
        }


class Measurement:
    """Reads what was measured, or measures clean samples, by one observation.

    Attributes:
        seen: (*y) bool, the entries of y on which x has any influence.

    Raises:
        ValueError: an operator that is said to be linear and is not.
    """

    def __init__(self, dataset: Dataset, observation: Observation):
        self.dataset, self.observation = dataset, observation
        self._deep = dataset.codec.levels == 1 << 16  # a picture of 16 bits holds their levels
        event = dataset.event_shape
        noise = Rng(0).normal((1, *event))
        observation.near(noise, observation.split({"y": observation(noise)})[0])  # refuses what is not linear
        self.seen = (observation(noise) != 0)[0]
        # of the constant 1: an operator that keeps it commutes with the codec of the data
        self._unit = observation(torch.ones(1, *event))[0]
        self._keeps = bool(((self._unit - 1)[self.seen].abs() < 1e-4).all())

    def problem(self, inputs: list[str], mask: Tensor | None, *, simulate: bool, seed: int) -> Problem:
        """The problem of inputs that are all held-out samples, all clean (`simulate`), or all measured.

        Raises:
            FileNotFoundError: no such file.
            ValueError: what is in a file does not fit, inputs of both kinds, or a codec that is not affine.
        """
        affine(self.dataset.codec)
        clean = [self.clean(name) for name in inputs if simulate or names_held_out(name)]
        if clean and len(clean) < len(inputs):
            raise ValueError("Inputs are all test:… (or simulate=true), or all measured; got both.")
        ys = [self._simulated(x, seed) for x in clean] or [self._read(name) for name in inputs]
        truth = torch.stack(clean) if clean else None
        return Problem(self.observation, torch.stack(ys), self.seen, mask, truth, inputs)

    def clean(self, name: str) -> Tensor:
        """A sample in a file, or a held-out one, as model data."""
        dataset = self.dataset
        if names_held_out(name):
            return dataset.encode(dataset.test.raw[held_out(name, len(dataset.test), "input")])[0]
        values = read_sample(name, dataset.raw_shape, "a clean sample", deep=self._deep)
        if dataset.codec.affine is None:
            return dataset.encode(values[None].to(dataset.codec.raw_dtype))[0]
        self._check_range(name, values)
        slope, offset = affine(dataset.codec, is_picture(name) and not self._deep)
        return slope * values + offset

    def _simulated(self, x: Tensor, seed: int) -> Tensor:
        """y of a clean x (*event): its noise depends on x and the seed alone."""
        own = int(hashlib.sha256(x.numpy().tobytes()).hexdigest()[:15], 16)
        seen = self.observation(x[None])
        noise = Rng(seeds=[_NOISE + (own ^ seed)]).normal_like(seen)
        return torch.where(self.seen, seen + self.observation.std.to(seen) * noise, 0)[0]

    def _read(self, name: str) -> Tensor:
        """y from a file, in model coordinates: A of raw values v becomes A of slope · v + offset."""
        shape = tuple(self._unit.shape)
        try:
            values = read_sample(name, shape, "what was measured", deep=self._deep)
        except ValueError as error:
            if shape == self.dataset.event_shape:
                raise
            raise ValueError(f"{error} To degrade a clean sample instead: simulate=true.") from error
        if is_picture(name) and not self._keeps:
            raise ValueError(f"{name}: what this operator measures is no picture; give its values as .npy.")
        self._check_range(name, values[self.seen])
        if not self.observation.linear:
            return values  # there is no rule: taken to be of model data
        slope, offset = affine(self.dataset.codec, is_picture(name) and not self._deep)
        return torch.where(self.seen, slope * values + offset * self._unit, 0)

    def _check_range(self, file: str, values: Tensor) -> None:
        """Refuses values that the data cannot have, noise included, and pictures of data that have no range."""
        codec = self.dataset.codec
        if is_picture(file) and codec.raw_range is None:
            raise ValueError(f"{file}: data without a range are in no picture; give their values as .npy.")
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{file} holds NaN or infinite values.")
        if is_picture(file) or codec.raw_range is None or not self._keeps:
            return
        low, high = codec.raw_range
        slack = 6 * float(self.observation.std.max()) / affine(codec)[0] + 1e-6 * (high - low)
        least, most = float(values.min()), float(values.max())
        if least < low - slack or most > high + slack:
            expected = f"values {low:g} … {high:g} as the data of the run have"
            raise misfit(file, expected, f"{least:g} … {most:g}")


def affine(codec: Codec, picture: bool = False) -> tuple[float, float]:
    """(slope, offset) of model data = slope · raw + offset; of integers, the centres of their bins.

    The 256 levels of a picture span the range of the data, however many levels these have.

    Raises:
        ValueError: a codec that is no such map, under which what is linear in raw data is not so in model data.
    """
    if codec.affine is None:
        raise ValueError(
            "A problem is stated in raw data, and needs model data that are slope · raw + offset, one pair for all; "
            f"this run's are by {codec}. Train on data with one range for all values."
        )
    if picture and codec.model_range is not None:
        low, high = codec.model_range
        return (high - low) / 256, low + (high - low) / 512
    return codec.affine


def measured(problem: Problem, made: Mapping[str, Samples], dataset: Dataset) -> dict[str, dict[str, float]]:
    """By sampler: `residual` beside `std`, and where the truth is known, `psnr_mean` and `psnr_sample`, in dB.

    The residual is the root mean square of y − A(x) over what is seen, `std` if all is well. PSNR is
    10 log₁₀ (range² / mean squared error), of the mean of the samples, and of one sample on average.
    """
    low, high = data_range(dataset)
    found: dict[str, dict[str, float]] = {}
    for name, samples in made.items():
        x = problem.by_input(samples)
        gap = (problem.observation(samples.x) - problem.y.repeat_interleave(x.shape[1], 0))[:, problem.seen]
        residual, std = float(gap.double().square().mean().sqrt()), float(problem.observation.std.max())
        found[name] = {"residual": residual, "std": std}
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

    Arrays, in the coordinates of the raw data: given (k, *y), NaN where nothing is seen, and in model coordinates for
    operators that are not linear; mask (*event); truth (k, *event), where there is one; samples (k, n, *event); mean
    and std (k, *event), not rounded; and the conditions of the samples, `labels` (k, n), `cond_vector`, `cond_image`,
    `cond_tokens` (k, n, …).
    """
    observation, mask, truth = problem.observation, problem.mask, problem.truth
    (slope, offset), given = affine(dataset.codec), problem.y
    if observation.linear:
        constant = observation(torch.full((1, *dataset.event_shape), offset))
        given = torch.where(problem.seen, (given - constant) / slope, torch.nan)
    arrays: dict[str, Any] = {"given": given, "inputs": problem.inputs, "seeds": seeds}
    arrays |= condition_arrays(cond, len(problem.inputs))
    arrays |= {} if mask is None else {"mask": mask}
    arrays |= {} if truth is None else {"truth": dataset.decode(truth)}
    unit = (torch.ones(()) - offset) / slope - (torch.zeros(()) - offset) / slope
    seen, limits = problem.seen if mask is not None else None, data_range(dataset)
    for suffix, samples in by_suffix(made):
        x = problem.by_input(samples)
        arrays[f"samples{suffix}"] = dataset.decode(x)
        arrays[f"mean{suffix}"] = (x.mean(1) - offset) / slope
        arrays[f"std{suffix}"] = unit * x.std(1, correction=0)
        if pictures:
            figures.restored(problem.y, x, truth, folder / f"restored{suffix}.png", seen=seen, limits=limits)
            figures.trajectory(samples.frames, samples.times, folder / f"trajectory{suffix}.png")
            if x.ndim == 6:
                animation(x.flatten(0, 1), folder / f"restored{suffix}.gif", limits, columns=x.shape[1])
    with replacing(folder / "samples.npz") as file:
        np.savez_compressed(file, **arrays)


def data_range(dataset: Dataset) -> tuple[float, float]:
    """(least, greatest) value of model data: those of the codec, or those that the training data have."""
    return dataset.statistics.span
