r"""What telling a model the label, or a caption, is worth, by noise level: held-out nats an image.

    python benchmarks/labels.py run=runs/mnist_classes alone=runs/mnist_alone
    python benchmarks/labels.py run=runs/digits_classes alone=runs/digits_alone results=benchmarks/results/digits
    python benchmarks/labels.py run=runs/scenes 'edges=[10,3,1,0.3,0.1,0.01]' results=benchmarks/results/scenes

Denoising from σ/α = b down to a costs ½ ∫ e^λ E‖x_0 − x̂_0‖² dλ nats (Kingma et al. 2021, eq. 17), and all noise levels
together the bound on the likelihood. Labels matter where noise hides the class, and there one is worth at most what it
holds. At little noise two trainings differ by what has nothing to do with labels: the EDM loss hardly trains below
σ/α = 0.01, where most of the bits/dim of 8-bit images are. Each image meets the same noise in all models, so that the
differences are paired.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import report
import torch
from omegaconf import DictConfig
from torch import Tensor

import scoresde as S
from scoresde.data import Dataset
from scoresde.runs.load import load_run


@torch.no_grad()
def cost(denoiser: S.Denoiser, dataset: Dataset, cfg: DictConfig, high: float, low: float, *, told: bool) -> Tensor:
    """Nats (points,) that denoising from σ/α = `high` to `low` costs, by stratified λ."""
    first, last = (-2 * math.log(level) for level in (high, low))
    points = torch.arange(cfg.points) * len(dataset.test) // cfg.points
    parts = []
    for part in points.split(cfg.batch):
        rng = S.Rng(seeds=part.tolist())
        x0, total = dataset.encode(dataset.test.raw[part], rng), torch.zeros(len(part), dtype=torch.float64)
        cond = dataset.test.cond(part, told, torch.device("cpu"))
        for k in range(cfg.levels):
            snr = first + (last - first) * (k + rng.uniform((len(part),), dtype=torch.float64)) / cfg.levels
            t = denoiser.sde.time(snr)
            x = denoiser.sde.perturb(x0, t, rng.normal_like(x0))
            error = (denoiser(x, t, cond).x0 - x0).double().square().flatten(1).sum(1)
            total += 0.5 * snr.exp() * error * (last - first) / cfg.levels
        parts.append(total)
    return torch.cat(parts)


def main(cfg: DictConfig) -> None:
    run, out = load_run(Path(cfg.run)), report.Report(cfg, "labels")
    models, told = {"not told it": run.denoiser}, " and ".join(run.kinds)
    if cfg.alone:
        models["a model trained without"] = load_run(Path(cfg.alone)).denoiser
    ends = torch.tensor([run.denoiser.sde.t_max, run.denoiser.sde.t_min], dtype=torch.float64)
    most, least = run.denoiser.sde.log_snr(ends).mul(-0.5).exp().tolist()
    edges = [most, *cfg.edges, least]
    rows = [["", *(f"σ/α {high:.3g} … {low:.3g}" for high, low in pairwise(edges))], [f"told the {told}, cost"]]
    rows += [[f"{name}, more"] for name in models]
    for high, low in pairwise(edges):
        own = cost(run.denoiser, run.dataset, cfg, high, low, told=True)
        rows[1].append(f"{own.mean():.1f}")
        for row, (name, denoiser) in zip(rows[2:], models.items(), strict=True):
            more = cost(denoiser, run.dataset, cfg, high, low, told=False) - own
            mean, error = float(more.mean()), float(more.std()) / math.sqrt(len(more))
            out.add("more", mean, of=name, stderr=error, high=high, low=low)
            row.append(f"{mean:.2f} ± {error:.2f}")
        print(f"{high:.3g} … {low:.3g}", *(row[-1] for row in rows[1:]), sep="\t", flush=True)
    text = f"Nats an image, {cfg.points} held-out images, {cfg.levels} noise levels a column."
    if run.dataset.classes:
        text += f" A label holds {math.log(run.dataset.classes):.2f}."
    out.close(f"{text}\n\n{report.table(rows)}")


if __name__ == "__main__":
    report.launch(main, "labels")
