"""Fitted grids hold on noise they never saw, on closed forms and on a trained network; budgets are kept."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from oracles import ring
from tiny_training import trained_on_a_ring
from torch import Tensor

from scoresde import (
    DDIM,
    DEIS,
    EDMSDE,
    VESDE,
    VPSDE,
    Adams,
    AdaptiveODE,
    Denoiser,
    DPMSolverPP,
    FittedGrid,
    Heun,
    KarrasGrid,
    LogSNRGrid,
    Multistep,
    Prediction,
    QuadraticGrid,
    Rng,
    Sampler,
    SavedGrid,
    Step,
    UniformGrid,
    UniPC,
    default_sampler,
    fit_grid,
    sample,
)
from scoresde.diffusion.denoiser import CountingDenoiser, DenoiserWrapper
from scoresde.diffusion.grids import Grid

SDES = {"vp": VPSDE(), "ve": VESDE(), "edm": EDMSDE()}
each_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
GENERIC: list[Grid] = [UniformGrid(), LogSNRGrid(), KarrasGrid(), QuadraticGrid()]


@cache
def solved(denoiser: Denoiser) -> tuple[Tensor, Tensor]:
    """200 draws of the prior, which no fit has seen, and where the probability flow takes them, to 1e-7."""
    x = denoiser.prior_sample((200, 2), rng=Rng(99), dtype=torch.float64)
    ends = (torch.tensor(t, dtype=torch.float64) for t in (denoiser.sde.t_max, denoiser.sde.t_min))
    with torch.no_grad():
        return x, AdaptiveODE(1e-7, 1e-7).move(denoiser, x, *ends)


def rms(denoiser: Denoiser, step: Step, grid: Grid | None, steps: int) -> float:
    """RMS distance to the probability-flow end point, over the data's spread, on noise of its own."""
    x, exact = solved(denoiser)
    y = Sampler(step, grid, steps, denoise=False)(denoiser, x)
    return float((y - exact).square().mean().sqrt()) / denoiser.data_std


@each_sde
def test_a_fitted_grid_beats_every_generic_one_on_fresh_noise(sde) -> None:
    """By 3 times at 5 steps: the measured ratios are 5 (VE) to 30 (VP), for plain DPM-Solver++ 2M."""
    denoiser, step = ring(sde), DPMSolverPP(2)
    grid = fit_grid(denoiser, step, steps=5, shape=(2,), samples=256, iterations=200, rng=Rng(1))
    assert rms(denoiser, step, grid, 5) < min(rms(denoiser, step, other, 5) for other in GENERIC) / 3


@each_sde
def test_without_gradients_it_is_still_better(sde) -> None:
    """At 20 steps the local errors say where the steps belong: below 0.7 of every grid that ignores the model."""
    denoiser, step = ring(sde), Adams(3)
    grid = fit_grid(denoiser, step, steps=20, shape=(2,), samples=128, gradients=False, rng=Rng(1))
    assert rms(denoiser, step, grid, 20) < 0.7 * min(rms(denoiser, step, other, 20) for other in GENERIC)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_taken_in_every_mode(mode) -> None:
    denoiser, options = ring(VPSDE()), {"steps": 3, "shape": (2,), "samples": 32, "iterations": 20, "fine_steps": 40}
    plain = fit_grid(denoiser, DPMSolverPP(2), **options)
    with mode():
        assert torch.equal(fit_grid(denoiser, DPMSolverPP(2), **options).log_snr, plain.log_snr)


def test_it_holds_on_a_trained_network() -> None:
    """A small network after some training, which is no closed form: half the error of every generic grid."""
    denoiser = trained_on_a_ring()
    step = DPMSolverPP(2)
    grid = fit_grid(denoiser, step, steps=6, shape=(2,), samples=256, iterations=200, rng=Rng(1))
    assert rms(denoiser, step, grid, 6) < 0.5 * min(rms(denoiser, step, other, 6) for other in GENERIC)


def test_a_grid_is_a_small_file(tmp_path) -> None:
    grid = FittedGrid([-8.0, -1.0, 2.0, 11.0])
    grid.save(tmp_path / "grid.json")
    saved = SavedGrid(tmp_path / "grid.json")
    assert torch.equal(saved(VPSDE(), 3), grid(VPSDE(), 3))
    for text in ("", "[1, 2]", '{"log_snr": "x"}', '{"log_snr": [1, 0]}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"bad.json|rising"):
            SavedGrid(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="nowhere"):
        SavedGrid(tmp_path / "nowhere.json")


@each_sde
def test_knots_between_exact_ends(sde) -> None:
    """The fitted knots at the fitted number, between them at others; refused where the SDE does not reach."""
    grid = FittedGrid([-6.0, -1.0, 2.0, 8.0])
    times = grid(sde, 3)
    assert float(times[0]) == sde.t_max and float(times[-1]) == sde.t_min
    torch.testing.assert_close(sde.log_snr(times[1:-1]), torch.tensor([-1.0, 2.0], dtype=torch.float64))
    finer = sde.log_snr(grid(sde, 6))
    torch.testing.assert_close(finer[2:5], torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="fit one for this SDE"):
        FittedGrid([-60.0, -50.0, 2.0, 8.0])(sde, 3)


@pytest.mark.parametrize("knots", [[], [1.0], [1.0, 1.0], [2.0, 1.0], [1.0, math.nan, 2.0]])
def test_knots_that_do_not_rise_are_refused(knots) -> None:
    with pytest.raises(ValueError, match="rising"):
        FittedGrid(knots)


def test_what_cannot_be_fitted_is_refused() -> None:
    denoiser = ring(VPSDE())
    with pytest.raises(ValueError, match="chooses its own steps"):
        fit_grid(denoiser, AdaptiveODE(), steps=5, shape=(2,))
    for wrong in ({"steps": 0}, {"samples": 4}, {"fine_steps": 10}):
        with pytest.raises(ValueError, match="is a whole number of at least"):
            fit_grid(denoiser, Heun(), **({"steps": 5, "shape": (2,)} | wrong))


@each_sde
@pytest.mark.parametrize("budget", [1, 2, 5, 8, 20])
def test_a_budget_is_spent_exactly(sde, budget) -> None:
    counted = CountingDenoiser(ring(sde))
    assert sample(counted, (4, 2), budget=budget, rng=Rng(0)).shape == (4, 2)
    assert counted.evaluations == budget == default_sampler(counted, budget).evaluations


@each_sde
@pytest.mark.parametrize("budget", [5, 20])
def test_the_default_beats_the_usual_solvers_and_grids(sde, budget) -> None:
    """DPM-Solver++ 2M on every generic grid is farther from the truth at every budget."""
    denoiser = ring(sde)
    chosen = default_sampler(denoiser, budget)
    usual = min(rms(denoiser, DPMSolverPP(2), grid, budget) for grid in GENERIC)
    assert rms(denoiser, chosen.step, chosen.grid, budget) < 0.8 * usual


@each_sde
@pytest.mark.parametrize(
    "step", [DDIM(), Heun(), UniPC(2), DPMSolverPP(2), DEIS(3)], ids=lambda step: type(step).__name__
)
def test_a_step_has_a_better_grid_of_its_own_than_the_generic_ones(sde, step) -> None:
    """In 20 calls nearer to the truth; equal steps in t end at 1.06 (VE) to 300 times the distance."""
    denoiser, steps = ring(sde), 20 // step.evaluations
    others = min(rms(denoiser, step, grid, steps) for grid in (UniformGrid(), LogSNRGrid(), KarrasGrid()))
    assert rms(denoiser, step, None, steps) < others


class Wrong(DenoiserWrapper):
    """A denoiser whose ε̂ is off by `size`, by turns up and down, or always up."""

    def __init__(self, denoiser: Denoiser, size: float, *, turns: bool):
        super().__init__(denoiser)
        self.size, self.turns, self.calls = size, turns, 0

    def forward(self, x: Tensor, t: Tensor, cond=None) -> Prediction:
        self.calls += 1
        p, scales = self.denoiser(x, t, cond), self.sde.at(t, x)
        eps = p.eps + self.size * (-1) ** (self.calls * self.turns)
        return Prediction((x - scales.sigma * eps) / scales.alpha, eps, scales)


@each_sde
@pytest.mark.parametrize("budget", [5, 10, 20])
@pytest.mark.parametrize("roughness", [1.0, math.inf])
@pytest.mark.parametrize("size", [0.01, 0.05])
def test_the_default_does_not_blow_up_the_errors_of_a_network(sde, budget, roughness, size) -> None:
    """Errors that change their sign with every call, the worst that extrapolation can meet.

    A step counts them at most `bound` times as much as a DDIM step does; DDIM along the same grid, with errors of one
    sign, adds them up. Polynomials in the angle without a bound lose up to ten times as much.
    """
    exact, grid = ring(sde), None
    x = exact.prior_sample((256, 2), rng=Rng(1), dtype=torch.float64)

    def lost(step: Step, turns: bool) -> float:
        sampler = Sampler(step, grid, budget, denoise=False)
        return float((sampler(Wrong(exact, size, turns=turns), x) - sampler(exact, x)).square().mean().sqrt())

    learned = Wrong(exact, size, turns=True)
    learned.roughness = roughness
    chosen = default_sampler(learned, budget)
    grid = chosen.grid
    assert isinstance(chosen.step, Multistep) and chosen.step.bound is not None and chosen.step.bound <= 4
    assert lost(chosen.step, turns=True) <= chosen.step.bound * lost(DDIM(), turns=False)


@pytest.mark.parametrize("budget", [0, -1, 2.5, True, None])
def test_a_budget_is_a_number_of_calls(budget) -> None:
    with pytest.raises(ValueError, match="budget"):
        sample(ring(VPSDE()), (4, 2), budget=budget)
