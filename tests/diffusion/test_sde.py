"""Every SDE: values against closed forms, rates against autograd, f and g against the marginal they must reproduce."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import (
    EVENT_SHAPES,
    all_sdes,
    closed_form_sdes,
    ddpm_alpha_bar,
    gauss_legendre,
    ncsn_sigmas,
    segments,
    times,
)
from torch import Tensor

from scoresde import (
    EDMSDE,
    SDE,
    VESDE,
    VPSDE,
    CosineSDE,
    RectifiedFlow,
    Rng,
    SubVPSDE,
)

ALL = all_sdes()
each_sde = pytest.mark.parametrize("sde", ALL.values(), ids=ALL.keys())
each_event = pytest.mark.parametrize("event", EVENT_SHAPES, ids=str)
EPS32 = torch.finfo(torch.float32).eps


def _int_beta(t: float) -> float:
    return 0.1 * t + 0.5 * 19.9 * t * t


def _table(values: Tensor, t: float) -> float:
    """Linear interpolation of `values`, entry i at (i + 1)/N."""
    place = min(max(t * len(values) - 1, 0), len(values) - 1)
    low = min(int(place), len(values) - 2)
    return float(values[low] + (place - low) * (values[low + 1] - values[low]))


_DDPM = ddpm_alpha_bar().logit()
_NCSN = -2 * ncsn_sigmas().log()

CLOSED_FORM = {
    "vp": lambda t: (math.exp(-0.5 * _int_beta(t)), math.sqrt(-math.expm1(-_int_beta(t)))),
    "subvp": lambda t: (math.exp(-0.5 * _int_beta(t)), -math.expm1(-_int_beta(t))),
    "ve": lambda t: (1.0, 0.01 * 5000.0**t),
    "cosine": lambda t: (math.sin(0.5 * math.pi * (1 - t)), math.sin(0.5 * math.pi * t)),
    "edm": lambda t: (1.0, t),
    "flow": lambda t: (1 - t, t),
    "ddpm": lambda t: (
        1 / math.sqrt(1 + math.exp(-_table(_DDPM, t))),
        1 / math.sqrt(1 + math.exp(_table(_DDPM, t))),
    ),
    "ncsn": lambda t: (1.0, math.exp(-0.5 * _table(_NCSN, t))),
}
"""(α, σ) of each SDE in plain double precision, written apart from the library."""


def close(got: Tensor, want: Tensor, rtol: float, atol: float = 0.0) -> None:
    torch.testing.assert_close(got.double(), want.double().expand_as(got), rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_marginal_equals_the_closed_form(name, dtype, rtol) -> None:
    """Relative, so small σ counts as much as large: 1−exp in float32 is 2.4 % off at t = 1e-5."""
    sde = ALL[name]
    t = times(sde, 41, ends=True).to(dtype).clamp(sde.t_min, sde.t_max)
    alpha, sigma = sde.marginal(t)
    assert alpha.dtype == sigma.dtype == dtype
    expected = torch.tensor([CLOSED_FORM[name](value) for value in t.tolist()], dtype=torch.float64)
    close(alpha, expected[:, 0], rtol)
    close(sigma, expected[:, 1], rtol)


@pytest.mark.parametrize("name", ["vp", "subvp", "ve"])
@pytest.mark.parametrize("t", [1e-5, 1e-4, 1e-3])
def test_float32_sigma_near_zero(name, t) -> None:
    t = torch.tensor(t, dtype=torch.float32)
    sigma = ALL[name].marginal(t)[1]
    assert float(sigma) == pytest.approx(CLOSED_FORM[name](float(t))[1], rel=1e-5)


@each_sde
def test_float32_coefficients_equal_float64(sde) -> None:
    """f, g and the rates keep 1e-5 in float32: no difference of nearly equal numbers anywhere."""
    t = times(sde, 41).float()
    wide = t.double()
    for got, want in [
        (sde.drift(t), sde.drift(wide)),
        (sde.diffusion(t), sde.diffusion(wide)),
        *zip(sde.rates(t), sde.rates(wide), strict=True),
    ]:
        assert got.dtype == torch.float32 and got.shape == t.shape
        close(got, want, 1e-5)


@each_sde
def test_rates_equal_autograd(sde) -> None:
    t = times(sde, 41).requires_grad_()
    for value, rate in zip(sde.marginal(t), sde.rates(t), strict=True):
        slope = torch.zeros_like(t)
        if value.requires_grad:  # α = 1 has none
            (slope,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        close(rate, slope, 1e-9, 1e-12)


@each_sde
def test_drift_and_diffusion_satisfy_the_variance_equation(sde) -> None:
    """f = d log α/dt and dΣ/dt = 2 f Σ + g², with the derivatives by autograd."""
    t = times(sde, 41).requires_grad_()
    alpha, sigma = sde.marginal(t)
    if alpha.requires_grad:
        (d_log_alpha,) = torch.autograd.grad(alpha.log().sum(), t, retain_graph=True)
    else:
        d_log_alpha = torch.zeros_like(t)
    (d_var,) = torch.autograd.grad((sigma**2).sum(), t)
    f, g = sde.drift(t), sde.diffusion(t)
    close(f, d_log_alpha, 1e-9, 1e-12)
    close(2 * f * sigma**2 + g**2, d_var, 1e-9, 1e-12)
    assert bool((g >= 0).all())


@each_sde
def test_moment_equations_reproduce_the_marginal(sde) -> None:
    """dm = f m dt and dv = (2 f v + g²) dt, solved by variation of constants, from t_min to t_max.

    m(t) = e^{F(t)} m(s), v(t) = e^{2F(t)} v(s) + ∫ e^{2(F(t) − F(τ))} g²(τ) dτ, F = ∫f, with both integrals by
    8-point Gauss–Legendre rules on pieces short in log-SNR (error far below 1e-9). Uses f and g only.
    """
    edges = segments(sde)
    nodes, weights = gauss_legendre(edges)
    decay = (weights * sde.drift(nodes)).sum(1)  # ∫f over each piece
    inner, inner_weights = gauss_legendre_to(nodes, edges[1:])
    remaining = (inner_weights * sde.drift(inner)).sum(-1)  # ∫f from each node to the end of its piece
    gained = (weights * (2 * remaining).exp() * sde.diffusion(nodes) ** 2).sum(1)
    alpha, sigma = sde.marginal(edges)
    m, v = float(alpha[0]), float(sigma[0]) ** 2
    means, variances = [m], [v]
    for k in range(len(decay)):
        m, v = m * math.exp(decay[k]), v * math.exp(2 * decay[k]) + float(gained[k])
        means.append(m)
        variances.append(v)
    close(torch.tensor(means, dtype=torch.float64), alpha, 1e-8)
    close(torch.tensor(variances, dtype=torch.float64), sigma**2, 1e-8)
    scale, std = sde.transition(edges[:-1], edges[1:])
    close(scale, decay.exp(), 1e-9)
    close(std**2, gained, 1e-8)


def gauss_legendre_to(nodes: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Rules on [node, end of its piece] for every node (pieces, order): (pieces, order, order)."""
    unit, weights = gauss_legendre(torch.tensor([0.0, 1.0], dtype=torch.float64))
    gap = (ends[:, None] - nodes)[..., None]
    return nodes[..., None] + gap * unit[0], gap * weights[0]


@each_sde
def test_forward_simulation_reproduces_the_marginal(sde) -> None:
    """Euler–Maruyama from t_min against α m and α² v + σ², within 4 standard errors and the discretisation bound.

    The recursion m += f m h, v → v (1 + f h)² + g² h is what an infinite simulation would give, so its distance to
    the marginal is the discretisation error: it must halve with the step (order 1), which is checked, and bounds the
    bias of the simulation. Standard errors: √(v/n) of the mean, v√(2/(n−1)) of the variance (Gaussian data).
    """
    data_mean, data_var, n = 1.5, 0.25, 40_000
    edges = segments(sde, 250)
    if len(edges) > 900:  # a table: its entries are the pieces, no step crosses a jump of the rates
        edges = edges[: len(edges) // 2]  # half of the 1,000-step one is as telling, and twice as fast
    alpha, sigma = sde.marginal(edges[[0, -1]])
    start = float(alpha[0]) * data_mean, float(alpha[0] ** 2 * data_var + sigma[0] ** 2)
    exact = float(alpha[1]) * data_mean, float(alpha[1] ** 2 * data_var + sigma[1] ** 2)

    bias = []
    for parts in (1, 2, 4):
        m, v = start
        for f, g, h in zip(*_euler(sde, edges, parts), strict=True):
            m, v = m + f * m * h, v * (1 + f * h) ** 2 + g * g * h
        bias.append((abs(m - exact[0]), abs(v - exact[1])))
    for coarse, fine, finest in zip(*bias, strict=True):
        assert coarse < 0.15 * max(exact[1], start[1], 1.0)
        if coarse > 1e-9:
            assert 1.6 < coarse / fine < 2.5 and 1.8 < fine / finest < 2.2

    rng = Rng(0)
    x = start[0] + math.sqrt(start[1]) * rng.normal((n,), dtype=torch.float32)
    for f, g, h in zip(*_euler(sde, edges, 1), strict=True):
        x = x * (1 + f * h) + g * math.sqrt(h) * rng.normal((n,))
    mean, var = float(x.double().mean()), float(x.double().var())
    assert abs(mean - exact[0]) < 4 * math.sqrt(exact[1] / n) + 1.05 * bias[0][0]
    assert abs(var - exact[1]) < 4 * exact[1] * math.sqrt(2 / (n - 1)) + 1.05 * bias[0][1]


def _euler(sde: SDE, edges: Tensor, parts: int) -> tuple[list[float], list[float], list[float]]:
    """f, g and h of Euler steps, each piece cut into `parts`; f and g a hair inside the piece, where tables jump."""
    u = torch.arange(parts, dtype=torch.float64) / parts
    width = edges[1:] - edges[:-1]
    t = edges[:-1, None] + width[:, None] * (u + 1e-9)
    h = (width / parts)[:, None].expand_as(t)
    return sde.drift(t).flatten().tolist(), sde.diffusion(t).flatten().tolist(), h.flatten().tolist()


def test_sub_vp_is_not_vp() -> None:
    """σ = 1 − α² without a root, g² = β(1 − α⁴) = β(1 − e^{−2∫β}), and Σ_VP − Σ_subVP = α²(1 − α²) ≥ 0."""
    sub, vp = SubVPSDE(), VPSDE()
    t = times(sub, 41, ends=True)
    alpha, sigma = sub.marginal(t)
    beta = 0.1 + 19.9 * t
    close(sigma, -torch.expm1(2 * alpha.log()), 1e-9)
    close(sub.diffusion(t) ** 2, -beta * torch.expm1(-2 * (0.1 * t + 9.95 * t**2)), 1e-9)
    close(sub.drift(t), -0.5 * beta, 1e-12)
    close(vp.diffusion(t) ** 2, beta, 1e-12)
    close(alpha, vp.marginal(t)[0], 1e-12)
    assert bool((sub.marginal(t)[1] <= vp.marginal(t)[1]).all())


def test_the_ve_marginal_starts_at_sigma_min() -> None:
    """The marginal is that of data which carry noise σ_min; started at clean data the SDE has σ² − σ_min² instead."""
    sde = VESDE(0.3, 20.0)
    zero, t = torch.zeros((), dtype=torch.float64), times(sde, 11)
    assert float(sde.marginal(zero)[1]) == pytest.approx(0.3, rel=1e-12)
    scale, std = sde.transition(zero, t)
    close(scale, torch.ones_like(t), 1e-12)
    close(std**2, sde.marginal(t)[1] ** 2 - 0.3**2, 1e-9)


@each_sde
def test_overridden_methods_equal_the_general_ones(sde) -> None:
    """What an SDE restates for accuracy is what follows from its marginal and rates."""
    t = times(sde, 41)
    close(sde.log_snr(t), SDE.log_snr(sde, t), 1e-10, 1e-10)
    close(sde.drift(t), SDE.drift(sde, t), 1e-10)
    close(sde.diffusion(t), SDE.diffusion(sde, t), 1e-9)


def test_three_methods_make_an_sde() -> None:
    """A process with α = e^{−t}, σ² = t (no variance preservation): f = −1, g² = 1 + 2t, without further code."""

    class Mine(SDE):
        t_min, t_max = 0.01, 2.0

        def marginal(self, t):
            return (-t).exp(), t.sqrt()

        def rates(self, t):
            return -(-t).exp(), 0.5 / t.sqrt()

        def time(self, log_snr):
            raise NotImplementedError

    t = torch.linspace(0.1, 2, 9, dtype=torch.float64)
    close(Mine().drift(t), -torch.ones_like(t), 1e-12)
    close(Mine().diffusion(t) ** 2, 1 + 2 * t, 1e-12)
    with pytest.raises(TypeError, match="abstract"):
        SDE()


@each_sde
def test_time_inverts_log_snr_in_float64(sde) -> None:
    t = times(sde, 41, ends=True)
    level = sde.log_snr(t)
    assert bool((level[1:] < level[:-1]).all())
    close(sde.time(level), t, 1e-9)
    assert sde.time(level[3]).shape == () and sde.log_snr(t[3]).shape == ()


@each_sde
def test_time_inverts_log_snr_in_float32(sde) -> None:
    """λ carries a relative error of a few ε, at least a few ε absolute; t then moves by that over |dλ/dt|."""
    t = times(sde, 41, ends=True).float().clamp(sde.t_min, sde.t_max)
    wide = t.double()
    (alpha, sigma), (d_alpha, d_sigma) = sde.marginal(wide), sde.rates(wide)
    slope = 2 * (d_sigma / sigma - d_alpha / alpha)
    back = sde.time(sde.log_snr(t))
    assert back.dtype == torch.float32
    bound = 8 * EPS32 * ((1 + sde.log_snr(wide).abs()) / slope + wide)
    error = (back.double() - wide).abs()
    assert bool((error <= bound).all()), float((error / bound).max())


@each_sde
def test_transitions_compose_and_carry_the_marginal(sde) -> None:
    t = times(sde, 12, ends=True)
    s, u, t = t[:-2], t[1:-1], t[2:]
    (a, p), (b, q), (c, r) = sde.transition(s, u), sde.transition(u, t), sde.transition(s, t)
    close(a * b, c, 1e-10)
    close(b**2 * p**2 + q**2, r**2, 1e-9)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = sde.marginal(s), sde.marginal(t)
    close(c * alpha_s, alpha_t, 1e-10)
    close(c**2 * sigma_s**2 + r**2, sigma_t**2, 1e-9)
    scale, std = sde.transition(s, s)
    close(scale, torch.ones_like(s), 0)
    close(std, torch.zeros_like(s), 0)
    assert sde.transition(s[0], t)[0].shape == t.shape


@pytest.mark.parametrize("name", closed_form_sdes())
def test_short_transitions_keep_their_variance(name) -> None:
    """std² = g² h (1 + O(Δλ)) for a step of Δλ = 1e-4: no cancellation, even where σ² is 1e4 times g² h."""
    sde = ALL[name]
    t = times(sde, 21)
    (alpha, sigma), (d_alpha, d_sigma) = sde.marginal(t), sde.rates(t)
    h = 1e-4 / (2 * (d_sigma / sigma - d_alpha / alpha))
    _, std = sde.transition(t, t + h)
    close(std**2, sde.diffusion(t + h / 2) ** 2 * h, 1e-4)


@each_sde
@each_event
def test_scales_broadcast_to_every_event_shape(sde, event) -> None:
    x = torch.zeros(3, *event)
    t = times(sde, 3).float()
    for scales in (sde.at(t, x), sde.at(t.double(), x)):
        assert scales.alpha.shape == scales.sigma.shape == (3, *[1] * len(event))
        assert scales.alpha.dtype == torch.float32
        assert [rate.shape for rate in scales.rates] == [scales.alpha.shape] * 2
    alpha, sigma = sde.marginal(times(sde, 3))
    close(sde.at(times(sde, 3), x).sigma.flatten(), sigma, 1e-6)
    for one in (t[1], float(t[1])):
        scales = sde.at(one, x)
        assert scales.alpha.shape == scales.sigma.shape == scales.rates[0].shape == ()
        close(scales.sigma, sigma[1], 1e-5)
        close(scales.alpha, alpha[1], 1e-5)


@pytest.mark.parametrize(("dtype", "expected"), [
    (torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
])  # fmt: skip
def test_scales_stay_out_of_half_precision(dtype, expected) -> None:
    scales = VPSDE().at(torch.rand(2), torch.zeros(2, 3, dtype=dtype))
    assert scales.alpha.dtype == scales.sigma.dtype == scales.rates[1].dtype == expected


@pytest.mark.parametrize("shape", [(2,), (1,), (4, 1), (4, 2)])
def test_times_of_another_shape_are_refused(shape) -> None:
    with pytest.raises(ValueError, match="one value per sample"):
        VPSDE().at(torch.full(shape, 0.5), torch.zeros(4, 2))


@each_sde
def test_integer_times_are_refused(sde) -> None:
    for t in (torch.tensor(1), torch.ones(4, dtype=torch.int64)):
        with pytest.raises(TypeError, match="continuous time"):
            sde.at(t, torch.zeros(4, 2))


@each_sde
@each_event
def test_perturb(sde, event) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 4, *event, generator=generator, dtype=torch.float64)
    t = times(sde, 4)
    x = sde.perturb(x0, t, eps)
    assert x.shape == x0.shape and x.dtype == x0.dtype
    alpha, sigma = sde.marginal(t)
    for k in range(4):
        close(x[k], alpha[k] * x0[k] + sigma[k] * eps[k], 1e-12, 1e-14)
        close(sde.perturb(x0, t[k], eps)[k], x[k], 1e-12, 1e-14)


@each_sde
@each_event
def test_prior_density(sde, event) -> None:
    """Against torch.distributions, with scalar and per-entry moments of the data."""
    generator = torch.Generator().manual_seed(1)
    alpha, sigma = sde.marginal(torch.tensor(sde.t_max, dtype=torch.float64))
    z = float(sigma) * torch.randn(4, *event, generator=generator, dtype=torch.float64)
    mean = torch.randn(event, generator=generator, dtype=torch.float64)
    var = torch.rand(event, generator=generator, dtype=torch.float64)
    for m, v in ((0.0, 0.0), (0.3, 0.7), (mean, var)):
        std = (alpha**2 * v + sigma**2).sqrt()
        normal = torch.distributions.Normal((alpha * m).expand(event), std.expand(event))
        expected = normal.log_prob(z).flatten(1).sum(1)
        got = sde.prior_log_prob(z, mean=m, var=v)
        assert got.shape == (4,)
        close(got, expected, 1e-12)
        close(sde.prior_log_prob(z.float(), mean=m, var=v), expected, 1e-5)


@each_sde
def test_prior_samples_have_the_moments_of_x_at_t_max(sde) -> None:
    n = 20_000
    mean, var = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([0.5, 2.0], dtype=torch.float64)
    z = sde.prior_sample((n, 2), rng=Rng(0), mean=mean, var=var)
    assert z.dtype == torch.float32  # float64 moments do not widen the sample
    alpha, sigma = sde.marginal(torch.tensor(sde.t_max, dtype=torch.float64))
    exact = alpha**2 * var + sigma**2
    assert bool(((z.double().mean(0) - alpha * mean).abs() < 4 * (exact / n).sqrt()).all())
    assert bool(((z.double().var(0) - exact).abs() < 4 * exact * math.sqrt(2 / (n - 1))).all())


def test_prior_samples_follow_dtype_device_and_seeds() -> None:
    sde, moments = VESDE(), {"mean": torch.ones(3, dtype=torch.float64), "var": torch.ones(3, dtype=torch.float64)}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert sde.prior_sample((2, 3), rng=Rng(0), dtype=dtype, **moments).dtype == dtype
    assert sde.prior_sample((2, 3), rng=Rng(0), device="meta", **moments).device.type == "meta"
    both = sde.prior_sample((2, 3), rng=Rng(seeds=[4, 9]), **moments)
    assert torch.equal(sde.prior_sample((1, 3), rng=Rng(seeds=[9]), **moments)[0], both[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VPSDE(0.0, 20.0), "beta_min"),
        (lambda: VPSDE(20.0, 0.1), "beta_min"),
        (lambda: SubVPSDE(-0.1, 20.0), "beta_min"),
        (lambda: SubVPSDE(0.1, math.inf), "beta_max"),
        (lambda: VPSDE(math.nan, 20.0), "beta_min"),
        (lambda: VPSDE(t_min=0.0), "t_min"),
        (lambda: VPSDE(t_min=1.0), "t_min"),
        (lambda: VESDE(0.0, 50.0), "sigma_min"),
        (lambda: VESDE(50.0, 0.01), "sigma_min"),
        (lambda: VESDE(0.01, math.inf), "sigma_max"),
        (lambda: VESDE(t_min=-1e-3), "t_min"),
        (lambda: EDMSDE(0.0, 80.0), "t_min"),
        (lambda: EDMSDE(80.0, 0.002), "t_min"),
        (lambda: CosineSDE(t_max=1.0), "t_max < 1"),
        (lambda: CosineSDE(t_min=0.5, t_max=0.4), "t_min"),
        (lambda: RectifiedFlow(t_max=1.0), "t_max < 1"),
        (lambda: RectifiedFlow(t_min=0.0), "t_min"),
    ],
)
def test_bad_constants_are_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()
