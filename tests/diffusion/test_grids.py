"""Grids: strictly falling, exact at both ends, float64, and spaced as their names say."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import all_sdes

from scoresde import (
    EDMSDE,
    VPSDE,
    CosineGrid,
    KarrasGrid,
    LogisticGrid,
    LogSNRGrid,
    QuadraticGrid,
    SoftplusGrid,
    TableSDE,
    UniformGrid,
)
from scoresde.diffusion.grids import check_grid

ALL = all_sdes()
GRIDS = {
    "uniform": UniformGrid,
    "log_snr": LogSNRGrid,
    "karras": KarrasGrid,
    "quadratic": QuadraticGrid,
    "cosine": CosineGrid,
    "logistic": LogisticGrid,
    "softplus": SoftplusGrid,
}
each_sde = pytest.mark.parametrize("sde", ALL.values(), ids=ALL.keys())
each_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())


def assert_even(values: torch.Tensor) -> None:
    """Equal differences, up to 1e-9 of the whole span."""
    gaps = values[1:] - values[:-1]
    span = values[-1] - values[0]
    torch.testing.assert_close(gaps / span, torch.full_like(gaps, 1 / len(gaps)), rtol=0, atol=1e-9)


@each_grid
@each_sde
def test_grids_fall_strictly_between_exact_ends(sde, grid) -> None:
    for steps in (1, 2, 3, 10, 100, 1000):
        times = grid()(sde, steps)
        assert times.shape == (steps + 1,) and times.dtype == torch.float64
        assert float(times[0]) == sde.t_max and float(times[-1]) == sde.t_min
        assert bool((times[1:] < times[:-1]).all())
        assert check_grid(times, sde) is times


@each_grid
@each_sde
def test_t_end_is_the_last_time(sde, grid) -> None:
    end = 0.9 * sde.t_min + 0.1 * sde.t_max
    times = grid(t_end=end)(sde, 7)
    assert float(times[-1]) == end and float(times[0]) == sde.t_max
    assert bool((times[1:] < times[:-1]).all())
    for bad in (sde.t_max, 2 * sde.t_max, 0.5 * sde.t_min, -1.0, math.nan):
        with pytest.raises(ValueError, match="t_end"):
            grid(t_end=bad)(sde, 7)


@each_grid
@pytest.mark.parametrize("steps", [0, -3])
def test_no_steps_are_refused(grid, steps) -> None:
    with pytest.raises(ValueError, match="number of steps of a grid, is a whole number of at least 1"):
        grid()(VPSDE(), steps)


@each_sde
def test_spacing(sde) -> None:
    """Each grid is even in its own variable: t, λ, (σ/α)^{1/ρ}, √t."""
    assert_even(UniformGrid()(sde, 50))
    assert_even(QuadraticGrid()(sde, 50).sqrt())
    assert_even(sde.log_snr(LogSNRGrid()(sde, 50)))
    for rho in (1.0, 3.0, 7.0, 20.0):
        ratio = (-0.5 * sde.log_snr(KarrasGrid(rho)(sde, 50))).exp()
        assert_even(ratio ** (1 / rho))


@pytest.mark.parametrize("steps", [1, 2, 18, 79])
def test_karras_grid_is_karras_formula(steps) -> None:
    """σ_i = (σ_max^{1/ρ} + i/N (σ_min^{1/ρ} − σ_max^{1/ρ}))^ρ (Karras et al. 2022, eq. 5), where time is σ."""
    i = torch.arange(steps + 1, dtype=torch.float64)
    for rho in (7.0, 3.0):
        first, last = 80.0 ** (1 / rho), 0.002 ** (1 / rho)
        expected = (first + i / steps * (last - first)) ** rho
        torch.testing.assert_close(KarrasGrid(rho)(EDMSDE(0.002, 80.0), steps), expected, rtol=1e-11, atol=0)


def test_a_large_rho_tends_to_equal_log_snr() -> None:
    """(σ/α)^{1/ρ} = e^{−λ/2ρ} is linear in λ up to O(Δλ/ρ)."""
    sde = VPSDE()
    distance = [
        float((sde.log_snr(KarrasGrid(rho)(sde, 20)) - sde.log_snr(LogSNRGrid()(sde, 20))).abs().max())
        for rho in (100.0, 200.0)
    ]
    assert distance[0] < 1.0 and 1.9 < distance[0] / distance[1] < 2.1


def test_a_uniform_grid_visits_every_entry_of_a_table() -> None:
    sde = ALL["ddpm"]
    assert isinstance(sde, TableSDE)
    entries = torch.arange(len(sde), 0, -1, dtype=torch.float64) / len(sde)
    torch.testing.assert_close(UniformGrid()(sde, len(sde) - 1), entries, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rho", [0.0, -7.0, math.nan])
def test_karras_refuses_a_rho_that_is_not_positive(rho) -> None:
    with pytest.raises(ValueError, match="rho is the exponent of a KarrasGrid, > 0 and finite"):
        KarrasGrid(rho)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([0.5], "at least two"),
        ([[1.0, 0.5]], "at least two"),
        ([1, 0], "floating-point"),
        ([0.1, 1.0], "fall strictly"),
        ([1.0, 0.5, 0.5, 0.1], "fall strictly"),
        ([1.0, math.nan, 0.1], "fall strictly"),
        ([1.5, 0.5], "outside"),
        ([1.0, 0.0], "outside"),
    ],
)
def test_callers_grids_are_checked(times, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_grid(torch.tensor(times), VPSDE())
