"""Latents as they are typed: an autoencoder, and a model of its latents, which needs its own folder alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import PLAIN, Done, command
from safetensors.torch import load_file

import scoresde
from scoresde import Budget, Exact, Rng
from scoresde.runs import bundle
from scoresde.runs.checkpoint import CheckpointError
from scoresde.runs.latent import codec_of, latents

SHORT = (
    "data=digits", "trainer.images=640", "trainer.batch_size=64", "trainer.warmup=0", "trainer.cooldown=64",
    "trainer.log_every=320", "trainer.evaluate_every=0", "trainer.checkpoint_every=320", "threads=1", "network.width=8",
    "evaluation.points=4", "evaluation.samples=4", "logger=jsonl",
)  # fmt: skip
CODER = ("network=autoencoder", "denoiser=autoencoder", "loss=autoencoder", "network.latent=2", "optim.lr=5e-3")
LATENT = (
    "network=dit", "network.patch=1", "network.width=16", "network.depth=1", "network.heads=2",
    "parameterization=v", "evaluation.pictures=false", "likelihood=budget", "likelihood.solver.calls=8", *PLAIN,
)  # fmt: skip


def trained(folder: Path, *words: str) -> Done:
    done = command("train", *SHORT, *words, cwd=folder)
    assert done.code == 0, done.err
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latent")
    trained(folder, *CODER, "out=coder")
    return folder


@pytest.fixture(scope="module")
def latent(place: Path) -> Path:
    said = trained(place, "codec=./coder", *LATENT, "out=model").out
    assert "Latents (2, 2, 2) of (1, 8, 8) by the autoencoder in ./coder, kept in coder/latents/" in said
    assert "a bound for the data, through their latents" in said
    return place / "model"


def test_an_autoencoder_is_measured_by_its_own_bound_and_drawn(place: Path) -> None:
    summary = json.loads((place / "coder" / "summary.json").read_text())
    assert (place / "coder" / "reconstructions.png").stat().st_size > 1000
    assert summary["latent_shape"] == [2, 2, 2] and summary["bits_per_dim"]["points"] == 4
    assert 0 < summary["bits_per_dim"]["stderr"] < summary["bits_per_dim"]["mean"] < 8
    assert "-ELBO under z ~ N(0, I), a bound" in (place / "coder" / "summary.md").read_text()
    with pytest.raises(ValueError, match=r"is an autoencoder.*scoresde-train codec="):
        scoresde.load(place / "coder").sample(1)
    refused = command("sample", "run=coder", "out=s", cwd=place)
    assert refused.code and "A model of its latents has both: scoresde-train codec=coder" in refused.err


def test_latents_are_stored_once_and_drawn_anew(place: Path, latent: Path) -> None:
    """Those of the file are what the codec says, and a damaged file is made again."""
    run = scoresde.load(latent).whole_data()
    (file,) = (place / "coder" / "latents").glob("*.safetensors")
    stored, raw = load_file(file)["moments"].clone(), run.dataset.train.raw
    assert torch.allclose(stored[:9], run.codec.moments(raw[:9]), atol=1e-5)
    x = run.codec.redraw.transform(stored, rng=Rng(0))
    assert x.mean((0, 2, 3)).abs().max() < 0.05 and (x.std((0, 2, 3)) - 1).abs().max() < 0.05
    assert not torch.equal(x, run.codec.redraw.transform(stored, rng=Rng(1)))
    file.write_bytes(file.read_bytes()[:-3])
    again = latents(run.dataset, run=str(place / "coder"))
    assert torch.equal(again.moments, stored) and torch.equal(load_file(file)["moments"], stored)
    assert again.codec == run.codec


def test_a_model_of_latents_samples_and_scores_raw_data(latent: Path) -> None:
    run = scoresde.load(latent)
    raw = run.sample(3, budget=4, progress=False)
    assert raw.dtype == torch.uint8 and raw.shape == (3, 1, 8, 8) and run.event_shape == (2, 2, 2)
    given = run.dataset.test.raw[:3]
    found = run.log_likelihood(given, solver=Budget(8), divergence=Exact(), draws=3, progress=False)
    assert found.name == "bpd/latent-bound" and found.dims == 64 and bool((found.stderr > 0).all())
    single = run.log_likelihood(given, solver=Budget(8), divergence=Exact(), progress=False)
    assert bool((found.bits_per_dim > 0).all()) and bool(single.stderr.isnan().all())
    # what the codec adds, by hand: log P(raw|z) − log q(z|raw) + Σ log std
    codec = run.codec
    x = codec.encode(given, rng=Rng(7))
    (mean, std), z = codec.network.encode(codec.base.encode(given)), codec.redraw.undo(x)
    log_q = torch.distributions.Normal(mean.double(), std.double()).log_prob(z.double()).sum((1, 2, 3))
    by_hand = codec.network.log_prob(codec.base.encode(given), z) - log_q - 4 * torch.tensor(codec.std).log().sum()
    assert torch.allclose(codec.log_volume(given, x), by_hand, atol=1e-4)
    exported = run.export(latent.parent / "one.safetensors")
    assert torch.equal(scoresde.load(exported).sample(3, budget=4, progress=False), raw)


def test_it_moves_and_resumes_without_the_autoencoder(latent: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(latent, tmp_path / "moved")
    assert torch.equal(
        scoresde.load(moved).codec.tensors()["decoder_in.weight"], codec_of(latent).tensors()["decoder_in.weight"]
    )
    words = (*SHORT, *LATENT, "codec=./gone", "out=moved", "trainer.images=960", "evaluate_at_end=false", "resume=auto")
    done = command("train", *words, cwd=tmp_path)
    assert done.code == 0 and "by the autoencoder in " in done.out, done.err
    assert scoresde.load(moved).step == 15
    sampled = command("sample", "run=moved", "n=2", "sampler=ddim", "sampler.steps=2", "out=s", cwd=tmp_path)
    assert sampled.code == 0 and np.load(tmp_path / "s" / "samples.npz")["ddim"].dtype == np.uint8


def test_it_sweeps(place: Path, latent: Path) -> None:
    """Both jobs find the autoencoder where the command was typed, and the latents that the first run stored."""
    words = (*SHORT, *LATENT, "codec=./coder", "evaluate_at_end=false", "optim.lr=1e-3,2e-3", "out=sweep")
    done = command("train", "-m", *words, cwd=place)
    assert done.code == 0, done.err
    assert done.out.count("read from coder/latents/") == 2
    digests = {scoresde.load(place / "sweep" / job).codec.digest for job in ("0", "1")}
    assert digests == {scoresde.load(latent).codec.digest}


def test_another_autoencoder_is_refused(place: Path, latent: Path, tmp_path: Path) -> None:
    """By its digest: at resume, where the folder says another one, and where the file of a run was exchanged."""
    trained(place, *CODER, "seed=1", "out=other")
    done = command("train", *SHORT, *LATENT, "codec=./other", "out=model", "resume=auto", cwd=place)
    assert done.code and "codec.digest" in done.err
    swapped = shutil.copytree(latent, tmp_path / "swapped")
    tensors, records = bundle.read(swapped / "excerpt.safetensors")
    tensors["codec.decoder_in.weight"] = tensors["codec.decoder_in.weight"] + 1
    bundle.write(swapped / "excerpt.safetensors", tensors, records)
    with pytest.raises(CheckpointError, match="its autoencoder is"):
        scoresde.load(swapped)
    records["codec_digest"] = codec_of(place / "other").digest
    tensors |= {f"codec.{name}": value for name, value in codec_of(place / "other").tensors().items()}
    bundle.write(swapped / "excerpt.safetensors", tensors, records)
    with pytest.raises(CheckpointError, match="keeps another autoencoder"):
        scoresde.load(swapped)
    with pytest.raises(ValueError, match="is asked for"):
        latents(scoresde.load(latent).dataset, run=str(place / "other"), digest=scoresde.load(latent).codec.digest)


REFUSED = {
    "a missing folder": (("codec=./nowhere",), "There is no folder nowhere; codec="),
    "no autoencoder": (("codec=./plain",), "no autoencoder"),
    "other data": (("codec=./coder", "data=8gaussians"), "expected"),
    "sizes for a U-Net": (("codec=./coder", "network=unet", "network.multipliers=[1,1,1]"), "Pad or crop"),
    "a bound of its own": (("codec=./coder", *LATENT, "likelihood.bound=dequantised"), "are a bound by themselves"),
    "sizes for an autoencoder": ((*CODER, "network.multipliers=[1,2,4,8]"), "want sizes that are multiples of 16"),
    "conditions": ((*CODER, "conditional=true"), "An autoencoder takes no conditions"),
    "another loss": (("network=autoencoder", "denoiser=autoencoder"), "an autoencoder all three of that name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_told_before_a_folder_is_made(place: Path, case: str) -> None:
    words, reason = REFUSED[case]
    if case == "no autoencoder" and not (place / "plain").exists():
        trained(
            place,
            *(word for word in LATENT if "patch" not in word),
            "network.patch=4",
            "evaluate_at_end=false",
            "out=plain",
        )
    done = command("train", *SHORT, *words, "out=refused", cwd=place)
    assert done.code and reason in done.err, done.err
    assert not (place / "refused").exists()


def test_problems_are_solved_through_the_decoder(place: Path, latent: Path) -> None:
    """What was measured and what is restored are pixels; a method that wants a linear operator says so."""
    words = ("run=model", "problem=superres", "input=test:0-1", "n=2", "sampler.steps=3", "pictures=false", "threads=1")
    done = command("sample", *words, "posterior=dps", "out=restored", cwd=place)
    assert done.code == 0, done.err
    arrays = np.load(place / "restored" / "samples.npz")
    assert arrays["given"].shape == (2, 1, 2, 2) and arrays["truth"].shape == (2, 1, 8, 8)
    assert arrays["samples"].shape == (2, 2, 1, 8, 8) and arrays["samples"].dtype == np.uint8
    assert np.allclose(arrays["truth"].reshape(2, 1, 2, 4, 2, 4).mean((3, 5)), arrays["given"], atol=4 * 0.02 * 8.5)
    assert command("sample", *words, "posterior=pigdm", "out=by-pigdm", cwd=place).code == 0
    for method in ("replacement", "repaint"):
        refused = command("sample", *words, f"posterior={method}", "out=refused", cwd=place)
        assert refused.code and "needs a linear operator" in refused.err
