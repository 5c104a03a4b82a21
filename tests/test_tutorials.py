"""The tutorials run, and what they show is so."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("tutorials", ROOT / "docs" / "tutorials" / "run.py")
TUTORIALS = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(TUTORIALS)


def best_first(rows: list[dict[str, str]]) -> bool:
    values = [float(row["bits_per_dim"]) for row in rows]
    return values == sorted(values)


# What has to hold of the names that a page leaves: bounds are far from what was seen, and farther from failure.
HOLDS = {
    "images": lambda names: names["right"] > 0.6 and names["bits"].mean() < 6,  # chance has 0.1, uniform noise 8
    "table": lambda names: names["gap"].mean() > 0 and names["score"].log_prob.mean() > -45,
    "outliers": lambda names: names["auc"]["shuffled pixels"] > 0.95 and abs(names["auc"]["digits"] - 0.5) < 0.02,
    "inverse": lambda names: 0.5 < names["misfit"] < 2.5 and names["near"] < names["far"],
    "sweep": lambda names: len(names["rows"]) == 2 and best_first(names["rows"]),
    "few_calls": lambda names: names["error"]["flow map, 2 calls"] < names["error"]["DDIM, 2 calls"] / 2,
    "foreign": lambda names: names["difference"] < 1e-4,
}


def test_every_page_is_checked_and_listed() -> None:
    names = {page.stem for page in TUTORIALS.PAGES}
    assert names == HOLDS.keys()
    assert names == set(re.findall(r"\]\((\w+)\.md\)", (ROOT / "docs" / "tutorials" / "index.md").read_text("utf-8")))


@pytest.mark.parametrize("page", TUTORIALS.PAGES, ids=lambda page: page.stem)
def test_a_tutorial_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.stem == "foreign":
        pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    text, names = TUTORIALS.run(page)
    assert HOLDS[page.stem](names)
    number = re.compile(r"-?\d[\d.]*(?:e[-+]?\d+)?")  # numbers differ from machine to machine, and nothing else does
    assert number.sub("#", text).split() == number.sub("#", page.read_text("utf-8")).split()
    if f"({page.stem}.png)" in text:
        assert (tmp_path / f"{page.stem}.png").is_file() and (page.parent / f"{page.stem}.png").is_file()
