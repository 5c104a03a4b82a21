"""How often log p ± 1.96 stderr holds the truth on trained networks, smooth and kinked, by tolerance and by budget.

    python benchmarks/networks.py train moons_relu pinwheel_leaky swiss_silu ethanol --data /folder/with/the/data
    python benchmarks/coverage.py moons_relu pinwheel_leaky swiss_silu ethanol

The truth is a solve of the same weights in float64 to `--truth` with the exact divergence; what is measured runs in
float32, as a user's model does. Points are samples of the model, from several seeds. A coverage k/n comes with the
standard error of Agresti & Coull (1998), √(q (1 − q)/(n + 4)) with q = (k + 2)/(n + 4), which is not 0 at k = n.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path
from types import SimpleNamespace

import torch
from plain import Report, table
from recipes import load
from torch import Tensor

import scoresde as S

TOLERANCES, BUDGETS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6), (4, 8, 15, 30, 60, 100)
SOLVERS: dict[str, S.Tolerance | S.Budget] = {f"rtol {e:g}": S.Tolerance(e, e) for e in TOLERANCES}
SOLVERS |= {f"{n} calls": S.Budget(n) for n in BUDGETS}
DIVERGENCES: dict[str, S.Exact | S.Hutchinson] = {"exact": S.Exact(), "one probe": S.Hutchinson(1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--folder", type=Path, default=Path("~/.cache/scoresde/networks"), help="of the weights")
    parser.add_argument("--points", type=int, default=32, help="from each seed")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--truth", type=float, default=1e-7, help="tolerance of the truth")
    parser.add_argument("--results", type=Path, help="folder; default results beside this file")
    options = parser.parse_args()
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    report = Report(SimpleNamespace(**settings, threads=1), "coverage")
    rows = [["solver", "divergence", *options.names]]
    found = {name: measure(name, options, report) for name in options.names}
    for key in next(iter(found.values())):
        rows.append([*key, *(found[name][key] for name in options.names)])
    n = options.points * options.seeds
    report.close(
        "Coverage of log p ± 1.96 `stderr` in %, ± its standard error; median error → median `stderr` in nats. "
        f"{n} points a network from {options.seeds} seeds; truth: float64, rtol = atol = {options.truth:g}."
        f"\n\n{table(rows)}"
    )


def measure(name: str, options: argparse.Namespace, report: Report) -> dict[tuple[str, str], str]:
    """(solver, divergence) -> coverage, error and bar of one network."""
    denoiser, shape, _ = load(name, options.folder.expanduser())
    draws = [S.sample(denoiser, (options.points, *shape), budget=40, rng=S.Rng(seed)) for seed in range(options.seeds)]
    x = torch.cat(draws)
    finest = S.Tolerance(options.truth, options.truth, max_evaluations=1_000_000)
    fine = S.log_likelihood(copy.deepcopy(denoiser).double(), x.double(), finest, divergence=S.Exact())
    print(f"{name}: truth in {fine.evaluations} calls", flush=True)
    cells = {}
    for way, solver in SOLVERS.items():
        for trace, divergence in DIVERGENCES.items():
            cells[way, trace] = "–"
            if solver.accuracy.get("rtol", 1.0) <= options.truth:
                continue  # no finer than the truth
            result = S.log_likelihood(denoiser, x, solver, divergence=divergence, rng=S.Rng(100))
            error, bar = (result.log_prob - fine.log_prob).abs(), result.stderr
            share, deviation = coverage(error, bar)
            middle = [float(value.median()) for value in (error, bar)]
            facts = {"network": name, "solver": way, "divergence": trace, "calls": result.evaluations}
            report.add(name, share, **facts, deviation=deviation, error=middle[0], stderr=middle[1])
            cells[way, trace] = f"{100 * share:.0f} ± {100 * deviation:.0f}; {middle[0]:.0e} → {middle[1]:.0e}"
            print(f"{name} {way}, {trace}: {cells[way, trace]}", flush=True)
    return cells


def coverage(error: Tensor, bar: Tensor) -> tuple[float, float]:
    """(share of the errors within 1.96 bars, standard error of that share)."""
    held, n = int((error <= 1.96 * bar).sum()), len(error)
    q = (held + 2) / (n + 4)
    return held / n, math.sqrt(q * (1 - q) / (n + 4))


if __name__ == "__main__":
    main()
