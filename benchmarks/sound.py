"""Spoken digits of a given class, 8 kHz: does a judge hear the digit asked for, and nats beside those of AR(16).

    python benchmarks/sound.py npz=/path/to/spoken_digits.npz folder=spoken         # WAV files, by split and class
    scoresde-train experiment=spoken_digits data.path=spoken out=runs/spoken
    python benchmarks/sound.py folder=spoken run=runs/spoken results=benchmarks/results/sound
    python benchmarks/sound.py folder=spoken run=runs/spoken samples=20 points=4    # does it run?

The judge is a support vector machine with Gaussian kernel on log-mel powers, 32 bands by 16 windows of 32 ms, relative
to the loudest and no less than 50 dB below it. It is fitted to the clips that the model was trained on; how often it is
right on real ones is measured on held-out clips. AR(16) is the stationary Gaussian process whose first 17
autocovariances are those of the training clips; its likelihood is exact, and both likelihoods are of the same held-out
clips as their dequantised integers: log p(integers) ≥ that of either. The difference is paired, clip by clip.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import report
import torch
from omegaconf import DictConfig
from scipy.io import wavfile
from scipy.linalg import cho_factor, cho_solve, solve_toeplitz, toeplitz
from scipy.signal import stft
from sklearn.metrics import confusion_matrix
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch import Tensor

import scoresde as S
from scoresde.data import Dataset, SoundFolder
from scoresde.evaluate.sound import spectrograms
from scoresde.runs.load import load_run
from scoresde.runs.run import Run

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ORDER = 16


def unpack(npz: Path, folder: Path) -> None:
    """Every recording as a WAV file, train or test as the archive says, in a folder for each digit."""
    with np.load(npz, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    rate = int(arrays["rate"].item())
    for k, (start, stop) in enumerate(zip(arrays["offsets"][:-1], arrays["offsets"][1:], strict=True)):
        number = f"{arrays['labels'][k]}-{NAMES[arrays['labels'][k]]}"
        into = folder / ("test" if arrays["test"][k] else "train") / number
        into.mkdir(parents=True, exist_ok=True)
        name = f"{arrays['speaker'][k]}_{arrays['index'][k]:02d}.wav"
        wavfile.write(into / name, rate, arrays["samples"][start:stop])


def log_mel(raw: Tensor, rate: int) -> np.ndarray:
    """(n, 32 · frames) features of sounds (n, 1, L)."""
    power = np.abs(stft(raw[:, 0].double().numpy(), rate, nperseg=256, noverlap=128)[2]) ** 2
    mel = np.linspace(*(2595 * np.log10(1 + np.array([60, 0.49 * rate]) / 700)), 34)
    edges, at = 700 * (10 ** (mel / 2595) - 1), np.arange(129) * rate / 256
    low, mid, high = (edges[k : k + 32, None] for k in range(3))
    bands = np.maximum(0, np.minimum((at - low) / (mid - low), (high - at) / (high - mid))) @ power
    bands = bands[..., : bands.shape[2] // 2 * 2].reshape(len(raw), 32, -1, 2).mean(3)
    relative = bands / np.maximum(bands.max((1, 2), keepdims=True), 1e-12)
    return np.log(np.maximum(relative, 1e-5)).reshape(len(raw), -1)


class AR:
    """The stationary Gaussian autoregression of signals (n, L), by Yule and Walker's equations."""

    def __init__(self, x: np.ndarray, order: int = ORDER):
        self.mean = x.mean()
        x, length = x - self.mean, x.shape[1]
        r = np.array([(x[:, : length - k] * x[:, k:]).mean() for k in range(order + 1)])
        self.weights = solve_toeplitz(r[:-1], r[1:])
        self.variance = r[0] - self.weights @ r[1:]
        self.start = toeplitz(r[:-1])

    def log_prob(self, x: np.ndarray) -> np.ndarray:
        """(n,) nats: the first values by their joint law, each of the others given those before it."""
        x, order = x - self.mean, len(self.weights)
        first, factor = x[:, :order], cho_factor(self.start)
        before = np.stack([x[:, order - 1 - k : -1 - k] for k in range(order)], 2)
        wrong = x[:, order:] - before @ self.weights
        start = (first * cho_solve(factor, first.T).T).sum(1) + 2 * np.log(np.diag(factor[0])).sum()
        rest = (wrong**2).sum(1) / self.variance + wrong.shape[1] * math.log(self.variance)
        return -0.5 * (start + rest + x.shape[1] * math.log(2 * math.pi))


@torch.no_grad()
def draw(run: Run, scale: float, cfg: DictConfig) -> tuple[Tensor, Tensor]:
    """(raw (n, 1, L), labels (n,)): every class in turn, the same seeds at every scale."""
    labels, denoiser = torch.arange(cfg.samples) % run.dataset.classes, S.ClassifierFree(run.denoiser, scale)
    made = [
        S.sample(denoiser, (len(part), *run.dataset.event_shape), budget=cfg.budget, cond=labels[part],
                 rng=S.Rng(seeds=part.tolist()))
        for part in torch.arange(cfg.samples).split(cfg.batch)
    ]  # fmt: skip
    return run.dataset.decode(torch.cat(made)), labels


def share(right: np.ndarray) -> tuple[float, float]:
    """Mean and standard error, in per cent."""
    p = float(right.mean())
    return 100 * p, 100 * math.sqrt(p * (1 - p) / len(right))


def judged(data: Dataset, run: Run | None, cfg: DictConfig, out: report.Report) -> str:
    """Whose digit the judge hears, over guidance scales, and spectrograms."""
    train, test = data.train, data.test
    judge = make_pipeline(StandardScaler(), SVC(C=10)).fit(log_mel(train.raw, data.rate), train.labels)
    rows = [["clips", "of their class, %", "clips judged"]]

    def row(name: str, raw: Tensor, labels: Tensor) -> np.ndarray:
        heard, asked = judge.predict(log_mel(raw, data.rate)), labels.numpy()
        value, error = share(heard == asked)
        out.add("agreement", value, of=name, stderr=error)
        rows.append([name, f"{value:.1f} ± {error:.1f}", str(len(raw))])
        print(*rows[-1], sep="\t", flush=True)
        return confusion_matrix(asked, heard, labels=range(data.classes))

    assert test.labels is not None
    row("real, held out", test.raw, test.labels)
    text = ""
    for scale in cfg.scales if run is not None else ():
        assert run is not None
        raw, labels = draw(run, scale, cfg)
        table = row(f"drawn at scale {scale:g}", raw, labels)
        if scale == 2:
            cells = [["asked \\ heard", *NAMES], *([NAMES[k], *map(str, line)] for k, line in enumerate(table))]
            text = f"\n\nAt scale 2, what was asked for and what the judge heard:\n\n{report.table(cells)}"
            first = torch.cat([(test.labels == k).nonzero()[:2, 0] for k in range(10)]).view(10, 2).T.flatten()
            names = [NAMES[k] for k in test.labels[first].tolist()]
            path = out.folder / "spectrograms.png"
            spectrograms(raw[:20], test.raw[first], data.rate, path, sampler="guidance 2", names=names)
    return report.table(rows) + text


def nats(data: Dataset, run: Run | None, cfg: DictConfig, out: report.Report) -> str:
    """Nats a value of held-out clips, of the model given the digit and not, and of the autoregression."""
    rng = np.random.default_rng(0)
    train = data.train.raw[:, 0].numpy() + rng.random(data.train.raw[:, 0].shape)
    index = torch.arange(min(cfg.points, len(data.test))) * len(data.test) // min(cfg.points, len(data.test))
    held = data.test.raw[index, 0].numpy() + rng.random((len(index), cfg.length))
    found = {"AR(16)": -AR(train).log_prob(held) / cfg.length}
    for name, told in (("the model, given the digit", True), ("the model, not given it", False)) if run else ():
        assert run is not None
        found[name] = np.concatenate([
            -S.log_likelihood(
                run.denoiser, data.test.raw[part], S.Budget(cfg.calls), scaling=run.dataset.codec,
                cond=data.test.cond(part, told, torch.device("cpu")), divergence=S.Hutchinson(cfg.probes),
                rng=S.Rng(seeds=part.tolist()),
            ).log_prob.double().numpy() / cfg.length
            for part in index.split(cfg.batch)
        ])  # fmt: skip
    rows = [["", "nats a value", "less than AR(16)"]]
    for name, values in found.items():
        less = found["AR(16)"] - values
        error = [float(v.std(ddof=1) / math.sqrt(len(v))) for v in (values, less)]
        out.add("nats", float(values.mean()), of=name, stderr=error[0], less=float(less.mean()), less_stderr=error[1])
        beside = f"{less.mean():.3f} ± {error[1]:.3f}" if name != "AR(16)" else ""
        rows.append([name, f"{values.mean():.3f} ± {error[0]:.3f}", beside])
        print(*rows[-1], sep="\t", flush=True)
    return f"Of {len(index)} held-out clips of {cfg.length} values:\n\n{report.table(rows)}"


def main(cfg: DictConfig) -> None:
    folder = Path(cfg.folder)
    if cfg.npz:
        unpack(Path(cfg.npz), folder)
        print(f"Written to {folder}")
        return
    data = SoundFolder(str(folder), cfg.length, pad=True, bands=0)
    run = load_run(Path(cfg.run)) if cfg.run else None
    out = report.Report(cfg, "sound")
    text: Any = f"{judged(data, run, cfg, out)}\n\n{nats(data, run, cfg, out)}"
    out.close(text)
    print(text)


if __name__ == "__main__":
    report.launch(main, "sound")
