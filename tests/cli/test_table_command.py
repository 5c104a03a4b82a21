"""A table from its file to a file of samples, by `experiment=table` made short."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from commands import command

pytest.importorskip("pandas")
pytest.importorskip("sklearn")

SHORT = ("trainer.images=1024", "trainer.batch_size=128", "trainer.evaluate_every=512", "trainer.checkpoint_every=512",
         "network.width=8", "network.depth=1", "evaluation.samples=2000", "logger=jsonl", "threads=1")  # fmt: skip


def test_a_table_is_learned_measured_and_drawn_by_its_names(tmp_path: Path) -> None:
    """100 training rows, fewer than a batch. The columns depend on each other, in units that differ by 10^6."""
    rng = np.random.default_rng(0)
    mass, rooms = rng.normal(3e4, 2e3, 160), rng.integers(1, 5, 160)
    ratio = 1e-3 * (mass / 3e4 + 0.01 * rng.normal(size=160))
    lines = [f"{a},{b},{c}\n" for a, b, c in zip(mass, rooms, ratio, strict=True)]
    (tmp_path / "t.csv").write_text("mass,rooms,ratio\n" + "".join(lines))
    done = command("train", "experiment=table", "data.path=t.csv", "out=run", *SHORT, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "mass, ratio: continuous; rooms: whole numbers, dequantised" in done.out
    assert "The network corrects a mixture of" in done.out and "multistep: deviation" in done.out
    with (tmp_path / "run" / "samples.csv").open() as file:
        names, *rows = csv.reader(file)
    values = np.array(rows, float)
    raw = np.load(tmp_path / "run" / "samples.npz")["multistep"]
    assert names == ["mass", "rooms", "ratio"] and np.allclose(values, raw, rtol=1e-6)
    assert (values[:, 1] == values[:, 1].round()).all()
    # 120 training rows know a deviation to 6 %, and the network has learned for 8 steps what adds little to that
    assert abs(values[:, 0].mean() - mass.mean()) < 4 * 2e3 / 110**0.5
    assert 0.75 < values[:, 0].std() / mass.std() < 1.25 and np.corrcoef(values.T)[0, 2] > 0.9
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    # a Gaussian of these deviations and correlation has 1.6 nats of mass given ratio, and ratio; uniform rooms 1.4
    nats = -summary["bits_per_dim"]["mean"] * 3 * np.log(2)
    exact = -np.log(2 * np.pi * np.e * 2e3 * 1e-5) - np.log(4)
    assert abs(nats - exact) < 1.0
    again = command("sample", "run=run", "n=5", "out=s", "pictures=false", cwd=tmp_path)
    assert again.code == 0 and (tmp_path / "s" / "samples.csv").read_text().startswith("mass,rooms,ratio\n")
    columns = zip(ratio, ["x"] * 160, mass, rooms, strict=True)  # in another order, with another between
    (tmp_path / "o.csv").write_text("ratio,note,mass,rooms\n" + "".join(f"{a},{b},{c},{d}\n" for a, b, c, d in columns))
    values = []
    for name in ("t", "o"):
        asked = command("likelihood", "run=run", "data=table", f"data.path={name}.csv", f"out={name}", cwd=tmp_path)
        assert asked.code == 0, asked.err
        values.append(json.loads((tmp_path / name / "likelihood.json").read_text())["mean"])
    assert values[0] == values[1]
