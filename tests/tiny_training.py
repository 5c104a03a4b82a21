"""Trainings of a second: `from tiny_training import training`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from oracles import ring
from torch import Tensor, nn

from scoresde import EDM, VPSDE, DenoisingLoss, Eps, Preconditioned, Rng
from scoresde.codecs import Scaling
from scoresde.data import Dataset, EpochOrder, Split
from scoresde.nn import MLP
from scoresde.runs.logger import NullLogger
from scoresde.train.ema import EMA
from scoresde.train.state import TrainingState

SAMPLES = 100


class Net(nn.Module):
    """Two layers with dropout between them, told c_noise, and a buffer that counts the calls in training."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.inlet, self.drop, self.outlet = nn.Linear(3, 16), nn.Dropout(dropout), nn.Linear(16, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, c_noise: Tensor, cond: Any = None) -> Tensor:
        self.calls += int(self.training)
        return self.outlet(self.drop(torch.tanh(self.inlet(torch.cat([x, c_noise[:, None]], 1)))))


@cache
def trained_on_a_ring() -> Preconditioned:
    """A small network after some training, in float64: no closed form."""
    torch.manual_seed(0)
    exact = ring(VPSDE())
    denoiser = Preconditioned(MLP((2,), width=64, depth=2), VPSDE(), EDM(sigma_data=0.7), sigma_data=0.7)
    loss, optimizer = DenoisingLoss(denoiser), torch.optim.Adam(denoiser.parameters(), 3e-3)
    for index in range(300):
        optimizer.zero_grad()
        loss(exact.sample(256, rng=Rng(index)), rng=Rng(index)).mean().backward()
        optimizer.step()
    return denoiser.eval().requires_grad_(False).double()


def training(
    *, batch: int = 8, seed: int = 0, dropout: float = 0.0, autocast: str | None = None, optimizer: Any = None,
    ramp: float | None = 0.05, network: nn.Module | None = None, **loss: Any,
) -> TrainingState:  # fmt: skip
    """Two layers on 100 points of the plane, AdamW, an average."""
    torch.manual_seed(seed)
    network = Net(dropout) if network is None else network
    objective = DenoisingLoss(Preconditioned(network, VPSDE(), Eps(), autocast=autocast), **loss)
    x = torch.randn(SAMPLES, 2, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(objective.parameters(), 1e-2, fused=True) if optimizer is None else optimizer
    return TrainingState(
        objective,
        optimizer(objective.parameters()) if callable(optimizer) else optimizer,
        EMA(objective, half_life=100, ramp=ramp),
        Dataset("normal", Split(x), Split(x), Scaling.identity()),
        EpochOrder(SAMPLES, batch, 0),
        Rng(seed),
    )


class Rows(NullLogger):
    """Keeps every row but the rate, which is a wall time."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def log(self, values: Mapping[str, float], *, step: int, images: int) -> None:
        kept = {name: value for name, value in values.items() if name != "train/imgs_per_s"}
        self.rows.append({"step": step, "images": images, **kept})

    def of(self, key: str) -> list[float]:
        return [row[key] for row in self.rows if key in row]
