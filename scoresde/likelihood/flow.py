"""The probability flow of one batch, with its divergence: what every solver of a likelihood integrates."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..diffusion.conditions import Cond, each, take
from ..diffusion.denoiser import CountingDenoiser, Denoiser
from ..noise.rng import Rng
from ..ode import log_ratio, point
from ..ops.broadcast import host, plain
from .divergence import Divergence


class Flow:
    """ε̂ and its divergence along u = log σ/α, for one batch, between the cut-off and t_max.

    Args:
        denoiser: the model; its calls are counted in `counted`.
        like: a batch (B, *event) of the shape and dtype in which the network is called.
        divergence: how σ tr ∂ε̂/∂x is estimated.
        cond: condition of each sample.
        rng: source of probes.
        t_min: the cut-off, None for the SDE's own.
        differentiable: keep the graph of every call.

    Attributes:
        start: the cut-off.
        ends: u at the cut-off and at t_max.
        log_scale: D (log α_T − log α_{t_min}).

    Raises:
        ValueError: a cut-off outside the SDE's range.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        like: Tensor,
        divergence: Divergence,
        cond: Cond,
        rng: Rng,
        *,
        t_min: float | None = None,
        differentiable: bool = False,
    ):
        self.counted, self.sde, self.like, self.cond = CountingDenoiser(denoiser), denoiser.sde, like, each(plain, cond)
        self.divergence, self.differentiable, self.rng = divergence, differentiable, rng
        self.start = self.sde.cut_off(t_min, "likelihood")
        times = host([self.start, self.sde.t_max])
        self.alphas, _ = self.sde.marginal(times)
        self.ends = log_ratio(self.sde, times).tolist()
        self.dims = like[0].numel()
        self.log_scale = self.dims * (self.alphas[1].log() - self.alphas[0].log())
        self.probes = host([])

    def field(self, u: Tensor, y: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """ε̂ (n, D) and σ · divergence columns (n, C) at u (n,) and y (n, D), float64."""
        t, alpha, sigma = point(self.sde, u)
        x = (alpha[:, None] * y).to(self.like.dtype).reshape(-1, *self.like.shape[1:])
        cond, probes = (self.cond, self.probes) if rows is None else (take(self.cond, rows), self.probes[rows])
        eps, rates = self.divergence(
            lambda value: self.counted(value, t, cond).eps, x, probes, differentiable=self.differentiable
        )
        return eps.flatten(1).double(), sigma[:, None] * rates

    def estimate(self, columns: Tensor) -> Tensor:
        """The change of log p (B,) that integrated `columns` (B, C) stand for."""
        return self.divergence.summarise(columns, self.probes)[0]

    def time(self, u: float) -> float:
        """The diffusion time of u, for error messages."""
        return float(point(self.sde, host(u))[0])

    def denoised(self, x0: Tensor, ratio: float) -> Tensor:
        """x̂_0 of x_0 with noise of σ/α = `ratio`, one network call: what a divergence may look at before the solve."""
        u = torch.full(
            (len(x0),), min(max(math.log(ratio), self.ends[0]), self.ends[1]), dtype=torch.float64, device=x0.device
        )
        t, _, _ = point(self.sde, u)
        return self.counted(self.sde.perturb(x0, t, self.rng.normal_like(x0)), t, self.cond).x0
