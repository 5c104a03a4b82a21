"""Likelihood and evaluation of data that a command is given, and of two runs on the same points."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import TINY, command

import scoresde
from scoresde.codecs import Scaling
from scoresde.data import ImageFolder
from scoresde.runs.logger import NullLogger

FAST = ("likelihood=budget", "likelihood.solver.calls=4", "logger=jsonl")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two runs, a with labels and b with other weights, whose data are gone; files of all kinds beside them."""
    folder, rng = tmp_path_factory.mktemp("given"), np.random.default_rng(0)
    x, y = rng.integers(0, 16, (100, 1, 4, 4), dtype=np.uint8), np.arange(100) % 3
    np.savez(folder / "all.npz", x=x, y=y)
    data = ("data=arrays", "data.path=all.npz", "data.key=x", "data.label_key=y", "data.levels=16")
    options = (
        *(word for word in TINY if not word.startswith("data")),
        *data,
        "trainer.images=64",
        "logger=jsonl",
        "evaluation.points=2",
    )
    options += ("conditional=true", "network.cond_dropout=0.2", "evaluate_at_end=false")
    for seed, name in enumerate("ab"):
        done = command("train", *options, f"seed={seed}", f"out={name}", cwd=folder)
        assert done.code == 0, done.err
    test = scoresde.load(folder / "a").dataset.test
    np.savez(folder / "held.npz", x=test.raw.numpy(), y=test.labels.numpy())
    np.save(folder / "held.npy", test.raw.numpy())
    np.save(folder / "black.npy", np.zeros((3, 1, 4, 4), np.uint8))
    np.save(folder / "flat.npy", x[:, 0])
    np.save(folder / "bright.npy", x + 10)
    np.save(folder / "floats.npy", x / 15)
    np.savez(folder / "classes.npz", x=x, y=y + 1)
    (folder / "all.npz").unlink()
    return folder


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "bits_per_dim.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_file_of_the_held_out_samples_has_their_numbers(place: Path, tmp_path: Path, monkeypatch) -> None:
    """Bit for bit, with the labels, whose loss makes the density another one; and what the logger is told."""
    told: list[dict] = []
    monkeypatch.setattr(NullLogger, "summary", lambda self, values: told.append(values))
    file = ("data=arrays", "data.path=held.npz", "data.key=x", "data.label_key=y")
    for name, words in (("own", ()), ("file", file), ("unlabelled", ("data=arrays", "data.path=held.npy"))):
        done = command("likelihood", "run=a", *FAST, "n=3", *words, f"out={tmp_path / name}", cwd=place)
        assert done.code == 0, done.err
    own, given, unlabelled = (rows(tmp_path / name) for name in ("own", "file", "unlabelled"))
    assert own == given and [row["index"] for row in own] == ["0", "3", "6"] and own[0].keys() >= {"stderr", "label"}
    assert [row["bits_per_dim"] for row in unlabelled] != [row["bits_per_dim"] for row in own]
    record = json.loads((tmp_path / "file" / "likelihood.json").read_text())
    arrays = np.load(tmp_path / "file" / "bits_per_dim.npz")
    assert record["mean"] == pytest.approx(arrays["bits_per_dim"].mean()) and record["data"]["path"] == "held.npz"
    assert told[1] == {"bpd/ode": record["mean"], "bpd_stderr": record["stderr"], "points": 3}


def test_two_runs_are_compared_point_by_point(place: Path, tmp_path: Path) -> None:
    """The difference is that of the columns, each of which is what the run has alone; three identical black pictures
    are scored although they use one value of 16."""
    words = (*FAST, "data=arrays", "data.path=black.npy")
    done = command("likelihood", "run=a", "versus=b", *words, f"out={tmp_path / 'both'}", cwd=place)
    assert done.code == 0 and "b less a: " in done.out and "3 points of black.npy" in done.out, done.err
    done = command("likelihood", "-m", "run=a,b", *words, f"out={tmp_path / 'swept'}", cwd=place)
    assert done.code == 0, done.err
    both, record = rows(tmp_path / "both"), json.loads((tmp_path / "both" / "likelihood.json").read_text())
    for job, column in enumerate(("bits_per_dim", "versus")):
        assert [row["bits_per_dim"] for row in rows(tmp_path / "swept" / str(job))] == [row[column] for row in both]
    gaps = np.array([float(row["versus"]) - float(row["bits_per_dim"]) for row in both])
    assert record["versus"]["difference"] == pytest.approx(gaps.mean()) and abs(gaps.mean()) > 1e-3
    assert record["versus"]["difference_stderr"] == pytest.approx(gaps.std(ddof=1) / 3**0.5)
    assert record["versus"]["run"] == "b"


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("flat.npy", "samples of shape (4, 4), and a was trained on samples of shape (1, 4, 4), integers 0 … 15. How"),
        ("bright.npy", "bright.npy: raw holds integers 10 … 25, expected integers 0 … 15 (16 levels). a was trained"),
        ("floats.npy", "floats.npy: raw holds torch.float32 (min 0, max 1), expected integers 0 … 15"),
        ("none.npy", "none.npy"),
        ("classes.npz data.key=x data.label_key=y", "classes.npz has class 3; a knows a class 0 … 2"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(place: Path, tmp_path: Path, file: str, expected: str) -> None:
    for name in ("likelihood", "evaluate"):
        words = ("run=a", *FAST, "data=arrays", *f"data.path={file}".split(), f"out={tmp_path / 'x'}")
        done = command(name, *words, *(("evaluation.pictures=false",) if name == "evaluate" else ()), cwd=place)
        assert done.code == 1 and expected in done.err, done.err
    assert not (tmp_path / "x").exists()


def test_a_group_that_is_there_is_chosen_without_a_plus(place: Path, tmp_path: Path) -> None:
    words = ("+data=arrays", "data.path=black.npy", f"out={tmp_path / 'x'}")
    done = command("likelihood", "run=a", *words, cwd=place)
    assert done.code == 1 and "without +: data=…" in done.err, done.err


def test_a_report_is_of_the_given_samples(place: Path, tmp_path: Path) -> None:
    """Its bits/dim are those of scoresde-likelihood."""
    data = ("data=arrays", "data.path=black.npy")
    done = command("likelihood", "run=a", *FAST, *data, f"out={tmp_path / 'a'}", cwd=place)
    assert done.code == 0, done.err
    settings = ("sampler=ddim", "sampler.steps=2", "evaluation.samples=4", "evaluation.pictures=false")
    done = command("evaluate", "run=a", *FAST, *data, *settings, f"out={tmp_path / 'b'}", cwd=place)
    assert done.code == 0, done.err
    alone, report = (json.loads((tmp_path / name).read_text()) for name in ("a/likelihood.json", "b/summary.json"))
    assert report["bits_per_dim"]["mean"] == alone["mean"] and report["bits_per_dim"]["points"] == 3


def test_given_pictures_are_all_held_out(tmp_path: Path) -> None:
    """Also a single one; a model of other levels than pictures have is none of theirs."""
    from PIL import Image

    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4)
    Image.fromarray(pixels).save(tmp_path / "one.png")
    dataset = ImageFolder(str(tmp_path), grey=True, codec=Scaling(levels=256))
    assert torch.equal(dataset.test.raw, torch.from_numpy(pixels)[None, None])
    with pytest.raises(ValueError, match=r"found 8-bit images. Give the values themselves: data=arrays"):
        ImageFolder(str(tmp_path), grey=True, codec=Scaling(levels=17))
    shutil.rmtree(tmp_path)
