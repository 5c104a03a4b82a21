"""Every predictor, corrector and SDE lands on the exact moments of a mixture, in all combinations of two of them.

Runs go from the prior at t_max to t_min on `KarrasGrid`, whose short steps lie where the density is all noise and the
errors of a step multiply. `denoise=False`: x at t_min has exactly known moments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from oracles import all_sdes, marginal_moments, mixture
from torch import Tensor

from scoresde import (
    DDIM,
    SDE,
    Ancestral,
    AnnealedLangevin,
    EulerMaruyama,
    GaussianMixtureDenoiser,
    Heun,
    KarrasGrid,
    Langevin,
    PredictorCorrector,
    ReverseDiffusion,
    Rng,
    Sampler,
    Step,
)

ALL = all_sdes()
each_sde = pytest.mark.parametrize("sde", ALL.values(), ids=ALL.keys())

PREDICTORS: dict[str, Step] = {
    "euler-maruyama": EulerMaruyama(),
    "euler-maruyama-pf": EulerMaruyama(probability_flow=True),
    "reverse-diffusion": ReverseDiffusion(),
    "reverse-diffusion-pf": ReverseDiffusion(probability_flow=True),
    "ancestral": Ancestral(),
    "ddim-0": DDIM(0.0),
    "ddim-1": DDIM(1.0),
    "heun": Heun(),
}
CORRECTORS: dict[str, Step | None] = {
    "none": None,
    # their own bias at snr = 0.1: up to snr² = 1 % of σ² (the fixed point below), and σ(t_min) is small;
    # the Langevin rule follows ‖score‖² besides, which in D dimensions tilts it by less than 2/(D + 64)
    "langevin": Langevin(0.1),
    "annealed-langevin": AnnealedLangevin(0.1),
}


def two_modes(sde: SDE, event: tuple[int, ...]) -> GaussianMixtureDenoiser:
    """Two modes, each about 2.7 standard deviations from their middle.

    Most of the trace of C lies within the modes, so n samples know it to about √(2/nD).
    """
    wide = mixture(sde, event, components=2, seed=1, covariance="diagonal")
    means = 1.8 / math.sqrt(math.prod(event)) * wide.means.reshape(2, *event)
    return GaussianMixtureDenoiser(means, wide.variances, wide.log_weights.exp(), sde)


def deviations(x: Tensor, denoiser: GaussianMixtureDenoiser, t: float) -> Tensor:
    """Per sample, relative to exact moments of x_t: x − m, (x − m)(x − m)ᵀ − C and its trace, (n, D + D² + 1)."""
    mean, cov = marginal_moments(denoiser, t)
    centred = x.double().flatten(1) - mean
    products = torch.einsum("ni,nj->nij", centred, centred) - cov
    trace = products.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
    return torch.cat([centred, products.flatten(1), trace / cov.trace()], 1)


def assert_moments(values: Tensor, slack: Tensor | float = 0.0) -> None:
    """Mean 0 within 5 standard errors, themselves from the samples, and `slack`."""
    bound = 5 * values.std(0) / math.sqrt(len(values)) + slack
    excess = values.mean(0).abs() / bound
    assert float(excess.max()) < 1, f"statistic {int(excess.argmax())} is at {float(excess.max()):.2f} of its bound"


def assert_lands_on_moments(step: Step, sde: SDE, event: tuple[int, ...], n: int, steps: int) -> None:
    """Of 2N and of N steps, extrapolated to none: (2^p M_2N − M_N)/(2^p − 1) has no O(h^p) bias (Talay & Tubaro 1990).

    What is left is O(h) of the bias that was removed, here below half the difference of the two runs.
    """
    denoiser = two_modes(sde, event)
    coarse, fine = (
        deviations(
            Sampler(step, KarrasGrid(), count, denoise=False)(denoiser, (n, *event), rng=Rng(0)), denoiser, sde.t_min
        )
        for count in (steps, 2 * steps)
    )
    gain = 2**step.order
    assert_moments((gain * fine - coarse) / (gain - 1), slack=0.5 * (fine - coarse).mean(0).abs())


def combinations() -> Iterator[tuple[str, str, str]]:
    """Every predictor on every SDE; with each corrector on two SDEs, so that each of those meets every SDE twice."""
    for i, predictor in enumerate(PREDICTORS):
        yield from ((predictor, "none", sde) for sde in ALL)
        for j, corrector in enumerate(("langevin", "annealed-langevin")):
            yield from ((predictor, corrector, list(ALL)[(i + 2 * j + k) % len(ALL)]) for k in (0, 4))


@pytest.mark.parametrize(("predictor", "corrector", "sde"), list(combinations()))
def test_predictor_and_corrector_land_on_the_moments(predictor, corrector, sde) -> None:
    step, correct = PREDICTORS[predictor], CORRECTORS[corrector]
    if correct is not None:
        step = PredictorCorrector(step, correct)
    assert_lands_on_moments(step, ALL[sde], (16,), n=320, steps=60)


@pytest.mark.parametrize("name", ["vp", "ve", "flow"])
@pytest.mark.parametrize(
    "step",
    [Ancestral(), Heun(), PredictorCorrector(ReverseDiffusion(), Langevin(0.1), corrector_steps=2)],
    ids=["ancestral", "heun", "reverse-diffusion-langevin"],
)
def test_images_land_on_the_moments(step, name) -> None:
    """Event (3, 4, 4), and more than one correction a step."""
    assert_lands_on_moments(step, ALL[name], (3, 4, 4), n=300, steps=60)


def middle(sde: SDE) -> Tensor:
    """The time of log-SNR 0."""
    return sde.time(torch.tensor(0.0, dtype=torch.float64))


def correct(step: Step, denoiser: GaussianMixtureDenoiser, x: Tensor, t: Tensor, times: int) -> Tensor:
    state, rng = step.init(x), Rng(7)
    for _ in range(times):
        x, state = step(denoiser, x, t, t, state, cond=None, rng=rng)
    return x


@each_sde
def test_annealed_langevin_keeps_the_marginal_of_a_mixture(sde) -> None:
    """100 corrections of h = 0.02 σ², a total of two relaxation times of the noise, from exact draws at λ = 0.

    Bias: h/2 = 1 % of σ² ≤ 1 per dimension.
    """
    denoiser = mixture(sde, (4,), seed=2)
    t = middle(sde)
    x0 = denoiser.sample(2000, rng=Rng(0), dtype=torch.float64)
    x = sde.perturb(x0, t, Rng(1).normal(x0.shape, dtype=torch.float64))
    after = correct(AnnealedLangevin(0.1), denoiser, x, t, 100)
    assert float((after - x).square().mean()) > 0.5 * float(sde.marginal(t)[1] ** 2)  # it did move
    assert_moments(deviations(after, denoiser, float(t)), slack=0.01)


@each_sde
@pytest.mark.parametrize("event", [(2,), (3, 8, 8)], ids=str)
@pytest.mark.parametrize("corrector", [Langevin(0.16), AnnealedLangevin(0.16)], ids=["langevin", "annealed-langevin"])
def test_correctors_find_the_marginal_from_afar(sde, event, corrector) -> None:
    """From twice the variance and a shifted mean to N(m, V I), 200 corrections of h ≈ 0.05 σ² at σ² > V/2.

    The start is forgotten at rate h/V ≥ 0.025 per correction, e^{−5}, and e^{−10} of its variance. The stationary
    variance is V/(1 − h/2V) (see below). Where h ∝ 1/(‖σ score‖² + 64) the chain stays at a point for as long as h is
    small there, so its law is p/h: for ‖σ score‖² = s² χ²_D, s² = σ²/V, that is 1 + 2s²/(s² D + 64) times as wide, 2 %
    in the plane. The two biases together are known to their product.
    """
    dims = math.prod(event)
    n = 10_000 // dims
    denoiser = GaussianMixtureDenoiser(torch.full((1, *event), 0.5), 0.25, torch.ones(1), sde)
    t = middle(sde)
    mean, cov = marginal_moments(denoiser, float(t))
    centre, exact = float(mean[0]), float(cov[0, 0])
    far = centre + 0.5 + math.sqrt(2 * exact) * Rng(0).normal((n, *event), dtype=torch.float64)
    x = correct(corrector, denoiser, far, t, 200)
    share = float(sde.marginal(t)[1] ** 2) / exact
    h = 2 * 0.16**2 * share  # in units of V
    tilt = 2 * share / (share * dims + 64) if isinstance(corrector, Langevin) else 0.0
    assert abs(float(x.mean()) - centre) < 4 * math.sqrt(exact / (n * dims)) + 0.5 * math.exp(-5)
    widening = float(x.var()) / exact * (1 - h / 2) / (1 + tilt)
    assert abs(widening - 1) < 4 * math.sqrt(2 / (n * dims)) + tilt * h + math.exp(-10)


@each_sde
@pytest.mark.parametrize("snr", [0.05, 0.16, 0.5])
def test_annealed_langevin_on_a_gaussian_has_the_known_fixed_point(sde, snr) -> None:
    """x ← (1 − h/V)(x − m) + m + √(2h) z has mean m and variance V/(1 − h/2V): no Monte Carlo."""
    denoiser = GaussianMixtureDenoiser(torch.tensor([[1.5]]), 0.25, torch.ones(1), sde)
    t = middle(sde)
    mean, cov = marginal_moments(denoiser, float(t))
    step, points = AnnealedLangevin(snr), torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    z = Rng(3).normal((2, 1), dtype=torch.float64)
    moved, _ = step(denoiser, points, t, t, None, cond=None, rng=Rng(3))
    h = 2 * snr**2 * sde.marginal(t)[1] ** 2
    still = moved - (2 * h).sqrt() * z
    a, b = still[1] - still[0], still[0]
    torch.testing.assert_close(b / (1 - a), mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(2 * h / (1 - a**2), cov[0] / (1 - h / (2 * cov[0])), rtol=1e-9, atol=1e-9)
