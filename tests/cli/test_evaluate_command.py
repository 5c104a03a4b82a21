"""scoresde-evaluate as it is typed: a metric of one's own, another run beside, and a run whose data are gone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from commands import PLAIN, TINY, command

OWN = """
def gap(made, held_out, train, *, power=1.0):
    assert made.shape[1:] == held_out.shape[1:] == train.shape[1:] == (2,)
    return float(abs(made.mean() - held_out.mean()) ** power)
"""


@pytest.fixture(scope="module")
def cwd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained run of 200 points in a file, and a metric in another."""
    folder = tmp_path_factory.mktemp("evaluate")
    np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(200, 2)).astype(np.float32))
    (folder / "mine.py").write_text(OWN)
    words = [word for word in TINY if not word.startswith("data")]
    data = ("data=arrays", "data.path=x.npy", "data.test_fraction=0.25", "data.raw_low=-5", "data.raw_high=5")
    done = command("train", *data, *words, *PLAIN, "evaluate_at_end=false", "out=run", cwd=folder)
    assert done.code == 0, done.err
    return folder


PLAINLY = ("run=run", "sampler=ddim", "sampler.steps=4", "evaluation.points=4", "evaluation.samples=50", "threads=1",
           "likelihood=budget", "likelihood.solver.calls=16", "evaluation.pictures=false")  # fmt: skip


def test_a_metric_from_a_file_and_another_run(cwd: Path) -> None:
    """The other run is the same one: the same samples, the same numbers, and a difference of 0 with no error."""
    mine = ("+metrics.gap._target_=mine.gap", "+metrics.gap.power=2.0", "allow_targets=[mine.gap]")
    done = command("evaluate", *PLAINLY, *mine, "versus=run", "evaluation.rank_by=gap", "out=own", cwd=cwd)
    assert done.code == 0, done.err
    summary = json.loads((cwd / "own" / "summary.json").read_text())
    scores = summary["scores"]
    assert list(scores) == ["ddim", "ddim@run", "(training data)"] and scores["ddim"].keys() >= {"gap", "kernel"}
    other = scores["ddim@run"]["gap"]
    assert (other["value"], other["minus_best"], other["minus_best_stderr"]) == (scores["ddim"]["gap"]["value"], 0, 0)
    assert summary["protocol"]["settings"]["gap"] == {"_target_": "mine.gap", "power": 2.0}
    assert "gap − ddim" in done.out and "@run is the run run" in done.out and len(summary["noise_levels"]) == 8
    refused = command("evaluate", *PLAINLY, "evaluation.points=51", "out=no", cwd=cwd)
    assert refused.code == 1 and "evaluation.points is between 1 and the 50 points" in refused.err
    refused = command("evaluate", *PLAINLY, "metrics=vectors", "evaluation.samples=30", "out=no", cwd=cwd)
    assert refused.code == 1 and not (cwd / "no").exists()
    assert "evaluation.samples=30 and 50 held-out points" in refused.err and "'~metrics.kernel'" in refused.err


def test_without_the_data_the_run_folder_is_enough(cwd: Path) -> None:
    (cwd / "x.npy").rename(cwd / "gone.npy")
    done = command("evaluate", *PLAINLY, "out=moved", cwd=cwd)
    assert done.code == 0, done.err
    assert "keeps 50 of the 50 held-out samples, which are measured" in done.out + done.err
    assert "Not measured: metrics.memorisation" in done.out
    scores = json.loads((cwd / "moved" / "summary.json").read_text())["scores"]
    assert list(scores) == ["ddim"] and set(scores["ddim"]) == {
        "sliced-W2", "kernel", "precision", "recall", "density", "coverage",
    }  # fmt: skip
