"""Pictures of a run, by matplotlib's object interface: no window, no global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor


def require() -> None:
    """Refuses, before anything is computed, to draw without matplotlib.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Pictures need matplotlib: pip install 'scoresde[plot]', or set pictures=false (evaluation.pictures=false)."
        ) from error


def sample_grid(made: Tensor, real: Tensor, path: Path, *, columns: int = 8) -> Path:
    """Generated beside real: images as two blocks, anything else as `scatter`.

    Args:
        made, real: (n, *event), in data coordinates.
        path: the PNG to write.
        columns: images per row of a block.
    """
    if made.ndim < 3:
        return _scatter({"generated": made, "real": real}, path, shared=True)
    figure = _figure(2 * columns * 0.5 + 0.6, -(-len(made) // columns) * 0.5 + 0.4)
    low, high = _limits(real)
    for axes, title, images in zip(figure.subplots(1, 2), ("generated", "real"), (made, real), strict=True):
        axes.imshow(_mosaic(images, columns, low, high), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(title)
        axes.axis("off")
    return _write(figure, path)


def trajectory(frames: Tensor, times: Sequence[float], path: Path) -> Path:
    """From noise to data: one column per time, one row per sample; a row of scatter plots for vectors.

    Args:
        frames: (f, k, *event).
        times: (f,).
        path: the PNG to write.
    """
    if frames.ndim < 4:
        return _scatter({f"t = {t:.2g}": x for t, x in zip(times, frames, strict=True)}, path)
    figure = _figure(len(frames) * 0.8, frames.shape[1] * 0.8 + 0.3)
    for axes, t, x in zip(figure.subplots(1, len(frames), squeeze=False)[0], times, frames, strict=True):
        # each frame has its own range: at t_max a VE process is hundreds of times wider than the data
        axes.imshow(_mosaic(x, 1, *_limits(x)), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(f"t = {t:.2g}", fontsize=7)
        axes.axis("off")
    return _write(figure, path)


def loss_curve(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Training and held-out loss against images seen, from the rows of `metrics.jsonl`."""
    figure = _figure(6, 3.5)
    axes = figure.subplots()
    for key, style in (("train/loss", "-"), ("eval/loss", "o-")):
        points = [(row["images"], row[key]) for row in rows if isinstance(row.get(key), float)]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=key, markersize=3)
    positive = [row["train/loss"] for row in rows if isinstance(row.get("train/loss"), float)]
    if positive and min(positive) > 0:
        axes.set_yscale("log")
    axes.set_xlabel("images seen")
    axes.set_ylabel("loss")
    if axes.lines:
        axes.legend()
    return _write(figure, path)


def _scatter(sets: Mapping[str, Tensor], path: Path, *, shared: bool = False) -> Path:
    figure = _figure(3 * len(sets), 3.2)
    panels = figure.subplots(1, len(sets), squeeze=False, sharex=shared, sharey=shared)[0]
    for axes, (title, points) in zip(panels, sets.items(), strict=True):
        flat = points.flatten(1).cpu().float().numpy()
        if flat.shape[1] > 1:
            axes.scatter(flat[:, 0], flat[:, 1], s=2)
            axes.set_aspect("equal")
        else:
            axes.hist(flat[:, 0], bins=50)
        axes.set_title(title, fontsize=8)
    return _write(figure, path)


def _mosaic(images: Tensor, columns: int, low: float, high: float) -> np.ndarray:
    """(rows·H, columns·W) or (…, 3) picture of images (n, C, H, W), (n, C, L) or (n, C, D, H, W), scaled to [0, 1]."""
    x = images.cpu().float()
    if x.ndim == 5:
        x = x[:, :, x.shape[2] // 2]  # the middle slice of a volume
    if x.ndim == 3:
        x = x[:, None]  # a signal is shown as a strip of its channels
    x = ((x - low) / max(high - low, 1e-12)).clamp(0, 1)
    x = x[:, :3] if x.shape[1] >= 3 else x[:, :1]
    rows = -(-len(x) // columns)
    _, channels, height, width = x.shape
    canvas = np.ones((rows * columns, channels, height + 1, width + 1), dtype=np.float32)  # a white line between
    canvas[: len(x), :, :height, :width] = x.numpy()
    tiles = canvas.reshape(rows, columns, channels, height + 1, width + 1).transpose(0, 3, 1, 4, 2)
    picture = tiles.reshape(rows * (height + 1), columns * (width + 1), channels)
    return picture[..., 0] if channels == 1 else picture


def _limits(x: Tensor) -> tuple[float, float]:
    return float(x.min()), float(x.max())


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(max(width, 3), max(height, 2)), layout="constrained")


def _write(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")
    return path
