"""How near a solver comes for its network calls, on densities whose score is exact, beside other libraries.

    python benchmarks/quality.py
    python benchmarks/quality.py 'sdes=[vp]' 'budgets=[10,20]' 'fit=[]'

ring: eight Gaussians of standard deviation 0.05 on a circle of radius 1. mix64: ten unequal Gaussians in 64 dimensions
with covariances of low rank plus a diagonal. Every solver starts from the same x_T and ends at t_min with what noise is
left there; the error is the RMS distance per dimension, over the data's standard deviation, to where the
probability-flow ODE takes the same points (native solver, float64, 1e-9). Peers run on each of their usual grids and
the best is kept; so are ours, under "generic". `sample(…, budget=)` is one choice for all cases, `fit_grid` a grid
fitted to the case. Samplers with noise are compared by the sliced W2 distance to exact samples.
"""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import peers
import report
import torch
from omegaconf import DictConfig
from torch import Tensor

import scoresde as S
from scoresde.diffusion.denoiser import CountingDenoiser
from scoresde.metrics import sliced_w2

SDES: dict[str, S.SDE] = {"vp": S.VPSDE(), "ve": S.VESDE(), "edm": S.EDMSDE()}
GRIDS = ("log", "karras", "time")


class Method(NamedTuple):
    library: str  # or, of ours, "generic", "default", "fitted"
    name: str
    noisy: bool
    solve: peers.Solver
    short: bool = False  # only for budgets of at most 20: with noise all are at the floor beyond, or it changes nothing


def ring(sde: S.SDE) -> S.GaussianMixtureDenoiser:
    angles = torch.arange(8, dtype=torch.float64) * math.pi / 4
    return S.GaussianMixtureDenoiser(torch.stack([angles.cos(), angles.sin()], 1), 0.05**2, torch.ones(8), sde)


def mix64(sde: S.SDE) -> S.GaussianMixtureDenoiser:
    generator = torch.Generator().manual_seed(64)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    factors = 0.3 * draw(10, 64, 4)
    covs = factors @ factors.mT + torch.diag_embed(0.01 + 0.09 * torch.rand(10, 64, generator=generator))
    weights = 0.2 + torch.rand(10, generator=generator, dtype=torch.float64)
    return S.GaussianMixtureDenoiser(draw(10, 64), covs, weights, sde)


CASES = {"ring": ring, "mix64": mix64}


def stepping(step: S.Step, grid: S.Grid) -> peers.Solver:
    """As many steps as the budget allows."""

    def solve(denoiser: S.Denoiser, x: Tensor, budget: int) -> Tensor | None:
        steps = max((n for n in range(1, budget + 1) if (step.count(n) or 0) <= budget), default=0)
        return S.Sampler(step, grid, steps, denoise=False)(denoiser, x, rng=S.Rng(5)) if steps else None

    return solve


def default(denoiser: S.Denoiser, x: Tensor, budget: int) -> Tensor:
    return S.sample(denoiser, x, budget=budget)


def generic(denoiser: S.Denoiser) -> list[Method]:
    """Our steps on our generic grids."""
    d = denoiser.data_std
    grids: dict[str, S.Grid] = {
        "LogSNR": S.LogSNRGrid(), "Karras": S.KarrasGrid(), "Logistic 1.5": S.LogisticGrid(d),
        "Logistic 1.2": S.LogisticGrid(d, width=1.2),
    }  # fmt: skip
    steps: dict[str, S.Step] = {
        "DDIM": S.DDIM(), "Heun": S.Heun(), "DPM++2": S.DPMSolverPP(2), "DPM++3": S.DPMSolverPP(3),
        "UniPC2": S.UniPC(2), "UniPC3": S.UniPC(3), "DEIS3": S.DEIS(3), "IPNDM4": S.IPNDM(4), "Adams2": S.Adams(2),
        "Adams3": S.Adams(3), "Adams2,3": S.Adams(2, 3), "Adams3,3": S.Adams(3, 3), "Adams3,4": S.Adams(3, 4),
    }  # fmt: skip
    noisy: dict[str, S.Step] = {
        "Ancestral": S.Ancestral(), "DPM++2 eta1": S.DPMSolverPP(2, 1.0), "Adams2 eta1": S.Adams(2, eta=1.0),
        "Adams2 eta.5": S.Adams(2, eta=0.5), "SA": S.SASolver(),
    }  # fmt: skip
    return [
        Method("generic", f"{step} {grid}", step in noisy, stepping(made, grids[grid]), short=step in noisy)
        for step, made in {**steps, **noisy}.items()
        for grid in grids
    ]


def others() -> list[Method]:
    """The solvers of other libraries, each on its usual grids."""
    made = []
    for grid in GRIDS:
        for name in ("zAB", "vAB", "zEAB", "xEAB"):
            for order in (2, 3):
                solve = peers.azula(f"{name}Sampler", grid, order=order)
                made.append(Method("azula", f"{name}{order} {grid}", False, solve))
        for name in ("DDPM", "Ito"):
            made.append(Method("azula", f"{name} {grid}", True, peers.azula(f"{name}Sampler", grid), short=True))
        for name, calls in {"lms": 1, "dpmpp_2m": 1, "heun": 2}.items():
            made.append(
                Method("k-diffusion", f"{name} {grid}", False, peers.k_diffusion(f"sample_{name}", grid, calls))
            )
        for name in ("euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde"):
            solve = peers.k_diffusion(f"sample_{name}", grid, noisy=True)
            made.append(Method("k-diffusion", f"{name} {grid}", True, solve, short=True))
        for final in (False, True):  # first order in the last steps, their default below 15
            mark = f"{grid}{' final' if final else ''}"
            for order in (2, 3):
                for variant in ("bh1", "bh2"):
                    solve = peers.diffusers(
                        "UniPCMultistepScheduler",
                        grid,
                        solver_order=order,
                        solver_type=variant,
                        lower_order_final=final,
                    )
                    made.append(Method("diffusers", f"UniPC{order} {variant} {mark}", False, solve, short=final))
                solve = peers.diffusers(
                    "DPMSolverMultistepScheduler", grid, solver_order=order, lower_order_final=final,
                    final_sigmas_type="sigma_min",
                )  # fmt: skip
                made.append(Method("diffusers", f"DPM++{order}M {mark}", False, solve, short=final))
                solve = peers.diffusers("DEISMultistepScheduler", grid, solver_order=order, lower_order_final=final)
                made.append(Method("diffusers", f"DEIS{order} {mark}", False, solve, short=final))
    made.append(Method("k-diffusion", "dpm_adaptive", False, peers.k_adaptive))
    return made


class Case(NamedTuple):
    """What all solvers of one density and SDE are given, and measured by."""

    denoiser: S.GaussianMixtureDenoiser
    x: Tensor
    exact: Tensor
    samples: Tensor
    floor: float

    def first(self, points: int) -> Case:
        """The same with fewer points."""
        return self._replace(x=self.x[:points], exact=self.exact[:points], samples=self.samples[:points])

    @staticmethod
    def of(denoiser: S.GaussianMixtureDenoiser, points: int) -> Case:
        sde = denoiser.sde
        t, s = torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)
        x = denoiser.prior_sample((points, *denoiser.event_shape), rng=S.Rng(2), dtype=torch.float64)
        exact = S.AdaptiveODE(1e-9, 1e-9).move(denoiser, x, t, s)
        clean = [denoiser.sample(points, rng=S.Rng(seed), dtype=torch.float64) for seed in (3, 4)]
        samples, again = (sde.perturb(x0, s, S.Rng(9).normal_like(x0)) for x0 in clean)
        return Case(denoiser, x, exact, samples, sliced_w2(samples, again, rng=S.Rng(1)))

    def measure(self, method: Method, budget: int) -> tuple[float, float] | None:
        """(error, W2); None where the method cannot keep to the budget or fails."""
        counted = CountingDenoiser(self.denoiser)
        torch.manual_seed(0)  # the peers' noise
        try:
            x = method.solve(counted, self.x, budget)
        except S.SolverError:
            return None
        if x is None or not bool(torch.isfinite(x).all()):
            return None
        assert counted.evaluations <= budget or method.name == "dpm_adaptive", (method.name, counted.evaluations)
        error = float((x - self.exact).square().mean().sqrt()) / self.denoiser.data_std
        return error, sliced_w2(x, self.samples, projections=64, rng=S.Rng(1))


def fitted(case: Case, budget: int) -> list[Method]:
    """The default's step, and one of lower order that needs a grid of its own, on grids fitted to the case."""
    denoiser, made = case.denoiser, []
    for step in (S.Adams(3, corrector=3 if budget >= 8 else 0), S.Adams(2, corrector=3)):
        grid = S.fit_grid(denoiser, step, steps=budget, shape=denoiser.event_shape, rng=S.Rng(77))
        name = f"Adams{step.nodes}{',3' if step.corrector else ''} fit_grid"
        made.append(Method("fitted", name, False, stepping(step, grid)))
    return made


LIBRARIES = ("diffusers", "k-diffusion", "azula")


def quality(cfg: DictConfig) -> None:
    results = report.Report(cfg, "quality")
    head = ["case", "calls", "best peer", "error", "ours, `sample(budget=)`", "ratio", "ours, best generic", "ratio",
            "ours, `fit_grid`", "ratio"]  # fmt: skip
    errors, distances = [head], [["case", "floor", "calls", "best peer, W2", "ours, best, W2"]]
    for name in cfg.cases:
        for kind in cfg.sdes:
            case = Case.of(CASES[name](SDES[kind]), max(cfg.points[name], cfg.finals or 0))
            for budget in cfg.budgets:
                row, second = compare(case, f"{name} {kind.upper()}", budget, cfg, results)
                errors.append(row)
                distances += [second] if budget <= 20 else []  # beyond, samplers with noise are not run
                print(" | ".join(row), flush=True)
    text = (
        f"{', '.join(f'{cfg.finals or cfg.points[name]} points of {name}' for name in cfg.cases)}; {cfg.threads} "
        "thread(s).\n\n"
        "RMS distance to the end points of the probability-flow ODE, over the data's standard deviation, and its ratio "
        f"to the best of {len(others())} peers' methods in the same run: below 1 is closer than all of them.\n\n"
        f"{report.table(errors)}\n\nSliced W2 to exact samples, all samplers, with and without noise; two exact sets "
        f"of the same size are `floor` apart, and below it is luck.\n\n{report.table(distances)}"
    )
    results.close(text, figure(results.rows))


def finalists(case: Case, methods: list[Method], budget: int, cfg: DictConfig, points: int) -> list[Method]:
    """The best of each library, and of our generic ones, on fewer points: what all points then decide between."""
    if not cfg.finals:
        return methods
    ranked: dict[str, list[tuple[float, int]]] = {}
    for index, method in enumerate(methods):
        measured = (
            None if method.noisy or (method.short and budget > 20) else case.first(points).measure(method, budget)
        )
        if measured is not None:
            ranked.setdefault(method.library, []).append((measured[0], index))
    return [methods[index] for entries in ranked.values() for _, index in sorted(entries)[: cfg.finalists]]


def compare(
    case: Case, label: str, budget: int, cfg: DictConfig, results: report.Report
) -> tuple[list[str], list[str]]:
    """Every method on one case and budget: a row of errors and one of distances."""
    methods = [*others(), Method("default", "sample(budget=)", False, default), *generic(case.denoiser)]
    methods = finalists(case, methods, budget, cfg, cfg.points[label.split()[0]])
    if budget in cfg.fit:
        start = time.perf_counter()
        methods += fitted(case, budget)
        print(f"{label}, {budget} calls: grids fitted in {time.perf_counter() - start:.0f} s", flush=True)
    found: dict[str, list[tuple[float, float, Method]]] = {}
    for method in methods:
        if method.short and budget > 20:
            continue
        if (measured := case.measure(method, budget)) is None:
            continue
        error, distance = measured
        results.add(
            f"{label}/{method.library} {method.name}/{budget}", error, case=label, budget=budget,
            library=method.library, method=method.name, noisy=method.noisy, sliced_w2=distance, floor=case.floor,
        )  # fmt: skip
        found.setdefault("peer" if method.library in LIBRARIES else method.library, []).append(
            (error, distance, method)
        )

    def best(group: str) -> tuple[float, str]:
        error, _, method = min(entry for entry in found[group] if not entry[2].noisy)
        return error, f"{method.library} {method.name}" if group == "peer" else method.name

    peer, name = best("peer")
    cells = [label, str(budget), name, f"{peer:.1e}"]
    for group in ("default", "generic", "fitted"):
        if group in found:
            error, title = best(group)
            cells += [f"{error:.1e}" if group == "default" else f"{error:.1e} {title}", f"{error / peer:.2f}"]
        else:
            cells += ["", ""]
    nearest = [
        min((distance, f"{m.library} {m.name}") for group in groups for _, distance, m in found.get(group, []))
        for groups in (("peer",), ("default", "generic", "fitted"))
    ]
    return cells, [label, f"{case.floor:.4f}", str(budget), *(f"{value:.4f} {title}" for value, title in nearest)]


def figure(rows: list[dict[str, Any]]) -> Any:
    """Error against calls, one panel per case."""
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(row["case"] for row in rows))
    made = Figure(figsize=(3.6 * 3, 3.0 * -(-len(cases) // 3)), layout="constrained")
    for axes, case in zip(made.subplots(-(-len(cases) // 3), 3, squeeze=False).flat, cases, strict=False):
        part = [row for row in rows if row["case"] == case and not row["noisy"]]
        for label, libraries, style in (
            ("best of diffusers", ("diffusers",), "--"),
            ("best of k-diffusion", ("k-diffusion",), "--"),
            ("best of azula", ("azula",), "--"),
            ("ours, sample(budget=)", ("default",), "o-"),
            ("ours, best generic", ("generic",), "-"),
            ("ours, fit_grid", ("fitted",), "s-"),
        ):
            budgets = sorted({row["budget"] for row in part if row["library"] in libraries})
            least = [min(r["value"] for r in part if r["library"] in libraries and r["budget"] == b) for b in budgets]
            axes.loglog(budgets, least, style, label=label, markersize=3, linewidth=1)
        axes.set_title(case, fontsize=9)
        axes.grid(alpha=0.3)
    made.axes[0].legend(fontsize=6)
    made.supxlabel("network calls", fontsize=8)
    made.supylabel("error", fontsize=8)
    return made


if __name__ == "__main__":
    report.launch(quality, "quality")
