"""What a model is asked for: bits/dim of distributions that are known, losses and samples that can be repeated."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracles import closed_form_sdes, mean_and_stderr, mixture
from torch import Tensor

from scoresde import (
    DDIM,
    SDE,
    VPSDE,
    AdaptiveODE,
    Denoiser,
    DenoisingLoss,
    EulerMaruyama,
    Exact,
    GaussianMixtureDenoiser,
    Heun,
    Hutchinson,
    Langevin,
    LogSNRGrid,
    Prediction,
    PredictorCorrector,
    ReverseDiffusion,
    Rng,
    Sampler,
)
from scoresde.codecs import Scaling
from scoresde.data import Dataset, EightGaussians, Split
from scoresde.evaluate.evaluation import Drawing, choose_split, evenly_spaced, held_out_loss
from scoresde.evaluate.likelihood import Elbo, OdeLikelihood
from scoresde.likelihood.budget import Budget
from scoresde.likelihood.tolerance import Tolerance
from scoresde.losses.denoising import Times

SDES = closed_form_sdes()
TOY = EightGaussians()


def toy_denoiser(sde: SDE) -> GaussianMixtureDenoiser:
    return GaussianMixtureDenoiser(TOY.means, TOY.std**2, torch.ones(8), sde)


def exact_bits(log_prob: Tensor, dims: int) -> Tensor:
    return -log_prob.double() / (dims * math.log(2))


@pytest.mark.parametrize("name", ["vp", "subvp", "ve", "cosine"])
def test_bits_per_dim_of_a_known_density(name: str) -> None:
    """Each point against the toy's own log-density. At t_min the eight are wider by σ² ≤ 1e-4 of std² = 0.02: with the
    solver's 2e-4 nats per dimension, 2e-2 bits at the 4.5 std where the farthest of these points lies."""
    dataset = TOY.dataset(train=8, test=64, seed=1)
    result = OdeLikelihood(Exact(), solver=Tolerance(1e-6, 1e-6)).job(toy_denoiser(SDES[name]), dataset).run()
    exact = exact_bits(TOY.log_prob(dataset.test.raw), 2)
    assert result.points == 64 and result.values.shape == (64,)
    torch.testing.assert_close(result.values, exact, rtol=0, atol=2e-2)
    # the eight hardly overlap, so the entropy is ln 8 + ln(2πe std²) nats
    entropy = (math.log(8) + math.log(2 * math.pi * math.e * TOY.std**2)) / (2 * math.log(2))
    assert abs(result.mean - entropy) < 4 * result.stderr


def test_a_budget_takes_the_place_of_tolerances() -> None:
    """100 calls per batch, to the tolerances above; the solver's estimate covers what tolerances of 1e-7 change."""
    dataset, denoiser = TOY.dataset(train=8, test=16, seed=1), toy_denoiser(VPSDE())
    result = OdeLikelihood(Exact(), solver=Budget(100), batch_size=9).job(denoiser, dataset).run()
    torch.testing.assert_close(result.values, exact_bits(TOY.log_prob(dataset.test.raw), 2), rtol=0, atol=2e-2)
    assert result.evaluations == 100 and result.estimator == "bpd/ode"
    fine = OdeLikelihood(Exact(), solver=Tolerance(1e-7, 1e-7)).job(denoiser, dataset).run()
    assert 0 < abs(result.mean - fine.mean) < result.solver_error < 1e-2
    assert Budget(100).accuracy == {"budget": 100}
    assert OdeLikelihood().solver == Tolerance(1e-5, 1e-5) and Tolerance(1e-5, 1e-3).accuracy == {
        "rtol": 1e-5,
        "atol": 1e-3,
    }


def test_bits_per_dim_of_integers() -> None:
    """One grey value k of 16 under N(m, s²) per pixel: its cell has centre c and width Δ = 2/16, so over the noise
    E −log p = ½ ln 2πs² + ((c − m)² + Δ²/12)/2s² − ln Δ. The probe is exact here (the Jacobian is a multiple of I)."""
    dims, k, mean, var = 3, 11, 0.1, 0.2
    denoiser = GaussianMixtureDenoiser(torch.full((1, dims), mean), var, torch.ones(1), VPSDE())
    raw = torch.full((300, dims), k, dtype=torch.uint8)
    dataset = Dataset("grey", Split(raw[:2]), Split(raw), Scaling(levels=16))
    result = OdeLikelihood(solver=Tolerance(1e-5, 1e-5)).job(denoiser, dataset).run()
    width = 2 / 16
    centre = -1 + (k + 0.5) * width
    nats = 0.5 * math.log(2 * math.pi * var) + ((centre - mean) ** 2 + width**2 / 12) / (2 * var) - math.log(width)
    # 1e-3 bits for t_min and the solver
    assert abs(result.mean - nats / math.log(2)) < 4 * result.stderr + 1e-3
    assert 0 < result.stderr < 5e-3  # the noise is there, and differs from point to point
    assert len(set(result.values.tolist())) == 300
    bound = OdeLikelihood(solver=Budget(40), bound="dequantised").job(denoiser, dataset).run()
    assert (bound.estimator, bound.meaning) == ("bpd/ode-bound", "a bound for the data")
    assert result.meaning == "the density at t_min" and abs(bound.mean - nats / math.log(2)) < 4 * bound.stderr + 1e-3


def test_the_variational_bound_of_a_known_density() -> None:
    """The exact denoiser loses the decoder's gap alone, of order σ²/(α std)² = 5e-3 nats: each point is the truth
    within 4.5 standard errors of its draws, and so is their mean within 4 of its own."""
    dataset, measure = TOY.dataset(train=8, test=64, seed=1), Elbo(samples=128, batch_size=40)
    result = measure.job(toy_denoiser(VPSDE()), dataset).run()
    gap = result.values - exact_bits(TOY.log_prob(dataset.test.raw), 2)
    assert bool((gap.abs() < 4.5 * result.errors + 2e-2).all())
    assert abs(float(gap.mean())) < 4 * float(result.errors.square().sum().sqrt()) / 64 + 2e-2
    assert result.estimator == "bpd/elbo" and "bound" in result.meaning and math.isnan(result.solver_error)
    assert result.evaluations == measure.calls == 128 and "points: 128" in measure.cost((2,), VPSDE())
    alone = Elbo(samples=128, batch_size=1).job(toy_denoiser(VPSDE()), dataset, points=2).run()
    torch.testing.assert_close(alone.values, result.values[[0, 32]], rtol=1e-5, atol=1e-6)


def test_a_likelihood_says_its_cost_and_shows_its_calls(monkeypatch) -> None:
    """Before it starts, and inside a solve: as many ticks as network calls, of a known number or not."""
    ticks: list[tuple[str, int | None]] = []

    def track(items, label, total, *, show):
        for item in items:
            ticks.append((label, total))
            yield item

    monkeypatch.setattr("scoresde.runs.progress.track", track)
    dataset = TOY.dataset(train=10, test=10)
    measure = OdeLikelihood(Exact(), solver=Budget(30), batch_size=5)
    assert measure.cost((1, 8, 8), VPSDE()) == "network calls for each 5 points: 30, each with 64 backward products"
    measure.job(toy_denoiser(VPSDE()), dataset).run()
    assert ticks == [("network calls, batch 1", 30)] * 30 + [("network calls, batch 2", 30)] * 30
    ticks.clear()
    measure = OdeLikelihood(Hutchinson(2), solver=Tolerance(1e-2, 1e-2))
    assert "as many as the tolerance takes, each with 2 backward" in measure.cost((2,), VPSDE())
    assert measure.job(toy_denoiser(VPSDE()), dataset).run().evaluations == len(ticks) > 0
    with pytest.raises(ValueError, match=r"'dequantised', 'centres' or null; got 'elbo'"):
        OdeLikelihood(bound="elbo")


def grey(n: int = 12) -> tuple[Denoiser, Dataset]:
    raw = torch.randint(16, (n, 1, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return mixture(VPSDE(), (1, 2, 2)), Dataset("grey", Split(raw.flip(0)), Split(raw), Scaling(levels=16))


def test_a_value_depends_on_seed_and_index_alone() -> None:
    """Batch size, number of points and neighbours change no value; 1e-6 bits is the round-off of another batch."""
    denoiser, dataset = grey()
    whole = OdeLikelihood(batch_size=12).job(denoiser, dataset, seed=5).run()
    for batch_size in (1, 7):
        other = OdeLikelihood(batch_size=batch_size).job(denoiser, dataset, seed=5).run()
        torch.testing.assert_close(other.values, whole.values, rtol=0, atol=1e-6)
    some = OdeLikelihood(batch_size=4).job(denoiser, dataset, points=5, seed=5).run()
    torch.testing.assert_close(some.values, whole.values[[0, 2, 4, 7, 9]], rtol=0, atol=1e-6)
    assert float((OdeLikelihood().job(denoiser, dataset, seed=6).run().values - whole.values).abs().min()) > 1e-4


def test_mean_and_standard_error_are_those_of_the_values() -> None:
    denoiser, dataset = grey()
    result = OdeLikelihood(batch_size=5).job(denoiser, dataset, split="train").run()
    values = result.values.numpy()
    assert result.mean == pytest.approx(values.mean(), rel=1e-12)
    assert result.stderr == pytest.approx(values.std(ddof=1) / math.sqrt(12), rel=1e-12)
    assert math.isnan(OdeLikelihood().job(denoiser, dataset, points=1).run().stderr)
    # the train split is the test split reversed, and noise goes by index
    test = OdeLikelihood().job(denoiser, dataset, split="test").run()
    assert abs(test.mean - result.mean) < 4 * math.hypot(test.stderr, result.stderr) and test.mean != result.mean


class Counted(Denoiser):
    """The denoiser it is given, told classes: class k is the mixture moved by k; counts its calls."""

    def __init__(self, inner: GaussianMixtureDenoiser):
        super().__init__(inner.sde)
        self.inner, self.calls, self.seen = inner, 0, []

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Prediction:
        self.calls += 1
        self.seen.append(cond)
        shift = 0.0 if cond is None else cond.to(x.dtype)[:, None].expand_as(x)
        scales = self.sde.at(t, x)
        inner = self.inner(x - scales.alpha * shift, t)
        return Prediction(inner.x0 + shift, inner.eps, scales)


def test_evaluations_are_counted() -> None:
    denoiser, dataset = Counted(toy_denoiser(VPSDE())), TOY.dataset(train=1, test=30)
    result = OdeLikelihood(batch_size=8).job(denoiser, dataset).run()
    assert result.evaluations * 4 == denoiser.calls > 40


def test_labels_reach_the_model() -> None:
    """Class k is the toy moved by k in both coordinates, which the conditional model knows: 0.02 bits as above, and
    0.01 for the prior, which does not know the mean: α(t_max) 2 = 0.013."""
    labels = torch.arange(30) % 3
    raw = TOY.sample(30, rng=Rng(0))
    split = Split(raw + labels[:, None], labels)
    dataset = Dataset("moved", split, split, Scaling.identity(), classes=3)
    likelihood, denoiser = OdeLikelihood(Exact(), batch_size=7), Counted(toy_denoiser(VPSDE()))
    told = likelihood.job(denoiser, dataset, conditional=True).run()
    torch.testing.assert_close(told.values, exact_bits(TOY.log_prob(raw), 2), rtol=0, atol=3e-2)
    untold = likelihood.job(denoiser, dataset).run()
    torch.testing.assert_close(untold.values[labels == 0], told.values[labels == 0], rtol=0, atol=1e-5)
    assert float((untold.values - told.values)[labels > 0].mean()) > 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.5}, "batch_size"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OdeLikelihood(**wrong)


def test_points_are_spread_evenly() -> None:
    assert evenly_spaced(10, 4).tolist() == [0, 2, 5, 7]
    assert evenly_spaced(5, None).tolist() == evenly_spaced(5, 5).tolist() == [0, 1, 2, 3, 4]
    for n, points in ((1797, 64), (360, 359), (7, 1)):
        index = evenly_spaced(n, points)
        assert len(set(index.tolist())) == points and 0 == index[0] <= index[-1] < n
        assert points == 1 or set(index.diff().tolist()) <= {n // points, n // points + 1}
    for points in (0, 11, -1):
        with pytest.raises(ValueError, match=f"between 1 and the 10 points of the split.*got {points}"):
            evenly_spaced(10, points)


def test_an_unknown_split_is_refused() -> None:
    dataset = TOY.dataset(train=2, test=3)
    assert (choose_split(dataset, "train"), choose_split(dataset, "test")) == (dataset.train, dataset.test)
    with pytest.raises(ValueError, match="split is 'train' or 'test'; got 'valid'"):
        choose_split(dataset, "valid")


class Middle(Times):
    """t = ½ for every sample."""

    def sample(self, sde: SDE, n: int, rng: Rng, device: torch.device) -> tuple[Tensor, Tensor]:
        t = torch.full((n,), 0.5, dtype=torch.float64)
        return t, torch.ones_like(t)


def test_held_out_loss_is_the_mean_over_the_test_split() -> None:
    """Of a loss without chance, so that a last batch of 6 must weigh 6 and not 32; float32 means agree to 1e-6."""
    dataset = TOY.dataset(train=300, test=70)
    loss = DenoisingLoss(toy_denoiser(VPSDE()), Middle(), coupling=lambda x0, rng: (x0, x0.flip(1).sin()))
    exact = loss(dataset.test.raw, rng=Rng(0)).double().mean()
    for batch_size in (1, 32, 70, 256):
        assert held_out_loss(loss, dataset, batch_size=batch_size) == pytest.approx(float(exact), rel=1e-6)


def test_held_out_loss_is_repeatable_and_right() -> None:
    """Gaussian data: the exact denoiser's ε-loss is E_t α²v/(α²v + σ²); the same number at every call."""
    denoiser = GaussianMixtureDenoiser(torch.zeros(1, 2), 0.5, torch.ones(1), VPSDE())
    raw = denoiser.sample(4000, rng=Rng(1))
    dataset, loss = Dataset("g", Split(raw[:1]), Split(raw), Scaling.identity()), DenoisingLoss(denoiser)
    state = torch.get_rng_state()
    values = {held_out_loss(loss, dataset) for _ in range(3)}
    assert len(values) == 1 and torch.equal(torch.get_rng_state(), state)
    t = torch.linspace(denoiser.sde.t_min, denoiser.sde.t_max, 100_001, dtype=torch.float64)
    alpha, sigma = denoiser.sde.marginal(t)
    expected = float((0.5 * alpha**2 / (0.5 * alpha**2 + sigma**2)).mean())
    _, stderr = mean_and_stderr(loss(raw, rng=Rng(7)).detach())
    assert abs(values.pop() - expected) < 4 * stderr < 0.05


def test_held_out_loss_passes_labels_on_request() -> None:
    labels = torch.arange(30) % 3
    split = Split(TOY.sample(30, rng=Rng(0)), labels)
    dataset, denoiser = Dataset("t", split, split, Scaling.identity(), classes=3), Counted(toy_denoiser(VPSDE()))
    held_out_loss(DenoisingLoss(denoiser), dataset, batch_size=20)
    assert denoiser.seen == [None, None]
    held_out_loss(DenoisingLoss(denoiser), dataset, conditional=True, batch_size=20)
    assert torch.equal(torch.cat(denoiser.seen[2:]), labels)


SAMPLERS = {
    "pc": Sampler(PredictorCorrector(ReverseDiffusion(), Langevin()), steps=20),
    "em": Sampler(EulerMaruyama(), steps=20),
    "ddim": Sampler(DDIM(eta=0.5), LogSNRGrid(), steps=10),
    "heun": Sampler(Heun(), LogSNRGrid(), steps=8, denoise=False),
    "ode": Sampler(AdaptiveODE(rtol=1e-4, atol=1e-4, backend="native"), steps=1),
}
each_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())


@each_sampler
@pytest.mark.parametrize("sde", [SDES["vp"], SDES["ve"]], ids=["vp", "ve"])
def test_a_sample_depends_on_its_seed_alone(sampler: Sampler, sde: SDE) -> None:
    """Batch size and order change nothing but round-off, which 20 float32 steps keep below 1e-4."""
    denoiser, seeds = toy_denoiser(sde), [3, 14, 15, 92, 65, 35, 0]
    whole = Drawing((2,), seeds).job(denoiser, sampler).run().x
    assert whole.shape == (7, 2) and len(set(whole[:, 0].tolist())) == 7
    for batch_size in (1, 3):
        parts = Drawing((2,), seeds, batch_size=batch_size).job(denoiser, sampler).run()
        torch.testing.assert_close(parts.x, whole, rtol=0, atol=1e-4)
    reverse = Drawing((2,), seeds[::-1]).job(denoiser, sampler).run()
    torch.testing.assert_close(reverse.x, whole.flip(0), rtol=0, atol=1e-4)
    assert torch.equal(Drawing((2,), seeds).job(denoiser, sampler).run().x, whole)


@each_sampler
def test_cost_and_frames_are_those_of_the_run(sampler: Sampler) -> None:
    """Frames go from the prior's own draws to the samples; calls are what the model itself counts per batch."""
    denoiser, seeds = Counted(toy_denoiser(VPSDE())), range(10)
    labels = torch.arange(10) % 3
    made = Drawing((2,), seeds, labels, batch_size=4, frames=5, watched=3).job(denoiser, sampler).run()
    assert made.evaluations * 3 == denoiser.calls
    assert sampler.evaluations in (None, made.evaluations)
    assert {4, 2} <= {len(cond) for cond in denoiser.seen} and torch.equal(denoiser.seen[-1], labels[8:])
    assert made.cond is labels and made.frames.shape == (len(made.times), 3, 2) and 2 <= len(made.times) <= 6
    assert made.times[0] == denoiser.sde.t_max and made.times[-1] == sampler.times(denoiser)[-1]
    assert made.times == sorted(made.times, reverse=True)
    torch.testing.assert_close(made.frames[-1], made.x[:3])
    prior = denoiser.prior_sample((4, 2), rng=Rng(seeds=[0, 1, 2, 3]), dtype=torch.float32)
    torch.testing.assert_close(made.frames[0], prior[:3])
