"""Each step against its formula, written out from the paper that it cites."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import EVENT_SHAPES, all_sdes, closed_form_sdes, mixture, ncsn_sigmas, times
from torch import Tensor

from scoresde import (
    DDIM,
    VESDE,
    VPSDE,
    AdaptiveODE,
    Ancestral,
    AnnealedLangevin,
    EulerMaruyama,
    GaussianMixtureDenoiser,
    Heun,
    Langevin,
    PredictorCorrector,
    ReverseDiffusion,
    Rng,
    Sampler,
    ScoreFunction,
    Step,
    TableSDE,
)

ALL = all_sdes()
each_sde = pytest.mark.parametrize("sde", ALL.values(), ids=ALL.keys())
each_event = pytest.mark.parametrize("event", EVENT_SHAPES, ids=str)
EVENT = (3, 4)


def draw(event=EVENT, n: int = 4, seed: int = 0) -> Tensor:
    return Rng(seed).normal((n, *event), dtype=torch.float64)


def move(step: Step, denoiser, x: Tensor, t: Tensor, s: Tensor, seed: int = 1) -> Tensor:
    return step(denoiser, x, t, s, step.init(x), cond=None, rng=Rng(seed))[0]


def noise(x: Tensor, seed: int = 1) -> Tensor:
    """What a step that draws once adds."""
    return Rng(seed).normal_like(x)


def close(got: Tensor, want: Tensor, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol)


def rates_by_autograd(sde, t: Tensor) -> tuple[Tensor, Tensor]:
    """f = d log α/dt and g² = dσ²/dt − 2 f σ², from `marginal` alone."""
    t = t.clone().requires_grad_()
    alpha, sigma = sde.marginal(t)
    f = torch.autograd.grad(alpha.log(), t, retain_graph=True)[0] if alpha.requires_grad else torch.zeros_like(t)
    (d_var,) = torch.autograd.grad(sigma**2, t)
    return f, d_var - 2 * f * sigma.detach() ** 2


@each_sde
@pytest.mark.parametrize("probability_flow", [False, True])
def test_euler_maruyama_is_anderson_s_reverse_sde(sde, probability_flow) -> None:
    """x − [f x − g² score] h + g √h z, with half the score and no z for the flow; f and g² from the marginal."""
    denoiser, x = mixture(sde, EVENT), draw()
    for t in times(sde, 5):
        h = 0.1 * (t - sde.t_min)
        f, g2 = rates_by_autograd(sde, t)
        score = denoiser(x, t).score
        if probability_flow:
            want = x - (f * x - 0.5 * g2 * score) * h
        else:
            want = x - (f * x - g2 * score) * h + (g2 * h).sqrt() * noise(x)
        close(move(EulerMaruyama(probability_flow), denoiser, x, t, t - h), want)


@pytest.mark.parametrize("sde", [VESDE(), TableSDE(sigmas=ncsn_sigmas())], ids=["ve", "ncsn"])
def test_reverse_diffusion_is_song_s_under_ve(sde) -> None:
    """x + (σ_t² − σ_s²) score + √(σ_t² − σ_s²) z (Song et al. 2021, eq. 47 and App. E)."""
    denoiser, x = mixture(sde, EVENT), draw()
    for t in times(sde, 5):
        s = t - 0.1 * (t - sde.t_min)
        gap = sde.marginal(t)[1] ** 2 - sde.marginal(s)[1] ** 2
        close(move(ReverseDiffusion(), denoiser, x, t, s), x + gap * denoiser(x, t).score + gap.sqrt() * noise(x))


@each_sde
def test_reverse_diffusion_without_noise_is_half_the_score_and_carries_noise_exactly(sde) -> None:
    """Song et al. 2021, alg. 3 with ½ std² for std², up to second order: halving the step quarters the difference.

    And pure noise, score = −x/σ_t², goes where its path goes, (σ_s/σ_t) x, in a step of any size.
    """
    denoiser, x, flow = mixture(sde, EVENT), draw(), ReverseDiffusion(probability_flow=True)
    pure = ScoreFunction(lambda x, t: -x / sde.at(t, x).sigma ** 2, sde)
    for t in times(sde, 5):
        (_, sigma), (_, sigma_end) = sde.marginal(t), sde.marginal(torch.tensor(sde.t_min, dtype=torch.float64))
        close(move(flow, pure, x, t, torch.tensor(sde.t_min, dtype=torch.float64)), sigma_end / sigma * x, 1e-8)
        gaps = []
        for size in (2e-2, 1e-2):
            s = sde.time(sde.log_snr(t) + size)
            scale, std = sde.transition(s, t)
            gaps.append(move(flow, denoiser, x, t, s) - ((2 - scale) * x + 0.5 * std**2 * denoiser(x, t).score))
        assert float(gaps[0].norm() / gaps[1].norm()) == pytest.approx(4, abs=0.2)


def test_reverse_diffusion_is_song_s_under_a_table_of_beta() -> None:
    """(2 − √(1 − β_i)) x + β_i score + √β_i z (Song et al. 2021, alg. 3), on each entry of a DDPM table: exactly."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    sde = TableSDE(torch.cumprod(1 - beta, 0))
    denoiser, x = mixture(sde, EVENT), draw()
    for i in (1, 2, 10, 400, 999):
        t, s = torch.tensor([i + 1, i], dtype=torch.float64) / 1000
        want = (2 - (1 - beta[i]).sqrt()) * x + beta[i] * denoiser(x, t).score + beta[i].sqrt() * noise(x)
        close(move(ReverseDiffusion(), denoiser, x, t, s), want)


@pytest.mark.parametrize("steps", [200, 1000])
def test_reverse_diffusion_under_vp_is_song_s_up_to_second_order(steps) -> None:
    """Song et al. take β = β(t)/N where the exact transition has B = ∫β over the step.

    |β − B| ≤ ½β'/N² ≤ 10/N², |√(1 − β) − e^{−B/2}| ≤ ½|β − B| + ½β² and |β − (1 − e^{−B})| ≤ |β − B| + ½β².
    """
    sde = VPSDE()
    denoiser, x = mixture(sde, EVENT), draw()
    for t in (0.1, 0.5, 0.9):
        t = torch.tensor(t, dtype=torch.float64)
        s, beta, score = t - 1 / steps, sde.beta(t) / steps, denoiser(x, t).score
        size = 10 / steps**2 + beta**2
        gap = move(ReverseDiffusion(), denoiser, x, t, s) - ((2 - (1 - beta).sqrt()) * x + beta * score)
        gap = gap - sde.transition(s, t)[1] * noise(x)
        assert bool((gap.abs() <= size * (x.abs() + score.abs())).all())
        assert float((sde.transition(s, t)[1] ** 2 - beta).abs()) <= size


def test_ancestral_is_the_posterior_of_ddpm() -> None:
    """Ho et al. 2020, eq. 7: mean √ᾱ_{i−1} β_i/(1 − ᾱ_i) x̂_0 + √α_i (1 − ᾱ_{i−1})/(1 − ᾱ_i) x_i, variance β̃_i."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - beta, 0)
    sde = TableSDE(alpha_bar)
    denoiser, x = mixture(sde, EVENT), draw()
    for i in (1, 2, 10, 400, 999):
        t, s = torch.tensor([i + 1, i], dtype=torch.float64) / 1000
        x0, now, before = denoiser(x, t).x0, alpha_bar[i], alpha_bar[i - 1]
        mean = before.sqrt() * beta[i] / (1 - now) * x0 + (1 - beta[i]).sqrt() * (1 - before) / (1 - now) * x
        variance = (1 - before) / (1 - now) * beta[i]
        close(move(Ancestral(), denoiser, x, t, s), mean + variance.sqrt() * noise(x))


@each_sde
@each_event
def test_ancestral_is_the_gaussian_posterior_of_every_sde(sde, event) -> None:
    """q(x_s | x_t, x̂_0) by the product of N(x_s; α_s x̂_0, σ_s²) and N(x_t; a x_s, std²): precision-weighted.

    And it is DDIM with η = 1, bit by bit.
    """
    denoiser, x = mixture(sde, event), draw(event)
    for t in times(sde, 4):
        s = t - 0.2 * (t - sde.t_min)
        (alpha, sigma), (a, std) = sde.marginal(s), sde.transition(s, t)
        precision = 1 / sigma**2 + a**2 / std**2
        mean = (alpha * denoiser(x, t).x0 / sigma**2 + a * x / std**2) / precision
        got = move(Ancestral(), denoiser, x, t, s)
        close(got, mean + precision.rsqrt() * noise(x), 1e-8)
        assert torch.equal(got, move(DDIM(1.0), denoiser, x, t, s))


@each_sde
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_is_its_equation_12(sde, eta) -> None:
    """√ᾱ_s x̂_0 + √(1 − ᾱ_s − s²) ε̂ + s z, s² = η² (1 − ᾱ_s)/(1 − ᾱ_t) (1 − ᾱ_t/ᾱ_s), after x → x/√(α² + σ²)."""
    denoiser, x = mixture(sde, EVENT), draw()

    def scaled(t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = sde.marginal(t)
        return alpha**2 / (alpha**2 + sigma**2), (alpha**2 + sigma**2).sqrt()

    for t in times(sde, 5):
        s = t - 0.2 * (t - sde.t_min)
        (now, _), (then, size), p = scaled(t), scaled(s), denoiser(x, t)
        variance = eta**2 * (1 - then) / (1 - now) * (1 - now / then)
        want = then.sqrt() * p.x0 + (1 - then - variance).sqrt() * p.eps
        close(move(DDIM(eta), denoiser, x, t, s), size * (want + variance.sqrt() * noise(x)), 1e-8)


@each_sde
@each_event
@pytest.mark.parametrize("step", [DDIM(), Heun()], ids=["ddim", "heun"])
def test_one_step_is_exact_for_a_point(sde, event, step) -> None:
    """Data in one point c: x̂_0 = c and ε̂ = (x_t − α c)/σ stay on the way, so any step lands on α_s c + σ_s ε̂.

    Heun reads ε̂ again at s, where the round-off of x counts as noise 1/σ_s times larger, and weighs it by ½ ς_t α_s.
    """
    point = draw(event, 1, seed=5)
    denoiser = GaussianMixtureDenoiser(point, 0.0, torch.ones(1), sde)
    x = draw(event)
    start, end = (torch.tensor(value, dtype=torch.float64) for value in (sde.t_max, sde.t_min))
    (alpha, sigma), (alpha_s, sigma_s) = sde.marginal(start), sde.marginal(end)
    round_off = 16 * torch.finfo(torch.float64).eps * (1 + float(sigma / alpha / sigma_s))
    close(move(step, denoiser, x, start, end), alpha_s * point + sigma_s * (x - alpha * point) / sigma, round_off)
    clean = Sampler(step, steps=1)(denoiser, (4, *event))
    torch.testing.assert_close(clean, point.float().expand(4, *event), rtol=1e-5, atol=1e-5)


@each_sde
def test_heun_is_karras_algorithm_1(sde) -> None:
    """In y = x/α and ς = σ/α: d = (y − D)/ς; y' = y + (ς' − ς) d; y + (ς' − ς)(d + d')/2."""
    denoiser, x = mixture(sde, EVENT), draw()

    def slope(y: Tensor, t: Tensor, alpha: Tensor, ratio: Tensor) -> Tensor:
        return (y - denoiser(alpha * y, t).x0) / ratio

    for t in times(sde, 5):
        s = t - 0.2 * (t - sde.t_min)
        (alpha, sigma), (alpha_s, sigma_s) = sde.marginal(t), sde.marginal(s)
        ratio, ratio_s, y = sigma / alpha, sigma_s / alpha_s, x / alpha
        first = slope(y, t, alpha, ratio)
        second = slope(y + (ratio_s - ratio) * first, s, alpha_s, ratio_s)
        close(move(Heun(), denoiser, x, t, s), alpha_s * (y + (ratio_s - ratio) * 0.5 * (first + second)), 1e-8)


@each_sde
@each_event
@pytest.mark.parametrize("snr", [0.1, 3.0])
def test_langevin_takes_its_step_per_sample(sde, event, snr) -> None:
    """x + h score + √(2h) z, h = 2 r² σ² (D + 64)/(‖σ score‖² + 64), at most σ²: reached with r = 3."""
    denoiser, x, dims = mixture(sde, event), 3 * draw(event), math.prod(event)
    for t in times(sde, 4):
        score, z, sigma = denoiser(x, t).score, noise(x), float(sde.marginal(t)[1])
        want = []
        for k in range(len(x)):
            h = 2 * snr**2 * sigma**2 * (dims + 64) / (sigma**2 * float(score[k].square().sum()) + 64)
            h = min(h, sigma**2)
            want.append(x[k] + h * score[k] + math.sqrt(2 * h) * z[k])
        close(move(Langevin(snr), denoiser, x, t, t), torch.stack(want))


@each_sde
def test_langevin_takes_the_paper_s_step_on_images(sde) -> None:
    """h = 2 (r ‖z‖/‖score‖)², norms averaged over the batch (Song et al. 2021, alg. 4 and 5, α = 1), in 3,072 pixels.

    On x_t of standard normal data, as drawn, ‖z‖ and ‖score‖ are known to 1/√(2D) each, 1.3 % together and squared
    2.6 %; four of those, and the 64 dimensions that are counted in, 64/D = 2 % at ‖σ score‖² ≥ D/2.
    """
    event, r = (3, 32, 32), 0.16
    denoiser = ScoreFunction(lambda x, t: -x / (sde.at(t, x).alpha ** 2 + sde.at(t, x).sigma ** 2), sde)
    t = sde.time(torch.tensor(0.0, dtype=torch.float64))
    x = sde.perturb(draw(event, 8, 1), t, draw(event, 8, 2))
    score, z = denoiser(x, t).score, noise(x)
    paper = 2 * (r * z.flatten(1).norm(dim=1).mean() / score.flatten(1).norm(dim=1).mean()) ** 2
    moved = move(Langevin(r), denoiser, x, t, t) - x
    for k in range(8):  # least squares of moved = h score + √(2h) z: two unknowns, of which h is the first
        basis = torch.stack([score[k].flatten(), z[k].flatten()], 1)
        h, root = torch.linalg.lstsq(basis, moved[k].flatten()[:, None]).solution.flatten().tolist()
        assert root == pytest.approx(math.sqrt(2 * h), rel=1e-9)
        assert h == pytest.approx(float(paper), rel=4 * 0.026 + 0.02)


def test_langevin_steps_do_not_depend_on_batch_mates() -> None:
    """A neighbour with a score a thousand times larger changes nothing, bit by bit."""
    sde = VPSDE()
    t, x = torch.tensor(0.5, dtype=torch.float64), draw()
    denoiser = ScoreFunction(lambda x, t: -x, sde)
    crowd = torch.cat([x[:2], 1000 * x[2:]])
    for step in (Langevin(), AnnealedLangevin()):
        assert torch.equal(move(step, denoiser, x, t, t)[:2], move(step, denoiser, crowd, t, t)[:2])


@each_sde
@each_event
def test_annealed_langevin_follows_the_noise_level(sde, event) -> None:
    """x + h score + √(2h) z, h = 2 (r σ_t)²: NCSN's α_i = ε σ_i²/σ_L² with ε/σ_L² = 4 r² and its ½α_i = h."""
    denoiser, x, r = mixture(sde, event), draw(event), 0.2
    for t in times(sde, 4):
        h = 2 * (r * sde.marginal(t)[1]) ** 2
        close(move(AnnealedLangevin(r), denoiser, x, t, t), x + h * denoiser(x, t).score + (2 * h).sqrt() * noise(x))


@pytest.mark.parametrize("corrections", [0, 1, 3])
@pytest.mark.parametrize("name", closed_form_sdes())
def test_predictor_corrector_is_its_parts_in_order(name, corrections) -> None:
    """Corrections at t, then the move to s, on one stream of noise (Song et al. 2021, alg. 1)."""
    sde = ALL[name]
    denoiser, x = mixture(sde, EVENT), draw()
    corrector, predictor = AnnealedLangevin(0.2), ReverseDiffusion()
    step = PredictorCorrector(predictor, corrector, corrections)
    t = times(sde, 5)[2]
    s, rng, want = 0.9 * t, Rng(1), x
    for _ in range(corrections):
        want, _ = corrector(denoiser, want, t, t, None, cond=None, rng=rng)
    want, _ = predictor(denoiser, want, t, s, None, cond=None, rng=rng)
    assert torch.equal(move(step, denoiser, x, t, s), want)
    assert (step.order, step.evaluations, step.default_steps) == (1.0, 1 + corrections, 1000)


@each_sde
@pytest.mark.parametrize(
    "step",
    [
        EulerMaruyama(),
        EulerMaruyama(True),
        ReverseDiffusion(),
        ReverseDiffusion(True),
        DDIM(),
        DDIM(0.5),
        Ancestral(),
        Heun(),
        AdaptiveODE(backend="native"),
    ],
    ids=lambda step: type(step).__name__,
)
def test_a_step_of_no_length_stays(sde, step) -> None:
    """s = t: the state comes back to round-off, and without noise."""
    denoiser, x = mixture(sde, EVENT), draw()
    for t in times(sde, 3, ends=True):
        close(move(step, denoiser, x, t, t), x, 1e-7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDIM(-0.1), r"eta in \[0, 1\]"),
        (lambda: DDIM(1.1), r"eta in \[0, 1\]"),
        (lambda: DDIM(math.nan), r"eta in \[0, 1\]"),
        (lambda: Langevin(0.0), "snr > 0"),
        (lambda: Langevin(-1.0), "snr > 0"),
        (lambda: Langevin(math.nan), "snr > 0"),
        (lambda: Langevin(math.inf), "snr > 0"),
        (lambda: AnnealedLangevin(0.0), "0 < snr < 1"),
        (lambda: AnnealedLangevin(1.0), "0 < snr < 1"),
        (lambda: AnnealedLangevin(math.nan), "0 < snr < 1"),
        (lambda: PredictorCorrector(Ancestral(), Langevin(), -1), "at least 0; got -1"),
        (lambda: PredictorCorrector(AdaptiveODE(), Langevin()), "fixed-step"),
        (lambda: PredictorCorrector(Ancestral(), AdaptiveODE()), "fixed-step"),
    ],
)
def test_bad_arguments_are_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()
