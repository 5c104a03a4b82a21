"""TableSDE: a discrete schedule, entry by entry, and the continuous process through it."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from oracles import ddpm_alpha_bar, ncsn_sigmas, times

from scoresde import DDPM, VPSDE, TableSDE


def entries(sde: TableSDE) -> torch.Tensor:
    """The times of the entries, i/N in float64."""
    return torch.arange(1, len(sde) + 1, dtype=torch.float64) / len(sde)


def test_every_entry_of_a_beta_table_is_reproduced() -> None:
    table = ddpm_alpha_bar()
    sde = TableSDE(table)
    assert len(sde) == 1000 and sde.t_min == 1e-3 and sde.t_max == 1.0
    alpha, sigma = sde.marginal(entries(sde))
    torch.testing.assert_close(alpha**2, table, rtol=1e-12, atol=0)
    torch.testing.assert_close(sigma**2, 1 - table, rtol=1e-11, atol=0)
    # per step: q(x_i | x_{i−1}) = N(√(1 − β_i) x_{i−1}, β_i), Ho et al. 2020, eq. 2
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)[1:]
    scale, std = sde.transition(entries(sde)[:-1], entries(sde)[1:])
    torch.testing.assert_close(scale, (1 - beta).sqrt(), rtol=1e-10, atol=0)
    torch.testing.assert_close(std**2, beta, rtol=1e-8, atol=0)


def test_every_noise_level_is_reproduced() -> None:
    table = ncsn_sigmas()
    sde = TableSDE(sigmas=table)
    alpha, sigma = sde.marginal(entries(sde))
    assert torch.equal(alpha, torch.ones_like(table))
    torch.testing.assert_close(sigma, table, rtol=1e-12, atol=0)
    # a geometric table is VESDE's own schedule: g² = dσ²/dt exactly, between the entries too
    t = times(sde, 21)
    growth = 2 * math.log(50 / 0.01) * len(table) / (len(table) - 1)
    torch.testing.assert_close(sde.diffusion(t) ** 2, growth * sde.marginal(t)[1] ** 2, rtol=1e-9, atol=0)


@pytest.mark.parametrize("sde", [TableSDE(ddpm_alpha_bar()), TableSDE(sigmas=ncsn_sigmas())], ids=["ddpm", "ncsn"])
def test_log_snr_is_linear_between_entries_and_time_inverts_it(sde) -> None:
    knots = entries(sde)
    level = sde.log_snr(knots)
    for part in (0.0, 0.25, 0.9, 1.0):
        between = knots[:-1] + part * (knots[1:] - knots[:-1])
        want = level[:-1] + part * (level[1:] - level[:-1])
        torch.testing.assert_close(sde.log_snr(between), want, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(sde.time(want), between, rtol=1e-11, atol=0)
    assert sde.time(level.reshape(1, -1)).shape == (1, len(sde))


def test_the_step_index_reaches_a_network_as_documented() -> None:
    sde = TableSDE(ddpm_alpha_bar())
    for dtype, atol in [(torch.float64, 1e-9), (torch.float32, 1e-4)]:
        index = entries(sde).to(dtype) * len(sde) - 1
        torch.testing.assert_close(index, torch.arange(1000).to(dtype), rtol=0, atol=atol)


def test_fine_tables_approach_the_continuous_vp() -> None:
    """β_i = β(i/N)/N has ∑ log(1 − β_i) = −∫β + O(1/N): the distance to VPSDE falls like 1/N."""
    vp, t = VPSDE(), torch.linspace(0.05, 1.0, 20, dtype=torch.float64)
    errors = []
    for n in (500, 1000, 2000):
        beta = vp.beta((torch.arange(1, n + 1, dtype=torch.float64)) / n) / n
        table = TableSDE(torch.cumprod(1 - beta, 0))
        errors.append(float((table.log_snr(t) - vp.log_snr(t)).abs().max()))
    assert errors[0] < 0.3
    assert 1.8 < errors[0] / errors[1] < 2.2 and 1.8 < errors[1] / errors[2] < 2.2


def test_tables_may_be_lists_and_of_any_precision() -> None:
    values = [0.99, 0.9, 0.5, 0.01]
    t = torch.tensor([0.3, 0.6, 0.99], dtype=torch.float64)
    for table in (values, tuple(values), torch.tensor(values, dtype=torch.float64)):
        assert torch.equal(TableSDE(table).log_snr(t), TableSDE(values).log_snr(t))
    torch.testing.assert_close(
        TableSDE(torch.tensor(values)).log_snr(t), TableSDE(values).log_snr(t), rtol=1e-5, atol=0
    )


def test_the_callers_table_is_copied() -> None:
    table = ddpm_alpha_bar()
    sde = TableSDE(table)
    before = sde.log_snr(entries(sde))
    table.zero_()
    assert torch.equal(sde.log_snr(entries(sde)), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "one of the two"),
        ({"alpha_bar": [0.9, 0.5], "sigmas": [0.1, 1.0]}, "one of the two"),
        ({"alpha_bar": [0.9]}, "at least two"),
        ({"alpha_bar": []}, "at least two"),
        ({"alpha_bar": [0.5, 0.9]}, "alpha_bar must fall"),
        ({"alpha_bar": [0.9, 0.9]}, "alpha_bar must fall"),
        ({"alpha_bar": [1.0, 0.9]}, "alpha_bar must fall"),
        ({"alpha_bar": [0.9, 0.0]}, "alpha_bar must fall"),
        ({"alpha_bar": [1.1, 0.5]}, "alpha_bar must fall"),
        ({"alpha_bar": [0.9, math.nan, 0.5]}, "alpha_bar must fall"),
        ({"sigmas": [1.0, 0.1]}, "sigmas must rise"),
        ({"sigmas": [0.0, 0.1]}, "sigmas must rise"),
        ({"sigmas": [-1.0, 0.1]}, "sigmas must rise"),
        ({"sigmas": [0.1, math.inf]}, "sigmas must rise"),
    ],
)
def test_bad_tables_are_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        TableSDE(**arguments)


@pytest.mark.parametrize("betas", ["linear", "cosine"])
def test_ddpm_has_the_tables_of_diffusers(betas) -> None:
    # theirs in float32, whose rounding over a product of 1,000 factors is below 1000 · 2⁻²⁴ = 6e-5, relative
    schedule = {"linear": "linear", "cosine": "squaredcos_cap_v2"}[betas]
    theirs = DDPMScheduler(beta_schedule=schedule).alphas_cumprod.double()
    sde = DDPM(betas)
    alpha, _ = sde.marginal(entries(sde))
    torch.testing.assert_close(alpha**2, theirs, rtol=6e-5, atol=0)
    if betas == "linear":
        torch.testing.assert_close(alpha**2, ddpm_alpha_bar(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"betas": "sigmoid"}, "'linear' or 'cosine'; got 'sigmoid'"),
        ({"steps": 1}, "steps"),
        ({"beta_start": 0.1, "beta_end": 0.02}, "beta_start ≤ beta_end"),
    ],
)
def test_other_ddpm_tables_are_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        DDPM(**arguments)
