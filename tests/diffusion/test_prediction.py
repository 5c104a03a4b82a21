"""Prediction: score and velocity of the pair, and the two affine moves that keep x_t = α x̂_0 + σ ε̂."""

from __future__ import annotations

import pytest
import torch
from oracles import EVENT_SHAPES, all_sdes, mixture, times

from scoresde import VPSDE, GaussianMixtureDenoiser, Prediction

ALL = all_sdes()
each_sde = pytest.mark.parametrize("sde", ALL.values(), ids=ALL.keys())
each_event = pytest.mark.parametrize("event", EVENT_SHAPES, ids=str)


def random_pair(sde, event, seed=0) -> tuple[torch.Tensor, torch.Tensor, Prediction]:
    """(x, t, a prediction at x that knows nothing): any x̂_0, with the ε̂ the invariant asks for."""
    generator = torch.Generator().manual_seed(seed)
    x, x0 = torch.randn(2, 5, *event, generator=generator, dtype=torch.float64)
    t = times(sde, 5)
    scales = sde.at(t, x)
    return x, t, Prediction(x0, (x - scales.alpha * x0) / scales.sigma, scales)


def assert_invariant(x: torch.Tensor, p: Prediction) -> None:
    size = (p.scales.alpha * p.x0).abs() + (p.scales.sigma * p.eps).abs()
    error = (p.scales.alpha * p.x0 + p.scales.sigma * p.eps - x).abs()
    assert bool((error <= 1e-14 * (size + x.abs())).all())


@each_sde
@each_event
def test_velocity_is_the_probability_flow(sde, event) -> None:
    """α̇ x̂_0 + σ̇ ε̂ = f x − ½ g² s (Song et al. 2021, eq. 13), for any pair with the invariant."""
    x, t, p = random_pair(sde, event)
    shape = (-1, *[1] * len(event))
    f, g = sde.drift(t).reshape(shape), sde.diffusion(t).reshape(shape)
    assert p.velocity.shape == p.score.shape == x.shape
    size = (f * x).abs() + (0.5 * g**2 * p.score).abs()
    error = (p.velocity - (f * x - 0.5 * g**2 * p.score)).abs()
    assert bool((error <= 1e-11 * size + 1e-11).all())


@each_sde
@each_event
def test_blend_is_affine_and_keeps_the_invariant(sde, event) -> None:
    x, _, a = random_pair(sde, event)
    b = random_pair(sde, event, seed=1)[2]
    b = Prediction(b.x0, (x - a.scales.alpha * b.x0) / a.scales.sigma, a.scales)
    for weight in (-0.5, 0.0, 0.3, 1.0, 7.5):
        mixed = a.blend(b, weight)
        torch.testing.assert_close(mixed.x0, (1 - weight) * a.x0 + weight * b.x0, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mixed.score, (1 - weight) * a.score + weight * b.score, rtol=1e-9, atol=1e-9)
        assert_invariant(x, mixed)
    per_sample = torch.tensor([0.0, 1.0, 2.0, 3.0, -1.0], dtype=torch.float64)
    mixed = a.blend(b, per_sample)
    for k, weight in enumerate(per_sample.tolist()):
        torch.testing.assert_close(mixed.x0[k], a.blend(b, weight).x0[k], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mixed.eps[k], a.blend(b, weight).eps[k], rtol=1e-12, atol=1e-12)


def test_a_weight_per_sample_is_never_spread_over_the_event() -> None:
    """(B,) weights against (B, B) samples would broadcast over the wrong axis without a word."""
    sde = VPSDE()
    x, t = torch.randn(2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor(0.5)
    a, b = mixture(sde, (2,))(x, t), mixture(sde, (2,), seed=1)(x, t)
    mixed = a.blend(b, torch.tensor([0.0, 1.0]))
    assert torch.equal(mixed.x0[0], a.x0[0])
    torch.testing.assert_close(mixed.x0[1], b.x0[1])
    with pytest.raises(ValueError, match="one value per sample"):
        a.blend(b, torch.ones(3))


@each_sde
@each_event
def test_shift_moves_the_score_by_what_is_added(sde, event) -> None:
    x, _, p = random_pair(sde, event)
    delta = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    moved = p.shift(delta)
    torch.testing.assert_close(moved.score, p.score + delta, rtol=1e-9, atol=1e-9)
    assert_invariant(x, moved)
    still = p.shift(torch.zeros_like(x))
    assert torch.equal(still.x0, p.x0) and torch.equal(still.eps, p.eps)


@each_sde
def test_shift_is_bayes_rule(sde) -> None:
    """Gaussian data, y = x_0 + noise: shifting the prior's denoiser by ∇ log p(y|x_t) gives the posterior's denoiser.

    With P = Var(x_0|x_t) = vσ²/(α²v + σ²): p(y|x_t) = N(x̂_0, P + r), and dx̂_0/dx_t = αv/(α²v + σ²). The posterior of
    the data is N(v'(m/v + y/r), v'), v' = 1/(1/v + 1/r).
    """
    m, v, r, y = 0.7, 1.3, 0.4, -0.9
    weights = torch.ones(1)
    prior = GaussianMixtureDenoiser(torch.full((1, 2), m, dtype=torch.float64), v, weights, sde)
    v_post = 1 / (1 / v + 1 / r)
    mean_post = torch.full((1, 2), v_post * (m / v + y / r), dtype=torch.float64)
    posterior = GaussianMixtureDenoiser(mean_post, v_post, weights, sde)
    t = times(sde, 9)
    alpha, sigma = (value[:, None] for value in sde.marginal(t))
    total = alpha**2 * v + sigma**2
    x = alpha * m + total.sqrt() * torch.randn(9, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    p = prior(x, t)
    delta = alpha * v / total * (y - p.x0) / (v * sigma**2 / total + r)
    got, want = p.shift(delta), posterior(x, t)
    torch.testing.assert_close(got.x0, want.x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.eps, want.eps, rtol=1e-9, atol=1e-9)


def test_predictions_cannot_be_edited() -> None:
    p = random_pair(VPSDE(), (2,))[2]
    with pytest.raises(AttributeError):
        p.x0 = p.eps
