"""The `order` a step declares is the rate at which it converges, measured by step doubling on exact densities.

Grids are equal steps in log-SNR over λ ∈ [−3, 3], where the density turns from one Gaussian into its mixture and every
coefficient is smooth, so the error is C h^p (1 + c h) and the measured slope is p + O(h): within 0.1 from 100 steps on.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from oracles import Fixed, all_sdes, closed_form_sdes, grid, marginal_moments, mixture, slope, start
from torch import Tensor

from scoresde import (
    DDIM,
    SDE,
    AdaptiveODE,
    Ancestral,
    Denoiser,
    EulerMaruyama,
    GaussianMixtureDenoiser,
    Heun,
    ReverseDiffusion,
    Rng,
    Step,
)
from scoresde.diffusion.denoiser import CountingDenoiser, DenoiserWrapper
from scoresde.diffusion.prediction import Prediction

ALL = all_sdes()
each_sde = pytest.mark.parametrize("sde", ALL.values(), ids=ALL.keys())
SMOOTH = closed_form_sdes()  # Euler–Maruyama reads f and g, which jump in a table

DETERMINISTIC = {
    "euler": EulerMaruyama(probability_flow=True),
    "reverse-diffusion": ReverseDiffusion(probability_flow=True),
    "ddim": DDIM(0.0),
    "heun": Heun(),
}
STOCHASTIC = {
    "euler-maruyama": EulerMaruyama(),
    "reverse-diffusion": ReverseDiffusion(),
    "ancestral": Ancestral(),
    "ancestral-wide": Ancestral(1.0),
    "ddim-half": DDIM(0.5),
    "ddim-1": DDIM(1.0),
}
COUNTS = (100, 200)


def pairs(steps: dict[str, Step]) -> list:
    """Every step on every SDE it is smooth on."""
    return [
        pytest.param(step, sde, id=f"{label}-{name}")
        for label, step in steps.items()
        for name, sde in (SMOOTH if isinstance(step, EulerMaruyama) else ALL).items()
    ]


@cache
def solved(sde: SDE) -> tuple[GaussianMixtureDenoiser, Tensor, Tensor]:
    """A mixture of full covariances, draws of x at λ = −3, and where the probability-flow ODE takes them."""
    denoiser, (first, last) = mixture(sde, (2,), seed=1), grid(sde, 1)
    x = start(denoiser, first)
    return denoiser, x, AdaptiveODE(1e-10, 1e-10, backend="native").move(denoiser, x, first, last)


@pytest.mark.parametrize(("step", "sde"), pairs(DETERMINISTIC))
def test_ode_steps_converge_at_their_order(step, sde) -> None:
    """RMS distance to the probability-flow ODE solved to 1e-10, on a mixture of full covariances.

    The finest Heun error is above 1e-6, so the reference's own error moves a slope by less than 1e-3.
    """
    denoiser, x, exact = solved(sde)
    errors = []
    for n in COUNTS:
        y = x
        for t, s in pairwise(grid(sde, n)):
            y, _ = step(denoiser, y, t, s, None, cond=None, rng=Rng(0))
        errors.append(float((y - exact).square().mean().sqrt()))
    assert errors[-1] > 1e-6
    assert slope(errors) == pytest.approx(step.order, abs=0.1)


def recursion(step: Step, denoiser: Denoiser, times: Tensor) -> Tensor:
    """(a, b, c) of every step x_s = a x + b + c z (3, n): what a step is on one isotropic Gaussian.

    Read from the step itself at x = 0, 1, 2 and z = 0, 1, 2, which also shows that it is affine; all steps of the grid
    are one batch, each sample with its own times.
    """
    t, s = times[:-1].repeat(3), times[1:].repeat(3)
    x = torch.arange(3, dtype=torch.float64).repeat_interleave(len(times) - 1)[:, None]
    still, moved, twice = (
        step(denoiser, x, t, s, None, cond=None, rng=Fixed(z))[0].reshape(3, -1) for z in (0.0, 1.0, 2.0)
    )
    b, a, c = still[0], still[1] - still[0], moved[0] - still[0]
    torch.testing.assert_close(still[2], 2 * a + b, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(twice[2], 2 * a + b + 2 * c, rtol=1e-9, atol=1e-9)
    return torch.stack([a, b, c])


def gaussian(sde: SDE) -> GaussianMixtureDenoiser:
    return GaussianMixtureDenoiser(torch.tensor([[1.5]]), 0.25, torch.ones(1), sde)


@pytest.mark.parametrize(("step", "sde"), pairs(STOCHASTIC))
def test_stochastic_steps_converge_weakly_at_their_order(step, sde) -> None:
    """On a Gaussian m ← a m + b and v ← a² v + c² are exact, and mean and variance are all there is: no Monte Carlo."""
    assert rate(step, gaussian(sde), sde) == pytest.approx(step.order, abs=0.1)


class Learned(DenoiserWrapper):
    """Says 0.3 for the share of the variance."""

    def forward(self, x: Tensor, t: Tensor, cond=None) -> Prediction:
        return replace(self.denoiser(x, t, cond), share=torch.full_like(x, 0.3))


@pytest.mark.parametrize("sde", ALL.values(), ids=ALL.keys())
def test_a_learned_variance_costs_one_call_and_keeps_the_order(sde) -> None:
    step, counted = Ancestral(), CountingDenoiser(gaussian(sde))
    assert rate(step, Learned(counted), sde) == pytest.approx(step.order, abs=0.1)
    assert counted.evaluations == 3 * len(COUNTS)  # all steps of a grid are one batch, asked three times
    fixed = rate(Ancestral(0.3), gaussian(sde), sde)
    assert rate(step, Learned(gaussian(sde)), sde) == pytest.approx(fixed, rel=1e-6)


def rate(step: Step, denoiser: Denoiser, sde: SDE) -> float:
    first, last = grid(sde, 1).tolist()
    errors = []
    for n in COUNTS:
        m, v = (float(value) for value in marginal_moments(gaussian(sde), first))
        for a, b, c in recursion(step, denoiser, grid(sde, n)).T.tolist():
            m, v = a * m + b, a * a * v + c * c
        mean, var = (float(value) for value in marginal_moments(gaussian(sde), last))
        errors.append(abs(m - mean) + abs(v - var))
    return slope(errors)


@pytest.mark.parametrize("name", SMOOTH)
def test_euler_maruyama_converges_strongly_at_order_one(name) -> None:
    """Path by path, on one Brownian motion: the RMS distance of n steps to 2n steps halves as n doubles.

    The end point is affine in x_T and in the increments. One of variance Δ is the sum of its two halves, so its unit
    normal is Σ √(δ_j/Δ) ξ_j, and the mean square of the distance is the sum of squared coefficients.
    """
    sde = SMOOTH[name]
    step, denoiser = EulerMaruyama(), gaussian(sde)
    m, v = (float(value) for value in marginal_moments(denoiser, float(grid(sde, 1)[0])))

    def end(n: int) -> tuple[Tensor, Tensor]:
        """Mean (), and coefficients of x_T's own spread and of each unit normal (1 + n,)."""
        a, b, c = recursion(step, denoiser, grid(sde, n))
        after = torch.cat([a.flip(0).cumprod(0).flip(0), torch.ones(1, dtype=torch.float64)])  # ∏ of later a
        return after[0] * m + (after[1:] * b).sum(), torch.cat([after[:1] * math.sqrt(v), after[1:] * c])

    errors = []
    for n in COUNTS:
        (mean, parts), (fine_mean, fine) = end(n), end(2 * n)
        width = -grid(sde, 2 * n).diff()
        share = (width / (width[::2] + width[1::2]).repeat_interleave(2)).sqrt()
        split = torch.cat([parts[:1], parts[1:].repeat_interleave(2) * share])
        errors.append(float(((mean - fine_mean) ** 2 + (split - fine).square().sum()).sqrt()))
    assert slope(errors) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("backend", ["native", "torchdiffeq"])
@pytest.mark.parametrize("name", ["ve", "flow"])
def test_adaptive_solvers_converge_at_their_order(name, backend) -> None:
    """The error falls with the tolerance, at the price of tolerance^{−1/5} evaluations.

    Evaluations are A + B tolerance^{−1/5} with A, the start-up, below a sixth of those at 1e-9, so the order is
    overestimated by less than 15 %. The error per step is kept between a tenth of its tolerance and all of it.
    """
    sde = SMOOTH[name]
    denoiser = mixture(sde, (2,), seed=1)
    t, s = grid(sde, 1)
    x = start(denoiser, t, 8)
    exact = AdaptiveODE(1e-13, 1e-13, backend="native").move(denoiser, x, t, s)
    tolerances, errors, calls = (1e-9, 1e-11), [], []
    for tolerance in tolerances:
        step, counted = AdaptiveODE(tolerance, tolerance, backend=backend), CountingDenoiser(denoiser)
        y, _ = step(counted, x, t, s, None, cond=None, rng=Rng(0))
        errors.append(float((y - exact).square().mean().sqrt()))
        calls.append(counted.evaluations)
    gain = math.log(tolerances[0] / tolerances[1])
    assert gain / math.log(calls[1] / calls[0]) == pytest.approx(step.order, rel=0.15)
    assert math.log(errors[0] / errors[1]) == pytest.approx(gain, abs=math.log(10))
