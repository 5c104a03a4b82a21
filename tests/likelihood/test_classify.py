"""Classifiers by density and by training, against the exact posterior of a mixture."""

from __future__ import annotations

import math

import pytest
import torch
from labelled import CLASSES, Labelled
from oracles import VPSDE, closed_form_sdes, times
from torch import nn

from scoresde import (
    ClassifierLoss,
    Exact,
    GaussianMixtureDenoiser,
    NoisyClassifier,
    Prediction,
    Rng,
    classify,
)
from scoresde.diffusion.denoiser import DenoiserWrapper
from scoresde.guidance import Classifier, ClassifierFree
from scoresde.likelihood.budget import Budget
from scoresde.likelihood.tolerance import Tolerance
from scoresde.losses.denoising import LogNormalTimes, UniformTimes
from scoresde.nn import Classifier as Network

SDES = closed_form_sdes()


# The density of each class, and Bayes' rule


@pytest.mark.parametrize("name", ["vp", "flow"])
def test_bayes_rule_gives_the_exact_posterior(name):
    denoiser = Labelled(SDES[name])
    x = denoiser.whole.sample(6, rng=Rng(0), dtype=torch.float64)
    got = classify(
        denoiser,
        x,
        CLASSES,
        priors=denoiser.priors[:-1] * 5,
        solver=Tolerance(1e-4, 1e-4),
        divergence=Exact(),
        rng=Rng(1),
    )
    want = denoiser.posterior(x, torch.tensor(denoiser.sde.t_min))
    # log p(x|y) is solved to about 1e-3; where a sample is far from a class, the density is less certain
    near = want > -6
    torch.testing.assert_close(got.log_posterior[near], want[near], rtol=0, atol=1e-2)
    assert torch.equal(got.label, want.argmax(1)) and near.sum() > 6
    torch.testing.assert_close(got.log_posterior.exp().sum(1), torch.ones(6).double())
    assert len(denoiser.calls) == got.evaluations
    # equal priors by default
    flat = classify(denoiser, x, [torch.tensor(k) for k in range(3)], solver=Budget(32), divergence=Exact())
    torch.testing.assert_close(
        flat.log_posterior[near], (want - denoiser.priors[:-1].log()).log_softmax(1)[near], rtol=0, atol=5e-2
    )


class Shifted(DenoiserWrapper):
    """N(±m, C) by label: one covariance, so one Jacobian, for both classes."""

    def forward(self, x, t, cond=None):
        scales = self.sde.at(t, x)
        mean = ((2 * cond - 1) * 0.5)[:, None] * torch.ones(x.shape[1], dtype=x.dtype)
        p = self.denoiser(x - scales.alpha * mean, t)
        return Prediction(p.x0 + mean, p.eps, scales)


def test_probes_are_common_so_what_classes_share_cancels():
    sde, draw = SDES["vp"], torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cov = 0.1 * draw @ draw.mT + 0.05 * torch.eye(8).double()
    base = GaussianMixtureDenoiser(torch.zeros(1, 8), cov[None], torch.ones(1), sde)
    x = base.sample(6, rng=Rng(0), dtype=torch.float64)
    one = classify(Shifted(base), x, 2, solver=Budget(16), rng=Rng(2))
    exact = classify(Shifted(base), x, 2, solver=Budget(16), divergence=Exact())
    error = one.log_prob - exact.log_prob
    assert error.abs().mean() > 0.3  # nats, and the same for both
    torch.testing.assert_close(error[:, 0], error[:, 1], rtol=0, atol=1e-6)
    torch.testing.assert_close(one.log_posterior, exact.log_posterior, rtol=0, atol=1e-6)
    assert torch.equal(classify(Shifted(base), x, 2, solver=Budget(16), rng=Rng(2)).log_prob, one.log_prob)


def test_the_error_bar_covers_what_one_probe_leaves_open():
    event = (3, 4, 4)
    denoiser = Labelled(SDES["vp"], event_shape=event)
    denoiser.means.mul_(0.1)  # classes that overlap: the posterior is undecided, and nats of error move it
    x = denoiser.means[torch.arange(24) % 6] + 0.3 * Rng(0).normal((24, *event), dtype=torch.float64)
    noisy = classify(denoiser, x, CLASSES, solver=Budget(16), priors=denoiser.priors[:-1], rng=Rng(2))
    want = denoiser.posterior(x, torch.tensor(denoiser.sde.t_min))
    assert noisy.stderr.median() > 0.1
    inside = (noisy.log_posterior - want).abs() < 1.96 * noisy.stderr
    # of 95 %, less three binomial standard deviations; the three of one sample are not independent
    assert inside.double().mean() > 0.95 - 3 * math.sqrt(0.05 * 0.95 / 24)


def test_a_classifier_guided_model_classifies_as_its_classifier_does():
    denoiser = Labelled(SDES["vp"])
    x = denoiser.whole.sample(5, rng=Rng(0), dtype=torch.float64)
    got = classify(
        Classifier(denoiser, denoiser.classify),
        x,
        3,
        priors=denoiser.priors[:-1],
        solver=Budget(12),
        divergence=Exact(),
    )
    want = classify(ClassifierFree(denoiser), x, 3, priors=denoiser.priors[:-1], solver=Budget(12), divergence=Exact())
    torch.testing.assert_close(got.log_posterior, want.log_posterior, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"classes": 1}, "at least 2 classes"),
        ({"classes": 3, "priors": torch.ones(2)}, "3 positive numbers"),
        ({"classes": 3, "priors": torch.tensor([1.0, -1.0, 1.0])}, "positive"),
    ],
)
def test_a_choice_that_is_none_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        classify(Labelled(SDES["vp"]), torch.zeros(2, 2), solver=Budget(8), **arguments)


# A classifier of noisy samples


def two_gaussians(sde) -> tuple[list[GaussianMixtureDenoiser], torch.Tensor]:
    """N(±1, 0.1 I) in two dimensions, of weights 0.7 and 0.3."""
    means = torch.tensor([[1.0, 0.5], [-1.0, -0.5]], dtype=torch.float64)
    return [GaussianMixtureDenoiser(m[None], 0.3, torch.ones(1), sde) for m in means], torch.tensor([0.7, 0.3]).double()


def posterior(parts, priors, x, t) -> torch.Tensor:
    return (torch.stack([part.log_prob(x, t) for part in parts], 1) + priors.log()).log_softmax(1)


def test_training_leads_to_the_exact_noisy_posterior_and_its_gradient_guides():
    sde = VPSDE()
    parts, priors = two_gaussians(sde)
    torch.manual_seed(0)
    classifier = NoisyClassifier(Network((2,), classes=2, width=64), sde)
    loss, optimizer = ClassifierLoss(classifier), torch.optim.Adam(classifier.parameters(), lr=4e-3)
    rng, steps = Rng(0), 300

    def batch(n: int, rng: Rng) -> tuple[torch.Tensor, torch.Tensor]:
        y = (rng.uniform((n,)) > 0.7).long()
        return torch.stack([part.sample(n, rng=rng) for part in parts], 1)[torch.arange(n), y], y

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / steps)
        loss(*batch(256, rng), rng=rng).mean().backward()
        optimizer.step(), optimizer.zero_grad()
    with torch.no_grad():
        x0, y = batch(4000, Rng(1))
        terms = loss.terms(x0, y, rng=Rng(2))
        x = sde.perturb(x0, terms.t, Rng(3).normal_like(x0))
        want = posterior(parts, priors, x.double(), terms.t)
        got = classifier.logits(x, terms.t).double().log_softmax(1)
        # in nats: the divergence of the exact posterior from the learned one, of an entropy that goes from 0 to 0.61
        divergence = (want.exp() * (want - got)).sum(1).mean()
        assert 0 < divergence < 0.005
        entropy = -(want.exp() * want).sum(1).mean()
        assert abs(terms.loss.double().mean() - entropy) < 0.005 + 4 * terms.loss.std() / math.sqrt(4000)
    # Guided by it, the mixture is about the conditional where x_t lies between both: less than a third is left to go.
    whole = GaussianMixtureDenoiser(torch.cat([p.means for p in parts]), 0.3, priors, sde)
    guided, t = Classifier(whole, classifier), times(sde, 7)[2:6]
    points = 0.3 * Rng(4).normal((4, 2))
    for k in range(2):
        label = torch.full((4,), k)
        plain, told = whole(points, t), guided(points, t, label)
        exact = parts[k](points, t)
        assert (told.x0 - exact.x0).norm(dim=1).mean() < 0.3 * (plain.x0 - exact.x0).norm(dim=1).mean()


@pytest.mark.parametrize("event", [(3,), (2, 9), (1, 12, 5), (1, 3, 6, 5)])
def test_classifier_networks_start_undecided_and_hear_x_noise_and_place(event):
    torch.manual_seed(0)
    network = Network(event, classes=4, width=8).double()
    x = torch.randn(3, *event, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    c_noise = torch.linspace(-2, 2, 3, dtype=torch.float64)
    assert torch.equal(network(x, c_noise), torch.zeros(3, 4).double())
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    out = network(x, c_noise)
    assert (out - network(x, c_noise + 0.5)).abs().amax(1).min() > 1e-4
    assert (out - network(x.flip(-1), c_noise)).abs().amax(1).min() > 1e-4
    torch.testing.assert_close(network(x[1:2], c_noise[1:2])[0], out[1])
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())
    assert torch.autograd.gradcheck(lambda x: network(x, c_noise[:1]), (x[:1].requires_grad_(),), fast_mode=True)


@pytest.mark.parametrize("sampler", [UniformTimes(), LogNormalTimes()], ids=["uniform", "lognormal"])
def test_the_loss_of_a_known_classifier_is_its_cross_entropy_at_the_times_drawn(sampler):
    """Logits that say −c_noise and c_noise, whatever x: softplus(∓2 c_noise), to the bit of the times."""
    sde = VPSDE()
    known = NoisyClassifier(lambda x, c: torch.stack([-c, c], 1) + 0 * x[:, :1], sde)
    y = torch.tensor([0, 1, 1, 0])
    for dtype in (torch.int64, torch.int32):
        terms = ClassifierLoss(known, sampler).terms(torch.zeros(4, 2), y.to(dtype), rng=Rng(0))
        c = -sde.log_snr(terms.t) / 8
        want = torch.nn.functional.softplus(torch.where(y == 0, 2 * c, -2 * c))
        torch.testing.assert_close(terms.objective.double(), want, rtol=1e-5, atol=1e-6)
    t, _ = sampler.sample(sde, 4, Rng(0), torch.device("cpu"))
    torch.testing.assert_close(terms.t, t)
    smooth = ClassifierLoss(known, sampler, smoothing=0.2)(torch.zeros(4, 2), y, rng=Rng(0))
    other = torch.nn.functional.softplus(torch.where(y == 0, -2 * c, 2 * c))
    torch.testing.assert_close(smooth.double(), 0.9 * want + 0.1 * other, rtol=1e-5, atol=1e-6)


def test_a_noisy_classifier_sees_unit_variance_and_answers_for_labels_however_given():
    sde, seen = SDES["ve"], []
    head = nn.Linear(2, 3)

    def network(x, c):
        seen.append(x)
        return head(x)

    classifier = NoisyClassifier(network, sde, sigma_data=0.5)
    t, y = times(sde, 4), torch.tensor([0, 2, 1, 1])
    x = torch.ones(4, 2)
    got = classifier(x, t, y)
    alpha, sigma = sde.marginal(t)
    torch.testing.assert_close(seen[0], (x / (0.25 * alpha**2 + sigma**2).sqrt()[:, None]).float())
    torch.testing.assert_close(got, head(seen[0]).log_softmax(1)[torch.arange(4), y])
    assert torch.equal(classifier(x, t, {"label": y, "vector": x}), got)


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: Network((2,), classes=1), "classes is a whole number of at least 2; got 1"),
        (
            lambda: Network((2,), classes=2, depth=0),
            "depth, the number of dense blocks, is a whole number of at least 1; got 0",
        ),
        (lambda: Network((), classes=2), "shape of one sample"),
        (lambda: Network((2,), classes=2)(torch.zeros(1, 3), torch.zeros(1)), r"\(2,\)"),
        (lambda: NoisyClassifier(nn.Linear(2, 2), VPSDE(), sigma_data=0.0), "> 0"),
        (
            lambda: NoisyClassifier(Network((2,), classes=2), VPSDE())(torch.zeros(2, 2), torch.ones(2), torch.ones(2)),
            "integer labels",
        ),
        (lambda: NoisyClassifier(Network((2,), classes=2), VPSDE())(torch.zeros(2, 2), torch.ones(2), None), "none"),
        (lambda: ClassifierLoss(NoisyClassifier(Network((2,), classes=2), VPSDE()), smoothing=1.0), r"\[0, 1\)"),
        (lambda: ClassifierLoss(NoisyClassifier(Network((2,), classes=2), VPSDE()), UniformTimes(2.0)), "cut-off"),
    ],
)
def test_classifiers_that_make_no_sense_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()
