"""Densities of a distilled flow map: where it folds, what comes back to its x_T, how far log p is from the exact one.

    python benchmarks/few_step_density.py

The ring of eight Gaussians under VP, an MLP by `TrajectoryLoss`: two minutes of one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

import scoresde as S
from scoresde.data.toys import EightGaussians
from scoresde.nn import MLP

Found = tuple[Tensor, S.LogLikelihood]


def trained(ring: EightGaussians, teacher: S.Denoiser, steps: int) -> S.Denoiser:
    torch.manual_seed(0)
    fast = S.Preconditioned(MLP((2,), told=["end"]), teacher.sde, S.EDM(), told=["end"])
    loss, rng = S.TrajectoryLoss(fast, teacher, steps=8), S.Rng(0)
    optimizer = torch.optim.Adam(fast.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        loss(ring.sample(1024, rng=rng), rng=rng).mean().backward()
        optimizer.step(), optimizer.zero_grad()
    return fast


def without_refused(measure: Callable[[Tensor], Found], x: Tensor) -> tuple[Tensor, Found]:
    """The rows of x that were not refused, and what was found for them."""
    rows = torch.arange(len(x))
    while True:
        try:
            return rows, measure(x[rows])
        except S.SolverError as error:
            kept = torch.ones(len(rows), dtype=torch.bool)
            kept[error.samples] = False
            rows = rows[kept]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=500, help="steps of 1,024 samples")
    parser.add_argument("--points", type=int, default=300, help="noises, and held-out points")
    args = parser.parse_args()
    ring, sde = EightGaussians(), S.VPSDE()
    teacher = S.GaussianMixtureDenoiser(ring.means, torch.tensor(ring.std**2), torch.ones(8) / 8, sde)
    fast = trained(ring, teacher, args.train)
    noises = torch.randn(args.points, 2, generator=torch.Generator().manual_seed(0))
    t = torch.tensor(sde.t_min, dtype=torch.float64)
    data = ring.sample(args.points, rng=S.Rng(9))
    data = sde.perturb(data, t, S.Rng(10).normal_like(data))
    for steps in (1, 2, 4):
        solver = S.FlowMapSteps(steps)

        def given(x: Tensor, solver: S.FlowMapSteps = solver) -> Found:
            return x, S.log_likelihood(fast, x, solver)

        made, (x, drawn) = without_refused(lambda z, s=solver: S.sample_with_log_prob(fast, z, s), noises)
        rows, (_, back) = without_refused(given, x)
        same = (back.latent - drawn.latent[rows]).norm(dim=1) < 1e-2
        gaps = (back.log_prob - drawn.log_prob[rows])[same].abs()
        print(
            f"{steps} steps: {args.points - len(made)} of {args.points} noises folded; {len(x) - len(rows)} of the "
            f"samples found no x_T, {int((~same).sum())} another; of the rest log p differs by "
            f"{float(gaps.median()):.1g} in the median, {float(gaps.max()):.1g} at most"
        )
        rows, (points, found) = without_refused(given, data)
        less = teacher.log_prob(points.double(), t) - found.log_prob
        print(
            f"  data: {len(data) - len(rows)} of {len(data)} refused, the rest {float(less.mean()):.2f} ± "
            f"{float(less.std()) / len(less) ** 0.5:.2f} nats less likely than under the exact density"
        )


if __name__ == "__main__":
    main()
