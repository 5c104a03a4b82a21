"""EDM's stochastic sampler: its algorithm line by line, the law it keeps, and the SDE that short steps amount to."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from oracles import EVENT_SHAPES, Fixed, all_sdes, grid, marginal_moments, mixture, times
from torch import Tensor

from scoresde import (
    DDIM,
    EDMSDE,
    SDE,
    GaussianMixtureDenoiser,
    Heun,
    LogSNRGrid,
    Rng,
    Sampler,
    Step,
)
from scoresde.diffusion.denoiser import CountingDenoiser
from scoresde.sampling.churn import Churn

ALL = all_sdes()
each_sde = pytest.mark.parametrize("sde", ALL.values(), ids=ALL.keys())


def move(step: Step, denoiser, x: Tensor, t: Tensor, s: Tensor, rng: Rng | None = None) -> Tensor:
    return step(denoiser, x, t, s, step.init(x), cond=None, rng=rng or Rng(0))[0]


def test_it_is_algorithm_2_of_the_paper() -> None:
    """Karras et al. 2022, alg. 2, with S_churn, N, S_tmin, S_tmax and S_noise, over a whole run in D(x; σ)."""
    sde, n, total, low, high, noise = EDMSDE(0.02, 80.0), 24, 6.0, 0.05, 50.0, 1.003
    denoiser = mixture(sde, (3, 4))
    levels = LogSNRGrid()(sde, n)
    x = y = 80 * Rng(0).normal((4, 3, 4), dtype=torch.float64)
    step = Churn(total / math.log(80.0 / 0.02), low, high, noise)
    rng, draws = Rng(1), Rng(1)
    for t, s in pairwise(levels):
        y = move(step, denoiser, y, t, s, rng)
        gamma = min(total / n, math.sqrt(2) - 1) if low <= t <= high else 0.0
        z, raised = noise * draws.normal_like(x), t + gamma * t
        x = x + (raised**2 - t**2).sqrt() * z
        slope = (x - denoiser(x, raised).x0) / raised
        guess = x + (s - raised) * slope
        x = x + (s - raised) * (0.5 * slope + 0.5 * (guess - denoiser(guess, s).x0) / s)
        torch.testing.assert_close(y, x, rtol=1e-8, atol=1e-8)


@each_sde
@pytest.mark.parametrize("event", EVENT_SHAPES[1:3], ids=str)
def test_every_sde_is_churned_in_scaled_coordinates(sde, event) -> None:
    """y = x/α gets √(ς̂² − ς²) z with ς̂ = (1 + γ) ς, at most that of t_max; then Heun. Times differ per sample."""
    denoiser, churn = CountingDenoiser(mixture(sde, event, covariance="isotropic")), 0.8
    t = times(sde, 3, ends=True)
    s = torch.cat([t[:1], t[:-1]])
    x, z = Rng(0).normal((5, *event), dtype=torch.float64), Rng(2).normal((5, *event), dtype=torch.float64)
    got = move(Churn(churn), denoiser, x, t, s, Rng(2))
    assert denoiser.evaluations == Churn().evaluations == 2
    for k in range(5):
        ratio, after, most = torch.exp(-0.5 * sde.log_snr(torch.stack([t[k], s[k], t[-1]]))).tolist()
        raised = min(ratio * (1 + min(churn * math.log(ratio / after), math.sqrt(2) - 1)), most)
        time = sde.time(torch.tensor(-2 * math.log(raised), dtype=torch.float64)).clamp(max=sde.t_max)
        y = x[k] / sde.marginal(t[k])[0] + math.sqrt(max(raised**2 - ratio**2, 0.0)) * z[k]
        want = move(Heun(), denoiser, (sde.marginal(time)[0] * y)[None], time, s[k])
        torch.testing.assert_close(got[k : k + 1], want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[0], x[0])  # s == t: nothing moves, and no noise is added
    torch.testing.assert_close(got[4:], move(Heun(), denoiser, x[4:], t[4], s[4]))  # nor at t_max


def test_noise_stays_between_its_bounds() -> None:
    sde = EDMSDE()
    denoiser, x = mixture(sde, (2,)), Rng(0).normal((5, 2), dtype=torch.float64)
    t = torch.tensor([0.04, 0.05, 1.0, 50.0, 51.0], dtype=torch.float64)
    moved = move(Churn(2.0, 0.05, 50.0), denoiser, x, t, 0.8 * t)
    plain = move(Heun(), denoiser, x, t, 0.8 * t)
    assert (moved == plain).all(1).tolist() == [True, False, False, False, True]
    torch.testing.assert_close(move(Churn(0.0), denoiser, x, t, 0.8 * t), plain, rtol=0, atol=0)


def recursion(step: Step, denoiser, times: Tensor) -> Tensor:
    """(a, b, c) of every step x_s = a x + b + c z (3, n), of a step that draws once, on one isotropic Gaussian."""
    n = len(times) - 1
    x = torch.arange(2, dtype=torch.float64).repeat_interleave(n)[:, None]
    t, s = times[:-1].repeat(2), times[1:].repeat(2)
    still, moved = (move(step, denoiser, x, t, s, Fixed(z)).reshape(2, n) for z in (0.0, 1.0))
    return torch.stack([still[1] - still[0], still[0], moved[0] - still[0]])


def spread(step: Step, denoiser, times: Tensor, m: float, v: float) -> tuple[float, float]:
    """Mean and variance after the steps of the grid, from m and v: exact, no Monte Carlo."""
    for a, b, c in recursion(step, denoiser, times).T.tolist():
        m, v = a * m + b, a * a * v + c * c
    return m, v


def gaussian(sde: SDE, var: float = 0.25) -> GaussianMixtureDenoiser:
    return GaussianMixtureDenoiser(torch.tensor([[1.5]]), var, torch.ones(1), sde)


@each_sde
@pytest.mark.parametrize("churn", [0.5, 1.0, 4.0])
def test_the_law_is_reached_at_the_order_of_the_step(sde, churn) -> None:
    """γ = churn · 3/n stays below its bound; the slope is p + O(h), h (1 + churn) below 0.15."""
    denoiser = gaussian(sde)
    first, last = grid(sde, 1).tolist()
    mean, var = (float(value) for value in marginal_moments(denoiser, last))
    for inner in (Heun(), DDIM()):
        step, errors = Churn(churn, step=inner), []
        for n in (100, 200):
            m, v = spread(step, denoiser, grid(sde, n), *(float(value) for value in marginal_moments(denoiser, first)))
            errors.append(abs(m - mean) + abs(v - var))
        assert step.order == inner.order
        assert math.log2(errors[0] / errors[1]) == pytest.approx(step.order, abs=0.1)


@each_sde
@pytest.mark.parametrize("churn", [1.0, 2.0])
def test_short_steps_are_the_reverse_sde_of_that_much_noise(sde, churn) -> None:
    """Data in one point: var x_s | x_t is σ_s² (1 − e^{−2η²h}), h = ½(λ_s − λ_t), η² = churn, to first order."""
    denoiser, errors = gaussian(sde, 0.0), []
    _, sigma = sde.marginal(sde.time(torch.tensor(1.0, dtype=torch.float64)))
    want = float(sigma**2) * -math.expm1(-2 * churn)
    for n in (100, 200):
        times = sde.time(torch.linspace(-1, 1, n + 1, dtype=torch.float64))
        errors.append(spread(Churn(churn), denoiser, times, 0.0, 0.0)[1] / want - 1)
    assert abs(errors[1]) < 0.02
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.1)


@each_sde
def test_errors_made_before_are_forgotten(sde) -> None:
    """Twice the right variance at λ = −3: the ODE keeps the factor, churn 2 forgets it.

    The data are nearly a point, so what is left of a difference in ε is e^{−η²h} = e^{−6}, of its square e^{−12}.
    """
    denoiser = gaussian(sde, 1e-4)
    first, last = grid(sde, 1).tolist()
    mean, var = (float(value) for value in marginal_moments(denoiser, first))
    right = float(marginal_moments(denoiser, last)[1])
    plain, churned = (
        spread(step, denoiser, grid(sde, 200), mean, 2 * var)[1] / right - 1 for step in (Heun(), Churn(2.0))
    )
    assert plain == pytest.approx(1, abs=0.01)
    assert abs(churned) < 1e-4


def test_samples_depend_on_their_seeds_only_and_the_noise_scale_widens() -> None:
    denoiser = gaussian(EDMSDE())
    sampler = Sampler(Churn(), LogSNRGrid(), steps=16)
    pair = sampler(denoiser, torch.ones(2, 1, dtype=torch.float64), rng=Rng(seeds=[3, 5]))
    alone = sampler(denoiser, torch.ones(1, 1, dtype=torch.float64), rng=Rng(seeds=[5]))
    torch.testing.assert_close(pair[1:], alone)
    assert sampler.evaluations == 33
    t, s = torch.tensor([1.0, 0.7], dtype=torch.float64)
    ratio = recursion(Churn(noise=1.1), denoiser, torch.stack([t, s])) / recursion(
        Churn(), denoiser, torch.stack([t, s])
    )
    torch.testing.assert_close(ratio[:, 0], torch.tensor([1.0, 1.0, 1.1], dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"churn": -1.0}, "rate of noise"),
        ({"churn": math.nan}, "rate of noise"),
        ({"low": -0.1}, "0 ≤ low < high"),
        ({"low": 2.0, "high": 1.0}, "0 ≤ low < high"),
        ({"noise": 0.0}, "standard deviation"),
    ],
)
def test_bad_arguments_are_refused_at_construction(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        Churn(**arguments)
