"""The loop: a stop changes no bit, a bad step changes nothing, schedules are the closed forms, and it really learns."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import closed_form_sdes
from tiny_training import SAMPLES, Rows, training
from torch import Tensor, nn

from scoresde import (
    SDE,
    DenoisingLoss,
    Eps,
    GaussianMixtureDenoiser,
    Preconditioned,
    Rng,
)
from scoresde.codecs import Scaling
from scoresde.data import Dataset, EpochOrder, Split
from scoresde.evaluate.evaluation import held_out_loss
from scoresde.losses.denoising import StratifiedTimes, Times
from scoresde.nn import MLP
from scoresde.noise.rng import VERSION
from scoresde.runs.checkpoint import CheckpointError, latest, load, save
from scoresde.train.ema import EMA
from scoresde.train.state import TrainingState
from scoresde.train.trainer import Trainer, TrainingDiverged


class FixedTimes(Times):
    """t = ½ for every sample."""

    def sample(self, sde: SDE, n: int, rng: Rng, device: torch.device) -> tuple[Tensor, Tensor]:
        t = torch.full((n,), 0.5, dtype=torch.float64)
        return t, torch.ones_like(t)


def sgd(lr: float) -> Callable[..., torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr, fused=True)


def bits(run: TrainingState) -> dict[str, bytes]:
    """Weights, average, moments and generators, byte for byte."""
    return {
        f"{name}/{key}": value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, group in run.tensors().items()
        for key, value in group.items()
    }


class Stop(BaseException):
    pass


@pytest.mark.parametrize("stop", [100, 296], ids=lambda images: f"at {images}")
@pytest.mark.parametrize(
    ("accumulate", "autocast"), [(1, None), (3, None), (2, "bfloat16")], ids=["plain", "accumulated", "bf16"]
)
def test_a_stop_changes_no_bit(tmp_path: Path, stop: int, accumulate: int, autocast: str | None) -> None:
    """Dropout, partial epochs (12 of 12.5 batches), rows that span the checkpoint, held-out losses in between.

    What continues is built from other seeds, so whatever is not restored shows.
    """
    trainer = Trainer(
        images=400, batch_size=8, accumulate=accumulate, warmup=50, cooldown=100, log_every=35, evaluate_every=60,
        checkpoint_every=88,
    )  # fmt: skip

    def fit(run: TrainingState, folder: Path, until: int | None = None) -> Rows:
        def evaluate(run: TrainingState) -> dict[str, float]:
            if until is not None and run.images > until:
                raise Stop
            return {"eval/loss": held_out_loss(run.average, run.dataset)}

        rows = Rows()
        trainer.fit(run, logger=rows, folder=folder, evaluate=evaluate)
        return rows

    whole = training(dropout=0.3, autocast=autocast)
    expected = fit(whole, tmp_path / "whole")
    with pytest.raises(Stop):
        fit(training(dropout=0.3, autocast=autocast), tmp_path / "cut", until=stop)
    run, saved = training(seed=5, dropout=0.3, autocast=autocast), latest(tmp_path / "cut")
    assert saved is not None and 0 < saved.records["counters"]["images"] < 400
    run.restore(saved)
    rows = fit(run, tmp_path / "cut")
    assert bits(run) == bits(whole)
    assert (run.step, run.images, run.order.state_dict()) == (whole.step, whole.images, whole.order.state_dict())
    assert rows.rows == [row for row in expected.rows if row["step"] > saved.step]
    assert rows.of("eval/loss") and rows.of("train/loss")


def test_a_checkpoint_of_other_noise_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Version 1 had no word of its version; bytes are of torch's generator. Both are trained on, with other numbers."""
    Trainer(images=40, batch_size=8, checkpoint_every=40).fit(training(), folder=tmp_path)
    saved = latest(tmp_path)
    assert saved is not None and saved.tensors["random"].pop("noise_version") == VERSION
    run = training(seed=5)
    with pytest.warns(UserWarning, match="version 1 of the noise.* of another stream"):
        run.restore(saved)
    assert torch.equal(run.rng.state_dict()["streams"], saved.tensors["random"]["noise"])
    saved.tensors["random"]["noise"] = torch.get_rng_state()[None]
    run.restore(saved)
    assert "the noise begins anew" in caplog.text


def test_a_file_that_changed_is_named_on_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Other samples under the same name, as many as before; and a class that no training sample has."""

    def of_file(raw: Tensor, labels: Tensor, files: tuple[str, ...] = ("x.npz", "x.npz")) -> TrainingState:
        state = training()
        samples = Split(raw, labels)
        data = Dataset("x", samples, samples, state.dataset.codec, classes=3, files=files)
        how = {"conditional": True, "world": state.world}
        return TrainingState(state.loss, state.optimizer, state.ema, data, state.order, state.rng, **how)

    raw, labels = training().dataset.train.raw, torch.arange(100) % 2
    run = of_file(raw, labels)
    assert "no training sample has class 2; it is drawn only when asked for" in caplog.text
    path = save(tmp_path, 0, run.tensors(), run.records())
    of_file(raw.clone(), labels).restore(load(path))
    caplog.clear()
    of_file(raw + 1, labels, files=()).restore(load(path))  # made, not read: by other machines in other last bits
    assert "x has changed" in caplog.text
    for other in (of_file(raw.flip(0), labels), of_file(raw, 1 - labels)):
        with pytest.raises(CheckpointError, match=r"x\.npz has changed: .*put the file back.*another folder: out="):
            other.restore(load(path))
    old = {name: record for name, record in run.records().items() if name != "data"}
    of_file(raw + 1, labels).restore(load(save(tmp_path, 1, run.tensors(), old)))  # of a release that kept none


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    run, trainer = training(), Trainer(images=40, batch_size=8)
    trainer.fit(run, folder=tmp_path)
    before = bits(run)
    trainer.fit(run, folder=tmp_path)
    assert bits(run) == before and run.images == 40


def fixed(batch: int, lr: float = 0.5) -> TrainingState:
    """The loss of a sample depends on that sample alone: one time, and noise made of the data."""
    return training(batch=batch, optimizer=sgd(lr), times=FixedTimes(), coupling=lambda x0, rng: (x0, x0.flip(1).sin()))


def test_two_of_25_are_one_of_50() -> None:
    """SGD is linear in the gradient, so weights differ by the round-off of a mean: 50 · 6e-8 of the change a step."""
    whole, parts = fixed(50), fixed(25)
    start = [p.detach().clone() for p in whole.loss.parameters()]
    rows = Rows(), Rows()
    Trainer(images=300, batch_size=50, log_every=50, clip=None).fit(whole, logger=rows[0])
    Trainer(images=300, batch_size=25, accumulate=2, log_every=50, clip=None).fit(parts, logger=rows[1])
    assert whole.step == parts.step == 6 and whole.images == parts.images == 300
    for p, q, first in zip(whole.loss.parameters(), parts.loss.parameters(), start, strict=True):
        change = p - first
        assert float(change.detach().norm()) > 0.05
        torch.testing.assert_close(q - first, change, rtol=0, atol=2e-5 * float(change.detach().abs().max()))
    assert rows[0].of("train/loss") == pytest.approx(rows[1].of("train/loss"), rel=1e-5)
    assert rows[0].of("train/ema_decay") == rows[1].of("train/ema_decay")
    for p, q in zip(whole.average.parameters(), parts.average.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ramp", [None, 0.5], ids=["constant", "ramped"])
@pytest.mark.parametrize("autocast", [None, "bfloat16"])
def test_the_average_is_the_weighted_sum(ramp: float | None, autocast: str | None) -> None:
    """Σ_k (1 − d_k) Π_{j>k} d_j w_k + Π d_j w_0 in float64: 40 float32 steps of error 6e-8 |w| each stay below 1e-5."""
    run, trainer = training(ramp=ramp, autocast=autocast), Trainer(images=320, batch_size=8)
    name = "denoiser.network.inlet.weight"
    expected = run.loss.get_parameter(name).detach().double().clone()
    for k in range(1, 41):
        trainer.step(run)
        half_life = 100 if ramp is None else min(100, ramp * 8 * k)
        decay = 0.5 ** (8 / half_life)
        expected = decay * expected + (1 - decay) * run.loss.get_parameter(name).detach().double()
    average = run.average.get_parameter(name)
    assert average.dtype == torch.float32 and not average.requires_grad
    assert float((run.loss.get_parameter(name).detach() - average).norm()) > 0.05
    torch.testing.assert_close(average.double(), expected, rtol=0, atol=1e-5)
    assert int(run.average.get_buffer("denoiser.network.calls")) == 40


def test_the_average_of_bfloat16_weights_is_float32() -> None:
    """Steps of 1e-3 of a weight are below bfloat16's resolution of 4e-3: an average kept in it would not move."""
    module = nn.Linear(3, 3, bias=False).bfloat16()
    nn.init.ones_(module.weight)
    ema = EMA(module, half_life=1000, ramp=None)
    nn.init.constant_(module.weight, 2.0)
    for k in range(1, 501):
        ema.update(module, k, 1, torch.tensor(True))
    assert ema.module.weight.dtype == torch.float32
    # after half a half-life the start has weight 2^-½; 500 roundings of 1.2e-7 each
    assert float((ema.module.weight - (2 - 2**-0.5)).abs().max()) < 1e-4


def test_learning_rate_rises_stays_and_falls() -> None:
    run, rows = training(batch=10), Rows()
    Trainer(images=300, batch_size=10, warmup=70, cooldown=45, log_every=10).fit(run, logger=rows)
    expected = [1e-2 * min(1, 10 * (k + 1) / 70, (300 - 10 * k) / 45) for k in range(30)]
    assert rows.of("train/lr") == pytest.approx(expected, rel=1e-12)
    assert expected[0] > 0 and expected[-1] > 0 and max(expected) == 1e-2


def test_ramps_longer_than_the_training_are_scaled_and_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """By 300/1000, so that they meet at the full rate after 100 of 300 images; ramps that just fit stay."""
    run, rows = training(batch=10), Rows()
    Trainer(images=300, batch_size=10, warmup=333, cooldown=667, log_every=10).fit(run, logger=rows)
    rise, fall = 333 * 0.3, 667 * 0.3
    expected = [1e-2 * min(1, 10 * (k + 1) / rise, (300 - 10 * k) / fall) for k in range(30)]
    assert rows.of("train/lr") == pytest.approx(expected, rel=1e-12)
    assert max(expected) == 1e-2
    (line,) = caplog.messages
    assert (
        line == "warmup and cooldown (333 and 667 images) are longer than the training of 300: scaled to 100 and 200."
    )
    caplog.clear()
    Trainer(images=300, batch_size=10, warmup=100, cooldown=200).fit(training(batch=10))
    assert not caplog.messages
    assert Trainer(images=300, warmup=100, cooldown=200).ramps() == (100, 200)
    assert Trainer(images=300, warmup=1000).ramps() == (300, 0) and Trainer(images=300).ramps() == (0, 0)


def gradient(run: TrainingState) -> Tensor:
    x0 = run.dataset.train.raw[EpochOrder(SAMPLES, 50, 0).next()]
    loss = run.loss(x0, rng=Rng(0)).mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(run.loss.parameters()))])


@pytest.mark.parametrize(("clip", "share"), [(None, 1.0), (1e6, 1.0), (0.01, None)], ids=["none", "above", "below"])
def test_clip_bounds_the_step_and_the_log_says_what_was_cut(clip: float | None, share: float | None) -> None:
    """One SGD step of rate 1 is the gradient; float32 weights of order 1 resolve it to 1e-7."""
    run, rows = fixed(50, lr=1.0), Rows()
    exact = gradient(run)
    share = 0.01 / float(exact.norm()) if share is None else share
    before = torch.cat([p.detach().flatten() for p in run.loss.parameters()])
    Trainer(images=50, batch_size=50, clip=clip).fit(run, logger=rows)
    after = torch.cat([p.detach().flatten() for p in run.loss.parameters()])
    # clip_grad_norm_ divides by norm + 1e-6
    torch.testing.assert_close(before - after, share * exact, rtol=1e-4, atol=3e-7)
    assert rows.of("train/grad_norm") == pytest.approx([float(exact.norm())], rel=1e-5) and share <= 1


def spoil(run: TrainingState, what: str, bad: set[int]) -> None:
    """Makes the loss NaN, or the gradient infinite, in the forward passes numbered in `bad`."""
    passes = iter(range(1, 10_000))
    if what == "loss":
        inner = run.loss.coupling
        run.loss.coupling = lambda x0, rng: (x0, inner(x0, rng)[1] * (math.nan if next(passes) in bad else 1))
    else:
        weight = run.loss.get_parameter("denoiser.network.outlet.weight")
        weight.register_hook(lambda grad: grad * (math.inf if next(passes) in bad else 1))


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_bad_step_changes_nothing_and_is_counted(what: str, accumulate: int) -> None:
    """One bad pass of the sixth step: weights, moments (with their step count) and average keep every bit."""
    run, trainer = training(), Trainer(images=8 * 12 * accumulate, batch_size=8, accumulate=accumulate)
    spoil(run, what, {5 * accumulate + 1})
    losses, before = Rows(), {}
    for step in range(1, 13):
        before = bits(run) if step == 6 else before
        trainer.step(run)
        losses.log({"loss": run.tally.averages(reset=True).loss}, step=step, images=run.images)
        if step == 6:
            after, untouched = bits(run), ("weights", "ema", "optimizer")
            parameters = [key for key in before if key.startswith(untouched) and "calls" not in key]
            assert [key for key in parameters if before[key] != after[key]] == []
            assert len(parameters) == 4 + 4 + 3 * 4
    assert [math.isnan(value) for value in losses.of("loss")] == [step == 6 for step in range(1, 13)]
    counted = run.tally.averages()
    assert (run.step, run.images, counted.skipped, counted.streak) == (12, trainer.images, 1, 0)
    later = bits(run)
    assert all(later[key] != before[key] for key in parameters)  # it went on


def test_averages_are_means_over_the_steps_kept() -> None:
    """The row of 10 steps with two bad ones is the mean of the 8 others."""
    each, together = training(), training()
    rows = Rows(), Rows()
    for run, every, kept in ((each, 8, rows[0]), (together, 80, rows[1])):
        spoil(run, "loss", {3, 4})
        Trainer(images=80, batch_size=8, log_every=every).fit(run, logger=kept)
    losses = [loss for loss in rows[0].of("train/loss") if not math.isnan(loss)]
    assert len(losses) == 8
    assert rows[1].of("train/loss") == pytest.approx([sum(losses) / 8], rel=1e-12)
    assert rows[1].of("train/skipped") == [2] and rows[0].of("train/skipped") == [0, 0, 1, 2, 2, 2, 2, 2, 2, 2]


def test_too_many_bad_steps_end_training(tmp_path: Path) -> None:
    """Bad from step 7 on with max_bad_steps=4: found at step 12, the first multiple of 4 after a streak of 4."""
    run, trainer = training(), Trainer(images=800, batch_size=8, max_bad_steps=4, checkpoint_every=8, keep_last=1)
    spoil(run, "loss", set(range(7, 200)))
    message = r"6 steps in a row, from step 7, rank 0, first in the gradient of .*inlet.weight \(96 images"
    with pytest.raises(TrainingDiverged, match=message):
        trainer.fit(run, folder=tmp_path)
    reference = training()
    for _ in range(6):
        trainer.step(reference)
    saved = latest(tmp_path)
    assert saved is not None
    for name, value in reference.loss.denoiser.network.named_parameters():
        assert torch.equal(saved.tensors["weights"][f"network.{name}"], value)
        assert torch.equal(run.loss.denoiser.get_parameter(f"network.{name}"), value)


def test_bad_steps_that_pass_do_not_end_training() -> None:
    run = training()
    spoil(run, "gradient", {2, 3, 4, 6, 7, 8, 10, 11, 12})
    Trainer(images=160, batch_size=8, max_bad_steps=4).fit(run)
    assert run.tally.averages().skipped == 9 and run.step == 20


def test_intervals_count_images(tmp_path: Path) -> None:
    """An interval of n images is due at the first step at or past each multiple of n; 0 is never, but for the end."""
    run, rows, evaluated, pictures = training(batch=24), Rows(), [], []
    trainer = Trainer(
        images=490, batch_size=24, log_every=100, evaluate_every=70, sample_every=200, checkpoint_every=110, keep_last=9
    )
    trainer.fit(
        run, logger=rows, folder=tmp_path, evaluate=lambda r: evaluated.append(r.images) or {},
        sample=lambda r: pictures.append(r.images) or {},
    )  # fmt: skip

    def due(every: int, end: bool) -> list[int]:
        return [n for n in range(24, 505, 24) if n // every > (n - 24) // every or (end and n == 504)]

    assert rows.of("images") == sorted(due(100, True) + due(70, False))
    assert (evaluated, pictures) == (due(70, False), due(200, False))
    assert sorted(int(p.name[5:]) * 24 for p in tmp_path.iterdir()) == due(110, True)
    silent, kept = training(), Rows()
    Trainer(images=40, batch_size=8, log_every=0).fit(silent, logger=kept, folder=tmp_path / "end")
    assert kept.of("images") == [40] and [p.name for p in (tmp_path / "end").iterdir()] == ["step-00000005"]


@pytest.mark.parametrize(
    "wrong",
    [{"images": 0}, {"images": 10.0}, {"images": True}, {"clip": 0}, {"clip": -1.0}, {"clip": "1"}, {"warmup": -1},
     {"max_bad_steps": 0}, {"keep_last": 0}, {"accumulate": 0}, {"batch_size": 0}, {"cooldown": 1.5},
     *({f"{name}_every": -1} for name in ("log", "evaluate", "sample", "checkpoint"))],
    ids=str,
)  # fmt: skip
def test_values_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    (name, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=f"^{name} is .*got {value!r}"):
        Trainer(**{"images": 10, **wrong})


@pytest.mark.parametrize("wrong", [{"half_life": 0}, {"half_life": -1.0}, {"ramp": 0.0}], ids=str)
def test_an_average_out_of_range_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EMA(nn.Linear(1, 1), **wrong)


def test_an_optimizer_that_cannot_skip_and_labels_that_are_missing_are_refused() -> None:
    with pytest.raises(ValueError, match="fused=True"):
        training(optimizer=torch.optim.Adam)
    run = training()
    with pytest.raises(ValueError, match="needs labels"):
        TrainingState(run.loss, run.optimizer, run.ema, run.dataset, run.order, run.rng, conditional=True)


@pytest.mark.parametrize("name", ["vp", "subvp", "ve", "flow"])
def test_it_learns_the_optimal_denoiser(name: str) -> None:
    r"""x_0 ~ N(0, diag(0.25, 2)): the least ε-loss is E_t mean_i α²v_i/(α²v_i + σ²), reached by the exact denoiser.

    Both are measured with the same noise, so their difference is the excess e = E‖ε̂ − ε*‖² ≥ 0 with a standard error
    of 2√(e·optimum/16384), 5e-4 for an e of 2e-3, twice what is seen. An untrained network (ε̂ = 0) is at 1.
    """
    sde, variances = closed_form_sdes()[name], torch.tensor([0.25, 2.0], dtype=torch.float64)
    exact = GaussianMixtureDenoiser(torch.zeros(1, 2), variances[None], torch.ones(1), sde)
    dataset = Dataset(
        "g", Split(exact.sample(4096, rng=Rng(1))), Split(exact.sample(8192, rng=Rng(2))), Scaling.identity()
    )
    torch.manual_seed(0)
    loss = DenoisingLoss(Preconditioned(MLP((2,), width=32, depth=1), sde, Eps()), StratifiedTimes())
    run = TrainingState(
        loss,
        torch.optim.Adam(loss.parameters(), 5e-3, fused=True),
        EMA(loss),
        dataset,
        EpochOrder(4096, 256, 0),
        Rng(0),
    )
    untrained = held_out_loss(run.average, dataset)
    Trainer(images=256 * 500, batch_size=256, warmup=5_000, cooldown=64_000).fit(run)
    trained = held_out_loss(run.average, dataset)
    best = held_out_loss(DenoisingLoss(exact, StratifiedTimes()), dataset)
    t = torch.linspace(sde.t_min, sde.t_max, 100_001, dtype=torch.float64)
    alpha, sigma = (value[:, None] for value in sde.marginal(t))
    optimum = float((alpha**2 * variances / (alpha**2 * variances + sigma**2)).mean())
    # 16384 squared errors of variance at most 2: a standard error of 0.011
    assert best == pytest.approx(optimum, abs=0.04)
    assert untrained == pytest.approx(1, abs=0.05)
    assert -1.5e-3 < trained - best < 5e-3, (trained, best)


@pytest.mark.parametrize(("scores", "chosen"), [((3.0, 1.0, 2.0, 4.0), 1), ((4.0, 3.0, 2.0, 1.0), 3)])
def test_a_run_may_end_with_its_best_average(scores: tuple[float, ...], chosen: int, tmp_path: Path) -> None:
    """And with the weights of the last step; whoever loads the newest checkpoint gets that average."""
    run, averages = training(), list[dict[str, Tensor]]()

    def evaluate(state: TrainingState) -> dict[str, float]:
        averages.append({name: value.clone() for name, value in state.average.state_dict().items()})
        return {"eval/loss": scores[len(averages) - 1]}

    every = {"evaluate_every": 16, "checkpoint_every": 16, "keep_last": 1, "keep_best": 1}
    Trainer(images=64, batch_size=8, final="best", **every).fit(run, folder=tmp_path, evaluate=evaluate)
    found = latest(tmp_path)
    assert found is not None and found.step == 8 and found.score == 1.0 and len(averages) == 4
    for name, value in averages[chosen].items():
        assert torch.equal(run.average.state_dict()[name], value)
        assert torch.equal(found.tensors["ema"][name.removeprefix("denoiser.")], value)
    assert any(not torch.equal(averages[1][name], averages[3][name]) for name in averages[1])
    with pytest.raises(ValueError, match="final is last, or best with keep_best=1 or more; got 'best'"):
        Trainer(images=64, final="best")


def test_few_samples_fill_a_batch_as_often_as_it_takes() -> None:
    """5 of them in batches of 12: an epoch goes three times over all, so 12 of its 15 places are in a batch."""
    order = EpochOrder(5, 12, 0, repeat=True)
    counts = torch.stack([order.next().bincount(minlength=5) for _ in range(50)])
    assert (counts.sum(1) == 12).all() and counts.min() >= 2 and counts.max() == 3
    again = EpochOrder(5, 12, 0, repeat=True)
    again.load_state_dict(order.state_dict())
    assert torch.equal(again.next(), order.next())
    assert torch.equal(EpochOrder(20, 4, 0, repeat=True).next(), EpochOrder(20, 4, 0).next())
