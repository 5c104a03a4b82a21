"""What `scoresde-train` leaves and what other commands make of it: best checkpoints, averages, failures, compile."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from commands import PLAIN, TINY, command, rows, same, weights

from scoresde.runs.checkpoint import best, latest
from scoresde.runs.posthoc import reconstruct
from scoresde.train.trainer import Trainer, TrainingDiverged

RUN = (*TINY, *PLAIN, "out=run")


def train(cwd: Path, *more: str) -> None:
    done = command("train", *RUN, *more, cwd=cwd)
    assert done.code == 0, done.err


def test_the_best_checkpoints_stay(tmp_path: Path) -> None:
    """Scores are the evaluations made where a checkpoint was written: the newest stays, and the lowest of them."""
    train(tmp_path, "trainer.evaluate_every=64", "trainer.checkpoint_every=64", "trainer.keep_last=1",
          "trainer.keep_best=2", "optim.lr=0.3")  # fmt: skip
    scores = {
        row["step"]: row["eval/loss"] for row in rows(tmp_path / "run") if "eval/loss" in row and not row.get("final")
    }
    lowest = sorted(scores, key=lambda step: scores[step])[:2]
    assert len(scores) == 10 and lowest[0] != 10
    kept = sorted(int(path.name[5:]) for path in (tmp_path / "run/checkpoints").glob("step-*"))
    assert kept == sorted({10, *lowest})
    found = best(tmp_path / "run/checkpoints")
    assert found is not None and found.step == lowest[0]
    done = command("sample", "run=run", "checkpoint=best", "n=4", "pictures=false", *PLAIN[1:], "out=s", cwd=tmp_path)
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "s/summary.json").read_text())["step"] == lowest[0]


def test_no_score_is_no_best(tmp_path: Path) -> None:
    train(tmp_path)
    done = command("sample", "run=run", "checkpoint=best", "n=4", *PLAIN[1:], "out=s", cwd=tmp_path)
    assert done.code == 1 and "trainer.keep_best" in done.err and not (tmp_path / "s").exists()


def test_any_length_of_average_can_be_sampled(tmp_path: Path) -> None:
    """At a tracked length the reconstruction is that average; another is another model."""
    train(tmp_path, "ema=power", "trainer.snapshot_every=128", "evaluate_at_end=false")
    saved = latest(tmp_path / "run/checkpoints")
    assert saved is not None
    for name, length in (("ema", 0.05), ("ema-0.1", 0.1)):
        made = reconstruct(tmp_path / "run/averages", length)
        for key, value in saved.tensors[name].items():
            # least squares gives the one snapshot the coefficient 1 to 1e-6 or so
            torch.testing.assert_close(made[key], value, rtol=1e-4, atol=1e-5)
    x = {}
    for length in ("ema", "0.05", "0.08"):
        done = command("sample", "run=run", f"weights={length}", "n=4", "pictures=false", *PLAIN[1:], f"out=s{length}",
                       cwd=tmp_path)  # fmt: skip
        assert done.code == 0, done.err
        import numpy as np

        x[length] = np.load(tmp_path / f"s{length}/samples.npz")["ddim"]
    assert abs(x["0.05"] - x["ema"]).max() < 0.1 * abs(x["0.08"] - x["ema"]).max()


def test_snapshots_need_averages_of_known_length(tmp_path: Path) -> None:
    done = command("train", *RUN, "trainer.snapshot_every=128", cwd=tmp_path)
    assert done.code == 1 and "ema=power" in done.err and not (tmp_path / "run").exists()


def test_a_failure_leaves_its_reason_until_it_is_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.step

    def fail(self: Trainer, run: object) -> None:
        if run.step == 4:  # type: ignore[attr-defined]
            raise TrainingDiverged("a reason")
        step(self, run)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", fail)
        done = command("train", *RUN, cwd=tmp_path)
    assert done.code == 1 and "a reason" in done.err
    assert json.loads((tmp_path / "run/failed.json").read_text()) == {"reason": "TrainingDiverged: a reason", "step": 4}
    train(tmp_path, "resume=auto")
    assert not (tmp_path / "run/failed.json").exists() and not (tmp_path / "run/.lock").exists()
    train(tmp_path, "out=whole")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


@pytest.mark.parametrize(
    "more", [("channels_last=true", "network=unet", "data=digits", "network.width=8", "network.blocks=1")]
)
def test_memory_format_changes_nothing_but_speed(tmp_path: Path, more: tuple[str, ...]) -> None:
    """Convolutions add in another order: float32 round-off of ten steps."""
    plain = [word for word in RUN if not word.startswith(("data", "network"))]
    for out, words in (("a", more[1:]), ("b", more)):
        done = command("train", *plain, *words, "evaluate_at_end=false", f"out={out}", cwd=tmp_path)
        assert done.code == 0, done.err
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=2e-3)
    losses = [[row["train/loss"] for row in rows(tmp_path / out) if "train/loss" in row] for out in "ab"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and math.isfinite(losses[0][-1])


def test_compiled_training_is_the_same_training(tmp_path: Path) -> None:
    """The same losses to float32 round-off, the same names in the checkpoint, which goes on without the compiler."""
    train(tmp_path, "evaluate_at_end=false", "out=plain")
    train(tmp_path, "evaluate_at_end=false", "out=compiled", "compile=true")
    a, b = weights(tmp_path / "plain"), weights(tmp_path / "compiled")
    assert a.keys() == b.keys()
    losses = [
        [row["train/loss"] for row in rows(tmp_path / out) if "train/loss" in row] for out in ("plain", "compiled")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    train(tmp_path, "evaluate_at_end=false", "out=compiled", "resume=auto", "trainer.images=1280")
    saved = latest(tmp_path / "compiled/checkpoints")
    assert saved is not None and saved.step == 20
