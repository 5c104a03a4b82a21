"""What the likelihood asks of a solver: the flow's state at the other end, and the change of log p on the way there."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..diffusion.denoiser import Denoiser
from .flow import Flow


@dataclass(frozen=True)
class Solved:
    """Where a path ended, and the integrals along it.

    Attributes:
        end: y = x/α at the last node (B, D).
        columns: ∫ rates du (B, C).
        correction: (B,) nats, to be added to log p for the defects of the path.
        error: (B,) nats, the solver's own estimate of its error in log p; NaN where it has none.
    """

    end: Tensor
    columns: Tensor
    correction: Tensor
    error: Tensor


class Solver(abc.ABC):
    """How the integral of a likelihood is solved: `Tolerance` or `Budget`; or `FlowMapSteps`, which is no integral.

    Attributes:
        estimator: the name under which a density by it is logged.
        how: what measures it, in words.
    """

    estimator, how = "bpd/ode", "by the probability-flow ODE"

    def whose(self, denoiser: Denoiser) -> str:
        """Whose density it is, in words; "" where that goes without saying.

        Raises:
            ValueError: a model that it has none of.
        """
        return whose_at_rest(denoiser)

    @abc.abstractmethod
    def __call__(self, flow: Flow, y: Tensor, *, up: bool) -> Solved:
        """Follows `flow` from y = x/α (B, D) at the cut-off up to t_max, or down from there.

        Raises:
            SolverError: a solve that failed; the samples are named.
        """

    @property
    @abc.abstractmethod
    def accuracy(self) -> dict[str, float]:
        """The settings that a number has to be quoted with."""

    @property
    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """All settings, as JSON takes them."""


def whose_at_rest(denoiser: Denoiser) -> str:
    """What is measured where a flow map is asked for x̂_0 alone, in words; "" of models that are none."""
    if "end" not in denoiser.told:
        return ""
    return (
        "This model is a flow map, and the number is of the usual model that its g is at s = t, not of the samples "
        "that its few steps make: likelihood=flow_map measures those."
    )
