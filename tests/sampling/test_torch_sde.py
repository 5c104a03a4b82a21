"""The reverse SDE by torchsde: its orders without Monte Carlo, its law, its seeds, drifts of one's own, and failing."""

from __future__ import annotations

import math
import sys
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
import torchsde
from oracles import EVENT_SHAPES, closed_form_sdes, data_moments, grid, marginal_moments, mean_and_stderr, mixture
from torch import Tensor

from scoresde import (
    VESDE,
    VPSDE,
    EulerMaruyama,
    GaussianMixtureDenoiser,
    LogSNRGrid,
    RectifiedFlow,
    Rng,
    Sampler,
    ScoreFunction,
    SolverError,
)
from scoresde.diffusion.denoiser import CountingDenoiser
from scoresde.sampling.torch_sde import METHODS, TorchSDE

SMOOTH = closed_form_sdes()
each_method = pytest.mark.parametrize("method", METHODS)


class Units:
    """In place of torchsde's interval, rows of a batch of four: W = √Δ and H = √(Δ/12) are 1 in the third and fourth,
    where U = ∫ W = Δ (W/2 + H)."""

    def __init__(self, start, end, size, dtype, device, entropy, levy_area_approximation):
        self.shape, self.levy_area_approximation = size, levy_area_approximation

    def __call__(self, start, end, return_U=False):
        width = float(end) - float(start)
        w = torch.tensor([[0.0], [0.0], [1.0], [0.0]], dtype=torch.float64) * math.sqrt(width)
        h = torch.tensor([[0.0], [0.0], [0.0], [1.0]], dtype=torch.float64) * math.sqrt(width / 12)
        return (w, width * (w / 2 + h)) if return_U else w


def recursion(step: TorchSDE, denoiser, times: Tensor) -> Tensor:
    """(a, b, c_W, c_H) of every step x_s = a x + b + c_W w + c_H h (4, n), w and h unit normals, on a Gaussian."""
    rows = []
    for t, s in pairwise(times):
        x = torch.tensor([[0.0], [1.0], [0.0], [0.0]], dtype=torch.float64)
        y = step(denoiser, x, t, s, None, cond=None, rng=Rng(0))[0][:, 0]
        rows.append(torch.stack([y[1] - y[0], y[0], y[2] - y[0], y[3] - y[0]]))
    return torch.stack(rows, 1)


def halves(first: Tensor, second: Tensor) -> Tensor:
    """Unit (w, h) of intervals in those (w₁, h₁, w₂, h₂) of their halves, (2, 4, n): W = W₁ + W₂ and
    U = U₁ + U₂ + δ₂ W₁, with U = Δ (W/2 + H)."""
    zero, whole = torch.zeros_like(first), first + second
    w = torch.stack([first.sqrt(), zero, second.sqrt(), zero])
    u = torch.stack(
        [
            first * first.sqrt() / 2 + second * first.sqrt(),
            first * (first / 12).sqrt(),
            second * second.sqrt() / 2,
            second * (second / 12).sqrt(),
        ]
    )
    return torch.stack([w / whole.sqrt(), (u / whole - w / 2) / (whole / 12).sqrt()])


@pytest.mark.parametrize(
    ("method", "name"),
    [(method, name) for i, method in enumerate(METHODS) for j, name in enumerate(SMOOTH) if (i + j) % 2 == 0],
)
def test_methods_have_their_strong_order(method, name, monkeypatch) -> None:
    """Path by path on a Gaussian: n steps against 2n on the same Brownian motion and the same ∫ W, without sampling.

    The end is affine in x_T and all unit normals, so the mean square distance is the sum of squared coefficients. SRK
    does better here, 2, than where the score is not linear.
    """
    monkeypatch.setattr(torchsde, "BrownianInterval", Units)
    sde, step = SMOOTH[name], TorchSDE(method)
    denoiser = GaussianMixtureDenoiser(torch.tensor([[1.5]]), 0.25, torch.ones(1), sde)
    m, v = (float(value) for value in marginal_moments(denoiser, float(grid(sde, 1)[0])))

    def end(n: int) -> tuple[Tensor, Tensor, Tensor]:
        a, b, w, h = recursion(step, denoiser, grid(sde, n))
        after = torch.cat([a.flip(0).cumprod(0).flip(0), torch.ones(1, dtype=torch.float64)])
        return after[0] * m + (after[1:] * b).sum(), after[0] * math.sqrt(v), after[1:] * torch.stack([w, h])

    errors, ends = [], [end(n) for n in (48, 96, 192)]
    for n, (mean, start, noise), (fine_mean, fine_start, fine) in zip((48, 96), ends[:-1], ends[1:], strict=True):
        width = -grid(sde, 2 * n).diff()
        split = torch.einsum("kn,kjn->nj", noise, halves(width[::2], width[1::2]))
        gap = split - fine.T.reshape(n, 4)
        errors.append(math.sqrt((mean - fine_mean) ** 2 + (start - fine_start) ** 2 + gap.square().sum()))
    order = 2.0 if method == "srk" else step.order
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


class Given:
    """In place of torchsde's interval, unit (w, h) of the next step, (2, B, 1), from `script`."""

    script: ClassVar[list[Tensor]] = []

    def __init__(self, start, end, size, dtype, device, entropy, levy_area_approximation):
        self.shape, self.levy_area_approximation = size, levy_area_approximation
        self.w, self.h = Given.script.pop(0)

    def __call__(self, start, end, return_U=False):
        width = float(end) - float(start)
        w, h = self.w * math.sqrt(width), self.h * math.sqrt(width / 12)
        return (w, width * (w / 2 + h)) if return_U else w


def test_srk_has_its_strong_order_where_the_score_is_not_linear(monkeypatch) -> None:
    """500 paths of a mixture of three Gaussians, n steps against 2n at n = 64 and 512. Between modes are few paths with
    most of the error, and the slope from one doubling to the next is anything from 1.4 to 1.8."""
    monkeypatch.setattr(torchsde, "BrownianInterval", Given)
    sde, step, paths = RectifiedFlow(), TorchSDE("srk"), 500
    denoiser = GaussianMixtureDenoiser(torch.tensor([[-1.5], [0.0], [1.5]]), 0.1, torch.ones(3), sde)
    rng = Rng(0)
    x0 = denoiser.sample(paths, rng=rng, dtype=torch.float64)
    x = sde.perturb(x0, grid(sde, 1)[0], rng.normal((paths, 1), dtype=torch.float64))
    units = {1024: rng.normal((1024, 2, paths, 1), dtype=torch.float64)}
    for n in (512, 256, 128, 64):  # join the intervals of the finer grid two by two
        width = -grid(sde, 2 * n).diff()
        parts = units[2 * n].reshape(n, 4, paths, 1)
        units[n] = torch.einsum("kjn,njpd->nkpd", halves(width[::2], width[1::2]), parts)
    ends = {}
    for n in (64, 128, 512, 1024):
        Given.script, y = list(units[n]), x
        for t, s in pairwise(grid(sde, n)):
            y, _ = step(denoiser, y, t, s, None, cond=None, rng=Rng(0))
        ends[n] = y
    coarse, fine = (float((ends[n] - ends[2 * n]).square().mean().sqrt()) for n in (64, 512))
    assert math.log2(coarse / fine) / 3 == pytest.approx(step.order, abs=0.25)


@pytest.mark.parametrize("event", EVENT_SHAPES, ids=str)
def test_euler_is_euler_maruyama_on_the_brownian_interval(event) -> None:
    """One step on the increment that the same entropy gives; float32 states come back as such."""
    sde = VPSDE()
    denoiser, x = mixture(sde, event, covariance="isotropic"), Rng(0).normal((3, *event), dtype=torch.float64)
    t, s = torch.tensor([0.6, 0.5], dtype=torch.float64)
    (seed,) = Rng(4).integers(2**62, (1,)).tolist()
    size = (3, math.prod(event))
    motion = torchsde.BrownianInterval(
        0.0, float(t - s), size, dtype=x.dtype, entropy=seed, levy_area_approximation="space-time"
    )
    z = motion(0.0, float(t - s)).reshape(x.shape) / math.sqrt(t - s)

    class Drawn(Rng):
        def normal(self, shape, *, dtype=None, device=None):
            return z

    want, _ = EulerMaruyama()(denoiser, x, t, s, None, cond=None, rng=Drawn(0))
    got, _ = TorchSDE("euler")(denoiser, x, t, s, None, cond=None, rng=Rng(4))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    single, _ = TorchSDE()(denoiser, x.float(), t, s, None, cond=None, rng=Rng(4))
    assert single.dtype == torch.float32 and single.shape == x.shape


@pytest.mark.parametrize(
    ("step", "steps"),
    [(TorchSDE("srk"), 60), (TorchSDE("srk", 20), 3), (TorchSDE("heun"), 60), (TorchSDE("srk", adaptive=True), 3)],
)
def test_samples_have_the_law_of_the_data(step, steps) -> None:
    """Mean and variances of 4000 samples within 5 standard errors and 3 %, which the steps cost (with `denoise`)."""
    sde = VPSDE()
    denoiser = mixture(sde, (2,), seed=1)
    samples = Sampler(step, LogSNRGrid(), steps=steps)(denoiser, (4000, 2), rng=Rng(0))
    mean, cov = data_moments(denoiser)
    for k in range(2):
        got, stderr = mean_and_stderr(samples[:, k])
        assert abs(got - float(mean[k])) < 5 * stderr + 0.03 * math.sqrt(float(cov[k, k]))
        got, stderr = mean_and_stderr((samples[:, k] - mean[k]).square())
        assert abs(got - float(cov[k, k])) < 5 * stderr + 0.03 * float(cov[k, k])


@each_method
@pytest.mark.parametrize("inner", [1, 3, 10])
def test_evaluations_are_counted(method, inner) -> None:
    denoiser = CountingDenoiser(mixture(VESDE(), (2,)))
    sampler = Sampler(TorchSDE(method, inner), steps=6)
    sampler(denoiser, (8, 2), rng=Rng(0))
    assert denoiser.evaluations == sampler.evaluations == 6 * inner * METHODS[method][1] + 1
    assert Sampler(TorchSDE(method, adaptive=True)).evaluations is None


@pytest.mark.parametrize("adaptive", [False, True])
def test_seeds_make_runs_again(adaptive) -> None:
    """Equal seeds, equal samples; other seeds, others; and torch's own generator is left where it was."""
    denoiser, sampler = mixture(VPSDE(), (2,)), Sampler(TorchSDE(adaptive=adaptive), LogSNRGrid(), steps=4)
    x, before = torch.ones(5, 2), torch.get_rng_state()
    first, again, other = (sampler(denoiser, x, rng=Rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and float((first - other).abs().min()) > 0
    assert torch.equal(before, torch.get_rng_state())


def test_samples_depend_on_their_own_seeds_only() -> None:
    denoiser, sampler = mixture(VPSDE(), (2,)), Sampler(TorchSDE(steps=3), LogSNRGrid(), steps=4)
    x = Rng(0).normal((3, 2), dtype=torch.float64)
    batch = sampler(denoiser, x, rng=Rng(seeds=[7, 8, 9]))
    torch.testing.assert_close(sampler(denoiser, x[1:2], rng=Rng(seeds=[8])), batch[1:2])
    torch.testing.assert_close(sampler(denoiser, x.flip(0), rng=Rng(seeds=[9, 8, 7])), batch.flip(0))


def test_a_linear_drift_of_ones_own_is_that_of_the_sde() -> None:
    sde = VPSDE()
    denoiser, x = mixture(sde, (3, 4)), Rng(0).normal((2, 3, 4), dtype=torch.float64)
    own = TorchSDE(steps=4, drift=lambda x, t: sde.drift(t) * x)
    t, s = torch.tensor([0.6, 0.3], dtype=torch.float64)
    got, want = (step(denoiser, x, t, s, None, cond=None, rng=Rng(1))[0] for step in (own, TorchSDE(steps=4)))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_a_nonlinear_drift_is_reversed() -> None:
    """Forward dx = ½ g² ∇log π dt + g dw keeps π ∝ exp(−(x² − 1)²), so its score is ∇ log π at all times and its
    reverse keeps π too. From N(0, 1/4), 6000 samples have its second and fourth moments after a unit of time, within
    5 standard errors and 2 %; the linear drift of the SDE in its place does not."""
    sde = VPSDE(9.0, 9.0)

    def force(x: Tensor) -> Tensor:
        return -4 * x * (x**2 - 1)

    nodes = torch.linspace(-4, 4, 4001, dtype=torch.float64)
    weight = torch.exp(-((nodes**2 - 1) ** 2))
    denoiser = ScoreFunction(lambda x, t: force(x), sde)
    start = 0.5 * Rng(0).normal((6000, 1), dtype=torch.float64)
    t, s = torch.tensor([0.99, 0.01], dtype=torch.float64)

    def moments(step: TorchSDE) -> list[bool]:
        x, _ = step(denoiser, start, t, s, None, cond=None, rng=Rng(1))
        close = []
        for power in (2, 4):
            exact = float((weight * nodes**power).sum() / weight.sum())
            got, stderr = mean_and_stderr(x[:, 0] ** power)
            close.append(abs(got - exact) < 5 * stderr + 0.02 * exact)
        return close

    assert moments(TorchSDE(steps=200, drift=lambda x, t: 0.5 * sde.diffusion(t) ** 2 * force(x))) == [True, True]
    assert moments(TorchSDE(steps=200)) == [False, False]


def test_no_move_costs_nothing() -> None:
    denoiser, x, t = CountingDenoiser(mixture(VPSDE(), (2,))), torch.ones(2, 2), torch.tensor(0.5)
    assert TorchSDE()(denoiser, x, t, t, None, cond=None, rng=Rng(0))[0] is x
    assert denoiser.evaluations == 0


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_score_that_is_not_finite_is_an_error(adaptive) -> None:
    """Below t = 0.5 in one sample, which is named where steps are fixed; step control couples the batch."""

    def score(x: Tensor, t: Tensor) -> Tensor:
        return torch.where((t < 0.5)[:, None] & (x[:, 1:] > 1e3), torch.nan, -x)

    x = torch.tensor([[0.0, 0.0], [0.0, 1e5], [1.0, 0.0]], dtype=torch.float64)
    denoiser = CountingDenoiser(ScoreFunction(score, VPSDE(1.0, 1.0)))
    with pytest.raises(SolverError) as caught:
        Sampler(TorchSDE(adaptive=adaptive), steps=10)(denoiser, x)
    assert caught.value.samples == ([] if adaptive else [1])
    assert caught.value.t == pytest.approx(0.4 if not adaptive else 0.5, abs=0.1 + 1e-6)


def test_step_control_that_cannot_go_on_is_an_error() -> None:
    """A jump of the score cannot be resolved, and evaluations can be limited."""
    sde = VPSDE(1.0, 1.0)
    jump = CountingDenoiser(ScoreFunction(lambda x, t: torch.where((t < 0.5)[:, None], 1e12, 0.0) + 0 * x, sde))
    with pytest.raises(SolverError, match="minimum allowed step size"):
        Sampler(TorchSDE("heun", adaptive=True))(jump, torch.zeros(2, 2, dtype=torch.float64))
    denoiser = CountingDenoiser(mixture(VPSDE(), (2,)))
    with pytest.raises(SolverError, match="max_evaluations=20") as caught:
        Sampler(TorchSDE(adaptive=True, max_evaluations=20))(denoiser, (3, 2))
    assert caught.value.evaluations == denoiser.evaluations == 20


def test_without_torchsde_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torchsde", None)
    with pytest.raises(ImportError, match="pip install torchsde"):
        Sampler(TorchSDE())(mixture(VPSDE(), (2,)), (2, 2))


def test_a_time_per_sample_is_refused() -> None:
    denoiser, x = CountingDenoiser(mixture(VPSDE(), (2,))), torch.zeros(3, 2)
    t, s = torch.tensor([0.5, 0.4])
    with pytest.raises(ValueError, match="scalar times"):
        TorchSDE()(denoiser, x, t.expand(3), s, None, cond=None, rng=Rng(0))
    assert denoiser.evaluations == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "milstone"}, "srk, euler"),
        ({"steps": 0}, "at least 1"),
        ({"max_evaluations": 0}, "at least 1"),
        ({"rtol": 0.0}, "is a tolerance, > 0 and finite"),
        ({"atol": math.nan}, "is a tolerance, > 0 and finite"),
    ],
)
def test_bad_arguments_are_refused_at_construction(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        TorchSDE(**arguments)
