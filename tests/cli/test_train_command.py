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


TABLE = (
    "data=digits", "network=unet", "network.width=8", "network.multipliers=[1]",
    "network.outputs=2", "denoiser=split", "loss=hybrid", "sde=table", "sde.alpha_bar=[0.999,0.98,0.9,0.7,0.4,0.1]",
    "sampler=ancestral", "sampler.steps=5", "grid=uniform", "trainer.images=128", "trainer.batch_size=32",
    "trainer.warmup=0", "trainer.evaluate_every=64", "evaluation.points=4", "evaluation.points_during=2",
    "evaluation.samples=4", "evaluation.pictures=false", "threads=1", "logger=jsonl", "out=run",
)  # fmt: skip


def test_a_table_with_a_learned_variance_trains_samples_and_has_its_bound(tmp_path: Path) -> None:
    """Five steps between six entries, all or three of them; the chain of all is above the limit of infinitely many."""
    done = command("train", *TABLE, "likelihood=vlb", "likelihood.terms=null", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "network calls for each 64 points: 5" in done.out
    found = {"all": json.loads((tmp_path / "run/summary.json").read_text())["bits_per_dim"]}
    assert any("eval/vlb" in row for row in rows(tmp_path / "run"))
    assert (found["all"]["estimator"], found["all"]["evaluations"]) == ("bpd/vlb", 5)
    for name, more in {"vlb": ["likelihood.terms=3"], "elbo": []}.items():
        done = command("likelihood", "run=run", "n=8", f"likelihood={name}", *more, f"out={name}", cwd=tmp_path)
        assert done.code == 0, done.err
        found[name] = json.loads((tmp_path / name / "likelihood.json").read_text())
    assert found["vlb"]["evaluations"] == 3
    assert found["vlb"]["mean"] - found["elbo"]["mean"] > -4 * math.hypot(
        found["vlb"]["stderr"], found["elbo"]["stderr"]
    )


def test_the_bound_of_steps_is_refused_in_continuous_time(tmp_path: Path) -> None:
    for more, said in (
        (["likelihood=vlb"], "has continuous time: take likelihood=elbo"),
        (["loss=hybrid"], "denoiser=split with network.outputs=2"),
        (["loss=hybrid", "denoiser=split"], "has continuous time: take sde=ddpm"),
    ):
        done = command("train", "out=run", *more, cwd=tmp_path)
        assert done.code == 1 and said in done.err and not (tmp_path / "run").exists()
