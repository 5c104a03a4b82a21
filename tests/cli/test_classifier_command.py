"""Classifiers and energies as they are typed: what the command makes is what the library makes; mistakes are told."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import PLAIN, TINY, command, sampled
from torch import Tensor

import scoresde.cli.guided
from scoresde import (
    DDIM,
    Classifier,
    ClassifierLoss,
    Denoiser,
    Energy,
    Mask,
    Observation,
    PiGDM,
    Replacement,
    Rng,
    Sampler,
    UniformGrid,
)
from scoresde.cli.conditions import choose_cond
from scoresde.cli.guided import build_guidance
from scoresde.config import ConfigError
from scoresde.data import Dataset
from scoresde.runs.load import load_run
from scoresde.runs.logger import read_rows
from scoresde.runs.run import Run

# the grid on which networks that were trained for moments do not end at the edge of the data
DRAW = ("sampler=ddim", "sampler.steps=4", "grid=uniform", "pictures=false", "threads=1")
drawn = partial(sampled, DRAW)
SAMPLER = Sampler(DDIM(), UniformGrid(), steps=4)
TRAIN = tuple(option for option in TINY if not option.startswith(("data", "network=", "trainer.images")))
POINTS = (
    "data=arrays",
    "data.path={folder}/x.npz",
    "data.key=x",
    "data.label_key=y",
    "data.raw_low=-3",
    "data.raw_high=3",
)
JUDGE = ("network=classifier", "denoiser=classifier", "loss=classifier", "conditional=true", "evaluate_at_end=false")
ENERGIES = """
import torch

class Far(torch.nn.Module):
    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = weight

    def forward(self, x, t, cond):
        return self.weight * (x[:, 0] - 1).square()

def up(x, t, cond):
    return -x[:, 1] * (1 if cond is None else cond)

def matrix(x, t, cond):
    return x
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Points of three classes, and runs trained for moments: `free` without labels, `told` with them, and the
    classifiers `judge`, and `ve` of another process.
    """
    folder, generator = tmp_path_factory.mktemp("classifier"), np.random.default_rng(0)
    y = generator.integers(0, 3, 300)
    corners = np.array([[-1, -1], [1, -1], [0, 1]])
    np.savez(folder / "x.npz", x=corners[y] + 0.3 * generator.standard_normal((300, 2)).clip(-3, 3), y=y)
    np.save(folder / "mask.npy", np.array([1, 0]))
    data = [word.format(folder=folder) for word in POINTS]
    common = (*TRAIN, *PLAIN, *data, "optim.lr=0.01", "sigma_data=0.4", "trainer.checkpoint_every=10000",
              "trainer.log_every=10000")  # fmt: skip
    model = ("network=mlp", "trainer.images=1280", "evaluate_at_end=false")
    for words in (
        (*model, "out=free"), (*model, "conditional=true", "network.cond_dropout=0.3", "out=told"),
        (*JUDGE, "network.width=16", "trainer.images=6400", "trainer.evaluate_every=3200", "out=judge"),
        (*JUDGE, "sde=ve", "trainer.images=64", "out=ve"),
    ):  # fmt: skip
        done = command("train", *common, *words, cwd=folder)
        assert done.code == 0, done.err
    (folder / "energies_of_mine.py").write_text(ENERGIES)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("energies_of_mine", None)


@pytest.fixture(scope="module")
def free(folder: Path) -> Run:
    return load_run(folder / "free")


@pytest.fixture(scope="module")
def told(folder: Path) -> Run:
    return load_run(folder / "told")


@pytest.fixture(scope="module")
def judge(folder: Path) -> Run:
    return load_run(folder / "judge")


def made(denoiser: Denoiser, dataset: Dataset, n: int, cond: Tensor | None) -> np.ndarray:
    return dataset.decode(SAMPLER(denoiser, (n, 2), cond=cond, rng=Rng(seeds=range(n)))).numpy()


def test_a_classifier_is_a_run_of_its_own(folder: Path, judge: Run) -> None:
    """It learns; cross-entropy and share of right answers, of averaged weights, to the last digit; and no bits/dim."""
    rows = [row for row in read_rows(folder / "judge" / "metrics.jsonl") if "eval/loss" in row]
    assert len(rows) == 3 and not any("bpd" in key or "nfe" in key for row in rows for key in row)
    split, rng = judge.dataset.test, Rng(0)
    loss = ClassifierLoss(judge.denoiser)
    x0 = judge.dataset.encode(split.raw, rng)
    t, _ = loss.times.sample(judge.denoiser.sde, len(split), rng, x0.device)
    logits = judge.denoiser.logits(judge.denoiser.sde.perturb(x0, t, rng.normal_like(x0)), t)
    exact = -logits.log_softmax(1)[torch.arange(len(split)), split.labels].mean()
    assert rows[-1]["eval/loss"] == pytest.approx(float(exact), rel=1e-6)
    right = float((logits.argmax(1) == split.labels).double().mean())
    assert rows[-1]["eval/accuracy"] == pytest.approx(right) and right > 0.6
    # ln 3 is what nothing learned costs
    assert rows[-1]["eval/loss"] < 0.8 < np.log(3)


def test_an_unconditional_model_is_guided_to_a_label(folder: Path, free: Run, judge: Run) -> None:
    """Classifier(P, log p(y|x_t)), to the bit; what classes there are says the classifier's run, and each is drawn in
    turn where none is given.
    """
    guided = Classifier(free.denoiser, judge.denoiser, 2.0)
    words = ("run=free", "guidance=classifier", "guide=judge", "guidance.scale=2")
    arrays = drawn(folder, "one", *words, "cond.label=1", "n=6")
    assert np.array_equal(arrays["ddim"], made(guided, free.dataset, 6, torch.ones(6).long()))
    assert arrays["labels"].tolist() == [1] * 6
    record = json.loads((folder / "one" / "summary.json").read_text())
    assert record["guide"] == "judge" and record["guidance"]["scale"] == 2 and record["cost"]["ddim"]["nfe"] == 5
    arrays = drawn(folder, "turn", *words, "n=7", "batch_size=7")
    assert np.array_equal(arrays["ddim"], made(guided, free.dataset, 7, torch.arange(7) % 3))
    assert arrays["labels"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    plain = made(free.denoiser, free.dataset, 7, None)
    assert np.abs(plain - arrays["ddim"]).max() > 0.1
    none = drawn(folder, "zero", *words[:3], "guidance.scale=0", "n=7")
    assert np.array_equal(none["ddim"], plain)


def test_a_conditional_model_is_told_the_label_or_not(folder: Path, told: Run, judge: Run) -> None:
    y = torch.arange(6) % 3
    for index, flag in enumerate((False, True)):
        words = ("run=told", "guidance=classifier", "guide=judge", f"guidance.conditional={flag}", "n=6")
        guided = Classifier(told.denoiser, judge.denoiser, 1.0, conditional=flag)
        assert np.array_equal(drawn(folder, f"told{index}", *words)["ddim"], made(guided, told.dataset, 6, y))
    assert np.abs(np.load(folder / "told0/samples.npz")["ddim"] - made(guided, told.dataset, 6, y)).max() > 1e-3


def test_a_problem_is_solved_under_the_label(folder: Path, free: Run, judge: Run) -> None:
    """PiGDM(Classifier(P)), and a step around the sampler's, whose last denoising hears the label and not y."""
    words = ("run=free", "problem=inpaint", "mask=mask.npy", "problem.std=0.1", "input=[test:3,test:8]",
             "guidance=classifier", "guide=judge", "n=4")  # fmt: skip
    guided, y = Classifier(free.denoiser, judge.denoiser), torch.tensor([0, 2, 0, 2])
    both = {"pigdm": ("posterior=pigdm",), "replacement": ("posterior=replacement",)}
    for name, posterior in both.items():
        arrays = drawn(folder, name, *words, *posterior, "cond.label=[0,2]")
        assert arrays["samples"].shape == (2, 4, 2)
        slope = 1 / 3
        for given, samples in zip(arrays["given"], arrays["samples"], strict=True):
            measured = torch.from_numpy(given).nan_to_num().float() * slope
            observation = Observation(measured, Mask(torch.tensor([1, 0])), 0.1)
            if name == "pigdm":
                method, sampler = PiGDM(guided, observation), SAMPLER
            else:
                method, sampler = guided, Sampler(Replacement(DDIM(), observation), UniformGrid(), steps=4)
            x = sampler(method, (4, 2), cond=y, rng=Rng(seeds=range(4)))
            # y has been to raw units and back, in other batches
            np.testing.assert_allclose(samples, free.dataset.decode(x).numpy(), rtol=0, atol=1e-4)


def test_an_energy_of_ones_own(folder: Path, free: Run, told: Run) -> None:
    """An object with parameters of its own, a function; of x_t and of x̂_0; told the label or not: to the bit."""
    import energies_of_mine as mine

    words = ("guidance=energy", "allow_targets=[energies_of_mine.Far,energies_of_mine.up]", "n=4")
    far = "guidance.energy={_target_: energies_of_mine.Far, weight: 2.0}"
    up = "guidance.energy={_target_: energies_of_mine.up, _partial_: true}"
    arrays = drawn(folder, "far", "run=free", *words, far, "guidance.scale=0.5", "guidance.of=x0")
    expected = made(Energy(free.denoiser, mine.Far(2.0), 0.5, of="x0"), free.dataset, 4, None)
    assert np.array_equal(arrays["ddim"], expected)
    y = torch.tensor([0, 2, 0, 2])
    for flag in (True, False):
        arrays = drawn(folder, f"up{flag}", "run=told", *words, up, "cond.label=[0,2]", f"guidance.conditional={flag}")
        expected = made(Energy(told.denoiser, mine.up, conditional=flag), told.dataset, 4, y)
        assert np.array_equal(arrays["ddim"], expected) and arrays["labels"].tolist() == y.tolist()


WRONG = {
    "sample run=judge": "run=judge is a classifier, of which there are no samples and no likelihood. It guides",
    "evaluate run=judge": "run=judge is a classifier",
    "likelihood run=judge": "scoresde-sample run=… guidance=classifier guide=judge cond.label=…",
    "sample run=free guidance=classifier": "needs a classifier, the folder of a run: guide=runs/judge; got None",
    "sample run=free guidance=classifier guide=told":
        "needs a classifier, and guide=told is a model of samples. One is trained by experiment=digits_classifier",
    "sample run=told guidance=auto guide=judge":
        "needs a weaker model, and guide=judge is a classifier. Did you mean guidance=classifier?",
    "sample run=free guidance=classifier guide=ve":
        "guidance: A denoiser and its guides .* the same SDE; got VPSDE .* VESDE",
    "sample run=free guidance=classifier guide=judge cond.label=3": "cond.label is a class 0 … 2, or a list; got 3",
    "sample run=free guidance=classifier guide=judge cond.vector=[1]":
        "judge was trained with a class 0 … 2, and no vector",
    "sample run=free guidance=classifier guide=judge guidance.conditional=true":
        "guidance.conditional=true tells free, too, which was trained without conditions",
    "sample run=free guidance=classifier guide=judge problem=inpaint mask=mask.npy input=test:0":
        "judge was never trained without a label; say which: cond.label=",
    "sample run=free guidance=energy": "guidance.energy has no value yet",
    "sample run=free guidance=energy guidance.energy=energies_of_mine.Far":
        "guidance.energy is a mapping with _target_; got 'energies_of_mine.Far'",
    "sample run=free guidance=energy guidance.energy={_target_:energies_of_mine.Far}":
        "allow_targets=[energies_of_mine.Far]",
    "sample run=free guidance=energy guidance.energy={_target_:energies_of_mine.matrix,_partial_:true} "
    "allow_targets=[energies_of_mine.matrix]": "guidance: One number per sample is expected, (2,); got shape (2, 2)",
    "train network=classifier denoiser=classifier DATA evaluate_at_end=false conditional=true":
        "scoresde.DenoisingLoss does not train a scoresde.NoisyClassifier. A classifier takes network=classifier,",
    "train loss=classifier network=mlp DATA evaluate_at_end=false conditional=true":
        "scoresde.ClassifierLoss does not train a scoresde.Preconditioned.",
    "train experiment=digits_classifier conditional=false": "learns labels, which conditional=true tells it",
    "train experiment=digits_classifier evaluate_at_end=true": "measured by its held-out loss: evaluate_at_end=false",
    "train experiment=digits_classifier trainer.sample_every=100": "trainer.sample_every=0",
}  # fmt: skip


@pytest.mark.parametrize("words", WRONG)
def test_what_is_wrong_is_told_and_leaves_no_folder(words: str, folder: Path) -> None:
    before = {path.name for path in folder.iterdir()}
    name, *typed = words.replace("DATA", " ".join(POINTS).format(folder=folder)).split()
    done = command(name, *(DRAW if name == "sample" else ()), *typed, "out=wrong", cwd=folder)
    lines = done.err.strip().splitlines()
    assert done.code == 1 and lines[-1].startswith("error: ") and "Traceback" not in done.err, done.err
    assert all(part.strip() in lines[-1] for part in WRONG[words].split(".*")), done.err
    assert {path.name for path in folder.iterdir()} == before


def test_guides_that_do_not_fit_are_refused(
    folder: Path, free: Run, told: Run, judge: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other samples, other units, other classes; and a model that cannot be asked without its label."""
    node = {"_target_": "scoresde.Classifier", "scale": 1.0, "conditional": True}
    options = {"guidance": node, "guide": "judge", "device": "cpu"}

    def found(run: Run, guide: Run, **changed: bool) -> str:
        monkeypatch.setattr(scoresde.cli.guided, "load_run", lambda *args, **kwargs: guide)
        with pytest.raises(ConfigError) as caught:
            build_guidance(options | {"guidance": node | changed}, run, [])
        return str(caught.value)

    data = judge.dataset
    wide = replace(data, codec=replace(data.codec, raw_high=4.0))
    assert "guide=judge has data scaled by Scaling(" in found(told, replace(judge, dataset=wide))
    longer = replace(data, train=replace(data.train, raw=data.train.raw.repeat(1, 2)),
                     test=replace(data.test, raw=data.test.raw.repeat(1, 2)))  # fmt: skip
    assert "samples of shape (4,), and" in found(told, replace(judge, dataset=longer), conditional=False)
    more = replace(data, classes=4)
    assert "has the conditions {'label': 'a class 0 … 3'}" in found(told, replace(judge, dataset=more))
    always = replace(told, config=told.config | {"network": told.config["network"] | {"cond_dropout": 0.0}})
    assert "tell it, too, guidance.conditional=true" in found(always, judge, conditional=False)
    monkeypatch.setattr(scoresde.cli.guided, "load_run", lambda *args, **kwargs: judge)
    assert build_guidance(options, always, []).conditioned is always
    # a label for the classifier alone has the classes of the classifier's data
    assert build_guidance(options | {"guidance": node | {"conditional": False}}, free, []).conditioned is judge
    cond, _ = choose_cond(dict.fromkeys(("label",)), 4, judge)
    assert isinstance(cond, Tensor) and cond.tolist() == [0, 1, 2, 0]
