"""Folders of diffusers, made by diffusers with random weights: the same network, process and steps as theirs."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import scoresde
from scoresde import DDIM, Rng, Sampler
from scoresde.config import ConfigError
from scoresde.interop import ForeignFileError, read
from scoresde.interop.export import export
from scoresde.interop.folder import write

diffusers = pytest.importorskip("diffusers", reason="diffusers is an optional package")
from diffusers import (  # noqa: E402
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTTransformer2DModel,
    UNet2DModel,
)

KINDS, TABLES = ("epsilon", "sample", "v_prediction"), ("linear", "scaled_linear", "squaredcos_cap_v2")
OURS = {  # which our U-Net is, so that diffusers is not needed
    "attention": {},
    "one head": {"attention_head_dim": None, "norm_eps": 1e-6},
    "no attention": {
        "down_block_types": ["DownBlock2D"] * 2,
        "up_block_types": ["UpBlock2D"] * 2,
        "add_attention": False,
    },
    "other waves": {"flip_sin_to_cos": False, "freq_shift": 1},
    "classes": {"num_class_embeds": 5},
    "three levels": {
        "block_out_channels": (32, 32, 64),
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 2,
    },
}
THEIRS = {  # which no choice of its switches is
    "padding": {"downsample_padding": 0},
    "few groups": {"norm_num_groups": 8},
    "modulation": {"resnet_time_scale_shift": "scale_shift"},
    "resnets": {"downsample_type": "resnet", "upsample_type": "resnet"},
    "classes, few groups": {"norm_num_groups": 8, "num_class_embeds": 5},
    "variance": {"out_channels": 2},
}


def unet(**options) -> UNet2DModel:
    torch.manual_seed(0)
    usual = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (32, 64), "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    }  # fmt: skip
    net = UNet2DModel(**{**usual, **options}).eval()
    for parameter in net.parameters():  # norms start at 1 and 0, which would hide them
        torch.nn.init.normal_(parameter, 0.5 * (parameter.ndim == 1), 0.15)
    return net


def saved(net, folder: Path, **scheduler) -> Path:
    DDPMPipeline(net, DDIMScheduler(**scheduler)).save_pretrained(folder)
    return folder


def inputs(net) -> tuple[Tensor, Tensor, Tensor | None]:
    x = torch.randn(3, net.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(1))
    label = torch.tensor([0, 4, 2]) if net.config.get("num_class_embeds") else None
    return x, torch.tensor([0, 417, 999]), label


def assert_the_network(net, denoiser, x: Tensor, step: Tensor, label: Tensor | None) -> None:
    """To 2e-6 of the largest number: both are float32, of other orders of summation."""
    with torch.no_grad():
        right = net(x, step, class_labels=label).sample
        scales = denoiser.sde.at((step.double() + 1) / 1000, x)
        found = denoiser.output(x, scales, label)
        right = right[:, : found.shape[1]]
    assert float((found - right).abs().max()) <= 2e-6 * float(right.abs().max())


@pytest.mark.parametrize("options", OURS.values(), ids=OURS)
def test_a_unet_that_is_ours(options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = unet(**options)
    folder, given = saved(net, tmp_path), inputs(net)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    found = read(folder)
    assert found.network["_target_"] == "scoresde.nn.UNet"
    assert_the_network(net, found.denoiser(), *given)


@pytest.mark.parametrize("options", THEIRS.values(), ids=THEIRS)
def test_a_unet_that_is_not(options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = unet(**options)
    folder = saved(net, tmp_path)
    found = read(folder)
    assert found.network["_target_"] == "scoresde.interop.DiffusersModel"
    assert ("what its second output is, which is left out" in found.unknown) == ("out_channels" in options)
    assert_the_network(net, found.denoiser(), *inputs(net))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match="is none of ours, so diffusers runs it: pip install diffusers"):
        found.denoiser()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("table", TABLES)
def test_the_process_is_theirs(table: str, kind: str, tmp_path: Path) -> None:
    """x̂_0 and ε̂ at steps of every noise level, as DDIMScheduler makes them of the same output, to 2e-6.

    Relative to the largest of them, in float64 on both sides but for their table of ᾱ, which is float32 in both.
    """
    net = unet(down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2, add_attention=False)
    scheduler = {"beta_schedule": table, "prediction_type": kind, "clip_sample": False}
    denoiser, theirs = read(saved(net, tmp_path, **scheduler)).denoiser(), DDIMScheduler(**scheduler)
    theirs.set_timesteps(1000)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for step in (0, 250, 700, 990):
        scales = denoiser.sde.at(torch.tensor((step + 1) / 1000, dtype=torch.float64), x)
        output = torch.randn(x.shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        found = denoiser.parameterization.prediction(output, x, scales)
        bar = theirs.alphas_cumprod.double()
        theirs.alphas_cumprod = bar
        theirs.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
        right = theirs.step(output, step, x).pred_original_sample
        assert float((found.x0 - right).abs().max()) <= 2e-6 * float(right.abs().max())
        assert_the_network(net, denoiser, x.float(), torch.full((2,), step), None)


def test_a_transformer(tmp_path: Path) -> None:
    """With its label that says nothing, and its variance."""
    torch.manual_seed(0)
    net = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=5, norm_num_groups=4,
    ).eval()  # fmt: skip
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, 0, 0.2)
    net.save_pretrained(tmp_path / "transformer")
    DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    (tmp_path / "vae").mkdir()
    found = read(tmp_path)
    assert found.outputs == 2 and found.span is None and found.classes == 5 and found.event_shape == (4, 8, 8)
    denoiser = found.denoiser()
    x, step = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 417, 999])
    assert_the_network(net, denoiser, x, step, torch.tensor([0, 4, 2]))
    nothing = torch.full((3,), 5)
    assert_the_network(net, denoiser, x, step, nothing)
    t = (step.double() + 1) / 1000
    assert torch.equal(denoiser(x, t).x0, denoiser(x, t, nothing).x0)
    assert denoiser.null(nothing).tolist() == [5]
    with torch.no_grad():
        right = net(x, step, class_labels=nothing).sample[:, 4:]
    torch.testing.assert_close(2 * denoiser(x, t).share - 1, right, rtol=0, atol=2e-6 * float(right.abs().max()))


def test_it_becomes_a_run(tmp_path: Path) -> None:
    """And `scoresde.load` reads it: DDIM over all their steps' times is their pipeline."""
    for name, options in (("ours", {}), ("theirs", {"norm_num_groups": 8})):
        net = unet(**options)
        write(read(saved(net, tmp_path / name, prediction_type="v_prediction")), tmp_path / f"run-{name}")
        run = scoresde.load(tmp_path / f"run-{name}", device="cpu")
        assert run.event_shape == (1, 8, 8)
        x, times = Rng(0).normal((2, 1, 8, 8)), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.001], dtype=torch.float64)
        found = Sampler(DDIM(), lambda sde, n, times=times: times, 4, denoise=False)(run.denoiser, x)
        theirs = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
        state, bar = x.double(), theirs.alphas_cumprod.double()
        with torch.no_grad():
            for t, s in zip((999, 749, 499, 249), (749, 499, 249, 0), strict=True):
                v, (a, b) = net(state.float(), t).sample.double(), (bar[t].sqrt(), (1 - bar[t]).sqrt())
                x0, eps = a * state - b * v, a * v + b * state
                state = bar[s].sqrt() * x0 + (1 - bar[s]).sqrt() * eps
        torch.testing.assert_close(found.double(), state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [*OURS.values(), THEIRS["padding"]], ids=[*OURS, "padding"])
def test_there_and_back(options, tmp_path: Path) -> None:
    """A run of theirs, exported: the same network, by their own loader."""
    net = unet(**options)
    scheduler = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
    write(read(saved(net, tmp_path / "theirs", **scheduler)), tmp_path / "run")
    run = scoresde.load(tmp_path / "run", device="cpu")
    files = export(run, tmp_path / "out", "diffusers")
    assert "model_index.json" in files and "card" not in files
    again = DDIMPipeline.from_pretrained(tmp_path / "out")
    assert again.scheduler.config.beta_schedule == "scaled_linear" and again.scheduler.config.clip_sample is False
    x, step, label = inputs(net)
    with torch.no_grad():
        found, right = (each(x, step, class_labels=label).sample for each in (again.unet, net))
    assert float((found - right).abs().max()) <= 2e-6 * float(right.abs().max())


@pytest.mark.parametrize("options", [{}, THEIRS["few groups"]], ids=["ours", "theirs"])
def test_a_learned_variance_goes_there_and_back(options, tmp_path: Path) -> None:
    """As DDPM's pipeline takes it, by whose step the ancestral one is tested in tests/sampling."""
    net = unet(out_channels=2, **options)
    DDPMPipeline(net, DDPMScheduler(variance_type="learned_range")).save_pretrained(tmp_path / "theirs")
    found = read(tmp_path / "theirs")
    assert found.network["_target_"].endswith("DiffusersModel" if options else "UNet") and found.unknown == ()
    assert_the_network(net, found.denoiser(), *inputs(net))
    write(found, tmp_path / "run")
    export(scoresde.load(tmp_path / "run", device="cpu"), tmp_path / "out", "diffusers")
    again = DDPMPipeline.from_pretrained(tmp_path / "out")
    assert again.scheduler.config.variance_type == "learned_range"
    assert again(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)
    x, step, _ = inputs(net)
    with torch.no_grad():
        assert float((again.unet(x, step).sample - net(x, step).sample).abs().max()) <= 2e-6


def test_what_is_not_theirs_is_refused(tmp_path: Path) -> None:
    write(read(saved(unet(), tmp_path / "theirs")), tmp_path / "run")
    run = scoresde.load(tmp_path / "run", device="cpu")
    node = run.config["network"]
    for key, changed, words in [
        ("sde", {"_target_": "scoresde.VPSDE"}, "its process is scoresde.VPSDE, and that of their schedulers DDPM"),
        (
            "parameterization",
            {"_target_": "scoresde.EDM"},
            "its output is scoresde.EDM, and theirs one of scoresde.Eps",
        ),
        ("denoiser", {"_target_": "scoresde.Preconditioned"}, "its network sees scaled x and hears other times"),
        ("network", {**node, "fir": False, "late": False}, "UNet2DModel is this network where it has late=True"),
        ("network", {"_target_": "scoresde.nn.DiT"}, "scoresde.nn.DiT is none of their networks; diffusers' DiT has"),
    ]:
        with pytest.raises(ConfigError, match=words):
            export(replace(run, config={**run.config, key: changed}), tmp_path / "out", "diffusers")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    folder = saved(unet(), tmp_path / "one")
    config, scheduler = folder / "unet" / "config.json", folder / "scheduler" / "scheduler_config.json"
    kept, weights = config.read_text(), folder / "unet" / "diffusion_pytorch_model.safetensors"

    def refused(words: str) -> None:
        with pytest.raises(ForeignFileError, match=words):
            read(folder).denoiser()
        config.write_text(kept)

    config.write_text("{")
    refused("is expected to be a JSON file")
    config.unlink()
    config.symlink_to("/dev/zero")
    with pytest.raises(ForeignFileError, match="it is no regular file"):
        read(folder)
    config.unlink()
    for changed, words in (
        ({"block_out_channels": [0, 0]}, "cannot be read: ZeroDivisionError"),
        ({"block_out_channels": [8, 16], "norm_num_groups": 8, "act_fn": {"_target_": "os.system"}}, "os.system"),
    ):
        config.write_text(json.dumps(json.loads(kept) | changed))
        refused(words)
    table = scheduler.read_text()
    scheduler.write_text(json.dumps({"_class_name": "DDPMScheduler", "num_train_timesteps": 10**9}))
    refused("num_train_timesteps=1,000,000,000 are more than 100,000")
    scheduler.write_text(table)
    config.write_text("[]")
    refused("holds a list; expected a mapping")
    config.write_text(" " * 2**20 + kept)
    refused("more than 1,048,576 bytes")
    config.write_text(json.dumps(json.loads(kept) | {"_class_name": "UNet2DConditionModel"}))
    refused("one has no vae/config.json, without which there is no picture")
    config.write_text(json.dumps(json.loads(kept) | {"layers_per_block": 10**9}))
    refused("layers_per_block is 1 to 64; found 1000000000")
    config.write_text(json.dumps(json.loads(kept) | {"block_out_channels": [64, 128]}))
    refused("is expected to have shape")
    config.write_text(json.dumps(json.loads(kept) | {"block_out_channels": [2**20, 2**20], "norm_num_groups": 8}))
    refused("is expected to have shape")  # found without memory for it
    scheduler.rename(folder / "other.json")
    refused("does not say what its process is: give it, args=scheduler_config.json")
    assert (
        read(folder, args=json.loads((folder / "other.json").read_text())).parameterization["_target_"]
        == "scoresde.Eps"
    )
    (folder / "other.json").rename(scheduler)
    content = weights.read_bytes()
    weights.write_bytes(content[:1000])
    refused("is no whole safetensors file")
    weights.rename(folder / "unet" / "diffusion_pytorch_model.bin")
    refused(r"Pickles \(.bin\) are not opened")
