"""scoresde-sample edit=…: what the functions of the library make of the same samples, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import TINY, command, sampled

import scoresde as S


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("edit")
    done = command("train", *TINY, "logger=jsonl", "evaluate_at_end=false", "out=run", cwd=folder)
    assert done.code == 0, done.err
    for k, x in enumerate(S.load(folder / "run").dataset.test.raw[:5]):
        np.save(folder / f"{k}.npy", x.numpy())
    return folder


PLAIN = ("run=run", "pictures=false")


def test_noised_and_drawn_anew(place: Path, tmp_path: Path) -> None:
    """By `sdedit`, from the same seeds, for any batch size; a file and the held-out sample in it are the same."""
    words = (*PLAIN, "edit=sdedit", "edit.level=0.5", "sampler=ddim", "grid=uniform", "sampler.steps=3", "n=2")
    files = sampled((*words, "edit.input=[0.npy,1.npy]"), place, str(tmp_path / "a"))
    held = sampled((*words, "edit.input=test:0-1", "batch_size=3"), place, str(tmp_path / "b"))
    np.testing.assert_allclose(files["samples"], held["samples"], rtol=1e-4, atol=1e-5)
    run = S.load(place / "run")
    x0 = run.encode(run.dataset.test.raw[:2]).repeat_interleave(2, 0)
    sampler = S.Sampler(S.DDIM(), S.UniformGrid(), steps=3)
    x = S.sdedit(run.denoiser, x0, sampler, 0.5, rng=S.Rng(seeds=[0, 1, 0, 1]))
    np.testing.assert_allclose(files["samples"].reshape(4, 2), run.decode(x).numpy(), rtol=1e-4, atol=1e-5)
    assert files["given"].shape == (2, 2) and files["inputs"].tolist() == ["0.npy", "1.npy"]


def test_from_one_to_the_next_and_towards_an_attribute(place: Path, tmp_path: Path) -> None:
    """Each row begins with what is given, and the first of two ends with the next, to the solver's tolerance of 1e-5 by
    the 60 calls it takes; in between are those of the library."""
    flow = ("edit.flow.rtol=1e-5", "edit.flow.atol=1e-5", "n=3")
    made = sampled((*PLAIN, "edit=interpolation", "edit.input=[0.npy,1.npy,2.npy]", *flow), place, str(tmp_path / "a"))
    run, ode = S.load(place / "run"), S.AdaptiveODE(rtol=1e-5, atol=1e-5)
    raw = run.dataset.test.raw[:5]
    torch.testing.assert_close(torch.from_numpy(made["samples"][:, 0]), raw[:2], rtol=0, atol=1e-3)
    torch.testing.assert_close(torch.from_numpy(made["samples"][:, 2]), raw[1:3], rtol=0, atol=1e-3)
    z, decode = ode.encode(run.denoiser, run.encode(raw)), S.Sampler(ode, steps=1, denoise=False)
    middle = run.decode(decode(run.denoiser, S.interpolate(z[:2], z[1:3], 0.5)))
    torch.testing.assert_close(torch.from_numpy(made["samples"][:, 1]), middle, rtol=0, atol=1e-3)
    words = ("edit=attribute", "edit.input=0.npy", "edit.having=[3.npy,4.npy]", "edit.lacking=1.npy", "edit.strength=2")
    made = sampled((*PLAIN, *words, *flow), place, str(tmp_path / "b"))
    moved = [z[:1] + k * S.attribute(z[3:5], z[1:2]) for k in (0.0, 1.0, 2.0)]
    expected = run.decode(decode(run.denoiser, torch.cat(moved)))
    torch.testing.assert_close(torch.from_numpy(made["samples"][0]), expected, rtol=0, atol=1e-3)
    summary = json.loads((tmp_path / "b" / "summary.json").read_text())
    assert summary["edit"]["strength"] == 2 and summary["cost"]["ode"]["nfe"] > 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("edit=sdedit", "edit.input has no value yet"),
        ("edit=sdedit edit.input=none.npy", "none.npy"),
        ("edit=sdedit edit.input=0.npy edit.level=1e9", "no time of noise level"),
        ("edit=sdedit edit.input=0.npy budget=5", "which budget= does not; leave one of them away"),
        ("edit=interpolation edit.input=0.npy", "between two samples or more"),
        ("edit=interpolation edit.input=test:0-1 sampler=heun", "set by edit.flow; leave sampler=heun away"),
        ("edit=attribute edit.input=test:0 edit.having=test:99 edit.lacking=test:1", "edit.having=test:99: held-out"),
    ],
)
def test_what_cannot_be_edited_is_refused(place: Path, tmp_path: Path, words: str, expected: str) -> None:
    done = command("sample", *PLAIN, *words.split(), f"out={tmp_path / 'x'}", cwd=place)
    assert done.code == 1 and expected in done.err, done.err
    assert not (tmp_path / "x").exists()
