"""The adaptive reverse SDE: its law with many rejections, its Brownian paths, and every sample for itself."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from oracles import EVENT_SHAPES, all_sdes, marginal_moments, mixture
from torch import Tensor

from scoresde import (
    SDE,
    VPSDE,
    EulerMaruyama,
    GaussianMixtureDenoiser,
    LogSNRGrid,
    Rng,
    Sampler,
    ScoreFunction,
    SolverError,
    UniformGrid,
)
from scoresde.diffusion.denoiser import CountingDenoiser
from scoresde.sampling import adaptive_sde
from scoresde.sampling.adaptive_sde import AdaptiveSDE

ALL = all_sdes()
each_sde = pytest.mark.parametrize("sde", ALL.values(), ids=ALL.keys())
Path = adaptive_sde._Path


def ends(sde: SDE) -> tuple[Tensor, Tensor]:
    start, stop = torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)
    return start, stop


def bimodal(sde: SDE) -> GaussianMixtureDenoiser:
    return GaussianMixtureDenoiser(
        torch.tensor([[-1.0], [1.2]]), torch.tensor([0.1, 0.2]), torch.tensor([0.4, 0.6]), sde
    )


class Watched(Path):
    """Counts attempts and rejections."""

    attempts = rejected = 0

    def take(self, level, want, fresh):
        Watched.attempts += len(level)
        return super().take(level, want, fresh)

    def put_back(self, rows, ends, z):
        Watched.rejected += len(rows)
        super().put_back(rows, ends, z)


class Forgetful(Watched):
    """Draws again after a rejection."""

    def put_back(self, rows, ends, z):
        Watched.rejected += len(rows)


@pytest.mark.parametrize("name", ["vp", "ve", "flow"])
def test_rejections_do_not_bias_the_law(name, monkeypatch) -> None:
    """A fifth or more of all attempts is rejected; mean and variance of 20 000 samples stay within 5 standard errors
    and the 2 % of the variance that the tolerance 0.01 costs. Drawn again, the variance is 20 % short."""
    denoiser, n = bimodal(ALL[name]), 20_000
    x = denoiser.prior_sample((n, 1), rng=Rng(7), dtype=torch.float64)
    mean, var = (float(value) for value in marginal_moments(denoiser, denoiser.sde.t_min))
    short = {}
    for kind in (Watched, Forgetful):
        monkeypatch.setattr(adaptive_sde, "_Path", kind)
        Watched.attempts = Watched.rejected = 0
        y = Sampler(AdaptiveSDE(0.01, 0.01), denoise=False)(denoiser, x, rng=Rng(1))
        assert Watched.rejected > 0.15 * Watched.attempts
        squares = (y - mean).square()
        stderr = float(squares.std()) / math.sqrt(n)
        short[kind] = abs(float(squares.mean()) - var) < 5 * stderr + 0.02 * var
        if kind is Watched:
            assert abs(float(y.mean()) - mean) < 5 * math.sqrt(var / n) + 0.01
        else:
            assert float(squares.mean()) < 0.85 * var
    assert short == {Watched: True, Forgetful: False}


def test_a_path_is_brownian_however_often_it_is_asked() -> None:
    """Draws are unit vectors, so increments are known as combinations of them: those that are kept are orthonormal, and
    every rejected one is the sum of the parts that replace it, √ of their share in the clock e^{2η²ℓ} each."""
    eta, draws = 0.8, 60
    generator = torch.Generator().manual_seed(0)
    path = Path(eta, torch.zeros(1, draws, dtype=torch.float64))
    level, basis, kept, rejected = torch.zeros(1, dtype=torch.float64), iter(torch.eye(draws).double()), [], []
    for fresh in basis:
        want = 0.05 + torch.rand(1, generator=generator, dtype=torch.float64)
        length, z = path.take(level, want, fresh[None])
        assert float(length) <= 1.01 * float(want)
        if float(torch.rand(1, generator=generator)) < 0.6:
            rejected.append((level.clone(), level + length, z[0].clone()))
            path.put_back(torch.tensor([0]), level + length, z)
        else:
            kept.append((level.clone(), level + length, z[0].clone()))
            level = level + length
    assert len(kept) > 15 and len(rejected) > 30 and path.ends.shape[1] > 3
    vectors = torch.stack([z for _, _, z in kept])
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(len(kept), dtype=torch.float64))
    assert all(float(after[0] - before[1]) == 0 for before, after in pairwise(kept))

    def clock(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(2 * eta**2 * b) - torch.exp(2 * eta**2 * a)

    checked = 0
    for a, b, z in rejected:
        parts = [(c, d, v) for c, d, v in kept if a - 1e-9 <= c and d <= b + 1e-9]
        if parts and float((parts[-1][1] - b).abs()) < 1e-9:
            total = sum(clock(c, d).sqrt() * v for c, d, v in parts)
            torch.testing.assert_close(clock(a, b).sqrt() * z, total)
            checked += 1
    assert checked > 20


class Impulses(Rng):
    """The k-th draw is 1 for sample k and 0 for the others."""

    def __init__(self):
        super().__init__(0)
        self.draw = -1

    def normal(self, shape, *, dtype=None, device=None):
        self.draw += 1
        z = torch.zeros(tuple(shape), dtype=dtype)
        if self.draw < len(z):
            z[self.draw] = 1
        return z


def affine(sde: SDE, eta: float, n: int) -> tuple[float, Tensor, float, float]:
    """Tolerances that accept everything, so n equal steps over λ ∈ [−3, 3] on a Gaussian: slope, noise (n,), mean and
    variance at the end, and the exact mean and variance after them."""
    denoiser = GaussianMixtureDenoiser(torch.tensor([[1.5]]), 0.25, torch.ones(1), sde)
    t, s = sde.time(torch.tensor([-3.0, 3.0], dtype=torch.float64))
    step = AdaptiveSDE(1e9, 1e9, eta, first_step=3 / n, max_step=3 / n)
    x = torch.zeros(n + 2, 1, dtype=torch.float64)
    x[-1] = 1
    rng = Impulses()
    y, _ = step(denoiser, x, t, s, None, cond=None, rng=rng)
    assert rng.draw == n - 1
    m, v = (float(value) for value in marginal_moments(denoiser, float(t)))
    slope, noise = float(y[n + 1] - y[n]), (y[:n] - y[n])[:, 0]
    return slope, noise, float(y[n]) + slope * m, slope**2 * v + float(noise.square().sum())


@pytest.mark.parametrize(
    ("sde", "eta"),
    [
        pytest.param(sde, (0.5, 1.0)[i % 2], id=f"{name}-{(0.5, 1.0)[i % 2]}")
        for i, (name, sde) in enumerate(ALL.items())
    ],
)
def test_its_pair_has_strong_order_one_and_weak_order_two(sde, eta) -> None:
    """On a Gaussian without Monte Carlo: law against its exact one, and n steps against 2n on one Brownian path, where
    a unit normal is made of those of its halves with shares √q/(1 + q) and 1/(1 + q) of variance, q = e^{−2η²h/2}."""
    denoiser = GaussianMixtureDenoiser(torch.tensor([[1.5]]), 0.25, torch.ones(1), sde)
    mean, var = (float(value) for value in marginal_moments(denoiser, float(sde.time(torch.tensor(3.0).double()))))
    weak, strong = [], []
    ends = {n: affine(sde, eta, n) for n in (64, 128, 256)}
    for n in (64, 128):
        (slope, noise, m, v), (fine_slope, fine, fine_m, _) = ends[n], ends[2 * n]
        weak.append(abs(m - mean) + abs(v - var))
        q = math.exp(-2 * eta**2 * 3 / (2 * n))
        shares = torch.tensor([math.sqrt(q), 1.0], dtype=torch.float64) / math.sqrt(1 + q)
        split = (noise[:, None] * shares).flatten()
        strong.append(math.sqrt((m - fine_m) ** 2 + (slope - fine_slope) ** 2 + float((split - fine).square().sum())))
    assert math.log2(weak[0] / weak[1]) == pytest.approx(2.0, abs=0.1)
    assert math.log2(strong[0] / strong[1]) == pytest.approx(AdaptiveSDE.order, abs=0.1)


def test_it_needs_fewer_evaluations_than_euler_maruyama_for_the_same_accuracy() -> None:
    """Data of spread 0.03 under VP, variance of 20 000 samples at t_min: better than eight times the equal steps."""
    sde, n = VPSDE(), 20_000
    denoiser = CountingDenoiser(GaussianMixtureDenoiser(torch.tensor([[0.5]]), 1e-3, torch.ones(1), sde))
    x = denoiser.prior_sample((n, 1), rng=Rng(7), dtype=torch.float64)
    mean, var = (float(value) for value in marginal_moments(denoiser.denoiser, sde.t_min))

    def error(sampler: Sampler) -> float:
        return abs(float((sampler(denoiser, x, rng=Rng(1)) - mean).square().mean()) / var - 1)

    adaptive = error(Sampler(AdaptiveSDE(), denoise=False))
    steps = 8 * denoiser.evaluations
    assert steps < 600
    assert adaptive < error(Sampler(EulerMaruyama(), UniformGrid(), steps=steps, denoise=False))


@pytest.mark.parametrize("event", EVENT_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_sample_depends_on_its_own_seed_only(event, dtype) -> None:
    """Alone, reordered, or beside one that is far away and takes other steps; over a grid of three solves too."""
    denoiser = mixture(VPSDE(), event, covariance="isotropic")
    sampler = Sampler(AdaptiveSDE(), LogSNRGrid(), steps=3)
    x = Rng(0).normal((4, *event), dtype=dtype)
    x[3] *= 1000
    batch = sampler(denoiser, x, rng=Rng(seeds=[4, 5, 6, 7]))
    assert batch.dtype == dtype
    alone = sampler(denoiser, x[1:2], rng=Rng(seeds=[5]))
    other = sampler(denoiser, x[[2, 1]], rng=Rng(seeds=[6, 5]))
    close = {"rtol": 1e-8, "atol": 1e-8} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(alone, batch[1:2], **close)
    torch.testing.assert_close(other, batch[[2, 1]], **close)
    assert float((sampler(denoiser, x[1:2], rng=Rng(seeds=[6])) - alone).abs().max()) > 0.01


@each_sde
def test_times_can_differ_between_samples(sde) -> None:
    """Each moves from its own t to its own s; one that has s == t stays, and draws nothing."""
    denoiser = bimodal(sde)
    t = sde.time(torch.tensor([-4.0, 0.0, -1.0], dtype=torch.float64))
    s = torch.stack([sde.time(torch.tensor(2.0, dtype=torch.float64)), t[1], ends(sde)[1]])
    x, step = torch.tensor([[0.3], [0.4], [0.5]], dtype=torch.float64), AdaptiveSDE()
    got, _ = step(denoiser, x, t, s, None, cond=None, rng=Rng(seeds=[1, 2, 3]))
    assert float(got[1]) == 0.4
    for k in (0, 2):
        alone, _ = step(denoiser, x[k : k + 1], t[k], s[k], None, cond=None, rng=Rng(seeds=[k + 1]))
        torch.testing.assert_close(alone, got[k : k + 1])


def test_conditions_follow_their_samples() -> None:
    """Data in one point c per sample, each on its own way for its own time: x_s = α_s c + σ_s ε, |ε| < 6."""
    sde = VPSDE()

    def score(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        assert cond.shape == x.shape
        scales = sde.at(t, x)
        return (scales.alpha * cond - x) / scales.sigma**2

    points = torch.tensor([[0.0], [3.0], [-50.0]], dtype=torch.float64)
    t = sde.time(torch.tensor([2.0, -4.0, -1.0], dtype=torch.float64))
    x = Rng(0).normal((3, 1), dtype=torch.float64)
    got, _ = AdaptiveSDE()(ScoreFunction(score, sde), x, t, ends(sde)[1], None, cond=points, rng=Rng(1))
    assert float((got - points).abs().max()) < 6 * float(sde.marginal(ends(sde)[1])[1])


def test_evaluations_are_limited_and_the_samples_named() -> None:
    denoiser = CountingDenoiser(mixture(VPSDE(), (2,)))
    with pytest.raises(SolverError, match="max_evaluations=9") as caught:
        Sampler(AdaptiveSDE(max_evaluations=9))(denoiser, (3, 2))
    assert caught.value.evaluations == denoiser.evaluations == 9
    assert caught.value.samples == [0, 1, 2] and 0 < caught.value.t < 1
    free = CountingDenoiser(mixture(VPSDE(), (2,)))
    traces = list(Sampler(AdaptiveSDE()).iterate(free, (3, 2)))
    assert traces[-1].evaluations == free.evaluations > 9
    assert Sampler(AdaptiveSDE()).evaluations is None


def test_a_prediction_that_is_not_finite_is_an_error() -> None:
    """NaN below t = 0.5 in one sample: it is named, with where it got to, and no number comes back."""
    sde = VPSDE()

    def score(x: Tensor, t: Tensor) -> Tensor:
        return torch.where((t < 0.5)[:, None] & (x[:, 1:] > 90), torch.nan, -x / (1 + x.square()))

    x = torch.tensor([[0.0, 0.0], [0.0, 1e4], [1.0, 0.0]], dtype=torch.float64)
    with pytest.raises(SolverError, match="underflowed") as caught:
        Sampler(AdaptiveSDE())(ScoreFunction(score, sde), x)
    assert caught.value.samples == [1] and caught.value.t == pytest.approx(0.5, abs=1e-6)
    denoiser = CountingDenoiser(ScoreFunction(score, sde))
    x[2, 0] = torch.inf
    with pytest.raises(SolverError, match="before the solve") as caught:
        Sampler(AdaptiveSDE())(denoiser, x)
    assert caught.value.samples == [2] and denoiser.evaluations == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rtol": 0.0}, "is a tolerance, > 0 and finite"),
        ({"atol": math.nan}, "is a tolerance, > 0 and finite"),
        ({"eta": 0.0}, "AdaptiveODE"),
        ({"first_step": 0.0}, "is a length in log.*> 0 and finite"),
        ({"max_step": -1.0}, "is a length in log.*> 0 and finite"),
        ({"max_evaluations": 0}, "at least 1"),
    ],
)
def test_bad_arguments_are_refused_at_construction(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveSDE(**arguments)


def test_rows_of_an_rng_are_the_same_streams() -> None:
    """What `AdaptiveSDE` draws with: rows move on their own streams and no others."""
    rng, twin = Rng(seeds=[1, 2, 3]), Rng(seeds=[1, 2, 3])
    first = rng.rows(torch.tensor([2, 0])).normal((2, 5))
    second = rng.normal((3, 5))
    a, b = twin.normal((3, 5)), twin.normal((3, 5))
    torch.testing.assert_close(first, a[[2, 0]], rtol=0, atol=0)
    torch.testing.assert_close(second, torch.stack([b[0], a[1], b[2]]), rtol=0, atol=0)
    single = Rng(0)
    assert single.rows(torch.tensor([1])) is single
