r"""Samples of p(x_0 | y) by every posterior method, on mixtures whose posterior is known in closed form.

    python benchmarks/posterior.py
    python benchmarks/posterior.py 'dims=[64]' 'sdes=[vp]' 'stds=[0.1]' seeds=1 particle_steps=400 \
        'methods=[exact,MMPS,TwistedSMC]' results=runs/posterior64

Four unequal Gaussians in D dimensions with covariances of low rank plus a diagonal, seen through D/4 random
projections that tell little of the mode. W2: sliced W2 distance of the samples to as many exact posterior samples, on
average over nine such sets, over the same distance between two of these (the floor: 1.0 is as good as exact sampling;
for D = 2 it is all but the chance of mode counts). Modes: half the sum of the errors of the mode weights. `exact` is
the posterior's own denoiser by the same sampler, and `unguided` the prior's. Particles are in groups of K; a group of
more than there are samples is K/n sets of n, every K/n-th particle one, over which is averaged.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import combinations
from statistics import fmean
from typing import Any, NamedTuple

import report
import torch
from omegaconf import DictConfig
from torch import Tensor

import scoresde as S
from scoresde import inverse as I
from scoresde.metrics import sliced_w2

SDES: dict[str, S.SDE] = {
    "vp": S.VPSDE(), "subvp": S.SubVPSDE(), "ve": S.VESDE(), "cosine": S.CosineSDE(), "edm": S.EDMSDE(),
    "flow": S.RectifiedFlow(),
}  # fmt: skip


class Problem(NamedTuple):
    """A prior, what is seen of one draw of it, and the exact posterior."""

    prior: S.GaussianMixtureDenoiser
    seen: I.Observation
    exact: S.GaussianMixtureDenoiser

    @staticmethod
    def of(sde: S.SDE, dims: int, std: float, components: int = 4) -> Problem:
        generator = torch.Generator().manual_seed(dims)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        operator = I.RandomProjection(max(1, dims // 4), (dims,), S.Rng(dims))
        a, means = operator.matrix, draw(components, dims)
        if dims > 2:
            means = means - 0.9 * (means - means[0]) @ a.mT @ torch.linalg.pinv(a).mT
        factors = 0.3 * draw(components, dims, max(1, dims // 8))
        spread = 0.02 + 0.1 * torch.rand(components, dims, generator=generator, dtype=torch.float64)
        covs, weights = factors @ factors.mT + torch.diag_embed(spread), torch.arange(1.0, components + 1)
        prior = S.GaussianMixtureDenoiser(means, covs, weights, sde)
        x0 = prior.sample(1, rng=S.Rng(1), dtype=torch.float64)
        y = (operator(x0) + std * draw(1, len(a)))[0]
        return Problem(prior, I.Observation(y, operator, std), given(means, covs, weights.double(), a, y, std, sde))


def given(
    means: Tensor, covs: Tensor, weights: Tensor, a: Tensor, y: Tensor, std: float, sde: S.SDE
) -> S.GaussianMixtureDenoiser:
    """p(x_0 | y) of a mixture: every component conditioned, and weighed by how well it explains y."""
    s = a @ covs @ a.mT + std**2 * torch.eye(len(a), dtype=torch.float64)
    gain, residual = torch.linalg.solve(s, a @ covs).mT, y - means @ a.mT
    evidence = torch.distributions.MultivariateNormal(torch.zeros_like(residual), s).log_prob(residual)
    after = covs - gain @ a @ covs
    logits = (weights.log() + evidence).log_softmax(0).clamp(min=-600)
    moved = means + torch.einsum("kdm,km->kd", gain, residual)
    return S.GaussianMixtureDenoiser(moved, 0.5 * (after + after.mT), logits.exp(), sde)


class Method(NamedTuple):
    name: str
    sampler: str
    make: Callable[[Problem, DictConfig], tuple[S.Sampler, S.Denoiser]]
    group: int = 1  # particles that move together


def grid(problem: Problem) -> S.Grid:
    return S.LogisticGrid(problem.prior.data_std)


def ancestral(told: Callable[[Problem], S.Denoiser], problem: Problem, cfg: DictConfig) -> tuple[S.Sampler, S.Denoiser]:
    return S.Sampler(S.Ancestral(), grid(problem), cfg.steps), told(problem)


def default(told: Callable[[Problem], S.Denoiser], problem: Problem, cfg: DictConfig) -> tuple[S.Sampler, S.Denoiser]:
    denoiser = told(problem)
    return S.default_sampler(denoiser, cfg.budget), denoiser


def stepwise(step: Callable[[Problem], S.Step], steps: int, problem: Problem, cfg: DictConfig) -> Any:
    return S.Sampler(step(problem), grid(problem), steps), problem.prior


def particles(kind: type[I.Posterior], size: int, problem: Problem, cfg: DictConfig) -> Any:
    return stepwise(lambda p: I.TwistedSMC(p.seen, size, kind), cfg.particle_steps, problem, cfg)


def methods(cfg: DictConfig) -> list[Method]:
    told: dict[str, Callable[[Problem], S.Denoiser]] = {"unguided": lambda p: p.prior, "exact": lambda p: p.exact}
    for kind in (I.MMPS, I.TMPD, I.PiGDM, I.DPS, I.DiffPIR):
        told[kind.__name__] = lambda p, kind=kind: kind(p.prior, p.seen)
    made = [
        Method(name, label, partial(run, denoiser))
        for name, denoiser in told.items()
        for label, run in (("ancestral", ancestral), ("Adams", default))
    ]
    replaced, painted = (
        lambda p: I.Replacement(S.Ancestral(), p.seen),
        lambda p: I.RePaint(S.Ancestral(), p.seen, jump=1, repeats=5),
    )
    made.append(Method("Replacement", "ancestral", partial(stepwise, replaced, cfg.steps)))
    made.append(Method("RePaint", "ancestral", partial(stepwise, painted, cfg.steps // 5)))
    for kind, size in ((I.DPS, cfg.samples), *((I.MMPS, size) for size in cfg.particles)):
        made.append(Method(f"TwistedSMC({kind.__name__})", f"K = {size}", partial(particles, kind, size), size))
    return [method for method in made if not cfg.methods or method.name.split("(")[0] in cfg.methods]


def posterior(cfg: DictConfig) -> None:
    results, n, rows = report.Report(cfg, "posterior"), int(cfg.samples), []
    cases = [(dims, std, name) for dims in cfg.dims for std in cfg.stds for name in cfg.sdes]
    start = time.perf_counter()
    for dims, std, name in cases:
        problem = Problem.of(SDES[name], dims, std)
        exact, weights = problem.exact, problem.exact.log_weights.exp()

        def distance(x: Tensor, y: Tensor) -> float:
            return sliced_w2(x, y, rng=S.Rng(9))

        sets = [exact.sample(n, rng=S.Rng(100 + k)) for k in range(9)]
        floor = fmean(distance(one, other) for one, other in combinations(sets, 2))
        for method in methods(cfg):
            found, errors, began = [], [], time.perf_counter()
            for seed in range(cfg.seeds):
                sampler, denoiser = method.make(problem, cfg)
                *_, last = sampler.iterate(denoiser, (max(n, method.group), dims), rng=S.Rng(seed))
                drawn = [last.x[k :: len(last.x) // n] for k in range(len(last.x) // n)]
                found += [distance(x, other) / floor for x in drawn for other in sets]
                errors += [float((shares(exact, x) - weights).abs().sum() / 2) for x in drawn]
            ratio, wrong = fmean(found), fmean(errors)
            rows.append(
                {"method": method.name, "sampler": method.sampler, "sde": name, "std": std, "dims": dims,
                 "ratio": ratio, "modes": wrong, "evaluations": last.evaluations, "floor": floor,
                 "seconds": (time.perf_counter() - began) / cfg.seeds}
            )  # fmt: skip
            facts = {key: value for key, value in rows[-1].items() if key != "ratio"}
            results.add(f"{dims}/{std}/{name}/{method.name} {method.sampler}", ratio, **facts)
            print(*(f"{value:.3g}" if isinstance(value, float) else value for value in rows[-1].values()), flush=True)
    seconds = time.perf_counter() - start
    results.close(
        f"{n} samples, {cfg.seeds} seed(s), {cfg.threads} thread(s), {seconds:.0f} s in all. W2 over the two-sample "
        f"floor / error of mode weights.\n\n{table(rows, cases)}"
    )


def shares(mixture: S.GaussianMixtureDenoiser, x: Tensor) -> Tensor:
    """Share of the samples of each component, (K,), by its responsibility."""
    ones, zeros = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    return mixture._components(x, ones, zeros)[2].softmax(-1).mean(0)


def table(rows: list[dict[str, Any]], cases: list[tuple[int, float, str]]) -> str:
    """One row per method and sampler, one column per case."""
    head = ["method", "sampler", "calls", *(f"D={dims} std={std} {name}" for dims, std, name in cases)]
    lines = {}
    for row in rows:
        key = (row["method"], row["sampler"], str(row["evaluations"]))
        lines.setdefault(key, []).append(f"{row['ratio']:.2f} / {row['modes']:.3f}")
    return report.table([head, *([*key, *cells] for key, cells in lines.items())])


if __name__ == "__main__":
    report.launch(posterior, "posterior")
