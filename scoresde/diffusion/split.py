"""A network with two outputs: one for the mean of a reverse step, one for its variance."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..ops.broadcast import coefficient
from .denoiser import Cond, Preconditioned
from .prediction import Prediction
from .sde import SDE


class Split(Preconditioned):
    r"""A network of 2C channels: the first C are F, as of `Preconditioned`, the others v, which says the variance.

    The step t → s of a chain has log Σ = v' log β + (1 − v') log β̃ with v' = (v + 1)/2 for each dimension, between
    the variance β of the forward move and β̃ of its posterior (Nichol & Dhariwal 2021, eq. 15): see `step_variances`.
    v is about [−1, 1], and not kept from leaving it. A network that is zero at the start has v' = ½.

    `Ancestral` and `vlb` go by v; all that knows ODEs and the continuous SDE alone goes by F. `HybridLoss` trains both.

    Its arguments are those of `Preconditioned`, with a network such as `nn.DiT(…, outputs=2)`.
    """

    heads = 2

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        scales = self.sde.at(t, x)
        mean, v = self.output(x, scales, cond).chunk(2, 1)
        return replace(self.parameterization.prediction(mean, x, scales), share=0.5 * (v + 1))


def step_variances(sde: SDE, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """(log β̃, log β/β̃) of a step from t to s < t, of their shape; β̃ is of q(x_s | x_t, x_0), and β of q(x_t | x_s).

    β = σ_t² (1 − e^{λ_t − λ_s}) and β̃ = σ_s² (1 − e^{λ_t − λ_s}), which for a table of DDPM, respaced or not, are
    1 − ᾱ_t/ᾱ_s and (1 − ᾱ_s)/(1 − ᾱ_t) β (Ho et al. 2020, eq. 7).
    """
    wider = 2 * (sde.marginal(t)[1] / sde.marginal(s)[1]).log()
    return 2 * sde.transition(s, t)[1].log() - wider, wider


def step_divergence(sde: SDE, t: Tensor, s: Tensor, squared: Tensor, share: Tensor | float) -> Tensor:
    r"""KL(q(x_s | x_t, x_0) ‖ N(μ̂, Σ)) of each dimension in nats, like `squared` (Ho et al. 2020, eq. 5 and 8):

    ½ [log Σ/β̃ + (1 + (μ − μ̂)²/β̃) β̃/Σ − 1], with (μ − μ̂)²/β̃ = (SNR_s/SNR_t − 1)(ε − ε̂)². 0 where s = t.

    Args:
        t, s: times () or (B,), s ≤ t.
        squared: (ε − ε̂)² at x_t (B, *event).
        share: v' of log Σ, like it or a number: 0 for β̃, 1 for β.
    """
    wider = share * coefficient(2 * (sde.marginal(t)[1] / sde.marginal(s)[1]).log(), squared)
    apart = coefficient(torch.expm1(sde.log_snr(s) - sde.log_snr(t)), squared) * squared
    return 0.5 * (wider + (1 + apart) * (-wider).exp() - 1)
