"""The fault campaigns of benchmarks/reliability, with few cases of each; `make reliability` runs all of them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[2] / "benchmarks" / "reliability"
sys.path[:0] = [path for path in (str(HERE),) if path not in sys.path]
CAMPAIGNS = sorted(path.stem for path in HERE.glob("*.py") if "\ndef campaign(" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_training_survives(name: str, tmp_path: Path) -> None:
    results = importlib.import_module(name).campaign(False, tmp_path)
    assert results
    assert [f"{result.name}: {result.note}" for result in results if not result.passed] == []
