"""The programs in examples/ do what they say, and are short."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "examples"


def result(name: str) -> dict:
    torch.manual_seed(0)
    return runpy.run_path(str(FOLDER / f"{name}.py"))["main"]()


def test_points() -> None:
    """0.7 of 500 samples, ± 0.02 by their number and as much by a short training; log p within 0.1 nats."""
    found = result("points")
    assert abs(found["samples on the right"] - 0.7) < 0.08 and abs(found["log p"] - found["exact log p"]) < 0.1


def test_classes() -> None:
    """Without a class a third are right by chance, ± 0.02; guidance makes more of them right."""
    found = result("classes")
    assert abs(found[0.0] - 1 / 3) < 0.08 and found[0.0] + 0.2 < found[1.0] < found[3.0]


def test_posterior() -> None:
    """2,000 samples know a mean of deviation 0.64 to 0.014, and MMPS is exact for a Gaussian."""
    found = result("posterior")
    assert abs(found["mean"] - found["exact mean"]) < 0.06
    assert abs(found["deviation"] - found["exact deviation"]) < 0.06


def test_own_sde() -> None:
    """0.75 of 2,000 samples, ± 0.01; steps and the start from N(0, σ_max²) add to that."""
    assert all(abs(share - 0.75) < 0.05 for share in result("own_sde").values())


def test_seeds() -> None:
    same, gap, noise = result("seeds").values()
    assert same < 1e-5 and gap < 0.05 and noise < 0.05


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_they_are_short_and_listed(path: Path) -> None:
    assert path.read_text("utf-8").count("\n") <= 40
    assert f"[{path.name}]({path.name})" in (FOLDER / "README.md").read_text("utf-8")
