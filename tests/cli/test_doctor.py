"""scoresde-doctor on this installation, and on one where something is broken; and every command's version."""

from __future__ import annotations

import sys
from importlib import import_module, metadata

import pytest
import torch

import scoresde
from scoresde.cli import doctor


def page(monkeypatch, capsys) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["scoresde-doctor"])
    with pytest.raises(SystemExit) as end:
        doctor.main()
    return int(end.value.code or 0), capsys.readouterr().out


def test_a_sound_installation(monkeypatch, capsys) -> None:
    monkeypatch.delenv("SCORESDE_KERNELS", raising=False)
    monkeypatch.setenv("SCORESDE_CACHE", "/some/cache")
    code, out = page(monkeypatch, capsys)
    assert code == 0, out
    assert out.count("\n") < 30 and out.endswith("all is well\n")
    for word in (scoresde.__version__, sys.executable, f"torch {torch.__version__}", "OMP_NUM_THREADS", "/some/cache"):
        assert word in out.replace("\n          ", " "), word


def test_what_is_broken_is_named_with_its_cure(monkeypatch, capsys) -> None:
    """A package that is too old and one that is missing; kernels that are required; a step that does not learn."""
    real = metadata.version

    def version(name: str) -> str:
        if name == "tqdm":
            raise metadata.PackageNotFoundError(name)
        return "1.0" if name == "numpy" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setenv("SCORESDE_KERNELS", "require")
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out = page(monkeypatch, capsys)
    said = " ".join(out.split())
    assert code == 1 and "broken: packages, kernels, one step" in said
    assert "tqdm is missing" in said and "numpy is 1.0, and scoresde needs >=" in said
    assert "pip install 'numpy>=1.26' 'tqdm>=" in said
    assert "they run on CUDA devices, not on cpu. Unset it." in said


def test_a_step_that_does_not_learn_is_broken(monkeypatch) -> None:
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: None)
    with pytest.raises(doctor.Ailment, match="changed the loss by 0, and should have lowered it"):
        doctor._LOOKS["one step"]()


@pytest.mark.parametrize("name", ["train", "sample", "likelihood", "evaluate", "fit", "export", "runs", "doctor"])
def test_every_command_says_its_version(name, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [f"scoresde-{name}", "--version"])
    try:
        import_module(f"scoresde.cli.{name}").main()
    except SystemExit as end:
        assert not end.code
    assert capsys.readouterr().out == f"scoresde {scoresde.__version__}\n"
