"""What a sampler costs when its network costs nothing: microseconds per evaluation, beside other libraries.

    python benchmarks/overhead.py
    python benchmarks/overhead.py threads=1 clock=cpu 'families=[dpm++2m,adams]'    # on a machine that others use too

Every network returns a tensor that is there already. A run is everything a user pays: the grid, the coefficients,
the checks and the steps. Methods of one family stand together and take turns; the fastest of `repeats` runs counts,
which other work on the machine can only miss. `temporaries` is how many tensors of the size of x a step allocates.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import peers
import report
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import scoresde as S


class Run(NamedTuple):
    call: Callable[[], Any]
    evaluations: int


class Entry(NamedTuple):
    family: str
    library: str
    name: str
    make: Callable[[Tensor, int], Run]


class Still(S.Denoiser):
    """Predicts the same two tensors everywhere."""

    def __init__(self, x: Tensor):
        super().__init__(S.VPSDE())
        self.prediction = S.Prediction(torch.randn_like(x), torch.randn_like(x), self.sde.at(0.5, x))

    def forward(self, x: Tensor, t: Tensor, cond: S.Cond = None) -> S.Prediction:
        return self.prediction


def ours(family: str, name: str, step: S.Step) -> Entry:
    def make(x: Tensor, steps: int) -> Run:
        denoiser, sampler = Still(x), S.Sampler(step, S.LogSNRGrid(), steps, denoise=False)
        return Run(lambda: sampler(denoiser, x, rng=S.Rng(0)), sampler.evaluations or 0)

    return Entry(family, "scoresde", name, make)


def diffusers(family: str, name: str, scheduler: str, **kwargs: Any) -> Entry:
    def make(x: Tensor, steps: int) -> Run:
        import diffusers

        made = getattr(diffusers, scheduler)(**{"prediction_type": "sample", **kwargs})
        output = torch.randn_like(x)

        def call() -> Tensor:
            made.set_timesteps(steps)
            y = x
            for t in made.timesteps:
                y = made.step(output, t, made.scale_model_input(y, t), return_dict=False)[0]
            return y

        made.set_timesteps(steps)
        return Run(call, len(made.timesteps))

    return Entry(family, "diffusers", name, make)


def azula(family: str, name: str, sampler: str, calls: int = 1, **kwargs: Any) -> Entry:
    def make(x: Tensor, steps: int) -> Run:
        import azula.noise
        import azula.sample

        posterior = SimpleNamespace(mean=torch.randn_like(x))
        model = torch.nn.Module()
        model.schedule = azula.noise.VPSchedule()  # type: ignore[assignment]
        model.forward = lambda x, t: posterior  # type: ignore[method-assign]
        made = getattr(azula.sample, sampler)(model, steps=steps, silent=True, **kwargs)
        return Run(lambda: made(x), calls * steps)

    return Entry(family, "azula", name, make)


def k_diffusion(family: str, name: str, function: str, calls: int = 1, noisy: bool = False) -> Entry:
    def make(x: Tensor, steps: int) -> Run:
        sample, denoised = getattr(peers.k_sampling(), function), torch.randn_like(x)
        sigmas = torch.logspace(2, -2, steps + 1)
        # its default Brownian tree costs 50 times as much
        kwargs = {"noise_sampler": lambda *_: torch.randn_like(x)} if noisy else {}
        return Run(lambda: sample(lambda x, s: denoised, x, sigmas, disable=True, **kwargs), calls * steps)

    return Entry(family, "k-diffusion", name, make)


ENTRIES = (
    ours("first order", "DDIM()", S.DDIM()),
    diffusers("first order", "DDIM", "DDIMScheduler", clip_sample=False),
    k_diffusion("first order", "euler", "sample_euler"),
    azula("first order", "Euler", "EulerSampler"),
    ours("dpm++2m", "DPMSolverPP(2)", S.DPMSolverPP(2)),
    k_diffusion("dpm++2m", "dpmpp_2m", "sample_dpmpp_2m"),
    diffusers("dpm++2m", "DPM++2M", "DPMSolverMultistepScheduler"),
    ours("dpm++2m sde", "DPMSolverPP(2, eta=1)", S.DPMSolverPP(2, eta=1.0)),
    k_diffusion("dpm++2m sde", "dpmpp_2m_sde", "sample_dpmpp_2m_sde", noisy=True),
    diffusers("dpm++2m sde", "DPM++2M SDE", "DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"),
    ours("with corrector", "UniPC(2)", S.UniPC(2)),
    ours("with corrector", "UniPC(3)", S.UniPC(3)),
    ours("with corrector", "Adams(3, 3)", S.Adams(3, 3)),
    diffusers("with corrector", "UniPC-2", "UniPCMultistepScheduler", solver_order=2),
    diffusers("with corrector", "UniPC-3", "UniPCMultistepScheduler", solver_order=3),
    ours("deis", "DEIS(3)", S.DEIS(3)),
    diffusers("deis", "DEIS-3", "DEISMultistepScheduler", solver_order=3),
    azula("deis", "zEAB-3", "zEABSampler", order=3),
    ours("sa-solver", "SASolver()", S.SASolver()),
    diffusers("sa-solver", "SA-Solver", "SASolverScheduler", tau_func=lambda t: torch.tensor(1.0)),
    ours("adams", "Adams(3)", S.Adams(3)),
    azula("adams", "vAB-3", "vABSampler", order=3),
    k_diffusion("adams", "lms", "sample_lms"),
    ours("ancestral", "Ancestral()", S.Ancestral()),
    ours("ancestral", "EulerMaruyama()", S.EulerMaruyama()),
    k_diffusion("ancestral", "euler_ancestral", "sample_euler_ancestral"),
    azula("ancestral", "DDPM", "DDPMSampler"),
    azula("ancestral", "Ito", "ItoSampler"),
    diffusers("ancestral", "DDPM", "DDPMScheduler", clip_sample=False),
    ours("heun", "Heun()", S.Heun()),
    k_diffusion("heun", "heun", "sample_heun", calls=2),
    azula("heun", "Heun", "HeunSampler", calls=2),
    diffusers("heun", "Heun", "HeunDiscreteScheduler"),
)


class Temporaries(TorchDispatchMode):
    """Counts operations that return a new tensor of `size` numbers."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        aliased = operator._schema.returns and operator._schema.returns[0].alias_info is not None
        self.count += isinstance(result, Tensor) and result.numel() == self.size and not aliased
        return result


def temporaries(run: Run, size: int) -> float:
    with Temporaries(size) as counted:
        run.call()
    return counted.count / run.evaluations


def measure(cfg: DictConfig, results: report.Report, family: str, shape: tuple[int, ...]) -> list[list[str]]:
    """One family at one shape: rows of (library, method, µs, ratio to the cheapest peer, temporaries)."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    entries = [entry for entry in ENTRIES if entry.family == family]
    runs = [entry.make(x, cfg.steps) for entry in entries]
    best = [float("inf")] * len(runs)
    for run in runs:
        run.call()
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[cfg.clock]
    for _ in range(cfg.repeats):
        for index, run in enumerate(runs):
            start = clock()
            run.call()
            best[index] = min(best[index], 1e6 * (clock() - start) / run.evaluations)
    peer = min(cost for cost, entry in zip(best, entries, strict=True) if entry.library != "scoresde")
    rows = []
    label = "x".join(str(n) for n in shape)
    for entry, run, cost in zip(entries, runs, best, strict=True):
        made = temporaries(run, x.numel())
        results.add(
            f"{family}/{entry.library} {entry.name}/{label}", cost, family=family, library=entry.library,
            method=entry.name, shape=label, ratio=cost / peer, temporaries=made,
        )  # fmt: skip
        rows.append([entry.library, entry.name, f"{cost:.0f}", f"{cost / peer:.2f}", f"{made:.1f}"])
    return rows


def overhead(cfg: DictConfig) -> None:
    results = report.Report(cfg, "overhead")
    families = cfg.families or list(dict.fromkeys(entry.family for entry in ENTRIES))
    shapes = [tuple(shape) for shape in cfg.shapes]
    head = ["family", "library", "method", *(f"{'x'.join(map(str, s))} (ratio)" for s in shapes), "temporaries"]
    lines = [head]
    for family in families:
        parts = [measure(cfg, results, family, shape) for shape in shapes]
        for group in zip(*parts, strict=True):
            costs = [f"{row[2]} ({row[3]})" for row in group]
            name = f"**{group[0][1]}**" if group[0][0] == "scoresde" else group[0][1]
            lines.append([family, group[0][0], name, *costs, group[0][4]])
            print(" | ".join(lines[-1]), flush=True)
    text = (
        "Microseconds per network evaluation with a network that costs nothing, and in brackets the ratio to the "
        f"cheapest other library of the family. {cfg.threads} thread(s), {cfg.clock} time, {cfg.steps} steps, fastest "
        f"of {cfg.repeats} interleaved runs. `temporaries`: tensors of the size of x that a step allocates."
    )
    results.close(f"{text}\n\n{report.table(lines)}", figure(results.rows))


def figure(rows: list[dict[str, Any]]) -> Any:
    """Ratio of every method to the cheapest peer of its family."""
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    made = Figure(figsize=(4.2 * len(shapes), 7), layout="constrained")
    for axes, shape in zip(made.subplots(1, len(shapes), squeeze=False)[0], shapes, strict=True):
        part = [row for row in rows if row["shape"] == shape][::-1]
        colors = ["tab:blue" if row["library"] == "scoresde" else "lightgrey" for row in part]
        axes.barh(range(len(part)), [row["ratio"] for row in part], color=colors)
        axes.set_yticks(range(len(part)), [f"{row['library']} {row['method']}" for row in part], fontsize=6)
        axes.axvline(1, color="black", linewidth=0.7)
        axes.set_xscale("log")
        axes.set_title(f"{shape}: cost / cheapest peer", fontsize=8)
    return made


if __name__ == "__main__":
    report.launch(overhead, "overhead")
