"""Guidance and labels as they are typed: what the command makes is what the library makes, and mistakes are told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import PLAIN, TINY, command, sampled
from torch import Tensor

from scoresde import (
    DDIM,
    Auto,
    ClassifierFree,
    Mask,
    Observation,
    PiGDM,
    Replacement,
    Rng,
    Sampler,
)
from scoresde.cli.conditions import choose_cond
from scoresde.cli.guided import build_guidance
from scoresde.config import ConfigError
from scoresde.evaluate.problem import Problem
from scoresde.inverse.observation import WithoutMeasurement
from scoresde.runs.load import load_run
from scoresde.runs.run import Run

DRAW = ("run=run", "sampler=ddim", "sampler.steps=4", "pictures=false", "threads=1")
drawn = partial(sampled, DRAW)
SAMPLER = Sampler(DDIM(), steps=4)
NOTHING = dict.fromkeys(("label", "vector", "image", "tokens"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A conditional run on the digits, trained for moments: enough for its labels to matter."""
    folder = tmp_path_factory.mktemp("guidance")
    options = [option for option in TINY if not option.startswith("data")]
    done = command(
        "train", *options, *PLAIN, "data=digits", "network.width=16", "conditional=true", "network.cond_dropout=0.3",
        "optim.lr=0.01", "evaluate_at_end=false", "out=run", cwd=folder,
    )  # fmt: skip
    assert done.code == 0, done.err
    yield folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return load_run(folder / "run")


def raw(run: Run, x: Tensor) -> np.ndarray:
    return run.dataset.decode(x).numpy()


def test_a_guided_label_is_what_the_library_makes(folder: Path, run: Run) -> None:
    """Seeds, label, scale, interval and rescale, to the bit; and all that was chosen is in summary.json."""
    made = drawn(
        folder, "guided", "guidance=cfg", "guidance.scale=3", "guidance.interval=[0.1,20]", "guidance.rescale=0.5",
        "cond.label=7", "n=6", "seed=2",
    )  # fmt: skip
    guided = ClassifierFree(run.denoiser, 3.0, interval=(0.1, 20.0), rescale=0.5)
    expected = SAMPLER(guided, (6, 1, 8, 8), cond=torch.full((6,), 7), rng=Rng(seeds=range(12, 18)))
    assert np.array_equal(made["ddim"], raw(run, expected)) and made["labels"].tolist() == [7] * 6
    plain = SAMPLER(run.denoiser, (6, 1, 8, 8), cond=torch.full((6,), 7), rng=Rng(seeds=range(12, 18)))
    assert float((plain - expected).abs().max()) > 0.1
    record = json.loads((folder / "guided" / "summary.json").read_text())
    assert record["guidance"]["scale"] == 3 and record["labels"] == [7] * 6
    # one batch of two branches is one call
    assert record["cost"]["ddim"]["nfe"] == 5


def test_scale_1_is_the_model_and_0_the_model_without_labels(folder: Path, run: Run) -> None:
    expected = {
        "guidance=none": torch.arange(12) % 10, "guidance=cfg guidance.scale=1": torch.arange(12) % 10,
        "guidance=cfg guidance.scale=0": None,
    }  # fmt: skip
    for index, (words, labels) in enumerate(expected.items()):
        made = drawn(folder, f"scale{index}", *words.split(), "n=12")
        x = SAMPLER(run.denoiser, (12, 1, 8, 8), cond=labels, rng=Rng(seeds=range(12)))
        assert np.array_equal(made["ddim"], raw(run, x)), words


def test_a_list_of_labels_is_gone_through_in_batches_of_any_size(folder: Path) -> None:
    whole = drawn(folder, "whole", "cond.label=[3,8,0]", "n=7", "guidance=cfg")
    assert whole["labels"].tolist() == [3, 8, 0, 3, 8, 0, 3]
    parts = drawn(folder, "parts", "cond.label=[3,8,0]", "n=7", "guidance=cfg", "batch_size=2")
    # decoded integers: round-off of another batch may move one by a level
    assert parts["labels"].tolist() == whole["labels"].tolist()
    assert np.abs(parts["ddim"].astype(int) - whole["ddim"].astype(int)).max() <= 1


def test_a_measurement_and_a_label_together(folder: Path, run: Run) -> None:
    """The posterior of the guided model: PiGDM(ClassifierFree(P)), of each input with all labels in turn."""
    mask = torch.arange(8) < 4  # the left half
    np.save(folder / "mask.npy", mask.expand(8, 8).numpy())
    words = ("problem=inpaint", "grid=own", "mask=mask.npy", "problem.std=0.1")
    made = drawn(
        folder, "both", *words, "input=[test:3,test:8]", "guidance=cfg", "guidance.scale=2", "cond.label=[5,6,7]",
        "n=4", "batch_size=3",
    )  # fmt: skip
    slope = 2 / 17
    ys = torch.from_numpy(made["given"]).nan_to_num() * slope + (-1 + slope / 2) * mask
    for y, samples in zip(ys, made["samples"], strict=True):
        method = PiGDM(ClassifierFree(run.denoiser, 2.0), Observation(y, Mask(mask.expand(1, 8, 8)), 0.1))
        x = SAMPLER(method, (4, 1, 8, 8), cond=torch.tensor([5, 6, 7, 5]), rng=Rng(seeds=range(4)))
        # y has been to raw units and back, in other batches
        assert np.abs(samples.astype(int) - raw(run, x).astype(int)).max() <= 1
        assert np.mean(samples == raw(run, x)) > 0.98
    # a step around the sampler's: the last denoising is told the label, and nothing of y
    made = drawn(folder, "step", *words, "input=test:3", "posterior=replacement", "cond.label=[5,6]", "n=4")
    seen = Observation(ys[0], Mask(mask.expand(1, 8, 8)), 0.1)
    x = Sampler(Replacement(DDIM(), seen), steps=4)(
        run.denoiser, (4, 1, 8, 8), cond=torch.tensor([5, 6, 5, 6]), rng=Rng(seeds=range(4))
    )
    assert np.mean(made["samples"][0] == raw(run, x)) > 0.98
    # and with no label at all
    free = drawn(folder, "free", *words, "input=test:3", "n=2")
    assert free["samples"].shape == (1, 2, 1, 8, 8) and np.array_equal(free["given"][0], made["given"][0], True)


def test_the_prior_beside_a_step_is_told_all_but_y(run: Run) -> None:
    x, t, labels = Rng(0).normal((2, 1, 8, 8)), torch.tensor(0.5), torch.tensor([3, 4])
    prior = WithoutMeasurement(run.denoiser, Observation(None, Mask(torch.ones(1, 8, 8))))
    for cond, told in (({"y": x, "cond": labels}, labels), ({"y": x}, None), (labels, labels), (None, None)):
        assert torch.equal(prior(x, t, cond).x0, run.denoiser(x, t, told).x0)
    assert float((run.denoiser(x, t, labels).x0 - run.denoiser(x, t).x0).abs().max()) > 1e-3


WRONG = {
    "cond.label=10": "cond.label is a class 0 … 9, or a list; got 10",
    "cond.label=-1": "cond.label is a class 0 … 9, or a list; got -1",
    "cond.label=[1,x]": "or a list; got [1, 'x']",
    "cond.label=[]": "or a list; got []",
    "cond.label=true": "or a list; got True",
    "cond.label=seven": "or a list; got 'seven'",
    "cond=7": "cond is a mapping with the keys label, .*, text, as in cond.label=7; or test:0-7 .*; got 7",
    "cond.lable=7": "Did you mean 'cond.label'?",
    "guidance=cgf": "There is no guidance=cgf. Did you mean 'cfg'?",
    "guidance=cfg guidance.scale=strong": "guidance.scale is a number or .*; got 'strong'",
    "guidance=cfg guidance.scale=inf": "guidance: A guidance scale is a finite number",
    "guidance=cfg guidance.rescale=2": "guidance: rescale is a share in [0, 1]; got 2",
    "guidance=cfg guidance.interval=[2,1]": "guidance: interval is (low, high)",
    "guidance=cfg +guidance.scael=2": "guidance.scael: .* Did you mean 'scale'?",
    "guidance=auto": "guidance=auto needs a weaker model, the folder of a run: guide=runs/weak; got None",
    "guidance=auto guide=lost": "lost holds no whole checkpoint",
    "guide=run": "guide=run is a weaker model of guidance=auto or a classifier of guidance=classifier",
    "guidance.scale=2": "There is no key 'guidance.scale'",
}


@pytest.mark.parametrize("words", WRONG)
def test_what_is_wrong_is_told_and_leaves_no_folder(words: str, folder: Path) -> None:
    before = {path.name for path in folder.iterdir()}
    done = command("sample", *DRAW, *words.split(), "out=wrong", cwd=folder)
    lines = done.err.strip().splitlines()
    assert done.code == 1 and lines[-1].startswith("error: ") and "Traceback" not in done.err, done.err
    assert all(part.strip() in lines[-1] for part in WRONG[words].split(".*")), done.err
    assert {path.name for path in folder.iterdir()} == before


def test_a_model_that_cannot_be_guided_is_refused(run: Run) -> None:
    cfg = {"_target_": "scoresde.ClassifierFree", "scale": 2.0}
    run.check_guidance(cfg)
    unconditional = replace(run, conditional=False)
    hole, event = torch.ones(1, 8, 8, dtype=torch.bool), (1, 1, 8, 8)
    problem = Problem(Observation(None, Mask(hole)), torch.zeros(event), hole, hole, torch.zeros(event), ["test:0"])
    always = replace(run, config=run.config | {"network": run.config["network"] | {"cond_dropout": 0.0}})
    with pytest.raises(ConfigError, match=r"was trained without\. Train with conditional=true"):
        unconditional.check_guidance(cfg)
    with pytest.raises(ConfigError, match=r"never was trained so \(network\.cond_dropout=0\)\. Train with"):
        always.check_guidance(cfg)
    for model in (unconditional, always):
        model.check_guidance({"_target_": "scoresde.Blend"})
    with pytest.raises(ConfigError, match=r"cond\.label=3: .* was trained without labels"):
        choose_cond(NOTHING | {"label": 3}, 4, unconditional)
    with pytest.raises(ConfigError, match="was never trained without a label; say which"):
        choose_cond(NOTHING, 4, always, problem=problem)
    assert choose_cond(NOTHING, 4, unconditional, problem=problem) == (None, "")


def test_a_weaker_run_can_guide(folder: Path, run: Run, monkeypatch) -> None:
    """The run's own first checkpoint: Auto(P, guide), to the bit, also in a class of one's own. A misfit is refused."""
    steps = sorted((folder / "run" / "checkpoints").iterdir())
    shutil.copytree(steps[0], folder / "weak" / "checkpoints" / steps[0].name)
    weak = load_run(folder / "weak")
    assert weak.step < run.step
    made = drawn(folder, "auto", "guidance=auto", "guide=weak", "guidance.scale=2.5", "cond.label=1", "n=3")
    x = SAMPLER(
        Auto(run.denoiser, weak.denoiser, 2.5), (3, 1, 8, 8), cond=torch.ones(3).long(), rng=Rng(seeds=range(3))
    )
    assert np.array_equal(made["ddim"], raw(run, x))
    (folder / "guidance_of_mine.py").write_text("from scoresde import Auto\n\n\nclass Mine(Auto):\n    pass\n")
    monkeypatch.syspath_prepend(folder)
    words = ("guidance=auto", "guidance._target_=guidance_of_mine.Mine", "allow_targets=[guidance_of_mine.Mine]")
    mine = drawn(folder, "mine", *words, "guide=weak", "guidance.scale=2.5", "cond.label=1", "n=3")
    assert np.array_equal(mine["ddim"], made["ddim"])
    options = {"guidance": {"_target_": "scoresde.Auto"}, "guide": str(folder / "weak"), "device": "cpu"}
    with pytest.raises(ConfigError, match=r"has conditional True, and .*run False; they have to agree"):
        build_guidance(options, replace(run, conditional=False), [])


def test_real_samples_beside_are_of_the_same_class(folder: Path, run: Run, monkeypatch) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr("scoresde.evaluate.figures.sample_grid", lambda made, real, path, sampler: seen.append(real))
    done = command("sample", *DRAW, "cond.label=4", "n=5", "pictures=true", "out=pictures", cwd=folder)
    assert done.code == 0, done.err
    test = run.dataset.test
    fours = test.raw[test.labels == 4]
    assert len(seen[0]) == 5 and all(bool((fours == x).flatten(1).all(1).any()) for x in seen[0])
