"""The oracle of the other tests, tested against brute force: Bayes' rule by quadrature, torch.distributions."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import (
    EVENT_SHAPES,
    all_sdes,
    component_covariances,
    data_moments,
    marginal_moments,
    mixture,
    times,
)
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from scoresde import (
    EDMSDE,
    VESDE,
    VPSDE,
    CosineSDE,
    GaussianMixtureDenoiser,
    RectifiedFlow,
    Rng,
    TableSDE,
)

ALL = all_sdes()
each_sde = pytest.mark.parametrize("sde", ALL.values(), ids=ALL.keys())
each_event = pytest.mark.parametrize("event", EVENT_SHAPES, ids=str)
FORMS = ("full", "diagonal", "isotropic")


def draws(denoiser, t, n, seed=0):
    """Exact draws of x_t, float64 (n, *event)."""
    x0 = denoiser.sample(n, rng=Rng(seed), dtype=torch.float64)
    return denoiser.sde.perturb(x0, t, Rng(seed + 1).normal(x0.shape, dtype=torch.float64))


def by_quadrature(density, points, alpha, sigma, x):
    """E[x_0 | x_t = x] and log p_t(x) from the data density on a regular grid: Bayes' rule and nothing else."""
    log_kernel = -0.5 * ((x[:, None] - alpha * points) / sigma).square().sum(-1)
    joint = density * log_kernel.exp()
    mean = (joint[..., None] * points).sum(1) / joint.sum(1, keepdim=True)
    return mean, joint.sum(1).log() - points.shape[-1] * math.log(sigma * math.sqrt(2 * math.pi))


@each_sde
@pytest.mark.parametrize("form", FORMS)
def test_posterior_mean_and_density_by_quadrature(sde, form) -> None:
    """In the plane, over every σ/α a grid of spacing 0.04 resolves.

    The trapezoidal rule on a Gaussian of width s errs by e^{−2π²s²/h²}: s ≥ 0.1 and h = 0.04 leave e^{−123}.
    """
    denoiser = mixture(sde, (2,), covariance=form, seed=3)
    weights, covs = denoiser.log_weights.exp(), component_covariances(denoiser)
    edge = 8.0
    line = torch.arange(-edge, edge, 0.04, dtype=torch.float64)
    points = torch.cartesian_prod(line, line)
    data = MixtureSameFamily(Categorical(weights), MultivariateNormal(denoiser.means, covs))
    density = data.log_prob(points).exp()
    assert float(density.sum()) * 0.04**2 == pytest.approx(1, abs=1e-9)
    for ratio in (0.15, 0.8, 5.0):
        t = sde.time(torch.tensor(-2 * math.log(ratio), dtype=torch.float64)).clamp(sde.t_min, sde.t_max)
        alpha, sigma = (float(value) for value in sde.marginal(t))
        x = draws(denoiser, t, 4)
        mean, log_prob = by_quadrature(density, points, alpha, sigma, x)
        got = denoiser(x, t)
        torch.testing.assert_close(got.x0, mean, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(got.eps, (x - alpha * mean) / sigma, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(denoiser.log_prob(x, t), log_prob + 2 * math.log(0.04), rtol=1e-8, atol=1e-8)


@each_sde
@each_event
@pytest.mark.parametrize("form", FORMS)
def test_score_is_the_gradient_of_log_prob(sde, event, form) -> None:
    denoiser = mixture(sde, event, covariance=form)
    t = times(sde, 6)
    x = draws(denoiser, t, 6).requires_grad_()
    log_prob = denoiser.log_prob(x, t)
    (gradient,) = torch.autograd.grad(log_prob.sum(), x)
    prediction = denoiser(x.detach(), t)
    assert log_prob.shape == (6,) and gradient.shape == x.shape
    sigma = sde.at(t, x).sigma
    torch.testing.assert_close(-sigma * gradient, prediction.eps, rtol=1e-9, atol=1e-9)
    alpha = sde.at(t, x).alpha
    size = alpha * prediction.x0.abs() + sigma * prediction.eps.abs()
    if form == "full":  # a number is a sum over all D ≤ 48: to axes and back, 2 D 2^-53 √D = 7e-14 of the largest
        size = 0.1 * size.flatten(1).amax(1).reshape(-1, *[1] * len(event))
    assert bool(((alpha * prediction.x0 + sigma * prediction.eps - x.detach()).abs() <= 1e-12 * size).all())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("event", EVENT_SHAPES, ids=str)
def test_density_is_that_of_torch_distributions(form, event) -> None:
    for sde in ALL.values():
        denoiser = mixture(sde, event, covariance=form, seed=5)
        categorical, covs = Categorical(denoiser.log_weights.exp()), component_covariances(denoiser)
        t = float(times(sde, 3)[1])
        alpha, sigma = sde.marginal(torch.tensor(t, dtype=torch.float64))
        noise = sigma**2 * torch.eye(covs.shape[-1], dtype=torch.float64)
        x0, x = denoiser.sample(5, rng=Rng(0), dtype=torch.float64), draws(denoiser, t, 5)
        data = MixtureSameFamily(categorical, MultivariateNormal(denoiser.means, covs))
        marginal = MixtureSameFamily(categorical, MultivariateNormal(alpha * denoiser.means, alpha**2 * covs + noise))
        torch.testing.assert_close(denoiser.log_prob(x0), data.log_prob(x0.flatten(1)), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(denoiser.log_prob(x, t), marginal.log_prob(x.flatten(1)), rtol=1e-8, atol=1e-8)


@each_sde
def test_density_integrates_to_one(sde) -> None:
    """A regular grid over ± 10 standard deviations of x_t, at the data and at two noise levels."""
    denoiser = mixture(sde, (2,))
    for t in (0, *times(sde, 4)[1:3].tolist()):
        mean, cov = data_moments(denoiser) if t == 0 else marginal_moments(denoiser, t)
        reach = 10 * float(cov.diagonal().max().sqrt())
        line = torch.linspace(-reach, reach, 401, dtype=torch.float64)
        points = torch.cartesian_prod(line, line) + mean
        total = denoiser.log_prob(points, t).exp().sum() * (line[1] - line[0]) ** 2
        assert float(total) == pytest.approx(1, abs=1e-8)


@each_event
def test_covariance_forms_agree_where_they_mean_the_same(event) -> None:
    dims, sde = math.prod(event), VPSDE()
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(3, *event, generator=generator, dtype=torch.float64)
    weights, variance = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.3, 0.3, 0.3], dtype=torch.float64)
    eye = torch.eye(dims, dtype=torch.float64)
    forms = [
        0.3,
        torch.tensor(0.3, dtype=torch.float64),
        variance,
        variance[:, None].expand(3, dims),
        variance.reshape(3, *[1] * len(event)).expand(3, *event),
        (variance[:, None, None] * eye).contiguous(),
    ]
    rotation = torch.linalg.qr(torch.randn(dims, dims, generator=generator, dtype=torch.float64))[0]
    forms.append(rotation @ (0.3 * eye) @ rotation.mT + torch.zeros(3, 1, 1, dtype=torch.float64))
    reference = GaussianMixtureDenoiser(means, forms[0], weights, sde)
    t = times(sde, 5)
    x = draws(reference, t, 5)
    for covs in forms[1:]:
        other = GaussianMixtureDenoiser(means, covs, 10 * weights, sde)  # weights are normalised
        torch.testing.assert_close(other(x, t).x0, reference(x, t).x0, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(other(x, t).eps, reference(x, t).eps, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(other.log_prob(x, t), reference.log_prob(x, t), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(other.data_var, reference.data_var, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ALL)
def test_the_posterior_depends_on_the_log_snr_only(name) -> None:
    """x/α carries the same information under every SDE at equal λ: the same x̂_0 and ε̂ (Karras et al. 2022, App. B)."""
    sde, level = ALL[name], torch.tensor([2.0, 0.0, -1.5], dtype=torch.float64)
    here = mixture(sde, (3, 4))
    t = sde.time(level)
    x = draws(here, t, 3)
    scaled = x / sde.at(t, x).alpha
    want = here(x, t)
    for other in (VPSDE(), VESDE(), CosineSDE(), EDMSDE(), RectifiedFlow(), TableSDE([0.999, 0.9, 0.5, 0.01])):
        there, s = mixture(other, (3, 4)), other.time(level)
        got = there(other.at(s, x).alpha * scaled, s)
        torch.testing.assert_close(got.x0, want.x0, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(got.eps, want.eps, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_samples_have_the_moments_of_the_data(form) -> None:
    """Each entry of mean and covariance within 4.5 of its own standard error (27 comparisons, level below 2e-4)."""
    n, denoiser = 40_000, mixture(VPSDE(), (2, 3), covariance=form, seed=2)
    x = denoiser.sample(n, rng=Rng(0))
    assert x.shape == (n, 2, 3) and x.dtype == torch.float32
    flat = x.double().flatten(1)
    mean, cov = data_moments(denoiser)
    assert bool(((flat.mean(0) - mean).abs() < 4.5 * (cov.diagonal() / n).sqrt()).all())
    products = torch.einsum("ni,nj->nij", flat - mean, flat - mean)
    assert bool(((products.mean(0) - cov).abs() < 4.5 * products.std(0) / math.sqrt(n)).all())
    torch.testing.assert_close(denoiser.data_mean, mean.reshape(2, 3), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(denoiser.data_var, cov.diagonal().reshape(2, 3), rtol=1e-10, atol=1e-12)


def test_samples_follow_the_distribution_itself() -> None:
    """On the line, against the exact CDF, by Kolmogorov–Smirnov at level 1e-5: weights too, not moments only."""
    means = torch.tensor([[-2.0], [0.0], [3.0]], dtype=torch.float64)
    stds, weights = torch.tensor([0.2, 1.0, 0.5], dtype=torch.float64), torch.tensor([0.5, 0.2, 0.3])
    n, denoiser = 20_000, GaussianMixtureDenoiser(means, stds**2, weights, VPSDE())
    x = denoiser.sample(n, rng=Rng(1), dtype=torch.float64)
    cdf = torch.special.ndtr((x - means[:, 0]) / stds) @ weights.double()
    u, steps = cdf.sort().values, torch.arange(n + 1, dtype=torch.float64) / n
    distance = max(float((u - steps[:-1]).abs().max()), float((u - steps[1:]).abs().max()))
    assert distance * math.sqrt(n) < math.sqrt(-math.log(1e-5 / 2) / 2)


def test_sample_k_depends_on_seed_k_only() -> None:
    denoiser = mixture(VPSDE(), (3, 4))
    both = denoiser.sample(3, rng=Rng(seeds=[5, 6, 7]))
    for k, seed in enumerate((5, 6, 7)):
        torch.testing.assert_close(denoiser.sample(1, rng=Rng(seeds=[seed]))[0], both[k], rtol=1e-6, atol=1e-6)


@each_sde
def test_float32_is_as_good_as_float64(sde) -> None:
    """Computed in float64: given the same float32 x and t, only the result is rounded, even at t_min and t_max."""
    denoiser = mixture(sde, (2,))
    t = times(sde, 9, ends=True).float().clamp(sde.t_min, sde.t_max)
    x = draws(denoiser, t.double(), 11).float()
    narrow, wide = denoiser(x, t), denoiser(x.double(), t.double())
    assert narrow.x0.dtype == narrow.eps.dtype == torch.float32
    torch.testing.assert_close(narrow.x0, wide.x0.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(narrow.eps, wide.eps.float(), rtol=1e-6, atol=1e-6)


@each_sde
def test_time_may_be_a_scalar_or_one_per_sample(sde) -> None:
    denoiser = mixture(sde, (3, 4))
    t = times(sde, 4)
    x = draws(denoiser, t, 4)
    for k in range(4):
        torch.testing.assert_close(denoiser(x, t[k]).x0[k], denoiser(x, t).x0[k], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(denoiser.log_prob(x, float(t[k]))[k], denoiser.log_prob(x, t)[k])
    with pytest.raises(ValueError, match="one value per sample"):
        denoiser(x, t[:3])


def test_degenerate_covariances_are_point_masses() -> None:
    """Rank-deficient and zero covariances have no density at t = 0 but a posterior mean at any noise."""
    sde = VPSDE()
    line = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    flat = GaussianMixtureDenoiser(torch.zeros(1, 2), line[None], torch.ones(1), sde)
    x = flat.sample(50, rng=Rng(0), dtype=torch.float64)
    torch.testing.assert_close(x[:, 0], x[:, 1], rtol=0, atol=1e-7)
    p = flat(torch.tensor([[1.0, -1.0]], dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64))
    torch.testing.assert_close(p.x0, torch.zeros(1, 2, dtype=torch.float64), rtol=0, atol=1e-8)
    points = GaussianMixtureDenoiser(torch.tensor([[-1.0], [1.0]]), 0.0, torch.ones(2), sde)
    t = torch.tensor(0.2, dtype=torch.float64)
    alpha, sigma = sde.marginal(t)
    x = torch.tensor([[0.1], [-0.4]], dtype=torch.float64)
    torch.testing.assert_close(points(x, t).x0, torch.tanh(alpha * x / sigma**2), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("means", "covs", "weights", "message"),
    [
        (torch.zeros(2), 0.1, torch.ones(2), "means"),
        (torch.zeros(2, 3), 0.1, torch.ones(3), "weights"),
        (torch.zeros(2, 3), 0.1, torch.ones(2, 1), "weights"),
        (torch.zeros(2, 3), 0.1, torch.tensor([1.0, 0.0]), "positive"),
        (torch.zeros(2, 3), 0.1, torch.tensor([1.0, -1.0]), "positive"),
        (torch.zeros(2, 3), 0.1, torch.tensor([1.0, math.nan]), "positive"),
        (torch.zeros(2, 3), -0.1, torch.ones(2), "negative"),
        (torch.zeros(2, 3), torch.tensor([0.1, math.nan]), torch.ones(2), "negative"),
        (torch.zeros(2, 3), -torch.eye(3).expand(2, 3, 3), torch.ones(2), "negative"),
        (torch.zeros(2, 3), torch.ones(3), torch.ones(2), "covs must be"),
        (torch.zeros(2, 3), torch.ones(2, 2), torch.ones(2), "covs must be"),
        (torch.zeros(2, 3), torch.eye(3), torch.ones(2), "covs must be"),
        (torch.zeros(1, 2), torch.tensor([[[1.0, 0.5], [0.0, 1.0]]]), torch.ones(1), "symmetric"),
    ],
)
def test_bad_mixtures_are_refused(means, covs, weights, message) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianMixtureDenoiser(means, covs, weights, VPSDE())


def test_batches_of_another_size_are_refused() -> None:
    denoiser = mixture(VPSDE(), (2,))
    for call in (lambda x: denoiser(x, torch.tensor(0.5)), denoiser.log_prob):
        with pytest.raises(ValueError, match="2 dimensions"):
            call(torch.zeros(4, 3))
