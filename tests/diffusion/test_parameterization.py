"""Each row (p, q) of the table: inverted exactly, for every SDE, time and precision; equal to its paper's formulas."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from oracles import EVENT_SHAPES, all_sdes, times

from scoresde import (
    EDM,
    EDMSDE,
    VPSDE,
    X0,
    Eps,
    GaussianMixtureDenoiser,
    Preconditioned,
    Score,
    V,
    Velocity,
)

ALL = all_sdes()
ROWS = {"eps": Eps(), "x0": X0(), "v": V(), "velocity": Velocity(), "score": Score(), "edm": EDM(0.5)}
each_sde = pytest.mark.parametrize("sde", ALL.values(), ids=ALL.keys())
each_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())


def pair(event=(3,), n=15, dtype=torch.float64):
    return torch.randn(2, n, *event, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@each_row
@each_sde
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_prediction_inverts_target(sde, row, dtype) -> None:
    """(x_0, ε) → F* → (x_0, ε), at t_min and t_max too.

    The inverse adds two products; each carries a few roundings, so the error is at most 16 ε of the sum of their
    magnitudes. (That is the conditioning: x_0 from ε is lost where σ ≫ α, in any implementation.)
    """
    t = times(sde, 13, ends=True)
    x0, eps = pair(dtype=dtype)
    scales = sde.at(t, x0)
    x = scales.alpha * x0 + scales.sigma * eps
    output = row.target(x0, eps, scales)
    assert output.shape == x0.shape and output.dtype == dtype
    got = row.prediction(output, x, scales)
    p, q = row.coefficients(scales)
    det = scales.alpha * q - scales.sigma * p
    unit = 16 * torch.finfo(dtype).eps
    # x and F* are themselves rounded: their magnitude is that of their summands
    size_x = scales.alpha * x0.abs() + scales.sigma * eps.abs()
    size_f = (p * x0).abs() + (q * eps).abs()
    assert bool(((got.x0 - x0).abs() <= unit * ((q / det).abs() * size_x + (scales.sigma / det).abs() * size_f)).all())
    assert bool(
        ((got.eps - eps).abs() <= unit * ((scales.alpha / det).abs() * size_f + (p / det).abs() * size_x)).all()
    )
    size = scales.alpha * got.x0.abs() + scales.sigma * got.eps.abs()
    assert bool(((scales.alpha * got.x0 + scales.sigma * got.eps - x).abs() <= unit * size).all())


@pytest.mark.parametrize("row", [V(), EDM(1.0), Velocity()], ids=["v", "edm", "velocity"])
@pytest.mark.parametrize("name", ["vp", "cosine", "ddpm", "flow"])
def test_rows_that_are_never_singular_lose_nothing(name, row) -> None:
    """Where α² + σ² stays near 1 both end points come back in float32 to 1e-5 at every time, ends included."""
    sde = ALL[name]
    t = times(sde, 13, ends=True)
    x0, eps = pair(dtype=torch.float32)
    scales = sde.at(t, x0)
    got = row.prediction(row.target(x0, eps, scales), scales.alpha * x0 + scales.sigma * eps, scales)
    torch.testing.assert_close(got.x0, x0, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.eps, eps, rtol=0, atol=1e-5)


@each_sde
def test_every_pair_of_rows_converts(sde) -> None:
    """An output under one row, read as a Prediction and written under another, is that row's target."""
    t = times(sde, 15)
    x0, eps = pair()
    scales = sde.at(t, x0)
    x = scales.alpha * x0 + scales.sigma * eps
    for source, target in itertools.product(ROWS.values(), repeat=2):
        prediction = source.prediction(source.target(x0, eps, scales), x, scales)
        got, want = target.target(prediction.x0, prediction.eps, scales), target.target(x0, eps, scales)
        # inner times only: σ/α and α/σ stay below 1e5, so 1e-16 of either end point is below 1e-9 of the other
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


@each_sde
@pytest.mark.parametrize("event", EVENT_SHAPES, ids=str)
def test_rows_read_what_they_are_named_after(sde, event) -> None:
    output, x = pair(event, n=4)
    scales = sde.at(times(sde, 4), x)
    assert torch.equal(Eps().prediction(output, x, scales).eps, output)
    assert torch.equal(X0().prediction(output, x, scales).x0, output)
    torch.testing.assert_close(Score().prediction(output, x, scales).score, output, rtol=1e-12, atol=0)
    velocity = Velocity().prediction(output, x, scales)
    torch.testing.assert_close(velocity.velocity, output, rtol=1e-9, atol=1e-9)
    for row in ROWS.values():
        got = row.prediction(output, x, scales)
        assert got.x0.shape == got.eps.shape == x.shape
        torch.testing.assert_close(scales.alpha * got.x0 + scales.sigma * got.eps, x, rtol=1e-8, atol=1e-8)


def test_v_is_salimans_and_ho() -> None:
    """Variance preserving: x_0 = α x − σ v (Salimans & Ho 2022, eq. in App. D)."""
    sde = VPSDE()
    v, x = pair(n=9)
    scales = sde.at(times(sde, 9), x)
    got = V().prediction(v, x, scales)
    torch.testing.assert_close(got.x0, scales.alpha * x - scales.sigma * v, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.eps, scales.sigma * x + scales.alpha * v, rtol=1e-12, atol=1e-12)


@each_sde
def test_edm_target_has_unit_variance(sde) -> None:
    for sigma_data in (0.1, 0.5, 3.0):
        scales = sde.at(times(sde, 15, ends=True), torch.zeros(17, 1, dtype=torch.float64))
        p, q = EDM(sigma_data).coefficients(scales)
        torch.testing.assert_close(p**2 * sigma_data**2 + q**2, torch.ones_like(p), rtol=1e-12, atol=0)


def test_edm_is_karras_preconditioning() -> None:
    """c_skip = σ_d²/(σ² + σ_d²), c_out = σ σ_d/√(σ² + σ_d²), and with them D = c_skip x + c_out F (table 1)."""
    sigma_data, sde = 0.5, EDMSDE()
    output, x = pair(n=11)
    sigma = torch.logspace(math.log10(0.002), math.log10(80), 11, dtype=torch.float64)
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
    got = EDM(sigma_data).prediction(output, x, sde.at(sigma, x))
    torch.testing.assert_close(got.x0, c_skip[:, None] * x + c_out[:, None] * output, rtol=1e-12, atol=1e-12)


@each_sde
@pytest.mark.parametrize("sigma_data", [0.3, 2.0])
def test_a_zero_network_under_edm_is_exact_for_a_gaussian(sde, sigma_data) -> None:
    gaussian = GaussianMixtureDenoiser(torch.zeros(1, 3), sigma_data**2, torch.ones(1), sde)
    zero = Preconditioned(lambda x, c, cond: torch.zeros_like(x), sde, EDM(sigma_data), sigma_data=sigma_data)
    t = times(sde, 13, ends=True)
    alpha, sigma = sde.marginal(t)
    x = (alpha**2 * sigma_data**2 + sigma**2).sqrt()[:, None] * pair()[0]
    got, want = zero(x, t), gaussian(x, t)
    torch.testing.assert_close(got.x0, want.x0, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(got.eps, want.eps, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("sigma_data", [0.0, -1.0, math.nan])
def test_edm_refuses_a_standard_deviation_that_is_none(sigma_data) -> None:
    with pytest.raises(ValueError, match="standard deviation"):
        EDM(sigma_data)
