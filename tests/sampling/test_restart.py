"""Restart sampling: it keeps the law, forgets what was wrong at the rate it should, and is counted exactly."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from oracles import EVENT_SHAPES, Script, all_sdes, marginal_moments, mean_and_stderr, mixture
from torch import Tensor

from scoresde import (
    DDIM,
    EDMSDE,
    SDE,
    VPSDE,
    Ancestral,
    DPMSolverPP,
    GaussianMixtureDenoiser,
    Heun,
    LogSNRGrid,
    Rng,
    Sampler,
    ScoreFunction,
    Step,
)
from scoresde.diffusion.denoiser import CountingDenoiser
from scoresde.sampling.churn import Churn
from scoresde.sampling.restart import Restart

ALL = all_sdes()
each_sde = pytest.mark.parametrize("sde", ALL.values(), ids=ALL.keys())


def at(sde: SDE, ratio: float) -> Tensor:
    """The time of ς = σ/α."""
    return sde.time(torch.tensor(-2 * math.log(ratio), dtype=torch.float64))


def run(step: Step, denoiser, x: Tensor, times: list[Tensor], rng: Rng) -> Tensor:
    state = step.init(x)
    for t, s in pairwise(times):
        x, state = step(denoiser, x, t, s, state, cond=None, rng=rng)
    return x


def gaussian(sde: SDE, var: float = 0.25, mean: float = 1.5) -> GaussianMixtureDenoiser:
    return GaussianMixtureDenoiser(torch.tensor([[mean]]), var, torch.ones(1), sde)


def spread(step: Step, denoiser, times: list[Tensor], m: float, v: float, draws: int) -> tuple[float, float]:
    """Mean and variance at the end, from m and v, of a run x ← a x + b + Σ c_k z_k: exact, no Monte Carlo."""
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    b = float(run(step, denoiser, zero, times, Script([0.0] * draws)))
    a = float(run(step, denoiser, one, times, Script([0.0] * draws))) - b
    impulses = [[float(j == k) for j in range(draws)] for k in range(draws)]
    c = [float(run(step, denoiser, zero, times, Script(impulse))) - b for impulse in impulses]
    return a * m + b, a * a * v + sum(part**2 for part in c)


def moments(denoiser: GaussianMixtureDenoiser, t: Tensor) -> tuple[float, float]:
    mean, cov = marginal_moments(denoiser, float(t))
    return float(mean), float(cov)


def brink(sde: SDE, low: float) -> list[Tensor]:
    """Two times a billionth on either side of ς = low: the step between them restarts, and does nothing else."""
    return [at(sde, low * (1 + 1e-9)), at(sde, low * (1 - 1e-9))]


@each_sde
@pytest.mark.parametrize("inner", [Heun(), DDIM()], ids=["heun", "ddim"])
def test_the_law_is_kept_at_the_order_of_the_step(sde, inner) -> None:
    """Mean and variance at ς = 0.25 after two restarts from [0.25, 1]: slope p + O(h), h = log 4/40."""
    denoiser, times, errors = gaussian(sde), brink(sde, 0.25), []
    mean, var = moments(denoiser, times[-1])
    for n in (40, 80):
        step = Restart(inner, 0.25, 1.0, repeats=2, steps=n)
        m, v = spread(step, denoiser, times, mean, var, draws=2)
        errors.append(abs(m - mean) + abs(v - var))
    assert step.order == inner.order
    assert math.log2(errors[0] / errors[1]) == pytest.approx(inner.order, abs=0.1)


@each_sde
@pytest.mark.parametrize("repeats", [1, 3])
def test_errors_shrink_by_the_factor_of_the_interval(sde, repeats) -> None:
    """In y, up adds high² − low² to the variance and down multiplies it by r = (v + low²)/(v + high²): an excess by r,
    an offset of the mean by √r. The 40 steps of Heun add less than 1e-3.
    """
    low, high, data = 0.3, 1.2, 0.25
    denoiser, times = gaussian(sde, data), brink(sde, low)
    alpha = float(sde.marginal(times[-1])[0])
    mean, var = moments(denoiser, times[-1])
    step = Restart(Heun(), low, high, repeats, steps=40)
    m, v = spread(step, denoiser, times, mean + 0.5 * alpha, 2 * var, draws=repeats)
    factor = ((data + low**2) / (data + high**2)) ** repeats
    assert (v - var) / var == pytest.approx(factor, abs=1e-3)
    assert (m - mean) / alpha == pytest.approx(0.5 * math.sqrt(factor), abs=1e-3)


def test_a_network_wrong_at_high_noise_is_corrected_at_low_noise() -> None:
    """Mean and spread of x̂_0 are wrong where ς > 2: no number of ODE steps helps, restarts in [0.5, 2] do.

    (Xu et al. 2023, theorem 2: the error made above is contracted, for r^K = ((v + 0.25)/(v + 4))^3 = 2e-3 of the
    variance and 4 % of the mean; what the 18 + 3 · 6 steps of Heun add themselves is below 1 %.)
    """
    sde = EDMSDE(0.02, 20.0)
    right, wrong = gaussian(sde, 0.3, 0.0), gaussian(sde, 2.0, 2.0)

    def score(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(t[:, None] > 2, wrong(x, t).score, right(x, t).score)

    denoiser = ScoreFunction(score, sde)
    errors = {}
    for name, step, steps, draws in (
        ("coarse", Heun(), 18, 0),
        ("fine", Heun(), 200, 0),
        ("restart", Restart(Heun(), 0.5, 2.0, repeats=3, steps=6), 18, 3),
    ):
        times = list(LogSNRGrid()(sde, steps))
        m, v = spread(step, denoiser, times, *moments(right, times[0]), draws=draws)
        mean, var = moments(right, times[-1])
        errors[name] = abs(m - mean), abs(v / var - 1)
    assert errors["fine"][0] > 0.1 and errors["fine"][1] > 0.1
    assert errors["coarse"][0] > 0.1 and errors["coarse"][1] > 0.1
    assert errors["restart"][0] < 0.1 * errors["fine"][0]
    assert errors["restart"][1] < 0.1 * errors["fine"][1]


def test_weights_of_modes_are_corrected() -> None:
    """Everything in one of two modes at ±1: the flow leaves it there; restarts up to ς = 4 share it out again.

    Each keeps some tanh-like part of the imbalance, at most E tanh(x/ς²)² < 1/4 at the top: (1/4)^6 is nothing, and the
    20 000 signs are left, ±5 standard errors.
    """
    sde = EDMSDE(0.02, 20.0)
    means = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    denoiser = GaussianMixtureDenoiser(means, 0.01, torch.ones(2), sde)
    x = 1 + 0.1 * Rng(0).normal((20_000, 1), dtype=torch.float64)
    times = brink(sde, 0.1)
    assert bool((run(Heun(), denoiser, x, times, Rng(1)) > 0).all())
    got = run(Restart(Heun(), 0.1, 4.0, repeats=6, steps=16), denoiser, x, times, Rng(1))
    mean, stderr = mean_and_stderr(got.sign())
    assert abs(mean) < 5 * stderr
    mean, stderr = mean_and_stderr(got.square())
    exact = 1 + 0.01 + 0.1**2
    assert abs(mean - exact) < 5 * stderr + 0.02  # 16 steps of Heun from 4 to 0.1


@each_sde
def test_multistep_methods_begin_again_on_each_way_down(sde) -> None:
    """Xu et al. 2023, alg. 2, written out: 4 steps equal in log ς from 0.5 to 0.2, twice, each without history, and the
    run goes on with that of the last."""
    denoiser, inner = mixture(sde, (2,)), DPMSolverPP(2)
    x, times = Rng(0).normal((3, 2), dtype=torch.float64), [at(sde, ratio) for ratio in (0.4, 0.3, 0.2, 0.15)]
    got = run(Restart(inner, 0.25, 0.5, repeats=2, steps=4), denoiser, x, times, Rng(1))
    rng, state = Rng(1), inner.init(x)
    for t, s in pairwise(times[:3]):
        x, state = inner(denoiser, x, t, s, state, cond=None, rng=rng)
    way = [at(sde, 0.5 * 0.4 ** (k / 4)) for k in range(5)]
    for _ in range(2):
        scale, std = sde.transition(times[2], way[0])
        x, state = scale * x + std * rng.normal_like(x), inner.init(x)
        for t, s in pairwise(way):
            x, state = inner(denoiser, x, t, s, state, cond=None, rng=rng)
    want, _ = inner(denoiser, x, times[2], times[3], state, cond=None, rng=rng)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("steps", [5, 40])
@pytest.mark.parametrize("inner", [Heun(), DDIM(), Ancestral(), Churn(), Restart(Heun(), 1.0, 3.0, 2, 5)])
def test_evaluations_are_counted(inner, steps) -> None:
    """Whatever the grid: one restart, where it passes `low`."""
    for sde in (VPSDE(), EDMSDE()):
        denoiser = CountingDenoiser(mixture(sde, (2,)))
        sampler = Sampler(Restart(inner, 0.1, 0.5, repeats=3, steps=2), LogSNRGrid(), steps=steps)
        traces = list(sampler.iterate(denoiser, (4, 2)))
        assert traces[-1].evaluations == denoiser.evaluations == sampler.evaluations
        extra = [after.evaluations - before.evaluations > inner.evaluations for before, after in pairwise(traces)]
        assert sum(extra) in (1, 2)  # with a nested interval, two places


@pytest.mark.parametrize("event", EVENT_SHAPES[1:3], ids=str)
def test_only_samples_that_cross_restart(event) -> None:
    """Times per sample: above, across and below `low`, each as if alone; no crossing is the inner step itself."""
    sde = VPSDE()
    denoiser = mixture(sde, event, covariance="isotropic")
    step, x = Restart(Heun(), 0.1, 0.5, repeats=2, steps=3), Rng(0).normal((4, *event), dtype=torch.float64)
    t = torch.stack([at(sde, ratio) for ratio in (0.4, 0.12, 0.12, 0.08)])
    s = torch.stack([at(sde, ratio) for ratio in (0.3, 0.12, 0.09, 0.07)])
    got, _ = step(denoiser, x, t, s, None, cond=None, rng=Rng(seeds=[1, 2, 3, 4]))
    plain, _ = Heun()(denoiser, x, t, s, None, cond=None, rng=Rng(0))
    for k in (0, 1, 3):
        torch.testing.assert_close(got[k], plain[k], rtol=0, atol=0)
    alone, _ = step(denoiser, x[2:3], t[2], s[2], None, cond=None, rng=Rng(seeds=[3]))
    torch.testing.assert_close(got[2:3], alone)
    assert float((got[2] - plain[2]).abs().max()) > 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 0.0}, "0 < low < high"),
        ({"low": 0.5, "high": 0.5}, "0 < low < high"),
        ({"high": math.inf}, "0 < low < high"),
        ({"repeats": 0}, "at least 1"),
        ({"steps": 0}, "at least 1"),
        ({"noise": 0.0}, "standard deviation"),
    ],
)
def test_bad_arguments_are_refused_at_construction(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        Restart(**arguments)


def test_an_interval_beyond_the_sde_is_refused_before_the_first_step() -> None:
    denoiser = CountingDenoiser(mixture(EDMSDE(0.02, 20.0), (2,)))
    with pytest.raises(ValueError, match="beyond t_max of EDMSDE"):
        Sampler(Restart(high=21.0))(denoiser, (2, 2))
    assert denoiser.evaluations == 0
