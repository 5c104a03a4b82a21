"""Ethanol: samples against held-out frames, the learned score against the recorded forces, turned molecules.

    python benchmarks/molecules.py convert ethanol.npz ethanol.xyz
    scoresde-train experiment=ethanol data.path=ethanol.xyz out=runs/ethanol
    python benchmarks/molecules.py measure runs/ethanol ethanol.npz

The frames are thermal, p(x) ∝ exp(−E(x)/kT), so the score of the data is F/kT, force over temperature. The model has
the score of the data plus noise of σ; where σ is well below the 0.03 Å by which bonds vibrate, they agree.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import report
import torch
from torch import Tensor

import scoresde as S
from scoresde.data import Molecules, Split
from scoresde.data.dataset import hold_out

HERE = Path(__file__).parent / "results" / "molecules"
SYMBOLS = {1: "H", 6: "C", 8: "O"}
KT = 1.0  # kcal/mol, by the virial of these frames 1.00 ± 0.10
SIGMAS = (0.005, 0.01, 0.02, 0.03, 0.05)  # Å


def convert(source: Path, target: Path) -> None:
    """The frames of an .npz as extended XYZ, with forces and energies."""
    with np.load(source) as data, target.open("w", encoding="utf-8") as file:
        names = [SYMBOLS[int(number)] for number in data["numbers"]]
        for places, forces, energy in zip(data["positions"], data["forces"], data["energy"], strict=True):
            file.write(
                f'{len(names)}\nProperties=species:S:1:pos:R:3:forces:R:3 energy={float(energy)!r} pbc="F F F"\n'
            )
            for name, row in zip(names, np.concatenate([places, forces], 1).tolist(), strict=True):
                file.write(f"{name} {' '.join(map(repr, row))}\n")


def geometry(x: Tensor) -> dict[str, np.ndarray]:
    """Bond lengths (Å) and angles (degrees) of ethanol (n, 9, 3): atoms C C O H…, bonds to the nearest heavy atom.

    Frames whose bonds are not those of CH3-CH2-OH are left out; "whole" says which are kept.
    """
    apart = torch.cdist(x, x)
    inner = apart[:, :2, 2].argmin(1)  # the carbon of the hydroxyl
    rows = torch.arange(len(x))
    owner = apart[:, 3:, :3].argmin(2)
    counts = torch.stack(
        [(owner == (1 - inner)[:, None]).sum(1), (owner == inner[:, None]).sum(1), (owner == 2).sum(1)], 1
    )
    whole = (counts == torch.tensor([3, 2, 1])).all(1) & (apart[:, 0, 1] < 2) & (apart[rows, inner, 2] < 2)
    whole &= (apart[:, 3:, :3].amin(2) < 1.5).all(1)
    x, apart, inner, owner, rows = x[whole], apart[whole], inner[whole], owner[whole], torch.arange(int(whole.sum()))
    outer, oxygen = x[rows, 1 - inner], x[:, 2]
    middle, hydroxyl = x[rows, inner], x[rows, 3 + (owner == 2).int().argmax(1)]
    hydrogens = x[:, 3:][owner == (1 - inner)[:, None]].reshape(-1, 3, 3) - outer[:, None]
    pairs = torch.stack([_angle(hydrogens[:, i], hydrogens[:, j]) for i, j in ((0, 1), (0, 2), (1, 2))], 1)
    near = apart[:, 3:, :3].amin(2)
    found = {
        "C–C": apart[:, 0, 1],
        "C–O": apart[rows, inner, 2],
        "C–H": near[owner != 2],
        "O–H": near[owner == 2],
        "C–C–O": _angle(outer - middle, oxygen - middle),
        "C–O–H": _angle(middle - oxygen, hydroxyl - oxygen),
        "H–C–H": pairs.flatten(),
    }
    return {name: values.double().numpy() for name, values in found.items()} | {"whole": whole.numpy()}


def _angle(a: Tensor, b: Tensor) -> Tensor:
    return torch.rad2deg(torch.atan2(torch.linalg.cross(a, b).norm(dim=-1), (a * b).sum(-1)))


def compared(drawn: dict[str, np.ndarray], held: dict[str, np.ndarray]) -> str:
    """Means and deviations with their errors, and the Kolmogorov–Smirnov distance with its p-value."""
    from scipy.stats import ks_2samp

    rows = [["", "samples: mean", "held out: mean", "samples: deviation", "held out: deviation", "KS distance", "p"]]
    for name in (name for name in drawn if name != "whole"):
        values = (drawn[name], held[name])
        means = [f"{v.mean():.4g} ± {v.std() / len(v) ** 0.5:.2g}" for v in values]
        spreads = [f"{v.std():.4g} ± {v.std() / (2 * len(v)) ** 0.5:.2g}" for v in values]
        test = ks_2samp(*values)
        rows.append([name, *means, *spreads, f"{test.statistic:.3f}", f"{test.pvalue:.2g}"])
    return report.table(rows)


@torch.no_grad()
def forces(run: Any, raw: Tensor, recorded: Tensor) -> str:
    """The score at frames (n, 9, 3), in 1/Å, against recorded/kT."""
    scale, z, rows = run.codec.scale, run.codec.encode(raw), [["σ, Å", "cosine", "least of a frame", "slope"]]
    truth = run.codec.encode(recorded / KT - (recorded / KT).mean(1, keepdim=True)) * scale
    for sigma in SIGMAS:
        level = sigma / scale
        score = (run.denoiser(z, torch.tensor(level)).x0 - z) / level**2 / scale
        cosine = torch.nn.functional.cosine_similarity(score.flatten(1), truth.flatten(1)).double()
        slope = (score * truth).sum() / truth.square().sum()
        error = float(cosine.std()) / math.sqrt(len(cosine))
        rows.append(
            [
                f"{sigma}",
                f"{float(cosine.mean()):.4f} ± {error:.4f}",
                f"{float(cosine.min()):.3f}",
                f"{float(slope):.3f}",
            ]
        )
    return report.table(rows)


def turned(run: Any, raw: Tensor) -> str:
    """How far log p of turned, reflected and relabelled molecules is from that of the molecules."""
    z, model = run.codec.encode(raw.double()), run.denoiser.double()
    q, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    q = q * torch.linalg.det(q)
    order = [1, 0, 2, 8, 3, 4, 5, 6, 7]
    others = {"turned": z @ q, "reflected": z @ -q, "C and H exchanged": run.codec.encode(raw.double()[:, order])}
    score = lambda points: S.log_likelihood(model, points, S.Budget(40), divergence=S.Exact()).log_prob  # noqa: E731
    here = score(z)
    gaps = {name: float((score(points) - here).abs().max()) for name, points in others.items()}
    run.denoiser.float()
    return f"log p from {float(here.min()):.2f} to {float(here.max()):.2f} nats; " + ", ".join(
        f"{name}: within {gap:.1e}" for name, gap in gaps.items()
    )


def drawing(samples: Tensor, drawn: dict[str, np.ndarray], held: dict[str, np.ndarray], path: Path) -> None:
    """Histograms of bonds and angles above, twelve samples below, seen along their thinnest axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 9), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[1.1, 1])
    for axis, name in zip(upper.subplots(2, 4).flat, [name for name in drawn if name != "whole"], strict=False):
        bins = np.histogram_bin_edges(held[name], 30)
        axis.hist(held[name], bins, density=True, alpha=0.5, label="held out")
        axis.hist(drawn[name], bins, density=True, histtype="step", linewidth=1.6, label="samples")
        axis.set_title(name)
    upper.axes[0].legend()
    upper.axes[-1].axis("off")
    for axis, x in zip(lower.subplots(2, 6).flat, samples, strict=False):
        flat = (x @ torch.linalg.svd(x, full_matrices=False).Vh.T).numpy()
        apart = torch.cdist(x, x).numpy()
        for i in range(9):
            for j in range(i):
                if apart[i, j] < (1.25 if i > 2 else 1.8):
                    axis.plot(*flat[[i, j], :2].T, color="0.5", zorder=1)
        axis.scatter(
            flat[:, 0],
            flat[:, 1],
            s=[150] * 3 + [50] * 6,
            c=["0.2"] * 2 + ["tab:red"] + ["0.85"] * 6,
            edgecolors="k",
            zorder=2,
        )
        axis.set(aspect="equal", xticks=[], yticks=[], xlim=(-2.6, 2.6), ylim=(-2, 2))
    figure.savefig(path, dpi=90)


def measure(folder: Path, source: Path, count: int) -> None:
    run, data = S.load(folder, device="cpu"), Molecules(str(source))
    with np.load(source) as arrays:
        recorded = torch.from_numpy(arrays["forces"])
    # the same split of the frames' numbers
    numbered = hold_out(Split(torch.arange(len(recorded))[:, None]), 0.1, 0)[1].raw[:, 0]
    HERE.mkdir(parents=True, exist_ok=True)
    parts = [f"`python benchmarks/molecules.py measure runs/ethanol ethanol.npz --samples {count}`, step {run.step}, "
             f"of {sum(p.numel() for p in run.denoiser.parameters()):,} parameters; 200 held-out frames."]  # fmt: skip
    parts += ["## Score against forces, held-out frames", forces(run, data.test.raw, recorded[numbered].float())]
    parts += [
        "The same on 200 training frames:",
        forces(run, data.train.raw[:200], recorded[~torch.isin(torch.arange(len(recorded)), numbered)][:200].float()),
    ]
    parts += ["## Turned molecules", turned(run, data.test.raw[:8])]
    samples = run.sample(count, budget=60, progress=False).float()
    drawn, held = geometry(samples), geometry(data.test.raw)
    share, n = float(drawn["whole"].mean()), len(samples)
    error = math.sqrt(max(share * (1 - share), 1 / n) / n)
    parts += [
        "## Bonds and angles",
        f"{100 * share:.1f} ± {100 * error:.1f} % of {n} samples, by 60 network calls each, have the bonds of ethanol "
        f"(held out: {100 * held['whole'].mean():.1f} %).",
        compared(drawn, held),
    ]
    drawing(samples[torch.from_numpy(drawn["whole"])][:12], drawn, held, HERE / "ethanol.png")
    (HERE / "ethanol.md").write_text(
        "\n\n".join([*parts, "![bonds, angles and samples](ethanol.png)", ""]), encoding="utf-8"
    )
    print("\n\n".join(parts))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("convert")
    one.add_argument("source", type=Path)
    one.add_argument("target", type=Path)
    two = commands.add_parser("measure")
    two.add_argument("run", type=Path)
    two.add_argument("source", type=Path)
    two.add_argument("--samples", type=int, default=500)
    given = parser.parse_args()
    if given.command == "convert":
        convert(given.source, given.target)
    else:
        measure(given.run, given.source, given.samples)
