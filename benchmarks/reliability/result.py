"""What a fault campaign found."""

from __future__ import annotations

from typing import NamedTuple


class Result(NamedTuple):
    """One line of benchmarks/RELIABILITY.md.

    Attributes:
        name: the test and what was done: "R2 SIGKILL during save".
        tried, survived: cases.
        silent: wrong answers, or exit 0, that nobody would have noticed. Must be 0.
        note: figures: steps lost, seconds …
    """

    name: str
    tried: int
    survived: int
    silent: int
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.tried > 0 and self.survived == self.tried and not self.silent

    @property
    def bound(self) -> float:
        """95 % upper bound on the probability of a failure, 3/n, when none of n was seen."""
        return 3 / self.tried
