"""An inverse problem in model coordinates: how it is measured, and its parts in units of the raw data."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ..codecs import Scaling
from ..data import Dataset
from ..data.readers import held_out, is_picture, names_held_out, read_sample
from ..data.source import misfit
from ..diffusion.conditions import Cond, named
from ..inverse import Observation
from ..noise.rng import Rng

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

    def residual(self, x: Tensor) -> float:
        """Root mean square of y − A(x) over what is seen, for x (k, n, *event): std if all is well."""
        gap = self.observation(x.flatten(0, 1)) - self.y.repeat_interleave(x.shape[1], 0)
        return float(gap[:, self.seen].double().square().mean().sqrt())


class Measurement:
    """Reads what was measured, or measures clean samples, by one observation.

    Attributes:
        seen: (*y) bool, the entries of y on which x has any influence.

    Raises:
        ValueError: an operator that is said to be linear and is not.
    """

    def __init__(self, dataset: Dataset, observation: Observation):
        self.dataset, self.observation = dataset, observation
        event = dataset.event_shape
        noise = Rng(0).normal((1, *event))
        observation.near(noise, observation.split({"y": observation(noise)})[0])  # refuses what is not linear
        self.seen = (observation(noise) != 0)[0]
        # of the constant 1: an operator that keeps it commutes with the scaling of the data
        self._unit = observation(torch.ones(1, *event))[0]
        self._keeps = bool(((self._unit - 1)[self.seen].abs() < 1e-4).all())

    def problem(self, inputs: list[str], mask: Tensor | None, *, simulate: bool, seed: int) -> Problem:
        """The problem of inputs that are all held-out samples, all clean (`simulate`), or all measured.

        Raises:
            FileNotFoundError: no such file.
            ValueError: what is in a file does not fit, or inputs of both kinds.
        """
        clean = [self._clean(name) for name in inputs if simulate or names_held_out(name)]
        if clean and len(clean) < len(inputs):
            raise ValueError("Inputs are all test:… (or simulate=true), or all measured; got both.")
        ys = [self._simulated(x, seed) for x in clean] or [self._read(name) for name in inputs]
        truth = torch.stack(clean) if clean else None
        return Problem(self.observation, torch.stack(ys), self.seen, mask, truth, inputs)

    def _clean(self, name: str) -> Tensor:
        """The sample that is to be degraded."""
        dataset = self.dataset
        if names_held_out(name):
            return dataset.encode(dataset.test.raw[held_out(name, len(dataset.test), "input")])[0]
        values = read_sample(name, dataset.event_shape, "a clean sample")
        self._check_range(name, values)
        slope, offset = affine(dataset.scaling, is_picture(name))
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
            values = read_sample(name, shape, "what was measured")
        except ValueError as error:
            if shape == self.dataset.event_shape:
                raise
            raise ValueError(f"{error} To degrade a clean sample instead: simulate=true.") from error
        if is_picture(name) and not self._keeps:
            raise ValueError(f"{name}: what this operator measures is no picture; give its values as .npy.")
        self._check_range(name, values[self.seen])
        if not self.observation.linear:
            return values  # there is no rule: taken to be of model data
        slope, offset = affine(self.dataset.scaling, is_picture(name))
        return torch.where(self.seen, slope * values + offset * self._unit, 0)

    def _check_range(self, file: str, values: Tensor) -> None:
        """Refuses values that the data cannot have, noise included, and pictures of data that have no range."""
        scaling = self.dataset.scaling
        bounded = scaling.levels is not None or scaling.bounded
        if is_picture(file) and not bounded:
            raise ValueError(f"{file}: data without a range are in no picture; give their values as .npy.")
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{file} holds NaN or infinite values.")
        if is_picture(file) or not bounded or not self._keeps:
            return
        low, high = (0, scaling.levels - 1) if scaling.levels else (scaling.raw_low, scaling.raw_high)
        slack = 6 * float(self.observation.std.max()) / affine(scaling)[0] + 1e-6 * (high - low)
        least, most = float(values.min()), float(values.max())
        if least < low - slack or most > high + slack:
            expected = f"values {low:g} … {high:g} as the data of the run have"
            raise misfit(file, expected, f"{least:g} … {most:g}")


def affine(scaling: Scaling, picture: bool = False) -> tuple[float, float]:
    """(slope, offset) of model data = slope · raw + offset; of integers, the centres of their bins.

    The 256 levels of a picture span the range of the data, however many levels these have.
    """
    levels = 256 if picture else scaling.levels
    low, high = (-0.5, levels - 0.5) if levels else (scaling.raw_low, scaling.raw_high)
    slope = (scaling.high - scaling.low) / (high - low)
    return slope, scaling.low - slope * low


def raw_values(x: Tensor, dataset: Dataset) -> Tensor:
    """Model data in units of the raw data, not rounded."""
    slope, offset = affine(dataset.scaling)
    return (x - offset) / slope


def raw_measurement(problem: Problem, dataset: Dataset) -> Tensor:
    """y (k, *y) in units of the raw data, NaN where nothing is seen; unchanged for operators that are not linear."""
    if not problem.observation.linear:
        return problem.y
    slope, offset = affine(dataset.scaling)
    constant = problem.observation(torch.full((1, *dataset.event_shape), offset))
    return torch.where(problem.seen, (problem.y - constant) / slope, torch.nan)
