"""Loss scaling for float16, whose smallest normal number, 6e-5, is larger than many gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import positive


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
        self.fixed = start is None
        first = 1.0 if start is None else positive(start, "loss_scale", "null or a number")
        self.value = torch.tensor(first, dtype=torch.float32, device=device)
        self.good = torch.zeros((), dtype=torch.int32, device=device)

    def up(self, loss: Tensor) -> Tensor:
        return loss if self.fixed else loss * self.value

    def factor(self) -> Tensor | None:
        """The factor that undoes the scale in gradients, None for 1."""
        return None if self.fixed else 1 / self.value

    def update(self, keep: Tensor) -> None:
        """Adapts the value to a step that was kept (a bool scalar on the device), or was not."""
        if not self.fixed:  # by what torch.amp.GradScaler calls
            torch._amp_update_scale_(self.value, self.good, (~keep).float(), 2.0, 0.5, self.GROWTH_STEPS)

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.fixed else {"scale": self.value, "good": self.good}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if not self.fixed:
            self.value.copy_(state["scale"])
            self.good.copy_(state["good"])
