"""The loss scale of float16: the rule it follows, what it does to gradients, and what a checkpoint keeps of it."""

from __future__ import annotations

import pytest
import torch
from tiny_training import training
from torch import Tensor

from scoresde import Rng
from scoresde.train.scale import LossScale
from scoresde.train.trainer import Trainer

CPU = torch.device("cpu")
YES, NO = torch.tensor(True), torch.tensor(False)


def test_halved_when_gradients_overflow_doubled_after_2000_that_did_not() -> None:
    scale = LossScale(1024.0, CPU)
    for step in range(LossScale.GROWTH_STEPS):
        assert scale.value == 1024, step
        scale.update(YES)
    assert scale.value == 2048
    scale.update(NO)
    assert scale.value == 1024
    for _ in range(LossScale.GROWTH_STEPS - 1):
        scale.update(YES)
    scale.update(NO)  # the count begins again
    assert scale.value == 512
    for _ in range(LossScale.GROWTH_STEPS):
        assert scale.value == 512
        scale.update(YES)
    assert scale.value == 1024
    for _ in range(10):
        scale.update(NO)
    assert scale.value == 1


def test_the_null_object_leaves_everything_as_it_is() -> None:
    scale, loss = LossScale(None, CPU), torch.tensor(3.0)
    assert scale.up(loss) is loss and scale.factor() is None and scale.state_dict() == {}
    scale.update(NO)
    assert scale.value == 1
    scale.load_state_dict({"scale": torch.tensor(8.0), "good": torch.tensor(1.0)})  # of a run that had one
    assert scale.value == 1


@pytest.mark.parametrize("start", [0.0, -1.0, float("nan")])
def test_it_starts_above_0(start: float) -> None:
    with pytest.raises(ValueError, match="loss_scale is null or a number, > 0 and finite"):
        LossScale(start, CPU)


def test_saved_and_restored() -> None:
    scale, other = LossScale(64.0, CPU), LossScale(2.0, CPU)
    for _ in range(7):
        scale.update(YES)
    other.load_state_dict(scale.state_dict())
    for _ in range(LossScale.GROWTH_STEPS - 8):
        other.update(YES)
    assert other.value == 64
    other.update(YES)
    assert other.value == 128


def weights_after(steps: int, scale: float | None) -> dict[str, Tensor]:
    run, trainer = training(), Trainer(images=8 * steps, batch_size=8)
    if scale is not None:
        run.scale = LossScale(scale, CPU)
    for _ in range(steps):
        trainer.step(run)
    return {name: p.detach().clone() for name, p in run.loss.named_parameters()}


def test_a_power_of_two_changes_no_bit_in_float32() -> None:
    """Multiplying by 2^16 and back touches exponents only: clipping, moments and weights are those without it."""
    plain, scaled = weights_after(5, None), weights_after(5, 65536.0)
    for name, value in plain.items():
        assert torch.equal(scaled[name], value), name


def test_a_scale_that_overflows_is_halved_until_it_does_not() -> None:
    """Norms are sums of squares in float32, so gradients of order 1 fit below 1.8e19 = 3e38 / 2^64."""
    run, trainer = training(), Trainer(images=800, batch_size=8)
    run.scale = LossScale(3e38, CPU)
    before = {name: p.detach().clone() for name, p in run.loss.named_parameters()}
    while run.tally.averages().skipped == run.step:
        assert all(torch.equal(p, before[name]) for name, p in run.loss.named_parameters())
        assert run.scale.value == pytest.approx(3e38 / 2**run.step, rel=1e-6)
        trainer.step(run)
    assert 60 <= run.tally.averages().skipped <= 70
    value = run.scale.value.clone()
    trainer.step(run)
    assert run.scale.value == value and run.tally.averages().skipped < run.step - 1


def gradient(autocast: str | None, scale: float, objective: float) -> Tensor:
    """Of a loss multiplied by `objective`, with the scale taken out again: all parameters in a row."""
    run = training(autocast=autocast)
    x0 = run.dataset.train.raw[:64]
    scaler = LossScale(scale, CPU)
    scaler.up(objective * run.loss.terms(x0, rng=Rng(0)).objective.mean()).backward()
    factor = scaler.factor()
    assert factor is not None
    return torch.cat([p.grad.flatten() * factor for p in run.loss.parameters() if p.grad is not None])


def test_in_float16_it_saves_gradients_that_would_vanish() -> None:
    """A loss 1e-6 times as large. float16 resolves 2^-11 relatively above 6e-5, and absolutely 6e-8 below: of gradients
    of 1e-6 nearly nothing is left without a scale, and with one of 2^20 they are those of float32 to float16 accuracy.
    """
    exact = gradient(None, 1.0, 1e-6)
    with_scale, without = (gradient("float16", scale, 1e-6) for scale in (2.0**20, 1.0))

    def error(found: Tensor) -> float:
        return float((found - exact).norm() / exact.norm())

    # a few roundings of 2^-11 each on the way through two layers, and back
    assert error(with_scale) < 8 * 2.0**-11
    assert error(without) > 10 * error(with_scale)


def test_training_in_float16_follows_float32() -> None:
    """20 steps with Adam on 2,000 samples: the weights move by up to 0.2 and agree to a tenth of that."""
    run, exact = training(autocast="float16", batch=50), training(batch=50)
    start = torch.cat([p.detach().flatten() for p in run.loss.parameters()])
    run.scale = LossScale(65536.0, CPU)
    trainer = Trainer(images=1000, batch_size=50)
    for _ in range(20):
        trainer.step(run)
        trainer.step(exact)
    ends = [torch.cat([p.detach().flatten() for p in r.loss.parameters()]) for r in (run, exact)]
    assert run.tally.averages().skipped == 0
    assert (ends[0] - ends[1]).norm() < 0.1 * (ends[1] - start).norm()
