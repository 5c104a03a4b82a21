"""Networks of others say here what they say there, and are run folders on which every command works."""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peer_files import ARGS, as_torch_file, dit_tensors, song, song_tensors, write_edm
from torch import Tensor

import scoresde
from scoresde.cli import importing
from scoresde.config import build_network
from scoresde.interop import ForeignFileError, Imported, read
from scoresde.interop.folder import write

NCSN = {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
# float32 keeps 6e-8 of a number; some twenty layers, and waves of angles up to 300, keep 1e-5 of the largest
ALLOWED = 1e-5


def far(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).abs().max() / theirs.abs().max())


def told(labels: Tensor, classes: int) -> Tensor:
    """One-hot rows; zeros for the label `classes`, none."""
    return torch.eye(classes + 1)[labels][:, :classes]


def inputs(seed: int = 1, n: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    x, labels = torch.randn(n, 2, 8, 8, generator=random), torch.arange(n)
    return x, torch.tensor([0.03, 0.6, 4.0, 40.0])[:n], labels


def denoised(imported: Imported, y: Tensor, sigma: Tensor, cond: Tensor | None) -> Tensor:
    """x̂_0 at y = x_0 + σ n, whatever the process scales it by."""
    denoiser = imported.denoiser()
    t = denoiser.sde.time(-2 * sigma.double().log())
    alpha = denoiser.sde.marginal(t)[0].reshape(-1, 1, 1, 1)
    return denoiser((alpha * y).float(), t, cond).x0


@pytest.mark.parametrize("changed", [{}, NCSN], ids=["ddpmpp", "ncsnpp"])
def test_edm_networks_agree_with_their_formula(tmp_path: Path, changed: dict[str, Any]) -> None:
    tensors = song_tensors(0, **changed)
    imported = read(write_edm(tmp_path / "net.pkl", tensors, args=ARGS | changed, sigma_data=0.5))
    x, sigma, labels = inputs()
    s = sigma.double().reshape(-1, 1, 1, 1)
    c_in = (s**2 + 0.25).rsqrt()
    inner = song(tensors, c_in * x, sigma.double().log() / 4, told(labels, 3), **changed)
    truth = 0.25 / (s**2 + 0.25) * x + 0.5 * s * c_in * inner  # Karras et al. 2022, table 1
    y = x
    assert far(denoised(imported, y, sigma, labels), truth) < ALLOWED
    network = imported.build_network()
    assert far(network((c_in * x).float(), sigma.log() / 4, labels), inner) < ALLOWED


def test_the_other_wrappers_of_edm_are_their_processes(tmp_path: Path) -> None:
    x, sigma, _ = inputs()
    s = sigma.double().reshape(-1, 1, 1, 1)
    args, ncsn = ARGS | {"label_dim": 0}, ARGS | NCSN | {"label_dim": 0}
    tensors, waves = song_tensors(1, label_dim=0), song_tensors(2, label_dim=0, **NCSN)

    vp = read(write_edm(tmp_path / "vp.pkl", tensors, "VPPrecond", args, beta_d=19.9, beta_min=0.1, M=1000))
    t = (0.1**2 + 2 * 19.9 * (1 + sigma.double() ** 2).log()).sqrt() / 19.9 - 0.1 / 19.9
    truth = x - s * song(tensors, x / (1 + s**2).sqrt(), 999 * t, label_dim=0)
    # 999 t in float32 is off by 3e-5, which the fastest wave keeps
    assert far(denoised(vp, x, sigma, None), truth) < 1e-4

    ve = read(write_edm(tmp_path / "ve.pkl", waves, "VEPrecond", ncsn, sigma_min=0.02, sigma_max=100))
    truth = x + s * song(waves, x, (sigma.double() / 2).log(), label_dim=0, **NCSN)
    assert far(denoised(ve, x, sigma, None), truth) < ALLOWED
    assert ve.sde == {"_target_": "scoresde.VESDE", "sigma_min": 0.02, "sigma_max": 100.0}


def test_what_a_network_does_not_have_is_refused_in_words(tmp_path: Path) -> None:
    tensors = song_tensors(0)
    lacking = {name: value for name, value in tensors.items() if "in1.conv1" not in name}
    cases: list[tuple[dict[str, Tensor], dict[str, Any], str]] = [
        (tensors, {"decoder_type": "skip"}, r"decoder_type=skip is not known here, 'standard' is"),
        (tensors, {"num_heads": 2}, "the argument num_heads is not known here"),
        (tensors, {"img_resolution": 1 << 13}, "pictures of img_resolution=8192 pixels are more than 4096"),
        (tensors, {"model_channels": 1 << 40}, "model_channels=1099511627776 is no size"),
        (tensors, {"model_channels": 1024}, "does not hold the network that it says"),
        (tensors, {"num_blocks": 1000}, r"has no tensor enc\.8x8_block1\.norm0\.weight"),
        (tensors, {"channel_mult": "wide"}, "channel_mult is a list of a few whole numbers; got wide"),
        (lacking, {}, r"has no tensor dec\.4x4_in1\.conv1\.weight"),
        (tensors | {"enc.4x4_extra.weight": torch.zeros(2)}, {}, "has 1 tensors that its network does not need: enc"),
    ]
    for given, changed, message in cases:
        path = write_edm(tmp_path / "net.pkl", given, args=ARGS | changed)
        with pytest.raises(ForeignFileError, match=message):
            read(path).denoiser()


def heun(tensors: dict[str, Tensor], z: Tensor, label: Tensor, steps: int) -> Tensor:
    """EDM's own sampler, in its own variables: dx/dσ = (x − D(x; σ))/σ over its grid with ρ = 7, by Heun's method."""
    place = torch.arange(steps).double() / (steps - 1)
    grid = (80 ** (1 / 7) + place * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    grid = torch.cat([grid, torch.zeros(1).double()])

    def slope(x: Tensor, sigma: Tensor) -> Tensor:
        c_in = (sigma**2 + 0.25).rsqrt()
        inner = song(tensors, c_in * x, (sigma.log() / 4).expand(len(x)), label)
        return (x - 0.25 * c_in**2 * x - 0.5 * sigma * c_in * inner) / sigma

    x = z.double() * grid[0]
    for here, there in itertools.pairwise(grid):
        first = slope(x, here)
        end = x + (there - here) * first
        x = end if there == 0 else x + (there - here) / 2 * (first + slope(end, there))
    return x


def test_an_imported_run_samples_as_the_peers_own_sampler_does(tmp_path: Path) -> None:
    tensors = {name: 0.5 * value if "conv" in name else value for name, value in song_tensors(3).items()}
    imported = read(write_edm(tmp_path / "net.pkl", tensors, sigma_data=0.5))
    write(imported, tmp_path / "run")
    run = scoresde.load(tmp_path / "run", device="cpu")
    assert run.always_conditional and run.classes == ("0", "1", "2") and not run.dataset.statistics.held_out
    z = scoresde.Rng(seeds=[5, 6]).normal((2, 2, 8, 8))
    labels = torch.tensor([2, 0])
    fine, coarse = heun(tensors, z, told(labels, 3), 120), heun(tensors, z, told(labels, 3), 60)
    error = float((fine - coarse).abs().max()) / 3  # of the finer of two solves of second order
    sampler = scoresde.Sampler(scoresde.Heun(), scoresde.KarrasGrid(), steps=100)
    with torch.no_grad():
        ours = sampler(run.denoiser, (2, 2, 8, 8), cond=labels, rng=scoresde.Rng(seeds=[5, 6]))
    assert float((ours - fine).abs().max()) < 20 * error + 1e-3
    assert float((ours - fine).abs().max()) < 0.02 * float(fine.std())
    assert run.sample(2, cond=[2, 0], sampler=sampler, progress=False).dtype == torch.uint8


def test_an_imported_run_has_the_likelihood_of_the_peers_flow(tmp_path: Path) -> None:
    """log p by the formula: −∫ div dσ of dx/dσ = (x − D)/σ, and N(0, σ_max²) at its end, by RK4 in log σ, float64."""
    small = {"img_channels": 1}
    tensors = song_tensors(3, **small)
    for name in ("dec.8x8_aux_conv.weight", "dec.8x8_aux_conv.bias"):
        tensors[name] *= 0.1  # far from a Gaussian, but of a flow that a few steps follow
    write(read(write_edm(tmp_path / "net.pkl", tensors, args=ARGS | small, sigma_data=0.5)), tmp_path / "run")
    run = scoresde.load(tmp_path / "run", device="cpu")
    x0, label = 0.4 * torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1])

    def rate(x: Tensor, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
        sigma = log_sigma.exp()

        def flow(flat: Tensor) -> Tensor:  # dx/dlog σ = x − D
            x, c_in = flat.reshape(1, 1, 8, 8), (sigma**2 + 0.25).rsqrt()
            inner = song(tensors, c_in * x, log_sigma.reshape(1) / 4, told(label, 3), **small)
            return (x - 0.25 * c_in**2 * x - 0.5 * sigma * c_in * inner).flatten()

        return flow(x).detach(), torch.func.jacrev(flow)(x).trace().detach()

    x, total, ends = x0.double().flatten(), 0.0, torch.tensor([0.002, 80.0]).double().log()
    steps = 20
    h = (ends[1] - ends[0]) / steps
    for k in range(steps):
        at = ends[0] + k * h
        k1, d1 = rate(x, at)
        k2, d2 = rate(x + h / 2 * k1, at + h / 2)
        k3, d3 = rate(x + h / 2 * k2, at + h / 2)
        k4, d4 = rate(x + h * k3, at + h)
        x, total = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), total + float(h / 6 * (d1 + 2 * d2 + 2 * d3 + d4))
    truth = float(-0.5 * (x / 80) @ (x / 80) - x.numel() * (math.log(80) + 0.5 * math.log(2 * math.pi))) + total
    found = scoresde.log_likelihood(run.denoiser, x0, scoresde.Budget(32), cond=label, divergence=scoresde.Exact())
    assert float(found.log_prob) == pytest.approx(truth, abs=0.3)  # of 64 dimensions: 0.007 bits/dim


def test_the_command_writes_a_run_folder_and_says_what_it_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_edm(tmp_path / "net.pkl", song_tensors(0), sigma_data=0.5)
    np.savez(
        tmp_path / "data.npz", x=np.random.default_rng(0).integers(0, 256, (40, 2, 8, 8), np.uint8), y=np.arange(40) % 3
    )

    def command(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["scoresde-import", str(source), *words])
        importing.main()
        return capsys.readouterr().out

    said = command(f"out={tmp_path / 'run'}")
    for words in ("EDMPrecond around SongUNet", "EDMSDE", "EDM(sigma_data=0.5)", "3 classes", "CC BY-NC-SA", "checked"):
        assert words in said
    with pytest.raises(SystemExit, match="holds a run already"):
        command(f"out={tmp_path / 'run'}")
    command(f"out={tmp_path / 'run'}", "data=arrays", f"data.path={tmp_path / 'data.npz'}", "data.key=x",
            "data.label_key=y", "data.levels=256", "overwrite=true")  # fmt: skip
    run = scoresde.load(tmp_path / "run", device="cpu")
    assert len(run.whole_data().dataset.test) == 40  # all of them are there to be measured
    for words, message in (
        (("out=x", "outt=y"), "outt=y is no key=value. Did you mean 'out'"),
        ((), "out=… is the folder to write"),
        (("out=x", "format=gan"), "format is one of edm"),
        (("out=x", "data=nothing"), "data is one of"),
        (("out=x", "data=arrays", "data.pth=y"), "data=arrays has no key 'pth'. Did you mean 'path'"),
        (("out=x", f"args={source}"), "is a JSON file of arguments"),
    ):
        with pytest.raises(SystemExit, match=message.replace(".", r"\.").replace("'", ".")):
            command(*words)


def test_formats_are_told_apart_and_ask_for_what_they_do_not_say(tmp_path: Path) -> None:
    def written(value: Any) -> Path:
        (tmp_path / "net.pt").write_bytes(as_torch_file(value))
        return tmp_path / "net.pt"

    network = build_network(
        {"_target_": "scoresde.nn.DiT", "width": 8, "depth": 1, "heads": 2, "event_shape": (1, 4, 4)}, classes=0
    )
    for value, message in (
        ({"x_embedder.proj.weight": torch.zeros(1)}, "say which it is, format=dit or format=sit"),
        ({"time_embed.0.weight": torch.zeros(1)}, "give the flags that it was trained with"),
        ({"model": {}, "ema": {"shadow_params": []}}, "give its configuration as JSON, with data, training and model"),
        (network.state_dict(), "it is of none of the formats"),
        ([1, 2], "it holds a list, and no network"),
    ):
        with pytest.raises(ForeignFileError, match=message):
            read(written(value))
    config = {
        "data": {"image_size": 8},
        "training": {"sde": "vpsde"},
        "model": {"embedding_type": "positional", "scale_by_sigma": False},
    }
    model = {"module.a": torch.zeros(2), "a": torch.zeros(2)}
    with pytest.raises(ForeignFileError, match="two of its tensors have the same name"):
        read(written({"model": model, "ema": {"shadow_params": []}}), args=config)
    with pytest.raises(ForeignFileError, match="has 0 averaged tensors for 1 parameters"):
        read(written({"model": {"module.a": torch.zeros(2)}, "ema": {"shadow_params": []}}), args=config)


def test_dit_and_sit_are_one_network_with_two_meanings(tmp_path: Path) -> None:
    """A state dict written from our own DiT, whose formula `tests/nn/test_transformer.py` proves."""
    torch.manual_seed(0)
    node = {"_target_": "scoresde.nn.DiT", "patch": 2, "width": 8, "depth": 1, "heads": 2, "outputs": 2, "classes": 3}
    network = build_network(
        node | {"event_shape": (1, 4, 4), "embedding": "sinusoidal", "embedding_scale": 0.01}, classes=0
    )
    ours = {name: 0.3 * torch.randn_like(v) if "omega" not in name else v for name, v in network.state_dict().items()}
    network.load_state_dict(ours)
    theirs = dit_tensors(ours, network.positions)
    (tmp_path / "net.pt").write_bytes(as_torch_file(theirs))
    x, labels = torch.randn(2, 1, 4, 4), torch.tensor([1, 3])
    with pytest.raises(
        ForeignFileError, match=r"width 8 with 1 blocks is none of the published sizes: args\.num_heads=…"
    ):
        read(tmp_path / "net.pt", format="dit")
    dit = read(tmp_path / "net.pt", format="dit", args={"num_heads": 2, "num_classes": 3}).denoiser()
    first, second = network(x, torch.tensor([10.0, 700.0]), labels).chunk(2, 1)
    found = dit(x, torch.tensor([11, 701]) / 1000, labels)
    assert torch.allclose(found.eps, first, atol=1e-4)
    assert torch.allclose(found.share, (second + 1) / 2, atol=1e-4)  # Nichol & Dhariwal 2021, eq. 15
    sit = read(tmp_path / "net.pt", format="sit", args={"num_heads": 2, "num_classes": 3}).denoiser()
    first = network(x, torch.tensor([0.25, 0.75]), labels)[:, :1]
    assert torch.allclose(sit(x, torch.tensor([0.75, 0.25]), labels).velocity, -first, atol=1e-5)


@pytest.mark.skipif(
    "SCORESDE_GOLDENS" not in os.environ, reason="SCORESDE_GOLDENS names the folder of the peers' goldens"
)
def test_every_golden_of_the_peers_own_code() -> None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from interop import goldens  # type: ignore[import-not-found]

    for golden in goldens(Path(os.environ["SCORESDE_GOLDENS"])):
        for what, error in golden.errors():
            assert error <= golden.allowed, (golden.name, what, json.dumps(golden.meta.get("args")))
