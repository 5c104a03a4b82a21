"""Flow maps of trained runs beside their teacher: how near they come to where its ODE ends, how good that is, and what
it costs.

    scoresde-train experiment=digits_edm out=runs/digits
    scoresde-distil experiment=digits_distil run=runs/digits out=runs/digits_fast
    python benchmarks/few_step_runs.py teacher=runs/digits 'maps=[runs/digits_fast]' \
        results=benchmarks/results/few_step/digits

    scoresde-distil experiment=latent_distil run=runs/latent out=runs/latent_fast
    python benchmarks/few_step_runs.py teacher=runs/latent 'maps=[runs/latent_fast]' lenet=/path/to/lenet_mnist.npz \
        results=benchmarks/results/few_step/latent

All begin at the same noise. `RMS` is the distance of model data to where the teacher's ODE ends from there, by `exact`
calls, over the deviation of these ends, with its standard error over samples. `W2` is the sliced-W2 of raw samples to
held-out ones, over that of as many training samples, with the error of its mean over `sets` parts. The Fréchet distance
is of the LeNet's last hidden layer to all held-out images, with its jackknife error, and is no FID; precision and
recall are in the same features, against as many held-out images. Seconds are those of the processor, decoding left out.
"""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import report
import torch
from guidance import LeNet, agreement, spaced
from latent import distance
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor

import scoresde as S
from scoresde.diffusion.conditions import take
from scoresde.metrics import precision_recall, sliced_w2
from scoresde.runs.load import load_run

Row = dict[str, tuple[float, float]]


class Comparison:
    """What all rows share: noise, conditions, the ends of the ODE and held-out samples."""

    def __init__(self, cfg: DictConfig):
        self.cfg, self.run = cfg, load_run(Path(cfg.teacher)).whole_data()
        self.model = self.run.guided(cfg.scale)
        train, test = self.run.dataset.train, self.run.dataset.test
        n = min(cfg.samples, len(test.raw))
        self.cond = self.run.cond(None, n)
        self.noise = self.model.prior_sample((n, *self.run.event_shape), rng=S.Rng(seeds=range(n)))
        self.parts = torch.arange(n).split(cfg.batch)
        self.ends, _ = self.drawn(partial(S.sample, self.model, budget=cfg.exact))
        self.held_out, known = test.raw[spaced(n, test)].float(), train.raw[spaced(n, train)].float()
        self.floor = self.w2(known)[0]
        self.judge = LeNet(Path(cfg.lenet)) if cfg.lenet else None
        self.features = None if self.judge is None else self.judge(test.raw[:].float())
        self.known = self.quality(known)

    def drawn(self, draw: Any) -> tuple[Tensor, float]:
        """Model data, and the processor's milliseconds of one."""
        draw(self.noise[:2], cond=take(self.cond, slice(2)))  # what is made once
        start = time.process_time()
        made = [draw(self.noise[part], cond=take(self.cond, part)) for part in self.parts]
        return torch.cat(made), 1000 * (time.process_time() - start) / len(self.noise)

    def w2(self, raw: Tensor) -> tuple[float, float]:
        parts = zip(raw.chunk(self.cfg.sets), self.held_out.chunk(self.cfg.sets), strict=True)
        found = torch.tensor([sliced_w2(*pair, rng=S.Rng(0)) for pair in parts])
        return float(found.mean()), float(found.std()) / math.sqrt(len(found))

    @torch.no_grad()
    def quality(self, raw: Tensor) -> Row:
        row = {"sliced-W2 / floor": tuple(part / self.floor for part in self.w2(raw))}
        if self.judge is not None and self.features is not None:
            features = self.judge(raw)
            row["LeNet-FD"] = distance(features, self.features)
            shares = precision_recall(features, self.judge(self.held_out), features)
            row |= {name: (share, math.sqrt(share * (1 - share) / len(raw))) for name, share in shares.items()}
        return row

    def row(self, draw: Any) -> Row:
        made, cost = self.drawn(draw)
        squares = (made - self.ends).square().flatten(1).mean(1)
        rms, spread = float(squares.mean().sqrt()), float(self.ends.std())
        error = float(squares.std()) / math.sqrt(len(squares)) / (2 * rms)
        raw = self.run.decode(made).float()
        found = {"RMS": (rms / spread, error / spread)} | self.quality(raw)
        if self.judge is not None and self.cond is not None:
            labels = self.cond if isinstance(self.cond, Tensor) else self.cond["label"]
            found["of its class"] = agreement(self.judge, raw, labels)
        return found | {"CPU ms": (cost, 0.0)}


def picture(rows: list[tuple[str, int, Row]]) -> Any:
    """What a call buys."""
    keys = [key for key in ("RMS", "sliced-W2 / floor", "LeNet-FD") if key in rows[0][2]]
    figure = Figure(figsize=(4.2 * len(keys), 3.8), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        for name in dict.fromkeys(name for name, _, _ in rows):
            points = [(calls, *row[key]) for of, calls, row in rows if of == name]
            calls, values, errors = zip(*points, strict=True)
            axes.errorbar(calls, values, errors, fmt="o-", label=name)
        axes.set(xscale="log", yscale="log", xlabel="network calls", title=key)
        axes.legend(fontsize=8)
    return figure


def main(cfg: DictConfig) -> None:
    out, all_of = report.Report(cfg, "few_step_runs"), Comparison(cfg)
    rows: list[tuple[str, int, Row]] = []

    def add(name: str, calls: int, draw: Any) -> None:
        row = all_of.row(draw)
        rows.append((name, calls, row))
        for key, (value, error) in row.items():
            out.add(key, value, of=name, calls=calls, stderr=error)
        print(name, calls, *(f"{key} {value:.3f} ± {error:.3f}" for key, (value, error) in row.items()), flush=True)

    for path in cfg.maps:
        map = load_run(Path(path)).denoiser
        for calls in cfg.calls:
            add(Path(path).name, calls, partial(S.Sampler(S.FlowMap(), None, calls, denoise=False), map))
    for budget in cfg.budgets:
        sampler = all_of.run.sampler(budget, take(all_of.cond, slice(8)), cfg.scale)
        add("teacher", budget, partial(sampler, all_of.model))
    keys = list(rows[0][2])
    cells = [["", "calls", *keys]]
    for name, calls, row in [*rows, ("training samples", "", all_of.known)]:
        found = (row.get(key) for key in keys)
        cells.append([name, str(calls), *("" if one is None else shown(*one) for one in found)])
    text = f"{len(all_of.noise)} samples on {cfg.threads} thread.\n\n{report.table(cells)}"
    out.close(text, picture(rows))


def shown(value: float, error: float) -> str:
    return f"{value:.3f} ± {error:.3f}" if error else f"{value:.2f}"


if __name__ == "__main__":
    report.launch(main, "few_step_runs")
