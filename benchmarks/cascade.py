"""Cascades of both kinds beside a model of the pixels: bits/dim, quality, seconds, and the low resolution that is kept.

    scoresde-train experiment=mnist_low data.path=/path/to/idx/files out=runs/low
    scoresde-train experiment=mnist_details data.path=/path/to/idx/files out=runs/details
    scoresde-train experiment=mnist_upsampled data.path=/path/to/idx/files out=runs/fine
    scoresde-train experiment=mnist_vp data.path=/path/to/idx/files out=runs/pixels
    python benchmarks/cascade.py 'models=[[runs/low,runs/details],[runs/low,runs/fine],[runs/pixels]]' \
        lenet=/path/to/lenet_mnist.npz

Samples of each are of the same seeds, along `budget` network calls in each stage. The Fréchet distance is of the
LeNet's last hidden layer to held-out images, with its jackknife error; it is no FID. The residual is the root mean
square, over samples and places, of the low resolution less the picture that the last stage was told, in grey levels: of
samples as they were drawn, and rounded to integers. Bits/dim are of dequantised images, of a cascade by the chain rule;
of one that draws the picture anew there are none.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import report
import torch
from guidance import LeNet, spaced
from latent import bits, drawn, likeness
from omegaconf import DictConfig
from torch import Tensor

import scoresde as S
from scoresde.evaluate import figures


def residuals(cascade: S.Cascade, cfg: DictConfig) -> tuple[float, float]:
    """RMS residual of the low resolution in raw units, before and after rounding, of 100 samples."""
    sampler, streams, x = (
        S.Sampler(S.DPMSolverPP(2), S.LogSNRGrid(), steps=cfg.budget - 1),
        S.Rng(seeds=range(100)),
        None,
    )
    for stage, (run, level) in enumerate(zip(cascade.runs, cascade.levels(cfg.level), strict=True)):
        own, rows = cascade.begin(stage, None, x, level, streams), copy.deepcopy(streams)
        rows.skip(cascade.skipped(stage))
        low, made = x, run.draw(own, rows, sampler=sampler, progress=False)
        x = made if low is None else run.codec.joined(low, made)
    told, found = cascade.picture(len(cascade.runs) - 2, low), []
    for values in (x, cascade.codec.encode(cascade.codec.decode(x))):
        apart = (cascade.low(values) - told).double()
        found.append(float(apart.square().mean().sqrt()) / cascade.codec.affine[0])
    return found[0], found[1]


def main(cfg: DictConfig) -> None:
    out, judge = report.Report(cfg, "cascade"), LeNet(Path(cfg.lenet)) if cfg.lenet else None
    models: list[Any] = [S.load(list(names) if len(names) > 1 else names[0]) for names in cfg.models]
    whole = (models[0].runs[-1] if len(cfg.models[0]) > 1 else models[0]).whole_data().dataset
    real, points = judge and judge(whole.test.raw[:].float()), whole.test.raw[spaced(cfg.points, whole.test)]
    rows = [["", "bits/dim", "LeNet-FD", "milliseconds a sample", "residual", "rounded"]]
    pictures: list[Tensor] = []
    known = whole.train.raw[spaced(cfg.samples, whole.train)]
    for names, model in [(["training images"], None), *zip(cfg.models, models, strict=True)]:
        made, seconds = (known, None) if model is None else drawn(model, cfg)
        exact = model is not None and (len(names) == 1 or all(run.codec.below is not None for run in model.runs[1:]))
        found = bits(model, points, cfg) if exact else None
        kept = residuals(model, cfg) if model is not None and len(names) > 1 else None
        name = " → ".join(Path(each).name for each in names)
        distance = likeness(judge, made, real, out, of=name, seconds=seconds, bits_per_dim=found, residual=kept)
        row = [name, "" if found is None else f"{found[0]:.4f} ± {found[1]:.4f}", distance]
        row += ["" if seconds is None else f"{1000 * seconds:.2f}"]
        rows.append(row + ([""] * 2 if kept is None else [f"{each:.2g}" for each in kept]))
        print(*rows[-1], sep="\t", flush=True)
        pictures.append(made[:20])
    real_beside = whole.test.raw[: 20 * len(pictures)]
    figures.sample_grid(torch.cat(pictures), real_beside, out.folder / "cascade.png", columns=20)
    text = (
        f"{cfg.samples} samples of each by {cfg.budget} network calls in each stage (DPM-Solver++ of second order, "
        f"equal steps in log-SNR), on {cfg.threads} thread; {cfg.points} held-out images for bits/dim, by {cfg.calls} "
        f"calls a stage. Rows of the picture, 20 images each, are those of the table.\n\n{report.table(rows)}"
    )
    out.close(text)
    print(text)


if __name__ == "__main__":
    report.launch(main, "cascade")
