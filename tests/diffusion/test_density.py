"""log p in a fixed number of calls, with honest errors, in both directions, and with gradients."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from oracles import all_sdes, closed_form_sdes, in_turn, mixture, ring
from scipy.stats import binom
from torch import Tensor, nn

from scoresde import (
    EDM,
    VESDE,
    VPSDE,
    Denoiser,
    Exact,
    GaussianMixtureDenoiser,
    Hutchinson,
    KarrasGrid,
    Preconditioned,
    RectifiedFlow,
    Rng,
    ScoreFunction,
    SolverError,
    UniformGrid,
    log_likelihood,
)
from scoresde.diffusion.grids import check_grid
from scoresde.likelihood.budget import Budget, LikelihoodGrid
from scoresde.likelihood.divergence import Divergence, HutchPlusPlus
from scoresde.likelihood.ode import sample_with_log_prob
from scoresde.likelihood.tolerance import Tolerance

ALL = all_sdes()
each_sde = pytest.mark.parametrize("sde", ALL.values(), ids=ALL.keys())


def at_t_min(denoiser: GaussianMixtureDenoiser, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Exact draws of x at t_min, float64 (n, *event), and their exact log-density there."""
    t = torch.tensor(denoiser.sde.t_min, dtype=torch.float64)
    x0 = denoiser.sample(n, rng=Rng(seed), dtype=torch.float64)
    x = denoiser.sde.perturb(x0, t, Rng(seed + 1).normal_like(x0))
    return x, denoiser.log_prob(x, t)


def bits(error: Tensor, x: Tensor) -> float:
    return float(error.abs().mean()) / (x[0].numel() * math.log(2))


@pytest.mark.parametrize("sde", [VPSDE(0.1, 20.0), VESDE(0.01, 50.0)], ids=["vp", "ve"])
def test_the_ring_is_measured_in_few_calls(sde) -> None:
    """The promise: 0.01 bits/dim in 65 calls, 0.001 in 100. Measured 4e-4 and 1e-4: the bounds leave a factor of 5."""
    denoiser = ring(sde)
    x, exact = at_t_min(denoiser, 128)
    for budget, bound in ((65, 2e-3), (100, 5e-4)):
        result = log_likelihood(denoiser, x, divergence=Exact(), solver=Budget(budget))
        assert result.evaluations == budget
        assert bits(result.log_prob - exact, x) < bound


@each_sde
def test_every_process_is_measured(sde) -> None:
    """Mixtures of variance 0.05 to 0.5: under 1e-3 bits/dim in 50 calls, tables with their kinks included."""
    denoiser = mixture(sde, (3, 4), seed=1)
    x, exact = at_t_min(denoiser, 16)
    result = log_likelihood(denoiser, x, divergence=Exact(), solver=Budget(50))
    assert bits(result.log_prob - exact, x) < 1e-3
    assert result.latent.shape == x.shape and result.evaluations == 50


@pytest.mark.parametrize("name", ["vp", "ve", "flow"])
def test_the_error_falls_as_the_cube_of_the_calls_or_faster(name: str) -> None:
    """Quadratures are of cubics, fourth order, and the path's second-order error enters squared: at least third."""
    denoiser = mixture(closed_form_sdes()[name], (2,), seed=1)
    x, exact = at_t_min(denoiser, 32)
    errors = [
        bits(log_likelihood(denoiser, x, divergence=Exact(), solver=Budget(budget)).log_prob - exact, x)
        for budget in (65, 129, 257)
    ]
    assert math.log2(errors[0] / errors[1]) > 2.7 and math.log2(errors[1] / errors[2]) > 2.7


def test_the_adjoint_leaves_the_error_of_the_path_in_second_order(monkeypatch) -> None:
    """Without the weight of the defects the path's error enters in first order: measured 9 times the error at 40."""
    denoiser = ring(VESDE(0.01, 50.0))
    x, exact = at_t_min(denoiser, 64)

    def error() -> float:
        return bits(log_likelihood(denoiser, x, divergence=Exact(), solver=Budget(40)).log_prob - exact, x)

    with_it = error()
    monkeypatch.setattr("scoresde.likelihood.budget._TRUST", 1e9)  # defects count by ς²/(ς² + 1e18): not at all
    assert error() > 4 * with_it


@pytest.mark.parametrize("budget", [4, 5, 6, 7, 31])
@pytest.mark.parametrize("divergence", [Exact(), Hutchinson(), Hutchinson(3)], ids=["exact", "one", "three"])
def test_the_budget_is_what_is_spent(budget: int, divergence: Divergence) -> None:
    """Calls of the network, counted by the network, and they bracket the whole range of noise."""
    network = Tanh(4)
    denoiser = Preconditioned(network, VPSDE(), EDM(1.0))
    x = Rng(0).normal((5, 4))
    result = log_likelihood(denoiser, x, divergence=divergence, solver=Budget(budget))
    assert result.evaluations == len(network.noises) == budget
    ends = -VPSDE().log_snr(torch.tensor([VPSDE().t_min, VPSDE().t_max], dtype=torch.float64)) / 8
    torch.testing.assert_close(torch.stack([network.noises[0][0], network.noises[-1][0]]).double(), ends)
    assert bool(result.log_prob.isfinite().all()) and not result.log_prob.requires_grad


class Tanh(nn.Module):
    """A small network that notes the noise of every call."""

    def __init__(self, dims: int):
        super().__init__()
        self.mix = nn.Parameter(0.3 * Rng(0).normal((dims, dims)))
        self.noises: list[Tensor] = []

    def forward(self, x: Tensor, noise: Tensor, cond: Tensor | None = None) -> Tensor:
        self.noises.append(noise)
        return torch.tanh(x @ self.mix.to(x.dtype))


@pytest.mark.parametrize("cut", [None, 1e-3])
@pytest.mark.parametrize(
    "make", [lambda cut: KarrasGrid(7.0, cut), UniformGrid, LikelihoodGrid], ids=["karras", "uniform", "default"]
)
def test_a_grid_says_where_the_calls_go(make, cut) -> None:
    seen: list[float] = []
    inner = mixture(RectifiedFlow(), (2,), seed=1)

    class Noting(Denoiser):
        def forward(self, x, t, cond=None):
            seen.append(float(t[0]))
            return inner(x, t, cond)

    grid = make(cut)
    log_likelihood(Noting(inner.sde), torch.zeros(1, 2), divergence=Exact(), solver=Budget(9, grid), t_min=cut)
    torch.testing.assert_close(torch.tensor(seen, dtype=torch.float64), grid(inner.sde, 8).flip(0), rtol=1e-8, atol=0)


@each_sde
def test_the_default_grid_is_a_grid(sde) -> None:
    """Falling, with exact ends, and densest (in u, floor 0.2 against 1.2) around its centre."""
    times = check_grid(LikelihoodGrid()(sde, 64), sde)
    assert len(times) == 65 and times.dtype == torch.float64
    assert (float(times[0]), float(times[-1])) == (sde.t_max, sde.t_min)
    u = -0.5 * sde.log_snr(times)
    gaps = -u.diff()
    middle = (u[1:] + u[:-1]) / 2
    widest = gaps[(middle - math.log(0.22)).abs().argmin()]
    assert widest <= gaps.min() * 1.05 and gaps.max() < 6.5 * widest


# Honest errors

COVERED = int(binom.ppf(1e-3, 200, 0.95))
"""Of 200 intervals of 95 %, fewer than this many hold the truth once in a thousand."""


@pytest.mark.parametrize(
    ("divergence", "event"),
    [
        (Exact(), (2,)),
        (Hutchinson(1), (48,)),
        (Hutchinson(1, "gaussian"), (48,)),
        (Hutchinson(2), (12,)),
        (Hutchinson(5), (12,)),
        (HutchPlusPlus(3, 4), (12,)),
    ],
    ids=["exact", "one", "one-gaussian", "two", "five", "hutch++"],
)
@pytest.mark.parametrize("solver", [Budget(30), Tolerance(1e-4, 1e-4)], ids=["budget", "tolerance"])
def test_the_interval_covers_the_truth(divergence: Divergence, event, solver) -> None:
    """log p ± 1.96 stderr over 200 samples, each with its own probes, against the exact log-density."""
    denoiser = ring(VPSDE()) if event == (2,) else mixture(VPSDE(), event, seed=3)
    x, exact = at_t_min(denoiser, 200)
    result = log_likelihood(denoiser, x, divergence=divergence, rng=Rng(5), solver=solver)
    inside = (result.log_prob - exact).abs() <= 1.96 * result.stderr
    assert int(inside.sum()) >= COVERED
    torch.testing.assert_close(result.stderr, torch.hypot(result.divergence_error, result.solver_error))


@pytest.mark.parametrize("solver", ["budget", "tolerance"])
def test_the_solver_error_follows_the_error(solver: str) -> None:
    """Not honest by being vast: it falls with the true error, and stays within a factor of 100 of it."""
    denoiser = ring(VESDE(0.01, 50.0))
    x, exact = at_t_min(denoiser, 64)
    settings = [Budget(n) for n in (40, 80)] if solver == "budget" else [Tolerance(e, e) for e in (1e-4, 1e-6)]
    stated = []
    for setting in settings:
        result = log_likelihood(denoiser, x, divergence=Exact(), solver=setting)
        true = float((result.log_prob - exact).abs().mean())
        stated.append(float(result.solver_error.mean()))
        assert true < stated[-1] < 100 * true
    assert stated[1] < 0.3 * stated[0]


# Both directions


@pytest.mark.parametrize(("sde", "solver"), in_turn(ALL, [Budget(60), Tolerance(1e-6, 1e-6)], each=1))
def test_samples_come_with_their_density(sde, solver) -> None:
    """Against the exact mixture at the samples, and against the likelihood of the samples, solved the other way."""
    denoiser = mixture(sde, (4,), seed=2)
    x, result = sample_with_log_prob(denoiser, (32, 4), divergence=Exact(), rng=Rng(0), solver=solver)
    x = x.double()
    exact = denoiser.log_prob(x, torch.tensor(sde.t_min, dtype=torch.float64))
    back = log_likelihood(denoiser, x, divergence=Exact(), solver=solver)
    # float32 samples: x is rounded by 6e-8, the score is at most 1/σ(t_min) = 1e4 (2e-3 nats for 4 dimensions)
    assert bits(result.log_prob - exact, x) < 2e-3
    assert bits(result.log_prob - back.log_prob, x) < 2e-3
    assert result.latent.shape == (32, 4) and x.shape == (32, 4)
    if solver == Budget(60):
        assert result.evaluations == 60


def test_sampling_from_a_latent_undoes_the_encoding() -> None:
    denoiser = mixture(VPSDE(), (3, 4), seed=2)
    x, exact = at_t_min(denoiser, 8)
    there = log_likelihood(denoiser, x, divergence=Exact(), solver=Tolerance(1e-8, 1e-8))
    back, result = sample_with_log_prob(denoiser, there.latent, divergence=Exact(), solver=Tolerance(1e-8, 1e-8))
    torch.testing.assert_close(back, x, rtol=0, atol=1e-5)
    torch.testing.assert_close(result.log_prob, exact, rtol=0, atol=1e-4)


# Gradients


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 8).double()
        self.outer = nn.Linear(8, 3).double()
        with torch.no_grad():
            for k, p in enumerate(self.parameters()):
                p.copy_(0.4 * Rng(k).normal(p.shape, dtype=torch.float64))

    def forward(self, x: Tensor, noise: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.outer(torch.tanh(self.inner(x) + noise[:, None]))


@pytest.mark.parametrize("solver", [Budget(12), Tolerance(1e-7, 1e-7)], ids=["budget", "tolerance"])
@pytest.mark.parametrize(
    "divergence", [Exact(), Hutchinson(), Hutchinson(2), HutchPlusPlus(1, 2)], ids=["exact", "one", "two", "hutch++"]
)
def test_gradients_are_those_of_finite_differences(divergence: Divergence, solver) -> None:
    """d log p along a random direction in x_0 and in every parameter, by central differences of 1e-4.

    A budget is a smooth function: the difference is exact to h² and round-off/h, 1e-6. The steps of an adaptive solve
    move with x, by the tolerance: there 1e-7/h = 1e-3. A sketch is drawn anew from the moved model: Q's own motion
    leaves the estimate's mean but not its value alone, so for Hutch++ only the graph is compared, with Q held.
    """
    network = Small()
    denoiser = Preconditioned(network, VPSDE(), EDM(1.0))
    x = Rng(1).normal((2, 3), dtype=torch.float64).requires_grad_()
    if isinstance(divergence, HutchPlusPlus):
        held = divergence.probes(x.detach(), Rng(0), lambda z, ratio: z.tanh())

        class Held(HutchPlusPlus):
            def probes(self, x, rng, denoised=None):
                return held

        divergence = Held(1, 2)

    def measure(x: Tensor, differentiable: bool = False) -> Tensor:
        result = log_likelihood(
            denoiser, x, divergence=divergence, rng=Rng(3), differentiable=differentiable, solver=solver
        )
        return result.log_prob.sum()

    parameters = [x, *network.parameters()]
    total = measure(x, True)
    grads = torch.autograd.grad(total, parameters)
    directions = [Rng(9 + k).normal(p.shape, dtype=torch.float64) for k, p in enumerate(parameters)]
    expected = sum(float((g * d).sum()) for g, d in zip(grads, directions, strict=True))
    h, values = 1e-4, []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p += sign * h * d
            values.append(float(measure(x.detach())))
            for p, d in zip(parameters, directions, strict=True):
                p -= sign * h * d
    found = (values[0] - values[1]) / (2 * h)
    assert found == pytest.approx(expected, rel=1e-5 if solver == Budget(12) else 5e-3)
    assert not log_likelihood(denoiser, x, divergence=divergence, solver=solver).log_prob.requires_grad


def test_samples_carry_gradients_when_asked() -> None:
    """d log p(x(z))/dz of a Gaussian: x = a z is linear, log p(x(z)) = log N(z) + const, so the gradient is −z.

    The path is second order: its a is off by 1 % with 40 calls, by 4e-4 with 200.
    """
    denoiser = GaussianMixtureDenoiser(torch.zeros(1, 3), torch.tensor(1.0), torch.ones(1), VPSDE())
    z = Rng(0).normal((4, 3), dtype=torch.float64).requires_grad_()
    x, result = sample_with_log_prob(denoiser, z, divergence=Exact(), solver=Budget(200), differentiable=True)
    (grad,) = torch.autograd.grad(result.log_prob.sum(), z)
    torch.testing.assert_close(grad, -z.detach(), rtol=0, atol=1e-3)
    assert x.requires_grad


# Memory, neighbours, failures


def test_memory_does_not_grow_with_the_evaluations() -> None:
    """Tensors of the size of the batch that are alive at call 15 and at call 75: the same few."""
    inner = mixture(VPSDE(), (50,), covariance="diagonal")
    alive: list[int] = []

    class Watching(Denoiser):
        calls = 0

        def forward(self, x, t, cond=None):
            self.calls += 1
            if self.calls in (15, 75):
                gc.collect()  # what other tests left, too
                kept = [o for o in gc.get_objects() if type(o) is Tensor and o.numel() in (650, 663, 676, 1300)]
                alive.append(len(kept))
            return inner(x, t, cond)

    x = Rng(0).normal((13, 50), dtype=torch.float64)
    for solver in (Budget(80), Tolerance(1e-6, 1e-6)):
        alive.clear()
        log_likelihood(Watching(inner.sde), x, divergence=Hutchinson(2), solver=solver)
        assert len(alive) == 2 and alive[0] > 0 and alive[1] <= alive[0] + 8  # a step's stages: seven, and the sum


@pytest.mark.parametrize("solver", [Budget(40), Tolerance(1e-5, 1e-5)], ids=["budget", "tolerance"])
def test_a_hostile_neighbour_changes_nothing(solver) -> None:
    """A sample far out, where the field is steep, beside good ones: they come out as alone, to round-off."""
    denoiser = ring(VPSDE())
    x, _ = at_t_min(denoiser, 4)
    alone = log_likelihood(denoiser, x, divergence=Exact(), solver=solver)
    beside = log_likelihood(denoiser, torch.cat([x, 30 * x[:1]]), divergence=Exact(), solver=solver)
    torch.testing.assert_close(beside.log_prob[:4], alone.log_prob, rtol=0, atol=1e-8)
    torch.testing.assert_close(beside.stderr[:4], alone.stderr, rtol=0, atol=1e-8)


def test_a_path_that_breaks_names_its_sample() -> None:
    def score(x: Tensor, t: Tensor) -> Tensor:
        broken = (t > 0.5).reshape(-1, 1) & (x[:, 1:] > 1)
        return torch.where(broken, torch.nan, -x)

    x = torch.tensor([[0.0, 0.0], [0.0, 1e4], [1.0, 0.0]], dtype=torch.float64)
    with pytest.raises(SolverError, match="not finite") as caught:
        log_likelihood(ScoreFunction(score, VPSDE()), x, divergence=Exact(), solver=Budget(30))
    assert caught.value.samples == [1] and 0.5 < caught.value.t < 0.8 and 0 < caught.value.evaluations < 30
    with pytest.raises(SolverError, match="before the solve") as caught:
        log_likelihood(ScoreFunction(score, VPSDE()), x * math.inf, divergence=Exact(), solver=Budget(30))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rtol": 0.0, "atol": 1e-3}, "rtol is a tolerance, > 0 and finite"),
        ({"rtol": 1e-3, "atol": -1e-5}, "atol is a tolerance, > 0 and finite"),
        ({"rtol": 1e-3, "atol": 1e-3, "backend": "diffrax"}, "Unknown backend"),
        ({"rtol": 1e-3, "atol": 1e-3, "method": "rk4"}, "no method 'rk4'"),
        ({"rtol": 1e-3, "atol": 1e-3, "max_evaluations": 0}, "max_evaluations"),
        ({"calls": 3}, "at least 4; got 3"),
        ({"calls": 20.0}, "whole number .* got 20.0"),
        ({"calls": True}, "whole number .* got True"),
    ],
    ids=str,
)
def test_solvers_that_cannot_work_are_refused(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        (Budget if "calls" in settings else Tolerance)(**settings)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, TypeError, "'solver'"),
        ({"solver": Budget(20, UniformGrid(1e-2))}, ValueError, "Pass t_min="),
        ({"solver": Budget(20, lambda sde, n: UniformGrid()(sde, n + 1))}, ValueError, "needs 20 times"),
        ({"solver": Budget(4), "divergence": HutchPlusPlus()}, ValueError, "leaves 3"),
    ],
)
def test_what_cannot_work_is_refused(arguments, error, message: str) -> None:
    denoiser = mixture(VPSDE(), (2,))
    for call in (log_likelihood, sample_with_log_prob):
        with pytest.raises(error, match=message):
            call(denoiser, torch.zeros(3, 2), **arguments)
    with pytest.raises(ValueError, match="> 0 and finite"):
        LikelihoodGrid(width=0.0)
