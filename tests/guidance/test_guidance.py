"""Guidance against closed forms: conditional mixtures, tilted Gaussians, products of experts."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from labelled import CLASSES, Labelled
from oracles import closed_form_sdes, times
from torch import Tensor, nn

import scoresde
from scoresde import (
    EDM,
    VESDE,
    VPSDE,
    Denoiser,
    DPMSolverPP,
    Exact,
    GaussianMixtureDenoiser,
    Heun,
    LogSNRGrid,
    Preconditioned,
    Prediction,
    Rng,
    Sampler,
    elbo,
    importance_weighted,
    log_likelihood,
    sample_with_log_prob,
    vlb,
)
from scoresde.diffusion.denoiser import DenoiserWrapper
from scoresde.guidance import Auto, Blend, Classifier, ClassifierFree, Conditioned, Energy
from scoresde.likelihood.budget import Budget
from scoresde.likelihood.tolerance import Tolerance
from scoresde.metrics.sliced import sliced_w2
from scoresde.nn import MLP, UNet
from scoresde.ops.broadcast import as_time, expand_as_batch

SDES = closed_form_sdes()
each_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
LABELS = torch.tensor([0, 1, 2, 1, 0])


def points(sde, n: int = 5, event: tuple[int, ...] = (2,)) -> tuple[Tensor, Tensor]:
    """(x, t (n,)) at noise levels over the whole range, float64."""
    t = times(sde, n)
    return torch.randn(n, *event, generator=torch.Generator().manual_seed(1), dtype=torch.float64), t


def same(a: Prediction, b: Prediction, **tolerance) -> None:
    torch.testing.assert_close(a.x0, b.x0, **tolerance)
    torch.testing.assert_close(a.eps, b.eps, **tolerance)


def on_its_line(p: Prediction, x: Tensor) -> None:
    torch.testing.assert_close(p.scales.alpha * p.x0 + p.scales.sigma * p.eps, x, rtol=1e-9, atol=1e-9)


def network(seed: int = 0, **arguments) -> Preconditioned:
    """An untrained conditional network that answers, float64."""
    torch.manual_seed(seed)
    inner = MLP((2,), width=16, depth=1, **({"classes": CLASSES} | arguments)).double().eval()
    nn.init.normal_(inner.outlet.weight, std=0.3)
    return Preconditioned(inner, VPSDE(), EDM(1.0))


# Classifier-free guidance


@pytest.mark.parametrize("build", [lambda: Labelled(VPSDE()), network], ids=["exact", "network"])
@pytest.mark.parametrize("shape", [(), (5,)])
def test_scale_one_is_the_conditional_model_and_zero_the_unconditional_bit_for_bit(build, shape):
    denoiser = build()
    x, t = points(denoiser.sde)
    t = t[2] if shape == () else t
    for scale, cond in ((1.0, LABELS), (0.0, None)):
        got, want = ClassifierFree(denoiser, scale)(x, t, LABELS), denoiser(x, t, cond)
        assert torch.equal(got.x0, want.x0) and torch.equal(got.eps, want.eps)
        sampler = Sampler(Heun(), LogSNRGrid(), steps=4)
        drawn = sampler(ClassifierFree(denoiser, scale), x, cond=LABELS)
        assert torch.equal(drawn, sampler(denoiser, x, cond=cond))
        by_sample = ClassifierFree(denoiser, lambda snr, scale=scale: 0 * snr + scale)
        got, want = by_sample(x, t.expand(5), LABELS), denoiser(x, t.expand(5), cond)
        torch.testing.assert_close(got.x0, want.x0, rtol=1e-12, atol=1e-12)  # in a batch of 2B
    assert torch.equal(ClassifierFree(denoiser, 1.0, rescale=0.7)(x, t, LABELS).x0, denoiser(x, t, LABELS).x0)
    assert torch.equal(ClassifierFree(denoiser, 3.0)(x, t).x0, denoiser(x, t).x0)


def test_rescaling_is_the_same_for_one_time_and_for_many_and_goes_on_to_scale_zero():
    denoiser = network()
    x, t = points(denoiser.sde)
    for scale in (0.0, 1.0, 2.0):
        one = ClassifierFree(denoiser, scale, rescale=0.7)(x, t[2], LABELS)
        many = ClassifierFree(denoiser, lambda snr, scale=scale: 0 * snr + scale, rescale=0.7)(
            x, t[2].expand(5), LABELS
        )
        near = ClassifierFree(denoiser, scale + 1e-9, rescale=0.7)(x, t[2], LABELS)
        torch.testing.assert_close(many.x0, one.x0, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(near.x0, one.x0, rtol=0, atol=1e-7)


@each_sde
@pytest.mark.parametrize("scale", [-0.5, 0.3, 2.5])
def test_guided_scores_are_the_mixture_of_both_in_one_call(sde, scale):
    x, t = points(sde)
    for knows_null, calls in ((True, [10]), (False, [5, 5])):
        denoiser = Labelled(sde, knows_null)
        p = ClassifierFree(denoiser, scale)(x, t, LABELS)
        assert denoiser.calls == calls
        told, plain = denoiser(x, t, LABELS), denoiser(x, t)
        torch.testing.assert_close(p.score, (1 - scale) * plain.score + scale * told.score, rtol=1e-9, atol=1e-9)
        on_its_line(p, x)
        torch.testing.assert_close(p.velocity, (1 - scale) * plain.velocity + scale * told.velocity)


def test_a_scale_of_log_snr_and_an_interval_of_noise_choose_the_strength_by_sample():
    sde = VPSDE()
    x, t = points(sde)
    snr = sde.log_snr(t)
    ratio = torch.exp(-0.5 * snr)
    low, high = float(ratio[1]) * 0.99, float(ratio[3]) * 1.01
    denoiser = Labelled(sde)
    got = ClassifierFree(denoiser, lambda snr: 1 + torch.sigmoid(snr))(x, t, LABELS)
    cut = ClassifierFree(denoiser, 2.0, interval=(low, high))(x, t, LABELS)
    for k in range(5):
        one = x[k : k + 1], t[k : k + 1], LABELS[k : k + 1]
        w = 1 + float(torch.sigmoid(snr[k]))
        torch.testing.assert_close(got.x0[k], ClassifierFree(denoiser, w)(*one).x0[0])
        torch.testing.assert_close(cut.x0[k], ClassifierFree(denoiser, 2.0 if 1 <= k <= 3 else 1.0)(*one).x0[0])


def test_where_the_strength_is_one_or_zero_only_one_model_is_asked():
    sde = VPSDE()
    x, t = points(sde)
    level = float(torch.exp(-0.5 * sde.log_snr(t[2])))
    denoiser = Labelled(sde)
    inside = ClassifierFree(denoiser, 2.0, interval=(0.9 * level, 1.1 * level))
    for step, calls in ((0, [5]), (2, [10]), (4, [5])):
        denoiser.calls.clear()
        p = inside(x, t[step], LABELS)
        assert denoiser.calls == calls
        if step != 2:
            assert torch.equal(p.x0, denoiser(x, t[step], LABELS).x0)
    denoiser.calls.clear()
    p = ClassifierFree(denoiser, torch.zeros_like)(x, t[2], LABELS)
    assert denoiser.calls == [5] and torch.equal(p.x0, denoiser(x, t[2]).x0)
    denoiser.calls.clear()
    Sampler(Heun(), LogSNRGrid(), steps=4)(ClassifierFree(denoiser, 2.0), x, cond=LABELS)
    assert denoiser.calls == 9 * [10]


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_rescaling_brings_back_the_spread_of_one_sample_and_stays_on_the_line(share):
    sde, event = VPSDE(), (2, 3)
    denoiser = Labelled(sde, event_shape=event)
    x, t = points(sde, event=event)
    p = ClassifierFree(denoiser, 4.0, rescale=share)(x, t, LABELS)
    on_its_line(p, x)
    deviation = lambda p: p.x0.flatten(1).std(1)  # noqa: E731
    plain, told = ClassifierFree(denoiser, 4.0)(x, t, LABELS), denoiser(x, t, LABELS)
    torch.testing.assert_close(deviation(p), (1 - share) * deviation(plain) + share * deviation(told))
    with pytest.raises(ValueError, match="one number each"):
        ClassifierFree(Labelled(sde, event_shape=(1,)), 2.0, rescale=0.5)(x[:, :1, 0], t, LABELS)


def test_a_null_may_be_given_as_an_entry_or_as_a_function_of_the_condition():
    denoiser = Labelled(VPSDE(), knows_null=False)
    x, t = points(denoiser.sde)
    want = ClassifierFree(denoiser, 2.0)(x, t, LABELS)
    for null in (torch.tensor([CLASSES]), torch.tensor(CLASSES), lambda cond: torch.full_like(cond, CLASSES)):
        denoiser.calls.clear()
        same(ClassifierFree(denoiser, 2.0, null=null)(x, t, LABELS), want)
        assert denoiser.calls == [10]
    # of two conditions, guided by one
    both = network(cond_dim=2)
    cond = {"label": LABELS, "vector": torch.ones(5, 2, dtype=torch.float64)}
    keep_vector = lambda cond: {"vector": cond["vector"]}  # noqa: E731
    got = ClassifierFree(both, 3.0, null=keep_vector)(x, t, cond)
    want = both(x, t, {"vector": cond["vector"]}).blend(both(x, t, cond), 3.0)
    same(got, want)
    same(ClassifierFree(both, 0.0, null=keep_vector)(x, t, cond), both(x, t, {"vector": cond["vector"]}))
    # a guide around it has the same null, with the network's own for the label
    around = ClassifierFree(ClassifierFree(both, 1.0, null=keep_vector), 3.0)
    same(around(x, t, cond), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["label", "vector", "image", "tokens"])
def test_networks_answer_both_branches_of_every_kind_of_condition_in_one_call(kind):
    arguments = {
        "label": {"classes": 3},
        "vector": {"cond_dim": 2},
        "image": {"cond_image": (1, 4, 4)},
        "tokens": {"cond_tokens": 3},
    }[kind]
    torch.manual_seed(0)
    inner = UNet((1, 4, 4), width=8, multipliers=(1,), blocks=1, **arguments).double().eval()
    for parameter in inner.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    denoiser = Preconditioned(inner, VPSDE(), EDM(1.0))
    x, t = points(denoiser.sde, 3, (1, 4, 4))
    cond = {
        "label": LABELS[:3],
        "vector": torch.ones(3, 2),
        "image": torch.ones(3, 1, 4, 4),
        "tokens": torch.ones(3, 2, 3),
    }[kind]
    batches = []
    inner.register_forward_hook(lambda module, args, out: batches.append(len(out)))
    got = ClassifierFree(denoiser, 2.0)(x, t, cond)
    assert batches == [6]
    same(got, denoiser(x, t).blend(denoiser(x, t, cond), 2.0), rtol=1e-9, atol=1e-9)
    assert (got.x0 - denoiser(x, t, cond).x0).abs().max() > 1e-3


# Classifiers


@each_sde
def test_the_exact_noisy_classifier_makes_the_exact_conditional(sde):
    denoiser = Labelled(sde)
    x, t = points(sde)
    got = Classifier(denoiser, denoiser.classify)(x, t, LABELS)
    want = denoiser(x, t, LABELS)
    same(got, want, rtol=1e-6, atol=1e-7)
    on_its_line(got, x)
    assert torch.equal(Classifier(denoiser, denoiser.classify)(x, t).x0, denoiser(x, t).x0)


def draws(guided, y: Tensor, seed: int) -> Tensor:
    sampler = Sampler(DPMSolverPP(2), LogSNRGrid(), steps=30)
    start = guided.prior_sample((len(y), 2), rng=Rng(seed), dtype=torch.float64)
    return sampler(guided, start, cond=y, rng=Rng(seed))


@pytest.mark.parametrize("sde", [VPSDE(), VESDE()], ids=["vp", "ve"])
@pytest.mark.parametrize("method", ["free", "classifier"])
def test_guided_samples_are_at_the_two_sample_floor(sde, method):
    """The distance of exact draws to exact draws, and not more."""
    denoiser, y = Labelled(sde), torch.zeros(1500, dtype=torch.long)
    guided = ClassifierFree(denoiser) if method == "free" else Classifier(denoiser, denoiser.classify)
    exact = [denoiser.sample(y, rng=Rng(100 + i)) for i in range(7)]
    distance = lambda x: sliced_w2(exact[0], x, projections=64, rng=Rng(0))  # noqa: E731
    floor = torch.tensor([distance(other) for other in exact[1:]])
    got = distance(draws(guided, y, 7))
    # six floors tell mean and spread; draws of the same law lie within 4 of their standard deviations
    assert got < floor.mean() + 4 * floor.std()
    assert got < 0.15 * distance(denoiser.sample(y + CLASSES, rng=Rng(1)))


@each_sde
@pytest.mark.parametrize("method", ["free", "classifier"])
def test_the_likelihood_of_a_guided_model_is_the_exact_conditional_density(sde, method):
    """Also at the prior: p_T(x|y) differs from p_T(x) by up to 0.007 nats per dimension (VE), which is counted."""
    denoiser = Labelled(sde)
    guided = ClassifierFree(denoiser) if method == "free" else Classifier(denoiser, denoiser.classify)
    x0 = denoiser.sample(LABELS, rng=Rng(5))
    got = log_likelihood(guided, x0, cond=LABELS, solver=Tolerance(1e-5, 1e-5), divergence=Exact())
    exact = denoiser.log_prob(x0, torch.tensor(sde.t_min), LABELS)
    assert ((got.log_prob - exact).abs() / 2).max() < 2e-4
    assert ((exact - denoiser.whole.log_prob(x0, torch.tensor(sde.t_min))).abs() / 2).min() > 0.05


@each_sde
def test_samples_have_their_conditional_density_and_bounds_bound_it(sde):
    """log p of samples to 2e-4 per dim; bounds to 5e-4 nats of those of the exact conditional, draw by draw."""
    denoiser = Labelled(sde)
    guided = Classifier(denoiser, denoiser.classify)
    x, got = sample_with_log_prob(
        guided, (5, 2), cond=LABELS, solver=Tolerance(1e-5, 1e-5), divergence=Exact(), rng=Rng(1)
    )
    assert ((got.log_prob - denoiser.log_prob(x, torch.tensor(sde.t_min), LABELS)).abs() / 2).max() < 2e-4
    x0, y = denoiser.sample(torch.ones(5, dtype=torch.long), rng=Rng(2)), torch.ones(5, dtype=torch.long)
    for bound in (
        lambda d, cond: elbo(d, x0, samples=20, cond=cond),
        lambda d, cond: vlb(d, x0, steps=10, samples=2, cond=cond),
        lambda d, cond: importance_weighted(d, x0, steps=10, samples=3, cond=cond),
    ):
        # the label makes 1e-3 (flow) to 0.012 (VE) nats of the prior, of which second orders are left out
        want = bound(denoiser.parts[1], None).log_prob
        torch.testing.assert_close(bound(guided, y).log_prob, want, rtol=0, atol=5e-4)
    z = guided.prior_sample((500, 2), rng=Rng(0), dtype=torch.float64)
    y = torch.zeros(500, dtype=torch.long)
    plain = denoiser.prior_log_prob(z)
    gain = denoiser.prior_log_prob_given(z, y) - plain
    assert (guided.prior_log_prob_given(z, y) - gain - plain).abs().mean() < 0.03 * gain.abs().mean()


def test_a_bound_of_a_conditional_is_below_it_and_near():
    """E_z log p_{t_min}(z|y) + D log α, of which Jensen's gap at t_min = 1e-5 is 1e-5 nats: 320 samples together."""
    denoiser, y = Labelled(VPSDE()), LABELS.repeat(64)
    x0, t = denoiser.sample(y, rng=Rng(5)), torch.tensor(denoiser.sde.t_min)
    bound = elbo(Classifier(denoiser, denoiser.classify), x0, samples=40, cond=y, rng=Rng(2))
    error = float(bound.stderr.square().sum().sqrt()) / 320
    gap = denoiser.log_prob(x0, t, y) - bound.log_prob
    assert abs(float(gap.mean())) < 4.5 * error + 1e-3 and error < 0.1
    assert (denoiser.log_prob(x0, t, y) - denoiser.whole.log_prob(x0, t)).mean() > 9 * error


def gaussian(mean: float | list[float], var: float, sde) -> GaussianMixtureDenoiser:
    return GaussianMixtureDenoiser(torch.as_tensor(mean, dtype=torch.float64).reshape(1, -1), var, torch.ones(1), sde)


class TwoGaussians(DenoiserWrapper):
    """N(±m, v) by label, N(0, v) without: guided by w it is N(± w m, v), for every w and t."""

    def forward(self, x, t, cond=None):
        p = self.denoiser(x, t)
        if cond is None:
            return p
        alpha, sigma = p.scales.alpha, p.scales.sigma
        mean = (2.0 * cond - 1)[:, None] * 0.7
        return p.shift(alpha * mean / (alpha**2 * 0.3 + sigma**2))


@pytest.mark.parametrize("wrapper", [DenoiserWrapper, Denoiser], ids=["around", "denoiser"])
def test_a_prior_of_ones_own_need_not_know_of_conditions(wrapper):
    """log p with it is log p with the usual one and the difference of the two at the latent: here 1."""

    class Mine(wrapper):
        def __init__(self, inside):
            super().__init__(inside) if wrapper is DenoiserWrapper else super().__init__(inside.sde, inside.data_std)
            self.inside = inside

        def forward(self, x, t, cond=None):
            return self.inside(x, t, cond)

        def prior_log_prob(self, z):
            return self.inside.prior_log_prob(z) + 1

    denoiser, y = Labelled(VPSDE()), torch.tensor([0, 1, 2])
    x = torch.tensor([[0.5, -1.0], [1.0, 0.3], [-0.2, 0.4]])
    for cond in (None, y):
        plain, mine = (log_likelihood(d, x, cond=cond, solver=Budget(12)) for d in (denoiser, Mine(denoiser)))
        known = denoiser.prior_log_prob_given(plain.latent, cond) - denoiser.prior_log_prob(plain.latent)
        kept = known if wrapper is DenoiserWrapper else 0 * known  # a stranger says nothing of conditions
        torch.testing.assert_close(mine.log_prob, plain.log_prob - known + kept + 1, rtol=0, atol=1e-5)


def test_the_likelihood_of_stronger_guidance_is_that_of_its_flow():
    sde, w = VPSDE(), 2.5
    base = TwoGaussians(gaussian([0.0, 0.0], 0.3, sde))
    y = torch.tensor([0, 1, 1])
    want = gaussian([0.7 * w, 0.7 * w], 0.3, sde)
    x0 = want.sample(3, rng=Rng(0), dtype=torch.float64) * (2.0 * y - 1)[:, None]
    got = log_likelihood(ClassifierFree(base, w), x0, cond=y, solver=Tolerance(1e-6, 1e-6), divergence=Exact())
    flipped = x0 * (2.0 * y - 1)[:, None]
    # the flow starts from the prior of the base; what 0.7 w is of N(0, 1) at t_max, α_T z w m, is put on top
    shifted = want.prior_log_prob(got.latent * (2.0 * y - 1)[:, None]) - base.prior_log_prob(got.latent)
    torch.testing.assert_close(
        got.log_prob + shifted, want.log_prob(flipped, torch.tensor(sde.t_min)), rtol=0, atol=1e-4
    )


def test_mixtures_and_energies_of_x0_have_their_own_prior_too():
    """Under VE, where 2 % of the data are left at t_max: log p of every one is its Gaussian's, to 1e-3 nats."""
    sde = VESDE()
    base, first = gaussian([0.0, 0.0], 0.4, sde), gaussian([0.5, 0.0], 0.4, sde)
    slope = torch.tensor([0.5, -2.0], dtype=torch.float64)
    counted = scoresde.diffusion.denoiser.CountingDenoiser(base)
    for guided, mean in (
        (Blend(base, [(first, 2.0), (gaussian([-0.2, 1.0], 0.4, sde), lambda snr: 1.0)]), [0.8, 1.0]),
        (Auto(first, base, 3.0), [1.5, 0.0]),
        (Energy(counted, lambda z, t, cond: z @ slope, 1.5, of="x0"), [-0.3, 1.2]),
    ):
        want = gaussian(mean, 0.4, sde)
        x0 = want.sample(4, rng=Rng(0), dtype=torch.float64)
        got = log_likelihood(guided, x0, solver=Tolerance(1e-6, 1e-6), divergence=Exact())
        exact = want.log_prob(x0, torch.tensor(sde.t_min))
        torch.testing.assert_close(got.log_prob, exact, rtol=0, atol=1e-3)
        assert (want.prior_log_prob(got.latent) - base.prior_log_prob(got.latent)).abs().max() > 5e-3
    assert counted.evaluations == got.evaluations


def test_a_network_in_single_precision_is_asked_about_the_prior_in_it():
    """The latent of a solve is float64; a classifier whose weights are float32 is not."""
    denoiser = Labelled(VPSDE())
    torch.manual_seed(0)
    head = nn.Linear(2, CLASSES)
    guided = Classifier(denoiser, lambda x, t, y: head(x).log_softmax(1).gather(1, y[:, None])[:, 0])
    x = denoiser.sample(LABELS, rng=Rng(5)).float()
    got = log_likelihood(guided, x, cond=LABELS, solver=Budget(12), divergence=Exact())
    head.double()
    want = log_likelihood(guided, x.double(), cond=LABELS, solver=Budget(12), divergence=Exact())
    torch.testing.assert_close(got.log_prob, want.log_prob, rtol=1e-4, atol=1e-4)


# Energies


@each_sde
def test_an_energy_of_xt_tilts_a_gaussian_exactly_and_one_of_x0_pulls_too_hard_by_a_known_factor(sde):
    """p = N(m, v), E = ½ k (x_0 − a)²: x_0 | x_t ~ N(μ_t, v_t), and −log E[e^{−E} | x_t] = ½ (μ_t − a)²/(1/k + v_t)."""
    m, v, k, a = 0.4, 0.8, 3.0, -0.6
    denoiser = gaussian([m], v, sde)
    x, t = points(sde, event=(1,))

    def moments(z, t):
        alpha, sigma = (value[:, None] for value in sde.marginal(t))
        total = alpha**2 * v + sigma**2
        return m + alpha * v / total * (z - alpha * m), v * sigma**2 / total

    def energy(z, t, cond):
        mean, var = moments(z, t)
        return (0.5 * (mean - a) ** 2 / (1 / k + var)).sum(1)

    tilted = gaussian([(m / v + k * a) / (1 / v + k)], 1 / (1 / v + k), sde)
    got = Energy(denoiser, energy)(x, t)
    same(got, tilted(x, t), rtol=1e-6, atol=1e-7)
    rough = Energy(denoiser, lambda z, t, cond: 0.5 * k * (z - a).square().sum(1), of="x0")(x, t)
    plain, (_, var) = denoiser(x, t), moments(x, t)
    # relative to the pull, since where noise is small there is hardly any
    torch.testing.assert_close(rough.x0 - plain.x0, (1 + k * var) * (got.x0 - plain.x0), rtol=1e-5, atol=1e-12)
    on_its_line(rough, x)


@each_sde
def test_a_linear_energy_of_x0_is_exact_for_gaussians(sde):
    denoiser, slope = gaussian([0.4, -1.0], 0.8, sde), torch.tensor([0.5, -2.0], dtype=torch.float64)
    x, t = points(sde)
    got = Energy(denoiser, lambda z, t, cond: z @ slope, 1.5, of="x0")(x, t)
    want = gaussian([0.4 - 0.8 * 1.5 * 0.5, -1.0 + 0.8 * 1.5 * 2.0], 0.8, sde)
    same(got, want(x, t), rtol=1e-7, atol=1e-8)


def test_an_energy_is_told_the_condition_and_costs_one_call():
    denoiser = Labelled(VPSDE())
    x, t = points(denoiser.sde)
    seen = []

    def energy(z, times, cond):
        seen.append((times.shape, times.dtype, cond))
        return z.square().sum(1)

    for of in ("xt", "x0"):
        for conditional in (True, False):
            denoiser.calls.clear()
            got = Energy(denoiser, energy, 0.3, of=of, conditional=conditional)(x.float(), t[1], LABELS)
            assert denoiser.calls == [5] and got.x0.dtype == torch.float32
            plain = denoiser(x.float(), t[1], LABELS if conditional else None)
            z = x.float().requires_grad_()
            inner = z if of == "xt" else denoiser(z, t[1], LABELS if conditional else None).x0
            (slope,) = torch.autograd.grad(inner.square().sum(), z)
            torch.testing.assert_close(got.score, plain.score - 0.3 * slope, rtol=1e-4, atol=1e-4)
    assert all(shape == (5,) and dtype == torch.float32 and cond is LABELS for shape, dtype, cond in seen)


# Mixtures and nesting


def test_auto_guidance_leaves_the_guide_behind_at_a_known_rate():
    sde = VPSDE()
    good, weak = gaussian([0.5], 0.3, sde), gaussian([0.2], 0.3, sde)
    x, t = points(sde, event=(1,))
    same(Auto(good, weak, 3.0)(x, t), gaussian([0.2 + 3 * 0.3], 0.3, sde)(x, t))
    assert torch.equal(Auto(good, weak)(x, t).x0, good(x, t).x0)
    same(Auto(good, weak, lambda snr: 3.0)(x, t), Auto(good, weak, 3.0)(x, t))
    got = Auto(good, weak, lambda snr: torch.where(snr > 0, 3.0, 1.0))(x, t)
    strong = Auto(good, weak, 3.0)(x, t)
    snr = sde.log_snr(t)[:, None]
    torch.testing.assert_close(got.x0, torch.where(snr > 0, strong.x0, good(x, t).x0))


@each_sde
def test_a_conjunction_of_gaussians_of_one_width_is_the_product_of_experts(sde):
    """p_1 p_2 / p of N(m_i, v) and N(0, v) is N(m_1 + m_2, v), at every noise level."""
    first, second, base = (gaussian(m, 0.4, sde) for m in ([0.5, 0.0], [-0.2, 1.0], [0.0, 0.0]))
    x, t = points(sde)
    both = Blend(base, [(first, 1.0), (second, 1.0)])
    same(both(x, t), gaussian([0.3, 1.0], 0.4, sde)(x, t), rtol=1e-9, atol=1e-9)
    on_its_line(both(x, t), x)
    less = Blend(base, [(first, lambda snr: torch.zeros_like(snr)), (second, -0.5)])
    same(less(x, t), gaussian([0.1, -0.5], 0.4, sde)(x, t), rtol=1e-9, atol=1e-9)


def test_conditions_may_be_filled_in_or_picked_from_those_of_the_sampler():
    denoiser = Labelled(VPSDE())
    x, t = points(denoiser.sde)
    same(Conditioned(denoiser, torch.tensor([1]))(x, t), denoiser(x, t, torch.full((5,), 1)))
    pair = {"a": LABELS, "b": LABELS.flip(0)}
    pick = lambda name: Conditioned(denoiser, lambda cond: cond[name])  # noqa: E731
    both = Blend(Conditioned(denoiser, lambda cond: None), [(pick("a"), 1.0), (pick("b"), 1.0)])
    score = denoiser(x, t, pair["a"]).score + denoiser(x, t, pair["b"]).score - denoiser(x, t).score
    torch.testing.assert_close(both(x, t, pair).score, score)
    # and a solver that asks for some of the batch only finds theirs
    step = scoresde.AdaptiveODE(1e-3, 1e-3)
    together = Sampler(step)(both, x, cond=pair)
    alone = Sampler(step)(both, x[3:], cond={name: value[3:] for name, value in pair.items()})
    torch.testing.assert_close(together[3:], alone, rtol=1e-6, atol=1e-6)


def test_classifiers_nest_by_the_chain_rule():
    """p(x) p(y|x) p(z|x,y), with z which of the two components of y it is: one Gaussian."""
    sde = VPSDE()
    denoiser = Labelled(sde)
    alone = lambda k, z: GaussianMixtureDenoiser(  # noqa: E731
        denoiser.means[[k + 3 * z]], denoiser.vars[k + 3 * z], torch.ones(1), sde
    )
    z = torch.tensor([1, 0, 1, 1, 0])

    def second(x, t, cond):
        logs = (denoiser._components(x, t)[-1] + denoiser.log_weights[cond["y"]]).log_softmax(1)
        return logs.gather(1, (cond["y"] + 3 * cond["z"])[:, None])[:, 0]

    x, t = points(sde)
    inner = Classifier(denoiser, lambda x, t, y: denoiser.classify(x, t, y["y"]))
    cond = {"y": LABELS, "z": z}
    # what lies inside a Classifier is told nothing, unless asked for
    got = Classifier(inner, second, conditional=True)(x, t, cond)
    for k in range(5):
        want = alone(int(LABELS[k]), int(z[k]))(x[k : k + 1], t[k : k + 1])
        torch.testing.assert_close(got.x0[k], want.x0[0], rtol=1e-6, atol=1e-6)


def test_energies_nest_and_mixtures_hold_guides():
    sde = VPSDE()
    base, x, t = gaussian([0.4, -1.0], 0.8, sde), *points(sde)
    linear = lambda slope: lambda z, t, cond: z @ torch.tensor(slope, dtype=torch.float64)  # noqa: E731
    nested = Energy(Energy(base, linear([0.5, 0.0]), of="x0"), linear([0.0, -2.0]), of="x0")
    same(nested(x, t), gaussian([0.0, 0.6], 0.8, sde)(x, t), rtol=1e-7, atol=1e-8)
    denoiser = Labelled(sde)
    guided = Classifier(denoiser, denoiser.classify)
    # free guidance around a classifier: asked with and without, it is the classifier at that scale
    same(ClassifierFree(guided, 2.0)(x, t, LABELS), Classifier(denoiser, denoiser.classify, 2.0)(x, t, LABELS))
    # and around an energy of x_t that no condition changes, it is free guidance with that energy
    round_ = lambda z, t, cond: z.square().sum(1)  # noqa: E731
    outside, inside = ClassifierFree(Energy(denoiser, round_), 2.0), Energy(ClassifierFree(denoiser, 2.0), round_)
    same(outside(x, t, LABELS), inside(x, t, LABELS), rtol=1e-9, atol=1e-9)
    # free guidance inside one: both branches in one batch, the classifier asked about the samples there are
    strong = Classifier(ClassifierFree(denoiser, 2.0), denoiser.classify, conditional=True)
    denoiser.calls.clear()
    got = strong(x, t, LABELS)
    assert denoiser.calls == [10]
    told, plain = denoiser(x, t, LABELS), denoiser(x, t)
    score = 2 * told.score - plain.score + (told.score - plain.score)
    torch.testing.assert_close(got.score, score, rtol=1e-5, atol=1e-6)


# Everything that takes a denoiser


def guided_denoisers() -> dict[str, scoresde.Denoiser]:
    denoiser = Labelled(VPSDE())
    pull = lambda z, t, cond: 0.5 * (z - cond[:, None].to(z.dtype)).square().sum(1)  # noqa: E731
    return {
        "free": ClassifierFree(denoiser, 1.5, interval=(0.1, 5.0)),
        "classifier": Classifier(denoiser, denoiser.classify, 1.2),
        "energy": Energy(ClassifierFree(denoiser, 2.0), pull, 0.2, of="x0"),
        "blend": Blend(denoiser, [(Auto(denoiser, Conditioned(denoiser, lambda cond: None), 1.5), 0.5)]),
    }


def steps() -> dict[str, scoresde.Step]:
    """Every public step that is one by itself, with its defaults; correctors behind a predictor. A flow map is a step
    of networks that are told where they go (tests/sampling/test_flow_map.py guides one)."""
    public = (getattr(scoresde, name) for name in scoresde.__all__)
    kinds = {kind for kind in public if isinstance(kind, type) and issubclass(kind, scoresde.Step)}
    kinds -= {scoresde.Step, scoresde.FlowMap}
    behind = lambda corrector: scoresde.PredictorCorrector(scoresde.EulerMaruyama(), corrector())  # noqa: E731
    made = {kind.__name__: behind(kind) for kind in (scoresde.Langevin, scoresde.AnnealedLangevin)}
    made |= {
        "PredictorCorrector": behind(scoresde.Langevin),
        "Multistep": scoresde.Multistep(3),
        "AdaptiveODE": scoresde.AdaptiveODE(1e-2, 1e-2),
        "AdaptiveSDE": scoresde.AdaptiveSDE(0.1, 0.1),
        "Restart": scoresde.Restart(repeats=1, steps=2),
        "TorchSDE": scoresde.TorchSDE(),
    }
    for kind in kinds:
        needs = [p for p in inspect.signature(kind).parameters.values() if p.default is p.empty]
        if kind.__name__ not in made and not any(p.kind is p.POSITIONAL_OR_KEYWORD for p in needs):
            made[kind.__name__] = kind()
    return dict(sorted(made.items()))


STEPS = steps()
BATCHED = {"TorchSDE"}  # one Brownian path and step for the batch, by the other library


@pytest.mark.parametrize("name", STEPS)
def test_every_step_takes_guidance_and_labels_per_sample(name):
    """A sample of a batch with a label each is what it is alone; and the label is heard."""
    sampler = Sampler(STEPS[name], LogSNRGrid(), steps=None if STEPS[name].evaluations is None else 4)
    for kind, guided in guided_denoisers().items():
        y, x = torch.tensor([0, 2, 1]), guided.prior_sample((3, 2), rng=Rng(3), dtype=torch.float64)
        together = sampler(guided, x, cond=y, rng=Rng(seeds=[5, 6, 7]))
        assert together.isfinite().all()
        if name not in BATCHED:
            alone = sampler(guided, x[1:2], cond=y[1:2], rng=Rng(seeds=[6]))
            torch.testing.assert_close(alone[0], together[1], rtol=1e-6, atol=1e-6, msg=f"{kind} with {name}")
            other = sampler(guided, x[1:2], cond=y[:1], rng=Rng(seeds=[6]))
            assert (other[0] - together[1]).abs().max() > 1e-3, kind


def test_gradients_go_through_guidance_and_need_none_around_it():
    for kind, guided in guided_denoisers().items():
        x, t = points(guided.sde)
        assert torch.autograd.gradcheck(
            lambda x, guided=guided, t=t: guided(x, t[2], LABELS).eps, (x.requires_grad_(),), fast_mode=True
        ), kind
        with torch.no_grad():
            silent = guided(x, t, LABELS)
        assert not silent.x0.requires_grad
        torch.testing.assert_close(silent.x0, guided(x, t, LABELS).x0.detach())
        exact = torch.func.jacrev(lambda z, g=guided, t=t: g(z[None], t[2], LABELS[:1]).eps[0])(x[0].detach())
        rows = [torch.autograd.grad(guided(x, t[2], LABELS).eps[0, i], x)[0][0] for i in range(2)]
        torch.testing.assert_close(exact, torch.stack(rows))


def test_guided_denoisers_compile_to_one_graph():
    denoiser, weak = network(), network(1)
    head = nn.Linear(2, CLASSES).double()
    log_prob = lambda x, t, y: head(x).log_softmax(1).gather(1, y[:, None])[:, 0]  # noqa: E731
    pull = lambda z, t, cond: z.square().sum(1)  # noqa: E731
    guided = Classifier(Auto(ClassifierFree(denoiser, 2.0, interval=(0.1, 9.0)), weak, 1.3), log_prob, conditional=True)
    guided = Energy(Blend(guided, [(Conditioned(denoiser, lambda cond: None), -0.2)]), pull, 0.1, of="x0")
    x, t = points(denoiser.sde)
    compiled = torch.compile(guided, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        got, want = compiled(x, t, LABELS), guided(x, t, LABELS)
    same(got, want)


class Projected(DenoiserWrapper):
    """Adaptive projected guidance (Sadat et al. 2024, eq. 8): of the pull away from ∅, the part along x̂_0 is scaled."""

    def __init__(self, denoiser, scale, parallel=0.0):
        super().__init__(denoiser)
        self.scale, self.parallel = scale, parallel

    def forward(self, x, t, cond=None):
        plain, told = self.denoiser(x, t), self.denoiser(x, t, cond)
        pull, unit = told.x0 - plain.x0, told.x0 / told.x0.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.ndim - 1))
        along = expand_as_batch((pull * unit).flatten(1).sum(1), x) * unit
        x0 = told.x0 + (self.scale - 1) * (pull - (1 - self.parallel) * along)
        scales = self.sde.at(as_time(t, x), x)
        return Prediction(x0, (x - scales.alpha * x0) / scales.sigma, scales)


def test_a_method_from_outside_the_package_takes_thirty_lines_and_goes_everywhere():
    assert len(inspect.getsource(Projected).splitlines()) <= 30
    denoiser = Labelled(VPSDE())
    x, t = points(denoiser.sde)
    free = ClassifierFree(denoiser, 3.0)
    same(Projected(denoiser, 3.0, parallel=1.0)(x, t, LABELS), free(x, t, LABELS), rtol=1e-6, atol=1e-6)
    got, told = Projected(denoiser, 3.0)(x, t, LABELS), denoiser(x, t, LABELS)
    torch.testing.assert_close(((got.x0 - told.x0) * told.x0).sum(1), torch.zeros(5).double(), rtol=0, atol=1e-9)
    for name in ("DPMSolverPP", "EulerMaruyama", "AdaptiveODE", "Restart"):
        step = STEPS[name]
        sampler = Sampler(step, LogSNRGrid(), steps=None if step.evaluations is None else 6)
        outs = [sampler(g, x, cond=LABELS) for g in (Projected(denoiser, 1.0), denoiser)]
        torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)
    x0 = denoiser.sample(LABELS, rng=Rng(5))
    same_as = [
        log_likelihood(g, x0, cond=LABELS, solver=Tolerance(1e-5, 1e-5), divergence=Exact()).log_prob
        for g in (Projected(denoiser, 2.0, parallel=1.0), ClassifierFree(denoiser, 2.0))
    ]
    # the second counts what the condition makes of the prior, w times 0.005 of z and of the labels
    torch.testing.assert_close(*same_as, rtol=0, atol=0.1)


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda d: ClassifierFree(d, math.nan), "finite number or a function"),
        (lambda d: ClassifierFree(d, 2.0, interval=(3.0, 1.0)), r"\(3.0, 1.0\)"),
        (lambda d: ClassifierFree(d, 2.0, rescale=1.5), r"\[0, 1\]"),
        (lambda d: ClassifierFree(d, 2.0, null=LABELS), "one entry"),
        (lambda d: ClassifierFree(d, 2.0, null={"label": LABELS[:1]})(*points(d.sde), LABELS), "the same names"),
        (lambda d: Conditioned(d, LABELS), "one entry"),
        (lambda d: Conditioned(d, LABELS[:1])(*points(d.sde), LABELS), "leave cond out"),
        (lambda d: Energy(d, lambda z, t, c: z, of="x1"), "'x1'"),
        (lambda d: Energy(d, lambda z, t, c: z)(*points(d.sde)), r"\(5,\)"),
        (lambda d: Energy(d, lambda z, t, c: z.sum(), of="x0")(*points(d.sde)), r"\(5,\)"),
        (lambda d: Classifier(d, lambda z, t, y: z)(*points(d.sde), LABELS), r"got shape \(5, 2\)"),
        (lambda d: Auto(d, Labelled(VESDE()), 2.0), "the same SDE"),
        (lambda d: Blend(d, [(Labelled(VPSDE(beta_max=10.0)), 1.0)]), "other constants"),
    ],
)
def test_guidance_that_makes_no_sense_is_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build(Labelled(VPSDE()))
