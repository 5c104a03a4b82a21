"""Stable Diffusion's pipelines of random weights by our steps: text, img2img and inpainting."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import scoresde as S

pytest.importorskip("diffusers", reason="diffusers is an optional package")
pytest.importorskip("transformers", reason="pipelines that read text need transformers, which is optional")
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from scoresde.interop.diffusers import Scheduler
from scoresde.interop.driven import Drawn

SCALE, SEEDS, CALLS = 3.0, (5, 6), 6


def made(kind, step: S.Step, prediction: str):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, layers_per_block=1).eval()
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False,
        prediction_type=prediction,
    )  # fmt: skip
    parts = {"text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    pipe = kind(vae=vae, unet=unet, scheduler=scheduler, requires_safety_checker=False, **parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = Scheduler.from_config(pipe.scheduler.config, step=step)
    return pipe


def told() -> dict[str, Tensor]:
    embeds = torch.randn(2, 2, 3, 8, generator=torch.Generator().manual_seed(3))
    return {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def denoiser(pipe) -> S.Preconditioned:
    """Their network under their guidance, as ours."""
    own, text = pipe.scheduler.told.process, told()

    def guided(x: Tensor, c: Tensor) -> Tensor:
        none, some = (pipe.unet(x, c, text[name]).sample for name in ("negative_prompt_embeds", "prompt_embeds"))
        return none + SCALE * (some - none)

    return S.Preconditioned(
        guided, own.sde, own.parameterization, noise_input=lambda sde, t: own.index(t), scale_input=False
    )


def recorded(pipe, **options) -> tuple[list[Tensor], list[Tensor]]:
    """(what the scheduler was given, what it returned), call by call."""
    given, returned, step = [], [], pipe.scheduler.step

    @functools.wraps(step)  # pipelines ask its signature for `generator`
    def recording(output, t, sample, **kwargs):
        given.append(sample)
        found = step(output, t, sample, **kwargs)
        returned.append(found[0])
        return found

    pipe.scheduler.step = recording
    pipe(
        **told(),
        guidance_scale=SCALE,
        num_inference_steps=CALLS,
        generator=generators(),
        output_type="latent",
        **options,
    )
    return given, returned


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("step", [S.UniPC(2), S.DPMSolverPP(2, eta=1.0), S.UniPC(3)], ids=repr)
def test_text(step, prediction: str) -> None:
    pipe = made(StableDiffusionPipeline, step, prediction)
    given, returned = recorded(pipe, height=8, width=8)
    run, used = pipe.scheduler.run, generators()
    for one in used:
        torch.randn(1, 4, 8, 8, generator=one)
    sampler = S.Sampler(step, lambda sde, n: run.times, len(run.times) - 1, denoise=False)
    with torch.no_grad():
        expected = sampler(denoiser(pipe), given[0], rng=Drawn(used))
    torch.testing.assert_close(returned[-1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("step", [S.UniPC(2), S.DPMSolverPP(2)], ids=repr)
def test_img2img(step) -> None:
    """Noised to a middle time, and from there our sampler on the rest of the grid."""
    pipe = made(StableDiffusionImg2ImgPipeline, step, "v_prediction")
    image = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    given, returned = recorded(pipe, image=image, strength=0.5)
    assert len(given) == CALLS // 2
    times = pipe.scheduler.run.times[CALLS // 2 :]
    with torch.no_grad():
        expected = S.Sampler(step, lambda sde, n: times, len(times) - 1, denoise=False)(denoiser(pipe), given[0])
    torch.testing.assert_close(returned[-1], expected, rtol=1e-5, atol=1e-5)


def test_inpainting() -> None:
    """What is known is put back after every step, and each step is DDIM's from what was put there."""
    pipe = made(StableDiffusionInpaintPipeline, S.DDIM(), "v_prediction")
    image = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., 4:] = 1
    given, returned = recorded(pipe, image=image, mask_image=mask, height=8, width=8)
    model, times = denoiser(pipe), pipe.scheduler.run.times
    assert len(given) == CALLS
    for k, (x, following) in enumerate(zip(given, returned, strict=True)):
        with torch.no_grad():
            p = model(x, times[k])
        alpha, sigma = model.sde.marginal(times[k + 1])
        torch.testing.assert_close(following, (alpha * p.x0 + sigma * p.eps).float(), rtol=1e-5, atol=1e-5)
        if k:
            changed = given[k] - returned[k - 1]
            assert float(changed[..., 4:].abs().max()) == 0 and float(changed[..., :4].abs().max()) > 0.01
