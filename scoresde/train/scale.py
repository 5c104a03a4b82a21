"""Loss scaling for float16, whose smallest normal number, 6e-5, is larger than many gradients."""

from __future__ import annotations

import torch
from torch import Tensor


class LossScale:
    """The loss is multiplied by `value` before backward and gradients divided by it after: halved when they overflow,
    doubled after 2,000 steps without (Micikevicius et al. 2018, sec. 3.2). All on the device.

    Args:
        start: first value, > 0.
        device: of the parameters.
        fixed: never change the value; with start = 1 the scale then does nothing at all.
    """

    GROWTH_STEPS = 2000

    def __init__(self, start: float, device: torch.device, *, fixed: bool = False):
        if not start > 0:
            raise ValueError(f"loss_scale starts above 0, or is null for none; got {start!r}.")
        self.fixed = fixed
        self.value = torch.tensor(float(start), device=device)
        self.good = torch.zeros((), device=device)

    def up(self, loss: Tensor) -> Tensor:
        return loss if self.fixed else loss * self.value

    def factor(self) -> Tensor | None:
        """The factor that undoes the scale in gradients, None for 1."""
        return None if self.fixed else 1 / self.value

    def update(self, keep: Tensor) -> None:
        """Adapts the value to a step that was kept (a bool scalar on the device), or was not."""
        if self.fixed:
            return
        self.good = torch.where(keep, self.good + 1, 0.0)
        grown = self.good >= self.GROWTH_STEPS
        self.value = torch.where(keep, torch.where(grown, self.value * 2, self.value), self.value / 2)
        self.good = torch.where(grown, 0.0, self.good)

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.fixed else {"scale": self.value, "good": self.good}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self.fixed:
            return
        self.value, self.good = state["scale"].to(self.value.device), state["good"].to(self.value.device)
