"""A step that is not finite leaves the buffers of network and average as they were, whatever is done to them."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_training import training
from together import together
from torch import Tensor, nn

from scoresde import VPSDE, DenoisingLoss, Eps, Preconditioned, Rng
from scoresde.codecs import Scaling
from scoresde.data import Dataset, EpochOrder, Split
from scoresde.train.buffers import Buffers
from scoresde.train.ema import EMA
from scoresde.train.parallel import spread_over
from scoresde.train.state import TrainingState
from scoresde.train.trainer import Trainer
from scoresde.train.world import join


class Net(nn.Module):
    """Running statistics, singular vectors, a counter in place and one that is replaced; `bad` passes overflow."""

    def __init__(self, bad: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.inlet = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 16))
        self.norm, self.outlet = nn.BatchNorm1d(16), nn.Linear(16, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(2))
        self.bad, self.passes = bad, 0

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        if self.training:
            self.passes += 1
            self.calls += 1
            self.last = x.detach().mean(0)
        h = self.inlet(torch.cat([x, c_noise[:, None]], 1))
        if self.training and self.passes in self.bad:
            h = h * math.inf
        return self.outlet(torch.tanh(self.norm(h)))


def buffers(run: TrainingState) -> dict[str, Tensor]:
    found = {f"net {name}": value.clone() for name, value in run.loss.named_buffers()}
    return found | {f"average {name}": value.clone() for name, value in run.average.named_buffers()}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_bad_step_leaves_every_buffer(accumulate: int) -> None:
    """Step 3 is bad in its last pass: before and after it all are equal, and step 4 goes on as if it had not been."""
    run = training(network=Net(bad=(3 * accumulate,)))
    trainer = Trainer(images=800, batch_size=8, accumulate=accumulate)
    run.loss.train()
    for _ in range(2):
        trainer.step(run)
    before = buffers(run)
    trainer.step(run)
    assert int(run.tally.skipped) == 1
    for name, value in buffers(run).items():
        assert torch.equal(value, before[name]), name
    trainer.step(run)
    after = buffers(run)
    assert all(value.isfinite().all() for value in after.values())
    for name in ("norm.running_mean", "calls", "last", "inlet.parametrizations.weight.0._u"):
        key = f"net denoiser.network.{name}"
        assert not torch.equal(after[key], before[key]), name
        assert torch.equal(after[key], after[f"average denoiser.network.{name}"].to(after[key].dtype)), name
    assert after["net denoiser.network.calls"] == 3 * accumulate


class Grows(nn.Module):
    """A buffer that becomes longer, and one that is not there yet."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(2))
        self.register_buffer("later", None)

    def forward(self) -> None:
        self.cache, self.later = torch.ones(5), torch.ones(1)


@pytest.mark.parametrize("unless", [True, False])
def test_a_buffer_of_another_shape_is_put_back_too(unless: bool) -> None:
    net = Grows()
    kept = Buffers(net)
    kept.keep()
    net()
    kept.restore(unless=torch.tensor(unless))
    assert net.cache.tolist() == ([1.0] * 5 if unless else [0.0] * 2)


def on_two_ranks(how: str) -> list[str]:
    """The buffers that differ after a step which is bad on rank 1 alone."""
    world = join(torch.device("cpu"), 600)
    torch.manual_seed(0)
    loss = DenoisingLoss(Preconditioned(Net(bad=(2,) if world.rank else ()), VPSDE(), Eps()))
    ema, x = EMA(loss), Rng(0).normal((64, 2))
    parallel = spread_over(world, loss, ema, how)
    optimizer = torch.optim.AdamW(loss.parameters(), 1e-2, fused=True)
    data, order = Dataset("normal", Split(x), Split(x), Scaling.identity()), EpochOrder(64, 8, 0)
    run = TrainingState(loss, optimizer, ema, data, order, Rng(0), world=world, parallel=parallel)
    trainer = Trainer(images=800, batch_size=8)
    loss.train()
    trainer.step(run)
    before = buffers(run)
    trainer.step(run)
    differ = [name for name, value in buffers(run).items() if not torch.equal(value, before[name])]
    skipped = int(run.tally.skipped)
    world.close()
    return [*differ, f"skipped {skipped}"]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_step_that_is_bad_on_one_rank_leaves_the_buffers_of_all(how: str) -> None:
    assert together(on_two_ranks, how) == [["skipped 1"]] * 2
