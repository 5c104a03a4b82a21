"""Losses against closed forms: Gaussian data, and a linear denoiser whose error is known at every t."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import EVENT_SHAPES, all_sdes, closed_form_sdes, gauss_legendre, mean_and_stderr, mixture, segments, times
from torch import Tensor, nn

from scoresde import (
    DDPM,
    EDM,
    EDMSDE,
    SDE,
    VPSDE,
    CosineSDE,
    DenoisingLoss,
    Eps,
    GaussianMixtureDenoiser,
    Preconditioned,
    RectifiedFlow,
    Rng,
    ScoreFunction,
)
from scoresde.losses.denoising import (
    DiscreteTimes,
    EDMWeighting,
    Independent,
    Likelihood,
    LogNormalTimes,
    LogSNRTimes,
    MinSNR,
    Simple,
    StratifiedTimes,
    Times,
    UniformTimes,
    Weighting,
)
from scoresde.nn import LogVariance

ALL = all_sdes()
each_sde = pytest.mark.parametrize("sde", ALL.values(), ids=ALL.keys())
WEIGHTINGS = {"simple": Simple(), "likelihood": Likelihood(), "edm": EDMWeighting(0.8), "min_snr": MinSNR(5.0)}
TIMES = {"uniform": UniformTimes(), "stratified": StratifiedTimes(), "log_snr": LogSNRTimes()}
KS_CRITICAL = math.sqrt(-math.log(1e-5 / 2) / 2)  # level 1e-5
VAR, FACTOR, DIMS = 0.6, 0.7, 3


def imperfect(sde: SDE) -> ScoreFunction:
    """ε̂ = FACTOR · E[ε | x_t] for data N(0, VAR · I): wrong by a known amount."""

    def score(x: Tensor, t: Tensor) -> Tensor:
        scales = sde.at(t, x)
        return -FACTOR * x / (scales.alpha**2 * VAR + scales.sigma**2)

    return ScoreFunction(score, sde)


def expected_error(sde: SDE, t: Tensor) -> Tensor:
    """E‖ε̂ − ε‖²/D of `imperfect`: with s = σ²/(α²v + σ²), E‖ε̂‖²/D = c²s and E⟨ε̂, ε⟩/D = cs."""
    alpha, sigma = sde.marginal(t)
    s = sigma**2 / (alpha**2 * VAR + sigma**2)
    return 1 - 2 * FACTOR * s + FACTOR**2 * s


def weight_by_hand(name: str, sde: SDE, t: Tensor) -> Tensor:
    """w(t) from the formulas, by f, g, α and σ rather than by the library's shortcut."""
    alpha, sigma = sde.marginal(t)
    span = sde.t_max - sde.t_min
    return {
        "simple": torch.ones_like(t),
        "likelihood": 0.5 * sde.diffusion(t) ** 2 / sigma**2 * DIMS * span,
        "edm": ((sigma / alpha) ** 2 + 0.8**2) / 0.8**2,
        "min_snr": torch.minimum(alpha**2 / sigma**2, torch.tensor(5.0)) / (alpha**2 / sigma**2),
    }[name]


@pytest.mark.parametrize("sampler", TIMES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("name", ALL)
def test_expected_loss_is_the_closed_form(name, weighting, sampler) -> None:
    """E_t[w E‖ε̂ − ε‖²/D] = ∫ w(t) e(t) dt/(t_max − t_min), within 4 standard errors, whatever t is drawn from.

    The losses of a stratified batch are not independent, so the standard error is that of 64 batch means. The EDM
    weight e^{−λ} reaches 1e6 at t = 0.999, where no affordable mean has a useful error: those two end at 0.95 here.
    """
    sde = {"cosine": CosineSDE(t_max=0.95), "flow": RectifiedFlow(t_max=0.95)}.get(name, ALL[name])
    nodes, pieces = gauss_legendre(segments(sde))
    integrand = weight_by_hand(weighting, sde, nodes) * expected_error(sde, nodes)
    expected = float((pieces * integrand).sum() / (sde.t_max - sde.t_min))
    loss = DenoisingLoss(imperfect(sde), TIMES[sampler], WEIGHTINGS[weighting])
    rng = Rng(0)
    means = []
    for _ in range(64):
        x0 = math.sqrt(VAR) * rng.normal((512, DIMS))
        means.append(loss(x0, rng=rng).double().mean())
    mean, stderr = mean_and_stderr(torch.stack(means))
    assert abs(mean - expected) < 4 * stderr, (mean, expected, stderr)
    # g² under times that are even in t is the heavy-tailed case that importance sampling is there for
    assert stderr < (0.3 if weighting == "likelihood" and sampler in ("uniform", "stratified") else 0.1) * expected


@pytest.mark.parametrize("name", WEIGHTINGS)
@each_sde
def test_weights_are_their_formulas(sde, name) -> None:
    t = times(sde, 21, ends=True)[1:-1]
    got = WEIGHTINGS[name].weight(sde, t, DIMS, sde.t_max - sde.t_min)
    assert got.shape == t.shape
    torch.testing.assert_close(got, weight_by_hand(name, sde, t), rtol=1e-9, atol=0)


@each_sde
def test_weights_are_prices_of_other_errors(sde) -> None:
    """w‖ε̂ − ε‖² is: the σ²-weighted score error (Simple), ½g² of it (Likelihood), the error of F (EDM)."""
    t = times(sde, 9)
    a, b, x = torch.randn(3, 9, DIMS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scales, row = sde.at(t, x), EDM(0.8)
    p, q = row.prediction(a, x, scales), row.prediction(b, x, scales)
    eps_error = (p.eps - q.eps).square().sum(1)
    score_error = (p.score - q.score).square().sum(1)
    sigma, g = sde.marginal(t)[1], sde.diffusion(t)
    span = sde.t_max - sde.t_min

    def price(weighting: Weighting) -> Tensor:
        return weighting.weight(sde, t, DIMS, span) * eps_error

    torch.testing.assert_close(price(Simple()), sigma**2 * score_error, rtol=1e-8, atol=0)
    torch.testing.assert_close(price(Likelihood()) / (DIMS * span), 0.5 * g**2 * score_error, rtol=1e-8, atol=0)
    torch.testing.assert_close(price(EDMWeighting(0.8)), (a - b).square().sum(1), rtol=1e-8, atol=0)


@each_sde
def test_importance_sampling_has_the_same_mean_and_less_variance(sde) -> None:
    """Likelihood weight: λ-uniform times against uniform ones. The mean agrees, the variance falls.

    Uniform times have weight dλ/dt, of order 1/t_min at the data end; λ-uniform ones a constant weight ½Z.
    """
    x0 = math.sqrt(VAR) * Rng(3).normal((40_000, DIMS))
    uniform = DenoisingLoss(imperfect(sde), UniformTimes(), Likelihood())(x0, rng=Rng(1))
    level = DenoisingLoss(imperfect(sde), LogSNRTimes(), Likelihood())(x0, rng=Rng(2))
    (a, sa), (b, sb) = mean_and_stderr(uniform), mean_and_stderr(level)
    assert abs(a - b) < 4 * math.hypot(sa, sb), (a, sa, b, sb)
    assert sb <= 1.05 * sa
    if sde.log_snr(torch.tensor(sde.t_min, dtype=torch.float64)) > 9.5 and sde.t_max <= 1:
        assert sb < 0.5 * sa


@each_sde
def test_the_importance_makes_any_integral_unbiased(sde) -> None:
    """E[h(t)·importance] = ∫h dt/(t_max − t_min): h = −dλ/dt has the exact normaliser Z for its integral."""
    ends = torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)
    level = sde.log_snr(ends)
    t, importance = LogSNRTimes().sample(sde, 1000, Rng(0), torch.device("cpu"))
    (alpha, sigma), (d_alpha, d_sigma) = sde.marginal(t), sde.rates(t)
    rate = 2 * (d_sigma / sigma - d_alpha / alpha)
    normaliser = rate * importance * (sde.t_max - sde.t_min)
    torch.testing.assert_close(normaliser, (level[0] - level[1]).expand(1000), rtol=1e-9, atol=0)
    weight = Likelihood().weight(sde, t, DIMS, sde.t_max - sde.t_min) * importance
    torch.testing.assert_close(weight, 0.5 * DIMS * (level[0] - level[1]).expand(1000), rtol=1e-9, atol=0)


@each_sde
def test_the_likelihood_loss_is_the_bound_it_claims_to_be(sde) -> None:
    """Exact denoiser of N(0, vI): loss + prior KL + entropy of p(x_{t_min}|x_0) = −E log p_{t_min}(x), in nats.

    E‖ε̂ − ε‖² = D v e^λ/(1 + v e^λ), so the loss is ½D [log(1 + v e^λ)] between the ends. The prior here is p_T itself,
    so KL(p(x_T|x_0) ‖ p_T) is ½D log(1 + v e^{λ_T}) on average. The bound is tight because the denoiser is exact.
    """
    data = GaussianMixtureDenoiser(torch.zeros(1, DIMS), VAR, torch.ones(1), sde)
    ends = torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)
    (_, sigma), level = sde.marginal(ends), sde.log_snr(ends)
    evidence = 0.5 * DIMS * torch.log1p(VAR * level.exp())

    loss = DenoisingLoss(data, LogSNRTimes(), Likelihood())
    rng = Rng(0)
    values = torch.stack([loss(data.sample(500, rng=rng), rng=rng).double().mean() for _ in range(60)])
    mean, stderr = mean_and_stderr(values)
    assert abs(mean - float(evidence[0] - evidence[1])) < 4 * stderr
    assert stderr < 0.02 * float(evidence[0] - evidence[1])

    x0 = data.sample(200_000, rng=rng, dtype=torch.float64)
    z = sde.perturb(x0, ends[1], rng.normal(x0.shape, dtype=torch.float64))
    conditional = (
        -0.5 * (((z - sde.marginal(ends)[0][1] * x0) / sigma[1]) ** 2 + math.log(2 * math.pi)) - sigma[1].log()
    )
    prior_kl, kl_error = mean_and_stderr(conditional.sum(1) - data.prior_log_prob(z))
    assert abs(prior_kl - float(evidence[1])) < 4 * kl_error + 1e-12

    entropy = 0.5 * DIMS * (1 + math.log(2 * math.pi)) + DIMS * math.log(float(sigma[0]))
    x = sde.perturb(x0, ends[0], rng.normal(x0.shape, dtype=torch.float64))
    nll, nll_error = mean_and_stderr(-data.log_prob(x, ends[0]))
    assert abs(float(evidence[0]) + entropy - nll) < 4 * nll_error
    assert abs(mean + prior_kl + entropy - nll) < 4 * math.hypot(stderr, kl_error, nll_error)


@each_sde
def test_a_wrong_denoiser_costs_half_the_fisher_divergence(sde) -> None:
    """loss(wrong) − loss(exact) = ½∫g² E‖s_θ − s‖² dt, by quadrature: what the bound loses, in nats."""
    nodes, pieces = gauss_legendre(segments(sde))
    (alpha, sigma), g = sde.marginal(nodes), sde.diffusion(nodes)
    total = alpha**2 * VAR + sigma**2
    fisher = (pieces * 0.5 * g**2 * (1 - FACTOR) ** 2 * DIMS / total).sum()
    exact_error = VAR * alpha**2 / total
    weight = Likelihood().weight(sde, nodes, DIMS, 1.0)
    gap = (pieces * weight * (expected_error(sde, nodes) - exact_error)).sum()
    torch.testing.assert_close(gap, fisher, rtol=1e-9, atol=0)


@pytest.mark.parametrize("event", EVENT_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_one_loss_per_sample(event, dtype) -> None:
    for name, sde in closed_form_sdes().items():
        denoiser = mixture(sde, event, covariance="diagonal")
        x0 = denoiser.sample(5, rng=Rng(0), dtype=dtype)
        for sampler in TIMES.values():
            for weighting in WEIGHTINGS.values():
                losses = DenoisingLoss(denoiser, sampler, weighting)(x0, rng=Rng(1))
                assert losses.shape == (5,) and losses.dtype == dtype, name
                assert bool((losses >= 0).all())
    # what it is, by hand, with the documented order of draws: times, then noise
    rng = Rng(1)
    t, _ = UniformTimes().sample(sde, 5, rng, x0.device)
    eps = rng.normal_like(x0)
    error = denoiser(sde.perturb(x0, t, eps), t).eps - eps
    want = error.square().flatten(1).mean(1)
    torch.testing.assert_close(DenoisingLoss(denoiser)(x0, rng=Rng(1)), want)


def test_gradients_are_those_of_the_closed_form() -> None:
    """d/dc E‖c ε* − ε‖²/D = 2(c − 1) E s, within 4 standard errors; and the optimum c = 1 has none."""
    sde = VPSDE()
    scale = nn.Parameter(torch.tensor(FACTOR))
    exact = GaussianMixtureDenoiser(torch.zeros(1, DIMS), VAR, torch.ones(1), sde)
    loss = DenoisingLoss(ScoreFunction(lambda x, t: scale * exact(x, t).score, sde))
    nodes, pieces = gauss_legendre(segments(sde))
    alpha, sigma = sde.marginal(nodes)
    s = float((pieces * sigma**2 / (alpha**2 * VAR + sigma**2)).sum() / (sde.t_max - sde.t_min))
    for value in (FACTOR, 1.0):
        scale.data.fill_(value)
        rng, gradients = Rng(5), []
        for _ in range(50):
            (gradient,) = torch.autograd.grad(loss(exact.sample(400, rng=rng), rng=rng).mean(), scale)
            gradients.append(gradient)
        mean, stderr = mean_and_stderr(torch.stack(gradients))
        assert abs(mean - 2 * (value - 1) * s) < 4 * stderr
        assert stderr < 0.02


def test_conditions_reach_the_network() -> None:
    seen = []

    def net(x: Tensor, c: Tensor, cond: Tensor) -> Tensor:
        seen.append(cond)
        return x

    label = torch.arange(4)
    DenoisingLoss(Preconditioned(net, VPSDE(), EDM(1.0)))(torch.zeros(4, 2), label, rng=Rng(0))
    assert seen[0] is label


def test_couplings_choose_the_noise() -> None:
    """The default is independent noise; any callable may pair noise and data instead."""
    x0 = torch.zeros(20_000)
    data, eps = Independent()(x0, Rng(0))
    assert data is x0 and torch.equal(eps, Rng(0).normal_like(x0))
    sde = VPSDE()

    def opposite(x0: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
        return x0.flip(0), -x0.flip(0)

    perfect = ScoreFunction(lambda x, t: x / ((sde.at(t, x).alpha - sde.at(t, x).sigma) * sde.at(t, x).sigma), sde)
    loss = DenoisingLoss(perfect, coupling=opposite)(Rng(1).normal((6, 2), dtype=torch.float64), rng=Rng(2))
    torch.testing.assert_close(loss, torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-20)


@pytest.mark.parametrize("sampler", TIMES.values(), ids=TIMES.keys())
@each_sde
def test_times_stay_inside_and_are_even_in_their_variable(sde, sampler) -> None:
    n = 4000
    t, importance = sampler.sample(sde, n, Rng(0), torch.device("cpu"))
    assert t.shape == importance.shape == (n,) and t.dtype == importance.dtype == torch.float64
    assert float(t.min()) >= sde.t_min and float(t.max()) <= sde.t_max
    ends = torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)
    if isinstance(sampler, LogSNRTimes):
        level = sde.log_snr(ends)
        u = (level[0] - sde.log_snr(t)) / (level[0] - level[1])
    else:
        u = (t - ends[0]) / (ends[1] - ends[0])
        assert bool((importance == 1).all())
    ordered, steps = u.sort().values, torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((ordered - steps[:-1]).abs().max(), (ordered - steps[1:]).abs().max())
    assert float(distance) * math.sqrt(n) < KS_CRITICAL
    if not isinstance(sampler, UniformTimes):  # stratified: exactly one in each n-th, and not in order
        assert float(distance) <= 1 / n + 1e-9
        assert not torch.equal(ordered, u)


def test_log_normal_times_are_log_normal() -> None:
    """ln σ ~ N(−1.2, 1.2²) (Karras et al. 2022, table 1), by Kolmogorov–Smirnov where the clamp is 4 deviations off."""
    sde, n = EDMSDE(1e-4, 1e4), 10_000
    t, importance = LogNormalTimes(-1.2, 1.2).sample(sde, n, Rng(0), torch.device("cpu"))
    assert bool((importance == 1).all())
    u = torch.special.ndtr((t.log() + 1.2) / 1.2).sort().values
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((u - steps[:-1]).abs().max(), (u - steps[1:]).abs().max())
    assert float(distance) * math.sqrt(n) < KS_CRITICAL
    for sde in ALL.values():
        t, _ = LogNormalTimes(0.0, 5.0).sample(sde, 1000, Rng(1), torch.device("cpu"))
        assert float(t.min()) == sde.t_min and float(t.max()) <= sde.t_max


@pytest.mark.parametrize("sampler", [UniformTimes, StratifiedTimes, LogSNRTimes, LogNormalTimes])
def test_the_training_cut_off_is_its_own(sampler) -> None:
    """`t_min` of the times, not of the SDE; the likelihood weight spans the interval that is trained on."""
    sde, cut = VPSDE(), 0.2
    times = sampler(t_min=cut)
    t, _ = times.sample(sde, 2000, Rng(0), torch.device("cpu"))
    assert cut <= float(t.min()) < cut + 0.01 and float(t.max()) <= 1.0
    assert times.start(sde) == cut and sampler().start(sde) == sde.t_min
    denoiser = mixture(sde, (2,))
    for bad in (0.0, -1.0, 1.0, 2.0, math.nan):
        with pytest.raises(ValueError, match="training cut-off"):
            DenoisingLoss(denoiser, sampler(t_min=bad))


def test_the_bound_with_a_training_cut_off() -> None:
    """½D [log(1 + v e^λ)] from the cut-off, with uniform and with λ-uniform times."""
    sde, cut = VPSDE(), 0.05
    data = GaussianMixtureDenoiser(torch.zeros(1, DIMS), VAR, torch.ones(1), sde)
    level = sde.log_snr(torch.tensor([cut, 1.0], dtype=torch.float64))
    evidence = 0.5 * DIMS * torch.log1p(VAR * level.exp())
    for sampler in (UniformTimes(cut), StratifiedTimes(cut), LogSNRTimes(cut)):
        rng, loss = Rng(0), DenoisingLoss(data, sampler, Likelihood())
        values = torch.stack([loss(data.sample(500, rng=rng), rng=rng).double().mean() for _ in range(60)])
        mean, stderr = mean_and_stderr(values)
        assert abs(mean - float(evidence[0] - evidence[1])) < 4 * stderr


@pytest.mark.parametrize("make", [lambda: LogNormalTimes(std=0.0), lambda: EDMWeighting(0.0), lambda: MinSNR(-1.0),
                                  lambda: EDMWeighting(math.nan), lambda: MinSNR(math.nan)])  # fmt: skip
def test_bad_constants_are_refused(make) -> None:
    with pytest.raises(ValueError, match="> 0"):
        make()


def test_the_bases_are_abstract() -> None:
    for base in (Times, Weighting):
        with pytest.raises(TypeError, match="abstract"):
            base()


def test_stratified_times_need_one_stream() -> None:
    with pytest.raises(ValueError, match="one draw for all samples"):
        StratifiedTimes().sample(VPSDE(), 2, Rng(seeds=[0, 1]), torch.device("cpu"))


def test_without_an_rng_torch_decides() -> None:
    """Two calls differ (a fixed default seed would train on the same noise for ever), and manual_seed repeats them."""
    loss, x0 = DenoisingLoss(imperfect(VPSDE())), Rng(0).normal((8, DIMS))
    torch.manual_seed(3)
    first, second = loss(x0), loss(x0)
    torch.manual_seed(3)
    assert torch.equal(loss(x0), first) and not torch.equal(first, second)


def rows(log_snr: Tensor) -> Tensor:
    """A mean loss that runs over three decades with the noise level."""
    return (0.35 * log_snr).exp() * (2 + log_snr.sin())


def test_a_learned_weight_starts_as_none() -> None:
    """u = 0: value and gradients of the denoiser are bit for bit those of the plain loss, and the noise is the same."""
    network = nn.Linear(DIMS, DIMS)
    denoiser = Preconditioned(lambda x, c, cond: network(x), VPSDE(), EDM(1.0))
    x0, head = Rng(0).normal((16, DIMS)), LogVariance()
    plain = DenoisingLoss(denoiser).terms(x0, rng=Rng(1))
    learned = DenoisingLoss(denoiser, uncertainty=head).terms(x0, rng=Rng(1))
    assert torch.equal(plain.objective, plain.loss) and torch.equal(learned.objective, plain.objective)
    assert torch.equal(learned.loss, plain.loss) and torch.equal(learned.t, plain.t)
    weights = list(network.parameters())
    expected = torch.autograd.grad(plain.objective.mean(), weights)
    assert all(
        torch.equal(a, b) for a, b in zip(torch.autograd.grad(learned.objective.mean(), weights), expected, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_the_learned_objective_is_its_formula(dtype: torch.dtype) -> None:
    """loss e^{−u} + u, with u of the log-SNR of the sample's own time, and `loss` as without it."""
    sde, head = VPSDE(), LogVariance(16)
    nn.init.normal_(head.linear.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    loss = DenoisingLoss(imperfect(sde), LogSNRTimes(), Likelihood(), uncertainty=head)
    x0 = Rng(0).normal((12, DIMS), dtype=dtype)
    objective, error, t = loss.terms(x0, rng=Rng(1))
    u = head(sde.log_snr(t)).to(dtype)
    assert objective.dtype == error.dtype == dtype and u.shape == (12,) and float(u.detach().std()) > 0.1
    torch.testing.assert_close(objective, error / u.exp() + u, rtol=1e-5, atol=0)
    plain = DenoisingLoss(imperfect(sde), LogSNRTimes(), Likelihood()).terms(x0, rng=Rng(1))
    assert torch.equal(error, plain.loss) and torch.equal(loss(x0, rng=Rng(1)), objective)


def test_the_learned_weight_is_the_logarithm_of_the_mean_loss() -> None:
    """u trained alone on losses m(λ)·χ²_1 ends at log m(λ), and a denoiser's error counts relative to it there.

    m runs over a factor of 1,000. The minimum over u of E[loss] e^{−u} + u is at log E[loss], not at E[log loss], which
    is 1.27 lower for χ²_1. 200,000 losses of relative deviation √2 leave 0.04 in each of the 33 coefficients.
    """
    generator = torch.Generator().manual_seed(0)
    head = LogVariance(32)
    optimizer = torch.optim.Adam(head.parameters(), 2e-2)
    steps, batch = 400, 500
    for step in range(steps):
        log_snr = 20 * torch.rand(batch, generator=generator, dtype=torch.float64) - 10
        losses = (rows(log_snr) * torch.randn(batch, generator=generator).square()).float()
        u = head(log_snr)
        optimizer.param_groups[0]["lr"] = 2e-2 * (1 - step / steps)
        optimizer.zero_grad()
        (losses * (-u).exp() + u).mean().backward()
        optimizer.step()
    level = torch.linspace(-9, 9, 181, dtype=torch.float64)
    error = head(level).double().detach() - rows(level).log()
    assert float(error.square().mean().sqrt()) < 0.15, error
    assert abs(float(error.mean())) < 0.05


def test_the_learned_weight_trains_with_the_denoiser() -> None:
    """Its parameters are the loss's: one optimizer, one state dict; u follows the mean loss of a fixed denoiser."""
    sde, head = VPSDE(), LogVariance(32)
    loss = DenoisingLoss(imperfect(sde), LogSNRTimes(), Likelihood(), uncertainty=head)
    names = {"uncertainty.linear.weight", "uncertainty.linear.bias"}
    assert {name for name, _ in loss.named_parameters()} == names <= set(loss.state_dict())
    optimizer, rng = torch.optim.Adam(loss.parameters(), 5e-2), Rng(0)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 5e-2 * (1 - step / 300)
        optimizer.zero_grad()
        loss(math.sqrt(VAR) * rng.normal((256, DIMS)), rng=rng).mean().backward()
        optimizer.step()
    t = times(sde, 25)
    ends = sde.log_snr(torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64))
    mean = 0.5 * DIMS * (ends[0] - ends[1]) * expected_error(sde, t)
    # 300·256 losses on 33 coefficients, and what 32 waves cannot follow in 300 steps; log mean runs over 2.4
    error = head(sde.log_snr(t)).double().detach() - mean.log()
    assert float(error.square().mean().sqrt()) < 0.15 and float(mean.log().max() - mean.log().min()) > 2


def test_discrete_times_are_the_whole_steps_each_as_often() -> None:
    sde, steps = DDPM(steps=20), 20
    t, importance = DiscreteTimes(steps).sample(sde, 200, Rng(0), torch.device("cpu"))
    counts = (t * steps).round().long().bincount(minlength=21)
    assert torch.equal(t, (t * steps).round() / steps) and torch.equal(importance, torch.ones_like(importance))
    assert counts[0] == 0 and torch.equal(counts[1:], torch.full((20,), 10))  # strata of 1/200, ten in each step
    with pytest.raises(ValueError, match=r"40 steps begin at t = 0\.025, before the SDE's t_min = 0\.05"):
        DenoisingLoss(Preconditioned(lambda x, c: x, sde, Eps()), DiscreteTimes(40))
