"""Flow maps on points of the plane: how near one or a few network calls come to where the exact ODE ends.

    python benchmarks/few_step.py train --losses trajectory --targets ring five --seconds 40
    python benchmarks/few_step.py train --losses consistency consistency_data mean_flow --sdes vp --seconds 40
    python benchmarks/few_step.py train --losses trajectory_data --targets ring five --seconds 60
    python benchmarks/few_step.py report

The teacher is the exact score of a mixture, which each map (an MLP) learns from noise that is new in every step; losses
whose name ends in `_data` see samples alone, and no teacher. All get the same processor time. What is measured is
kept in --folder, a file a map, so that a run that is stopped goes on; `report` draws what is there.

`RMS`: distance to the end of the exact ODE from the same noise, over the spread of the data. `W2`: sliced-W2 of 2,000
samples to 2,000 fresh points of the mixture, over that of two sets of fresh points.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from plain import table
from torch import Tensor

from scoresde import (
    DDPM,
    EDM,
    EDMSDE,
    SDE,
    VESDE,
    VPSDE,
    ConsistencyLoss,
    FlowMap,
    GaussianMixtureDenoiser,
    MeanFlowLoss,
    Preconditioned,
    RectifiedFlow,
    Rng,
    Sampler,
    SemigroupLoss,
    SubVPSDE,
    TrajectoryLoss,
    sample,
)
from scoresde.data.toys import EightGaussians
from scoresde.diffusion.denoiser import sample_std
from scoresde.losses import Pairs
from scoresde.losses.flow_map import FlowMapLoss
from scoresde.metrics import sliced_w2
from scoresde.nn import MLP

SDES: dict[str, SDE] = {
    "vp": VPSDE(),
    "ve": VESDE(),
    "edm": EDMSDE(),
    "subvp": SubVPSDE(),
    "flow": RectifiedFlow(),
    "ddpm": DDPM(),
}
CALLS, TEACHER_CALLS, SETS, POINTS = (1, 2, 4, 8), (5, 10, 20, 50), 4, 2000


def mixture(target: str, sde: SDE) -> GaussianMixtureDenoiser:
    """The ring of eight, or five Gaussians of unequal weights, widths and directions."""
    if target == "ring":
        ring = EightGaussians()
        return GaussianMixtureDenoiser(
            ring.means, torch.tensor(ring.std**2).double(), torch.full((8,), 0.125).double(), sde
        )
    rng = Rng(17)
    means = rng.normal((5, 2), dtype=torch.float64)
    root = 0.3 * rng.normal((5, 2, 2), dtype=torch.float64)
    covs = root @ root.mT + 0.02 * torch.eye(2, dtype=torch.float64)
    return GaussianMixtureDenoiser(means, covs, torch.tensor([0.35, 0.25, 0.2, 0.15, 0.05]).double(), sde)


def objective(name: str, map: Preconditioned, exact: GaussianMixtureDenoiser) -> FlowMapLoss:
    kind = name.removesuffix("_data")
    teacher = exact if name == kind else None
    if kind == "trajectory":
        return TrajectoryLoss(map, teacher, steps=32 if teacher else 12)
    if kind == "semigroup":
        return SemigroupLoss(map, teacher, pairs=Pairs(last=0.25, still=0.25))
    return {"mean_flow": MeanFlowLoss, "consistency": ConsistencyLoss}[kind](map, teacher)


def trained(
    name: str, exact: GaussianMixtureDenoiser, seed: int, seconds: float
) -> tuple[Preconditioned, dict[str, Any]]:
    """An average of a map after so much processor time, and what it cost."""
    torch.manual_seed(seed)
    network = MLP((2,), width=128, depth=3, told=["end"])
    std = sample_std(exact.sample(20_000, rng=Rng(5)))
    map = Preconditioned(network, exact.sde, EDM(std), sigma_data=std, told=["end"])
    loss, rng, data, batch = objective(name, map, exact), Rng(1000 + seed), Rng(2000 + seed), 1024
    optimizer = torch.optim.Adam(map.parameters(), 2e-3, betas=(0.9, 0.99), fused=True)
    average, start, steps, share = copy.deepcopy(map), time.process_time(), 0, 0.0
    while share < 1:
        x0 = exact.sample(batch, rng=data).float()
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (steps + 1) / 100, 2 * (1 - share))
        loss(x0, rng=rng).mean().backward()
        optimizer.step(), optimizer.zero_grad()
        steps += 1
        with torch.no_grad():
            for kept, new in zip(average.parameters(), map.parameters(), strict=True):
                kept.lerp_(new, 1 - min(0.998, steps / (steps + 10)))
        share = (time.process_time() - start) / seconds
    calls = {"trajectory": 4, "semigroup": 1, "mean_flow": 1, "consistency": 1}.get(name, 0)  # for a sample
    return average.eval(), {"steps": steps, "seconds": seconds, "teacher_calls": calls * batch * steps}


def noise(exact: GaussianMixtureDenoiser) -> list[Tensor]:
    return [exact.prior_sample((POINTS, 2), rng=Rng(100 + k)) for k in range(SETS)]


def measured(draw: Any, exact: GaussianMixtureDenoiser, ends: list[Tensor], floor: float) -> dict[str, list[float]]:
    """RMS over the spread, and sliced-W2 over its floor, of each set."""
    found: dict[str, list[float]] = {"rms": [], "w2": []}
    for k, (z, end) in enumerate(zip(noise(exact), ends, strict=True)):
        x = draw(z.float()).double()
        fresh = exact.sample(POINTS, rng=Rng(300 + k))
        found["rms"].append(float((x - end).square().mean().sqrt()) / sample_std(end))
        found["w2"].append(sliced_w2(x, fresh, rng=Rng(0)) / floor)
    return found


def references(target: str, name: str, folder: Path) -> tuple[list[Tensor], float]:
    """Where the exact ODE ends, and the floor; the teacher's own numbers are measured once."""
    exact = mixture(target, SDES[name])
    ends = [sample(exact, z, budget=200) for z in noise(exact)]
    pairs = [(exact.sample(POINTS, rng=Rng(400 + k)), exact.sample(POINTS, rng=Rng(500 + k))) for k in range(16)]
    floor = statistics.mean(sliced_w2(*pair, rng=Rng(0)) for pair in pairs)
    path = folder / f"{target}-{name}-teacher.json"
    if not path.exists():
        rows = {n: measured(partial(sample, exact, budget=n), exact, ends, floor) for n in TEACHER_CALLS}
        path.write_text(json.dumps({"target": target, "sde": name, "loss": "teacher", "seed": 0, "rows": rows}))
    return ends, floor


def train(options: argparse.Namespace) -> None:
    options.folder.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for target in options.targets:
            for name in options.sdes:
                ends, floor = references(target, name, options.folder)
                exact = mixture(target, SDES[name])
                for loss in options.losses:
                    path = options.folder / f"{target}-{name}-{loss}-{options.seconds:.0f}s-{seed}.json"
                    if path.exists():
                        continue
                    map, cost = trained(loss, exact, seed, options.seconds)
                    samplers = {n: Sampler(FlowMap(), None, n, denoise=False) for n in CALLS}
                    rows = {n: measured(partial(s, map), exact, ends, floor) for n, s in samplers.items()}
                    facts = {"target": target, "sde": name, "loss": loss, "seed": seed, **cost}
                    path.write_text(json.dumps(facts | {"rows": rows}))
                    said = ", ".join(f"{n}: {mean(row['rms']):.3f} {mean(row['w2']):.2f}" for n, row in rows.items())
                    print(f"{path.stem}, {cost['steps']} steps: {said}", flush=True)


def mean(values: list[float]) -> float:
    return statistics.mean(values)


def shown(values: list[float], digits: int) -> str:
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def report(options: argparse.Namespace) -> None:
    """Tables over seeds, whose spread makes the errors, and a picture."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for path in sorted(options.folder.glob("*.json")):
        one = json.loads(path.read_text())
        found.setdefault((one["target"], one["sde"], one["loss"], f"{one.get('seconds', 0):.0f}"), []).append(one)
    head = ["target", "SDE", "taught by", "seconds", "seeds", "calls of the teacher's (10⁶)"]
    text = []
    for key, title, digits in (
        ("rms", "RMS to the exact end, over the spread", 3),
        ("w2", "Sliced-W2 over its floor", 2),
    ):
        rows = [[*head, *(f"{n} call{'s' * (n > 1)}" for n in CALLS)]]
        for place, ones in found.items():
            if place[2] != "teacher":
                cells = [shown([mean(one["rows"][str(n)][key]) for one in ones], digits) for n in CALLS]
                calls = mean([one["teacher_calls"] for one in ones]) / 1e6
                rows.append([*place, str(len(ones)), f"{calls:.1f}", *cells])
        teachers = [["target", "SDE", *(f"{n} calls" for n in TEACHER_CALLS)]]
        for (target, name, loss, _), (one, *_) in found.items():
            if loss == "teacher":
                teachers.append(
                    [target, name, *(f"{mean(one['rows'][str(n)][key]):.{digits}f}" for n in TEACHER_CALLS)]
                )
        text += [f"## {title}", table(rows), "The exact score by `sample(budget=…)`:", table(teachers)]
    options.results.mkdir(parents=True, exist_ok=True)
    command = "python benchmarks/few_step.py train …; python benchmarks/few_step.py report"
    (options.results / "few_step.md").write_text(
        f"`{command}`\n\n{__doc__}\n\n" + "\n\n".join(text) + "\n", encoding="utf-8"
    )
    picture(found, options.results / "few_step.png")


def picture(found: dict[tuple[str, ...], list[dict[str, Any]]], path: Path) -> None:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    ring, losses = figure.subplots(1, 2, sharey=True)
    for (target, name, loss, seconds), ones in found.items():
        calls = TEACHER_CALLS if loss == "teacher" else CALLS
        line = [mean([mean(one["rows"][str(n)]["rms"]) for one in ones]) for n in calls]
        if target == "ring" and loss in ("trajectory", "teacher"):
            label = f"{name}, map" if loss == "trajectory" else None
            colour = f"C{list(SDES).index(name)}"
            ring.plot(calls, line, "o-" if label else "x:", color=colour, label=label)
        if target == "ring" and name == "vp":
            losses.plot(calls, line, "x:" if loss == "teacher" else "o-", label=f"{loss}, {seconds} s")
    for axes, title in (
        (ring, "ring: maps along trajectories, and their exact teacher (×)"),
        (losses, "ring under VP"),
    ):
        axes.set(xscale="log", yscale="log", xlabel="network calls", title=title)
        axes.legend(fontsize=8)
    ring.set_ylabel("RMS to the exact end / spread")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training, reporting = commands.add_parser("train"), commands.add_parser("report")
    training.add_argument("--targets", nargs="+", default=["ring"], choices=["ring", "five"])
    training.add_argument("--sdes", nargs="+", default=list(SDES), choices=list(SDES))
    training.add_argument("--losses", nargs="+", default=["trajectory"])
    training.add_argument("--seeds", nargs="+", type=int, default=[0])
    training.add_argument("--seconds", type=float, default=60.0, help="processor time of each training")
    reporting.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "few_step")
    for one in (training, reporting):
        one.add_argument("--folder", type=Path, default=Path("few_step"), help="of what was measured")
    options = parser.parse_args()
    torch.set_num_threads(1)
    {"train": train, "report": report}[options.command](options)


if __name__ == "__main__":
    main()
