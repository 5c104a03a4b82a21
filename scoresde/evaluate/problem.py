"""An inverse problem in model coordinates, and its parts in units of the raw data."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ..codecs import Scaling
from ..data import Dataset
from ..inverse import Observation


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

    def told(self, n: int) -> dict[str, Tensor]:
        """What a posterior denoiser hears of n samples of each input."""
        return {"y": self.y.repeat_interleave(n, 0)}

    def residual(self, x: Tensor) -> float:
        """Root mean square of y − A(x) over what is seen, for x (k, n, *event): std if all is well."""
        gap = self.observation(x.flatten(0, 1)) - self.y.repeat_interleave(x.shape[1], 0)
        return float(gap[:, self.seen].double().square().mean().sqrt())


def affine(scaling: Scaling, picture: bool = False) -> tuple[float, float]:
    """(slope, offset) of model data = slope · raw + offset; of integers, the centres of their bins.

    The 256 levels of a picture span the range of the data, however many levels these have.
    """
    width, levels = scaling.high - scaling.low, 256 if picture else scaling.levels
    if levels is not None:
        return width / levels, scaling.low + width / levels / 2
    slope = width / (scaling.raw_high - scaling.raw_low)
    return slope, scaling.low - slope * scaling.raw_low


def raw_values(x: Tensor, dataset: Dataset) -> Tensor:
    """Model data in units of the raw data, not rounded."""
    slope, offset = affine(dataset.scaling)
    return (x - offset) / slope


def raw_measurement(problem: Problem, dataset: Dataset) -> Tensor:
    """y (k, *y) in units of the raw data, NaN where nothing is seen; of operators that are not linear, as it is."""
    if not problem.observation.linear:
        return problem.y
    slope, offset = affine(dataset.scaling)
    constant = problem.observation(torch.full((1, *dataset.event_shape), offset))
    return torch.where(problem.seen, (problem.y - constant) / slope, torch.nan)
