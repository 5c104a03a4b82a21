"""The loop around a step: what it counts, where it starts, what it passes on, what it refuses."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from oracles import EVENT_SHAPES, all_sdes, mixture, times
from torch import nn

from scoresde import (
    DDIM,
    EDM,
    VPSDE,
    AdaptiveODE,
    Ancestral,
    AnnealedLangevin,
    Churn,
    Denoiser,
    EulerMaruyama,
    GaussianMixtureDenoiser,
    Heun,
    Langevin,
    LogisticGrid,
    LogSNRGrid,
    Preconditioned,
    PredictorCorrector,
    ReverseDiffusion,
    Rng,
    Sampler,
    ScoreFunction,
    SolverError,
    UniformGrid,
)

ALL = all_sdes()
each_sde = pytest.mark.parametrize("sde", ALL.values(), ids=ALL.keys())
each_event = pytest.mark.parametrize("event", EVENT_SHAPES, ids=str)

STEPS = {
    "euler-maruyama": EulerMaruyama(),
    "euler-maruyama-pf": EulerMaruyama(probability_flow=True),
    "reverse-diffusion": ReverseDiffusion(),
    "reverse-diffusion-pf": ReverseDiffusion(probability_flow=True),
    "ddim-0": DDIM(0.0),
    "ddim-half": DDIM(0.5),
    "ancestral": Ancestral(),
    "heun": Heun(),
    "ancestral+langevin": PredictorCorrector(Ancestral(), Langevin(), corrector_steps=2),
    "heun+annealed": PredictorCorrector(Heun(), AnnealedLangevin()),
    "euler+none": PredictorCorrector(EulerMaruyama(), Langevin(), corrector_steps=0),
}
CORRECTORS = {"langevin": Langevin(), "annealed-langevin": AnnealedLangevin()}
EVALUATIONS = dict(zip(STEPS, (1, 1, 1, 1, 1, 1, 1, 2, 3, 3, 1), strict=True))
each_step = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())


class Elementwise(nn.Module):
    """A network for every event shape, whose output at a pixel depends on that pixel alone; remembers its calls."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, 0.3, -0.2]))
        self.calls: list[tuple] = []

    def forward(self, x, c_noise, cond):
        self.calls.append((x.dtype, c_noise, cond))
        a, b, c = self.weight
        return a * torch.tanh(b * x + c * c_noise.reshape(-1, *[1] * (x.ndim - 1)))


def network(sde=None, dtype=torch.float32) -> Preconditioned:
    return Preconditioned(Elementwise(), sde or VPSDE(), EDM(), sigma_data=0.5).to(dtype)


def count_calls(denoiser: Denoiser) -> list[torch.Tensor]:
    """The times of every forward call from now on."""
    seen: list[torch.Tensor] = []
    denoiser.register_forward_hook(lambda module, args, output: seen.append(args[1]))
    return seen


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("denoise", [True, False])
def test_a_run_reports_what_it_does(name, denoise) -> None:
    """Index, time, state and true network calls of every point; the last point is what the call returns."""
    sampler, denoiser = Sampler(STEPS[name], LogSNRGrid(), 5, denoise), network()
    calls = count_calls(denoiser)
    points = []
    for point in sampler.iterate(denoiser, (3, 2), rng=Rng(1)):
        assert point.evaluations == len(calls)
        points.append(point)
    grid = LogSNRGrid()(denoiser.sde, 5).tolist()
    assert [p.t for p in points] == grid + grid[-1:] * denoise
    assert [p.index for p in points] == list(range(6 + denoise))
    assert [p.evaluations for p in points[:6]] == [k * EVALUATIONS[name] for k in range(6)]
    assert points[-1].evaluations == sampler.evaluations == 5 * EVALUATIONS[name] + denoise
    assert torch.equal(points[-1].x, sampler(denoiser, (3, 2), rng=Rng(1)))
    if denoise:
        final = denoiser(points[-2].x, torch.tensor(grid[-1], dtype=torch.float64)).x0
        assert torch.equal(points[-1].x, final.detach())


@pytest.mark.parametrize("backend", ["native", "torchdiffeq", "scipy"])
def test_adaptive_runs_count_their_evaluations(backend) -> None:
    sampler, denoiser = Sampler(AdaptiveODE(1e-3, 1e-3, backend), steps=2), network()
    calls = count_calls(denoiser)
    points = list(sampler.iterate(denoiser, (3, 2)))
    assert sampler.evaluations is None
    assert len(points) == 4 and 10 < points[1].evaluations < points[2].evaluations == len(calls) - 1
    assert points[3].evaluations == len(calls)


@pytest.mark.parametrize(
    ("step", "steps"),
    [
        (EulerMaruyama(), 1000),
        (Ancestral(), 1000),
        (DDIM(), 100),
        (PredictorCorrector(Heun(), Langevin()), 50),
    ],
)
def test_the_default_number_of_steps_is_the_steps_own(step, steps) -> None:
    assert Sampler(step).steps == steps
    assert len(list(Sampler(step).iterate(network(), (1, 2)))) == steps + 2  # the start and the denoising


@each_step
@each_event
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_samples_have_the_shape_and_the_dtype_of_the_network(step, event, dtype) -> None:
    """Float64 samples of the same seed come from other random numbers; run on those, float32 follows to round-off."""
    sampler, wide = Sampler(step, LogSNRGrid(), 4), network(dtype=torch.float64)
    denoiser = network(dtype=dtype)
    x = sampler(denoiser, (3, *event), rng=Rng(0))
    assert x.shape == (3, *event) and x.dtype == dtype and not x.requires_grad
    assert {call[0] for call in denoiser.network.calls} == {dtype}
    start = Rng(1).normal((3, *event), dtype=torch.float64)
    draws = Recorded(Rng(2))
    exact = sampler(wide, start, rng=draws)
    got = sampler(denoiser, start.to(dtype), rng=draws.again())
    torch.testing.assert_close(got.double(), exact, rtol=2e-4, atol=2e-4)


class Recorded(Rng):
    """Draws in float64 that can be drawn again, in any dtype."""

    def __init__(self, rng: Rng, past: list[torch.Tensor] | None = None):
        super().__init__(0)
        self.rng, self.past, self.future = rng, [], list(past or [])

    def normal(self, shape, *, dtype=None, device=None):
        self.past.append(self.future.pop(0) if self.future else self.rng.normal(shape, dtype=torch.float64))
        return self.past[-1].to(dtype)

    def again(self) -> Recorded:
        return Recorded(self.rng, self.past)


@each_sde
def test_networks_see_finite_times_inside_the_range(sde) -> None:
    for step in (*STEPS.values(), AdaptiveODE(1e-3, 1e-3), AdaptiveODE(1e-3, 1e-3, "torchdiffeq")):
        denoiser = network(sde)
        seen = count_calls(denoiser)
        Sampler(step, steps=2)(denoiser, (2, 2))
        t = torch.cat([value.flatten() for value in seen])
        assert t.dtype == torch.float64 and bool(((t >= sde.t_min) & (t <= sde.t_max)).all())
        assert all(bool(torch.isfinite(c_noise).all()) for _, c_noise, _ in denoiser.network.calls)


@each_sde
@each_event
@pytest.mark.parametrize("name", [*STEPS, *CORRECTORS])
def test_a_time_per_sample_is_the_time_of_that_sample(name, event, sde) -> None:
    """One call with t, s of shape (B,) equals B calls with scalars, on each sample's own noise."""
    step, denoiser = (STEPS | CORRECTORS)[name], network(sde)
    t = times(sde, 4)
    s = t if name in CORRECTORS else t - 0.3 * (t - sde.t_min)
    x = Rng(0).normal((4, *event))
    together, _ = step(denoiser, x, t, s, step.init(x), cond=None, rng=Rng(seeds=[5, 6, 7, 8]))
    for k in range(4):
        alone, _ = step(denoiser, x[k : k + 1], t[k], s[k], step.init(x), cond=None, rng=Rng(seeds=[5 + k]))
        torch.testing.assert_close(together[k : k + 1], alone, rtol=2e-6, atol=2e-6)


@each_step
@pytest.mark.parametrize("event", [(5,), (3, 4, 4)], ids=str)
def test_a_sample_depends_on_its_own_seed_only(step, event) -> None:
    """Bit by bit, in any batch and order, where the network treats samples alike; a matrix product may round apart."""
    sampler, denoiser, seeds = Sampler(step, LogSNRGrid(), 6), network(), [11, 5, 8, 2, 7]
    batch = sampler(denoiser, (5, *event), rng=Rng(seeds=seeds))
    for order in ([0], [3], [4, 2], [2, 0, 4, 3, 1], [1, 1, 1]):
        again = sampler(denoiser, (len(order), *event), rng=Rng(seeds=[seeds[k] for k in order]))
        assert torch.equal(again, batch[order])
    other = sampler(denoiser, (5, *event), rng=Rng(seeds=[11, 5, 9, 2, 7]))
    assert (other == batch).flatten(1).all(1).tolist() == [True, True, False, True, True]


@each_step
def test_seeds_and_the_mixture_oracle(step) -> None:
    """The mixture sums over components by a batched product: 6 steps in float64 agree to 1e-12."""
    denoiser, seeds = mixture(VPSDE(), (4,)), [11, 5, 8]
    sampler = Sampler(step, LogSNRGrid(), 6)
    start = Rng(0).normal((3, 4), dtype=torch.float64)
    batch = sampler(denoiser, start, rng=Rng(seeds=seeds))
    for k in range(3):
        alone = sampler(denoiser, start[k : k + 1], rng=Rng(seeds=seeds[k : k + 1]))
        torch.testing.assert_close(alone, batch[k : k + 1], rtol=1e-12, atol=1e-12)


@each_step
def test_starting_from_given_noise_is_the_same_run(step) -> None:
    """The prior draw is the first thing a run asks its rng for; the given tensor is left as it is."""
    sampler, denoiser, rng = Sampler(step, steps=4), network(), Rng(3)
    x = denoiser.prior_sample((3, 2), rng=rng)
    kept = x.clone()
    assert torch.equal(sampler(denoiser, x, rng=rng), sampler(denoiser, (3, 2), rng=Rng(3)))
    assert torch.equal(x, kept)
    assert torch.equal(sampler(denoiser, (3, 2)), sampler(denoiser, (3, 2), rng=Rng(0)))  # the default is a seed too


@each_sde
def test_the_start_is_the_denoisers_prior(sde) -> None:
    """Data moments set on a denoiser, and a denoiser's own `prior_sample`, decide where a run starts."""
    denoiser = network(sde)
    denoiser.data_mean, denoiser.data_var = torch.tensor([3.0, -1.0]), torch.tensor([0.2, 4.0])
    first = next(Sampler(DDIM()).iterate(denoiser, (3, 2), rng=Rng(1)))
    z = Rng(1).normal((3, 2))
    alpha, sigma = sde.marginal(torch.tensor(sde.t_max, dtype=torch.float64))
    expected = alpha * denoiser.data_mean + (alpha**2 * denoiser.data_var + sigma**2).sqrt() * z
    torch.testing.assert_close(first.x, expected.float(), rtol=1e-6, atol=1e-6)
    assert (first.index, first.t, first.evaluations) == (0, sde.t_max, 0)
    exact = mixture(sde, (2,))
    start = next(Sampler(DDIM()).iterate(exact, (3, 2), rng=Rng(1))).x
    assert torch.equal(start, exact.prior_sample((3, 2), rng=Rng(1)))


@each_sde
@pytest.mark.parametrize("name", ["euler-maruyama", "reverse-diffusion", "ancestral", "ancestral+langevin"])
def test_the_last_denoising_leaves_no_noise(sde, name) -> None:
    """Two points as data: what is left at t_end is noise of σ(t_end) around α(t_end) times them, then the points.

    At σ/α = 0.1 the other point, 40 standard deviations away, has weight e^{−800}. 64 × 8 normals know their RMS to
    1/√1024 = 3 %, four times that is the bound, and 100 steps of 0.15 in log-SNR bias it by less than 10 % more.
    """
    points = torch.stack([torch.full((8,), 2 / math.sqrt(8)), torch.full((8,), -2 / math.sqrt(8))])
    denoiser = GaussianMixtureDenoiser(points, 0.0, torch.ones(2), sde)
    end = float(sde.time(torch.tensor(-2 * math.log(0.1), dtype=torch.float64)))
    *_, noisy, clean = Sampler(STEPS[name], LogSNRGrid(t_end=end), 100).iterate(denoiser, (64, 8), rng=Rng(0))
    nearest = points[(clean.x @ points.T).argmax(1)]
    torch.testing.assert_close(clean.x, nearest, rtol=1e-6, atol=1e-6)
    alpha, sigma = (float(value) for value in sde.marginal(torch.tensor(end, dtype=torch.float64)))
    assert float((noisy.x - alpha * nearest).square().mean().sqrt()) == pytest.approx(sigma, rel=0.22)


@pytest.mark.parametrize("kind", ["tensor", "mapping"])
def test_the_condition_reaches_every_call(kind) -> None:
    """Unread and unchanged, from every step; adaptive solvers may leave out samples that have arrived."""
    labels = torch.tensor([4, 1, 7])
    cond = labels if kind == "tensor" else {"label": labels, "scale": torch.ones(3, 2)}
    for step in STEPS.values():
        denoiser = network()
        sampler = Sampler(step, steps=3)
        sampler(denoiser, (3, 2), cond=cond)
        assert len(denoiser.network.calls) == sampler.evaluations
        assert all(call[2] is cond for call in denoiser.network.calls)
    for backend in ("native", "torchdiffeq", "scipy"):
        denoiser = network()
        Sampler(AdaptiveODE(1e-3, 1e-3, backend))(denoiser, (3, 2), cond=cond)
        seen = [call[2] if kind == "tensor" else call[2]["label"] for call in denoiser.network.calls]
        assert torch.equal(seen[0], labels) and torch.equal(seen[-1], labels)
        assert all(set(value.tolist()) <= {4, 1, 7} for value in seen)


@each_step
def test_nothing_but_the_given_rng_is_consumed(step) -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    grad = torch.is_grad_enabled()
    for _ in Sampler(step, steps=2).iterate(network(), (2, 2), rng=Rng(0)):
        assert torch.is_grad_enabled() == grad  # the caller's mode between points
    assert torch.equal(torch.get_rng_state(), states[0])
    assert bool((np.random.get_state()[1] == states[1]).all()) and random.getstate() == states[2]


@pytest.mark.parametrize("denoise", [True, False])
@each_step
def test_a_sample_that_is_not_finite_is_named(step, denoise) -> None:
    """The network fails for one sample from the middle of time on: no state is returned, only its index."""

    def score(x, t):
        broken = (torch.arange(len(x)) == 2) & (t < 0.5)
        return torch.where(broken[:, None], torch.nan, -x)

    sampler = Sampler(step, steps=4, denoise=denoise)
    with pytest.raises(SolverError, match="not finite") as caught:
        sampler(ScoreFunction(score, VPSDE()), (4, 2))
    assert caught.value.samples == [2]
    assert caught.value.evaluations == 4 * step.evaluations
    assert caught.value.t == VPSDE().t_min


def test_a_denoising_that_is_not_finite_is_named() -> None:
    """A network that fails at t_end alone, where only the last denoising asks."""
    sde = VPSDE()
    end = torch.tensor(sde.t_min, dtype=torch.float64)

    def score(x, t):
        return torch.where(((t <= end) & (x[:, 0] == x[0, 0]))[:, None], torch.nan, -x)

    good = Sampler(DDIM(), steps=4, denoise=False)(ScoreFunction(score, sde), torch.ones(3, 2, dtype=torch.float64))
    assert bool(torch.isfinite(good).all())
    with pytest.raises(SolverError) as caught:
        Sampler(DDIM(), steps=4)(ScoreFunction(score, sde), torch.ones(3, 2, dtype=torch.float64))
    assert caught.value.samples == [0, 1, 2] and caught.value.evaluations == 5


@pytest.mark.parametrize("steps", [0, -3, 2.5, True, "10"])
def test_bad_step_counts_are_refused(steps) -> None:
    with pytest.raises(ValueError, match="whole number of at least 1"):
        Sampler(DDIM(), steps=steps)


@pytest.mark.parametrize(
    "start",
    [(), (3,), (0, 2), (3, -1), torch.zeros(3), torch.zeros(3, 2, dtype=torch.int64)],
    ids=["empty", "flat", "none", "negative", "flat-x", "integer-x"],
)
def test_bad_starts_are_refused(start) -> None:
    denoiser = network()
    calls = count_calls(denoiser)
    with pytest.raises(ValueError, match=r"\(B, \*event\)"):
        Sampler(DDIM(), steps=2)(denoiser, start)
    assert not calls


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (lambda sde, n: UniformGrid()(sde, n).flip(0), "fall strictly"),
        (lambda sde, n: 1.5 * UniformGrid()(sde, n), "outside"),
        (lambda sde, n: 0.5e-5 * torch.ones(1), "at least two"),
        (lambda sde, n: torch.arange(n, -1, -1), "floating-point"),
        (lambda sde, n: UniformGrid()(sde, n + 1), "n \\+ 1"),
        (lambda sde, n: UniformGrid()(sde, n - 1), "n \\+ 1"),
    ],
    ids=["rising", "outside", "one", "integers", "long", "short"],
)
def test_bad_grids_are_refused(grid, message) -> None:
    denoiser = network()
    calls = count_calls(denoiser)
    with pytest.raises(ValueError, match=message):
        Sampler(DDIM(), grid, steps=4)(denoiser, (2, 2))
    assert not calls


def test_without_a_grid_it_is_that_of_the_step_for_the_model() -> None:
    """ODE methods go by the measured spread of the data, samplers of many short steps by t; parts of a step decide."""
    denoiser = network()
    for spread in (0.5, 3.0):
        denoiser.data_std = spread
        around = LogisticGrid(spread, 0.0, 3.0)(denoiser.sde, 6)
        even = UniformGrid()(denoiser.sde, 6)
        for step, wanted in (
            (DDIM(), around),
            (Churn(), around),
            (PredictorCorrector(Heun(), Langevin()), around),
            (PredictorCorrector(ReverseDiffusion(), Langevin()), even),
            (EulerMaruyama(), even),
            (Ancestral(), even),
        ):
            assert torch.equal(Sampler(step, steps=6).times(denoiser), wanted), step
            assert torch.equal(Sampler(step, UniformGrid(), 6).times(denoiser), even), step
