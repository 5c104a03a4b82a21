"""Bare functions of other libraries, a score or a denoiser, under every step: the numbers of the exact denoiser."""

from __future__ import annotations

import pytest
import torch
from oracles import EVENT_SHAPES, all_sdes, mixture, times
from torch import Tensor

import scoresde
from scoresde import (
    EDMSDE,
    VPSDE,
    AnnealedLangevin,
    EulerMaruyama,
    GaussianMixtureDenoiser,
    KarrasGrid,
    Langevin,
    LogSNRGrid,
    Multistep,
    PredictorCorrector,
    Rng,
    Sampler,
    ScoreFunction,
    Step,
)
from scoresde.diffusion.denoiser import CountingDenoiser, DenoiserFunction
from scoresde.sampling.adaptive_sde import AdaptiveSDE
from scoresde.sampling.churn import Churn
from scoresde.sampling.restart import Restart
from scoresde.sampling.runge_kutta import RK4, DPMSolver, Midpoint
from scoresde.sampling.torch_sde import TorchSDE

ALL = all_sdes()
each_sde = pytest.mark.parametrize("sde", ALL.values(), ids=ALL.keys())


def steps() -> dict[str, Step]:
    """Every step of the library with its defaults; correctors behind a predictor.

    Those of `scoresde.inverse` need an observation: tests/inverse/test_inverse.py has them.
    """
    public = (getattr(scoresde, name) for name in scoresde.__all__)
    kinds = {kind for kind in public if isinstance(kind, type) and issubclass(kind, Step)} - {Step}
    kinds -= {scoresde.FlowMap}  # needs a model that is told where it goes, which these functions are not
    kinds = {kind for kind in kinds if not kind.__module__.startswith("scoresde.inverse")}
    kinds |= {RK4, AdaptiveSDE, Churn, DPMSolver, Midpoint, Restart, TorchSDE}
    special = {
        PredictorCorrector: lambda: PredictorCorrector(EulerMaruyama(), Langevin()),
        Langevin: lambda: PredictorCorrector(EulerMaruyama(), Langevin()),
        AnnealedLangevin: lambda: PredictorCorrector(EulerMaruyama(), AnnealedLangevin()),
        Multistep: lambda: Multistep(3),
    }
    return {kind.__name__: special.get(kind, kind)() for kind in sorted(kinds, key=lambda kind: kind.__name__)}


STEPS = steps()


def exact_denoiser(mixture: GaussianMixtureDenoiser, y: Tensor, ratio: Tensor) -> Tensor:
    """E[x_0 | y = x_0 + ς ε] = y + ς² ∇ log p_ς(y) by Tweedie's formula and autograd, apart from any SDE of ours."""
    y = y.double().detach().requires_grad_()
    with torch.enable_grad():
        centred = y.flatten(1)[:, None] - mixture.means
        variance = mixture.variances.expand_as(mixture.means) + ratio.double()[:, None, None] ** 2
        logs = mixture.log_weights - 0.5 * (centred**2 / variance + variance.log()).sum(-1)
        (score,) = torch.autograd.grad(logs.logsumexp(-1).sum(), y)
    return y.detach() + ratio.double().reshape(-1, *[1] * (y.ndim - 1)) ** 2 * score


def functions(denoiser: GaussianMixtureDenoiser) -> dict[str, scoresde.Denoiser]:
    """The same knowledge as a bare score and as a bare denoiser."""
    sde = denoiser.sde

    def score(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == x.shape[:1]
        return denoiser(x, t).score

    def denoise(y: Tensor, ratio: Tensor) -> Tensor:
        assert ratio.shape == y.shape[:1]
        return exact_denoiser(denoiser, y, ratio)

    spread = {"data_std": denoiser.data_std}
    return {"score": ScoreFunction(score, sde, **spread), "denoiser": DenoiserFunction(denoise, sde, **spread)}


@each_sde
@pytest.mark.parametrize("event", EVENT_SHAPES, ids=str)
def test_a_bare_denoiser_is_a_prediction_under_every_sde(sde, event) -> None:
    """Both ends of time, times shared or per sample: x̂_0, ε̂ and the score of the mixture, and x = α x̂_0 + σ ε̂.

    ε̂ = (x − α x̂_0)/σ loses what x̂_0 has in common with x: 1e-13/σ.
    """
    denoiser = mixture(sde, event, covariance="diagonal")
    bare = functions(denoiser)["denoiser"]
    at = times(sde, 3, ends=True)
    x0 = denoiser.sample(5, rng=Rng(0), dtype=torch.float64)
    x = sde.perturb(x0, at, Rng(1).normal(x0.shape, dtype=torch.float64))
    got, want = bare(x, at), denoiser(x, at)
    torch.testing.assert_close(got.x0, want.x0, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(got.eps, want.eps, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(got.scales.alpha * got.x0 + got.scales.sigma * got.eps, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(bare(x, at[2]).x0, denoiser(x, at[2]).x0, rtol=1e-8, atol=1e-8)
    single = bare(x.float(), at.float())
    assert single.eps.shape == x.shape


@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_every_step_is_driven_by_bare_functions(step, name) -> None:
    """The samples of the exact denoiser from the same prior and seed, with as many calls.

    In float64 both functions give ε̂ to 1e-9, which adaptive steps may turn into 1e-6 where one lies on an edge.
    """
    sde = ALL[name]
    denoiser = mixture(sde, (3,), covariance="isotropic")
    grid = LogSNRGrid(t_end=float(sde.time(torch.tensor(6.0, dtype=torch.float64))))
    sampler = Sampler(step, grid, steps=min(step.default_steps, 6))
    x = denoiser.prior_sample((4, 3), rng=Rng(0), dtype=torch.float64)
    counted = CountingDenoiser(denoiser)
    want = sampler(counted, x, rng=Rng(1))
    for bare in functions(denoiser).values():
        trace = list(sampler.iterate(bare, x, rng=Rng(1)))[-1]
        torch.testing.assert_close(trace.x, want, rtol=1e-5, atol=1e-5)
        assert trace.evaluations == counted.evaluations


def test_edm_is_the_default_and_hands_x_and_sigma_over_as_they_are() -> None:
    seen = []

    def fn(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append((x, sigma))
        return 0.25 / (0.25 + sigma[:, None] ** 2) * x

    denoiser = DenoiserFunction(fn, data_std=0.5)
    assert type(denoiser.sde) is EDMSDE and denoiser.data_std == 0.5
    x, t = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 1.0, 50.0])
    denoiser(x, t)
    assert torch.equal(seen[0][0], x) and torch.equal(seen[0][1], t)
    # and samples N(0, 1/4): 2000 draws of 2 numbers, 5 standard errors of their variance (√(2/4000) of it), beside
    # which the error of 72 steps of Heun is small: a 16th of the 10 % that 18 steps leave
    samples = Sampler(scoresde.Heun(), KarrasGrid(), steps=72)(denoiser, (2000, 2), rng=Rng(0))
    assert float(samples.var(0).mean()) == pytest.approx(0.25, rel=5 * (2 / 4000) ** 0.5)


def test_conditions_reach_the_function() -> None:
    denoiser = DenoiserFunction(lambda y, ratio, cond: cond.expand_as(y), VPSDE())
    x, cond = torch.ones(2, 3), torch.tensor([[1.0], [2.0]])
    torch.testing.assert_close(denoiser(x, torch.tensor(0.5), cond).x0, cond.expand(2, 3))


@pytest.mark.parametrize("kind", [ScoreFunction, DenoiserFunction])
def test_a_wrong_shape_or_spread_is_refused(kind) -> None:
    with pytest.raises(ValueError, match="expected that of x"):
        kind(lambda x, t: x[:, :1], VPSDE())(torch.ones(2, 3), torch.tensor(0.5))
    with pytest.raises(ValueError, match="data_std"):
        kind(lambda x, t: x, VPSDE(), data_std=0.0)
