"""A run folder of an older version goes on: it is resumed, sampled and measured to the numbers of then.

tests/data/run-8d13689 was made by scoresde-train at that commit, when its `_target_` names were others
(`scoresde.loss.…`, `scoresde.coupling.…`, `scoresde.train.OdeLikelihood`); run-8d13689.json is what that commit made of
it, with the noise of then, which the tests bring along. The tolerance of 1e-4 is for other processors and builds of
torch, whose float32 sums differ by 1e-7 and are carried through four optimizer steps or some hundred network calls; on
one machine the numbers are equal.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import old_noise
import pytest
from commands import PLAIN, TINY, command, rows, sampled

from scoresde.cli._hydra import _say_once

DATA = Path(__file__).parents[1] / "data"
THEN = json.loads((DATA / "run-8d13689.json").read_text(encoding="utf-8"))
TRAINED = (*TINY, *PLAIN, "parameterization=edm", "loss=edm", "sigma_data=0.7", "evaluate_at_end=false", "resume=auto")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    shutil.copytree(DATA / "run-8d13689", tmp_path / "run")
    return tmp_path


@pytest.fixture
def noise_of_then(monkeypatch: pytest.MonkeyPatch) -> None:
    old_noise.use(monkeypatch)


def test_it_says_that_its_noise_is_another(old: Path) -> None:
    _say_once.cache_clear()  # what was said is not said again in this process
    done = command("train", *TRAINED, "out=run", cwd=old)
    assert done.code == 0 and "run at step 6." in done.out, done.err
    assert re.search("Note: .*version 1 of the noise.* of another stream", done.out), done.out


@pytest.mark.usefixtures("noise_of_then")
def test_it_is_resumed(old: Path) -> None:
    done = command("train", *TRAINED, "out=run", cwd=old)
    assert done.code == 0 and "run at step 6." in done.out, done.err
    losses = {str(row["step"]): row["train/loss"] for row in rows(old / "run") if "train/loss" in row}
    assert {step: losses[step] for step in THEN["losses"]} == pytest.approx(THEN["losses"], rel=1e-4)


def test_another_configuration_is_still_refused(old: Path) -> None:
    done = command("train", *TRAINED, "loss.weighting.sigma_data=0.6", "out=run", cwd=old)
    assert done.code == 1 and "was made with loss.weighting.sigma_data=0.7" in done.err, done.err


@pytest.mark.usefixtures("noise_of_then")
def test_it_is_sampled(old: Path) -> None:
    made = sampled(["run=run", "threads=1", "sampler=pc", "sampler.steps=5"], old, "drawn", "n=6")
    np.testing.assert_allclose(made["pc"], THEN["samples"]["pc"], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("noise_of_then")
def test_it_is_measured(old: Path) -> None:
    tolerances = ("likelihood=hutchinson", "likelihood.solver.rtol=1e-4", "likelihood.solver.atol=1e-4")
    done = command("likelihood", "run=run", "n=6", "threads=1", *tolerances, "out=measured", cwd=old)
    assert done.code == 0, done.err
    found = json.loads((old / "measured" / "likelihood.json").read_text(encoding="utf-8"))
    assert found["mean"] == pytest.approx(THEN["bits_per_dim"], rel=1e-4)
    assert found["stderr"] == pytest.approx(THEN["stderr"], rel=1e-3)
