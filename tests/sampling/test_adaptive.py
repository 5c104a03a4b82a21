"""The probability-flow ODE by every backend: against closed forms, against each other, there and back, and failing."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from oracles import EVENT_SHAPES, all_sdes, in_turn, mixture
from torch import Tensor

from scoresde import (
    SDE,
    VPSDE,
    AdaptiveODE,
    GaussianMixtureDenoiser,
    LogSNRGrid,
    Rng,
    Sampler,
    ScoreFunction,
    SolverError,
)
from scoresde.diffusion.denoiser import CountingDenoiser

ALL = all_sdes()
each_sde = pytest.mark.parametrize("sde", ALL.values(), ids=ALL.keys())
BACKENDS = ["native", "torchdiffeq", "scipy"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)

CONTROLLED = [
    ("native", "dopri5"),
    ("torchdiffeq", "dopri5"),
    ("torchdiffeq", "dopri8"),
    ("torchdiffeq", "bosh3"),
    ("torchdiffeq", "adaptive_heun"),
    ("scipy", "RK45"),
    ("scipy", "RK23"),
    ("scipy", "DOP853"),
    ("scipy", "Radau"),
    ("scipy", "BDF"),
    ("scipy", "LSODA"),
]
FIXED_ORDERS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4, "explicit_adams": 4}


def ends(sde: SDE) -> tuple[Tensor, Tensor]:
    start, stop = torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)
    return start, stop


def at_t_min(denoiser: GaussianMixtureDenoiser, n: int) -> Tensor:
    """Exact draws of x at t_min, float64 (n, *event)."""
    x0 = denoiser.sample(n, rng=Rng(3), dtype=torch.float64)
    return denoiser.sde.perturb(x0, denoiser.sde.t_min, Rng(4).normal(x0.shape, dtype=torch.float64))


@cache
def reference(name: str) -> tuple[GaussianMixtureDenoiser, Tensor, Tensor]:
    """A mixture, a batch of its prior, and where the probability flow takes it, to 1e-9."""
    denoiser = mixture(ALL[name], (3,), seed=6)
    x = denoiser.prior_sample((16, 3), rng=Rng(0), dtype=torch.float64)
    return denoiser, x, AdaptiveODE(1e-9, 1e-9, "native").move(denoiser, x, *ends(denoiser.sde))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("backend", "method"), CONTROLLED)
def test_methods_with_step_control_keep_their_tolerance(name, backend, method) -> None:
    """From the prior to data, against the same ODE to 1e-9.

    Errors of the some 50 to 500 steps add up, but the flow contracts what was made early: 30 tolerances hold for all.
    Of the root mean square, which is what the controls bound; a sample that starts where two modes part has no bound.
    """
    denoiser, x, exact = reference(name)
    tolerance = 1e-3
    got = AdaptiveODE(tolerance, tolerance, backend, method).move(denoiser, x, *ends(denoiser.sde))
    assert float((got - exact).square().mean().sqrt()) < 30 * tolerance


@pytest.mark.parametrize("method", FIXED_ORDERS)
def test_fixed_step_methods_have_their_order(method) -> None:
    """λ ∈ [−3, 3] in 80 and 160 equal steps; slope p + O(h)."""
    sde = VPSDE()
    denoiser = mixture(sde, (2,), seed=1)
    start, stop = sde.time(torch.tensor([-3.0, 3.0], dtype=torch.float64))
    x = sde.perturb(at_t_min(denoiser, 8), start, Rng(1).normal((8, 2), dtype=torch.float64))
    exact = AdaptiveODE(1e-10, 1e-10, "native").move(denoiser, x, start, stop)
    coarse, fine = (
        float((solver.move(denoiser, x, start, stop) - exact).square().mean().sqrt())
        for solver in (AdaptiveODE(backend="torchdiffeq", method=method, fixed_steps=n) for n in (80, 160))
    )
    assert math.log2(coarse / fine) == pytest.approx(FIXED_ORDERS[method], abs=0.1)


@pytest.mark.parametrize("method", ["implicit_adams", "fixed_adams"])
def test_predictor_corrector_adams_reaches_its_tolerance(method) -> None:
    sde = VPSDE()
    denoiser = mixture(sde, (2,), seed=1)
    start, stop = sde.time(torch.tensor([-3.0, 3.0], dtype=torch.float64))
    x = sde.perturb(at_t_min(denoiser, 8), start, Rng(1).normal((8, 2), dtype=torch.float64))
    exact = AdaptiveODE(1e-10, 1e-10, "native").move(denoiser, x, start, stop)
    got = AdaptiveODE(1e-8, 1e-8, "torchdiffeq", method, fixed_steps=100).move(denoiser, x, start, stop)
    assert float((got - exact).abs().max()) < 30e-8


@pytest.mark.parametrize(("sde", "backend"), in_turn(ALL, BACKENDS, each=2))
def test_the_map_of_a_gaussian_is_its_closed_form(sde, backend) -> None:
    """x_s = α_s m + √((α_s² v + σ_s²)/(α_t² v + σ_t²)) (x_t − α_t m), both ways, per dimension.

    Within 100 tolerances: y = x/α starts as large as ς, up to 10³, and rtol acts on that.
    """
    m, v = torch.tensor([0.5, -2.0, 0.0]).double(), torch.tensor([0.01, 1.0, 4.0]).double()
    denoiser = GaussianMixtureDenoiser(m[None], v[None], torch.ones(1), sde)
    solver, (start, stop) = AdaptiveODE(1e-6, 1e-6, backend), ends(sde)
    (alpha, sigma), (alpha_s, sigma_s) = sde.marginal(start), sde.marginal(stop)
    x = denoiser.prior_sample((5, 3), rng=Rng(0), dtype=torch.float64)
    ratio = ((alpha_s**2 * v + sigma_s**2) / (alpha**2 * v + sigma**2)).sqrt()
    want = alpha_s * m + ratio * (x - alpha * m)
    got = solver.move(denoiser, x, start, stop)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(Sampler(solver, denoise=False)(denoiser, x), got, rtol=0, atol=0)
    torch.testing.assert_close(solver.encode(denoiser, want), x, rtol=1e-4, atol=1e-4 * float(sigma))


@pytest.mark.parametrize(("sde", "backend"), in_turn(ALL, BACKENDS, each=2))
def test_encode_then_sample_is_the_identity(sde, backend) -> None:
    """Two solves, each within 30 tolerances of the flow (as above), the first seen through the flow's slope ≤ 1."""
    tolerance = 1e-4
    denoiser, solver = mixture(sde, (3, 4, 4), covariance="diagonal"), AdaptiveODE(tolerance, tolerance, backend)
    x = at_t_min(denoiser, 2)
    z = solver.encode(denoiser, x)
    assert z.shape == x.shape and z.dtype == x.dtype and not z.requires_grad
    back = Sampler(solver, denoise=False)(denoiser, z)
    assert float((back - x).abs().max()) < 60 * tolerance
    assert float((z - x).abs().max()) > 0.1  # and the latent is another point
    parts = Sampler(solver, LogSNRGrid(), steps=3, denoise=False)(denoiser, z)  # a grid cuts the solve in three
    assert float((parts - x).abs().max()) < 120 * tolerance


@each_backend
def test_the_error_falls_with_the_tolerance(backend) -> None:
    """By at least a third of each factor of 100, and never above 30 tolerances."""
    denoiser, x, exact = reference("vp")
    errors, calls = [], []
    for tolerance in (1e-3, 1e-5, 1e-7):
        counted = CountingDenoiser(denoiser)
        y = AdaptiveODE(tolerance, tolerance, backend).move(counted, x, *ends(denoiser.sde))
        errors.append(float((y - exact).abs().max()))
        calls.append(counted.evaluations)
        assert errors[-1] < 30 * tolerance
    assert errors[0] > 33 * errors[1] and errors[1] > 33 * errors[2]
    assert calls[0] < calls[1] < calls[2]


@pytest.mark.parametrize("name", ALL)
def test_native_solves_every_sample_alone(name) -> None:
    """Step sizes follow each sample's own error: alone, reordered, or beside one that is hard, to round-off."""
    (denoiser, x, _), solver = reference(name), AdaptiveODE(1e-5, 1e-5, "native")
    start, stop = ends(denoiser.sde)
    batch = solver.move(denoiser, x, start, stop)
    for k in (1, 2):
        alone = solver.move(denoiser, x[k : k + 1], start, stop)
        torch.testing.assert_close(alone, batch[k : k + 1], rtol=1e-10, atol=1e-10)
    hard = torch.cat([x.flip(0), 1e3 * x[:1]])
    torch.testing.assert_close(solver.move(denoiser, hard, start, stop)[:-1], batch.flip(0), rtol=1e-10, atol=1e-10)


@each_backend
@pytest.mark.parametrize("event", EVENT_SHAPES, ids=str)
def test_float32_states_are_solved_in_float64(backend, event) -> None:
    """A float32 network limits the result, not the solver's sums: within 10 tolerances of the float64 run."""
    denoiser, solver = mixture(VPSDE(), event, covariance="diagonal"), AdaptiveODE(1e-5, 1e-5, backend)
    x = denoiser.prior_sample((2, *event), rng=Rng(0), dtype=torch.float32)
    start, stop = ends(denoiser.sde)
    got, exact = (solver.move(denoiser, value, start, stop) for value in (x, x.double()))
    assert got.dtype == torch.float32 and got.shape == (2, *event)
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-4)


def test_conditions_follow_their_samples() -> None:
    """The native solver drops samples that have arrived: each still sees its own condition, a tensor or in a mapping.

    Data in one point c per sample: x_s = α_s c + σ_s (x_t − α_t c)/σ_t.
    """
    sde = VPSDE()

    def score(x: Tensor, t: Tensor, cond) -> Tensor:
        point = cond["point"] if isinstance(cond, dict) else cond
        scales = sde.at(t, x)
        return (scales.alpha * point - x) / scales.sigma**2

    start, stop = ends(sde)
    (alpha, sigma), (alpha_s, sigma_s) = sde.marginal(start), sde.marginal(stop)
    points = torch.tensor([[0.0, 0.0], [30.0, -30.0], [1.0, 2.0]], dtype=torch.float64)
    x = Rng(0).normal((3, 2), dtype=torch.float64)
    want = alpha_s * points + sigma_s * (x - alpha * points) / sigma
    for backend in ("native", "torchdiffeq", "scipy"):
        for cond in (points, {"point": points}):
            solver = AdaptiveODE(1e-8, 1e-8, backend)
            got = solver.move(ScoreFunction(score, sde), x, start, stop, cond=cond)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


FAILING = [
    ("native", "dopri5"),
    ("torchdiffeq", "dopri5"),
    ("torchdiffeq", "dopri8"),
    ("torchdiffeq", "bosh3"),
    ("torchdiffeq", "rk4"),
    ("torchdiffeq", "explicit_adams"),
    ("scipy", "RK45"),
    ("scipy", "RK23"),
    ("scipy", "DOP853"),
    ("scipy", "LSODA"),
    ("scipy", "BDF"),
    ("scipy", "Radau"),
]


@pytest.mark.parametrize(("backend", "method"), FAILING)
@pytest.mark.parametrize("way", ["encode", "sample"])
def test_a_field_that_is_not_finite_is_an_error(backend, method, way) -> None:
    """NaN beyond t = 0.5 in one sample: no number comes back; who and where, as far as the backend tells samples apart.

    Native stops at the edge and names the sample; the others control the batch as one, and so do not.
    """
    sde = VPSDE()

    def score(x: Tensor, t: Tensor) -> Tensor:
        bad = (t > 0.5 if way == "encode" else t < 0.5)[:, None] & (x[:, 1:].abs() > 90)
        return torch.where(bad, torch.nan, -x)

    x = torch.tensor([[0.0, 0.0], [0.0, 1e4], [1.0, 0.0]], dtype=torch.float64)
    solver, denoiser = AdaptiveODE(backend=backend, method=method), CountingDenoiser(ScoreFunction(score, sde))
    with pytest.raises(SolverError) as caught:
        solver.encode(denoiser, x) if way == "encode" else solver.move(denoiser, x, *ends(sde))
    error = caught.value
    assert error.evaluations == denoiser.evaluations > 0 and error.reason and error.reason in str(error)
    assert error.samples in ([], [1]) and (error.t is None or sde.t_min <= error.t <= sde.t_max)
    if backend == "native":
        assert error.samples == [1] and error.t == pytest.approx(0.5, abs=1e-6)


@each_backend
def test_a_limit_on_evaluations_is_an_error(backend) -> None:
    denoiser = CountingDenoiser(mixture(VPSDE(), (2,)))
    with pytest.raises(SolverError, match="max_evaluations=20") as caught:
        Sampler(AdaptiveODE(backend=backend, max_evaluations=20))(denoiser, (3, 2))
    assert caught.value.evaluations == denoiser.evaluations == 20
    assert caught.value.samples == [0, 1, 2] and 0 < caught.value.t < 1


@each_backend
def test_a_start_that_is_not_finite_is_an_error(backend) -> None:
    denoiser = CountingDenoiser(mixture(VPSDE(), (2,)))
    x = torch.zeros(4, 2)
    x[2, 1] = torch.inf
    with pytest.raises(SolverError, match="before the solve") as caught:
        Sampler(AdaptiveODE(backend=backend))(denoiser, x)
    assert caught.value.samples == [2] and caught.value.t == pytest.approx(1.0) and denoiser.evaluations == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "diffrax"}, "Unknown backend"),
        ({"method": "RK45"}, "backend='scipy'"),
        ({"backend": "scipy", "method": "dopri5"}, "RK45, RK23"),
        ({"backend": "scipy", "method": "rk4"}, "backend='torchdiffeq'"),
        ({"backend": "native", "method": "bosh3"}, "backend='torchdiffeq'"),
        ({"method": "rk5"}, "no method 'rk5'"),
        ({"rtol": 0.0}, "is a tolerance, > 0 and finite"),
        ({"atol": -1e-5}, "is a tolerance, > 0 and finite"),
        ({"rtol": math.nan}, "is a tolerance, > 0 and finite"),
        ({"fixed_steps": 0}, "at least 1"),
        ({"max_evaluations": 0}, "at least 1"),
    ],
)
def test_bad_arguments_are_refused_at_construction(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveODE(**arguments)


@each_backend
def test_a_time_per_sample_is_refused(backend) -> None:
    denoiser = CountingDenoiser(mixture(VPSDE(), (2,)))
    x, (start, stop) = torch.zeros(3, 2), ends(denoiser.sde)
    for times in ((start.expand(3), stop), (start, stop.expand(3))):
        with pytest.raises(ValueError, match="scalar times"):
            AdaptiveODE(backend=backend)(denoiser, x, *times, None, cond=None, rng=Rng(0))
    assert denoiser.evaluations == 0
