"""Classifier-free guidance on real digits: who is drawn, how various, and what labels are worth in bits/dim.

    scoresde-train experiment=mnist_classes data.path=/path/to/idx/files out=runs/classes
    python benchmarks/guidance.py run=runs/classes lenet=/path/to/lenet_mnist.npz
    python benchmarks/guidance.py run=runs/classes lenet=/path/to/lenet_mnist.npz samples=40 points=4    # does it run?

Samples of every class in turn, from the same seeds at every scale, along `budget` network calls. Whether they are of
their class says a LeNet-5 trained elsewhere (99 % on the test set); LeNet-FD is the Fréchet distance of its last hidden
layer to the test set, and no FID. Bits/dim are of held-out images, given their labels and not, by one solver with the
same noise and probes: the difference is paired, so its standard error is far below that of either.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import report
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

import scoresde as S
from scoresde.cli.model import LoadedRun, load_run
from scoresde.metrics import Frechet
from scoresde.train import figures


class LeNet(nn.Module):
    """LeNet-5 from its arrays: (B, 1, 28, 28) in [0, 255] -> its 84 features."""

    def __init__(self, path: Path):
        super().__init__()
        with np.load(path) as arrays:
            self.arrays = {name.split(".", 1)[1]: torch.from_numpy(arrays[name]) for name in arrays.files}

    def layer(self, name: str) -> tuple[Tensor, Tensor]:
        return self.arrays[f"{name}.weight"], self.arrays[f"{name}.bias"]

    def forward(self, pixels: Tensor) -> Tensor:
        x = F.interpolate(pixels, size=(32, 32), mode="bilinear", align_corners=False)
        x = (x / 255 - 0.1307) / 0.3081
        x = F.max_pool2d(F.conv2d(x, *self.layer("c1")).relu(), 2)
        x = F.max_pool2d(F.conv2d(x, *self.layer("c3")).relu(), 2)
        x = F.conv2d(x, *self.layer("c5")).relu().flatten(1)
        return F.linear(x, *self.layer("f6")).relu()

    def label(self, pixels: Tensor) -> Tensor:
        return F.linear(self(pixels), *self.layer("f7")).argmax(1)


@torch.no_grad()
def draw(run: LoadedRun, scale: float, cfg: DictConfig) -> tuple[Tensor, Tensor]:
    """(pixels (n, 1, 28, 28), labels (n,))."""
    guided, labels = S.ClassifierFree(run.denoiser, scale), torch.arange(cfg.samples) % run.dataset.classes
    made = [
        S.sample(guided, (len(part), *run.dataset.event_shape), budget=cfg.budget, cond=labels[part],
                 rng=S.Rng(seeds=part.tolist()))
        for part in torch.arange(cfg.samples).split(cfg.batch)
    ]  # fmt: skip
    return run.dataset.decode(torch.cat(made)).float(), labels


def bits(run: LoadedRun, cfg: DictConfig) -> tuple[Tensor, Tensor]:
    """Bits/dim of held-out images, given their labels and not: (points,) each."""
    test, n = run.dataset.test, cfg.points
    assert test.labels is not None
    rows = torch.arange(n) * len(test) // n
    found = []
    for conditional in (True, False):
        parts = []
        for part in rows.split(cfg.batch):
            cond = test.labels[part] if conditional else None
            result = S.log_likelihood(
                run.denoiser, test.raw[part], budget=cfg.calls, cond=cond, scaling=run.dataset.scaling,
                divergence=S.Hutchinson(cfg.probes), rng=S.Rng(seeds=part.tolist()),
            )  # fmt: skip
            parts.append(S.bits_per_dim(result.log_prob, run.dataset.event_shape))
        found.append(torch.cat(parts))
    return found[0], found[1]


def main(cfg: DictConfig) -> None:
    run, lenet = load_run(Path(cfg.run)), LeNet(Path(cfg.lenet))
    out = report.Report(cfg, "guidance")
    real = run.dataset.test.raw.float()
    right = float((lenet.label(real) == run.dataset.test.labels).double().mean())
    distance = Frechet(lenet, "LeNet-FD", min_samples=2, allow_small=True)
    rows = [["scale", "of its class, %", "LeNet-FD", "deviation of pixels within a class"]]
    pictures = []
    for scale in cfg.scales:
        pixels, labels = draw(run, scale, cfg)
        agree = float((lenet.label(pixels) == labels).double().mean())
        error = math.sqrt(agree * (1 - agree) / len(labels))
        fd = distance(pixels, real).value
        spread = float(torch.stack([pixels[labels == k].std(0).mean() for k in range(run.dataset.classes)]).mean())
        out.add("agreement", agree, scale=scale, stderr=error)
        out.add("lenet_fd", fd, scale=scale)
        rows.append([f"{scale:g}", f"{100 * agree:.2f} ± {100 * error:.2f}", f"{fd:.2f}", f"{spread:.1f}"])
        print(*rows[-1], sep="\t", flush=True)
        pictures.append(pixels[:20])
    given, not_given = bits(run, cfg)
    gain = not_given - given
    error = float(gain.std() / math.sqrt(len(gain)))
    out.add("bits_per_dim", float(given.mean()), conditional=True)
    out.add("bits_per_dim", float(not_given.mean()), conditional=False)
    out.add("gain", float(gain.mean()), stderr=error)
    figures.sample_grid(torch.cat(pictures), real[: 20 * len(pictures)], out.folder / "guidance.png", columns=20)
    text = (
        f"{cfg.samples} samples a scale, {cfg.budget} network calls each. The LeNet is right on {100 * right:.2f} % of "
        f"the test set, whose deviation of pixels within a class is "
        f"{float(torch.stack([real[run.dataset.test.labels == k].std(0).mean() for k in range(10)]).mean()):.1f}.\n\n"
        f"{report.table(rows)}\n\n"
        f"Held-out bits/dim of {len(gain)} images: {float(given.mean()):.4f} given the label, "
        f"{float(not_given.mean()):.4f} without; difference {float(gain.mean()):.4f} ± {error:.4f} "
        f"({float(gain.mean()) * 784 * math.log(2):.2f} ± {error * 784 * math.log(2):.2f} nats an image; a label holds "
        f"{math.log(10):.2f})."
    )
    out.close(text)
    print(text)


if __name__ == "__main__":
    report.launch(main, "guidance")
