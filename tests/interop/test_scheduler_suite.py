"""What diffusers' own tests ask of every scheduler, asked of ours with each kind of step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import scoresde as S

diffusers = pytest.importorskip("diffusers", reason="diffusers is an optional package")
from scoresde.interop.diffusers import Scheduler  # noqa: E402

STEPS = [None, S.DDIM(), S.Ancestral(), S.DPMSolverPP(2), S.DPMSolverPP(2, eta=1.0), S.UniPC(2), S.Heun()]
KINDS = ["epsilon", "sample", "v_prediction", "flow_prediction"]
every = pytest.mark.parametrize("step", STEPS, ids=repr)


def sample(n: int = 2) -> Tensor:
    """A batch with one value at each place, as in theirs."""
    return torch.arange(n * 3 * 4 * 4, dtype=torch.float32).reshape(n, 3, 4, 4) / (n * 48)


def model(x: Tensor, t: Tensor) -> Tensor:
    return x * t / (t + 1)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def loop(scheduler: Scheduler, x: Tensor, n: int = 5, begin: int = 0, seeds: tuple[int, ...] = (1, 2)) -> Tensor:
    scheduler.set_timesteps(n)
    if begin:
        scheduler.set_begin_index(begin)
    drawn = generators(*seeds[: len(x)])
    for t in scheduler.timesteps[begin:]:
        x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x, generator=drawn).prev_sample
    return x


@every
def test_a_step_keeps_shape_and_type(step) -> None:
    for dtype in (torch.float32, torch.float16):
        scheduler, x = Scheduler(step), sample().to(dtype)
        scheduler.set_timesteps(4)
        first = scheduler.step(0.1 * x, scheduler.timesteps[0], x).prev_sample
        second = scheduler.step(0.1 * first, scheduler.timesteps[1], first, return_dict=False)[0]
        assert first.shape == second.shape == x.shape and first.dtype == second.dtype == dtype


@every
def test_it_is_saved_and_read_again(step, tmp_path: Path) -> None:
    """The same samples before and after, through a folder and through a configuration, defaults and changes kept."""
    one = Scheduler(step, beta_schedule="scaled_linear", prediction_type="v_prediction", num_train_timesteps=600)
    one.save_pretrained(tmp_path)
    for again in (Scheduler.from_pretrained(tmp_path), Scheduler.from_config(one.config)):
        assert dict(again.config) | {"_use_default_values": 0} == dict(one.config) | {"_use_default_values": 0}
        assert torch.equal(loop(again, sample()), loop(one, sample()))
    changed = Scheduler.from_config(one.config, num_train_timesteps=1000)
    assert len(changed) == 1000 and changed.config.beta_schedule == "scaled_linear"


@every
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_time_steps_fall_on_the_device_that_was_asked_for(step, spacing: str) -> None:
    for grid in (None, "timesteps"):
        scheduler = Scheduler(step, grid, timestep_spacing=spacing)
        for n in (2, 7, 20):
            scheduler.set_timesteps(n, device="cpu")
            steps = scheduler.timesteps
            assert steps.device.type == "cpu" and scheduler.num_inference_steps == n
            assert bool((steps.diff() <= 0).all()) and float(steps[-1]) >= 0 and float(steps[0]) <= 999.001
        scheduler.set_timesteps(4, device="meta")
        assert scheduler.timesteps.device.type == "meta"


@every
def test_noise_of_a_batch_is_of_its_own_generators(step) -> None:
    both, (first, second) = loop(Scheduler(step), sample(), seeds=(1, 2)), sample().split(1)
    torch.testing.assert_close(both[:1], loop(Scheduler(step), first, seeds=(1,)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(both[1:], loop(Scheduler(step), second, seeds=(2,)), rtol=1e-5, atol=1e-6)
    other = loop(Scheduler(step), sample(), seeds=(1, 3))
    draws = step is not None and (isinstance(step, S.Ancestral) or "eta=1" in repr(step))
    assert torch.equal(other[0], both[0]) and torch.equal(other[1], both[1]) != draws


@pytest.mark.parametrize("kind", KINDS)
@every
def test_a_whole_loop_is_our_sampler(step, kind: str) -> None:
    """Without noise that was added, for each meaning of the output; steps that draw are left to their own streams."""
    scheduler = Scheduler(step, prediction_type=kind)
    found = loop(scheduler, sample())
    run, own = scheduler.run, scheduler.told.process
    denoiser = S.Preconditioned(
        lambda x, c, cond: model(x, c.reshape(-1, 1, 1, 1)), own.sde, own.parameterization,
        noise_input=lambda sde, t: own.index(t), scale_input=False,
    )  # fmt: skip
    rng = S.Rng(seeds=[int(torch.randint(2**62, (), generator=one)) for one in generators(1, 2)])
    sampler = S.Sampler(run.step, lambda sde, n: run.times, len(run.times) - 1, denoise=run.denoise)
    expected = sampler(denoiser, sample(), rng=rng)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("step", [each for each in STEPS if not isinstance(each, S.Heun)], ids=repr)
def test_a_loop_from_added_noise_ends_in_what_it_was_added_to(step) -> None:
    """A network that knows the noise: whatever the step, x̂_0 is the sample all along, and so is the end."""
    x0, noise = sample(), torch.randn(2, 3, 4, 4, generator=generators(0)[0])
    scheduler = Scheduler(step, "timesteps")
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(4)
    x = scheduler.add_noise(x0, noise, scheduler.timesteps[4:5])
    for t in scheduler.timesteps[4:]:
        alpha, sigma = scheduler.told.sde.marginal(scheduler.told.process.time(t))
        x = scheduler.step(((x - alpha * x0) / sigma).float(), t, x, generator=generators(1, 2)).prev_sample
    # σ = 0.01 at the last step, whose division keeps 6e-8 / 0.01 of a number of float32, a few times
    torch.testing.assert_close(x, x0, rtol=0, atol=1e-4)


@pytest.mark.parametrize("table", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_added_noise_is_that_of_the_table(table: str) -> None:
    scheduler, theirs = Scheduler(beta_schedule=table), diffusers.DDPMScheduler(beta_schedule=table)
    x0, noise, steps = sample(), torch.randn(2, 3, 4, 4, generator=generators(0)[0]), torch.tensor([10, 800])
    expected = theirs.add_noise(x0, noise, steps)
    torch.testing.assert_close(scheduler.add_noise(x0, noise, steps), expected, rtol=1e-5, atol=1e-6)


def test_a_table_of_their_own_is_taken() -> None:
    betas = torch.linspace(1e-3, 0.3, 20).tolist()
    scheduler = Scheduler(S.DDIM(), "timesteps", trained_betas=betas, num_train_timesteps=20)
    assert loop(scheduler, sample()).isfinite().all() and len(scheduler) == 20
    theirs = diffusers.DDPMScheduler(trained_betas=betas, num_train_timesteps=20)
    torch.testing.assert_close(scheduler.alphas_cumprod, theirs.alphas_cumprod)
