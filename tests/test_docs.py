"""docs/solvers.md is what the code says of itself, and what it does when it is run."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

import scoresde.sampling
from scoresde import (
    DDIM,
    VPSDE,
    X0,
    Eps,
    EulerMaruyama,
    Heun,
    Step,
)

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS))
import solvers  # noqa: E402

OWN = {"Adams", "Multistep", "Midpoint", "RK4"}  # of this library, or of every textbook
TEXT = (DOCS / "solvers.md").read_text("utf-8")
ROWS = [line.strip("| ").split(" | ") for line in TEXT.splitlines() if line.startswith("| `")]


def test_the_table_is_what_the_code_writes() -> None:
    """Every step on every SDE under every parameterisation, run."""
    assert solvers.table() == TEXT, "run: python docs/solvers.py"


def test_every_step_is_in_it_with_its_source() -> None:
    names = {name for name in scoresde.sampling.__all__ if isinstance(getattr(scoresde.sampling, name), type)}
    steps = {name for name in names if issubclass(getattr(scoresde.sampling, name), Step)} - {"Step", *solvers.OTHERS}
    assert steps == {re.match(r"`(\w+)\(", row[0])[1] for row in ROWS}
    for row in ROWS:
        assert row[-1] != "–" or row[0].split("(")[0].strip("`") in OWN, f"{row[0]}: its docstring cites nothing"


class Broken(DDIM):
    """DDIM of x̂_0 that is multiplied by `scale`, of the Gaussian's mean; right where scale is 1."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def __call__(self, denoiser, x, t, s, state, *, cond, rng):
        return super().__call__(denoiser, self.scale * x, t, s, state, cond=cond, rng=rng)


def test_what_does_not_work_is_not_ticked() -> None:
    """A step that drifts from the law, one that ends in NaN, and a network that says something else than it should."""
    assert solvers.reaches_the_law(Broken(1.0), VPSDE())
    assert not solvers.reaches_the_law(Broken(0.9), VPSDE()) and not solvers.reaches_the_law(Broken(torch.nan), VPSDE())

    class Wrong(X0):
        def target(self, x0, eps, scales):
            return super().target(x0, eps, scales) * (1 + 1e-5)

    assert solvers.agreeing(Heun(), VPSDE(), {"Eps": Eps(), "X0": Wrong()}) == ["Eps"]
    assert solvers.noisy(EulerMaruyama()) and not solvers.noisy(Heun())


def test_sources_and_formulas_are_read_from_docstrings() -> None:
    class Some(Heun):
        """A method of Abel & Cain 1999 (alg. 1) on x (D. Who 2001, eq. 3, B(h) = h): `a | b` moves.

        And (so on, Eve 2010, p. 1; no).

        Args:
            none: (Not me 2020).
        """

    what, whose = solvers.described(Some())
    assert what == r"A method of Abel & Cain 1999 (alg. 1) on x: `a \| b` moves"
    assert whose == "Abel & Cain 1999 (alg. 1); D. Who 2001, eq. 3, B(h) = h; Eve 2010, p. 1"


@pytest.mark.parametrize("cell", [row[3] for row in ROWS])
def test_noise_is_yes_or_no(cell: str) -> None:
    assert cell in ("yes", "no")
