"""Fitted samplers on noise they never saw: never worse than the generic one, budgets kept, wrong ones refused."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import ring
from tiny_training import trained_on_a_ring
from torch import Tensor, nn

from scoresde import (
    EDM,
    EDMSDE,
    VESDE,
    VPSDE,
    AdaptiveODE,
    Denoiser,
    Eps,
    FittedSampler,
    Preconditioned,
    Rng,
    Sampler,
    SolverError,
    default_sampler,
    fit_sampler,
)
from scoresde.diffusion.denoiser import CountingDenoiser
from scoresde.sampling.fitted import FittedStep

each_sde = pytest.mark.parametrize("sde", [VPSDE(), VESDE(), EDMSDE()], ids=["vp", "ve", "edm"])


def gains(denoiser: Denoiser, fitted: FittedSampler, cond: Tensor | None = None) -> Tensor:
    """How much nearer than the generic sampler's each of 200 ends is to that of an adaptive solve to 1e-7."""
    x = denoiser.prior_sample((200, 2), rng=Rng(99), dtype=torch.float64)
    t, s = torch.tensor([denoiser.sde.t_max, denoiser.sde.t_min], dtype=torch.float64)
    cond = None if cond is None else cond.expand(200)
    with torch.no_grad():
        exact = AdaptiveODE(1e-7, 1e-7).move(denoiser, x, t, s, cond=cond)
    ours, usual = (
        (sampler(denoiser, x, cond=cond) - exact).square().mean(1).sqrt()
        for sampler in (fitted.sampler, default_sampler(denoiser, fitted.budget))
    )
    return usual - ours


def not_worse(gain: Tensor) -> bool:
    """The mean gain is above −4 of its standard errors: a sampler that is as good falls below once in 30,000."""
    return float(gain.mean()) > -4 * float(gain.std()) / math.sqrt(len(gain))


@each_sde
@pytest.mark.parametrize("budget", [3, 8])
def test_on_exact_scores_it_halves_the_error(sde, budget) -> None:
    """Measured: 0.08 to 0.35 of the generic error over these six."""
    denoiser = ring(sde)
    fitted = fit_sampler(denoiser, budget=budget, shape=(2,), samples=256, rng=Rng(1))
    assert fitted.is_fitted and fitted.error < 0.5 * fitted.generic
    assert not_worse(gains(denoiser, fitted))


@pytest.mark.parametrize("budget", [1, 5, 12])
def test_on_a_trained_network_it_is_never_worse(budget) -> None:
    denoiser = trained_on_a_ring()
    fitted = fit_sampler(denoiser, budget=budget, shape=(2,), samples=128, rng=Rng(1))
    assert not_worse(gains(denoiser, fitted))
    assert fitted.is_fitted == (fitted.error < fitted.generic)


def test_where_nothing_is_to_be_gained_it_is_the_generic_one() -> None:
    """A zero network under EDM is the exact denoiser of a Gaussian, on which the generic one is exact."""

    class Zero(nn.Module):
        def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
            return torch.zeros_like(x)

    denoiser = Preconditioned(Zero(), VPSDE(), EDM(sigma_data=0.7), sigma_data=0.7)
    denoiser.roughness = 0.0
    fitted = fit_sampler(denoiser, budget=4, shape=(2,), samples=64)
    assert not fitted.is_fitted and fitted.error == fitted.generic
    assert type(fitted.sampler.step) is type(default_sampler(denoiser, 4).step)


@each_sde
@pytest.mark.parametrize("budget", [1, 2, 7])
def test_a_budget_is_spent_exactly(sde, budget) -> None:
    fitted = fit_sampler(ring(sde), budget=budget, shape=(2,), samples=32, calls=100)
    counted = CountingDenoiser(ring(sde))
    assert fitted.sampler(counted, (4, 2), rng=Rng(0)).shape == (4, 2)
    assert counted.evaluations == budget == fitted.budget == fitted.sampler.evaluations


def test_the_calls_are_counted_and_about_what_was_allowed() -> None:
    """The four fine solves take 160 each; of the search no iteration begins that the rest does not allow."""
    counted = CountingDenoiser(ring(VPSDE()))
    fitted = fit_sampler(counted, budget=5, shape=(2,), samples=32, calls=600)
    assert counted.evaluations == fitted.calls
    assert 640 < fitted.calls < 1.2 * (640 + 600)


def test_it_is_the_same_each_time_and_in_every_mode() -> None:
    first = fit_sampler(ring(VPSDE()), budget=4, shape=(2,), samples=32, calls=200, rng=Rng(3))
    with torch.inference_mode():
        second = fit_sampler(ring(VPSDE()), budget=4, shape=(2,), samples=32, calls=200, rng=Rng(3))
    assert first.error == second.error and first.is_fitted
    assert first.sampler.step.rows == second.sampler.step.rows  # type: ignore[attr-defined]


def test_a_network_that_returns_nan_is_refused() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
            return x * math.nan

    denoiser = Preconditioned(Broken(), VPSDE(), Eps())
    with pytest.raises(SolverError, match=r"fine solve that a fit starts with is not finite.*network"):
        fit_sampler(denoiser, budget=5, shape=(2,), samples=16)


@pytest.mark.parametrize("budget", [0, -1, 2.5, True, None])
def test_a_budget_is_a_number_of_calls(budget) -> None:
    with pytest.raises(ValueError, match="budget"):
        fit_sampler(ring(VPSDE()), budget=budget, shape=(2,))


@pytest.mark.parametrize("wrong", [{"samples": 4}, {"samples": 8.5}, {"calls": 0}])
def test_too_few_samples_or_calls_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is a whole number"):
        fit_sampler(ring(VPSDE()), budget=3, shape=(2,), **wrong)


def test_fitted_weights_belong_to_their_times() -> None:
    """On the fitted grid they are used as they stand: two steps worked out by hand. On any other they are refused."""
    sde = VPSDE()
    denoiser = ring(sde)
    ends = sde.log_snr(torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)).tolist()
    step = FittedStep([ends[0], 0.5, ends[1]], [[0.3], [0.2, -0.1]], 1.0)
    x = torch.tensor([[0.7, -1.2]], dtype=torch.float64)
    w, values = x, []  # for VP and c = 1 the norm is √½ at every time
    for t, row in zip(step.grid(sde, 2), step.rows, strict=False):
        alpha, sigma = sde.marginal(t)
        found = denoiser(w, t)
        values = [(0.5 * sigma * found.x0 - 0.5 * alpha * found.eps) / math.sqrt(0.5), *values]
        w = w + math.sqrt(0.5) * sum(b * v for b, v in zip(row, values, strict=True))
    torch.testing.assert_close(Sampler(step, denoise=False)(denoiser, x), w)  # two steps, on its own grid
    for steps in (1, 3):
        with pytest.raises(ValueError, match=r"fitted to the log-SNR .*on its own grid"):
            Sampler(step, step.grid, steps)(denoiser, x)


@pytest.mark.parametrize("rows", [[], [[1.0]], [[1.0, 2.0], [1.0]], [[1.0], []], [[1.0], [math.nan]]])
def test_rows_that_fit_no_times_are_refused(rows) -> None:
    with pytest.raises(ValueError, match="Fitted weights are"):
        FittedStep([-1.0, 0.0, 1.0], rows, 1.0)
