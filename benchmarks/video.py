"""Digits that move: clips made of MNIST, and what samples of a model of them keep of the motion.

    python benchmarks/video.py make /folder/of/mnist clips          train.npy, test.npy, two_frames.npy
    scoresde-train experiment=moving_digits data.path=clips/train.npy data.test_path=clips/test.npy out=runs/video
    scoresde-sample run=runs/video n=256
    scoresde-sample run=runs/video problem=inpaint input=test:0-63 mask=clips/two_frames.npy n=4
    python benchmarks/video.py measure clips runs/video/sample/FIRST runs/video/sample/SECOND benchmarks/results/video

A digit's 20×20 middle is shrunk to 8×8 and moves through eight frames of 16×16 at a constant velocity, to a fraction of
a pixel, and never leaves the picture.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from scoresde.data import Idx
from scoresde.evaluate.strips import strips

FRAMES, SIDE, INK = 8, 16, 8


def clips(images: Tensor, seed: int) -> Tensor:
    """(N, 1, 8, 16, 16) uint8 of digits (N, 1, 28, 28) uint8, each at its own velocity, |v| ≤ 8/7 along each axis."""
    rng = np.random.default_rng(seed)
    ink = F.interpolate(images[..., 4:24, 4:24].float(), size=(INK, INK), mode="area")
    room = SIDE - INK  # that the digit has along an axis
    travel = rng.uniform(-room, room, (len(images), 1, 2))
    start = rng.uniform(np.maximum(0, -travel), room - np.maximum(0, travel))
    corner = torch.from_numpy(start + travel * np.linspace(0, 1, FRAMES)[:, None])  # (N, T, 2)
    return torch.stack([_placed(ink, corner[:, k]) for k in range(FRAMES)], 2).round().to(torch.uint8)


def _placed(ink: Tensor, corner: Tensor) -> Tensor:
    """Ink (N, 1, 8, 8) in frames (N, 1, 16, 16), its corner (N, 2) between pixels: bilinear, keeps the mass."""
    at = torch.arange(SIDE, dtype=torch.float64)[None, :, None] - corner[:, None, :]  # pixel − corner, (N, 16, 2)
    # spread[n, p, i]: the share that pixel p has of row i of the ink
    spread = (1 - (at[..., None] - torch.arange(INK, dtype=torch.float64)).abs()).clamp(min=0).float()
    return spread[:, None, :, 0] @ ink @ spread[:, None, :, 1].mT


def make(mnist: Path, folder: Path, train: int, test: int) -> None:
    """Clips of training digits and of test digits, and a mask that shows the first two frames."""
    folder.mkdir(parents=True, exist_ok=True)
    data = Idx(str(mnist), labels=False)
    np.save(folder / "train.npy", clips(data.train.raw[:train], seed=0).numpy())
    np.save(folder / "test.npy", clips(data.test.raw[:test], seed=1).numpy())
    seen = np.zeros((1, FRAMES, SIDE, SIDE), np.uint8)
    seen[:, :2] = 1
    np.save(folder / "two_frames.npy", seen)


def centres(x: np.ndarray) -> np.ndarray:
    """(N, T, 2) centres of mass, in pixels, of clips (N, 1, T, H, W) of grey levels; levels below 16 count as 0."""
    x = np.where(x[:, 0] < 16, 0, x[:, 0].astype(float))
    places, mass = np.arange(SIDE), x.sum((2, 3)).clip(1)
    return np.stack([(x.sum(3) * places).sum(2), (x.sum(2) * places).sum(2)], -1) / mass[..., None]


def motion(x: np.ndarray) -> dict[str, str]:
    """How constant the displacement is from frame to frame, how fast, and how constant the mass."""
    steps = np.diff(centres(x), axis=1)
    off = np.abs(steps - steps.mean(1, keepdims=True)).max((1, 2))
    speed, mass = np.linalg.norm(steps.mean(1), axis=1), x.astype(float).sum((1, 3, 4))
    share, change = (off <= 0.5).mean(), mass.std(1) / mass.mean(1)
    return {
        "clips": f"{len(x):,}",
        "within 0.5 pixels": f"{100 * share:.1f} ± {100 * math.sqrt(share * (1 - share) / len(x)):.1f} %",
        "farthest from the mean step, median (95 %)": f"{np.median(off):.2f} ({np.quantile(off, 0.95):.2f})",
        "pixels a frame": f"{speed.mean():.2f} ± {speed.std() / math.sqrt(len(x)):.2f}",
        "mass, deviation over frames": f"{100 * change.mean():.1f} %",
    }


def futures(truth: np.ndarray, made: np.ndarray) -> dict[str, dict[str, str]]:
    """Frames 2 … 7 of samples (k, n, …) beside the true ones (k, …): by levels, and by where the digit is."""
    guesses = {
        "samples": made.reshape(-1, *truth.shape[1:]),
        "mean of the samples": made.mean(1),
        "second frame, again and again": np.repeat(truth[:, :, 1:2], FRAMES, 2),
    }
    table = {}
    for name, guess in guesses.items():
        true = np.repeat(truth, len(guess) // len(truth), 0)
        levels = np.sqrt(((guess[:, :, 2:] - true[:, :, 2:].astype(float)) ** 2).mean((1, 2, 3, 4))) / 255
        off = np.linalg.norm(centres(guess) - centres(true), axis=2)[:, [2, 7]]
        cells = [levels, off[:, 0], off[:, 1]]
        # samples of one input are no independent points
        cells = [cell.reshape(len(truth), -1).mean(1) for cell in cells]
        words = [f"{cell.mean():.3f} ± {cell.std(ddof=1) / math.sqrt(len(cell)):.3f}" for cell in cells]
        heads = ("RMSE of levels / 255", "centre off in frame 3, pixels", "in frame 8")
        table[name] = dict(zip(heads, words, strict=True))
    return table


def sheet(rows: list[np.ndarray], path: Path) -> None:
    """A PNG with a strip of frames for each clip (1, T, H, W)."""
    picture = strips(torch.from_numpy(np.stack(rows)).float())[:, 0]
    picture = F.pad(picture, (0, 0, 0, 1), value=255.0).flatten(0, 1).to(torch.uint8)
    image = Image.fromarray(picture.numpy())
    image.resize((4 * image.width, 4 * image.height), Image.Resampling.NEAREST).save(path)


def markdown(table: dict[str, dict[str, str]]) -> str:
    heads = list(next(iter(table.values())))
    lines = [["", *heads], ["---"] * (len(heads) + 1), *([name, *row.values()] for name, row in table.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measure(clips: Path, drawn: Path, continued: Path, out: Path) -> None:
    """Tables and pictures in `out` of samples.npz in two folders of scoresde-sample."""
    out.mkdir(parents=True, exist_ok=True)
    test = np.load(clips / "test.npy")
    with np.load(drawn / "samples.npz") as arrays, np.load(continued / "samples.npz") as more:
        samples, truth, made = arrays["multistep"], more["truth"], more["samples"]
    table = {"real, held out": motion(test), "samples": motion(samples)}
    table["futures of two frames"] = motion(made.reshape(-1, *truth.shape[1:]))
    tables = f"{markdown(table)}\n\n{markdown(futures(truth, made))}"
    (out / "tables.md").write_text(f"{tables}\n")
    sheet([*test[:4], *samples[:12]], out / "samples.png")
    dark = np.where(np.arange(FRAMES)[:, None, None] < 2, truth, 96).astype(np.uint8)
    sheet([row for k in range(5) for row in (dark[k], truth[k], *made[k, :2])], out / "futures.png")
    print(tables)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("mnist", type=Path)
    making.add_argument("folder", type=Path)
    making.add_argument("--train", type=int, default=20_000)
    making.add_argument("--test", type=int, default=2_000)
    measuring = commands.add_parser("measure")
    for name in ("clips", "drawn", "continued", "out"):
        measuring.add_argument(name, type=Path)
    given = vars(parser.parse_args())
    {"make": make, "measure": measure}[given.pop("command")](**given)
