"""Loss scaling for float16, whose smallest normal number, 6e-5, is larger than many gradients."""

from __future__ import annotations

import torch
from torch import Tensor


class LossScale:
    """Multiplies the loss by `value` before backward, and gradients by its inverse after.

    The value is halved when a gradient overflows and doubled after 2,000 steps without (Micikevicius et al. 2018, sec.
    3.2), all on the device.

    Args:
        start: first value, > 0; None for no scaling, where everything here does nothing.
        device: of the parameters.
    """

    GROWTH_STEPS = 2000

    def __init__(self, start: float | None, device: torch.device):
        if start is not None and not start > 0:
            raise ValueError(f"loss_scale starts above 0, or is null for none; got {start!r}.")
        self.fixed = start is None
        self.value = torch.tensor(float(start or 1.0), device=device)
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
