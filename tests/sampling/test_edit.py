"""SDEdit, and what can be done in the latent, on Gaussians where all of it is known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import Script, closed_form_sdes
from torch import Tensor

from scoresde import (
    DDIM,
    VPSDE,
    AdaptiveODE,
    Ancestral,
    GaussianMixtureDenoiser,
    KarrasGrid,
    LogSNRGrid,
    Rng,
    Sampler,
    UniformGrid,
)
from scoresde.diffusion.grids import check_grid
from scoresde.sampling.edit import From, attribute, interpolate, sdedit

SDES = closed_form_sdes()
each_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())


@each_sde
@pytest.mark.parametrize("grid", [UniformGrid(), LogSNRGrid(), KarrasGrid()], ids=lambda g: type(g).__name__)
def test_the_end_of_a_grid(sde, grid) -> None:
    """n steps from σ/α = 0.7, each time one of a longer grid's; a start at the top gives the whole grid."""
    for steps in (1, 2, 7, 40):
        times = check_grid(From(grid, 0.7)(sde, steps), sde)
        assert len(times) == steps + 1
        alpha, sigma = sde.marginal(times[0])
        assert math.isclose(float(sigma / alpha), 0.7, rel_tol=1e-6)
        assert float(times[-1]) == float(grid(sde, steps)[-1])
        whole = next(n for n in range(steps, 10**6) if int((grid(sde, n) < times[0] * (1 - 1e-9)).sum()) >= steps)
        assert torch.equal(times[1:], grid(sde, whole)[-steps:])


@each_sde
def test_sdedit_on_a_gaussian(sde) -> None:
    """Noised to ς and drawn back by the exact reverse SDE, x_0 of N(0, v) moves as its posterior says:

    x_0' | x_0 ~ N(v/(v + ς²) x_0, v²ς²/(v + ς²)² + vς²/(v + ς²)): the law of n steps, which are linear, goes there with
    1/n (half of it at twice n, but for terms of second order), and samples are of it to 5 standard errors.
    """
    v, level, n, start = 0.25, 0.4, 4000, 0.9
    exact = GaussianMixtureDenoiser(torch.zeros(1, 1), v, torch.ones(1), sde)

    def end(steps: int, rows: int, rng: Rng) -> Tensor:
        sampler = Sampler(Ancestral(), LogSNRGrid(), steps=steps)
        return sdedit(exact, torch.full((rows, 1), start, dtype=torch.float64), sampler, level, rng=rng).flatten()

    def law(steps: int) -> tuple[float, float]:
        """Mean and variance: row k has 1 for its k-th draw and 0 for all others, and the last row has 0."""
        x = end(steps, steps + 2, Script(torch.eye(steps + 2, steps + 1, dtype=torch.float64)[..., None].unbind(1)))
        return float(x[-1]), float((x[:-1] - x[-1]).square().sum())

    gain = v / (v + level**2)
    expected = torch.tensor([gain * start, gain**2 * level**2 + gain * level**2])
    few, many = (torch.tensor(law(steps)) / expected - 1 for steps in (100, 200))
    assert bool((few.abs() < 0.15).all()) and bool((many.abs() <= 0.6 * few.abs() + 1e-6).all())
    x, (mean, var) = end(100, n, Rng(3)), law(100)
    assert abs(float(x.mean()) - mean) < 5 * math.sqrt(var / n)
    assert abs(float(x.var()) / var - 1) < 5 * math.sqrt(2 / n)


def test_sdedit_keeps_what_is_coarse() -> None:
    """With much noise the sample ends anywhere on the data; with little at the nearest mode, 6 σ from the border."""
    exact = GaussianMixtureDenoiser(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), 1e-4, torch.ones(2), VPSDE())
    sampler = Sampler(DDIM(1.0), LogSNRGrid(), steps=60)
    far = torch.tensor([[0.9, 0.4]]).expand(200, 2)
    much = sdedit(exact, far, sampler, 3.0, rng=Rng(seeds=list(range(200))))
    assert float((much[:, 0].abs() - 1).abs().max()) < 0.1 and 20 < int((much[:, 0] > 0).sum()) < 200
    some = sdedit(exact, far, sampler, 0.15, rng=Rng(seeds=list(range(200))))
    assert bool((some[:, 0] > 0.9).all()) and float(some[:, 1].abs().max()) < 0.1
    alone = sdedit(exact, far[:1], sampler, 0.15, rng=Rng(seeds=[7]))
    assert torch.allclose(alone[0], some[7], atol=1e-6)


def test_levels_that_are_none() -> None:
    with pytest.raises(ValueError, match="level is a noise level"):
        From(UniformGrid(), 0.0)
    with pytest.raises(ValueError, match="VPSDE has no time of noise level 1000000000"):
        From(UniformGrid(), 1e9)(VPSDE(), 5)


def test_interpolation_stays_on_the_sphere() -> None:
    a, b = Rng(0).normal((5, 3, 4), dtype=torch.float64), Rng(1).normal((5, 3, 4), dtype=torch.float64)
    assert torch.allclose(interpolate(a, b, 0.0), a) and torch.allclose(interpolate(a, b, 1.0), b)
    unit = [z / z.flatten(1).norm(dim=1).reshape(-1, 1, 1) for z in (a, b)]
    path = torch.stack([interpolate(*unit, w) for w in torch.linspace(0, 1, 9).tolist()])
    assert torch.allclose(path.flatten(2).norm(dim=2), torch.ones(9, 5, dtype=torch.float64))
    # equal shares are equal angles
    steps = (path[1:] - path[:-1]).flatten(2).norm(dim=2)
    assert torch.allclose(steps, steps[0].expand_as(steps))
    assert torch.allclose(interpolate(a, a, 0.3), a, atol=1e-9)
    each = interpolate(a, b, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    assert torch.allclose(each[1], interpolate(a, b, 0.25)[1]) and torch.allclose(each[4], b[4])


def test_an_attribute_moves_samples_from_one_mode_to_the_other() -> None:
    """Of a Gaussian prior the ODE's latent is affine in the data, so the direction is the difference of the means."""
    exact = GaussianMixtureDenoiser(torch.zeros(1, 2), torch.tensor([[0.3, 0.1]]), torch.ones(1), VPSDE())
    ode = AdaptiveODE(rtol=1e-7, atol=1e-7)
    left, right = (
        torch.tensor([[m, 0.1]], dtype=torch.float64) + 0.05 * Rng(k).normal((50, 2), dtype=torch.float64)
        for k, m in enumerate((-0.4, 0.4))
    )
    latents = [ode.encode(exact, x) for x in (left, right)]
    moved = latents[0] + attribute(latents[1], latents[0])
    back = Sampler(ode, denoise=False)(exact, moved)
    assert torch.allclose(back, left + (right.mean(0) - left.mean(0)), atol=1e-4)


def test_edits_of_shapes_that_do_not_fit_are_refused() -> None:
    a = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"one shape; got \(7, 2, 3\) and \(4, 3\)"):
        attribute(torch.ones(7, 2, 3), torch.ones(4, 3))
    with pytest.raises(ValueError, match="one value per sample"):
        interpolate(a, 2 * a, torch.linspace(0, 1, 5))
