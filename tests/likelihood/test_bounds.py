"""Variational bounds against Gaussians and mixtures, whose every term and gap is known."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from oracles import all_sdes, closed_form_sdes, mixture
from torch import Tensor

from scoresde import (
    DDPM,
    SDE,
    VESDE,
    VPSDE,
    Exact,
    GaussianMixtureDenoiser,
    LogSNRGrid,
    RectifiedFlow,
    Rng,
    UniformGrid,
    bits_per_dim,
    log_likelihood,
)
from scoresde.codecs import Scaling
from scoresde.diffusion.denoiser import DenoiserWrapper
from scoresde.likelihood.bounds import elbo, importance_weighted, vlb
from scoresde.likelihood.budget import Budget
from scoresde.likelihood.terms import Bound

ALL = all_sdes()
each_sde = pytest.mark.parametrize("sde", ALL.values(), ids=ALL.keys())
MEAN, VAR, DIMS = 0.7, 0.3, 3


def gaussian(sde: SDE) -> GaussianMixtureDenoiser:
    return GaussianMixtureDenoiser(torch.full((1, DIMS), MEAN), VAR, torch.ones(1), sde)


def points(n: int = 6) -> Tensor:
    return MEAN + math.sqrt(VAR) * Rng(3).normal((n, DIMS), dtype=torch.float64)


def normal(x: Tensor, var: Tensor | float) -> Tensor:
    """log N(x; MEAN, var I) (B,)."""
    return (-0.5 * ((x - MEAN) ** 2 / var + math.log(2 * math.pi) + torch.as_tensor(var).log())).sum(1)


def ratio(sde: SDE, t: float | Tensor) -> Tensor:
    """ς² = σ²/α² at t."""
    return (-sde.log_snr(torch.as_tensor(t, dtype=torch.float64))).exp()


def within(value: Tensor, expected: Tensor, stderr: Tensor, slack: float = 0.0) -> None:
    """4.5 standard errors: of up to a hundred normals one is outside by chance in a thousand."""
    assert bool(((value - expected).abs() <= 4.5 * stderr + slack).all()), (value - expected) / stderr


@each_sde
@pytest.mark.parametrize("cut", [None, 0.1])
def test_the_gap_of_a_gaussian_is_its_closed_form(sde, cut) -> None:
    """With the exact denoiser ELBO = E_n log N(x + ς n; m, s² + ς²): all that is lost is Jensen's gap at the cut-off.

    The model's own density is N(x; m, s² + 2ς²), ς noise in z and once more in the decoder; the bound is below it by
    D/2 [ς²/(s² + ς²) + log((s² + ς²)/(s² + 2ς²))] − (x − m)²/2 · ς²/((s² + ς²)(s² + 2ς²)) in sum. Draws: 400; the
    integrand is smooth in λ but for a table's kinks, and stratified: the slack is the bias of nothing, round-off.
    """
    denoiser, x = gaussian(sde), points()
    bound = elbo(denoiser, x, samples=400, t_min=cut, rng=Rng(1))
    noise = ratio(sde, sde.t_min if cut is None else cut)
    expected = normal(x, VAR + noise) - DIMS * noise / (2 * (VAR + noise))
    within(bound.log_prob, expected, bound.stderr, 1e-6)
    assert float(bound.stderr.max()) < 1.0
    assert bool((bound.log_prob <= normal(x, VAR + 2 * noise) + 4.5 * bound.stderr).all())
    assert (bound.name, bound.evaluations) == ("bpd/elbo", 400)


@pytest.mark.parametrize("sde", [VPSDE(), VESDE(0.2, 20.0), RectifiedFlow()], ids=["vp", "ve", "flow"])
def test_every_term_of_the_chain_is_its_closed_form(sde) -> None:
    """x̂_0 − m = k (z/α − m), k = s²/(s² + ς²): E‖x − x̂_0‖² = (1 − k)²‖x − m‖² + k²ς²D, and so each L_t of Ho et al."""
    denoiser, x = gaussian(sde), points()
    steps, samples = 6, 300
    bound = vlb(denoiser, x, steps=steps, samples=samples, grid=UniformGrid(), rng=Rng(2))
    assert bound.evaluations == steps * samples and bound.name == "bpd/vlb" and bound.steps is not None
    assert bound.steps.value.shape == (len(x), steps)
    for k, (t, s) in enumerate(pairwise(UniformGrid()(sde, steps))):
        after, before = ratio(sde, t), ratio(sde, s)
        keep = VAR / (VAR + after)
        error = (1 - keep) ** 2 * (x - MEAN).square().sum(1) + keep**2 * after * DIMS
        within(bound.steps.value[:, k], 0.5 * (1 / before - 1 / after) * error, bound.steps.stderr[:, k], 1e-9)
    torch.testing.assert_close(bound.diffusion.value, bound.steps.value.sum(1))
    # KL(N(αx, σ²) ‖ N(αm, α²s² + σ²))
    noise = ratio(sde, sde.t_max)
    wide = VAR + noise
    kl = 0.5 * (DIMS * (noise / wide - 1 + (wide / noise).log()) + (x - MEAN).square().sum(1) / wide)
    within(bound.prior.value, kl, bound.prior.stderr, 1e-9)
    last = ratio(sde, sde.t_min)
    torch.testing.assert_close(
        bound.reconstruction.value, (0.5 * DIMS * (2 * math.pi * math.e * last).log()).expand(len(x)), rtol=1e-6, atol=0
    )


class Best(DenoiserWrapper):
    """The Gaussian's own reverse variance for steps of 1/`steps`: Σ/β̃ = 1 + (SNR_s − SNR_t) Var(x_0|x_t) in each."""

    def __init__(self, sde: SDE, steps: int):
        super().__init__(gaussian(sde))
        self.steps = steps

    def forward(self, x: Tensor, t: Tensor, cond=None):
        p, t = self.denoiser(x, t, cond), torch.as_tensor(t, dtype=torch.float64)
        s = (t - (self.sde.t_max - self.sde.t_min) / self.steps).clamp(min=self.sde.t_min)
        after, before = ratio(self.sde, t), ratio(self.sde, s)
        widened = torch.log1p((1 / before - 1 / after) * VAR * after / (VAR + after))
        most = 2 * (self.sde.marginal(t)[1] / self.sde.marginal(s)[1]).log()
        share = (widened / most).reshape(-1, 1).expand(x.shape)
        return replace(p, share=share)


@pytest.mark.parametrize("sde", [DDPM(steps=12, beta_end=0.5), VPSDE(), VESDE(0.2, 20.0)], ids=["ddpm", "vp", "ve"])
def test_the_best_variance_of_a_gaussian_loses_nothing_to_the_steps(sde) -> None:
    """Reverse steps of a Gaussian are Gaussians: with their mean and variance a chain of 11 steps is the whole SDE, and
    the bound is `elbo`'s closed form of the first test; with any fixed variance it is below that.
    """
    x, steps, how = points(2000), 11, {"grid": UniformGrid(), "samples": 6}
    noise = ratio(sde, sde.t_min)
    exact = normal(x, VAR + noise) - DIMS * noise / (2 * (VAR + noise))
    bound = vlb(Best(sde, steps), x, steps=steps, rng=Rng(0), **how)
    error = float(bound.stderr.square().sum().sqrt()) / len(x)
    assert abs(float((bound.log_prob - exact).mean())) < 4 * error < 0.1
    for variance in (0.0, 1.0):
        fixed = vlb(Best(sde, steps), x, steps=steps, rng=Rng(0), variance=variance, **how)
        assert float((exact - fixed.log_prob).mean()) > 4 * error
        same = vlb(gaussian(sde), x, steps=steps, rng=Rng(0), variance=variance, **how)
        assert torch.equal(same.log_prob, fixed.log_prob)  # whatever the model learnt


def test_ddpms_wide_variance_is_the_best_for_unit_data() -> None:
    """Var(x_s|x_t) = β for N(0, I) under VP (Ho et al. 2020, sec. 3.2): in closed form, term by term."""
    sde = DDPM(steps=10, beta_end=0.4)
    x = Rng(0).normal((2000, 2), dtype=torch.float64)
    denoiser = GaussianMixtureDenoiser(torch.zeros(1, 2), 1.0, torch.ones(1), sde)
    found = vlb(denoiser, x, steps=9, grid=UniformGrid(), variance=1.0, samples=6, rng=Rng(0))
    noise = ratio(sde, sde.t_min)
    wide = (1 + noise).double()
    exact = (-0.5 * (x**2 / wide + math.log(2 * math.pi) + wide.log())).sum(1) - 2 * noise / (2 * wide)
    error = float(found.stderr.square().sum().sqrt()) / len(x)
    assert abs(float((found.log_prob - exact).mean())) < 4 * error < 0.05


@pytest.mark.parametrize("learned", [False, True])
def test_some_of_the_terms_estimate_the_sum(learned: bool) -> None:
    """Of 40 steps, 8 or all: the same mean as many draws of every step, and an error that covers the difference."""
    sde, steps, x = DDPM(steps=41, beta_end=0.3), 40, points(4).repeat(100, 1)
    denoiser = Best(sde, steps) if learned else gaussian(sde)
    whole = vlb(denoiser, x.repeat(20, 1), steps=steps, grid=UniformGrid(), rng=Rng(0)).diffusion.value
    whole = whole.reshape(-1, 4).mean(0).repeat(100)  # of 2,000 draws
    for terms in (8, 40):
        found = vlb(denoiser, x, steps=steps, grid=UniformGrid(), terms=terms, rng=Rng(1))
        apart = found.diffusion.value - whole
        assert found.evaluations == terms and found.steps is None
        spread, claimed = float(apart.std()), float(found.diffusion.stderr.square().mean().sqrt())
        assert abs(float(apart.mean())) < 4 * spread / math.sqrt(len(x))
        assert spread < 1.15 * claimed  # 400 values know their deviation to 4 %
        alone = vlb(denoiser, x, steps=steps, grid=UniformGrid(), terms=terms, rng=Rng(seeds=list(range(400))))
        one = vlb(denoiser, x[7:8], steps=steps, grid=UniformGrid(), terms=terms, rng=Rng(seeds=[7]))
        torch.testing.assert_close(alone.log_prob[7:8], one.log_prob)  # whatever is beside it
    with pytest.raises(ValueError, match="no 41 terms to draw: take terms=40"):
        vlb(denoiser, x, steps=steps, grid=UniformGrid(), terms=41)


@pytest.mark.parametrize("name", ["vp", "ve", "cosine"])
def test_the_chain_tends_to_continuous_time(name: str) -> None:
    """An upper sum of a falling integrand: above it by C/T, so the gap halves as T doubles, 20 % aside for 1/T²."""
    denoiser, x = gaussian(closed_form_sdes()[name]), points(64)
    limit = float(elbo(denoiser, x, samples=600, rng=Rng(0)).log_prob.mean())
    gaps = [
        limit - float(vlb(denoiser, x, steps=t, samples=1200 // t, rng=Rng(1)).log_prob.mean()) for t in (50, 100, 200)
    ]
    assert gaps[0] > gaps[1] > gaps[2] > 0
    for coarse, fine in pairwise(gaps):
        assert coarse / fine == pytest.approx(2, rel=0.2)


@each_sde
def test_mixtures_are_bounded_from_below(sde) -> None:
    """ELBO = E_z log p_{t_min}(z) + D log α (see `elbo`), drawn apart here; below the density of decoded samples."""
    denoiser = mixture(sde, (3,), seed=1)
    x = denoiser.sample(16, rng=Rng(0), dtype=torch.float64)
    bound = elbo(denoiser, x, samples=300, rng=Rng(1))
    t = torch.tensor(sde.t_min, dtype=torch.float64)
    z = torch.stack([denoiser.log_prob(sde.perturb(x, t, Rng(k).normal_like(x)), t) for k in range(300)])
    expected = z.mean(0) + 3 * sde.marginal(t)[0].log()
    within(bound.log_prob, expected, torch.hypot(bound.stderr, z.std(0) / math.sqrt(300)), 1e-6)
    decoded = GaussianMixtureDenoiser(
        denoiser.means,
        denoiser.basis @ torch.diag_embed(denoiser.variances + 2 * ratio(sde, t)) @ denoiser.basis.mT,
        denoiser.log_weights.exp(),
        sde,
    )
    assert bool((bound.log_prob <= decoded.log_prob(x) + 4.5 * bound.stderr).all())


def test_the_bound_and_the_ode_agree_where_the_model_is_exact() -> None:
    """At t_min = 1e-5 under VP the cut-off is 1e-6 in variance: log p by elbo and by the flow differ by Monte Carlo."""
    denoiser = mixture(VPSDE(), (4,), seed=5)
    x = denoiser.sample(32, rng=Rng(0), dtype=torch.float64)
    bound = elbo(denoiser, x, samples=300, rng=Rng(1))
    flow = log_likelihood(denoiser, x, divergence=Exact(), solver=Budget(60))
    difference = bits_per_dim(bound.log_prob, (4,)) - bits_per_dim(flow.log_prob, (4,))
    error = float(bound.stderr.square().sum().sqrt()) / 32 / (4 * math.log(2))
    assert abs(float(difference.mean())) < 4 * error + 2e-3 and error < 0.05


def test_importance_sampling_is_unbiased_and_has_less_variance() -> None:
    """Uniform t almost never sees t near 1e-5, where −dλ/dt is 1e5: its mean is right and its spread 10 times wider."""
    denoiser, x = gaussian(VPSDE(t_min=1e-3)), points(32)
    by_snr = elbo(denoiser, x, samples=200, rng=Rng(1))
    by_t = elbo(denoiser, x, samples=200, rng=Rng(2), importance=False)
    assert float((by_snr.diffusion.stderr / by_t.diffusion.stderr).median()) < 0.5
    spread = torch.hypot(by_snr.diffusion.stderr, by_t.diffusion.stderr)
    difference = by_snr.diffusion.value - by_t.diffusion.value
    assert abs(float(difference.mean())) < 4 * float(spread.square().sum().sqrt()) / 32


def test_the_stated_error_covers() -> None:
    """200 estimates of one bound: ±1.96 stderr holds its closed form in 95 % or more (stratified t do better)."""
    sde = VPSDE(t_min=1e-3)
    x = points(1).expand(200, DIMS)
    bound = elbo(gaussian(sde), x, samples=30, rng=Rng(7))
    noise = ratio(sde, 1e-3)
    expected = normal(x, VAR + noise) - DIMS * noise / (2 * (VAR + noise))
    inside = (bound.log_prob - expected).abs() <= 1.96 * bound.stderr
    assert int(inside.sum()) >= 180  # binomial(200, 0.95): fewer once in a thousand


def chain_density(sde: SDE, times: Tensor, x: Tensor) -> Tensor:
    """log p(x) of the ancestral chain on one Gaussian: every step is affine, so mean and variance are all there is."""
    alpha, sigma = sde.marginal(times)
    mean, var = alpha[0] * MEAN, alpha[0] ** 2 * VAR + sigma[0] ** 2
    for k in range(len(times) - 1):
        snr = (alpha[k + 1 :][0] * sigma[k] / (alpha[k] * sigma[k + 1])) ** 2  # SNR_s/SNR_t
        a = alpha[k] / alpha[k + 1] * (sigma[k + 1] / sigma[k]) ** 2
        b = alpha[k + 1] * (1 - 1 / snr)
        keep = VAR / (VAR + (sigma[k] / alpha[k]) ** 2)
        mean, var = (
            a * mean + b * (MEAN + keep * (mean / alpha[k] - MEAN)),
            (a + b * keep / alpha[k]) ** 2 * var + sigma[k + 1] ** 2 * (1 - 1 / snr),
        )
    mean, var = mean / alpha[-1], (var + sigma[-1] ** 2) / alpha[-1] ** 2
    return (-0.5 * ((x - mean) ** 2 / var + math.log(2 * math.pi) + var.log())).sum(1)


@pytest.mark.parametrize("sde", [VPSDE(t_min=0.05), VESDE(0.2, 5.0)], ids=["vp", "ve"])
def test_importance_weights_are_unbiased_for_the_density_of_the_chain(sde) -> None:
    """E w = p(x) of the chain, in closed form; so the bound rises with K, from `vlb` at K = 1 to log p(x)."""
    x, steps = points(4), 5
    denoiser = gaussian(sde)
    exact = chain_density(sde, LogSNRGrid()(sde, steps), x)
    result = importance_weighted(denoiser, x.repeat(256, 1), steps=steps, samples=64, rng=Rng(4))
    assert (result.evaluations, result.name) == (64 * steps, "bpd/iw")
    assert bool((result.effective > 1).all() and (result.effective <= 64).all())
    log_weights = result.log_weights.reshape(64, 256, 4)
    n = 64 * 256
    weights = (log_weights - exact).exp().reshape(n, 4)
    within(weights.mean(0), torch.ones(4, dtype=torch.float64), weights.std(0) / math.sqrt(n))

    # K draws at a time, from the same weights: means over n/K bounds each
    tighter = [log_weights.reshape(k, -1, 4).logsumexp(0).sub(math.log(k)).mean(0) for k in (1, 4, 16, 64)]
    torch.testing.assert_close(tighter[-1], result.log_prob.reshape(256, 4).mean(0))
    for fewer, more in pairwise(tighter):
        assert bool((more > fewer).all())
    deviation = result.log_prob.reshape(256, 4).std(0) / 16
    # E log of a mean of K weights of mean 1 is −Var w/2K and terms of higher order: as much again is left to them
    gap = weights.var(0) / 64
    assert bool((tighter[-1] < exact + 4.5 * deviation).all() and (tighter[-1] > exact - gap - 4.5 * deviation).all())
    one = vlb(denoiser, x, steps=steps, samples=1000, rng=Rng(5))
    within(one.log_prob, tighter[0], torch.hypot(one.stderr, log_weights.reshape(n, 4).std(0) / math.sqrt(n)))


def test_discrete_data_are_bounded_by_their_probability() -> None:
    """Four levels of known frequency: point masses at the centres of the bins, with their exact denoiser.

    The noise of the cut-off, 1e-3, is far below half a bin, 0.25, so nothing is lost: −ELBO = −log P(level).
    """
    scaling = Scaling(-1.0, 1.0, levels=4)
    frequency = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    raw = torch.arange(4, dtype=torch.uint8)[:, None]
    denoiser = GaussianMixtureDenoiser(scaling.encode(raw).double(), 0.0, frequency, VPSDE())
    bound = elbo(denoiser, raw, samples=3000, scaling=scaling, rng=Rng(0))
    within(bound.log_prob, frequency.log(), bound.stderr, 1e-3)
    assert float(bound.stderr.max()) < 0.15 and float(bound.reconstruction.value.abs().max()) < 1e-6
    chain = vlb(denoiser, raw, steps=60, samples=20, scaling=scaling, rng=Rng(1))
    assert bool((chain.log_prob < frequency.log() + 4.5 * chain.stderr).all())


def test_the_decoder_of_discrete_data_is_a_distribution() -> None:
    """Σ over the levels of P(level|z) = 1, with noise as wide as the bins and far outside them."""
    from scoresde.likelihood.terms import Setting

    scaling = Scaling(0.0, 1.0, levels=8)
    denoiser = GaussianMixtureDenoiser(torch.zeros(1, 1), 1.0, torch.ones(1), VESDE(0.07, 5.0))
    raw = torch.arange(8, dtype=torch.uint8)[:, None]
    setting = Setting(denoiser, raw, scaling, None, 1, None, None)
    for z in (-3.0, 0.0, 0.31, 1.0, 2.0):
        mass = (-setting.reconstruct(torch.full((8, 1), z, dtype=torch.float64))).exp()
        assert bool((mass >= 0).all()) and float(mass.sum()) == pytest.approx(1.0, abs=1e-12)


def test_a_continuous_scaling_gives_the_density_of_raw_data() -> None:
    denoiser, x = gaussian(VPSDE()), points()
    scaling = Scaling(-1.0, 1.0, raw_low=-40.0, raw_high=160.0, bounded=False)
    raw = (x + 1) * 100 - 40
    scaled, plain = (elbo(denoiser, data, samples=3, rng=Rng(0), scaling=s) for data, s in ((raw, scaling), (x, None)))
    torch.testing.assert_close(scaled.log_prob, plain.log_prob + scaling.log_volume(raw, x), rtol=0, atol=1e-6)


def test_one_draw_has_no_error_bar() -> None:
    bound = vlb(gaussian(VPSDE()), points(2), steps=3)
    assert isinstance(bound, Bound) and bool(bound.stderr.isnan().all()) and bool(bound.log_prob.isfinite().all())


def test_what_cannot_work_is_refused() -> None:
    denoiser, x = gaussian(VPSDE()), points(2)
    with pytest.raises(ValueError, match="samples is a whole number of at least 1; got 0"):
        elbo(denoiser, x, samples=0)
    with pytest.raises(ValueError, match="steps is a whole number of at least 1; got 0"):
        vlb(denoiser, x, steps=0)
    with pytest.raises(ValueError, match="cut-off"):
        elbo(denoiser, x, samples=1, t_min=1.0)
    with pytest.raises(ValueError, match="batch"):
        elbo(denoiser, x[0], samples=1)
    with pytest.raises(TypeError, match="scaling"):
        elbo(denoiser, x.long(), samples=1)
    with pytest.raises(ValueError, match="Pass t_min="):
        importance_weighted(denoiser, x, steps=3, samples=1, grid=UniformGrid(0.1))
