"""The loss of a network that learns the variance of its reverse steps, too."""

from __future__ import annotations

import math

from torch import Tensor

from ..checks import positive
from ..diffusion.conditions import Cond
from ..diffusion.denoiser import Denoiser
from ..diffusion.split import step_divergence
from ..noise.rng import Rng
from .denoising import DenoisingLoss, DiscreteTimes
from .loss import Terms


class HybridLoss(DenoisingLoss):
    r"""‖ε̂ − ε‖²/D + weight · L_vlb at the steps of a discrete process (Nichol & Dhariwal 2021, eq. 16).

    L_vlb, in bits/dim, is N/(D ln 2) times the KL divergence of the drawn step, k = 2 … N of N, from its posterior, and
    its gradient goes to the variance alone: the mean is held. The step to t_min is the last that has a variance; what
    comes after it is the decoder.

    Args:
        denoiser: what is trained, a `Split`.
        steps: N; None for as many as the table of the SDE has.
        weight: of L_vlb, > 0.

    Raises:
        ValueError: a denoiser without a learned variance; an SDE of continuous time without `steps`.
    """

    def __init__(self, denoiser: Denoiser, steps: int | None = None, weight: float = 1e-3):
        if denoiser.heads != 2:
            raise ValueError(
                "The hybrid loss trains a variance, which this denoiser does not have: take denoiser=split with "
                "network.outputs=2, or loss=ddpm without a variance."
            )
        steps = denoiser.sde.entries if steps is None else steps
        if steps is None:
            raise ValueError(f"{denoiser.sde} has continuous time: take sde=ddpm, or say how many steps= there are.")
        super().__init__(denoiser, DiscreteTimes(steps))
        self.steps, self.weight = steps, positive(weight, "weight", "the weight of the variational bound")

    def terms(self, x0: Tensor, cond: Cond = None, *, rng: Rng | None = None) -> Terms:
        simple, bound, t = self._parts(x0, cond, rng)
        loss = simple + self.weight * bound
        return Terms(loss, loss, t)

    def measured(self, x0: Tensor, cond: Cond = None, *, rng: Rng | None = None) -> dict[str, Tensor]:
        """As in `Loss`, and "vlb", what L_vlb has in bits/dim: the bound without its prior and decoder."""
        simple, bound, _ = self._parts(x0, cond, rng)
        return {"loss": simple + self.weight * bound, "vlb": bound}

    def _parts(self, x0: Tensor, cond: Cond, rng: Rng | None) -> tuple[Tensor, Tensor, Tensor]:
        """(‖ε̂ − ε‖²/D, an estimate of L_vlb in bits/dim, drawn times), each (B,)."""
        simple, t, x0, prediction = self.errors(x0, cond, rng)
        sde = self.denoiser.sde
        step = sde.t_max / self.steps
        before = (t - step).clamp(min=max(step, sde.t_min))  # of the first step t itself, where the divergence is 0
        scales, share = prediction.scales, prediction.share
        assert share is not None
        squared = (scales.alpha / scales.sigma * (x0 - prediction.x0.detach())) ** 2  # (ε − ε̂)²
        nats = step_divergence(sde, t, before, squared, share).flatten(1).mean(1)
        return simple, self.steps / math.log(2) * nats, t
