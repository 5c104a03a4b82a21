"""Multistep methods: their order, what they solve exactly, their noise, and what they cost."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import pytest
import torch
from oracles import Fixed, closed_form_sdes, grid, marginal_moments, mixture, slope, start
from torch import Tensor

from scoresde import (
    DDIM,
    DEIS,
    IPNDM,
    RK4,
    Adams,
    AdaptiveODE,
    DPMSolver,
    DPMSolverPP,
    GaussianMixtureDenoiser,
    Heun,
    LogSNRGrid,
    Multistep,
    Rng,
    Sampler,
    SASolver,
    Step,
    UniPC,
)
from scoresde.diffusion.denoiser import CountingDenoiser
from scoresde.ops import lincomb
from scoresde.sampling.weights import bounded, knots, weights

SDES = {name: sde for name, sde in closed_form_sdes().items() if name in ("vp", "ve", "edm", "flow")}
each_sde = pytest.mark.parametrize("name", SDES)
ODES: dict[str, Multistep] = {
    "dpm++1": DPMSolverPP(1),
    "dpm++2": DPMSolverPP(2),
    "dpm++3": DPMSolverPP(3),
    "unipc1": UniPC(1),
    "unipc2-bh1": UniPC(2, "bh1"),
    "unipc2-bh2": UniPC(2),
    "unipc3": UniPC(3),
    "deis1": DEIS(1),
    "deis2": DEIS(2),
    "deis3": DEIS(3),
    "deis4": DEIS(4),
    "ipndm1": IPNDM(1),
    "ipndm4": IPNDM(4),
    "adams2": Adams(2),
    "adams3": Adams(3),
    "adams4": Adams(4),
    "adams2+3": Adams(2, 3),
    "adams3+3": Adams(3, 3),
    "adams3+4": Adams(3, 4),
    "adams3-log": Adams(3, angle=False),
    "bounded3": Multistep(3, sigma_data=None, bound=3.0),
    "bounded3-whole": Multistep(3, sigma_data=None, bound=4.0),
    "bounded3+3": Multistep(3, sigma_data=None, corrector=3, bound=2.5),
    "bounded4+4-angle": Multistep(4, sigma_data=None, corrector=4, angle=True, bound=2.5),
    "bounded2-noise": Multistep(2, sigma_data=math.inf, bound=2.0),
    "sa2+2": SASolver(2, 2, tau=0.0),
    "sa3+4": SASolver(3, 4, tau=0.0),
}
ETAS = (0.5, 1.0, 1.4)
SDE_STEPS: dict[str, Multistep] = {
    f"{label}-eta{eta}": step
    for eta in ETAS
    for label, step in {
        "dpm++2": DPMSolverPP(2, eta),
        "unipc2": UniPC(2, eta=eta),
        "deis3": DEIS(3, eta),
        "adams3": Adams(3, eta=eta, sigma_data=1.0),
        "adams2+2": Adams(2, 2, eta=eta, sigma_data=1.0),
        "sa2+2": SASolver(2, 2, eta),
        "sa3+0": SASolver(3, 0, eta),
    }.items()
}
each_ode = pytest.mark.parametrize("step", ODES.values(), ids=ODES.keys())
# Every method on every SDE, and at every eta on one of them: the etas change from SDE to SDE.
noisy_in_turn = pytest.mark.parametrize(
    ("name", "step"),
    [
        pytest.param(name, step, id=f"{label}-{name}")
        for i, name in enumerate(SDES)
        for j, (label, step) in enumerate(SDE_STEPS.items())
        if (j + j // (len(SDE_STEPS) // len(ETAS)) + i) % len(ETAS) == 0
    ],
)


def solve(step: Step, denoiser, x: Tensor, times: Tensor, rng: Rng | None = None) -> Tensor:
    state = step.init(x)
    for t, s in pairwise(times):
        x, state = step(denoiser, x, t, s, state, cond=None, rng=rng or Rng(0))
    return x


@cache
def reference(name: str) -> tuple[GaussianMixtureDenoiser, Tensor, Tensor]:
    """A mixture, draws of x at λ = −3, and where the probability-flow ODE takes them."""
    denoiser = mixture(SDES[name], (2,), seed=1)
    first, last = grid(SDES[name], 1)
    x = start(denoiser, first)
    return denoiser, x, AdaptiveODE(1e-12, 1e-12).move(denoiser, x, first, last)


@each_sde
@each_ode
def test_order(name, step) -> None:
    """RMS distance to the ODE solved to 1e-12; the smallest error measured is above 1e-9, so that costs no accuracy.

    At 100 to 200 steps h = 0.03 in λ, and the next term of the error moves the slope by O(h) times a few: by 0.10 for
    `adams3+4` here, and by 0.23 at half as many steps.
    """
    denoiser, x, exact = reference(name)
    errors = [float((solve(step, denoiser, x, grid(SDES[name], n)) - exact).square().mean().sqrt()) for n in (100, 200)]
    assert errors[-1] > 1e-9
    assert slope(errors) == pytest.approx(step.order, abs=0.15)


@each_ode
def test_the_evaluations_are_those_declared(step) -> None:
    denoiser = mixture(SDES["vp"], (2,))
    for steps in (1, 2, 7):
        counted, sampler = CountingDenoiser(denoiser), Sampler(step, LogSNRGrid(), steps)
        *_, last = sampler.iterate(counted, (3, 2), rng=Rng(0))
        assert counted.evaluations == last.evaluations == sampler.evaluations == step.count(steps) + 1


@each_sde
def test_first_order_members_are_ddim(name) -> None:
    """On one node every data or noise prediction is DDIM (Song, Meng & Ermon 2021, eq. 12)."""
    denoiser, x, _ = reference(name)
    times = grid(SDES[name], 6)
    expected = solve(DDIM(), denoiser, x, times)
    for step in (DPMSolverPP(1), DEIS(1), IPNDM(1)):
        torch.testing.assert_close(solve(step, denoiser, x, times), expected, rtol=1e-9, atol=1e-9)
    noisy = solve(DDIM(1.0), denoiser, x, times, Rng(3))
    torch.testing.assert_close(solve(DPMSolverPP(1, 1.0), denoiser, x, times, Rng(3)), noisy, rtol=1e-9, atol=1e-9)


@each_sde
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 2.0])
def test_gaussian_data_of_the_assumed_spread_are_exact_in_one_step(name, eta) -> None:
    """V vanishes on N(0, c² I), so x_s ~ N(0, α²c² + σ²) whatever the step: a x_t + std z with a² v_t + std² = v_s."""
    sde, c = SDES[name], 0.6
    denoiser = GaussianMixtureDenoiser(torch.zeros(1, 1), c**2, torch.ones(1), sde)
    t, s = torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)
    v_t, v_s = (float(marginal_moments(denoiser, float(one))[1]) for one in (t, s))
    step = Adams(3, eta=eta)
    x = torch.ones(1, 1, dtype=torch.float64)
    a = float(step(denoiser, x, t, s, None, cond=None, rng=Fixed(0.0))[0])
    std = float(step(denoiser, 0 * x, t, s, None, cond=None, rng=Fixed(1.0))[0])
    assert a**2 * v_t + std**2 == pytest.approx(v_s, rel=1e-6)
    assert (std > 0) == (eta > 0)


@noisy_in_turn
def test_mean_and_variance_converge(name, step) -> None:
    """On a Gaussian the end point is affine in x_T and in the noise of every step, so its moments are exact sums.

    Of weak order 1 at least, so 4 times the steps divide the error by 4 or more (10 % for the next term).
    """
    sde = SDES[name]
    mean, var = (float(value) for value in marginal_moments(gaussian(name), float(grid(sde, 1)[1])))
    errors = []
    for n in (25, 100):
        end = affine(step, name, n)
        errors.append(math.hypot(float(end[0]) - mean, float(end[1:].square().sum()) - var))
    assert errors[1] < 1.1 * errors[0] / 4 and errors[1] < 1e-3


@cache
def gaussian(name: str) -> GaussianMixtureDenoiser:
    return GaussianMixtureDenoiser(torch.tensor([[1.5]]), 0.25, torch.ones(1), SDES[name])


@cache
def affine(step: Step, name: str, n: int) -> Tensor:
    """Mean of the end point, its coefficient of x_T's own spread, and that of the normal of every step (n + 2,)."""
    denoiser, times = gaussian(name), grid(SDES[name], n)
    m, v = marginal_moments(denoiser, float(times[0]))
    x = torch.full((n + 2, 1), float(m), dtype=torch.float64)
    x[1] += float(v) ** 0.5
    end = solve(step, denoiser, x, times, OneAtATime())[:, 0]
    return torch.cat([end[:1], end[1:] - end[0]])


class OneAtATime(Rng):
    """In draw k sample k + 2 gets 1 and every other 0."""

    def __init__(self) -> None:
        super().__init__(0)
        self.draw = 0

    def normal(self, shape, *, dtype=None, device=None):
        z = torch.zeros(tuple(shape), dtype=dtype, device=device)
        z[self.draw + 2] = 1
        self.draw += 1
        return z


@noisy_in_turn
def test_strong_order_on_one_brownian_path(name, step) -> None:
    """n steps against 2n on the same noise: the coarse normal is the two fine ones, carried as the step carries them.

    Without the integral a step is x_s = A x_t + std z, so the first of two arrives with A_2 std_1, the second with
    std_2. The end point is affine in the noise: the mean square distance is a sum over squared coefficients.
    """
    sde = SDES[name]
    errors = []
    for n in (100, 200):
        coarse, fine, times = affine(step, name, n), affine(step, name, 2 * n), grid(sde, 2 * n)
        x = torch.ones(2 * n, 1, dtype=torch.float64)
        here, there = knots(sde, torch.stack([times[:-1], times[1:]]), step.q(gaussian(name)))
        terms = (step.carried(v * x, here, there, Fixed(1.0 - v)) for v in (1.0, 0.0))
        a, std = (lincomb((moved,), noise)[:, 0] for moved, noise in terms)
        carried = torch.stack([a[1::2] * std[::2], std[1::2]], 1)
        weights = (carried / carried.square().sum(1, keepdim=True).sqrt()).reshape(-1)
        split = torch.cat([coarse[:2], coarse[2:].repeat_interleave(2) * weights])
        errors.append(float((split - fine).square().sum().sqrt()))
    assert slope(errors) == pytest.approx(step.order, abs=0.15)


@pytest.mark.parametrize(
    "step", [DPMSolverPP(3), UniPC(2), DEIS(4), Adams(3, 3), IPNDM(4)], ids=lambda s: type(s).__name__
)
def test_times_may_differ_by_sample(step) -> None:
    """A batch in which every sample has its own grid gives what each gives alone."""
    sde = SDES["vp"]
    denoiser, x, _ = reference("vp")
    grids = [grid(sde, 6), grid(sde, 6) ** 1.05]
    alone = torch.cat([solve(step, denoiser, x[i : i + 1], one) for i, one in enumerate(grids)])
    together = solve(step, denoiser, x[:2], torch.stack(grids, 1))
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("q", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("angle", [False, True])
def test_no_rule_exceeds_its_bound(q, angle) -> None:
    """On knots anywhere, for predictors, correctors and starts: Σ |w| ≤ bound · Σ w, and Σ w is that of one node.

    A bound that is never reached changes nothing.
    """
    times = torch.rand(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for row in times.mul(0.98).add(0.01).sort(descending=True).values:
        made = knots(SDES["vp"], row, q)
        levels = [knot.level for knot in made[3::-1]]  # the latest first
        for at in range(4):
            start, end = (made[3], made[4]) if at == 0 else (made[3 - at], made[3])
            one = weights(levels[:1], start, end, 0.0)[0]
            for bound in (2.0, 3.0):
                rule = torch.stack(bounded(levels, start, end, 0.0, at=at, bound=bound, angle=angle))
                assert float(rule.abs().sum() / rule.sum().abs()) <= bound * (1 + 1e-9)
                torch.testing.assert_close(rule.sum(), one, rtol=1e-9, atol=0)
            free = torch.stack(bounded(levels, start, end, 0.0, at=at, bound=1e12, angle=angle))
            torch.testing.assert_close(free, torch.stack(weights(levels, start, end, 0.0, angle=angle)))


def test_tau_acts_between_its_noise_levels_only() -> None:
    """SA-Solver with τ = 1 on a part of the path draws noise there and equals the ODE elsewhere (float64 round-off)."""
    denoiser, x, _ = reference("vp")
    times = grid(SDES["vp"], 8)
    off = SASolver(2, 2, 1.0, between=(1e3, 1e4))
    torch.testing.assert_close(
        solve(off, denoiser, x, times), solve(SASolver(2, 2, 0.0), denoiser, x, times), rtol=1e-9, atol=1e-9
    )
    part = SASolver(2, 2, 1.0, between=(0.5, 1.0))
    first, second = (solve(part, denoiser, x, times, Rng(seed)) for seed in (0, 1))
    assert not torch.allclose(first, second)


def test_the_published_third_order_formula_is_of_second_order() -> None:
    """Why DPMSolverPP(3) differs from the published 3M: half of the curvature term, D2, is missing there.

    x_s = (σ_s/σ_t) x + α_s [φ₁ D0 + φ₂ D1 + φ₃ D2] with φ₃ = ½ − φ₂/h: ∫ e^{u−h} (u/h)² du is 2 φ₃.
    """
    sde = SDES["vp"]
    denoiser, x, exact = reference("vp")

    def end(n: int, curvature: float) -> Tensor:
        times = grid(sde, n)
        level = 0.5 * sde.log_snr(times)
        alpha, sigma = sde.marginal(times)
        # two exact steps first, so that the start plays no part
        y, values = x, [denoiser(x, times[0]).x0]
        for k in (0, 1):
            y = AdaptiveODE(1e-12, 1e-12).move(denoiser, y, times[k], times[k + 1])
            values.append(denoiser(y, times[k + 1]).x0)
        for k in range(2, n):
            h, r0, r1 = level[k + 1] - level[k], level[k] - level[k - 1], level[k - 1] - level[k - 2]
            first, second = (values[-1] - values[-2]) * h / r0, (values[-2] - values[-3]) * h / r1
            d1 = first + r0 / (r0 + r1) * (first - second)
            d2 = (first - second) * h / (r0 + r1)
            phi2 = 1 + torch.expm1(-h) / h
            y = sigma[k + 1] / sigma[k] * y + alpha[k + 1] * (
                -torch.expm1(-h) * values[-1] + phi2 * d1 + curvature * (0.5 - phi2 / h) * d2
            )
            values.append(denoiser(y, times[k + 1]).x0)
        return y

    rates = {c: slope([float((end(n, c) - exact).square().mean().sqrt()) for n in (100, 200)]) for c in (1.0, 2.0)}
    assert rates[1.0] == pytest.approx(2, abs=0.15) and rates[2.0] == pytest.approx(3, abs=0.15)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPMSolverPP(4), "orders 1 to 3"),
        (lambda: UniPC(0), "orders 1 to 3"),
        (lambda: DEIS(5), "order 1, 2, 3 or 4"),
        (lambda: UniPC(2, "bh3"), "bh1"),
        (lambda: Adams(2, 4), "corrector"),
        (lambda: DEIS(2, eta=-0.1), "eta >= 0"),
        (lambda: DEIS(2, eta=math.nan), "eta >= 0"),
        (lambda: Adams(2, sigma_data=-1.0), "sigma_data"),
        (lambda: Multistep(2, bound=1.5), "bound >= 2"),
        (lambda: Multistep(2, bound=3.0, slope="bh2"), "bound"),
        (lambda: SASolver(2, 2, 1.0, between=(2.0, 1.0)), "between"),
    ],
)
def test_bad_arguments_are_refused_at_construction(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "step",
    [DDIM(), Heun(), RK4(), DPMSolver(3), DPMSolverPP(2), UniPC(2), DEIS(4), IPNDM(), Adams(3, 3), SASolver(tau=0.0)],
    ids=lambda s: type(s).__name__,
)
def test_the_step_compiles_whole(step) -> None:
    """No graph break, and the numbers of the plain step. (A draw from a torch.Generator is one: so without noise.)"""
    denoiser = mixture(SDES["vp"], (2,))
    x, times = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), grid(SDES["vp"], 3)
    rng = Rng(0)

    def move(x, t, s, state):
        return step(denoiser, x, t, s, state, cond=None, rng=rng)

    torch.compiler.reset()  # one function, many steps: the limit on recompilations is per function
    compiled = torch.compile(move, fullgraph=True, backend="eager")
    plain = solve(step, denoiser, x, times)
    state = step.init(x)
    for t, s in pairwise(times):
        x, state = compiled(x, t, s, state)
    torch.testing.assert_close(x, plain, rtol=1e-5, atol=1e-5)
