"""Pictures restored from part of what they were: every posterior method on held-out images of a trained run.

    python benchmarks/restoration.py run=runs/mnist_classes
    python benchmarks/restoration.py run=runs/cifar_vp 'problems=[colourise]' results=benchmarks/results/cifar
    python benchmarks/restoration.py run=runs/mnist_classes inputs=2 samples=2 steps=5    # does it run?

Held-out images are degraded, with noise, and each method draws samples of what that leaves open, along the same number
of network calls. PSNR is of the mean of the samples, in dB: that of the posterior is the best there is. CRPS says
whether the samples are as various as they ought to be, too: E|x − truth| − E|x − x′|/2 of a pixel, in 256ths of its
range, least for the true posterior (Gneiting & Raftery 2007, eq. 21). Residual: the root mean square of y − A x over
the noise, where 1 is right. `Gaussian` has the mean and covariance of the training images for its prior and is exact
for that: what is reached without a network. Standard errors are over images.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import report
import torch
from omegaconf import DictConfig
from torch import Tensor

import scoresde as S
from scoresde import inverse as I
from scoresde.runs.load import load_run
from scoresde.runs.run import Run

LUMA = torch.tensor([[0.299, 0.587, 0.114]])


def left_half(event: tuple[int, ...]) -> I.Mask:
    seen = torch.ones(event, dtype=torch.bool)
    seen[..., event[-1] // 2 :] = False
    return I.Mask(seen)


PROBLEMS: dict[str, Callable[[tuple[int, ...]], I.Operator]] = {
    "inpaint": left_half,
    "superres": lambda event: I.DownSample(4),
    "deblur": lambda event: I.Blur(1.5),
    "colourise": lambda event: I.ColourMix(LUMA),
}


def methods(run: Run, steps: int) -> dict[str, Callable[[I.Observation], tuple[S.Sampler, S.Denoiser]]]:
    """Name -> sampler and denoiser, all of `steps` + 1 network calls."""
    prior, grid, ancestral = run.denoiser, S.LogisticGrid(run.denoiser.data_std), S.DDIM(eta=1.0)

    def told(kind: type[I.Posterior], **options: Any) -> Callable[[I.Observation], tuple[S.Sampler, S.Denoiser]]:
        return lambda seen: (S.Sampler(ancestral, grid, steps), kind(prior, seen, **options))

    return {
        "PiGDM": told(I.PiGDM),
        "MMPS": told(I.MMPS, iterations=5),
        "TMPD": told(I.TMPD),
        "DPS": told(I.DPS),
        "DiffPIR": told(I.DiffPIR),
        "Replacement": lambda seen: (S.Sampler(I.Replacement(ancestral, seen), grid, steps), prior),
        "RePaint": lambda seen: (
            S.Sampler(I.RePaint(ancestral, seen, jump=2, repeats=5), grid, max(2, steps // 5)), prior,
        ),
    }  # fmt: skip


class Gaussian:
    """Exact posterior samples for a Gaussian prior with the moments of the data."""

    def __init__(self, data: Tensor):
        flat = data.flatten(1).double()
        self.mean = flat.mean(0)
        cov = (flat - self.mean).mT @ (flat - self.mean) / len(flat)
        self.cov = cov + 1e-4 * cov.diagonal().mean() * torch.eye(len(cov), dtype=torch.float64)
        self.factor = torch.linalg.cholesky(self.cov)

    def __call__(self, operator: I.Operator, y: Tensor, std: float, event: tuple[int, ...], rng: S.Rng) -> Tensor:
        """A sample for each row of y, (B, *event)."""

        def seen(x: Tensor) -> Tensor:
            return operator(x.reshape(-1, *event)).flatten(1)

        a = seen(torch.eye(math.prod(event), dtype=torch.float64)).mT
        x = self.mean + rng.normal((len(y), len(self.mean)), dtype=torch.float64) @ self.factor.mT
        gap = y.flatten(1) - seen(x) - std * rng.normal((len(y), len(a)), dtype=torch.float64)
        within = a @ self.cov @ a.mT + std**2 * torch.eye(len(a), dtype=torch.float64)
        return (x + torch.linalg.solve(within, gap.mT).mT @ (a @ self.cov)).reshape(-1, *event)


def shown(values: Tensor, digits: int = 2) -> str:
    return f"{values.mean():.{digits}f} ± {values.std() / math.sqrt(len(values)):.{digits}f}"


def measures(x: Tensor, truth: Tensor, gap: Tensor) -> dict[str, Tensor]:
    """Of samples x (k, n, *event) that miss what was seen by `gap` (k, entries) times the noise, each (k,)."""
    x, truth, n = x.double(), truth.double()[:, None], x.shape[1]
    errors = [(of - truth).square().flatten(1).mean(1) for of in (x.mean(1, keepdim=True), x)]
    apart = (x[:, :, None] - x[:, None]).abs().sum((1, 2)) / (n * (n - 1))
    crps = ((x - truth).abs().mean(1) - apart / 2).flatten(1).mean(1)
    psnr, single = (10 * (4 / error).log10() for error in errors)
    return {"psnr": psnr, "psnr_sample": single, "crps": 128 * crps, "residual": gap.square().mean(1).sqrt()}


def main(cfg: DictConfig) -> None:
    run, out = load_run(Path(cfg.run)), report.Report(cfg, "restoration")
    dataset, event, n = run.dataset, run.dataset.event_shape, int(cfg.samples)
    truth = dataset.encode(dataset.test.raw[: cfg.inputs])
    gaussian, rows = Gaussian(dataset.encode(dataset.train.raw)), []
    for problem in cfg.problems:
        operator = PROBLEMS[problem](event)
        y = operator(truth)
        entries = operator(torch.ones(1, *event))[0] != 0  # those that any of x reaches
        y = (y + cfg.std * S.Rng(seeds=list(range(1000, 1000 + len(y)))).normal_like(y)) * entries
        repeated = y.repeat_interleave(n, 0)
        seen = I.Observation(repeated, operator, cfg.std)

        def model(made: tuple[S.Sampler, S.Denoiser], shape: tuple[int, ...] = (len(repeated), *event)) -> Tensor:
            with torch.no_grad():
                return made[0](made[1], shape, rng=S.Rng(0))

        draws: dict[str, Callable[[], Tensor]] = {
            "Gaussian": partial(gaussian, operator, repeated, cfg.std, event, S.Rng(0))
        }
        for name, make in methods(run, cfg.steps).items():
            if cfg.methods is None or name in cfg.methods:
                draws[name] = lambda make=make, seen=seen, model=model: model(make(seen))
        for name, draw in draws.items():
            began = time.perf_counter()
            try:
                x = draw()
            except RuntimeError as error:  # Replacement puts in A⁺y, which a blur does not let be found
                rows.append([problem, name, str(error).split(":")[0].split(" for samples")[0], "", "", "", ""])
                print(*rows[-1], sep="\t", flush=True)
                continue
            seconds = (time.perf_counter() - began) / len(x)
            gap = ((operator(x) - repeated) / cfg.std)[:, entries].reshape(len(y), -1)
            found = measures(x.unflatten(0, (len(y), n)), truth, gap)
            for key, values in found.items():
                error = float(values.std() / math.sqrt(len(values)))
                out.add(key, float(values.mean()), problem=problem, method=name, measure=key, stderr=error)
            rows.append([problem, name, *map(shown, found.values()), f"{seconds:.2f}"])
            print(*rows[-1], sep="\t", flush=True)
    head = ["problem", "method", "PSNR of the mean, dB", "of a sample", "CRPS", "residual", "seconds a sample"]
    out.close(
        f"{len(truth)} held-out images, {n} samples each, noise of {cfg.std:g} where data are in [−1, 1], "
        f"{cfg.steps + 1} network calls a sample. Mean ± standard error over images.\n\n{report.table([head, *rows])}"
    )


if __name__ == "__main__":
    report.launch(main, "restoration")
