"""What every training objective is: terms for each sample, to be averaged by the caller."""

from __future__ import annotations

import abc
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..diffusion.conditions import Cond
from ..noise.rng import Rng


class Terms(NamedTuple):
    """What a loss makes of a batch.

    Attributes:
        objective: (B,), to be minimised: the loss, or loss·e^{−u} + u where the weighting is learned.
        loss: (B,), the weighted error, to be reported.
        t: (B,), the times drawn.
    """

    objective: Tensor
    loss: Tensor
    t: Tensor


class Loss(nn.Module, abc.ABC):
    """A training objective. What it trains is its attribute `denoiser`, which training and checkpoints know."""

    denoiser: Any  # a Denoiser, or a NoisyClassifier

    @abc.abstractmethod
    def terms(self, x0: Tensor, cond: Cond = None, *, rng: Rng | None = None) -> Terms:
        """The terms of samples x0 (B, *event), in floating point; without `rng` the noise is `fresh`."""

    def forward(self, x0: Tensor, cond: Cond = None, *, rng: Rng | None = None) -> Tensor:
        """`terms(…).objective` (B,), to be minimised."""
        return self.terms(x0, cond, rng=rng).objective

    def measured(self, x0: Tensor, cond: Cond = None, *, rng: Rng | None = None) -> dict[str, Tensor]:
        """What is reported of held-out samples, (B,) each, by name; "loss" is always among it."""
        return {"loss": self.terms(x0, cond, rng=rng).loss}


def fresh() -> Rng:
    """A stream seeded by torch's global generator: a fixed seed would repeat the same noise at every call."""
    return Rng(int(torch.randint(2**31, (), device="cpu")))
