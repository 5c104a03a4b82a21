"""`integrate` against problems with known solutions: order, tolerance, direction, per-sample control, failure."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from oracles import all_sdes, mixture, times
from torch import Tensor

from scoresde import Rng, SolverError
from scoresde.ode import FIXED_STEP, METHODS, integrate, log_ratio, point, probability_flow

ALL = all_sdes()
each_sde = pytest.mark.parametrize("sde", ALL.values(), ids=ALL.keys())
ADAPTIVE = [(backend, method) for backend, methods in METHODS.items() for method in methods if method not in FIXED_STEP]
ITERATED = ("implicit_adams", "fixed_adams")
ORDERS = {method: METHODS["torchdiffeq"][method] for method in FIXED_STEP if method not in ITERATED}


def rotation(u: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    """dy/du = A y with A a rotation and u-dependent speed: y(u) = R(u²/2) y(0)."""
    return u[:, None] * torch.stack([-y[:, 1], y[:, 0]], 1)


def rotated(y0: Tensor, u: float) -> Tensor:
    c, s = math.cos(u * u / 2), math.sin(u * u / 2)
    return torch.stack([c * y0[:, 0] - s * y0[:, 1], s * y0[:, 0] + c * y0[:, 1]], 1)


START = torch.tensor([[1.0, 0.0], [0.3, -2.0], [5.0, 5.0]], dtype=torch.float64)


@pytest.mark.parametrize(("backend", "method"), ADAPTIVE)
def test_solvers_keep_their_tolerance_both_ways(backend: str, method: str) -> None:
    """A neutral problem adds up local errors of 1e-6 (1 + |y|), |y| ≤ 7: 1e-3 after 100 steps; order 2 takes 800."""
    bound = 8e-3 if method in ("adaptive_heun", "bosh3", "RK23") else 1e-3
    arguments = {"rtol": 1e-6, "atol": 1e-6, "backend": backend, "method": method}
    there = integrate(rotation, START, 0.0, 3.0, **arguments)
    torch.testing.assert_close(there, rotated(START, 3.0), rtol=0, atol=bound)
    back = integrate(rotation, there, 3.0, 0.0, **arguments)
    torch.testing.assert_close(back, START, rtol=0, atol=2 * bound)


@pytest.mark.parametrize(("method", "order"), ORDERS.items())
def test_fixed_steps_have_their_order(method: str, order: int) -> None:
    errors = []
    for steps in (40, 80, 160):
        y = integrate(
            rotation, START, 0.0, 2.0, rtol=1e-9, atol=1e-9, backend="torchdiffeq", method=method, fixed_steps=steps
        )
        errors.append(float((y - rotated(START, 2.0)).abs().max()))
    slopes = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert slopes[-1] == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("method", ITERATED)
def test_an_iteration_that_does_not_converge_is_an_error(method: str) -> None:
    """torchdiffeq iterates four times and warns; here such a step ends the solve. A looser tolerance is met by four."""
    settings = {"backend": "torchdiffeq", "method": method, "fixed_steps": 40}
    with pytest.raises(SolverError, match="did not converge"):
        integrate(rotation, START, 0.0, 2.0, rtol=1e-9, atol=1e-9, **settings)
    y = integrate(rotation, START, 0.0, 2.0, rtol=1e-4, atol=1e-4, **settings)
    torch.testing.assert_close(y, rotated(START, 2.0), rtol=0, atol=40 * 1e-4 * 7)  # each step is off by up to 1e-4 |y|


def test_the_methods_named_are_those_of_the_backends() -> None:
    import scipy.integrate
    import torchdiffeq

    assert set(METHODS["torchdiffeq"]) <= set(torchdiffeq.odeint.__globals__["SOLVERS"])
    assert all(hasattr(scipy.integrate, method) for method in METHODS["scipy"])


def test_the_native_error_falls_with_the_tolerance_as_a_fifth_order_pair() -> None:
    """Error per unit step under control: work ∝ tol^{−1/5}, so 1e-9 costs (10³)^{1/5} = 4 times 1e-6, within 25 %."""
    cost, errors = [], []
    for tolerance in (1e-6, 1e-9):
        calls = []

        def counted(u: Tensor, y: Tensor, rows: Tensor, calls: list = calls) -> Tensor:
            calls.append(len(rows))
            return rotation(u, y, rows)

        y = integrate(counted, START, 0.0, 4.0, rtol=tolerance, atol=tolerance)
        cost.append(len(calls))
        errors.append(float((y - rotated(START, 4.0)).abs().max()))
    assert 3.0 < cost[1] / cost[0] < 5.0
    assert errors[1] < 1e-2 * errors[0]


def test_native_rows_are_solved_alone() -> None:
    """A stiff row takes small steps; its neighbours neither take them nor change, and leave when they are done."""
    speed = torch.tensor([1.0, 300.0, 2.0], dtype=torch.float64)
    seen: list[list[int]] = []

    def decay(u: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        seen.append(rows.tolist())
        return -speed[rows, None] * (y - u[:, None].cos())

    y0 = torch.ones(3, 2, dtype=torch.float64)
    together = integrate(decay, y0, 0.0, 2.0, rtol=1e-6, atol=1e-6)
    assert seen[-1] == [1] and sum(0 in rows for rows in seen) < 0.3 * len(seen)

    for k in (0, 2):
        alone = integrate(
            lambda u, y, rows, k=k: -speed[k] * (y - u[:, None].cos()), y0[:1], 0, 2, rtol=1e-6, atol=1e-6
        )
        assert torch.equal(alone[0], together[k])


def test_blocks_are_controlled_one_by_one() -> None:
    """One fast column among 200 idle ones: as a block of its own it is solved well, in the crowd it is outvoted."""

    def field(u: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        slope = torch.zeros_like(y)
        slope[:, -1] = 40 * (20 * u).cos()
        return slope

    y0 = torch.zeros(1, 201, dtype=torch.float64)
    exact = 2 * math.sin(20 * 1.0)
    errors = [
        abs(float(integrate(field, y0, 0.0, 1.0, rtol=1e-12, atol=1e-5, blocks=blocks)[0, -1]) - exact)
        for blocks in ([201], [200, 1])
    ]
    assert errors[1] < 1e-4 and errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("backend", METHODS)
def test_blow_up_raises(backend: str) -> None:
    """dy/du = y² from 1 is infinite at u = 1: whatever a solver makes of it, it returns no number."""
    with pytest.raises(SolverError) as caught:
        integrate(lambda u, y, rows: y**2, torch.ones(2, 1, dtype=torch.float64), 0.0, 2.0, rtol=1e-6, atol=1e-6,
                  backend=backend, max_evaluations=3000)  # fmt: skip
    assert 0 < caught.value.evaluations <= 3000 and caught.value.reason
    assert caught.value.t is None or 0.9 < caught.value.t <= 1.01


@pytest.mark.parametrize("backend", METHODS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_raise(backend: str, value: float) -> None:
    def field(u: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        return torch.where((u > 0.5)[:, None] & (rows == 1)[:, None], value, -y)

    with pytest.raises(SolverError) as caught:
        integrate(field, torch.ones(3, 2, dtype=torch.float64), 0.0, 1.0, rtol=1e-5, atol=1e-5, backend=backend)
    assert caught.value.evaluations > 0
    if backend == "native":
        assert caught.value.samples == [1] and caught.value.t == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("backend", METHODS)
def test_the_evaluation_limit_raises(backend: str) -> None:
    with pytest.raises(SolverError, match="max_evaluations=17"):
        integrate(rotation, START, 0.0, 9.0, rtol=1e-9, atol=1e-9, backend=backend, max_evaluations=17)


def test_errors_say_where() -> None:
    error = SolverError("The step size underflowed", t=0.25, evaluations=40, samples=range(20))
    assert str(error) == "The step size underflowed at t=0.25 after 40 evaluations, samples [0, 1, 2, 3, 4, 5, 6, 7]…."
    assert (error.reason, error.t, error.evaluations) == ("The step size underflowed", 0.25, 40)
    assert error.samples == list(range(20))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "diffrax"}, "choose one of native, torchdiffeq, scipy"),
        ({"method": "rk4"}, r"choose one of dopri5.*torchdiffeq"),
        ({"backend": "scipy", "method": "RK46"}, "RK46"),
        ({"backend": "torchdiffeq", "method": "dopri6"}, "dopri6"),
        ({"rtol": 0.0}, "is a tolerance, > 0 and finite"),
        ({"atol": -1.0}, "is a tolerance, > 0 and finite"),
        ({"atol": math.nan}, "is a tolerance, > 0 and finite"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_evaluated(arguments, message: str) -> None:
    def never(u: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        raise AssertionError("evaluated")

    with pytest.raises(ValueError, match=message):
        integrate(never, START, 0.0, 1.0, **{"rtol": 1e-3, "atol": 1e-3, **arguments})


@each_sde
def test_point_is_on_the_curve(sde) -> None:
    """(t, α, σ) at u = log σ/α, and back: log σ − log α = u to the accuracy of time(log_snr(t))."""
    t = times(sde, 9, ends=True)
    u = log_ratio(sde, t)
    got, alpha, sigma = point(sde, u)
    torch.testing.assert_close(got, t, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(sigma.log() - alpha.log(), u, rtol=1e-8, atol=1e-8)


@each_sde
def test_the_field_is_the_probability_flow(sde) -> None:
    """dy/du of a path x = αy against its drift: dx/dt = α̇ x̂_0 + σ̇ ε̂ and du/dt = σ̇/σ − α̇/α."""
    denoiser = mixture(sde, (3,), seed=1)
    for t in times(sde, 5):
        alpha, sigma = sde.marginal(t)
        d_alpha, d_sigma = sde.rates(t)
        x = Rng(0).normal((4, 3), dtype=torch.float64)
        velocity = denoiser(x, t).velocity
        dy_dt = velocity / alpha - x * d_alpha / alpha**2
        expected = dy_dt / (d_sigma / sigma - d_alpha / alpha)
        u = log_ratio(sde, t).expand(4)
        got = probability_flow(denoiser, x, None)(u, x / alpha, torch.arange(4))
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


def test_a_watcher_sees_every_step_and_its_error() -> None:
    """Steps of each row end at rising u, the last at the end; the sum of local errors is above the true error.

    (The stated error is that of the fourth-order solution, and a rotation does not amplify it.)
    """
    ends: list[list[float]] = [[] for _ in START]
    stated = torch.zeros(len(START), dtype=torch.float64)

    def watch(rows: Tensor, u: Tensor, slope: Tensor, error: Tensor) -> None:
        for row, end in zip(rows.tolist(), u.tolist(), strict=True):
            ends[row].append(end)
        stated[rows] += error.norm(dim=1)

    y = integrate(rotation, START, 0.0, 3.0, rtol=1e-6, atol=1e-6, watch=watch)
    for steps in ends:
        assert len(steps) > 5 and all(a < b for a, b in pairwise(steps)) and steps[-1] == pytest.approx(3.0)
    true = (y - rotated(START, 3.0)).norm(dim=1)
    assert bool((true < stated).all()) and bool((stated < 1e-3 * START.norm(dim=1)).all())


def test_autograd_passes_through_a_native_solve() -> None:
    """R(u²/2) is linear: the gradient of w·y(u) is R(−u²/2) w, to the tolerance."""
    start = START.clone().requires_grad_()
    y = integrate(rotation, start, 0.0, 2.0, rtol=1e-9, atol=1e-9)
    weight = torch.tensor([0.3, -1.2], dtype=torch.float64)
    (grad,) = torch.autograd.grad((y @ weight).sum(), start)
    c, s = math.cos(2.0), math.sin(2.0)
    expected = torch.stack([c * weight[0] + s * weight[1], -s * weight[0] + c * weight[1]])
    torch.testing.assert_close(grad, expected.expand(3, 2), rtol=0, atol=1e-6)
