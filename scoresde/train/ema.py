"""An exponential moving average of weights, in float32, counted in images."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class EMA:
    r"""A copy of a module whose weights follow `shadow += (1 − d)(weights − shadow)`, d = 2^{−images/half_life}.

    The half-life grows with training, `min(half_life, ramp · images seen)`, so early averages are not held back by the
    random start (Karras et al. 2024, EDM2, sec. 3; `ema_rampup_ratio` of Karras et al. 2020, StyleGAN2-ADA). Counted
    in images, it means the same for every batch size.

    Args:
        module: what is averaged; its buffers are copied as they are. The copy is in `module`, float32, in eval mode.
        half_life: in images, > 0.
        ramp: share of the images seen that bounds the half-life, > 0; None for no bound.

    Raises:
        ValueError: a half-life or ramp that is not positive.
    """

    def __init__(self, module: nn.Module, *, half_life: float = 20_000, ramp: float | None = 0.05):
        if not half_life > 0:
            raise ValueError(f"half_life is a positive number of images; got {half_life}.")
        if ramp is not None and not ramp > 0:
            raise ValueError(f"ramp is a positive share of the images seen, or null; got {ramp}.")
        self.half_life, self.ramp = float(half_life), ramp
        self.module = copy.deepcopy(module).float().eval().requires_grad_(False)

    def decay(self, images: int, batch: int) -> float:
        """d for a step of `batch` images when `images` have been seen with it."""
        half_life = self.half_life if self.ramp is None else min(self.half_life, self.ramp * images)
        return 0.5 ** (batch / half_life)

    @torch.no_grad()
    def update(self, module: nn.Module, images: int, batch: int, keep: Tensor) -> None:
        """One step towards `module`; where `keep` (a bool scalar, on the device) is false nothing moves."""
        shadow: list[Tensor] = list(self.module.parameters())
        weights = [p.float() for p in module.parameters()]
        if len(shadow) != len(weights):
            raise ValueError(
                f"The average has {len(shadow)} parameters and the module {len(weights)}: not the same module."
            )
        share = (1 - self.decay(images, batch)) * keep.to(torch.float32)
        torch._foreach_lerp_(shadow, weights, [share.expand_as(p) for p in shadow])  # type: ignore[misc]
        for mine, theirs in zip(self.module.buffers(), module.buffers(), strict=True):
            mine.copy_(theirs)
