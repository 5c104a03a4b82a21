"""Less work for the same loss: what times, weights, couplings and averages buy in equal CPU time.

    python benchmarks/less_work.py
    python benchmarks/less_work.py 'cases=[digits,mnist]' seeds=2     # MNIST in $SCORESDE_DATA/mnist
    python benchmarks/less_work.py seconds=5 seeds=1 points=16        # does it run?

Variants of one seed start from the same weights and see the same data in the same order. They train in this process, by
turns in short slices, until each has had the same CPU time, averages and pairings included. The measure is the same
for all: bits/dim of fixed held-out points along `budget` network calls, with the same noise and probes, of the
averaged weights. Choices made afterwards (the post-hoc length) are made on the other half of the held-out split.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import report
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

import scoresde as S
from scoresde.config import build, build_network
from scoresde.data import Dataset, EpochOrder, Split
from scoresde.evaluate.likelihood import OdeLikelihood
from scoresde.likelihood.budget import Budget
from scoresde.runs.posthoc import reconstruct, write_snapshot
from scoresde.train.ema import EMA, PowerEMA


class Run:
    """One variant with one seed."""

    def __init__(self, cfg: DictConfig, name: str, case: DictConfig, dataset: Dataset, seed: int, folder: Path):
        self.cfg, self.name, self.variant = cfg, name, cfg.variants[name]
        self.dataset, self.seed, self.folder = dataset, seed, folder / f"{name}-{seed}"
        torch.manual_seed(seed)
        network = build_network(case.network, event_shape=dataset.event_shape, classes=0)
        denoiser = S.Preconditioned(
            network, build(self.variant.sde), S.EDM(case.sigma_data), sigma_data=case.sigma_data
        )
        parts = {key: build(node) for key, node in self.variant.loss.items()}
        self.loss = S.DenoisingLoss(denoiser, **parts)
        self.optimizer = torch.optim.Adam(self.loss.parameters(), cfg.lr, betas=tuple(cfg.betas), fused=True)
        self.ema = EMA(self.loss, **cfg.ema)
        self.power = PowerEMA(self.loss) if self.variant.get("averages") else None
        self.order, self.rng = EpochOrder(len(dataset.train), cfg.batch, seed), S.Rng(seed)
        self.images, self.skipped, self.spent, self.written = 0, 0, 0.0, 0

    def train(self, until: float) -> None:
        """Steps until `until` CPU seconds were spent."""
        self.loss.train()
        while self.spent < until:
            start = time.process_time()
            self.step()
            self.spent += time.process_time() - start

    def step(self) -> None:
        self.optimizer.param_groups[0]["lr"] = self.cfg.lr * min(1.0, (self.images + self.cfg.batch) / self.cfg.warmup)
        x0 = self.dataset.encode(self.dataset.train.raw[self.order.next()], self.rng)
        self.loss(x0, rng=self.rng).mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(self.loss.parameters(), self.variant.clip)
        keep = norm.isfinite()
        if keep:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.images, self.skipped = self.images + len(x0), self.skipped + int(not keep)
        self.ema.update(self.loss, self.images, len(x0), keep)
        if self.power is not None:
            self.power.update(self.loss, self.images, len(x0), keep)

    def snapshot(self) -> None:
        """Kept for the post-hoc averages, and not counted: seconds of disk are no work of training."""
        due = int(self.cfg.snapshots * self.spent / self.cfg.seconds)
        if self.power is not None and due > self.written:
            write_snapshot(self.folder, self.power.shadows, self.images, self.power.sigma_rel)
            self.written = due

    def averages(self) -> dict[str, nn.Module]:
        """name -> loss with those weights, at the end."""
        found: dict[str, nn.Module] = {"last weights": self.loss, "EMA": self.ema.module}
        if self.power is not None:
            for sigma, shadow in zip(self.power.sigma_rel, self.power.shadows.values(), strict=True):
                found[f"power {sigma:g}"] = shadow
        return found


class Measure:
    """Bits/dim of fixed points of one part of the held-out split."""

    def __init__(self, cfg: DictConfig, dataset: Dataset, part: int):
        raw = dataset.test.raw[part::2]
        self.dataset = dataclasses.replace(dataset, test=Split(raw), train=Split(dataset.train.raw), classes=0)
        self.points = min(cfg.points, len(raw))
        self.likelihood = OdeLikelihood(solver=Budget(cfg.budget))

    def __call__(self, loss: Any) -> float:
        loss.eval()
        bits = self.likelihood.job(loss.denoiser, self.dataset, points=self.points).run().mean
        loss.train()
        return bits


def straightness(denoiser: S.Denoiser, shape: tuple[int, ...]) -> float:
    """RMS distance of samples in 4 Euler steps of equal length in t from those in 64, from the same noise, over the
    standard deviation of the latter: 0 for straight paths."""
    few, many = (S.Sampler(S.DDIM(), S.UniformGrid(), n, denoise=False)(denoiser, shape, rng=S.Rng(1)) for n in (4, 64))
    return float((few - many).square().mean().sqrt() / many.std())


def best_length(run: Run, chooser: Measure, cfg: DictConfig) -> tuple[float, Tensor | Any]:
    """The post-hoc length with the least bits/dim on the chooser's points, and the loss with those weights."""
    made, model = {}, run.ema.module
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    for sigma in cfg.lengths:
        try:
            made[sigma] = reconstruct(run.folder, sigma)
        except ValueError as error:  # too short for so few snapshots
            print(error)
    scores = {}
    for sigma, weights in made.items():
        model.load_state_dict(weights)
        scores[sigma] = chooser(model)
    best = min(scores, key=lambda sigma: scores[sigma])
    model.load_state_dict(kept)
    return best, made[best]


def race(cfg: DictConfig, results: report.Report, case: str, seed: int, folder: Path) -> None:
    """All variants of one seed, by turns; rows of every measurement."""
    setting = cfg.data[case]
    dataset = build(setting.data)
    chooser, measure = Measure(cfg, dataset, 0), Measure(cfg, dataset, 1)
    runs = [Run(cfg, name, setting, dataset, seed, folder) for name in cfg.variants]
    for part in range(1, cfg.measurements + 1):
        end = cfg.seconds * part / cfg.measurements
        while runs[0].spent < end:
            turn = min(end, runs[0].spent + cfg.slice)
            for run in runs:
                run.train(turn)
                run.snapshot()
        for run in runs:
            run.train(end)
            facts = {"case": case, "seed": seed, "variant": run.name, "images": run.images, "skipped": run.skipped}
            results.add(f"{case}/{run.name}", measure(run.ema.module), kind="curve", seconds=end, **facts)
    for run in runs:
        facts = {"case": case, "seed": seed, "variant": run.name}
        if run.variant.get("straightness"):
            value = straightness(run.ema.module.denoiser, (cfg.samples, *dataset.event_shape))
            results.add(f"{case}/{run.name}/straightness", value, kind="straightness", **facts)
        if run.power is not None:
            for name, model in run.averages().items():
                results.add(f"{case}/{name}", measure(model), kind="average", average=name, **facts)
            sigma, weights = best_length(run, chooser, cfg)
            run.ema.module.load_state_dict(weights)
            results.add(
                f"{case}/power post hoc", measure(run.ema.module), kind="average", average="power, post hoc",
                sigma_rel=sigma, **facts,
            )  # fmt: skip


def mean(values: list[float]) -> str:
    """Mean ± standard error, over seeds."""
    spread = f" ± {np.std(values, ddof=1) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def curve(rows: list[dict[str, Any]], case: str, variant: str) -> dict[float, list[float]]:
    """Seconds -> bits/dim by seed."""
    found: dict[float, list[float]] = {}
    for row in rows:
        if (row["kind"], row["case"], row["variant"]) == ("curve", case, variant):
            found.setdefault(row["seconds"], []).append(row["value"])
    return found


def reached(line: Mapping[float, list[float]], goal: float) -> float:
    """The time at which the mean curve first comes to `goal`, by straight lines between the measurements."""
    before: tuple[float, float] | None = None
    for seconds, values in line.items():
        level = float(np.mean(values))
        if level <= goal:
            if before is None:
                return seconds
            share = (before[1] - goal) / (before[1] - level)
            return before[0] + share * (seconds - before[0])
        before = (seconds, level)
    return math.inf


def factor(line: Mapping[float, list[float]], other: Mapping[float, list[float]]) -> str:
    """How many times less CPU time `line` needs than `other`, to where the worse of the two ends."""
    total = max(line)
    own, theirs = float(np.mean(line[total])), float(np.mean(other[total]))
    return f"{total / reached(line, theirs):.2f}" if own <= theirs else f"{reached(other, own) / total:.2f}"


def variants_table(cfg: DictConfig, rows: list[dict[str, Any]], case: str) -> str:
    lines = [["variant", "bits/dim", "against", "difference", "times less work", "images", "straightness"]]
    last = {name: curve(rows, case, name) for name in cfg.variants}
    for name, variant in cfg.variants.items():
        end = max(last[name])
        mine = [row for row in rows if row["case"] == case and row["variant"] == name]
        images = [row["images"] for row in mine if row["kind"] == "curve" and row["seconds"] == end]
        straight = [row["value"] for row in mine if row["kind"] == "straightness"]
        compared = ["", "", ""]
        if variant.against:
            other = last[variant.against]
            paired = [a - b for a, b in zip(last[name][end], other[end], strict=True)]
            compared = [variant.against, mean(paired), factor(last[name], other)]
        lines.append(
            [name, mean(last[name][end]), *compared, f"{np.mean(images):,.0f}", mean(straight) if straight else ""]
        )
    return report.table(lines)


def averages_table(rows: list[dict[str, Any]], case: str) -> str:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["case"] == case and row["kind"] == "average":
            found.setdefault(row["average"], []).append(row)
    lines = [["average", "bits/dim", "difference to EMA", "length chosen"]]
    for name, part in found.items():
        paired = [a["value"] - b["value"] for a, b in zip(part, found["EMA"], strict=True)]
        lengths = ", ".join(f"{row['sigma_rel']:g}" for row in part if "sigma_rel" in row)
        lines.append([name, mean([row["value"] for row in part]), mean(paired), lengths])
    return report.table(lines)


def figure(cfg: DictConfig, rows: list[dict[str, Any]]) -> Any:
    """Bits/dim against CPU time, one panel per case."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(6 * len(cfg.cases), 4.5), layout="constrained")
    for axes, case in zip(made.subplots(1, len(cfg.cases), squeeze=False)[0], cfg.cases, strict=True):
        for name in cfg.variants:
            line = curve(rows, case, name)
            level = [float(np.mean(values)) for values in line.values()]
            bars = [float(np.std(values) / math.sqrt(max(len(values) - 1, 1))) for values in line.values()]
            axes.errorbar(list(line), level, bars, label=name, marker=".", linewidth=1)
        axes.set(title=case, xlabel="CPU seconds", ylabel="held-out bits/dim", yscale="log")
        axes.legend(fontsize=7)
    return made


def less_work(cfg: DictConfig) -> None:
    results = report.Report(cfg, "less_work")
    text = (
        f"{cfg.seconds} CPU seconds per run on {cfg.threads} thread, {cfg.seeds} seeds; mean ± standard error over "
        f"seeds. Bits/dim of {cfg.points} held-out points (fewer if half the split has fewer) along {cfg.budget} "
        "network calls. `difference` is paired by seed. `times less work`: CPU time of `against` over that of the "
        "variant, to the same bits/dim, that where the worse of the two ended; below 1 it needed more. "
        "`straightness`: distance of samples in 4 Euler steps from those in 64, over their standard deviation."
    )
    with tempfile.TemporaryDirectory() as folder:
        for case in cfg.cases:
            for seed in range(cfg.seeds):
                race(cfg, results, case, seed, Path(folder) / case)
            text += (
                f"\n\n## {case}\n\n{variants_table(cfg, results.rows, case)}\n\n{averages_table(results.rows, case)}"
            )
            print(text, flush=True)
    results.close(text, figure(cfg, results.rows))


if __name__ == "__main__":
    report.launch(less_work, "less_work")
