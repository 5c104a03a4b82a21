"""What networks of other projects are told about the time, each (sde, t (B,)) -> c_noise (B,)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .sde import SDE
from .table import TableSDE


@dataclass(frozen=True)
class TimeInput:
    """c_noise = scale · t + offset: 999 t of score_sde, 1000 t − 1 for the steps 0 … 999 of DDPM, 1 − t of SiT."""

    scale: float = 1.0
    offset: float = 0.0

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return self.scale * t + self.offset


@dataclass(frozen=True)
class LogNoiseInput:
    """c_noise = scale · log(σ/α) + offset: log σ of score_sde's VE, log(σ/2) of EDM's; ¼ log(σ/α) is the default."""

    scale: float = 1.0
    offset: float = 0.0

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return -0.5 * self.scale * sde.log_snr(t) + self.offset


@dataclass(frozen=True)
class NearestStepInput:
    """The number, from 0, of the entry of a `TableSDE` with the nearest σ/α, as EDM's iDDPM networks are told."""

    def __call__(self, sde: TableSDE, t: Tensor) -> Tensor:
        steps = torch.arange(1, len(sde) + 1, dtype=torch.float64, device=t.device) / len(sde)
        table, here = ((-0.5 * sde.log_snr(each.double())).exp() for each in (steps, t))
        return torch.searchsorted((table[1:] + table[:-1]) / 2, here.contiguous()).to(t.dtype)
