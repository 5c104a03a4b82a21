"""A step that is told the network's outputs from outside moves as in `Sampler`; no diffusers here."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import scoresde as S
from scoresde.interop.driven import Drawn, Driven, Told, noised
from scoresde.interop.schedules import PREDICTIONS, process, spaced
from scoresde.sampling.fitted import FittedStep

STEPS = [
    S.DDIM(),
    S.DDIM(1.0),
    S.Ancestral(),
    S.DPMSolverPP(2, 1.0),
    S.UniPC(2),
    S.UniPC(3),
    S.Multistep(3, sigma_data=None, corrector=3, bound=2.5),
    S.Multistep(4, sigma_data=None, corrector=5),
    S.Heun(),
    S.PredictorCorrector(S.DDIM(), S.Langevin()),
]


def network(x: Tensor, c: Tensor) -> Tensor:
    """Smooth, and not linear in either argument."""
    return torch.tanh(0.7 * x.roll(1, -1) - 0.4 * x + 0.3) + 0.5 * torch.sin(c / 60)[:, None]


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (3, 4, 5)]


def drive(run: Driven, x: Tensor, rng: Drawn, change=lambda k, x: x) -> Tensor:
    for k, t in enumerate(run.asked):
        c = run.told.process.index(t).float().expand(len(x))
        x = change(k, run(network(x, c), x, rng))
    return x


@pytest.mark.parametrize("denoise", [False, True])
@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("step", STEPS, ids=repr)
def test_it_is_the_sampler(step, kind: str, denoise: bool) -> None:
    """Bit for bit, noise of per-sample seeds included: both do the same operations in the same order."""
    own = process({"prediction_type": kind})
    x, times = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), S.KarrasGrid()(own.sde, 6)
    denoiser = S.Preconditioned(
        network, own.sde, own.parameterization, noise_input=lambda sde, t: own.index(t), scale_input=False
    )
    seeds = [int(torch.randint(2**62, (), generator=one)) for one in generators()]
    expected = S.Sampler(step, lambda sde, n: times, 6, denoise=denoise)(denoiser, x, rng=S.Rng(seeds=seeds))
    run = Driven(Told(own, 1.0), step, times, denoise=denoise)
    assert len(run.asked) == step.count(6) + denoise
    torch.testing.assert_close(drive(run, x, Drawn(generators())), expected, rtol=0, atol=0)


def test_a_run_is_over_once() -> None:
    run = Driven(Told(process({}), 1.0), S.DDIM(), S.UniformGrid()(process({}).sde, 2), denoise=False)
    x = torch.ones(3, 5)
    drive(run, x, Drawn(None))
    with pytest.raises(RuntimeError, match="All 2 calls were made"):
        run(x, x, Drawn(None))
    run.start(0)
    run(x, x, Drawn(None))


def test_a_step_without_noise_draws_none() -> None:
    before = torch.get_rng_state()
    own = process({})
    drive(Driven(Told(own, 1.0), S.UniPC(2), S.KarrasGrid()(own.sde, 4), denoise=True), torch.ones(3, 5), Drawn(None))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("step", [S.UniPC(2), S.Multistep(3, corrector=3), S.DPMSolverPP(3)], ids=repr)
def test_what_a_loop_adds_between_steps_is_kept(step) -> None:
    """A multistep method goes on from what an inpainting loop made of x, though it repeats its last step.

    Where x̂_0 = 0 all values of data prediction are 0 and x_s = (σ_s/σ_t) x_t: what is added at t ends as σ_0/σ_t of it.
    """
    own = process({"prediction_type": "sample"})
    times = S.KarrasGrid()(own.sde, 6)
    x, added = torch.ones(3, 5), torch.full((3, 5), 0.3)

    def end(k: int) -> Tensor:
        state, run = x, Driven(Told(own, 1.0), step, times, denoise=False)
        for index in range(6):
            state = run(torch.zeros_like(state), state, Drawn(None)) + (added if index + 1 == k else 0)
        return state

    sigma = own.sde.marginal(times)[1]
    for k in (1, 2, 4):
        torch.testing.assert_close(end(k) - end(0), (added * sigma[-1] / sigma[k]).float(), rtol=1e-4, atol=0)


def test_a_step_that_moves_x_first_is_refused() -> None:
    """The pipeline has called its network at x before it asks for the step."""
    own = process({})
    with pytest.raises(ValueError, match="changes x before it asks the network"):
        Driven(Told(own, 1.0), S.Churn(5.0), S.KarrasGrid()(own.sde, 3), denoise=False)


def test_a_run_begins_in_the_middle() -> None:
    """As img2img does: the same as a run on the end of the grid."""
    own, x = process({"prediction_type": "v_prediction"}), torch.ones(3, 5)
    times = S.KarrasGrid()(own.sde, 6)
    for step in (S.UniPC(2), S.DPMSolverPP(3)):
        whole = Driven(Told(own, 1.0), step, times, denoise=False)
        whole.start(2)
        found = x
        for t in whole.asked[2:]:
            found = whole(network(found, own.index(t).float().expand(3)), found, Drawn(None))
        expected = drive(Driven(Told(own, 1.0), step, times[2:], denoise=False), x, Drawn(None))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="does not ask the network once a step"):
        Driven(Told(own, 1.0), S.Heun(), times, denoise=False).start(2)


def test_fitted_weights_wait_for_the_values_they_were_fitted_to() -> None:
    """Begun in the middle there are fewer, and the integrals stand in, not a part of a row that belongs together."""
    own = process({})
    times = S.KarrasGrid()(own.sde, 4)
    log_snr = own.sde.log_snr(times)
    rows = [[0.5], [0.4, 0.1], [0.4, 0.1, 0.1], [0.3, 0.2, 0.1]]
    fitted, integrals = FittedStep(log_snr, rows, 1.0), S.Multistep(3, sigma_data=1.0)
    ends = []
    for step in (fitted, integrals):
        run = Driven(Told(own, 1.0), step, times, denoise=False)
        run.start(3)
        ends.append(run(torch.full((3, 5), 0.2), torch.ones(3, 5), Drawn(None)))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "flow_prediction"])
def test_noise_is_added_by_the_marginal(kind: str) -> None:
    own = process({"prediction_type": kind})
    x0, noise = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1)).unbind()
    index = torch.tensor([3.0, 500.5, 998.0])
    alpha, sigma = own.sde.marginal(own.time(index))
    expected = (alpha[:, None] * x0 + sigma[:, None] * noise).float()
    torch.testing.assert_close(noised(own, x0, noise, index), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(noised(own, x0, noise, index[1:2]), (alpha[1] * x0 + sigma[1] * noise).float())


@pytest.mark.parametrize(
    ("config", "n", "expected"),
    [
        ({"timestep_spacing": "leading"}, 4, [750, 500, 250, 0]),
        ({"timestep_spacing": "leading", "steps_offset": 1}, 4, [751, 501, 251, 1]),
        ({"timestep_spacing": "trailing"}, 4, [999, 749, 499, 249]),
        ({"timestep_spacing": "linspace"}, 4, [999, 666, 333, 0]),
        ({"prediction_type": "flow_prediction"}, 3, [1000, 500.5, 1]),
    ],
)
def test_their_own_time_steps(config, n: int, expected) -> None:
    assert spaced(config, n, process(config)).tolist() == pytest.approx(expected, rel=1e-12)


def test_what_cannot_be_read_is_refused() -> None:
    for config, words in [
        ({"_class_name": "EDMEulerScheduler"}, "another process than a table of betas or a flow"),
        ({"prediction_type": "noise"}, "prediction_type is one of epsilon, sample"),
        ({"beta_schedule": "quadratic"}, "beta_schedule is one of linear"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas holds num_train_timesteps = 1000 numbers"),
    ]:
        with pytest.raises(ValueError, match=words):
            process(config)
    with pytest.raises(ValueError, match=r"has 1000 time steps; got num_inference_steps=1001"):
        spaced({}, 1001, process({}))
    with pytest.raises(ValueError, match="timestep_spacing is linspace"):
        spaced({"timestep_spacing": "even"}, 4, process({}))


def test_zero_snr_ends_in_noise() -> None:
    own = process({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
    alpha, sigma = own.sde.marginal(torch.tensor([1.0, 0.999, 0.001], dtype=torch.float64))
    assert float(alpha[0]) == pytest.approx(float(alpha[1]) / 2, rel=1e-6)
    assert float(sigma[0]) == pytest.approx(1.0, abs=1e-6)
    assert float(alpha[2]) == pytest.approx((1 - 1e-4) ** 0.5, rel=1e-6)  # the first entry stays


def test_times_and_indices_are_inverse() -> None:
    for kind in ("epsilon", "flow_prediction"):
        own = process({"prediction_type": kind})
        index = torch.tensor([1.0, 17.25, 999.0 if kind == "epsilon" else 998.5], dtype=torch.float64)
        torch.testing.assert_close(own.index(own.time(index)), index, rtol=1e-12, atol=0)
        assert all(a > b for a, b in itertools.pairwise(own.time(index).flip(0).tolist()))
