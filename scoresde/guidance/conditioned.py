"""A condition that is filled in."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..diffusion.conditions import Cond, expand, one_entry, parted, tell
from ..diffusion.denoiser import Denoiser, DenoiserWrapper
from ..diffusion.prediction import Prediction


class Conditioned(DenoiserWrapper):
    """A denoiser with its condition filled in: for samplers that have none, or another.

    Args:
        denoiser: of P(x, t, cond).
        cond: the condition of all samples, one entry (in a CUDA graph: on the device); or a function of the
            sampler's own condition, which is per sample: `lambda cond: {"label": cond["first"]}`.

    Raises:
        ValueError: several entries (solvers ask for some of a batch only, so what differs is given to the sampler); or,
            when called, a second condition beside one that is filled in.
    """

    def __init__(self, denoiser: Denoiser, cond: Cond | Callable[[Cond], Cond]):
        super().__init__(denoiser)
        self.cond = cond if callable(cond) else one_entry(cond)

    def null(self, cond: Cond) -> Cond:
        return None

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        cond, told = parted(cond, self.told)  # a flow map is told besides where it goes
        if cond is not None and not callable(self.cond):
            raise ValueError("This denoiser has its condition already; leave cond out.")
        filled = self._filled_in(cond, x)
        return self.denoiser(x, t, tell(filled, **told) if told else filled)

    def prior_log_prob_given(self, z: Tensor, cond: Cond) -> Tensor:
        return self.denoiser.prior_log_prob_given(z, self._filled_in(cond, z))

    def _filled_in(self, cond: Cond, like: Tensor) -> Cond:
        return self.cond(cond) if callable(self.cond) else expand(self.cond, like)
