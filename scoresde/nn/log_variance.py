"""The learned weight of each noise level in a training loss."""

from __future__ import annotations

from torch import Tensor, nn

from .embedding import FourierEmbedding


class LogVariance(nn.Module):
    r"""u(λ), a learned logarithm of the mean loss at log-SNR λ, linear in Fourier features (Karras et al. 2024, EDM2).

    Minimising loss·e^{−u} + u makes u = log E[loss | λ], and so counts errors relative to what is usual at their noise
    level (EDM2, eq. 14–16; Kendall et al. 2018, eq. 7). It starts at u = 0, where the objective is the loss.

    Args:
        channels: number of features of c_noise = −λ/8, even, ≥ 2.
    """

    def __init__(self, channels: int = 128):
        super().__init__()
        self.features = FourierEmbedding(channels)
        self.linear = nn.Linear(channels, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, log_snr: Tensor) -> Tensor:
        """u (B,) of λ (B,)."""
        return self.linear(self.features(-log_snr / 8).to(self.linear.weight.dtype)).squeeze(1)
