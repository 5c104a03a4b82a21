"""Networks from anywhere, through Preconditioned and ScoreFunction, say what the exact denoiser says."""

from __future__ import annotations

import pytest
import torch
from oracles import EVENT_SHAPES, all_sdes, ddpm_alpha_bar, mixture, times
from torch import nn

from scoresde import (
    DDIM,
    EDM,
    VPSDE,
    X0,
    Denoiser,
    Eps,
    Exact,
    GaussianMixtureDenoiser,
    Preconditioned,
    Rng,
    Sampler,
    Score,
    ScoreFunction,
    TableSDE,
    UniformGrid,
    V,
    Velocity,
    log_likelihood,
)
from scoresde.diffusion.denoiser import CountingDenoiser, default_noise_input
from scoresde.likelihood.tolerance import Tolerance

ALL = all_sdes()
each_sde = pytest.mark.parametrize("sde", ALL.values(), ids=ALL.keys())


def noise_to_data(sde, t):
    """σ/α, what k-diffusion calls sigma."""
    return (-0.5 * sde.log_snr(t)).exp()


# Each network below knows the exact mixture and one foreign convention: what it is told about time, what it returns.
def score_sde_eps(exact):
    """score_sde, VP: told 999 t, returns ε."""
    net = lambda x, c, cond: exact(x, c / 999).eps  # noqa: E731
    return Preconditioned(net, exact.sde, Eps(), noise_input=lambda sde, t: t * 999, scale_input=False)


def score_sde_score(exact):
    """score_sde, VE: told σ, returns the score."""
    net = lambda x, c, cond: exact(x, exact.sde.time(-2 * c.log())).score  # noqa: E731
    return Preconditioned(net, exact.sde, Score(), noise_input=noise_to_data, scale_input=False)


def k_diffusion(exact):
    """k-diffusion: told σ, returns the denoised sample."""
    net = lambda x, c, cond: exact(x, exact.sde.time(-2 * c.log())).x0  # noqa: E731
    return Preconditioned(net, exact.sde, X0(), noise_input=noise_to_data, scale_input=False)


def edm(exact):
    """EDM: told ln(σ)/4, fed c_in x, returns the unit-variance F."""
    sigma_data, row = 0.7, EDM(0.7)

    def net(x, c, cond):
        scales = exact.sde.at(exact.sde.time(-8 * c), x)
        p = exact(x * (scales.alpha**2 * sigma_data**2 + scales.sigma**2).sqrt(), scales.t)
        return row.target(p.x0, p.eps, scales)

    return Preconditioned(net, exact.sde, row, sigma_data=sigma_data)


def latent_v(exact):
    """v-prediction (Salimans & Ho), told t itself."""

    def net(x, c, cond):
        p = exact(x, c)
        return p.scales.alpha * p.eps - p.scales.sigma * p.x0

    return Preconditioned(net, exact.sde, V(), noise_input=lambda sde, t: t, scale_input=False)


def flow_matching(exact):
    """Flow matching: told t, returns dx/dt."""
    net = lambda x, c, cond: exact(x, c).velocity  # noqa: E731
    return Preconditioned(net, exact.sde, Velocity(), noise_input=lambda sde, t: t, scale_input=False)


def score_function(exact):
    return ScoreFunction(lambda x, t: exact(x, t).score, exact.sde)


CONVENTIONS = [score_sde_eps, score_sde_score, k_diffusion, edm, latent_v, flow_matching, score_function]
each_convention = pytest.mark.parametrize("convention", CONVENTIONS, ids=lambda f: f.__name__)


@each_convention
@each_sde
@pytest.mark.parametrize("event", EVENT_SHAPES, ids=str)
def test_foreign_networks_say_what_the_exact_denoiser_says(sde, convention, event) -> None:
    exact = mixture(sde, event, covariance="diagonal")
    denoiser = convention(exact)
    t = times(sde, 6)
    x = sde.perturb(
        exact.sample(6, rng=Rng(0), dtype=torch.float64), t, Rng(1).normal((6, *event), dtype=torch.float64)
    )
    for time in (t, t[2]):
        got, want = denoiser(x, time), exact(x, time)
        scales = want.scales
        # one end point is divided by its coefficient; 1e-9 is what the round trip through time leaves of 1e-16
        size = scales.alpha * want.x0.abs() + scales.sigma * want.eps.abs()
        assert bool(((got.x0 - want.x0).abs() * scales.alpha <= 1e-8 * size).all())
        assert bool(((got.eps - want.eps).abs() * scales.sigma <= 1e-8 * size).all())
        assert got.x0.shape == got.eps.shape == x.shape
        assert got.x0.dtype == torch.float64


class DDPMNetwork(nn.Module):
    """A 1,000-step network as DDPM code writes it: looks its integer step up in a table of ᾱ, returns ε.

    It has learnt N(mean, var): E[ε|x] = σ (x − α mean)/(α² var + σ²).
    """

    def __init__(self, mean: float, var: float):
        super().__init__()
        self.register_buffer("alphas_cumprod", ddpm_alpha_bar().float())
        self.mean, self.var = mean, var

    def forward(self, x, step, cond=None):
        assert step.shape == (len(x),)
        index = step.round().long()
        assert bool(((step - index).abs() < 1e-3).all())
        alpha_bar = self.alphas_cumprod[index].reshape(-1, *[1] * (x.ndim - 1))
        return (1 - alpha_bar).sqrt() * (x - alpha_bar.sqrt() * self.mean) / (alpha_bar * self.var + 1 - alpha_bar)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_a_ddpm_checkpoint_with_its_beta_table(dtype) -> None:
    sde = TableSDE(ddpm_alpha_bar())
    denoiser = Preconditioned(
        DDPMNetwork(0.5, 0.3), sde, Eps(), noise_input=lambda sde, t: t * len(sde) - 1, scale_input=False
    )
    exact = GaussianMixtureDenoiser(torch.full((1, 3), 0.5), 0.3, torch.ones(1), sde)
    steps = torch.tensor([0, 1, 10, 56, 289, 500, 998, 999])
    t = ((steps + 1).double() / 1000).to(dtype)
    x = sde.perturb(exact.sample(8, rng=Rng(0)), t, Rng(1).normal((8, 3))).to(dtype)
    got, want = denoiser(x, t), exact(x, t)
    # the checkpoint's own table is float32: 1 − ᾱ_1 = 1e-4 is known to 6e-4 of itself
    torch.testing.assert_close(got.eps, want.eps, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close((got.x0 - want.x0) * got.scales.alpha, torch.zeros_like(x), rtol=0, atol=1e-4)


def test_foreign_networks_sample_and_score_like_the_exact_denoiser() -> None:
    """The whole way: DDIM samples and ODE log-likelihoods do not know which convention the network has."""
    sde = VPSDE()
    exact = mixture(sde, (2,))
    start = sde.prior_sample((6, 2), rng=Rng(0), dtype=torch.float64)
    x = exact.sample(3, rng=Rng(2), dtype=torch.float64)
    sampler = Sampler(DDIM(), UniformGrid(), steps=12)
    want = sampler(exact, start)

    def score(denoiser):
        return log_likelihood(denoiser, x, divergence=Exact(), solver=Tolerance(1e-4, 1e-4), rng=Rng(0)).log_prob

    expected = score(exact)
    for convention in CONVENTIONS:
        denoiser = convention(exact)
        denoiser.data_mean, denoiser.data_var = exact.data_mean, exact.data_var
        torch.testing.assert_close(
            Sampler(DDIM(), UniformGrid(), steps=12)(denoiser, start), want, rtol=1e-7, atol=1e-7
        )
        # round-off may tip a step of the adaptive solver: its tolerance bounds the difference
        torch.testing.assert_close(score(denoiser), expected, rtol=0, atol=1e-2)


@each_sde
def test_the_default_network_sees_unit_variance_and_a_quarter_log_sigma(sde) -> None:
    """c_in √(α²σ_d² + σ²) = 1 and c_noise = ln(σ/α)/4 (Karras et al. 2022, table 1), c_noise as (B,) always."""
    seen = {}

    def net(x, c, cond):
        seen.update(x=x, c=c, cond=cond)
        return x

    t = times(sde, 5)
    alpha, sigma = sde.marginal(t)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cond = {"label": torch.arange(5)}
    Preconditioned(net, sde, EDM(0.5), sigma_data=0.5)(x, t, cond)
    assert seen["cond"] is cond
    torch.testing.assert_close(seen["c"], (sigma / alpha).log() / 4, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(seen["c"], default_noise_input(sde, t), rtol=0, atol=0)
    torch.testing.assert_close(seen["x"], x / (alpha**2 * 0.25 + sigma**2).sqrt()[:, None], rtol=1e-12, atol=0)
    Preconditioned(net, sde, Eps(), scale_input=False)(x, t[1])
    assert seen["x"] is x and seen["c"].shape == (5,) and seen["cond"] is None
    assert bool((seen["c"] == seen["c"][0]).all())


def test_autocast_reaches_the_network_and_nothing_else() -> None:
    seen = {}

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x, c, cond):
            seen["inside"] = torch.is_autocast_enabled("cpu")
            seen["input"], seen["noise"] = x.dtype, c.dtype
            out = self.linear(x)
            seen["output"] = out.dtype
            return out

    def noise_input(sde, t):
        seen["outside"] = torch.is_autocast_enabled("cpu")
        return t * 999

    torch.manual_seed(0)
    sde, net = VPSDE(), Net()
    half = Preconditioned(net, sde, Eps(), noise_input=noise_input, autocast="bfloat16")
    full = Preconditioned(net, sde, Eps(), noise_input=noise_input)
    x, t = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)), torch.linspace(0.01, 1, 64)
    p, q = half(x, t), None
    assert seen == {
        "inside": True, "outside": False, "input": torch.float32, "noise": torch.float32, "output": torch.bfloat16,
    }  # fmt: skip
    assert not torch.is_autocast_enabled("cpu")
    assert p.x0.dtype == p.eps.dtype == p.scales.alpha.dtype == torch.float32
    q = full(x, t)
    assert seen["inside"] is False and seen["output"] == torch.float32
    with torch.autocast("cpu", torch.bfloat16):  # the caller's own region is theirs, and rounds the network alone too
        around = full(x, t)
        assert seen["output"] == torch.bfloat16 and torch.equal(around.eps, p.eps) and around.x0.dtype == torch.float32
    with torch.autocast("cpu", torch.float16):
        half(x, t)
        assert seen["output"] == torch.bfloat16
    # the output alone is rounded, to 8 bits; the invariant holds to float32
    torch.testing.assert_close(p.eps, q.eps, rtol=0.02, atol=0.02)
    size = p.scales.alpha * p.x0.abs() + p.scales.sigma * p.eps.abs()
    assert bool(((p.scales.alpha * p.x0 + p.scales.sigma * p.eps - x).abs() <= 1e-6 * size).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_batches_get_float32_coefficients(dtype) -> None:
    denoiser = Preconditioned(lambda x, c, cond: torch.zeros_like(x), VPSDE(), EDM(1.0))
    p = denoiser(torch.ones(2, 3, dtype=dtype), torch.tensor([1e-5, 0.5]))
    assert p.x0.dtype == p.scales.sigma.dtype == torch.float32
    assert float(p.scales.sigma[0]) == pytest.approx(1e-3, rel=1e-3)


def test_gradients_reach_parameters_and_input() -> None:
    torch.manual_seed(0)
    net = nn.Linear(3, 3).double()
    denoiser = Preconditioned(lambda x, c, cond: net(x), VPSDE(), V())
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: denoiser(value, torch.tensor(0.4)).eps, (x,))
    denoiser(x, torch.tensor(0.4)).x0.sum().backward()
    assert float(net.weight.grad.abs().sum()) > 0


def test_a_module_is_registered_and_a_function_is_taken() -> None:
    net = nn.Linear(2, 2)
    assert len(list(Preconditioned(net, VPSDE(), Eps()).parameters())) == 2
    assert len(list(Preconditioned(lambda x, c, cond: x, VPSDE(), Eps()).parameters())) == 0
    assert len(list(ScoreFunction(net, VPSDE()).parameters())) == 2


@pytest.mark.parametrize("output", [(4, 6), (4, 3, 1), (1, 3), (3,)])
def test_outputs_of_another_shape_are_refused(output) -> None:
    wrong = lambda *args: torch.zeros(output)  # noqa: E731
    for denoiser in (Preconditioned(wrong, VPSDE(), Eps()), ScoreFunction(wrong, VPSDE())):
        with pytest.raises(ValueError, match=r"\(4, 3\)"):
            denoiser(torch.zeros(4, 3), torch.tensor(0.5))


@pytest.mark.parametrize("arguments", [{"sigma_data": 0.0}, {"sigma_data": -1.0}, {"autocast": "float32"}])
def test_bad_arguments_are_refused(arguments) -> None:
    with pytest.raises(ValueError, match=r"sigma_data|autocast"):
        Preconditioned(nn.Identity(), VPSDE(), Eps(), **arguments)


@each_sde
def test_the_data_and_the_roughness_of_a_network_are_measured(sde) -> None:
    """Gaussian data of standard deviation s in 2,000 dimensions: x̂_0 = α s² x/v, v = α² s² + σ², strays by α s²/√v.

    Of n draws in d dimensions a standard deviation has a relative error of 1/√(2(n − 1)d): 0.04 % for 1,000 samples of
    the data, 0.4 % for the 16 of the noise; five of them are allowed. A network without a clue, ε̂ = 0, has x̂_0 = x/α.
    """
    s, dims = 0.3, 2000
    gaussian = GaussianMixtureDenoiser(torch.zeros(1, dims), s**2, torch.ones(1), sde)
    x0 = gaussian.sample(1000, rng=Rng(0), dtype=torch.float64)
    alpha, sigma = (float(value) for value in sde.marginal(torch.tensor(sde.t_max, dtype=torch.float64)))
    knows = ScoreFunction(lambda x, t: gaussian(x, t).score, sde)
    assert knows.roughness == float("inf") and gaussian.roughness == 0
    assert knows.measure(x0) is knows and knows.data_std == pytest.approx(s, rel=5 / (2 * 999 * dims) ** 0.5)
    # the prior of data whose moments nobody has given is N(0, σ² I)
    want = alpha * s * sigma / (alpha**2 * s**2 + sigma**2)
    assert knows.roughness == pytest.approx(want, rel=5 / (2 * 15 * dims) ** 0.5 + 1e-3)
    clueless = ScoreFunction(lambda x, t: torch.zeros_like(x), sde).measure(x0)
    assert clueless.roughness == pytest.approx(sigma / alpha / s, rel=5 / (2 * 15 * dims) ** 0.5 + 1e-3)
    assert CountingDenoiser(clueless).roughness == clueless.roughness


def test_what_is_measured_leaves_the_network_as_it_was() -> None:
    """σ_d in c_in belongs to the network; the spread of the data is what solvers ask for."""
    network = lambda x, c: torch.tanh(x)  # noqa: E731
    denoiser = Preconditioned(network, VPSDE(), Eps(), sigma_data=0.7)
    x, t = torch.ones(2, 3), torch.tensor(0.5)
    before = denoiser(x, t).x0
    assert denoiser.data_std == 0.7
    assert denoiser.measure(3 * torch.randn(50, 3, generator=torch.Generator().manual_seed(0))).data_std > 2
    assert denoiser.sigma_data == 0.7 and torch.equal(denoiser(x, t).x0, before)
    assert Preconditioned(network, VPSDE(), Eps(), data_std=0.2).data_std == 0.2


@pytest.mark.parametrize(
    ("x0", "message"),
    [
        (torch.ones(1, 3), "two samples"),
        (torch.ones(5, 3), "standard deviation of these samples"),
        (torch.full((5, 3), float("nan")), "standard deviation of these samples"),
    ],
)
def test_data_that_say_nothing_are_refused(x0, message) -> None:
    with pytest.raises(ValueError, match=message):
        Preconditioned(nn.Linear(3, 3), VPSDE(), Eps()).measure(x0)


def test_a_network_that_is_not_finite_is_not_measured() -> None:
    with pytest.raises(ValueError, match="not finite"):
        ScoreFunction(lambda x, t: x / 0, VPSDE()).measure(torch.eye(3))


@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
def test_step_indices_are_not_times(kind) -> None:
    for denoiser in (Preconditioned(nn.Identity(), VPSDE(), Eps()), mixture(VPSDE(), (3,))):
        with pytest.raises(TypeError, match="noise_input"):
            denoiser(torch.zeros(4, 3), torch.ones(4, dtype=kind))


@each_sde
def test_score_functions(sde) -> None:
    """The standard normal of x_t has score −x: ε̂ = σx, x̂_0 = (1 − σ²)x/α; times arrive as (B,), conditions unread."""
    seen = []

    def fn(x, t, *cond):
        seen.append((t.shape, t.dtype, cond))
        return -x

    x = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = times(sde, 4)
    p = ScoreFunction(fn, sde)(x, t)
    alpha, sigma = (value.reshape(-1, 1, 1) for value in sde.marginal(t))
    torch.testing.assert_close(p.score, -x, rtol=1e-12, atol=0)
    torch.testing.assert_close(p.eps, sigma * x, rtol=1e-12, atol=0)
    torch.testing.assert_close(alpha * p.x0, (1 - sigma**2) * x, rtol=1e-9, atol=1e-9)
    label = torch.arange(4)
    ScoreFunction(fn, sde)(x.float(), t[0], label)
    assert seen == [((4,), torch.float64, ()), ((4,), torch.float32, (label,))]


def test_counting_counts_and_changes_nothing() -> None:
    exact = mixture(VPSDE(), (2,))
    counted = CountingDenoiser(exact)
    x, t = torch.zeros(3, 2), torch.tensor(0.5)
    for k in range(3):
        assert counted.evaluations == k
        assert torch.equal(counted(x, t).x0, exact(x, t).x0)
    assert counted.sde is exact.sde
    assert torch.equal(counted.prior_sample((2, 2), rng=Rng(0)), exact.prior_sample((2, 2), rng=Rng(0)))


def test_denoisers_are_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Denoiser(VPSDE())


class TwoArguments(nn.Module):
    def forward(self, x, t):
        return t[:, None] * x


def test_networks_of_two_arguments_are_called_with_two() -> None:
    """Networks from elsewhere know nothing of conditions; one that is given to them all the same is refused."""
    x, t = torch.ones(3, 2), torch.tensor([0.1, 0.2, 0.3])
    expected = Preconditioned(lambda x, t, cond: t[:, None] * x, VPSDE(), Eps())(x, t)
    for network in (TwoArguments(), lambda x, t: t[:, None] * x):
        denoiser = Preconditioned(network, VPSDE(), Eps())
        assert torch.equal(denoiser(x, t).eps, expected.eps)
        with pytest.raises(ValueError, match=r"takes \(x, c_noise\) only"):
            denoiser(x, t, torch.ones(3))
