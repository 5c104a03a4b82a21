"""log p against the truth: error, network calls and seconds, by tolerance and by budget, beside other ways.

    python benchmarks/likelihood.py
    python benchmarks/likelihood.py 'cases=[ring]' 'sdes=[vp]' 'budgets=[20,40]'

The densities of quality.py, whose log p at t_min is known; points drawn from the model itself. The other ways: dopri5
of torchdiffeq and RK45 of scipy on dx/dt = f x − ½g² score in t (the latter as score_sde does, which asks the network
twice, for the drift and for its divergence), and k-diffusion's `log_likelihood` in σ/α. With a single random probe the
error of all of them is the probe's; "exact" takes the whole trace.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import peers
import report
import torch
from omegaconf import DictConfig
from quality import CASES, SDES
from torch import Tensor

import scoresde as S
from scoresde.diffusion.denoiser import CountingDenoiser


class Way(NamedTuple):
    library: str
    name: str
    trace: str
    run: Callable[[S.Denoiser, Tensor], Tensor]  # (denoiser, x) -> log p (B,)


def ours(trace: str, divergence: S.Exact | S.Hutchinson, solver: S.Tolerance | S.Budget) -> Way:
    name = ", ".join(f"{key}={value:g}" for key, value in solver.accuracy.items() if key != "atol")

    def run(denoiser: S.Denoiser, x: Tensor) -> Tensor:
        return S.log_likelihood(denoiser, x, divergence=divergence, rng=S.Rng(0), solver=solver).log_prob

    return Way("scoresde", name, trace, run)


def velocity(denoiser: S.Denoiser, x: Tensor, t: Tensor) -> Tensor:
    return denoiser(x, t).velocity


def divergence(value: Tensor, x: Tensor, probe: Tensor | None) -> Tensor:
    """tr ∂value/∂x by a vector–Jacobian product with the probe, or with every axis."""
    if probe is not None:
        return (torch.autograd.grad((value * probe).sum(), x)[0] * probe).sum(1)
    rows = [torch.autograd.grad(value[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(x.shape[1])]
    return torch.stack(rows).sum(0)


def signs(x: Tensor) -> Tensor:
    return S.Rng(0).rademacher_like(x)


def torchdiffeq_in_t(tolerance: float, exact: bool) -> Way:
    def run(denoiser: S.Denoiser, x: Tensor) -> Tensor:
        from torchdiffeq import odeint

        probe = None if exact else signs(x)

        def field(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                y = state[0].detach().requires_grad_()
                v = velocity(denoiser, y, t)
                return v.detach(), divergence(v, y, probe)

        sde = denoiser.sde
        times = torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)
        z, change = odeint(field, (x, x.new_zeros(len(x))), times, rtol=tolerance, atol=tolerance, method="dopri5")
        return denoiser.prior_log_prob(z[-1]) + change[-1]

    return Way("torchdiffeq", f"dopri5 in t, rtol={tolerance:g}", "exact" if exact else "1 probe", run)


def scipy_in_t(tolerance: float) -> Way:
    def run(denoiser: S.Denoiser, x: Tensor) -> Tensor:
        from scipy.integrate import solve_ivp

        probe, size = signs(x), x.numel()

        def field(t: float, state: np.ndarray) -> np.ndarray:
            y = torch.from_numpy(state[:size]).reshape(x.shape)
            now = torch.tensor(t, dtype=torch.float64)
            drift = velocity(denoiser, y, now)
            with torch.enable_grad():
                y = y.requires_grad_()
                change = divergence(velocity(denoiser, y, now), y, probe)
            return np.concatenate([drift.reshape(-1).numpy(), change.numpy()])

        sde = denoiser.sde
        start = np.concatenate([x.reshape(-1).numpy(), np.zeros(len(x))])
        with torch.no_grad():
            solved = solve_ivp(field, (sde.t_min, sde.t_max), start, rtol=tolerance, atol=tolerance, method="RK45")
        end = solved.y[:, -1]
        z = torch.from_numpy(end[:size]).reshape(x.shape)
        return denoiser.prior_log_prob(z) + torch.from_numpy(end[size:])

    return Way("scipy, as score_sde", f"RK45 in t, rtol={tolerance:g}", "1 probe", run)


def k_diffusion(tolerance: float) -> Way:
    def run(denoiser: S.Denoiser, x: Tensor) -> Tensor:
        sde = denoiser.sde
        alpha = sde.marginal(torch.tensor(sde.t_min, dtype=torch.float64))[0]
        last, first = peers.levels(sde, "log", 1).tolist()
        torch.manual_seed(0)
        log_prob, _ = peers.k_sampling().log_likelihood(
            peers.k_model(denoiser), x / alpha, first, last, rtol=tolerance, atol=tolerance
        )
        return log_prob - x.shape[1] * alpha.log()

    return Way("k-diffusion", f"dopri5, rtol={tolerance:g}", "1 probe", run)


def ways(cfg: DictConfig) -> list[Way]:
    return [
        *(ours("exact", S.Exact(), S.Budget(n)) for n in cfg.budgets),
        *(ours("exact", S.Exact(), S.Tolerance(tolerance, tolerance)) for tolerance in cfg.tolerances),
        *(torchdiffeq_in_t(tolerance, True) for tolerance in cfg.tolerances),
        *(ours("1 probe", S.Hutchinson(1), S.Budget(n)) for n in cfg.budgets),
        *(torchdiffeq_in_t(tolerance, False) for tolerance in cfg.tolerances),
        scipy_in_t(1e-5),
        k_diffusion(1e-4),
    ]


def likelihood(cfg: DictConfig) -> None:
    results = report.Report(cfg, "likelihood")
    lines = [["case", "library", "way", "trace", "calls", "seconds", "error, bits/dim"]]
    for name in cfg.cases:
        for kind in cfg.sdes:
            denoiser = CASES[name](SDES[kind])
            t = torch.tensor(denoiser.sde.t_min, dtype=torch.float64)
            x0 = denoiser.sample(cfg.points[name], rng=S.Rng(6), dtype=torch.float64)
            x = denoiser.sde.perturb(x0, t, S.Rng(7).normal_like(x0))
            truth, case = denoiser.log_prob(x, t), f"{name} {kind.upper()}"
            for way in ways(cfg):
                way.run(denoiser, x[:2])  # so that imports are not timed
                counted = CountingDenoiser(denoiser)
                start = time.perf_counter()
                log_prob = way.run(counted, x)
                seconds = time.perf_counter() - start
                error = float((log_prob - truth).abs().mean()) / x.shape[1] / np.log(2)
                results.add(
                    f"{case}/{way.library} {way.name} {way.trace}", error, case=case, library=way.library,
                    method=way.name, trace=way.trace, evaluations=counted.evaluations, seconds=seconds,
                )  # fmt: skip
                title = f"**{way.name}**" if way.library == "scoresde" else way.name
                lines.append(
                    [case, way.library, title, way.trace, str(counted.evaluations), f"{seconds:.2f}", f"{error:.1e}"]
                )
                print(" | ".join(lines[-1]), flush=True)
    points = ", ".join(f"{n} points of {name}" for name, n in cfg.points.items() if name in cfg.cases)
    text = f"Mean |log p − exact| in bits/dim, at t_min. {points}; {cfg.threads} thread(s), float64."
    results.close(f"{text}\n\n{report.table(lines)}", figure(results.rows))


def figure(rows: list[dict[str, Any]]) -> Any:
    """Error against calls, one panel per case."""
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(row["case"] for row in rows))
    made = Figure(figsize=(3.6 * len(cases), 3.4), layout="constrained")
    for axes, case in zip(made.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        part = [row for row in rows if row["case"] == case]
        kinds = dict.fromkeys(
            (row["library"], row["method"].split("=")[0].removesuffix(", rtol"), row["trace"]) for row in part
        )
        for library, kind, trace in kinds:
            line = [
                (row["evaluations"], row["value"])
                for row in part
                if row["library"] == library and row["trace"] == trace and row["method"].startswith(kind)
            ]
            style = "o-" if library == "scoresde" else "x--"
            axes.loglog(*zip(*sorted(line), strict=True), style, label=f"{library} {kind}, {trace}", markersize=3)
        axes.set_title(case, fontsize=9)
        axes.grid(alpha=0.3)
    made.axes[0].legend(fontsize=5)
    made.supxlabel("network calls", fontsize=8)
    made.supylabel("error, bits/dim", fontsize=8)
    return made


if __name__ == "__main__":
    report.launch(likelihood, "likelihood")
