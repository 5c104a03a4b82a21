"""Singlestep methods: against the papers' formulas, at their order on every SDE, with and without noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from oracles import EVENT_SHAPES, Script, all_sdes, grid, marginal_moments, mixture, times
from scipy.interpolate import make_interp_spline
from torch import Tensor

from scoresde import (
    SDE,
    AdaptiveODE,
    GaussianMixtureDenoiser,
    KarrasGrid,
    LogSNRGrid,
    RectifiedFlow,
    Rng,
    Sampler,
    ScoreFunction,
    Step,
    UniformGrid,
)
from scoresde.diffusion.denoiser import CountingDenoiser
from scoresde.sampling.runge_kutta import RK4, DPMSolver, Midpoint

ALL = all_sdes()
each_sde = pytest.mark.parametrize("sde", ALL.values(), ids=ALL.keys())
STEPS: dict[str, Step] = {
    "midpoint": Midpoint(),
    "rk4": RK4(),
    **{f"dpm-{order}-{kind}": DPMSolver(order, kind) for order in (2, 3) for kind in ("eps", "x0")},
}
each_step = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
NOISY = {f"dpm-{order}-eta-{eta}": DPMSolver(order, eta=eta) for order in (2, 3) for eta in (0.5, 1.0, 2.0)}
each_noisy = pytest.mark.parametrize("step", NOISY.values(), ids=NOISY.keys())


def move(step: Step, denoiser, x: Tensor, t: Tensor, s: Tensor, rng: Rng | None = None) -> Tensor:
    return step(denoiser, x, t, s, step.init(x), cond=None, rng=rng or Rng(0))[0]


@cache
def reference(name: str) -> tuple[GaussianMixtureDenoiser, Tensor, Tensor]:
    """A mixture, exact draws at λ = −3, and where the probability flow takes them at λ = 3, to 1e-10."""
    sde = ALL[name]
    denoiser, (t, s) = mixture(sde, (2,), seed=1), grid(sde, 1)
    x0 = denoiser.sample(16, rng=Rng(0), dtype=torch.float64)
    x = sde.perturb(x0, t, Rng(1).normal(x0.shape, dtype=torch.float64))
    return denoiser, x, AdaptiveODE(1e-10, 1e-10).move(denoiser, x, t, s)


@pytest.mark.parametrize("name", ALL)
@each_step
def test_they_converge_at_their_order(step, name) -> None:
    """The error is C h^p (1 + c h): slope p + O(h), h = 3/20; measured within 0.06. The reference's is below 1e-9."""
    denoiser, x, exact = reference(name)
    errors = []
    for n in (20, 40):
        y = x
        for t, s in pairwise(grid(denoiser.sde, n)):
            y = move(step, denoiser, y, t, s)
        errors.append(float((y - exact).square().mean().sqrt()))
    assert errors[-1] > 1e-8
    assert math.log2(errors[0] / errors[1]) == pytest.approx(step.order, abs=0.1)


def classical(name: str, f: Callable, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """One step of dy/dς = f(ς, y) as in a textbook (Hairer, Nørsett & Wanner 1993, sec. II.1)."""
    h, middle = b - a, 0.5 * (a + b)
    k1 = f(a, y)
    k2 = f(middle, y + 0.5 * h * k1)
    if name == "midpoint":
        return y + h * k2
    k3 = f(middle, y + 0.5 * h * k2)
    return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + f(b, y + h * k3))


@each_sde
@pytest.mark.parametrize("name", ["midpoint", "rk4"])
def test_runge_kutta_is_the_textbook_s_in_scaled_coordinates(sde, name) -> None:
    denoiser = mixture(sde, (3, 4))
    for t in times(sde, 4):
        x, s = Rng(0).normal((4, 3, 4), dtype=torch.float64), t - 0.2 * (t - sde.t_min)
        ratio = torch.exp(-0.5 * sde.log_snr(torch.stack([t, s])))

        def field(r: Tensor, y: Tensor) -> Tensor:
            time = sde.time(-2 * r.log())
            return denoiser(sde.marginal(time)[0] * y, time).eps

        want = sde.marginal(s)[0] * classical(name, field, x / sde.marginal(t)[0], *ratio)
        torch.testing.assert_close(move(STEPS[name], denoiser, x, t, s), want, rtol=1e-9, atol=1e-9)


def stage(sde: SDE, t: Tensor, h: Tensor, r: float) -> tuple[Tensor, Tensor, Tensor]:
    """Time, α and σ where log(α/σ) is r h above that of t."""
    time = sde.time(sde.log_snr(t) + 2 * r * h)
    return time, *sde.marginal(time)


@each_sde
@pytest.mark.parametrize("order", [2, 3])
def test_dpm_solver_is_algorithm_1_and_2(sde, order) -> None:
    """Lu et al. 2022: their λ is ℓ = log(α/σ), and x̃ divides by α."""
    denoiser = mixture(sde, (3, 4))
    for t in times(sde, 4):
        x, s = Rng(0).normal((4, 3, 4), dtype=torch.float64), t - 0.2 * (t - sde.t_min)
        h = 0.5 * (sde.log_snr(s) - sde.log_snr(t))
        place = partial(stage, sde, t, h)
        (_, alpha, _), eps = place(0), denoiser(x, t).eps
        if order == 2:
            t1, a1, s1 = place(0.5)
            u = a1 / alpha * x - s1 * torch.expm1(0.5 * h) * eps
            (_, a2, s2), eps1 = place(1), denoiser(u, t1).eps
            want = a2 / alpha * x - s2 * torch.expm1(h) * eps - s2 * torch.expm1(h) * (eps1 - eps)
        else:
            r1, r2 = 1 / 3, 2 / 3
            (t1, a1, s1), (t2, a2, s2), (_, a3, s3) = place(r1), place(r2), place(1)
            u1 = a1 / alpha * x - s1 * torch.expm1(r1 * h) * eps
            d1 = denoiser(u1, t1).eps - eps
            u2 = a2 / alpha * x - s2 * torch.expm1(r2 * h) * eps
            u2 = u2 - s2 * r2 / r1 * (torch.expm1(r2 * h) / (r2 * h) - 1) * d1
            d2 = denoiser(u2, t2).eps - eps
            want = a3 / alpha * x - s3 * torch.expm1(h) * eps - s3 / r2 * (torch.expm1(h) / h - 1) * d2
        torch.testing.assert_close(move(STEPS[f"dpm-{order}-eps"], denoiser, x, t, s), want, rtol=1e-8, atol=1e-8)


@each_sde
def test_dpm_solver_plus_plus_is_algorithm_1(sde) -> None:
    """Lu et al. 2022b, alg. 1 (2S) with r = ½: D = x̂_0 at the stage, x_s = σ_s/σ_t x − α_s (e^{−h} − 1) D."""
    denoiser = mixture(sde, (3, 4))
    for t in times(sde, 4):
        x, s = Rng(0).normal((4, 3, 4), dtype=torch.float64), t - 0.2 * (t - sde.t_min)
        h = 0.5 * (sde.log_snr(s) - sde.log_snr(t))
        middle = sde.time(sde.log_snr(t) + h)
        (_, sigma), (a1, s1), (a2, s2) = (sde.marginal(time) for time in (t, middle, s))
        u = s1 / sigma * x - a1 * torch.expm1(-0.5 * h) * denoiser(x, t).x0
        want = s2 / sigma * x - a2 * torch.expm1(-h) * denoiser(u, middle).x0
        torch.testing.assert_close(move(STEPS["dpm-2-x0"], denoiser, x, t, s), want, rtol=1e-8, atol=1e-8)


@each_sde
@each_step
@pytest.mark.parametrize("event", EVENT_SHAPES[1:3], ids=str)
def test_times_can_differ_between_samples_and_s_equal_t_stays(step, sde, event) -> None:
    """Each sample as if alone; calls counted; and no 0/0 in a step of no length or at either end."""
    denoiser = CountingDenoiser(mixture(sde, event, covariance="isotropic"))
    x = Rng(0).normal((5, *event), dtype=torch.float64)
    t = times(sde, 3, ends=True)
    s = torch.cat([t[:1], t[:-1]])
    got = move(step, denoiser, x, t, s)
    assert denoiser.evaluations == step.evaluations
    for k in range(5):
        torch.testing.assert_close(move(step, denoiser, x[k : k + 1], t[k], s[k]), got[k : k + 1])
    torch.testing.assert_close(got[0], x[0])
    end = torch.tensor(sde.t_min, dtype=torch.float64)
    assert bool(move(step, denoiser, x, t[-1], end).isfinite().all())


@pytest.mark.parametrize("grid", [UniformGrid(), KarrasGrid(), LogSNRGrid()], ids=["uniform", "karras", "log-snr"])
@pytest.mark.parametrize("name", ["vp", "flow", "cosine"])
@each_step
def test_long_steps_are_stable(step, name, grid) -> None:
    """24 evaluations from prior to data, steps by factors up to 1000 in σ/α, against the closed form for a Gaussian.

    Within 0.3, when its spread is 0.5 (measured 0.24 for RK4 and 0.1 for the others).
    """
    sde, var = ALL[name], 0.25
    denoiser = GaussianMixtureDenoiser(torch.zeros(1, 2), var, torch.ones(1), sde)
    x = denoiser.prior_sample((64, 2), rng=Rng(0), dtype=torch.float64)
    alpha, sigma = sde.marginal(torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64))
    end, begin = (alpha**2 * var + sigma**2).sqrt().tolist()
    got = Sampler(step, grid, steps=24 // step.evaluations, denoise=False)(denoiser, x)
    assert float((got - end / begin * x).square().mean().sqrt()) < 0.3


@each_noisy
@each_sde
def test_the_transition_is_exact_for_a_constant_prediction(step, sde) -> None:
    """Data in one point: x_s ~ N(α_s x_0 + e^{−η²h} σ_s ε̂, σ_s² (1 − e^{−2η²h})), each draw's share by an impulse."""
    point, eta = 0.75, step.eta
    denoiser = GaussianMixtureDenoiser(torch.full((1, 1), point), 0.0, torch.ones(1), sde)
    for t in times(sde, 4):
        s = t - 0.3 * (t - sde.t_min)
        h = 0.5 * (sde.log_snr(s) - sde.log_snr(t))
        (alpha, sigma), (alpha_s, sigma_s) = sde.marginal(t), sde.marginal(s)
        x = torch.tensor([[-1.3]], dtype=torch.float64)
        silent = torch.zeros(step.evaluations, step.evaluations, dtype=torch.float64)
        mean = move(step, denoiser, x, t, s, Script(silent[0]))
        want = alpha_s * point + torch.exp(-(eta**2) * h) * sigma_s * (x - alpha * point) / sigma
        torch.testing.assert_close(mean, want, rtol=1e-9, atol=1e-9)
        impulses = torch.eye(step.evaluations, dtype=torch.float64)
        parts = torch.stack([move(step, denoiser, x, t, s, Script(impulse)) - mean for impulse in impulses])
        variance = sigma_s**2 * -torch.expm1(-2 * eta**2 * h)
        torch.testing.assert_close(parts.square().sum(), variance, rtol=1e-8, atol=1e-16)


def recursion(step: Step, sde: SDE, n: int) -> tuple[GaussianMixtureDenoiser, Tensor, Tensor, Tensor]:
    """On N(1.5, 0.25) a step is x_s = a x + b + Σ_k c_k z_k: (a, b (n,), c (n, draws)), all steps in one batch."""
    denoiser = GaussianMixtureDenoiser(torch.tensor([[1.5]]), 0.25, torch.ones(1), sde)
    ts, draws = grid(sde, n), step.evaluations
    still = torch.zeros(draws, dtype=torch.float64)
    zero, one = torch.zeros(n, 1, dtype=torch.float64), torch.ones(n, 1, dtype=torch.float64)
    b = move(step, denoiser, zero, ts[:-1], ts[1:], Script(still))
    a = move(step, denoiser, one, ts[:-1], ts[1:], Script(still)) - b
    impulses = torch.eye(draws, dtype=torch.float64)
    c = [move(step, denoiser, zero, ts[:-1], ts[1:], Script(impulse)) - b for impulse in impulses]
    return denoiser, a[:, 0], b[:, 0], torch.cat(c, 1)


@each_noisy
@pytest.mark.parametrize("name", ["vp", "ve", "flow", "ddpm"])
def test_with_noise_the_strong_order_is_one(step, name) -> None:
    """Path by path: n steps against 2n on the same Brownian motion, whose distance halves as n doubles.

    A step's draws belong to equal parts of its log-SNR. Over a part of length Δ the noise per σ obeys dν = −η² ν dℓ +
    √2 η dW, so its unit normal is made of those of the halves with shares √q/(1 + q) and 1/(1 + q), q = e^{−η²Δ}.
    The end is affine in all of them, and its mean square the sum of squared coefficients.
    """
    sde, errors = ALL[name], []
    for n in (100, 200):
        ends = []
        for m in (n, 2 * n):
            denoiser, a, b, c = recursion(step, sde, m)
            after = torch.cat([a.flip(0).cumprod(0).flip(0), torch.ones(1, dtype=torch.float64)])
            mean, var = (float(value) for value in marginal_moments(denoiser, float(grid(sde, 1)[0])))
            centre = after[0] * mean + (after[1:] * b).sum()
            ends.append((centre, after[0] * math.sqrt(var), (after[1:, None] * c).flatten()))
        (mean, start, coarse), (fine_mean, fine_start, fine) = ends
        q = math.exp(-(step.eta**2) * 3 / n / step.evaluations / 2)  # Δ is half of what ℓ moves in a coarse part
        shares = torch.tensor([q, 1.0], dtype=torch.float64) / math.sqrt(1 + q * q)
        split = (coarse[:, None] * shares).flatten()
        errors.append(math.sqrt((mean - fine_mean) ** 2 + (start - fine_start) ** 2 + (split - fine).square().sum()))
    assert step.order == 1.0
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1.0, abs=0.1)


def clamped(x: np.ndarray, values: np.ndarray) -> Callable:
    """The cubic spline through `values` at `x`, constant beyond its ends."""
    spline = make_interp_spline(x, values)
    return lambda where: spline(np.clip(where, x[0], x[-1]))


def weak_error(step: Step, sde: SDE, n: int, nodes: int = 400, points: int = 6) -> float:
    """E φ(x_s) of n steps less the exact one, φ(x) = cos 2x + sin x, on a mixture: without Monte Carlo.

    v_k(x) = E[v_{k+1}(x_s) | x_t = x] runs backwards from φ: Gauss–Hermite for each draw, a spline in x in between.
    """
    means, variances, weights = (-1.0, 1.2), (0.1, 0.2), (0.4, 0.6)
    denoiser = GaussianMixtureDenoiser(*(torch.tensor(v) for v in ([[m] for m in means], variances, weights)), sde)
    z, w = np.polynomial.hermite_e.hermegauss(points)
    draws = [part.ravel() for part in np.meshgrid(*[z] * step.evaluations)]
    share = np.prod([part.ravel() for part in np.meshgrid(*[w / w.sum()] * step.evaluations)], axis=0)

    def phi(x: np.ndarray) -> np.ndarray:
        return np.cos(2 * x) + np.sin(x)

    value: Callable = phi
    for t, s in reversed(list(pairwise(grid(sde, n)))):
        alpha, sigma = sde.marginal(t)
        reach = float(8 * sigma + 3 * alpha)
        x = np.linspace(-reach, reach, nodes)
        batch = torch.tensor(x).repeat_interleave(len(share))[:, None]
        rng = Script(torch.tensor(part).repeat(nodes)[:, None] for part in draws)
        after = value(move(step, denoiser, batch, t, s, rng).numpy()).reshape(nodes, -1) @ share
        value = clamped(x, after)

    def expectation(f: Callable, t: Tensor) -> float:
        alpha, sigma = (float(v) for v in sde.marginal(t))
        z, w = np.polynomial.hermite_e.hermegauss(60)
        parts = zip(means, variances, weights, strict=True)
        return sum(
            p * float(f(alpha * m + math.sqrt(alpha**2 * v + sigma**2) * z) @ (w / w.sum())) for m, v, p in parts
        )

    start, stop = grid(sde, 1)
    return expectation(value, start) - expectation(phi, stop)


@pytest.mark.parametrize("eta", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("name", ["vp", "flow"])
def test_with_noise_the_weak_order_is_two(name, eta) -> None:
    """Errors above 1e-4, quadrature and spline below 1e-5; the slope is 2 + O(h), h = 1/8, h (1 + η²) at most 0.6."""
    step = DPMSolver(2, eta=eta)
    coarse, fine = (weak_error(step, ALL[name], n) for n in (24, 48))
    assert abs(fine) > 1e-4
    assert math.log2(coarse / fine) == pytest.approx(2.0, abs=0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"order": 1}, "order 2 or 3"),
        ({"prediction": "v"}, "'x0' or 'eps'"),
        ({"eta": -0.1}, "eta ≥ 0"),
        ({"eta": math.nan}, "eta ≥ 0"),
        ({"prediction": "eps", "eta": 1.0}, "has no eta"),
    ],
)
def test_bad_arguments_are_refused_at_construction(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        DPMSolver(**arguments)


def test_noise_is_drawn_only_where_it_is_asked_for() -> None:
    sde = RectifiedFlow()
    denoiser = ScoreFunction(lambda x, t: -x, sde)
    x, (t, s) = torch.ones(3, 2), grid(sde, 1)
    for step in STEPS.values():
        move(step, denoiser, x, t, s, Script([]))  # an empty script refuses any draw
    with pytest.raises(IndexError):
        move(DPMSolver(eta=0.1), denoiser, x, t, s, Script([]))
