"""Whole pipelines of diffusers become runs: the same latents and pictures, of the same sentences and noise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import scoresde as S
from scoresde.data.text import Saved, Text, joined, text_of
from scoresde.interop import ForeignFileError, read
from scoresde.interop.folder import write
from scoresde.interop.schedules import process, spaced
from scoresde.sampling.edit import From

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


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> S.Run:
    return as_run(pipelines.stable_diffusion(), tmp_path_factory.mktemp("pipeline"))


def test_it_is_a_run_like_any_other(run: S.Run, tmp_path: Path) -> None:
    """Its folder is all that it needs; weights of half the width make the same picture to their own precision."""
    sampler = S.Sampler(S.DDIM(), steps=2)
    raw = run.sample(3, cond={"text": SAID}, sampler=sampler, guidance=2.0, negative=NEGATIVE, batch_size=2)
    assert raw.dtype == torch.uint8 and raw.shape == (3, 3, 8, 8)
    x = run.draw(run.cond({"text": SAID}, 2), S.Rng(seeds=[0, 1]), sampler=sampler)
    assert torch.equal(S.load(run.export(tmp_path / "run.safetensors"), device="cpu").decode(x), run.decode(x))
    half = S.load(run.folder, device="cpu").to(dtype=torch.bfloat16)
    found = half.draw(half.cond({"text": SAID}, 2), S.Rng(seeds=[0, 1]), sampler=sampler)
    # eight bits of a number, three calls
    assert 0 < float((found - x).abs().max()) < 3 * 2**-7 * float(x.abs().max())


def test_edits_by_words(run: S.Run) -> None:
    """Encoded and decoded under one sentence a latent returns; under another it does not."""
    flow, x = S.AdaptiveODE(rtol=1e-6, atol=1e-6), 0.5 * S.Rng(0).normal((1, 4, 4, 4))
    before, after = (run.cond({"text": words}, 1) for words in SAID)
    near = From(S.UniformGrid(), 0.5)
    with torch.no_grad():
        latent = flow.encode(run.denoiser, x, cond=before, to=near.start(run.denoiser.sde))
        decode = S.Sampler(flow, near, 1, denoise=False)
        back, other = (decode(run.denoiser, latent, cond=cond) for cond in (before, after))
    torch.testing.assert_close(back, x, rtol=0, atol=2e-4)
    assert float((other - back).abs().max()) > 2e-3  # 2.3e-3: words do little in random weights


def test_an_inverse_problem_is_solved_through_the_decoder(run: S.Run) -> None:
    """The mean of a picture comes nearer to the one that is asked for."""
    cond, sampler = run.cond({"text": SAID}, 2), S.Sampler(S.DDIM(), steps=12)
    observation = S.Observation(torch.full((2, 3), 0.4), lambda z: run.codec.unfold(z).mean((2, 3)), std=0.05)
    errors = []
    for model in (run.denoiser, S.PiGDM(run.denoiser, observation)):
        x = sampler(model, (2, 4, 4, 4), cond=cond)
        errors.append(float((run.codec.unfold(x).mean((2, 3)) - 0.4).square().mean().sqrt()))
    assert errors[1] < errors[0], errors


def test_a_bound_wants_a_density(run: S.Run, tmp_path: Path) -> None:
    raw = torch.full((1, 3, 8, 8), 99, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"no density p\(x \| z\), so there is no bound .*args.scale=0.05"):
        run.log_likelihood(raw, solver=S.Budget(4), cond={"text": SAID[0]})
    source = Path(run.config["imported"]["path"])
    network = read(source, args={"scale": 0.3}).codec.network
    z = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).repeat(256, 1, 1, 1)
    every = run.codec.base.transform(torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8))
    low, high = network.ends
    with torch.no_grad():  # of one place: all integers share the mass of 1
        total = S.nn.autoencoder.log_mass(
            ((every - low) * (256 / (high - low))).floor(), network.decode(z)[:, None],
            torch.full((256, 1, 3, 8, 8), 0.3).log(), 256, network.ends,
        ).exp().sum(0)  # fmt: skip
        said = network.log_prob(every, z)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-4, atol=1e-4)
    assert said.shape == (256,) and bool(said.isfinite().all())


def test_sentences_that_cannot_be_read(run: S.Run) -> None:
    for words, message in (
        ("a ♥ here", "the word '♥' is unknown to this tokenizer of 78 tokens"),
        ("a very long sentence", "has 19 tokens, and 16 are read at most"),
    ):
        for given in ({"cond": {"text": words}}, {"guidance": 2.0, "negative": words}):
            with pytest.raises(ValueError, match=message):
                run.sample(1, **given)


def test_several_tokenizers_are_kept(tmp_path: Path) -> None:
    """Tokens of each behind those of the other, also of the record."""
    for pad in ("a", "<|endoftext|>"):
        pipelines.tokenizer(pad).save_pretrained(tmp_path / pad.strip("<|>"))
    one, two = (Text(Saved.read(str(tmp_path / name)), 6) for name in ("a", "endoftext"))
    both = joined([one, two])
    (row,) = text_of(json.loads(json.dumps(both.record()))).rows(["a 3"])
    assert row.tolist() == [*one.rows(["a 3"])[0, :4].tolist(), *(78 + two.rows(["a 3"])[0, :4]).tolist(), *[-1] * 4]
    assert "3" in both.sentence(row)
    with pytest.raises(ValueError, match="it has 7 tokens, and 6 are read at most"):
        both.rows(["abcde"])


def test_folders_that_cannot_be_read(run: S.Run, tmp_path: Path) -> None:
    source = Path(run.config["imported"]["path"])

    def refused(words: str, change) -> None:
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        change(folder)
        with pytest.raises(ForeignFileError, match=words):
            read(folder).denoiser()

    def told(file: str, **changes):
        def change(folder: Path) -> None:
            known = json.loads((folder / file).read_text())
            (folder / file).write_text(json.dumps(known | changes))

        return change

    def renamed(folder: Path) -> None:
        (folder / "text_encoder/model.safetensors").rename(folder / "text_encoder/pytorch_model.bin")

    def cut(folder: Path) -> None:
        file = folder / "unet/diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:9000])

    refused(r"changed has no vae/config.json", lambda folder: shutil.rmtree(folder / "vae"))
    refused(r"changed has no text_encoder/config.json", lambda folder: shutil.rmtree(folder / "text_encoder"))
    refused(r"tokenizer holds no tokenizer that can be read", lambda folder: shutil.rmtree(folder / "tokenizer"))
    refused("has no model_index.json", lambda folder: (folder / "model_index.json").unlink())
    refused("has no text_encoder, and its network is told", told("model_index.json", text_encoder=[None, None]))
    refused("one of CLIPTextModel, .*; found Llama", told("text_encoder/config.json", architectures=["LlamaModel"]))
    refused("one of AutoencoderKL; found VQModel", told("vae/config.json", _class_name="VQModel"))
    refused("takes 9 channels, and latents have 4", told("unet/config.json", in_channels=9))
    refused("addition_embed_type=text is told", told("unet/config.json", addition_embed_type="text"))
    refused("layers_per_block is 1 to 256; found 1000000", told("unet/config.json", layers_per_block=10**6))
    refused(r"wants [\d,]{10,} numbers, and the files have", told("unet/config.json", block_out_channels=[2**14] * 2))
    refused("has no model.safetensors; .*Pickles", renamed)
    refused("is no whole safetensors file", cut)
