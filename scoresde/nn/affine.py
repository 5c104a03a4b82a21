"""A network that takes data in another range."""

from __future__ import annotations

from torch import Tensor, nn

from ..diffusion.conditions import Cond
from .unet import UNet


class Affine(nn.Module):
    """network(scale · x + shift, c_noise, cond): with 2 and −1 a network of score_sde takes data in [0, 1].

    Args:
        network: the one inside.
        scale, shift: of its input.
    """

    def __init__(self, network: UNet, scale: float = 2.0, shift: float = -1.0):
        super().__init__()
        self.network, self.scale, self.shift = network, float(scale), float(shift)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Cond = None) -> Tensor:
        """F (B, *event) at x (B, *event) and c_noise (B,)."""
        found: Tensor = self.network(self.scale * x + self.shift, c_noise, cond)
        return found

    def null(self, cond: Cond) -> Cond:
        """That of the network inside."""
        return self.network.null(cond)
