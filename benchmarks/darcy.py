"""Darcy flow: the coefficient field from 5 % of the solution's points, with its uncertainty.

    python benchmarks/darcy.py data=/path/to/fields
    python benchmarks/darcy.py data=/path/to/fields images=2000 steps=5 cases=4    # does it run?

−∇·(a ∇u) = f on the unit square, u = 0 around it, a of two values. One denoiser learns (a, u) jointly from 1,000
pairs, and is then told of u at a few points, with noise, by a posterior method: nothing is trained for the problem.
The square's eight symmetries turn a solution into a solution and are training data too. The fields are every
so-many-th point of a finer grid: their first row and column lie on the boundary (where the data hold a few values that
no solution has, below 0), their last do not. So it is the 15×15 inside that are symmetric; they are modelled, in a
16×16 field whose first row and column are 0. On one core training takes 4 minutes, and the samples take 10.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import report
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

import scoresde as S
from scoresde.config import build, build_network
from scoresde.inverse import Observation
from scoresde.inverse.operators import Operator
from scoresde.losses.denoising import EDMWeighting
from scoresde.train.ema import EMA

SIDE = 15


class Fields(NamedTuple):
    """Pairs (n, 2, 15, 15): the coefficient as ±1, and the solution, its training set centred and of unit variance."""

    train: Tensor
    test: Tensor

    @staticmethod
    def read(folder: Path) -> Fields:
        parts = []
        for name in ("train", "test"):
            with np.load(folder / f"darcy_{name}_16.npz") as arrays:
                a, u = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
            parts.append(torch.stack([2 * a.float() - 1, u.float()], 1)[..., 1:, 1:])
        centre, spread = parts[0][:, 1].mean(), parts[0][:, 1].std()
        for part in parts:
            part[:, 1] = (part[:, 1] - centre) / spread
        return Fields(symmetric(parts[0]), parts[1])


def symmetric(fields: Tensor) -> Tensor:
    """All eight images of each field under the symmetries of the square."""
    turned = torch.cat([fields, fields.mT])
    turned = torch.cat([turned, turned.flip(-1)])
    return torch.cat([turned, turned.flip(-2)])


def frame(fields: Tensor) -> Tensor:
    """15×15 -> 16×16, which the network can halve."""
    return F.pad(fields, (1, 0, 1, 0))


class Points(Operator):
    """The solution at some of the 225 points: (B, 2, 16, 16) -> (B, points)."""

    def __init__(self, places: Tensor):
        super().__init__()
        self.places = places

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 1, 1:, 1:].flatten(1)[:, self.places]


def train(cfg: DictConfig, data: Tensor) -> S.Denoiser:
    """The averaged denoiser of the joint field."""
    torch.manual_seed(cfg.seed)
    network = build_network(cfg.network, event_shape=(2, SIDE + 1, SIDE + 1), classes=0)
    model = S.Preconditioned(network, build(cfg.sde), S.EDM(1.0), sigma_data=1.0)
    loss = S.DenoisingLoss(model, build(cfg.times), EDMWeighting(1.0))
    ema, kept = EMA(model, half_life=5000), Path(str(cfg.weights))
    averaged: Any = ema.module
    if cfg.weights and kept.exists():
        averaged.load_state_dict(torch.load(kept, weights_only=True))
        return averaged
    optimizer = torch.optim.Adam(model.parameters(), cfg.lr, betas=(0.9, 0.99), fused=True)
    rng, seen, mean = S.Rng(cfg.seed), 0, 1.0
    while seen < cfg.images:
        # up over the first 5 % and down to nothing by the end
        rate = min(1.0, (seen + cfg.batch) / (0.05 * cfg.images)) * 0.5 * (1 + math.cos(math.pi * seen / cfg.images))
        optimizer.param_groups[0]["lr"] = cfg.lr * rate
        value = loss(frame(data[torch.randint(len(data), (cfg.batch,))]), rng=rng).mean()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += cfg.batch
        ema.update(model, seen, cfg.batch, torch.tensor(True))
        mean += 0.02 * (float(value.detach()) - mean)
        if seen // cfg.batch % 50 == 0:
            print(f"{seen} images, loss {mean:.4f}", flush=True)
    if cfg.weights:
        torch.save(averaged.state_dict(), kept)
    return averaged


@torch.no_grad()
def held_out(denoiser: S.Denoiser, cfg: DictConfig, fields: Tensor) -> float:
    """The training loss of some fields, with the same noise for all."""
    loss = S.DenoisingLoss(denoiser, build(cfg.times), EDMWeighting(1.0))
    return float(torch.stack([loss(frame(fields), rng=S.Rng(seed)).mean() for seed in range(8)]).mean())


@torch.no_grad()
def posterior(denoiser: S.Denoiser, cfg: DictConfig, y: Tensor, places: Tensor, samples: int) -> Tensor:
    """(cases, samples, 2, 15, 15); sample j of a case is the same whatever the others are."""
    rows = torch.arange(len(y)).repeat_interleave(samples)
    sampler = S.Sampler(build(cfg.step), S.LogisticGrid(denoiser.data_std), cfg.steps)
    made = []
    for part in torch.arange(len(rows)).split(cfg.batch_samples):
        told = build(cfg.method)(denoiser, Observation(y[rows[part]], Points(places), cfg.noise))
        shape = (len(part), 2, SIDE + 1, SIDE + 1)
        made.append(sampler(told, shape, rng=S.Rng(seeds=part.tolist()))[..., 1:, 1:])
        print(f"{int(part[-1]) + 1} of {len(rows)} samples", flush=True)
    return torch.cat(made).reshape(len(y), samples, 2, SIDE, SIDE)


def baselines(data: Tensor, y: Tensor, places: Tensor, noise: float) -> dict[str, Tensor]:
    """Name -> guesses (cases, 2, 15, 15) without a model of the fields."""
    seen = data[:, 1].flatten(1)[:, places]
    nearest = data[torch.cdist(y, seen).argmin(1)]
    noisy = seen + noise * torch.randn(seen.shape, generator=torch.Generator().manual_seed(1))
    weights = torch.linalg.lstsq(F.pad(noisy, (0, 1), value=1.0), data.flatten(1)).solution
    regression = (F.pad(y, (0, 1), value=1.0) @ weights).reshape(-1, 2, SIDE, SIDE)
    return {
        "mean of the training set": data.mean(0).expand(len(y), -1, -1, -1),
        "nearest training field, by the points seen": nearest,
        "linear regression on the points seen": regression,
    }


def mean_error(values: Tensor) -> tuple[float, float]:
    """Mean and standard error over cases."""
    return float(values.double().mean()), float(values.double().std() / math.sqrt(len(values)))


def shown(values: Tensor, scale: float = 1.0, digits: int = 2) -> str:
    mean, error = mean_error(scale * values)
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def right(guess: Tensor, truth: Tensor) -> Tensor:
    """Share of the points of each case whose coefficient is the true one."""
    return ((guess[:, 0] > 0) == (truth[:, 0] > 0)).double().mean((1, 2))


def distance(guess: Tensor, truth: Tensor) -> Tensor:
    """RMS error of each case's solution."""
    return (guess[:, 1] - truth[:, 1]).square().mean((1, 2)).sqrt()


def calibration(made: Tensor, truth: Tensor, out: report.Report) -> str:
    """Of points whose posterior probability of the higher coefficient is in a bin, the share that have it."""
    said = (made[:, :, 0] > 0).double().mean(1).flatten(1)
    true = (truth[:, 0] > 0).double().flatten(1)
    rows = [["probability", "points", "mean probability", "share that is 1"]]
    edges = [0.0, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0]
    for low, high in itertools.pairwise(edges):
        within = ((said >= low) & ((said < high) | (high == 1.0))).double()
        if not bool(within.any()):
            continue
        share, mean = (float((within * v).sum() / within.sum()) for v in (true, said))
        # points of one case are alike, so the error of the ratio is over cases
        gap = (within * (true - share)).sum(1) * len(true) / within.sum()
        error = mean_error(gap)[1]
        out.add("calibration", share, low=low, high=high, points=int(within.sum()), said=mean, stderr=error)
        rows.append([f"{low:g}–{high:g}", f"{int(within.sum())}", f"{mean:.3f}", f"{share:.3f} ± {error:.3f}"])
    return report.table(rows)


def picture(made: Tensor, truth: Tensor, places: Tensor) -> Any:
    """Three cases: truth, what was seen, and what that leaves open."""
    from matplotlib.figure import Figure

    titles = ["coefficient", "solution, points seen", "mean", "standard deviation", "sample", "sample", "mean solution"]
    figure = Figure(figsize=(2 * len(titles), 6.4), layout="constrained")
    rows = figure.subplots(min(3, len(made)), len(titles), squeeze=False)
    for axes, samples, field in zip(rows, made, truth, strict=False):
        a, u = samples[:, 0], samples[:, 1].mean(0)
        solution = {"cmap": "viridis", "vmin": float(field[1].min()), "vmax": float(field[1].max())}
        sign: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -1, "vmax": 1}
        spread = {"cmap": "magma", "vmin": 0, "vmax": 1}
        shows = [(field[0], sign), (field[1], solution), (a.mean(0), sign), (a.std(0), spread), (a[0], sign),
                 (a[1], sign), (u, solution)]  # fmt: skip
        for axis, (image, how) in zip(axes, shows, strict=True):
            axis.imshow(image.numpy(), **how)
            axis.set(xticks=[], yticks=[])
        axes[1].scatter(places % SIDE, places // SIDE, s=18, c="white", edgecolors="black", linewidths=0.8)
    for axis, title in zip(rows[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    return figure


def compare(made: Tensor, full: Tensor, others: dict[str, Tensor], truth: Tensor, out: report.Report) -> str:
    """Coefficient and solution, beside guesses without a model."""
    guesses = {**others, "posterior mean": made.mean(1), "posterior mean, all points seen": full.mean(1)}
    rows = [["guess", "coefficient right, %", "RMS error of the solution"]]
    for name, guess in guesses.items():
        for key, value in (("right", right(guess, truth)), ("rms", distance(guess, truth))):
            mean, error = mean_error(value)
            out.add(key, mean, guess=name, stderr=error)
        rows.append([name, shown(right(guess, truth), 100), shown(distance(guess, truth), digits=4)])
    single = torch.stack([right(one, truth) for one in made.unbind(1)]).mean(0)
    out.add("right", mean_error(single)[0], guess="one posterior sample", stderr=mean_error(single)[1])
    rows.append(["one posterior sample", shown(single, 100), ""])
    best = max(others.values(), key=lambda guess: float(right(guess, truth).mean()))
    gain = right(made.mean(1), truth) - right(best, truth)
    return f"{report.table(rows)}\n\nPosterior mean over the best of the others, paired: {shown(gain, 100)} %."


def main(cfg: DictConfig) -> None:
    out, fields = report.Report(cfg, "darcy"), Fields.read(Path(cfg.data))
    denoiser = train(cfg, fields.train)
    truth = fields.test[: cfg.cases]
    generator = torch.Generator().manual_seed(cfg.seed)
    places = torch.randperm(SIDE**2, generator=generator)[: cfg.points].sort().values
    noise = cfg.noise * torch.randn((len(truth), SIDE**2), generator=generator)
    everywhere = truth[:, 1].flatten(1) + noise
    y = everywhere[:, places]
    made = posterior(denoiser, cfg, y, places, cfg.samples)
    full = posterior(denoiser, cfg, everywhere, torch.arange(SIDE**2), cfg.full_samples)
    table = compare(made, full, baselines(fields.train, y, places, cfg.noise), truth, out)

    solutions = made[:, :, 1].flatten(2)
    residual = (solutions[..., places] - y[:, None]).square().mean((1, 2)).sqrt() / cfg.noise
    rest = torch.ones(SIDE**2, dtype=torch.bool).index_fill(0, places, False)
    u = truth[:, 1].flatten(1)[:, rest]
    inside = (u >= solutions[..., rest].amin(1)) & (u <= solutions[..., rest].amax(1))
    covered, nominal = inside.double().mean(1), (cfg.samples - 1) / (cfg.samples + 1)
    for key, value in (("residual", residual), ("covered", covered)):
        out.add(key, mean_error(value)[0], stderr=mean_error(value)[1])
    losses = [held_out(denoiser, cfg, part[:50]) for part in fields]
    text = (
        f"{len(truth)} test fields, {cfg.samples} samples each along {cfg.steps + 1} network calls; the solution seen "
        f"at {cfg.points} of its {SIDE**2} points, with noise of {cfg.noise:g} standard deviations of the solution. "
        f"Mean ± standard error over the fields.\n\n{table}\n\nSamples miss what was seen by {shown(residual)} times "
        f"the noise, RMS (1 is right). The range of {cfg.samples} samples holds {shown(covered, 100)} % of the true "
        f"solution where it was not seen; {100 * nominal:.1f} % would be right.\n\n"
        f"{calibration(made, truth, out)}\n\nTraining loss {losses[0]:.4f} on 50 fields of the training set, "
        f"{losses[1]:.4f} on the test set, same noise.\n\n![three cases](darcy.png)"
    )
    out.close(text, picture(made, truth, places))
    print(text)


if __name__ == "__main__":
    report.launch(main, "darcy")
