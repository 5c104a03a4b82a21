"""Our steps in pipelines of diffusers, with random weights: the same samples as our `Sampler` on the same network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import scoresde as S
from scoresde.config import ConfigError
from scoresde.sampling.fitted import FittedStep

diffusers = pytest.importorskip("diffusers", reason="diffusers is an optional package")
from diffusers import (  # noqa: E402
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
)
from peer_files import song_tensors, write_edm  # noqa: E402

from scoresde.interop.diffusers import Scheduler  # noqa: E402

SEEDS = (5, 6)
KINDS = ["epsilon", "sample", "v_prediction"]


def unet(channels: int = 1) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()


@pytest.fixture(scope="module")
def net() -> UNet2DModel:
    return unet()


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def ours(scheduler: Scheduler, network, x: Tensor, rng: S.Rng | None = None) -> Tensor:
    """The sample of our `Sampler`: of the scheduler are taken its step, its times and the meaning of the output."""
    own, run = scheduler.told.process, scheduler.run
    denoiser = S.Preconditioned(
        network, own.sde, own.parameterization, noise_input=lambda sde, t: own.index(t), scale_input=False
    )
    sampler = S.Sampler(run.step, lambda sde, n: run.times, len(run.times) - 1, denoise=run.denoise)
    return sampler(denoiser, x, rng=rng)


def drawn(*event: int) -> tuple[Tensor, S.Rng]:
    """The noise that a pipeline begins with, and the `Rng` of what its scheduler draws, of the same generators."""
    found = generators()
    x = torch.cat([torch.randn(1, *event, generator=one) for one in found])
    return x, S.Rng(seeds=[int(torch.randint(2**62, (), generator=one)) for one in found])


def run(pipe, **kwargs) -> Tensor:
    """What the scheduler returned last: latents, before the pipeline makes pictures of them."""
    pipe.set_progress_bar_config(disable=True)
    pipe(generator=generators(), num_inference_steps=6, output_type="np", **kwargs)
    return pipe.scheduler.run.returned


@pytest.mark.parametrize("grid", [None, "timesteps", S.KarrasGrid(5.0)], ids=repr)
@pytest.mark.parametrize("step", [None, S.UniPC(3), S.DPMSolverPP(2, eta=1.0), S.Ancestral(), S.Heun()], ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_an_unconditional_pipeline(net, kind: str, step, grid) -> None:
    """Equal to the last bit, as both do the same arithmetic on the same network outputs."""
    scheduler = Scheduler.from_config(DDPMScheduler(prediction_type=kind).config, step=step, grid=grid)
    found = run(DDPMPipeline(net, scheduler), batch_size=2)
    x, rng = drawn(1, 8, 8)
    torch.testing.assert_close(found, ours(scheduler, net, x, rng), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("grid", [None, "timesteps"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow(net, shift: float, grid) -> None:
    config = FlowMatchEulerDiscreteScheduler(shift=shift).config
    scheduler = Scheduler.from_config(config, step=S.DPMSolverPP(2), grid=grid)
    assert scheduler.config.prediction_type == "flow_prediction" and scheduler.config.flow_shift == shift
    found = run(DDPMPipeline(net, scheduler), batch_size=2)
    torch.testing.assert_close(found, ours(scheduler, net, drawn(1, 8, 8)[0]), rtol=1e-6, atol=1e-6)


def test_a_flow_has_its_own_sigmas() -> None:
    """Those of FlowMatchEulerDiscreteScheduler, which begin at 1: there our time ends just short of it."""
    for shift, mu in ((1.0, None), (3.0, None), (1.0, 0.8)):
        theirs = FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=mu is not None)
        scheduler = Scheduler.from_config(theirs.config, grid="timesteps")
        theirs.set_timesteps(5, mu=mu)
        scheduler.set_timesteps(5, mu=mu)
        torch.testing.assert_close(scheduler.timesteps[1:], theirs.timesteps[1:], rtol=1e-5, atol=0)
        assert float(scheduler.timesteps[0]) == pytest.approx(999)
        handed = [1.0, 0.7, 0.2]
        theirs.set_timesteps(sigmas=handed, mu=mu)
        scheduler.set_timesteps(sigmas=handed, mu=mu)
        torch.testing.assert_close(scheduler.timesteps[1:], theirs.timesteps[1:], rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("table", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_ddim_on_their_time_steps_is_their_ddim(net, table: str, spacing: str, kind: str) -> None:
    """The last step of DDIM with `set_alpha_to_one` is a denoising. One step differs by rounding alone.

    Theirs has x̂_0 = (x − σ ε)/√ᾱ in float32, where x and σ ε cancel: an error of 2⁻²⁴ grows by 1/√ᾱ, 2e4 at the end of
    the cosine table, as the numbers on the way do; so the difference is compared with the largest of them.
    """
    theirs = DDIMScheduler(
        beta_schedule=table, timestep_spacing=spacing, prediction_type=kind, clip_sample=False, set_alpha_to_one=True
    )
    scheduler = Scheduler.from_config(theirs.config, step=S.DDIM(), grid="timesteps")
    theirs.set_timesteps(5)
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.round().tolist() == theirs.timesteps.tolist()
    x = {"theirs": drawn(1, 8, 8)[0], "ours": drawn(1, 8, 8)[0]}
    largest = 1.0
    with torch.no_grad():
        for t in theirs.timesteps:
            x["theirs"] = theirs.step(net(x["theirs"], t).sample, t, x["theirs"]).prev_sample
            x["ours"] = scheduler.step(net(x["ours"], t).sample, t, x["ours"], return_dict=False)[0]
            largest = max(largest, float(x["theirs"].abs().max()))
    assert float((x["ours"] - x["theirs"]).abs().max()) < 2e-5 * largest


def test_a_transformer_told_classes() -> None:
    """DiTPipeline: guidance, a learned variance beside ε, latents and their decoder."""
    torch.manual_seed(0)
    net = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=4,
        num_embeds_ada_norm=1000,
        norm_num_groups=4,
    ).eval()
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, layers_per_block=1)
    config = DDIMScheduler(beta_schedule="linear").config
    pipe = DiTPipeline(net, vae, Scheduler.from_config(config, step=S.UniPC(2)))
    found = run(pipe, class_labels=[1, 7], guidance_scale=3.0)

    def guided(x: Tensor, c: Tensor) -> Tensor:
        told, untold = (
            net(x, timestep=c, class_labels=label).sample[:, :4]
            for label in (torch.tensor([1, 7]), torch.full((2,), 1000))  # a number that is written in their pipeline
        )
        return untold + 3.0 * (told - untold)

    expected = ours(pipe.scheduler, guided, drawn(4, 4, 4)[0])
    torch.testing.assert_close(found[:2], expected, rtol=1e-5, atol=1e-5)


def test_samples_depend_on_their_own_generator(net) -> None:
    scheduler = Scheduler(S.DPMSolverPP(2, eta=1.0), beta_schedule="scaled_linear")
    pipe = DDPMPipeline(net, scheduler)
    both = run(pipe, batch_size=2)
    pipe(generator=generators()[1:], num_inference_steps=6, output_type="np")
    torch.testing.assert_close(pipe.scheduler.run.returned, both[1:], rtol=1e-5, atol=1e-5)  # other sizes of products
    assert not torch.equal(both[0], both[1])


def test_img2img_begins_in_the_middle(net) -> None:
    """What such pipelines do: cut the time steps, say so, add noise to what is given, and go on."""
    scheduler = Scheduler.from_config(DDPMScheduler(prediction_type="v_prediction").config, step=S.UniPC(2))
    scheduler.set_timesteps(8)
    x0, noise = drawn(1, 8, 8)[0], drawn(1, 8, 8)[0].flip(-1)
    for told in (True, False):  # older pipelines do not say where they begin
        scheduler.set_timesteps(8)
        if told:
            scheduler.set_begin_index(3)
        x = scheduler.add_noise(x0, noise, scheduler.timesteps[3:4])
        alpha, sigma = scheduler.told.sde.marginal(scheduler.run.times[3])
        start = (alpha * x0 + sigma * noise).float()
        torch.testing.assert_close(x, start, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            for t in scheduler.timesteps[3:]:
                x = scheduler.step(net(x, t).sample, t, x).prev_sample
        times = scheduler.run.times[3:]
        sub = Scheduler.from_config(scheduler.config)
        sub.set_timesteps(5)
        sub.run.step, sub.run.times, sub.run.denoise = scheduler.run.step, times, False
        torch.testing.assert_close(x, ours(sub, net, start), rtol=1e-5, atol=1e-5)


def test_a_configuration_comes_back(net, tmp_path: Path) -> None:
    """Through JSON, through another scheduler and through a pipeline's folder; fitted weights included."""
    grid = S.KarrasGrid()(S.DDPM(), 3)
    fitted = FittedStep(S.DDPM().log_snr(grid).tolist(), [[0.5], [0.4, 0.1], [0.3, 0.2, 0.1]], 0.5)
    for step, where in [(fitted, fitted.grid), (S.DEIS(2), S.LogisticGrid(0.5)), (None, None), (S.DDIM(), "timesteps")]:
        one = Scheduler(step, where, data_std=0.5, prediction_type="v_prediction")
        one.save_pretrained(tmp_path)
        stored = json.loads((tmp_path / "scheduler_config.json").read_text())
        assert stored["_class_name"] == "Scheduler"
        for again in (
            Scheduler.from_pretrained(tmp_path),
            Scheduler.from_config(one.config),
            Scheduler.from_config(EulerDiscreteScheduler.from_config(one.config).config),
        ):
            for scheduler in (one, again):
                scheduler.set_timesteps(3)
            assert repr(again.run.step) == repr(one.run.step)
            assert torch.equal(again.timesteps, one.timesteps)
    DDPMPipeline(net, one).save_pretrained(tmp_path / "pipe")
    loaded = DDPMPipeline.from_pretrained(tmp_path / "pipe")
    loaded.scheduler.set_timesteps(3)
    assert repr(loaded.scheduler.run.step) == "DDIM(eta=0.0)"
    there_and_back = DDIMScheduler.from_config(Scheduler.from_config(DDIMScheduler(clip_sample=False).config).config)
    assert there_and_back.config.clip_sample is False and there_and_back.config.num_train_timesteps == 1000


def test_a_hostile_configuration_builds_nothing(tmp_path: Path) -> None:
    Scheduler().save_pretrained(tmp_path)
    path = tmp_path / "scheduler_config.json"
    stored = json.loads(path.read_text())
    mark = tmp_path / "run"
    stored["step"] = {"_target_": "os.system", "command": f"touch {mark}"}
    path.write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match=r"step._target_=os.system is not a name that a configuration may call"):
        Scheduler.from_pretrained(tmp_path)
    assert not mark.exists()


def test_other_schedulers_are_taken_over_or_refused() -> None:
    for theirs in (PNDMScheduler(), EulerDiscreteScheduler(prediction_type="v_prediction")):
        assert Scheduler.from_config(theirs.config).config.prediction_type == theirs.config.prediction_type
    with pytest.raises(ValueError, match="belongs to another process"):
        Scheduler.from_config(EDMEulerScheduler().config)
    with pytest.raises(ValueError, match="decides as it goes"):
        Scheduler(S.AdaptiveODE())
    with pytest.raises(ConfigError, match="one that scoresde publishes"):
        Scheduler(S.DDIM(), lambda sde, n: S.UniformGrid()(sde, n))
    scheduler = Scheduler(S.DDIM())
    with pytest.raises(ValueError, match="No run has begun"):
        scheduler.step(torch.zeros(1, 1), 999, torch.zeros(1, 1))
    with pytest.raises(ValueError, match="noise is chosen with the step"):
        scheduler.step(torch.zeros(1, 1), 999, torch.zeros(1, 1), eta=0.5)
    with pytest.raises(ValueError, match="needs num_inference_steps"):
        scheduler.set_timesteps()


def test_the_public_face_of_a_scheduler(net) -> None:
    """What the scheduler tests of diffusers ask of every scheduler."""
    scheduler, x = Scheduler(S.DPMSolverPP(2)), drawn(1, 8, 8)[0]
    scheduler.set_timesteps(4)
    assert scheduler.scale_model_input(x, scheduler.timesteps[0]) is x and scheduler.order == 1
    assert scheduler.init_noise_sigma == pytest.approx(1.0, abs=1e-4) and len(scheduler) == 1000
    half = scheduler.step(0.1 * x.half(), scheduler.timesteps[0], x.half()).prev_sample
    assert half.shape == x.shape and half.dtype == torch.float16
    scheduler.set_timesteps(4)
    whole = scheduler.step(0.1 * x, scheduler.timesteps[0], x, return_dict=False)[0]
    torch.testing.assert_close(half.float(), whole, rtol=2e-3, atol=2e-3)  # 2⁻¹¹ of float16, a few times
    assert scheduler.step_index == 1
    pipe = DDIMPipeline(net, DDIMScheduler())
    pipe.scheduler = Scheduler.from_config(pipe.scheduler.config)
    assert run(pipe, batch_size=2).shape == (2, 1, 8, 8)
    assert Scheduler().add_noise(x.half(), x.half(), torch.tensor([3, 500])).dtype == torch.float16


def test_one_call_is_a_denoising(net) -> None:
    scheduler = Scheduler(S.DDIM(), "timesteps", timestep_spacing="trailing")
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.round().tolist() == [999]
    x = drawn(1, 8, 8)[0]
    alpha, sigma = scheduler.told.sde.marginal(torch.tensor(1.0, dtype=torch.float64))
    with torch.no_grad():
        output = net(x, 999).sample
    found = scheduler.step(output, 999, x).prev_sample
    torch.testing.assert_close(found, ((x - sigma * output) / alpha).float(), rtol=1e-5, atol=1e-4)


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sessions of docs/interop.md, from EDM, score_sde, k-diffusion and diffusers."""
    monkeypatch.chdir(tmp_path)
    write_edm(tmp_path / "net.pkl", {name: 0.3 * value for name, value in song_tensors(0).items()}, sigma_data=0.5)
    page = (Path(__file__).parents[2] / "docs" / "interop.md").read_text("utf-8")
    found = {}
    for part in page.split("## You come from ")[1:]:
        names: dict = {}
        exec(part.partition("```python\n")[2].partition("```")[0], names)
        found[part.partition("\n")[0]] = names
    assert list(found) == ["EDM", "score_sde", "k-diffusion", "diffusers"]
    for name in ("EDM", "score_sde", "k-diffusion"):
        assert bool(found[name]["found"].log_prob.isfinite().all()), name
    # its score is that of N(0, I), which VP keeps
    exact = S.bits_per_dim(S.VPSDE().prior_log_prob(found["score_sde"]["x"]), (3, 8, 8))
    torch.testing.assert_close(found["score_sde"]["bits"], exact, rtol=0, atol=1e-3)
    assert found["diffusers"]["images"].shape == (2, 8, 8, 3)
    assert repr(found["diffusers"]["pipe"].scheduler.config["step"]["_target_"]) == "'scoresde.UniPC'"
