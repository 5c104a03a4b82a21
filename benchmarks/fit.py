"""What a fitted sampler gains on a trained network: mean distance to the end of the probability-flow ODE, on noise of
its own, beside `sample(model, budget=)` and the best of diffusers, k-diffusion and azula over their solvers and grids.

    python benchmarks/fit.py pinwheel_leaky --budgets 5 10 20 --seeds 1 2 3 --noises 96

The networks are those of `python benchmarks/networks.py train`, of kinds that take no condition.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from quality import others
from recipes import load
from torch import Tensor

import scoresde as S
from scoresde.diffusion.denoiser import DenoiserWrapper
from scoresde.sampling.fit import reference


class Cast(DenoiserWrapper):
    """A network in its own precision, which answers in that of x."""

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor, cond: S.Cond = None) -> S.Prediction:
        found = self.denoiser(x.to(next(self.denoiser.parameters()).dtype), t)
        return S.Prediction(found.x0.to(x.dtype), found.eps.to(x.dtype), self.sde.at(t, x))


def ratio(ours: Tensor, theirs: Tensor) -> str:
    """Of the means, with the standard error of the paired differences."""
    value = ours.mean() / theirs.mean()
    error = (ours - value * theirs).std() / math.sqrt(len(ours)) / theirs.mean()
    return f"{float(value):.2f} ± {float(error):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network")
    parser.add_argument("--budgets", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="one fit for each")
    parser.add_argument("--noises", type=int, default=96)
    parser.add_argument("--folder", type=Path, default=Path("~/.cache/scoresde/networks"), help="of the weights")
    options = parser.parse_args()
    model, shape, _ = load(options.network, options.folder.expanduser())
    exactly = math.prod(shape) < 64
    model = model.double() if exactly else model
    wrapped = Cast(model)
    x = model.prior_sample((options.noises, *shape), rng=S.Rng(1234), dtype=torch.float64)
    with torch.no_grad():
        if exactly:
            t, s = torch.tensor([model.sde.t_max, model.sde.t_min], dtype=torch.float64)
            end = S.AdaptiveODE(1e-8, 1e-8).move(wrapped, x, t, s)
        else:
            *_, end = reference(wrapped, x, None, 400)[1]

    def distance(y: Tensor) -> Tensor:
        return (y - end).square().flatten(1).mean(1).sqrt()

    for budget in options.budgets:
        tried = []
        for method in others():
            if method.noisy or method.name == "dpm_adaptive" or (method.short and budget > 20):
                continue
            try:
                y = method.solve(wrapped, x, budget)
            except S.SolverError:
                continue
            if y is not None and bool(torch.isfinite(y).all()):
                tried.append((float(distance(y).mean()), f"{method.library} {method.name}", distance(y)))
        _, name, best = min(tried, key=lambda row: row[:2])
        usual = distance(S.sample(wrapped, x, budget=budget))
        for seed in options.seeds:
            fitted = S.fit_sampler(model, budget=budget, shape=shape, rng=S.Rng(seed))
            ours = distance(fitted.sampler(wrapped, x))
            print(
                f"{options.network} {budget} calls, seed {seed}: {float(ours.mean()):.3g}; over the default "
                f"{ratio(ours, usual)}, over {name} {ratio(ours, best)}; default over it {ratio(usual, best)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
