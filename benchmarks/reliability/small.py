"""The smallest training that has everything, by any number of processes, and its state as digests."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch
from torch import Tensor

from scoresde import VPSDE, DenoisingLoss, Eps, Preconditioned, Rng
from scoresde.codecs import Scaling
from scoresde.data import Dataset, EpochOrder, Split
from scoresde.nn import MLP
from scoresde.train.ema import EMA
from scoresde.train.parallel import spread_over
from scoresde.train.state import TrainingState
from scoresde.train.world import World

# `together` starts processes for tests and campaigns alike
sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))

CPU = torch.device("cpu")


def training(
    world: World, how: str = "ddp", *, samples: int = 100, batch: int = 8, drop_last: bool = True
) -> TrainingState:
    """Points of the plane, two layers, AdamW, an average."""
    torch.manual_seed(0)
    loss = DenoisingLoss(Preconditioned(MLP((2,), width=16, depth=1), VPSDE(), Eps()))
    ema = EMA(loss, half_life=100)
    parallel = spread_over(world, loss, ema, how)
    optimizer = torch.optim.AdamW(loss.parameters(), 1e-2, fused=True)
    if world.rank:
        torch.manual_seed(world.rank)
    x = torch.randn(samples, 2, generator=torch.Generator().manual_seed(0))
    return TrainingState(
        loss, optimizer, ema, Dataset("normal", Split(x), Split(x), Scaling.identity()),
        EpochOrder(samples, batch, 0, drop_last), Rng(0), world=world, parallel=parallel,
    )  # fmt: skip


def digest(tensors: dict[str, dict[str, Tensor]]) -> str:
    """SHA-256 of weights, averages and the optimizer with its counters; what a bad step must not change."""
    found = hashlib.sha256()
    for group in sorted(tensors.keys() - {"random"}):
        for name, value in sorted(tensors[group].items()):
            found.update(f"{group}/{name}".encode())
            found.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
