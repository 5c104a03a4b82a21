"""Guidance on real digits: who is drawn, how various, and what labels are worth in bits/dim.

    scoresde-train experiment=digits_classes out=runs/digits_classes
    scoresde-train experiment=digits_classes conditional=false network.cond_dropout=0 out=runs/digits_alone
    python benchmarks/guidance.py run=runs/digits_classes alone=runs/digits_alone results=benchmarks/results/digits

    scoresde-train experiment=digits_classifier out=runs/digits_classifier
    python benchmarks/guidance.py run=runs/digits_alone classifier=runs/digits_classifier 'scales=[0,1,2,4]' \
        results=benchmarks/results/digits/classifier

    scoresde-train experiment=mnist_classes data.path=/path/to/idx/files out=runs/classes
    python benchmarks/guidance.py run=runs/classes lenet=/path/to/lenet_mnist.npz
    python benchmarks/guidance.py run=runs/classes lenet=/path/to/lenet_mnist.npz samples=40 points=4    # does it run?

Samples of every class in turn, from the same seeds at every scale, along `budget` network calls. Whether they are of
their class says a judge: of MNIST a LeNet-5 trained elsewhere, of anything else a support vector machine fitted to the
images that the model was trained on. The Fréchet distance to held-out images is of the LeNet's last hidden layer, or of
pixels; neither is an FID. The row "real" is what to hold it all against: how often the judge is right on held-out
images, and the distance and deviation of training images. Bits/dim are of held-out images, given their labels and not,
by one solver with the same noise and probes: the difference is paired, so its standard error is far below that of
either. It is also taken to a model that was never told labels (`alone`): the unconditional half of a model that mostly
was is the weaker for it, but two trainings differ by more than a label is worth, too (`labels.py` says at which noise).
With a `classifier` in place of labels, a model that was never told any is guided.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import report
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from sklearn.svm import SVC
from torch import Tensor, nn

import scoresde as S
from scoresde.data import Dataset, Split
from scoresde.evaluate import figures
from scoresde.metrics import Frechet
from scoresde.runs.load import load_run
from scoresde.runs.run import Run


class LeNet(nn.Module):
    """LeNet-5 from its arrays: (B, 1, 28, 28) in [0, 255] -> its 84 features."""

    name, distance = "LeNet", "LeNet-FD"

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


class Vectors(nn.Module):
    """A support vector machine with Gaussian kernel, fitted to `known`: (B, *event) -> its pixels, flat."""

    name, distance = "support vector machine", "Fréchet distance of pixels"

    def __init__(self, known: Split):
        super().__init__()
        self.machine = SVC(C=10).fit(self(known.raw), known.labels)

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.float().flatten(1)

    def label(self, pixels: Tensor) -> Tensor:
        return torch.from_numpy(self.machine.predict(self(pixels)))


@torch.no_grad()
def draw(run: Run, guided: S.Denoiser, cfg: DictConfig) -> tuple[Tensor, Tensor]:
    """(pixels (n, *event), labels (n,))."""
    labels = torch.arange(cfg.samples) % run.dataset.classes
    made = [
        S.sample(guided, (len(part), *run.dataset.event_shape), budget=cfg.budget, cond=labels[part],
                 rng=S.Rng(seeds=part.tolist()))
        for part in torch.arange(cfg.samples).split(cfg.batch)
    ]  # fmt: skip
    return run.dataset.decode(torch.cat(made)).float(), labels


def spaced(n: int, split: Split) -> Tensor:
    """Indices of n samples, evenly over the split, which may be sorted; of all where there are fewer."""
    n = min(n, len(split))
    return torch.arange(n) * len(split) // n


def bits(denoiser: S.Denoiser, dataset: Dataset, cfg: DictConfig, *, told: bool) -> Tensor:
    """Bits/dim (points,) of held-out images, given their labels or not."""
    parts = []
    for part in spaced(cfg.points, dataset.test).split(cfg.batch):
        result = S.log_likelihood(
            denoiser, dataset.test.raw[part], S.Budget(cfg.calls),
            cond=dataset.test.cond(part, told, torch.device("cpu")),
            scaling=dataset.codec, divergence=S.Hutchinson(cfg.probes), rng=S.Rng(seeds=part.tolist()),
        )  # fmt: skip
        parts.append(S.bits_per_dim(result.log_prob, dataset.event_shape))
    return torch.cat(parts)


def spread(pixels: Tensor, labels: Tensor) -> float:
    """Standard deviation of a pixel within a class, in grey levels."""
    return float(torch.stack([pixels[labels == k].std(0).mean() for k in labels.unique()]).mean())


def agreement(judge: LeNet | Vectors, pixels: Tensor, labels: Tensor) -> tuple[float, float]:
    """The share of pixels (n, *event) that the judge takes for their labels (n,), and its standard error."""
    share = float((judge.label(pixels) == labels).double().mean())
    return share, math.sqrt(share * (1 - share) / len(labels))


def in_turn(split: Split, rows: int) -> Tensor:
    """(rows · classes, *event): the first of each class in turn, then the second …"""
    assert split.labels is not None
    return torch.stack([split.raw[split.labels == k][:rows] for k in split.labels.unique()], 1).flatten(0, 1)


def curve(run: Run, judge: LeNet | Vectors, cfg: DictConfig, out: report.Report) -> str:
    """The table over guidance scales, and the samples with a row for each."""
    classifier: Any = load_run(Path(cfg.classifier)).denoiser if cfg.classifier else None
    train, test = run.dataset.train, run.dataset.test
    real, known = test.raw.float(), train.take(spaced(cfg.samples, train))
    assert test.labels is not None and known.labels is not None
    distance = Frechet(judge, judge.distance, min_samples=2, allow_small=True)
    rows = [["scale", "of its class, %", judge.distance, "deviation of pixels within a class"]]

    def row(name: str, judged: tuple[float, float], pixels: Tensor, labels: Tensor) -> None:
        found = {"agreement": judged[0], "frechet": distance(pixels, real).value, "spread": spread(pixels, labels)}
        for key, value in found.items():
            out.add(key, value, of=name, measure=key, **({"stderr": judged[1]} if key == "agreement" else {}))
        share, error = (f"{100 * value:.2f}" for value in judged)
        rows.append([name, f"{share} ± {error}", f"{found['frechet']:.2f}", f"{found['spread']:.2f}"])
        print(*rows[-1], sep="\t", flush=True)

    pictures, columns = [], 2 * run.dataset.classes
    for scale in cfg.scales:
        guided = S.Classifier(run.denoiser, classifier, scale) if classifier else S.ClassifierFree(run.denoiser, scale)
        pixels, labels = draw(run, guided, cfg)
        row(f"{scale:g}", agreement(judge, pixels, labels), pixels, labels)
        pictures.append(pixels[:columns])
    row("real", agreement(judge, real, test.labels), known.raw.float(), known.labels)
    beside = in_turn(test, 2 * len(cfg.scales)).float()
    figures.sample_grid(torch.cat(pictures), beside, out.folder / "guidance_samples.png", columns=columns)
    return report.table(rows)


def figure(judge: LeNet | Vectors, out: report.Report) -> Any:
    """Agreement and distance over guidance scale, beside those of real images."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(9, 3.4), layout="constrained")
    titles = {"agreement": f"of its class, says a {judge.name}", "frechet": judge.distance}
    for axes, (measure, title) in zip(made.subplots(1, 2), titles.items(), strict=True):
        found = {row["of"]: row for row in out.rows if row["measure"] == measure}
        real, scales = found.pop("real"), [float(name) for name in found]
        values = [row["value"] for row in found.values()]
        axes.errorbar(scales, values, [row.get("stderr", 0.0) for row in found.values()], fmt="o-", capsize=2)
        axes.axhline(real["value"], color="0.5", linestyle="--", label="real images")
        axes.set(title=title, xlabel="guidance scale")
        axes.grid(alpha=0.3)
        axes.legend()
    made.axes[1].set_yscale("log")
    return made


def worth(run: Run, cfg: DictConfig, out: report.Report) -> str:
    """What labels save of held-out bits/dim."""
    given, dims = bits(run.denoiser, run.dataset, cfg, told=True), math.prod(run.dataset.event_shape)
    out.add("bits_per_dim", float(given.mean()), of="given the label", measure="bits_per_dim")
    rows = [["held-out images", "bits/dim", "more than with the label", "nats an image"]]
    rows.append(["given the label", f"{given.mean():.4f}", "", ""])
    others = {"not given it": run.denoiser}
    if cfg.alone:
        others["by a model trained without labels"] = load_run(Path(cfg.alone)).denoiser
    for name, denoiser in others.items():
        found = bits(denoiser, run.dataset, cfg, told=False)
        more, error = float((found - given).mean()), float((found - given).std()) / math.sqrt(len(given))
        nats = [f"{value * dims * math.log(2):.2f}" for value in (more, error)]
        out.add("bits_per_dim", float(found.mean()), of=name, measure="bits_per_dim")
        out.add("more", more, of=name, measure="more", stderr=error)
        rows.append([name, f"{found.mean():.4f}", f"{more:.4f} ± {error:.4f}", " ± ".join(nats)])
    return f"A label can save {math.log(run.dataset.classes):.2f} nats; {len(given)} images.\n\n{report.table(rows)}"


def main(cfg: DictConfig) -> None:
    run = load_run(Path(cfg.run))
    judge = LeNet(Path(cfg.lenet)) if cfg.lenet else Vectors(run.dataset.train)
    out = report.Report(cfg, "guidance")
    text = (
        f"{cfg.samples} samples a scale, {cfg.budget} network calls each. The judge is a {judge.name}; what it says of "
        f"real images is of the {len(run.dataset.test)} held-out ones, to which the distances are, too.\n\n"
        f"{curve(run, judge, cfg, out)}"
    )
    text += "" if cfg.classifier else f"\n\n{worth(run, cfg, out)}"
    out.close(text, figure(judge, out))
    print(text)


if __name__ == "__main__":
    report.launch(main, "guidance")
