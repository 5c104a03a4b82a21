"""scoresde-fit and scoresde-sample budget=: fitted samplers are kept with a run, used for what they were fitted to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import PLAIN, TINY, Done, command
from together import together

import scoresde.cli.fit
import scoresde.cli.train
from scoresde import Rng, default_sampler, load
from scoresde.diffusion.denoiser import CountingDenoiser
from scoresde.runs.load import load_run
from scoresde.runs.samplers import Model, recall

QUICK = ("samples=16", "calls=40", "threads=1")
DRAW = ("n=4", "pictures=false", "threads=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run`, trained with a sampler of 3 calls at its end, and then fitted for 4."""
    folder = tmp_path_factory.mktemp("fit")
    train = command("train", *TINY, *PLAIN, "evaluate_at_end=false", "fit=[3]", "out=run", cwd=folder)
    assert train.code == 0, train.err
    assert "Fitting a sampler of 3 calls, by about 1,484 calls on batches of 512" in train.out
    fit = command("fit", "run=run", "budgets=[4]", *QUICK, cwd=folder)
    assert fit.code == 0 and "4 calls, " in fit.out and "± " in fit.out, fit.err
    return folder


def test_what_was_fitted_is_what_samples(folder: Path) -> None:
    """The arrays of `budget=3` are those of the stored sampler in Python, from the same seeds, in three calls."""
    done = command("sample", "run=run", "budget=3", *DRAW, "out=three", cwd=folder)
    assert done.code == 0 and "3 calls by the fitted sampler" in done.out, done.err
    run = load_run(folder / "run")
    sampler, _ = recall(folder / "run", Model(run.digest, "ema", None, None, []), 3, run.denoiser, (2,))
    made = sampler(run.denoiser, (4, 2), rng=Rng(seeds=range(4)))
    expected = run.dataset.decode(made).numpy()
    np.testing.assert_allclose(np.load(folder / "three" / "samples.npz")["budget-3"], expected, rtol=1e-6)
    summary = json.loads((folder / "three" / "summary.json").read_text())
    assert summary["cost"]["budget-3"]["nfe"] == 3 and summary["samplers"]["budget-3"] == 3


def test_a_fit_stands_beside_the_others_and_in_place_of_itself(folder: Path) -> None:
    assert command("fit", "run=run", "budgets=[4]", "seed=1", *QUICK, cwd=folder).code == 0
    records = json.loads((folder / "run" / "samplers.json").read_text())["samplers"]
    assert [record["budget"] for record in records] == [3, 4]


def trained(folder: Path) -> Done:
    """One of several processes; the fit is quick because samples and calls of the recipe are cut."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (scoresde.cli.train, scoresde.cli.fit):
            patch.setattr(module, "samples_for", lambda shape: 16)
        options = (*TINY, *PLAIN, "evaluate_at_end=false", "trainer.images=128", "fit=[3]", "out=run")
        return command("train", *options, cwd=folder)


def test_several_processes_fit_one_sampler_at_their_end(tmp_path: Path) -> None:
    first, second = together(trained, tmp_path)
    assert first.code == second.code == 0, first.err + second.err
    assert "Fitting a sampler of 3 calls" in first.out and "Fitting" not in second.out
    run = load(tmp_path / "run")
    (record,) = json.loads((tmp_path / "run" / "samplers.json").read_text())["samplers"]
    assert (record["budget"], record["checkpoint"], record["cond"]) == (3, run.digest, [])
    said = recall(run.folder, Model(run.digest, "ema", None, None, []), 3, run.denoiser, (2,))[1]
    assert "none is fitted" not in said


def test_under_guidance_one_is_fitted_for_that_guidance_alone(tmp_path: Path) -> None:
    """By the command, and used by the command and in Python; at another scale one is chosen by trial."""
    data = torch.arange(300) % 3
    np.savez(tmp_path / "data.npz", x=(data[:, None] * torch.tensor([1.0, -1.0]) / 3).numpy(), y=data.numpy())
    done = command(
        "train", *(option for option in TINY if not option.startswith("data")), *PLAIN, "data=arrays", "data.key=x",
        f"data.path={tmp_path}/data.npz", "data.label_key=y", "data.raw_low=-1", "data.raw_high=1", "conditional=true",
        "network.cond_dropout=0.3", "evaluate_at_end=false", "out=run", cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    guided = ("guidance=cfg", "guidance.scale=2")
    done = command("fit", "run=run", "budgets=[3]", *guided, *QUICK, cwd=tmp_path)
    assert done.code == 0 and "3 calls, " in done.out, done.err
    (record,) = json.loads((tmp_path / "run" / "samplers.json").read_text())["samplers"]
    assert record["guidance"]["scale"] == 2 and record["cond"] == ["label"]
    done = command("sample", "run=run", "budget=3", *guided, *DRAW, "cond.label=1", "out=guided", cwd=tmp_path)
    assert done.code == 0 and "none is fitted" not in done.out, done.err
    run = load(tmp_path / "run")
    how = {"cond": 1, "budget": 3, "progress": False}
    mine = run.sample(4, **how, guidance=2.0, rng=Rng(seeds=range(4)))
    np.testing.assert_allclose(np.load(tmp_path / "guided" / "samples.npz")["budget-3"], mine, rtol=1e-5)
    model = Model(run.digest, "ema", run.guidance_node(2.0), None, ["label"])
    other = Model(run.digest, "ema", run.guidance_node(3.0), None, ["label"])
    labels = torch.tensor([0, 1])
    guided = run.guided(3.0)
    assert "none is fitted" not in recall(run.folder, model, 3, guided, (2,))[1] and not guided.trials
    assert "short trial on this model: none is fitted" in recall(run.folder, other, 3, guided, (2,), labels)[1]
    assert [use[2:] for use in guided.trials] == [("label",)]
    # a wrapper is made for each call, and what was tried with it is kept
    run.sample(2, cond=1, budget=4, guidance=3.0, progress=False)
    trials = run._guided_trials[repr(run.guidance_node(3.0))]
    before = dict(trials)
    run.sample(2, cond=1, budget=4, guidance=3.0, progress=False)
    assert list(trials.values()) == list(before.values()) and len(before) == 1


@pytest.mark.parametrize("options", [("budget=7",), ("budget=3", "weights=weights")], ids=["budget", "weights"])
def test_what_nothing_was_fitted_for_is_drawn_by_one_that_is_chosen_by_trial(folder: Path, options) -> None:
    done = command("sample", "run=run", *options, *DRAW, f"out=generic-{len(options)}", cwd=folder)
    assert done.code == 0, done.err
    assert (
        "in a short trial on this model: none is fitted for this budget and guidance (scoresde-fit run=run" in done.out
    )


def test_a_run_that_is_evaluated_and_not_fitted_chooses_samplers_by_trial(tmp_path: Path) -> None:
    """For 5, 10 and 20 calls, kept as fits are; drawing takes them, and no other calls."""
    done = command("train", *TINY, *PLAIN, "trainer.images=64", "out=run", cwd=tmp_path)
    assert done.code == 0 and "5 calls, " in done.out + done.err, done.err
    records = json.loads((tmp_path / "run" / "samplers.json").read_text())["samplers"]
    assert [record["budget"] for record in records] == [5, 10, 20]
    run = load(tmp_path / "run")
    assert all(record["checkpoint"] == run.digest and record["error"] <= record["generic"] for record in records)
    model = CountingDenoiser(run.denoiser)
    sampler, said = recall(run.folder, Model(run.digest, "ema", None, None, []), 5, model, (2,))
    sampler(model, (4, 2))
    assert model.evaluations == 5 and "none is fitted" not in said


def test_a_sampler_of_other_weights_is_refused(folder: Path) -> None:
    path = folder / "run" / "samplers.json"
    before = path.read_text()
    stored = json.loads(before)
    stored["samplers"][0]["checkpoint"] = "0" * 64
    del stored["sha256"]
    path.write_text(json.dumps(stored))
    try:
        done = command("sample", "run=run", "budget=3", *DRAW, "out=other", cwd=folder)
    finally:
        path.write_text(before)
    assert done.code == 1 and not (folder / "other").exists()
    assert "fitted to other weights" in done.err and "scoresde-fit run=run budgets=[3]" in done.err


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [[1.0], [1.0], ["x"]]},
        {"rows": [[1.0]]},
        {"log_snr": [1.0, 0.0, 2.0, 3.0]},
        {"log_snr": [-1.0, 0.0, 1.0], "rows": [[1.0], [1.0]]},
        {"error": None},
        {"data_std": -1.0},
        {"budget": "3"},
        {"error": 0.25},  # a number as good as any, but for the checksum
    ],
    ids=str,
)
def test_a_file_that_was_changed_is_refused(folder: Path, change) -> None:
    path = folder / "run" / "samplers.json"
    before = path.read_text()
    stored = json.loads(before)
    stored["samplers"][0] |= change
    if change != {"error": 0.25}:
        del stored["sha256"]  # as in a file of older versions
    path.write_text(json.dumps(stored))
    run = load_run(folder / "run")
    try:
        with pytest.raises(ValueError, match=r"samplers\.json|SHA-256|Fitted weights|rising|data_std|network calls"):
            recall(folder / "run", Model(run.digest, "ema", None, None, []), 3, run.denoiser, (2,))
    finally:
        path.write_text(before)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"samplers": [1]}', '{"samplers": [{}]}', "[" * 100_000])
def test_a_file_of_something_else_is_refused(folder: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "samplers.json").write_text(text)
    run = load_run(folder / "run")
    with pytest.raises(ValueError, match="is not a file of scoresde-fit"):
        recall(tmp_path, Model(run.digest, "ema", None, None, []), 3, run.denoiser, (2,))


def test_where_no_fitted_one_was_better_the_generic_one_is_recalled(folder: Path, tmp_path: Path) -> None:
    stored = json.loads((folder / "run" / "samplers.json").read_text())
    stored["samplers"][0] |= {"log_snr": None, "rows": None, "data_std": None}
    del stored["sha256"]
    (tmp_path / "samplers.json").write_text(json.dumps(stored))
    run = load_run(folder / "run")
    sampler, said = recall(tmp_path, Model(run.digest, "ema", None, None, []), 3, run.denoiser, (2,))
    generic = default_sampler(run.denoiser, 3)
    assert (
        torch.equal(sampler(run.denoiser, (4, 2)), generic(run.denoiser, (4, 2))) and "which no fitted one beat" in said
    )


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("fit", ("budgets=5",), "A list of budgets is numbers of network calls, as in [5,10,20]; got 5"),
        ("fit", ("budgets=[5,0]",), "Each budget, a number of network calls, is a whole number of at least 1; got 0"),
        ("fit", ("samples=2",), "samples is a whole number of at least 8; got 2"),
        ("fit", ("calls=0",), "calls is a whole number of at least 1; got 0"),
        ("sample", ("budget=0",), "budget, the number of network calls, is a whole number of at least 1; got 0"),
        ("sample", ("budget=3", "sampler=ode"), "budget=3 chooses sampler and grid; leave sampler=ode or budget= away"),
        ("train", ("fit=10", *TINY, *PLAIN), "A list of budgets is numbers of network calls, as in [5,10,20]; got 10"),
        ("train", ("experiment=digits_classifier", "fit=[3]"), "A classifier draws no samples"),
    ],
)
def test_what_cannot_be_fitted_is_refused(folder: Path, name, options, words) -> None:
    run = () if name == "train" else ("run=run",)
    done = command(name, *run, *options, *([] if name == "fit" else ["out=refused"]), cwd=folder)
    assert done.code == 1 and words in done.err and not (folder / "refused").exists()
