"""Models of latents beside the model of pixels: quality, seconds of a sample, and bits/dim of the pixels.

    scoresde-train experiment=mnist_autoencoder data.path=/path/to/idx/files out=runs/autoencoder
    scoresde-train experiment=mnist_latent codec=runs/autoencoder data.path=/path/to/idx/files out=runs/latent
    scoresde-train experiment=mnist_latent_dit codec=runs/autoencoder data.path=/path/to/idx/files out=runs/dit
    scoresde-train experiment=mnist_vp data.path=/path/to/idx/files out=runs/pixels
    python benchmarks/latent.py pixels=runs/pixels 'latents=[runs/latent,runs/dit]' autoencoder=runs/autoencoder \
        lenet=/path/to/lenet_mnist.npz

The samples of each are of the same seeds along `budget` network calls of the same sampler. Seconds are those of the
processor, decoding included, so that other work on it counts for nothing. The Fréchet distance is of the LeNet's last
hidden layer to held-out images, with its jackknife error; it is no FID. The rows "training images" and
"reconstructions" say what images of the right law have, and what the decoder alone costs. Bits/dim of the model of
pixels are those of its density, of the others a bound, by one draw of z for each image.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import report
import torch
from guidance import LeNet, spaced
from omegaconf import DictConfig
from torch import Tensor

import scoresde as S
from scoresde.evaluate import figures
from scoresde.metrics import frechet_distance
from scoresde.runs.load import load_run
from scoresde.runs.run import Run

GROUPS = 20


def distance(made: Tensor, real: Tensor) -> tuple[float, float]:
    """The Fréchet distance of features, and its jackknife error over groups of `made`."""
    groups = torch.arange(len(made)) % GROUPS
    without = torch.tensor([float(frechet_distance(made[groups != k], real)) for k in range(GROUPS)])
    return float(frechet_distance(made, real)), float((GROUPS - 1) ** 0.5 * without.std(correction=0))


def likeness(judge: LeNet | None, made: Tensor, real: Tensor | None, out: report.Report, **facts: Any) -> str:
    """The distance of samples as a cell of a table, kept in the report; empty without a judge."""
    if judge is None or real is None:
        return ""
    value, error = distance(judge(made.float()), real)
    out.add("frechet", value, stderr=error, **facts)
    return f"{value:.2f} ± {error:.2f}"


def drawn(run: Run, cfg: DictConfig) -> tuple[Tensor, float]:
    """Raw samples, and the processor's seconds of one."""
    sampler = S.Sampler(S.DPMSolverPP(2), S.LogSNRGrid(), steps=cfg.budget - 1)
    run.sample(2, sampler=sampler, progress=False)  # what is made once
    start = time.process_time()
    made = run.sample(cfg.samples, sampler=sampler, batch_size=cfg.batch, progress=False)
    return made, (time.process_time() - start) / cfg.samples


def bits(run: Run, raw: Tensor, cfg: DictConfig) -> tuple[float, float]:
    """Mean bits/dim of held-out images, and its standard error over them."""
    found = run.log_likelihood(raw, solver=S.Budget(cfg.calls), rng=S.Rng(1), progress=False).bits_per_dim
    return float(found.mean()), float(found.std()) / math.sqrt(len(found))


def main(cfg: DictConfig) -> None:
    out, judge = report.Report(cfg, "latent"), LeNet(Path(cfg.lenet)) if cfg.lenet else None
    coder = load_run(Path(cfg.autoencoder)).whole_data()
    train, test = coder.dataset.train, coder.dataset.test
    real, points = judge and judge(test.raw[:].float()), test.raw[spaced(cfg.points, test)]
    rows = [["", "LeNet-FD", "CPU milliseconds a sample", "bits/dim"]]
    pictures: list[Tensor] = []

    @torch.no_grad()
    def row(name: str, made: Tensor, seconds: float | None, found: tuple[float, float] | None, bound: str = "") -> None:
        apart = likeness(judge, made, real, out, of=name, seconds=seconds, bits_per_dim=found)
        cost = "" if seconds is None else f"{1000 * seconds:.2f}"
        told = "" if found is None else f"{bound}{found[0]:.4f} ± {found[1]:.4f}"
        rows.append([name, apart, cost, told])
        print(*rows[-1], sep="\t", flush=True)
        pictures.append(made[:20])

    known = train.raw[spaced(cfg.samples, train)]
    row("training images", known, None, None)
    network: Any = coder.denoiser.network
    codec = coder.codec
    with torch.no_grad():
        parts = codec.encode(known).split(cfg.batch)
        back = torch.cat([codec.decode(network.decode(network.encode(part)[0])) for part in parts])
    row("their reconstructions", back, None, None)
    for path in (*([cfg.pixels] if cfg.pixels else []), *cfg.latents):
        run = load_run(Path(path))
        made, seconds = drawn(run, cfg)
        row(Path(path).name, made, seconds, bits(run, points, cfg), "≤ " if run.codec.bound else "")
    figures.sample_grid(torch.cat(pictures), test.raw[: 20 * len(pictures)], out.folder / "latent.png", columns=20)
    text = (
        f"{cfg.samples} samples of each by {cfg.budget} network calls (DPM-Solver++ of second order, equal steps in "
        f"log-SNR), on {cfg.threads} thread; {cfg.points} held-out images for bits/dim, by {cfg.calls} calls. Rows of "
        f"the picture, 20 images each, are those of the table.\n\n{report.table(rows)}"
    )
    out.close(text)
    print(text)


if __name__ == "__main__":
    report.launch(main, "latent")
