"""Runs under codecs that were fitted to their data, by the commands: trained, resumed, sampled, measured, evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import TINY, command

import scoresde
from scoresde.codecs import Chain, Patches, Scaling, Standardise
from scoresde.likelihood.ode import log_likelihood

FAST = ("logger=jsonl", "sampler=ddim", "sampler.steps=4", "likelihood=budget", "likelihood.solver.calls=6")
COMMON = tuple(word for word in TINY if not word.startswith(("data", "network", "likelihood", "evaluation.pic")))
TABLE = ("data=arrays", "data.raw_low=-1e4", "data.raw_high=1e4", "network=mlp",
         "network.width=8", "network.depth=1", "codec=standardise", "codec.log=[1]", "codec.quantile=[0]")  # fmt: skip
PIXELS = ("data=arrays", "data.levels=16", "network=unet", "network.width=8",
          "network.multipliers=[1]", "network.blocks=1", "codec=patches", "codec.size=2")  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a table of two columns of floats and one of counts, and one on small pictures in patches."""
    folder, rng = tmp_path_factory.mktemp("coded"), np.random.default_rng(0)
    table = np.stack([1000 * rng.standard_t(5, 300), rng.lognormal(3, 1, 300), rng.poisson(4, 300)], 1)
    np.save(folder / "table.npy", table.astype(np.float32).clip(-9999, 9999))
    np.save(folder / "pixels.npy", rng.integers(0, 16, (100, 1, 8, 8), dtype=np.uint8))
    for name, words in (("table", TABLE), ("pixels", PIXELS)):
        path = f"data.path={folder}/{name}.npy"
        done = command("train", *COMMON, *FAST, *words, path, "evaluation.pictures=true", f"out={name}", cwd=folder)
        assert done.code == 0, done.err
    return folder


@pytest.mark.parametrize("name, shape, model", [("table", (3,), (3,)), ("pixels", (1, 8, 8), (4, 4, 4))])
def test_samples_have_the_shape_and_the_values_of_raw_data(place: Path, name: str, shape, model) -> None:
    run = scoresde.load(place / name)
    assert (run.raw_shape, run.event_shape) == (shape, model)
    arrays = np.load(place / name / "samples.npz")
    made = torch.from_numpy(arrays["ddim"])
    assert made.shape == (4, *shape) and made.dtype == run.dataset.train.raw.dtype
    run.codec.check(made)  # whole counts, values that have a logarithm, 16 levels
    assert (place / name / "samples.png").exists() and (place / name / "trajectory.png").exists()
    torch.testing.assert_close(run.decode(run.encode(made)), made, rtol=1e-4, atol=1e-2)


def test_the_codec_of_a_run_is_the_one_that_was_fitted(place: Path) -> None:
    run, raw = scoresde.load(place / "table"), torch.from_numpy(np.load(place / "table.npy"))
    codec = run.codec
    assert codec.integers == (2,) and codec.log == (None, 0.0, None) and len(codec.quantiles[0]) > 2
    whole = run.whole_data()
    assert whole.codec == codec == Standardise.of(whole.dataset.train.raw, log=(1,), quantile=(0,))
    assert codec != Standardise.of(raw, log=(1,), quantile=(0,))  # which has seen the held-out samples
    assert scoresde.load(place / "pixels").codec == Chain((Scaling(levels=16), Patches(2)))


def test_bits_are_of_raw_dimensions_with_the_volume_of_each_sample(place: Path) -> None:
    run = scoresde.load(place / "table")
    raw, solver = run.dataset.test.raw[:4], scoresde.Budget(6)
    found = run.log_likelihood(raw, solver=solver, rng=scoresde.Rng(seeds=range(4)), divergence=scoresde.Exact())
    x = run.encode(raw, rng=scoresde.Rng(seeds=range(4)))
    apart = log_likelihood(run.denoiser, x, solver, divergence=scoresde.Exact())
    by_hand = apart.log_prob + run.codec.log_volume(raw, x)
    torch.testing.assert_close(found.log_prob, by_hand, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.bits_per_dim, -by_hand / (3 * np.log(2)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name, how", [("table", "bound"), ("table", "elbo"), ("pixels", "bound")])
def test_bounds_on_integers_in_patches_and_beside_floats(place: Path, name: str, how: str) -> None:
    words = () if how == "bound" else ("likelihood.samples=4", "likelihood.bound=centres")
    done = command(
        "likelihood", f"run={name}", f"likelihood={how}", *words, "n=3", "logger=jsonl", f"out={name}-{how}", cwd=place
    )
    assert done.code == 0, done.err
    assert np.isfinite(json.loads((place / f"{name}-{how}" / "likelihood.json").read_text())["mean"])


@pytest.mark.parametrize("name", ["table", "pixels"])
def test_a_run_is_evaluated_and_given_data_are_measured(place: Path, name: str) -> None:
    words = ("sampler=ddim", "sampler.steps=4", "likelihood=budget", "likelihood.solver.calls=4", "logger=jsonl")
    few = ("evaluation.samples=24", "evaluation.points=4", "evaluation.pictures=false")
    done = command("evaluate", f"run={name}", *words, *few, f"out={name}-evaluated", cwd=place)
    assert done.code == 0, done.err
    protocol = json.loads((place / f"{name}-evaluated" / "summary.json").read_text())["protocol"]
    assert ("integers" if name == "table" else "16 levels") in protocol["coordinates"]
    own = ("likelihood=budget", "likelihood.solver.calls=4", "logger=jsonl")
    data = ("data=arrays", f"data.path={name}.npy")
    done = command(
        "likelihood", f"run={name}", *data, *own, f"out={name}-given", "likelihood.batch_size=300", cwd=place
    )
    assert done.code == 0, done.err


def test_edits_start_from_raw_samples_and_problems_need_one_affine_map(place: Path) -> None:
    np.save(place / "one.npy", np.load(place / "pixels.npy")[0])
    words = ("sampler=ddim", "sampler.steps=4", "n=2", "pictures=true")
    edit = ("edit=sdedit", "edit.input=[test:0,one.npy]", "edit.level=0.5")
    done = command("sample", "run=pixels", *words, *edit, "out=edited", cwd=place)
    assert done.code == 0, done.err
    arrays = np.load(place / "edited" / "samples.npz")
    assert arrays["samples"].shape == (2, 2, 1, 8, 8)
    assert np.array_equal(arrays["given"][1], np.load(place / "one.npy"))
    done = command("sample", "run=pixels", *words, "problem=superres", "input=test:0", "out=refused", cwd=place)
    assert done.code == 1 and "needs model data that are slope · raw + offset" in done.err


def test_a_resumed_run_goes_on_under_the_codec_that_it_kept(place: Path, monkeypatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr("scoresde.cli.train.follow", lambda plan, *_: {"objective": seen.append(plan.training.dataset)})
    kept, other = scoresde.load(place / "table").codec, Standardise((1.0,) * 3, (2.0,) * 3)
    monkeypatch.setattr("scoresde.codecs.standardise.Standardise.of", lambda *_, **__: other)
    words = [word for word in (*COMMON, *FAST, *TABLE) if not word.startswith("trainer.images")]
    words.append(f"data.path={place}/table.npy")
    done = command("train", *words, "trainer.images=1280", "out=table", "resume=auto", cwd=place)
    assert done.code == 0, done.err
    assert [data.codec for data in seen] == [kept]
    done = command("train", *words, "trainer.images=1280", "codec.knots=9", "out=table", "resume=auto", cwd=place)
    assert done.code == 1 and "codec" in done.err  # another run


def test_a_run_without_its_codec_is_refused_and_not_fitted_anew(place: Path) -> None:
    file = place / "pixels" / "excerpt.safetensors"
    file.rename(place / "away")
    with pytest.raises(scoresde.runs.checkpoint.CheckpointError, match="gone, which kept the codec"):
        scoresde.load(place / "pixels")
    (place / "away").rename(file)
