"""Posterior methods against closed forms: a Gaussian prior is solved exactly, a mixture's posterior is a mixture."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from oracles import all_sdes, data_moments, mean_and_stderr, mixture, start, times
from posterior import Shifted, log_evidence, matrix, mode_weights, observed, posterior
from torch import Tensor

import scoresde
from scoresde import (
    VESDE,
    VPSDE,
    Adams,
    AdaptiveODE,
    AdaptiveSDE,
    Ancestral,
    AnnealedLangevin,
    DPMSolverPP,
    EulerMaruyama,
    Exact,
    GaussianMixtureDenoiser,
    Langevin,
    LogisticGrid,
    LogSNRGrid,
    Multistep,
    Prediction,
    PredictorCorrector,
    Restart,
    Rng,
    Sampler,
    Step,
    UniPC,
    elbo,
    log_likelihood,
    sample_with_log_prob,
    sampling,
)
from scoresde.diffusion.denoiser import CountingDenoiser, DenoiserWrapper
from scoresde.inverse import (
    DPS,
    MMPS,
    TMPD,
    DiffPIR,
    DownSample,
    Magnitude,
    Mask,
    Observation,
    PiGDM,
    RandomProjection,
    RePaint,
    Replacement,
    TwistedSMC,
)
from scoresde.inverse.particles import _systematic
from scoresde.likelihood.budget import Budget
from scoresde.likelihood.tolerance import Tolerance

ALL = all_sdes()
each_sde = pytest.mark.parametrize("sde", ALL.values(), ids=ALL.keys())
DENOISERS = {"PiGDM": PiGDM, "TMPD": TMPD, "MMPS": MMPS, "DPS": DPS, "DiffPIR": DiffPIR}


def one(sde, covariance: str, dims: int = 5, scale: float = 0.7) -> GaussianMixtureDenoiser:
    """One Gaussian of mean 1, …: isotropic of standard deviation `scale`, diagonal, or full."""
    prior = mixture(sde, (dims,), 1, seed=3, covariance=covariance)
    if covariance == "isotropic":
        prior = GaussianMixtureDenoiser(prior.means, scale**2, torch.ones(1), sde)
    return prior


EXACT = {
    "PiGDM, isotropic": (partial(PiGDM, sigma_data=0.7), "isotropic"),
    "TMPD, diagonal": (TMPD, "diagonal"),
    "MMPS, full": (MMPS, "full"),
    "PiGDM by products": (partial(PiGDM, sigma_data=0.7, iterations=2, tolerance=1e-14), "isotropic"),
}


@each_sde
@pytest.mark.parametrize(("method", "covariance"), EXACT.values(), ids=EXACT.keys())
def test_a_gaussian_prior_is_solved_exactly(method, covariance, sde) -> None:
    """x̂_0 and ε̂ of the exact posterior, and log p(y|x_t), at five times up to both ends.

    Solves of float64 with condition numbers up to 1e3; S is lifted by 1e-10 of itself where it is written out. Two
    products of conjugate gradients do for the mask, as A Aᵀ has two eigenvalues.
    """
    prior = one(sde, covariance)
    by_products = method.keywords.get("iterations") == 2 if isinstance(method, partial) else False
    operator = Mask(torch.tensor([1, 0, 1, 1, 0])) if by_products else RandomProjection(3, (5,))
    seen, a, y = observed(prior, operator, 0.1)
    exact = posterior(prior, a, y, 0.1)
    for t in times(sde, 3, ends=True):
        x = start(prior, t, 4)
        got, want = method(prior, seen).predict(x, t), exact(x, t)
        torch.testing.assert_close(got.posterior.x0, want.x0, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(got.posterior.eps, want.eps, rtol=1e-6, atol=1e-6)
        assert torch.equal(got.prior.x0, prior(x, t).x0)
        both = method(prior, seen)(x, t.expand(4))  # times of their own
        torch.testing.assert_close(both.eps, got.posterior.eps)
        if not by_products:
            torch.testing.assert_close(got.log_prob, log_evidence(prior, a, y, 0.1, x, t), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("method", [PiGDM, TMPD, MMPS, DPS, DiffPIR])
def test_what_is_painted_into_a_hole_is_of_no_account(method) -> None:
    """More entries than are solved exactly, no noise, and two pictures that differ where nothing was seen."""
    sde, mask = VPSDE(), torch.arange(100) % 3 == 0
    prior = GaussianMixtureDenoiser(torch.zeros(1, 100), 0.5, torch.ones(1), sde)
    y = prior.sample(1, rng=Rng(1), dtype=torch.float64)[0]
    plain, painted = (method(prior, Observation(z, Mask(mask))) for z in (y * mask, y * mask + 3 * ~mask))
    for t in times(sde, 3):
        x = start(prior, t, 2)
        got, want = painted.predict(x, t), plain.predict(x, t)
        torch.testing.assert_close(got.posterior.x0, want.posterior.x0, rtol=0, atol=0)
        torch.testing.assert_close(got.log_prob, want.log_prob, rtol=0, atol=0)
    x = Sampler(scoresde.DDIM(eta=1.0), LogisticGrid(), 20)(painted, (4, 100), rng=Rng(2))
    assert (x - y)[:, mask].abs().max() < 1e-4  # t_min


def test_free_guidance_goes_around_a_posterior_denoiser() -> None:
    """y goes to both branches, and the label to one: as if y were the Observation's own."""
    torch.manual_seed(0)
    network = scoresde.nn.MLP((3,), width=8, depth=1, classes=2, cond_dropout=0.1).double().eval()
    torch.nn.init.normal_(network.outlet.weight)
    model = scoresde.Preconditioned(network, VPSDE(), scoresde.EDM())
    y, label = torch.tensor([[0.3], [-0.2]], dtype=torch.float64), torch.tensor([0, 1])
    operator, t = RandomProjection(1, (3,)), torch.tensor(0.4, dtype=torch.float64)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    without, conditional = (PiGDM(model, Observation(y, operator, 0.1))(x, t, cond) for cond in (None, label))
    free = PiGDM(model, Observation(None, operator, 0.1))
    for scale in (0.0, 0.5, 2.0):
        want = without.blend(conditional, scale)
        for cond in ({"y": y, "cond": label}, {"y": y, "label": label}):
            got = scoresde.ClassifierFree(free, scale)(x, t, cond)
            torch.testing.assert_close(got.x0, want.x0)


@each_sde
def test_the_oracle_is_bayes_rule(sde) -> None:
    """Two derivations of one mixture: the prior shifted by ∇ log p(y|x_t), and the posterior's own denoiser."""
    prior = mixture(sde, (4,), 3, seed=1)
    _, a, y = observed(prior, RandomProjection(2, (4,)), 0.2)
    exact, found = posterior(prior, a, y, 0.2), Shifted(prior, a, y, 0.2)
    for t in times(sde, 3):
        x = start(prior, t, 4)
        torch.testing.assert_close(found(x, t).x0, exact(x, t).x0, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(found(x, t).eps, exact(x, t).eps, rtol=1e-7, atol=1e-8)


@each_sde
def test_mmps_has_the_exact_covariance_under_every_sde(sde) -> None:
    """(σ²/α) ∂x̂_0/∂x_t = Cov[x_0|x_t], which is that of the posterior of x_0 seen as x_t = α x_0 + σ ε; in float64."""
    prior = mixture(sde, (4,), 3, seed=2)
    seen = Observation(torch.zeros(4, dtype=torch.float64), Mask(torch.ones(4)), 0.3)
    for t in times(sde, 3):
        alpha, sigma = sde.marginal(t)
        x = start(prior, t, 2)
        found = MMPS(prior, seen).predict(x, t)
        for k in range(2):
            given = posterior(prior, alpha * torch.eye(4, dtype=torch.float64), x[k], float(sigma))
            mean, cov = data_moments(given)
            s = cov + 0.09 * torch.eye(4, dtype=torch.float64)
            want = mean - cov @ torch.linalg.solve(s, mean)
            torch.testing.assert_close(found.prior.x0[k], mean, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(found.posterior.x0[k], want, rtol=1e-5, atol=1e-6)
            log_prob = torch.distributions.MultivariateNormal(mean, s).log_prob(torch.zeros(4, dtype=torch.float64))
            torch.testing.assert_close(found.log_prob[k], log_prob, rtol=1e-5, atol=1e-5)


def test_products_with_the_jacobian_do_what_the_written_out_matrix_does() -> None:
    """MMPS with 12 entries of y by conjugate gradients to 1e-9, and by Cholesky; far from converged it is not."""
    sde, t = VPSDE(), torch.tensor(0.3, dtype=torch.float64)
    prior = mixture(sde, (3, 4), 2, seed=4)
    seen, *_ = observed(prior, Mask(torch.ones(3, 4)), 0.2)
    x = start(prior, t, 3)
    whole = MMPS(prior, seen, iterations=12)(x, t).x0
    torch.testing.assert_close(MMPS(prior, seen, iterations=11, tolerance=1e-9)(x, t).x0, whole, rtol=1e-2, atol=1e-2)
    assert float((MMPS(prior, seen, iterations=1)(x, t).x0 - whole).abs().max()) > 0.03


@each_sde
def test_diffpir_is_the_minimiser(sde) -> None:
    """Of ‖y − A x‖²/std² + λ (α/σ)² ‖x − x̂_0‖², by the normal equations; and x_t = α x̂_0 + σ ε̂ holds."""
    prior = mixture(sde, (5,), 2, seed=1)
    seen, a, y = observed(prior, RandomProjection(3, (5,)), 0.3)
    for t in times(sde, 3):
        x = start(prior, t, 3)
        alpha, sigma = sde.marginal(t)
        weight = 1.7 * (alpha / sigma) ** 2
        plain, found = prior(x, t), DiffPIR(prior, seen, 1.7)(x, t)
        hessian = a.mT @ a / 0.09 + weight * torch.eye(5, dtype=torch.float64)
        want = torch.linalg.solve(hessian, (y @ a / 0.09 + weight * plain.x0).mT).mT
        torch.testing.assert_close(found.x0, want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(alpha * found.x0 + sigma * found.eps, x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("linear", [True, False])
def test_dps_is_the_gradient_of_its_residual(linear) -> None:
    """δ = −scale ∇‖y − A(x̂_0(x))‖²/2s² by autograd, over what the mask sees, s² held fixed and from dense Jacobians."""
    sde, t, std = VPSDE(), torch.tensor(0.3, dtype=torch.float64), 0.05
    prior = mixture(sde, (6,), 3, seed=5)
    mask = Mask(torch.tensor([1, 0, 0, 1, 0, 0]))

    def operator(x: Tensor) -> Tensor:
        return mask(x) if linear else mask(x) ** 3

    y = torch.tensor([0.3, 9.0, 0, -0.2, 0, 0], dtype=torch.float64)  # 9 is of no account
    x = start(prior, t, 1).requires_grad_()
    plain, (alpha, sigma) = prior(x, t), sde.marginal(t)
    residual = (y - operator(plain.x0))[0] * mask.mask
    slope = torch.autograd.functional.jacobian(operator, plain.x0)[0, :, 0]
    cov = sigma**2 / alpha * torch.autograd.functional.jacobian(lambda z: prior(z, t).x0, x)[0, :, 0]
    variance = (std**2 + residual @ slope @ cov @ slope.mT @ residual / residual.square().sum()).detach() / 0.8
    square = ((y - operator(plain.x0)) * mask.mask).square().sum()
    (delta,) = torch.autograd.grad(-square / (2 * variance), x)
    found = DPS(prior, Observation(y, operator, std, linear=linear), 0.8).predict(x.detach(), t)
    want = plain.shift(delta)
    torch.testing.assert_close(found.posterior.x0, want.x0.detach(), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found.posterior.eps, want.eps.detach(), rtol=1e-8, atol=1e-9)
    log_prob = torch.distributions.Normal(0.0, variance.sqrt()).log_prob(residual[[0, 3]]).sum()
    torch.testing.assert_close(found.log_prob, log_prob[None].detach(), rtol=1e-8, atol=1e-9)


def test_an_operator_that_is_not_linear_is_taken_by_its_derivative() -> None:
    """ΠGDM's δ for |M x| by dense Jacobians: Jᵀ A′ᵀ (r² A′A′ᵀ + std²)⁻¹ (y − A(x̂_0))."""
    sde, t = VPSDE(), torch.tensor(0.2, dtype=torch.float64)
    prior = mixture(sde, (4,), 2, seed=6)
    operator = Magnitude(RandomProjection(3, (4,)))
    y = torch.tensor([0.5, 0.2, 0.9], dtype=torch.float64)
    x = start(prior, t, 1)
    alpha, sigma = sde.marginal(t)
    method = PiGDM(prior, Observation(y, operator, 0.1), sigma_data=0.9)
    x0 = prior(x, t).x0
    slope = torch.autograd.functional.jacobian(operator, x0)[0, :, 0]
    jacobian = torch.autograd.functional.jacobian(lambda z: prior(z, t).x0, x)[0, :, 0]
    variance = (sigma * 0.9) ** 2 / ((alpha * 0.9) ** 2 + sigma**2)
    s = variance * slope @ slope.mT + 0.01 * torch.eye(3, dtype=torch.float64)
    delta = jacobian.mT @ slope.mT @ torch.linalg.solve(s, (y - operator(x0))[0])
    torch.testing.assert_close(method(x, t).x0, prior(x, t).shift(delta[None]).x0, rtol=1e-6, atol=1e-8)


def every_step() -> dict[str, Step]:
    """Every step of the library with its defaults; correctors behind a predictor."""
    kinds = {getattr(sampling, name) for name in sampling.__all__}
    kinds = {kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Step)} - {Step}
    kinds -= {scoresde.FlowMap}  # needs a model that is told where it goes, which a posterior is not
    special = {
        PredictorCorrector: lambda: PredictorCorrector(EulerMaruyama(), Langevin()),
        Langevin: lambda: PredictorCorrector(EulerMaruyama(), Langevin()),
        AnnealedLangevin: lambda: PredictorCorrector(EulerMaruyama(), AnnealedLangevin()),
        Multistep: lambda: Multistep(3),
        AdaptiveODE: lambda: AdaptiveODE(1e-2, 1e-2),
        AdaptiveSDE: lambda: AdaptiveSDE(0.1, 0.1),
    }
    return {kind.__name__: special.get(kind, kind)() for kind in sorted(kinds, key=lambda kind: kind.__name__)}


STEPS = every_step()
# MMPS under all of them; the others differ from it in numbers only, and take turns
PAIRS = [("MMPS", step) for step in STEPS]
PAIRS += [(("PiGDM", "TMPD", "DPS", "DiffPIR")[k % 4], step) for k, step in enumerate(STEPS)]


def problem(sde, n: int, std: float = 0.1):
    """A mixture in three dimensions, its first two seen; n different observations, as a condition too."""
    prior = mixture(sde, (3,), 2, seed=7)
    operator = RandomProjection(2, (3,), Rng(5))
    x0 = prior.sample(n, rng=Rng(11), dtype=torch.float64)
    y = operator(x0) + std * Rng(12).normal((n, 2), dtype=torch.float64)
    return prior, operator, y


@pytest.mark.parametrize(("method", "step"), PAIRS)
def test_every_denoiser_runs_under_every_step_with_a_y_per_sample(method, step) -> None:
    """The mean of each y's samples is nearer to its posterior mean than the prior's mean is, by a quarter or more.

    Eight observations, eight samples each: the error of a mean of 8 is below 0.36 posterior standard deviations per
    dimension, and the prior's mean is 1.5 of them away or more. Adaptive steps drop samples, and y goes along.
    """
    prior, operator, y = problem(VPSDE(), 8)
    given_y = DENOISERS[method](prior, Observation(None, operator, 0.1))
    sampler = Sampler(STEPS[step], LogisticGrid(1.0), 1 if STEPS[step].evaluations is None else 20)
    x = sampler(given_y, (64, 3), cond={"y": y.repeat_interleave(8, 0)}, rng=Rng(1))
    a, middle = matrix(operator, (3,)), data_moments(prior)[0]
    means = torch.stack([data_moments(posterior(prior, a, one, 0.1))[0] for one in y])
    got = x.double().reshape(8, 8, 3).mean(1)
    near, far = (got - means).square().sum(1).mean(), (middle - means).square().sum(1).mean()
    assert float(near.sqrt()) < 0.75 * float(far.sqrt())


STEPWISE = {
    "Replacement": lambda step, seen: Replacement(step, seen),
    "RePaint": lambda step, seen: RePaint(step, seen, jump=3, repeats=2),
}
FIXED = {name: step for name, step in STEPS.items() if step.evaluations is not None}


@pytest.mark.parametrize("step", FIXED.values(), ids=FIXED.keys())
@pytest.mark.parametrize("method", STEPWISE.values(), ids=STEPWISE.keys())
def test_replacement_goes_around_every_step_of_fixed_size(method, step) -> None:
    """Samples fit y as well as its noise lets them, and as many network calls are made as are declared.

    A x ~ N(y, std² I + σ(t_min)² A Aᵀ): of 128 values the root mean square is within 25 % of std = 0.1 (χ², 4 σ).
    """
    prior, operator, y = problem(VPSDE(), 64)
    sampler = Sampler(method(step, Observation(y, operator, 0.1)), LogSNRGrid(), 7, denoise=False)
    *_, last = sampler.iterate(prior, (64, 3), rng=Rng(1))
    # a Restart goes up and down in one of the segments only, RePaint counts it in all
    exact = not (isinstance(step, Restart) and method is STEPWISE["RePaint"])
    assert last.evaluations == sampler.evaluations or not exact
    rms = float((operator(last.x.double()) - y).square().mean().sqrt())
    assert 0.075 < rms < 0.125


@pytest.mark.parametrize("step", [s for s in STEPS.values() if s.evaluations is None], ids=lambda s: type(s).__name__)
def test_replacement_refuses_steps_that_go_all_the_way(step) -> None:
    seen = Observation(torch.zeros(2), RandomProjection(2, (3,)))
    for method in (Replacement, RePaint):
        with pytest.raises(ValueError, match="goes all the way in one call"):
            method(step, seen)


@each_sde
def test_replacement_is_right_where_what_is_seen_says_nothing_of_the_rest(sde) -> None:
    """Independent entries: what is not seen keeps the prior's moments, what is seen has y's and std, to 4.5 errors."""
    means, std = torch.tensor([[1.0, -2.0]]), 0.2
    prior = GaussianMixtureDenoiser(means, torch.tensor([[0.5, 0.3]]), torch.ones(1), sde)
    seen = Observation(torch.tensor([0.7, 0.0]), Mask(torch.tensor([1, 0])), std)
    step = Replacement(UniPC(2), seen)
    x = Sampler(step, LogSNRGrid(), 20, denoise=False)(prior, (1000, 2), rng=Rng(3)).double()
    noise = float(sde.marginal(torch.tensor(sde.t_min, dtype=torch.float64))[1])
    for column, mean, var in ((x[:, 0], 0.7, std**2 + noise**2), (x[:, 1], -2.0, 0.3 + noise**2)):
        found, error = mean_and_stderr(column)
        assert abs(found - mean) < 4.5 * error
        assert float(column.var()) / var == pytest.approx(1, abs=4.5 * math.sqrt(2 / 1000) + 0.03)


def test_repaint_makes_coherent_what_replacement_does_not() -> None:
    """Two entries of correlation 0.95, one seen: the error of the other's mean falls to less than a half."""
    cov = torch.tensor([[[1.0, 0.95], [0.95, 1.0]]])
    prior = GaussianMixtureDenoiser(torch.zeros(1, 2), cov, torch.ones(1), VPSDE())
    seen = Observation(torch.tensor([2.0, 0.0]), Mask(torch.tensor([1, 0])), 0.01)
    errors = []
    for step in (Replacement(Ancestral(), seen), RePaint(Ancestral(), seen, jump=2, repeats=10)):
        x = Sampler(step, LogSNRGrid(), 12)(prior, (512, 2), rng=Rng(3))
        errors.append(abs(float(x[:, 1].mean()) - 1.9))
    assert errors[1] < 0.5 * errors[0]


def runs(method: str, seen: Observation, prior) -> tuple[scoresde.Denoiser, Step]:
    """A method by name, as the denoiser and the step of a sampler."""
    if method in DENOISERS:
        return DENOISERS[method](prior, seen), DPMSolverPP(2, eta=1.0)
    return prior, {
        "Replacement": lambda: Replacement(Ancestral(), seen),
        "RePaint": lambda: RePaint(Ancestral(), seen, jump=2, repeats=2),
        "TwistedSMC": lambda: TwistedSMC(seen, 4),
    }[method]()


NAMES = [*DENOISERS, "Replacement", "RePaint", "TwistedSMC"]


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_observations_is_each_of_them_alone(name) -> None:
    """With a seed per sample: groups of four with one y, together and apart, to round-off of sums in other orders."""
    prior, operator, y = problem(VPSDE(), 3)
    y, seeds = y.repeat_interleave(4, 0), list(range(12))

    def sample(rows: slice) -> Tensor:
        denoiser, step = runs(name, Observation(y[rows], operator, 0.1), prior)
        n = len(seeds[rows])
        return Sampler(step, LogSNRGrid(), 8)(
            denoiser, Rng(seeds=seeds[rows]).normal((n, 3)), rng=Rng(seeds=seeds[rows])
        )

    together = sample(slice(None))
    for k in range(0, 12, 4):
        torch.testing.assert_close(together[k : k + 4], sample(slice(k, k + 4)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_network_is_called_once_per_evaluation(name) -> None:
    """Inside as outside: calls of the prior, not of what is around it, are what the sampler declares."""
    prior, operator, y = problem(VPSDE(), 1)
    counted = CountingDenoiser(prior)
    denoiser, step = runs(name, Observation(y, operator, 0.1), counted)
    sampler = Sampler(step, LogSNRGrid(), 6)
    sampler(denoiser, (8, 3), rng=Rng(0))
    assert counted.evaluations == sampler.evaluations


def test_a_posterior_denoiser_compiles_whole() -> None:
    """One graph, and the same numbers: MMPS, which has all that others have."""
    _, operator, y = problem(VPSDE(), 2)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.SiLU(), torch.nn.Linear(16, 3)).double()
    model = scoresde.Preconditioned(lambda x, c: network(x), VPSDE(), scoresde.EDM(1.0))
    found = MMPS(model, Observation(y, operator, 0.1))
    x, t = Rng(0).normal((2, 3), dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
    want = found(x, t)  # tries the operator
    compiled = torch.compile(lambda x: found(x, t).x0, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), want.x0, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("sde", [VPSDE(), VESDE()], ids=["vp", "ve"])
def test_the_likelihood_of_a_posterior_denoiser_is_the_posteriors(sde) -> None:
    """log p(x_0|y) of a Gaussian prior by the guided probability flow, divergence exact, to 1e-3 nats.

    What y makes of the prior at t_max, 0.004 (VP) and 0.011 nats (VE) in the mean, is in it; it costs one call, which
    is counted, and the same is in a sample's.
    """
    prior = one(sde, "full", 3)
    seen, a, y = observed(prior, RandomProjection(2, (3,)), 0.3)
    exact = posterior(prior, a, y, 0.3)
    x0 = exact.sample(4, rng=Rng(0), dtype=torch.float64)
    inside, t = CountingDenoiser(prior), torch.tensor(sde.t_min, dtype=torch.float64)
    guided = MMPS(inside, seen)
    found = log_likelihood(guided, x0, divergence=Exact(), solver=Tolerance(1e-5, 1e-5))
    torch.testing.assert_close(found.log_prob, exact.log_prob(x0, t), rtol=0, atol=1e-3)
    assert inside.evaluations == found.evaluations
    inside.evaluations = 0
    x, drawn = sample_with_log_prob(guided, (4, 3), divergence=Exact(), solver=Budget(60), rng=Rng(1))
    torch.testing.assert_close(drawn.log_prob, exact.log_prob(x.double(), t), rtol=0, atol=3e-3)
    assert inside.evaluations == drawn.evaluations == 60
    # a y for each, beside what else there is, in a bound that is then one of the posterior
    many = MMPS(inside, Observation(None, seen.operator, 0.3))
    bounds = [
        elbo(model, x0, samples=20, rng=Rng(2), cond=cond)
        for model, cond in ((many, {"y": seen.y.expand(4, -1)}), (exact, None))
    ]
    torch.testing.assert_close(bounds[0].prior.value, bounds[1].prior.value, rtol=0, atol=1e-3)
    torch.testing.assert_close(bounds[0].log_prob, bounds[1].log_prob, rtol=0, atol=1e-3)


TWISTS = {
    "MMPS": MMPS,
    "DPS": DPS,
    "PiGDM of a wrong sigma_data": partial(PiGDM, sigma_data=0.5),
    "DiffPIR, no gradient": DiffPIR,
}


def two_modes(sde) -> tuple[GaussianMixtureDenoiser, Observation, GaussianMixtureDenoiser]:
    """Two modes that y tells apart by their widths: what a Gaussian guess of p(x_0|x_t) weighs wrongly."""
    covs = torch.tensor([[0.02, 0.3], [0.5, 0.02]])
    prior = GaussianMixtureDenoiser(torch.tensor([[-1.0, 0.5], [1.0, -0.5]]), covs, torch.tensor([0.4, 0.6]), sde)
    a, y = torch.tensor([[0.8, 0.3]], dtype=torch.float64), torch.tensor([-0.25], dtype=torch.float64)
    seen = Observation(y, lambda x: x @ a.to(x.dtype).mT, 0.2, linear=True)
    return prior, seen, posterior(prior, a, y, 0.2)


@pytest.mark.parametrize(
    ("twist", "name"), zip(TWISTS.values(), ("vp", "ve", "flow", "subvp"), strict=True), ids=TWISTS
)
def test_particles_weigh_out_the_bias_of_any_twist(twist, name) -> None:
    """Mode weights and the mean of x_0 given y, from one group of 1000 by 80 steps.

    The errors allowed are 4.5 of those of 350 draws, the effective number that the poorest twist keeps, and 0.02 for
    80 steps. Alone, three of the four are off by 0.15 and more in the weights, and fail.
    """
    prior, seen, exact = two_modes(ALL[name])
    effective: list[Tensor] = []
    step = TwistedSMC(seen, method=twist, report=effective.append)
    x = Sampler(step, LogisticGrid(prior.data_std), 80)(prior, (1000, 2), rng=Rng(5))
    weights, want = mode_weights(exact, x), exact.log_weights.exp()
    assert abs(float(weights[0] - want[0])) < 4.5 * math.sqrt(float(want[0] * want[1]) / 350) + 0.02
    mean, cov = data_moments(exact)
    assert bool(((x.double().mean(0) - mean).abs() < 4.5 * (cov.diagonal() / 350).sqrt() + 0.04).all())
    assert len(effective) == 80 and all(found.shape == (1,) and 1 <= float(found) <= 1000 for found in effective)


def test_particles_converge_and_alone_they_do_not() -> None:
    """Mode weights over 1024 samples in groups of 1 (the twist itself), 8 and 128: the error falls each time."""
    prior, seen, exact = two_modes(VPSDE())
    want, errors = exact.log_weights.exp()[0], []
    for size in (1, 8, 128):
        x = Sampler(TwistedSMC(seen, size, DiffPIR), LogisticGrid(prior.data_std), 40)(prior, (1024, 2), rng=Rng(6))
        errors.append(abs(float(mode_weights(exact, x)[0] - want)))
    assert errors[2] < 0.5 * errors[1] < 0.5 * errors[0]


def test_particles_of_a_y_of_many_entries_do_not_fall_to_one() -> None:
    """40 entries, more than MMPS has iterations, of a Gaussian: what log det leaves out is the same for all.

    A guess from each particle's residual left 7 of 64; the steps alone, with a log det written out, leave 31.
    """
    g = torch.Generator().manual_seed(0)
    factor = 0.5 * torch.randn(1, 40, 10, generator=g, dtype=torch.float64) / 10**0.5
    cov = factor @ factor.mT + 0.05 * torch.eye(40, dtype=torch.float64)
    prior = GaussianMixtureDenoiser(torch.zeros(1, 40), cov, torch.ones(1), VPSDE())
    y = prior.sample(1, rng=Rng(1))[0]
    effective: list[Tensor] = []
    seen = Observation(y, Mask(torch.arange(40) % 4 == 0), 0.1)
    step = TwistedSMC(seen, report=effective.append)
    Sampler(step, LogisticGrid(prior.data_std), 60)(prior, (64, 40), rng=Rng(2))
    assert min(float(number) for number in effective) > 15


def test_resampling_draws_as_often_as_weights_say() -> None:
    """Systematic: ⌊K w⌋ or ⌈K w⌉ times, K w on average over u; groups stay apart."""
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.4], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    counts = torch.zeros(8)
    for u in (torch.arange(100) + 0.5) / 100:
        rows = _systematic(weights, u.double().expand(8))
        assert bool((rows[:4] < 4).all()) and bool((rows[4:] == 4).all())
        once = torch.bincount(rows, minlength=8)
        assert bool(((once[:4] - 4 * weights[0]).abs() < 1).all())
        counts += once
    torch.testing.assert_close(counts[:4] / 100, 4 * weights[0].float(), rtol=0, atol=0.011)


def test_particles_that_were_moved_by_others_begin_anew() -> None:
    """A corrector for the same posterior in between: the law is still the posterior's."""
    prior, seen, exact = two_modes(VPSDE())

    class Corrector(Step):
        order, evaluations = 0.0, 1

        def __call__(self, denoiser, x, t, s, state, *, cond, rng):
            return AnnealedLangevin(0.05)(DPS(denoiser, seen), x, t, s, state, cond=cond, rng=rng)

    class Both(PredictorCorrector):
        def count(self, steps):
            return None

    step = Both(TwistedSMC(seen, method=DPS), Corrector())
    x = Sampler(step, LogisticGrid(prior.data_std), 40)(prior, (1000, 2), rng=Rng(5))
    weights, want = mode_weights(exact, x), exact.log_weights.exp()
    assert abs(float(weights[0] - want[0])) < 4.5 * math.sqrt(0.25 / 350) + 0.03


def test_particles_say_what_they_need() -> None:
    prior, operator, y = problem(VPSDE(), 6)
    seen, brought, one = (Observation(given, operator, 0.1) for given in (y, None, y[:1]))
    for words, make in {
        "at least 1": lambda: TwistedSMC(seen, 0),
        "a share": lambda: TwistedSMC(seen, 4, threshold=1.5),
        "std > 0": lambda: TwistedSMC(Observation(y, operator, 0.0), 4),
        "no groups of 4": lambda: Sampler(TwistedSMC(seen, 4), None, 2)(prior, (6, 3)),
        "y differs within a group of 2": lambda: Sampler(TwistedSMC(seen, 2), None, 2)(prior, (6, 3)),
        "y differs within a group of 3": lambda: Sampler(TwistedSMC(brought, 3), None, 2)(prior, (6, 3), cond={"y": y}),
        "cond differs within a group of 2": lambda: Sampler(TwistedSMC(one, 2), None, 2)(
            prior, (4, 3), cond=torch.tensor([3, 3, 8, 3])
        ),
        "label differs within a group of 2": lambda: Sampler(TwistedSMC(one, 2), None, 2)(
            prior, (2, 3), cond={"label": torch.tensor([1, 2])}
        ),
        "needs std > 0": lambda: Sampler(TwistedSMC(brought, 3), None, 2)(
            prior, (6, 3), cond={"y": y, "std": torch.zeros(6)}
        ),
    }.items():
        with pytest.raises(ValueError, match=words):
            make()


def test_a_guess_that_is_far_too_sure_does_not_throw_samples_away() -> None:
    """TMPD of entries that vary against each other: row sums of 0 say they are certain, and with little noise the pull
    was 1e5 times too strong, and samples left for infinity."""
    cov = torch.tensor([[[1.0, -0.99], [-0.99, 1.0]]], dtype=torch.float64)
    prior = GaussianMixtureDenoiser(torch.zeros(1, 2), cov, torch.ones(1), VPSDE())
    seen = Observation(torch.tensor([1.0, 0.0]), Mask(torch.tensor([1, 0])), 1e-3)
    x = Sampler(Ancestral(), LogSNRGrid(), 100)(TMPD(prior, seen), (200, 2), rng=Rng(0))
    # exact: N(1, 1e-6) and N(−0.99, 0.02); 4.5 standard errors of a mean, and the last step's noise
    assert abs(float(x[:, 0].mean()) - 1) < 0.01
    assert abs(float(x[:, 1].mean()) + 0.99) < 0.1 and float(x[:, 1].std()) < 0.3
    # of row sums below 0, and no noise, nothing is left to divide by
    against = torch.tensor([[[1.0, -1.4], [-1.4, 2.0]]], dtype=torch.float64)
    prior = GaussianMixtureDenoiser(torch.zeros(1, 2), against, torch.ones(1), VPSDE())
    x = Sampler(Ancestral(), LogSNRGrid(), 100)(
        TMPD(prior, Observation(seen.y, seen.operator, 0.0)), (20, 2), rng=Rng(0)
    )
    assert float((x[:, 0] - 1).abs().max()) < 0.02


def test_arguments_out_of_range_are_refused() -> None:
    prior, operator, y = problem(VPSDE(), 1)
    seen = Observation(y, operator, 0.1)
    for words, make in {
        "sigma_data is": lambda: PiGDM(prior, seen, sigma_data=0.0),
        "iterations is a whole number of at least 1": lambda: MMPS(prior, seen, iterations=0),
        "0 < tolerance < 1": lambda: TMPD(prior, seen, tolerance=1.0),
        "scale is": lambda: DPS(prior, seen, scale=0.0),
        "weight is": lambda: DiffPIR(prior, seen, weight=-1.0),
        "jump is a whole number of at least 1": lambda: RePaint(Ancestral(), seen, jump=0),
        "linear operator": lambda: Replacement(Ancestral(), Observation(y, Magnitude(), 0.1)),
    }.items():
        with pytest.raises(ValueError, match=words):
            make()


def test_a_method_from_outside_the_package() -> None:
    """Hard consistency (DDNM, Wang et al. 2023: x̂_0 + A⁺(y − A x̂_0)), under a multistep solver: 12 lines."""

    class NullSpace(DenoiserWrapper):
        def __init__(self, denoiser, observation):
            super().__init__(denoiser)
            self.observation = observation

        def forward(self, x, t, cond=None):
            measured, rest = self.observation.split(cond)
            p = self.denoiser(x, t, rest)
            x0 = self.observation.project(p.x0, measured.y)
            return Prediction(x0, (x - p.scales.alpha * x0) / p.scales.sigma, p.scales)

    prior = mixture(VPSDE(), (8,), 3)
    seen, _, y = observed(prior, DownSample(2), 0.0)
    x = Sampler(Adams(3, corrector=3), LogSNRGrid(), 20)(NullSpace(prior, seen), (16, 8), rng=Rng(0))
    torch.testing.assert_close(seen(x.double()), y.expand(16, -1), rtol=0, atol=1e-4)
    assert float(x.std(0).mean()) > 0.1  # and they are not all the same
