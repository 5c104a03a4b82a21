"""Warnings of ours are notes of a command; those of others stay as Python shows them."""

from __future__ import annotations

import warnings

import pytest
import torch

from scoresde import VPSDE, Budget, Eps, Preconditioned
from scoresde.cli import _hydra
from scoresde.codecs import Scaling
from scoresde.data import Dataset, Split
from scoresde.evaluate import OdeLikelihood
from scoresde.nn import MLP


def test_what_the_cut_off_hides_is_a_note_said_once(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In a measurement of three batches, each of which warns."""
    split = Split(torch.zeros(6, 2, dtype=torch.uint8))
    denoiser = Preconditioned(MLP((2,), width=8, depth=1), VPSDE(), Eps())
    measure = OdeLikelihood(solver=Budget(4), batch_size=2, t_min=1e-2)
    shown: list[str] = []
    monkeypatch.setattr(_hydra, "_show_warning", lambda message, *where: shown.append(str(message)))
    _hydra._say_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", _hydra._note)
        measure.job(denoiser, Dataset("dots", split, split, Scaling(levels=256))).run()
        said = capsys.readouterr()
        assert said.err == "" and said.out.count("\n") == 1
        assert said.out.startswith("Note: The noise at t_min hides up to ")
        assert "likelihood.bound=dequantised" in said.out
        warnings.warn_explicit("theirs", UserWarning, torch.__file__, 7)
    assert capsys.readouterr() == ("", "") and shown == ["theirs"]
