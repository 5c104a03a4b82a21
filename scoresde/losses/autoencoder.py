r"""Variational autoencoders: log p(x | z) and KL(q(z|x) ‖ N(0, I)) of a network, and the loss that trains one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import positive
from ..diffusion.conditions import Cond
from ..diffusion.sde import SDE
from ..noise.rng import Rng
from ..ops.broadcast import samples
from .loss import Loss, Terms, fresh


class VariationalAutoencoder(nn.Module):
    """A network that encodes and decodes, in the place of a denoiser: what a run of its own trains, and what
    `codecs.Autoencoder` takes.

    Args:
        network: with `encode(x) -> (mean, std)` of q(z|x), `decode(z) -> x`, `log_prob(x, z) -> (B,)` nats, and
            `centred(x)`, such as `nn.Autoencoder`.
        sde: whose t_min stands for the time, of which an autoencoder has none.
    """

    kind, draws, encodes = "an autoencoder", False, True  # see `Denoiser`

    def __init__(self, network: nn.Module, sde: SDE):
        super().__init__()
        self.network: Any = network
        self.sde = sde

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """x (B, *event) encoded, by the mean of q(z|x), and decoded."""
        return self.network.decode(self.network.encode(self.network.centred(x))[0])


class AutoencoderLoss(Loss):
    r"""Per-sample −log p(x|z) + β KL(q(z|x) ‖ N(0, I)) in nats per dimension, z ~ q (Higgins et al. 2017, eq. 4).

    At β = 1 the mean over z is −ELBO (Kingma & Welling 2014, eq. 3). A smaller β spends more nats on z, whose law a
    diffusion model learns later, in place of N(0, I).

    Args:
        autoencoder: what is trained.
        beta: β > 0.
        further: (x (B, *event), decoded (B, *event)) -> (B,), one more term of the reconstruction, such as a
            perceptual or an adversarial one; None for none. Its parameters, if it is a module, are trained too.
        weight: of the further term, > 0, in nats per dimension.

    Raises:
        ValueError: beta or weight out of range.
    """

    def __init__(
        self,
        autoencoder: VariationalAutoencoder,
        *,
        beta: float = 1.0,
        further: Callable[[Tensor, Tensor], Tensor] | None = None,
        weight: float = 1.0,
    ):
        super().__init__()
        self.denoiser = autoencoder
        self.beta, self.weight = positive(beta, "beta"), positive(weight, "weight")
        self.further = further

    def terms(self, x0: Tensor, cond: Cond = None, *, rng: Rng | None = None) -> Terms:
        """The terms of samples x0 (B, *event); without `rng` the noise is `fresh`."""
        x, z, log_p, kl = self._parts(x0, rng)
        dims = x[0].numel()
        objective = (self.beta * kl - log_p) / dims
        if self.further is not None:
            objective = objective + self.weight * self.further(x, self.denoiser.network.decode(z))
        t = torch.full((len(x),), self.denoiser.sde.t_min, dtype=torch.float64, device=x.device)
        return Terms(objective, (kl - log_p) / dims, t)

    def measured(self, x0: Tensor, cond: Cond = None, *, rng: Rng | None = None) -> dict[str, Tensor]:
        """What is reported of held-out samples, (B,) each, in bits/dim of model data, for integers their probability:
        "loss" −ELBO, of which "kl" is KL(q(z|x) ‖ N(0, I))."""
        x, _, log_p, kl = self._parts(x0, rng)
        per_bit = x[0].numel() * math.log(2)
        return {"loss": (kl - log_p).double() / per_bit, "kl": kl.double() / per_bit}

    def _parts(self, x0: Tensor, rng: Rng | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(x, z, log p(x|z), KL)."""
        rng, network = fresh() if rng is None else rng, self.denoiser.network
        x = network.centred(samples(x0, "x0"))
        mean, std = network.encode(x)
        z = mean + std * rng.normal_like(mean)
        kl = 0.5 * (mean.square() + std.square() - 1) - std.log()
        return x, z, network.log_prob(x, z), kl.flatten(1).sum(1)
