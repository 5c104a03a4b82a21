"""Whole pipelines of diffusers become runs: the same latents and pictures, of the same sentences and noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import scoresde as S
from scoresde.interop import read
from scoresde.interop.folder import write
from scoresde.interop.schedules import process, spaced

pytest.importorskip("diffusers", reason="diffusers is an optional package")
pytest.importorskip("transformers", reason="pipelines that read text need transformers, which is optional")
import pipelines

SAID, NEGATIVE, CALLS = ["a 3 above a 7", "a 9."], "a small 2", 5
KINDS = {
    "epsilon": pipelines.stable_diffusion,
    "v": lambda: pipelines.stable_diffusion("v_prediction", use_linear_projection=True, attention_head_dim=(2, 4)),
    "xl": pipelines.xl,
    "xl, no zeros": lambda: pipelines.xl(force_zeros_for_empty_prompt=False),
    "flow": pipelines.three,
    "flow without T5": lambda: pipelines.three(t5=False),
}


def as_run(pipe, folder: Path) -> S.Run:
    write(read(pipelines.saved(pipe, folder / "theirs")), folder / "run")
    return S.load(folder / "run", device="cpu")


def ddim(pipe, run: S.Run, x: Tensor, **guidance) -> Tensor:
    """Our DDIM on the times that the pipeline takes."""
    own, sde = process(pipe.scheduler.config), run.denoiser.sde
    times = (spaced(pipe.scheduler.config, CALLS, own) + (not own.is_flow)) / own.steps
    if not own.is_flow:  # whose last x_t is that of the first entry; a flow's is the data
        times = torch.cat([times, torch.full((1,), sde.t_min, dtype=torch.float64)])
    times = times.clamp(sde.t_min, sde.t_max)
    sampler = S.Sampler(S.DDIM(), lambda sde, n: times, len(times) - 1, denoise=own.is_flow)
    with torch.no_grad():
        return sampler(run.guided(**guidance), x, cond=run.cond({"text": SAID}, len(x)))


@pytest.mark.parametrize("kind", KINDS)
def test_latents_and_pictures_are_theirs(kind: str, tmp_path: Path) -> None:
    """To 1e-4 of the largest number, and 8-bit pictures to the last bit but for those on the edge of a bin."""
    pipe = KINDS[kind]()
    run, x = as_run(pipe, tmp_path), S.Rng(3).normal((2, 4, 4, 4))
    told = {"prompt": SAID, "num_inference_steps": CALLS, "height": 8, "width": 8, "output_type": "latent"}
    for scale, negative in ((1.0, None), (4.0, None), (4.0, NEGATIVE)):
        away = None if negative is None else [negative] * 2
        latents = pipe(**told, negative_prompt=away, guidance_scale=scale, latents=x.clone()).images
        found = ddim(pipe, run, x, guidance=scale, negative=negative)
        assert float((found - latents).abs().max()) <= 1e-4 * float(latents.abs().max())
    own = pipe.vae.config
    with torch.no_grad():
        right = pipe.vae.decode(latents / own.scaling_factor + (own.shift_factor or 0)).sample
    assert float((run.codec.unfold(found) - right).abs().max()) <= 1e-4 * float(right.abs().max())
    pictures = np.stack(pipe.image_processor.postprocess(right, output_type="pil"))
    differ = run.decode(found).int() - torch.from_numpy(pictures).permute(0, 3, 1, 2).int()
    assert int(differ.abs().max()) <= 1 and float((differ != 0).float().mean()) < 0.01
