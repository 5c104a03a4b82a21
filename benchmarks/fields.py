"""Darcy and Burgers as they are: drawn solutions of held-out problems, against the mean field and the nearest one.

    python benchmarks/fields.py runs/burgers runs/darcy

The runs are those of `scoresde-train data=arrays` in results/fields/README.md.
"""

from __future__ import annotations

import math
import sys

import report
import torch
from torch import Tensor

import scoresde as S

CASES, SAMPLES, CALLS = 24, 4, 20


def error(guess: Tensor, truth: Tensor) -> str:
    """RMS error of each case's field in its own units, mean ± standard error over the cases."""
    values = (guess - truth).double().square().flatten(1).mean(1).sqrt()
    return f"{float(values.mean()):.4f} ± {float(values.std()) / math.sqrt(len(values)):.4f}"


def main(folders: list[str]) -> None:
    rows = [
        ["fields", "mean of the training fields", "of the nearest training problem", "one sample", f"mean of {SAMPLES}"]
    ]
    for folder in folders:
        run = S.load(folder, device="cpu").whole_data()
        train, test = run.dataset.train, run.dataset.test.take(torch.arange(CASES))
        ((name, problems),) = test.conditions.items()
        nearest = torch.cdist(problems.flatten(1), train.conditions[name].flatten(1)).argmin(1)
        told = {name: problems.repeat_interleave(SAMPLES, 0)}
        drawn = run.sample(CASES * SAMPLES, cond=told, budget=CALLS, progress=False)
        drawn = drawn.unflatten(0, (CASES, SAMPLES))
        guesses = [train.raw.mean(0).expand_as(test.raw), train.raw[nearest], drawn[:, 0], drawn.mean(1)]
        deviation = float(train.raw.std())
        rows.append([f"{run.dataset.name}, deviation {deviation:.3f}", *(error(guess, test.raw) for guess in guesses)])
    print(report.table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
