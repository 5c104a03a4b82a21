"""Cascades by the commands: trained stage by stage, sampled, gone on with, measured, evaluated, refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import TINY, command

import scoresde
from scoresde.evaluate.evaluation import Drawing

COMMON = tuple(word for word in TINY if not word.startswith(("data", "network", "likelihood")))
SMALL = ("data=digits", "network=unet", "network.width=8", "network.multipliers=[1]", "network.blocks=1")
FAST = ("logger=jsonl", "sampler=ddim", "sampler.steps=3", "likelihood=budget", "likelihood.solver.calls=6")
TOLD = ("conditional=true", "network.cond_image=[1,4,4]")
DRAWN = ("run=low", "n=6", "batch_size=4", "sampler=ddim", "sampler.steps=3", "pictures=false")
STAGES = {
    "low": ("codec=haar_low",),
    "details": ("codec=haar_details", *TOLD, "network.cond_noise=0.0"),
    "fine": ("codec=upsampled", *TOLD, "network.cond_noise=0.5", "network.cond_dropout=0.2"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three runs on digits of 8 × 8; those that are told something are told the class, too."""
    folder = tmp_path_factory.mktemp("cascade")
    for name, words in STAGES.items():
        done = command(
            "train",
            *COMMON,
            *FAST,
            *SMALL,
            "trainer.images=128",
            "evaluate_at_end=false",
            *words,
            f"out={name}",
            cwd=folder,
        )
        assert done.code == 0, done.err
    return folder


def test_a_cascade_draws_by_seeds_and_keeps_its_low_resolution(place: Path) -> None:
    """The command and Python draw the same; the integers of the low resolution are kept."""
    done = command("sample", *DRAWN, "then=details", "cond.label=3", "out=drawn", cwd=place)
    assert done.code == 0, done.err
    made = np.load(place / "drawn" / "samples.npz")
    record = json.loads((place / "drawn" / "summary.json").read_text())
    assert made["ddim"].shape == (6, 1, 8, 8) and made["labels"].tolist() == [3] * 6
    assert set(record["residual"]["ddim"].values()) == {0.0} and record["cost"]["ddim"]["nfe"] == 8
    cascade = scoresde.load([place / "low", place / "details"])
    how = {"sampler": scoresde.Sampler(scoresde.DDIM(), steps=3), "cond": 3, "progress": False}
    again = cascade.sample(6, rng=scoresde.Rng(seeds=range(6)), **how)
    apart = (again.int() - torch.from_numpy(made["ddim"]).int()).abs()
    assert int(apart.max()) <= 1 and float((apart > 0).double().mean()) < 0.02  # a value on the edge of its bin


def test_a_command_that_was_stopped_goes_on_in_the_stage_it_had(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (*DRAWN, "then=details", "out=stopped")
    job, made = Drawing.job, list[str]()

    def until_the_second(self, denoiser, sampler, name="samples"):
        if name.startswith("stage-2"):
            raise KeyboardInterrupt
        return job(self, denoiser, sampler, name)

    monkeypatch.setattr(Drawing, "job", until_the_second)
    assert command("sample", *words, cwd=place).code == 130
    kept = sorted((place / "stopped" / "batches" / "stage-1-ddim").glob("*.safetensors"))
    times = [path.stat().st_mtime_ns for path in kept]
    assert len(kept) == 2

    def noted(self, denoiser, sampler, name="samples"):
        made.extend(name for path, time in zip(kept, times, strict=True) if path.stat().st_mtime_ns == time)
        return job(self, denoiser, sampler, name)

    monkeypatch.setattr(Drawing, "job", noted)
    assert command("sample", *words, cwd=place).code == 0
    assert made.count("stage-2-ddim") == 2  # both batches of the first stage are the old ones
    monkeypatch.setattr(Drawing, "job", job)
    assert command("sample", *DRAWN, "then=details", "out=whole", cwd=place).code == 0
    one, other = (np.load(place / name / "samples.npz")["ddim"] for name in ("stopped", "whole"))
    assert np.array_equal(one, other)


def test_the_likelihood_of_a_cascade_is_that_of_its_stages_together(place: Path) -> None:
    """The same points and dequantisation; probes differ, and 8 points of small networks are held to 5 errors."""
    found = {}
    for name, words in {"low": ["run=low"], "details": ["run=details"], "both": ["run=low", "then=details"]}.items():
        done = command("likelihood", *words, "n=8", *FAST[3:], "logger=jsonl", f"out=bits/{name}", cwd=place)
        assert done.code == 0, done.err
        found[name] = json.loads((place / "bits" / name / "likelihood.json").read_text())
    values = {name: np.load(place / "bits" / name / "bits_per_dim.npz") for name in found}
    apart = values["both"]["bits_per_dim"] - values["low"]["bits_per_dim"] - values["details"]["bits_per_dim"]
    error = np.sqrt(sum(values[name]["stderr"] ** 2 for name in found))
    assert found["both"]["points"] == 8
    rough = ("likelihood=bound", "likelihood.solver.rtol=0.05", "likelihood.solver.atol=0.05")
    done = command("likelihood", "run=low", "then=details", "n=2", *rough, "logger=jsonl", "out=bound", cwd=place)
    assert done.code == 0, done.err  # integers are of each stage by itself
    assert bool((np.abs(apart) < 5 * error + 1e-3).all())


def test_the_published_form_draws_under_guidance_and_has_no_likelihood(place: Path) -> None:
    words = (*DRAWN, "then=fine", "stage.guidance=[null,2]", "stage.level=0.3", "out=fine-drawn")
    done = command("sample", *words, cwd=place)
    assert done.code == 0, done.err
    assert np.load(place / "fine-drawn" / "samples.npz")["ddim"].shape == (6, 1, 8, 8)
    done = command("likelihood", "run=low", "then=fine", "n=4", *FAST[3:], "out=no", cwd=place)
    assert done.code == 1 and "no exact likelihood" in done.err and not (place / "no").exists()
    done = command("sample", *DRAWN, "then=fine", "stage.level=0.7", "out=no", cwd=place)
    assert done.code == 1 and "up to cond_noise=0.5" in done.err and not (place / "no").exists()


def test_the_report_of_a_cascade(place: Path) -> None:
    words = ("run=low", "then=details", "evaluation.samples=4", "evaluation.points=4", "evaluation.pictures=false")
    done = command("evaluate", *words, *FAST, "out=report", cwd=place)
    assert done.code == 0, done.err
    record = json.loads((place / "report" / "summary.json").read_text())
    assert record["samplers"][0]["nfe"] == 8 and record["bits_per_dim"]["points"] == 4
    assert np.load(place / "report" / "samples.npz")["ddim"].shape == (4, 1, 8, 8)


@pytest.mark.parametrize(
    "words, said",
    [
        (("then=nowhere",), "nowhere"),
        (("then=low",), "is told no image"),
        (("then=[]",), "a list from coarse to fine"),
        (("then=details", "problem=inpaint", "input=test:0", "mask=hole:0-1x0-1"), "problem= is of one model"),
        (("then=details", "stage.guidance=[1,2,3]"), "a list of 2"),
        (("then=details", "guidance=cfg"), "guidance=cfg"),
    ],
)
def test_stages_that_do_not_fit_are_refused_before_anything_is_drawn(place: Path, words, said: str) -> None:
    done = command("sample", *DRAWN, *words, "out=refused", cwd=place)
    assert done.code == 1 and said in done.err and not (place / "refused").exists()
