"""`ode_bound` against exact probabilities of integers, and what the cut-off hides."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from scoresde import (
    DDPM,
    VESDE,
    VPSDE,
    Exact,
    GaussianMixtureDenoiser,
    Hutchinson,
    Rng,
    Tolerance,
    UniformGrid,
    elbo,
    log_likelihood,
    ode_bound,
    vlb,
)
from scoresde.codecs import Scaling
from scoresde.likelihood.budget import Budget
from scoresde.likelihood.terms import hidden_bits

POINTS, DRAWS = 48, 16
MEANS = torch.tensor([[-0.5, 0.2, 0.0], [0.3, -0.4, 0.1], [0.5, 0.5, -0.3]], dtype=torch.float64)
STDS = torch.tensor([[0.1, 0.2, 0.15], [0.15, 0.1, 0.2], [0.12, 0.12, 0.1]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def bits(nats: Tensor) -> float:
    return float(nats.mean()) / (MEANS.shape[1] * math.log(2))


def probability(raw: Tensor, scaling: Scaling) -> Tensor:
    """log P of the integers of the mixture (B,), exact: differences of normal distribution functions."""
    width = 2 / scaling.levels
    low = -1 + raw.double() * width
    edges = torch.stack([low.masked_fill(raw == 0, -math.inf), (low + width).masked_fill(low + width > 0.99, math.inf)])
    below, above = torch.special.ndtr((edges[:, :, None] - MEANS) / STDS)
    return ((above - below).log().sum(2) + WEIGHTS.log()).logsumexp(1)


def quantised(scaling: Scaling, sde) -> tuple[GaussianMixtureDenoiser, Tensor, Tensor]:
    """The mixture's denoiser, draws of its integers, and log P of each."""
    denoiser = GaussianMixtureDenoiser(MEANS, STDS**2, WEIGHTS, sde)
    raw = scaling.decode(denoiser.sample(POINTS, rng=Rng(0), dtype=torch.float64))
    return denoiser, raw, probability(raw, scaling)


@pytest.mark.parametrize(
    ("levels", "t_min", "solver", "divergence"),
    [
        (32, 1e-5, Budget(40), Exact()),  # σ/α = 0.001
        (256, 1e-5, Tolerance(1e-3, 1e-3), Exact()),
        (32, 1.1e-3, Tolerance(1e-3, 1e-3), Exact()),
        (256, 1.1e-3, Budget(40), Exact()),  # σ/α = 0.0145, as of a DDPM table
        (256, 1.1e-3, Budget(40), Hutchinson()),
    ],
    ids=["coarse", "fine", "coarse-ddpm", "ddpm", "probe"],
)
def test_the_bound_of_a_quantised_mixture_is_below_the_truth_and_tight(levels, t_min, solver, divergence) -> None:
    """No integer beats its probability by more than 4 of its stderr, nor does their mean, and 0.01 bits/dim are lost at
    most. Lost is KL(q ‖ p)/16 of 16 weighted draws, and without weights (probes) all of it: ½ Σ over dimensions of
    Δ²/12s² + ς²/s² to leading order, 0.02 bits/dim at bins of Δ = 1/16 and deviations of s = 0.1, 0.008 at 1/128.
    """
    scaling = Scaling(levels=levels)
    denoiser, raw, truth = quantised(scaling, VPSDE())
    bound = ode_bound(
        denoiser, raw, solver, scaling=scaling, samples=DRAWS, divergence=divergence, t_min=t_min, rng=Rng(1)
    )
    assert bound.name == "bpd/ode-bound" and bound.stderr.shape == (POINTS,)
    gap, error = truth - bound.log_prob, float(bound.stderr.square().mean().sqrt()) / math.sqrt(POINTS)
    assert bool((gap > -4 * bound.stderr).all())
    assert -4 * error < float(gap.mean()) and bits(gap) < 0.01 + 4 * error / (3 * math.log(2))


def test_integers_that_are_points_are_bounded_by_their_centres() -> None:
    """Four levels of known frequency, exact denoiser of point masses: nothing is lost, and `elbo` says the same."""
    scaling = Scaling(-1.0, 1.0, levels=4)
    frequency = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    raw = torch.arange(4, dtype=torch.uint8)[:, None]
    denoiser = GaussianMixtureDenoiser(scaling.encode(raw).double(), 0.0, frequency, VESDE(0.01, 50.0))
    bound = ode_bound(
        denoiser, raw, Tolerance(1e-5, 1e-5), scaling=scaling, samples=2, dequantised=False, divergence=Exact()
    )
    torch.testing.assert_close(bound.log_prob, frequency.log(), rtol=0, atol=1e-3)
    below = elbo(denoiser, raw, samples=1000, scaling=scaling, rng=Rng(0))
    assert bool(((below.log_prob - bound.log_prob).abs() < 4 * below.stderr + 1e-3).all())


def test_the_bound_agrees_with_elbo_where_the_noise_is_wide() -> None:
    """σ/α = 0.0145 beside bins of 2/256: the two decode alike, and differ by the draws."""
    scaling = Scaling(levels=256)
    denoiser, raw, _ = quantised(scaling, VPSDE())
    bound = ode_bound(
        denoiser, raw, Budget(40), scaling=scaling, samples=8, dequantised=False, divergence=Exact(), t_min=1.1e-3
    )
    below = elbo(denoiser, raw, samples=400, scaling=scaling, t_min=1.1e-3)
    error = float(torch.hypot(bound.stderr, below.stderr).square().mean().sqrt()) / math.sqrt(POINTS)
    assert abs(float((bound.log_prob - below.log_prob).mean())) < 4 * error < 0.3


@pytest.mark.parametrize("variance", [None, 1.0])
def test_every_bound_of_a_table_is_below_the_next_and_the_truth(variance) -> None:
    """bits/dim: vlb ≥ elbo ≥ ODE bound ≥ truth, of exact scores of a quantised mixture under a table of 16 steps."""
    scaling, sde = Scaling(levels=32), DDPM(steps=16, beta_start=1e-3, beta_end=0.7)
    denoiser, raw, truth = quantised(scaling, sde)
    how = {"scaling": scaling, "rng": Rng(0)}
    chain = vlb(denoiser, raw, steps=15, grid=UniformGrid(), samples=20, variance=variance, **how)
    below = elbo(denoiser, raw, samples=200, **how)
    flow = ode_bound(denoiser, raw, Budget(40), samples=DRAWS, divergence=Exact(), dequantised=False, **how)
    order = [chain, below, flow]
    for worse, better in pairwise(order):
        error = float(torch.hypot(worse.stderr, better.stderr).square().mean().sqrt()) / math.sqrt(POINTS)
        assert float((better.log_prob - worse.log_prob).mean()) > -4 * error
    error = float(flow.stderr.square().mean().sqrt()) / math.sqrt(POINTS)
    assert float((truth - flow.log_prob).mean()) > -4 * error
    # 16 steps cost something: the order of the first two is not one of errors
    spread = float(torch.hypot(chain.stderr, below.stderr).square().mean().sqrt()) / math.sqrt(POINTS)
    assert float((below.log_prob - chain.log_prob).mean()) > 4 * spread


def test_what_the_cut_off_hides_is_said() -> None:
    """A value that is always the same: uniform in its bin, smoothed by ς; with ς ≫ Δ log₂(ς √(2π)/Δ) is hidden."""
    scaling = Scaling(levels=256)
    bins = scaling.bins(torch.arange(256)[:, None])
    assert hidden_bits(VESDE(0.5, 50.0), bins) == pytest.approx(math.log2(0.5 * math.sqrt(2 * math.pi) * 128), 1e-3)
    assert hidden_bits(VESDE(1e-5, 50.0), bins) < 2e-3 and hidden_bits(VESDE(0.5, 50.0), None) == 0
    denoiser, raw, _ = quantised(scaling, VPSDE())
    with pytest.warns(UserWarning, match=r"hides up to 1\.9 bits/dim of these integers.*ode_bound"):
        log_likelihood(denoiser, raw[:2], Budget(8), scaling=scaling, t_min=1.1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_likelihood(denoiser, raw[:2] // 32, Budget(8), scaling=Scaling(levels=8), t_min=1e-5)
        log_likelihood(denoiser, denoiser.sample(2, rng=Rng(0)), Budget(8), t_min=1.1e-3)


def test_one_draw_has_no_error_bar_and_data_without_levels_no_bound() -> None:
    scaling = Scaling(levels=32)
    denoiser, raw, _ = quantised(scaling, VPSDE())
    assert bool(ode_bound(denoiser, raw[:3], Budget(20), scaling=scaling).stderr.isnan().all())
    with pytest.raises(ValueError, match=r"ode_bound bounds the probability of integers.*levels"):
        ode_bound(denoiser, raw[:3].float(), Budget(20), scaling=Scaling.identity())
