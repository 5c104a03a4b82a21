"""log p of what flow maps make: closed forms, the exact map of a mixture, and maps that are not one to one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from flow_maps import VAR, ExactMap
from oracles import all_sdes, mixture
from torch import Tensor

from scoresde import (
    EDM,
    VPSDE,
    Budget,
    Denoiser,
    Exact,
    FlowMap,
    FlowMapSteps,
    GaussianMixtureDenoiser,
    Preconditioned,
    Rng,
    Sampler,
    SolverError,
    Tolerance,
    log_likelihood,
    sample_with_log_prob,
)
from scoresde.diffusion.conditions import named
from scoresde.diffusion.prediction import Prediction
from scoresde.evaluate import OdeLikelihood
from scoresde.nn import MLP

ALL = all_sdes()
each_sde = pytest.mark.parametrize("sde", ALL.values(), ids=ALL.keys())


class Traced(Denoiser):
    """The flow map of a denoiser, by 24 steps of RK4 along its ODE dy/dς = ε̂, even in asinh(10 ς)."""

    told = ("end",)

    def __init__(self, denoiser: Denoiser):
        super().__init__(denoiser.sde)
        self.inside = denoiser

    def forward(self, x: Tensor, t: Tensor, cond=None) -> Prediction:
        here = self.sde.at(t, x)
        end = named(cond).get("end")
        if end is None:
            return self.inside(x, t)
        there = self.sde.at(end, x)
        first, last = (scales.sigma / scales.alpha for scales in (here, there))
        a, b = (10 * first).asinh(), (10 * last).asinh()

        def slope(y: Tensor, u: Tensor) -> Tensor:
            ratio = u.sinh() / 10
            time = self.sde.time(-2 * ratio.log()).flatten().clamp(self.sde.t_min, self.sde.t_max)
            return u.cosh() / 10 * self.inside(self.sde.at(time, x).alpha * y, time).eps

        y, h = x / here.alpha, (b - a) / 24
        for k in range(24):
            u = a + k * h
            k1 = slope(y, u)
            k2 = slope(y + h / 2 * k1, u + h / 2)
            k3 = slope(y + h / 2 * k2, u + h / 2)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(y + h * k3, u + h))
        r = last / first
        g = (y - r * x / here.alpha) / (1 - r)
        return Prediction(g, (x - here.alpha * g) / here.sigma, here)


class Folding(ExactMap):
    """A map that has its end turned about, in the first dimension, where |y| is large or everywhere."""

    def forward(self, x: Tensor, t: Tensor, cond=None) -> Prediction:
        found = super().forward(x, t, cond)
        if "end" not in named(cond):
            return found
        return Prediction(x.sin(), (x - found.scales.alpha * x.sin()) / found.scales.sigma, found.scales)


def learned(**how) -> tuple[Denoiser, Tensor]:
    """A network, told where it goes, of random weights, and x_T in float64."""
    torch.manual_seed(0)
    network = MLP((3,), width=8, depth=1, told=["end"], **how).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    map = Preconditioned(network, VPSDE(), EDM(), told=["end"]).eval()
    return map, map.prior_sample((4, 3), rng=Rng(1), dtype=torch.float64)


@each_sde
@pytest.mark.parametrize("steps", [1, 3])
def test_the_exact_map_of_a_gaussian_has_its_density_to_1e_6_nats(sde, steps) -> None:
    """x_0 = k x_T in closed form, so log p(x_0) = log p_T(x_T) − D log k, both ways."""
    map = ExactMap(sde)
    latent = map.prior_sample((4, 2, 3), rng=Rng(0), dtype=torch.float64)
    (a, b), (c, d) = sde.marginal(sde.terminal), sde.marginal(torch.tensor(sde.t_min, dtype=torch.float64))
    k = ((VAR * c**2 + d**2) / (VAR * a**2 + b**2)).sqrt()
    want = map.prior_log_prob(latent) - 6 * k.log()
    solver = FlowMapSteps(steps)
    x, found = sample_with_log_prob(map, latent, solver)
    torch.testing.assert_close(x, k * latent, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.log_prob, want, rtol=0, atol=1e-6)
    assert found.evaluations == steps and found.name == "bpd/flow-map"
    assert float(found.divergence_error.abs().max()) == float(found.solver_error.abs().max()) == 0
    back = log_likelihood(map, k * latent, solver)
    torch.testing.assert_close(back.log_prob, want, rtol=0, atol=1e-6)
    torch.testing.assert_close(back.latent, latent, rtol=1e-5, atol=1e-6)
    assert float(back.stderr.max()) < 1e-6


@pytest.mark.parametrize(("name", "steps"), [("vp", 1), ("edm", 2), ("flow", 2)])
def test_the_map_of_a_mixture_has_the_density_of_its_ode(name, steps) -> None:
    """Two ways along one flow. RK4 is of order 4: 16 steps are within 4e-3 of its end, and 7e-3 nats, here, and 24
    within a fifth of that. The way back is exact, up to what it says itself."""
    sde = ALL[name]
    ring = mixture(sde, (2,), seed=1)
    map, latent = Traced(ring), ring.prior_sample((3, 2), rng=Rng(0), dtype=torch.float64)
    x, found = sample_with_log_prob(map, latent, FlowMapSteps(steps))
    want, ode = sample_with_log_prob(ring, latent, Tolerance(1e-6, 1e-6), divergence=Exact())
    torch.testing.assert_close(x, want, rtol=0, atol=2e-3)
    torch.testing.assert_close(found.log_prob, ode.log_prob, rtol=0, atol=3e-3)
    back = log_likelihood(map, x, FlowMapSteps(steps, tolerance=1e-8))
    assert bool(((back.log_prob - found.log_prob).abs() <= 1e-9 + back.solver_error).all())
    torch.testing.assert_close(back.latent, latent, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("steps", [1, 2])
def test_the_steps_of_a_network_are_those_of_the_sampler_with_autograds_determinant(steps) -> None:
    map, latent = learned(classes=2)
    label = torch.tensor([0, 1, 1, 0])
    sampler = Sampler(FlowMap(), None, steps, denoise=False)
    times = sampler.times(map).unbind()

    def run(z: Tensor, label: Tensor) -> Tensor:
        for t, s in itertools.pairwise(times):
            z = FlowMap()(map, z[None], t, s, None, cond=label, rng=Rng(0))[0][0]
        return z

    rows = [
        torch.autograd.functional.jacobian(lambda z, c=c: run(z, c), z)
        for z, c in zip(latent, label[:, None], strict=True)
    ]
    sign, log_det = torch.linalg.slogdet(torch.stack(rows))
    assert bool((sign > 0).all()), "take other weights"
    for chunk in (2, 64):
        x, found = sample_with_log_prob(map, latent, FlowMapSteps(steps, chunk=chunk), cond=label)
        torch.testing.assert_close(x, sampler(map, latent, cond=label), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(found.log_prob, map.prior_log_prob(latent) - log_det, rtol=0, atol=1e-6)
    back = log_likelihood(map, x, FlowMapSteps(steps), cond=label)
    torch.testing.assert_close(back.log_prob, found.log_prob, rtol=0, atol=1e-6)
    alone = log_likelihood(map, x[1:2], FlowMapSteps(steps), cond=label[1:2])
    torch.testing.assert_close(alone.log_prob, back.log_prob[1:2], rtol=0, atol=1e-9)


@pytest.mark.parametrize("up", [False, True])
def test_its_gradient_is_that_of_differences(up) -> None:
    map, latent = learned()
    x = sample_with_log_prob(map, latent, FlowMapSteps(2))[0] if up else latent
    weight, h = map.network.conditioning.told["end"].weight, 1e-5

    def total(**how) -> Tensor:
        solver = FlowMapSteps(2)
        found = log_likelihood(map, x, solver, **how) if up else sample_with_log_prob(map, x, solver, **how)[1]
        return found.log_prob.sum()

    (gradient,) = torch.autograd.grad(total(differentiable=True), weight)
    direction = torch.ones_like(weight)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * h * direction
        values.append(float(total()))
        with torch.no_grad():
            weight -= sign * h * direction
    assert float(gradient.sum()) == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-4, abs=1e-6)


def test_a_map_that_folds_or_does_not_reach_the_data_is_refused() -> None:
    map = Folding(VPSDE())  # ends near sin x: it folds where cos x < 0, and reaches nothing beyond ±1
    x = torch.tensor([[0.5, 0.1], [0.3, 2.0]], dtype=torch.float64)
    with pytest.raises(SolverError, match=r"folds space.*several x_T make one sample.*samples \[1\]"):
        sample_with_log_prob(map, x, FlowMapSteps())
    _, inside = sample_with_log_prob(map, x[:1], FlowMapSteps())
    assert math.isfinite(float(inside.log_prob))
    with pytest.raises(SolverError, match=r"No x_T was found that the map brings within 1e-05.*samples \[1\]"):
        log_likelihood(map, torch.tensor([[0.5, 0.1], [0.3, 3.0]], dtype=torch.float64), FlowMapSteps())


def test_what_has_no_such_density_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"renoise=True.*no function of x_T"):
        FlowMapSteps(renoise=True)
    with pytest.raises(ValueError, match="FlowMapSteps's steps"):
        FlowMapSteps(0)
    with pytest.raises(ValueError, match="tolerance"):
        FlowMapSteps(tolerance=0.0)
    usual = GaussianMixtureDenoiser(torch.zeros(1, 2), torch.tensor(VAR), torch.ones(1), VPSDE())
    with pytest.raises(ValueError, match=r"one noise level only.*scoresde-distil"):
        log_likelihood(usual, torch.zeros(1, 2), FlowMapSteps())
    with pytest.raises(ValueError, match=r"1025 × 1025"):
        log_likelihood(ExactMap(VPSDE()), torch.zeros(1, 1025), FlowMapSteps())
    with pytest.raises(ValueError, match=r"bound=null"):
        OdeLikelihood(solver=FlowMapSteps(), bound="dequantised")


def test_a_likelihood_says_whose_it_is() -> None:
    of_map, of_ode = OdeLikelihood(solver=FlowMapSteps(2)), OdeLikelihood(solver=Budget(8))
    usual = GaussianMixtureDenoiser(torch.zeros(1, 2), torch.tensor(VAR), torch.ones(1), VPSDE())
    map = ExactMap(VPSDE())
    assert "2 steps of this flow map" in of_map.whose(map) and of_map.estimator == "bpd/flow-map"
    assert "not of the samples" in of_ode.whose(map) and of_ode.estimator == "bpd/ode"
    assert of_ode.whose(usual) == ""
