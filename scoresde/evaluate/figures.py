"""Pictures of a run, by the object interface of matplotlib: there is no window and no global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ..runs.listing import number
from ..runs.publish import replacing


def require() -> None:
    """Refuses to draw without matplotlib, before anything is computed.

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
    """Generated samples beside real ones: images as two blocks, anything else as a scatter plot.

    Args:
        made, real: (n, *event), in data coordinates.
        path: the PNG to write.
        columns: images per row of a block.
    """
    if made.ndim < 3:
        return _scatter([("generated", made), ("real", real)], path, shared=True)
    figure = _figure(2 * columns * 0.5 + 0.6, -(-len(made) // columns) * 0.5 + 0.4)
    for axes, title, images in zip(figure.subplots(1, 2), ("generated", "real"), (made, real), strict=True):
        _show(axes, _mosaic(images, columns, _limits(real)))
        axes.set_title(title)
    return _write(figure, path)


def trajectory(frames: Tensor, times: Sequence[float], path: Path) -> Path:
    """Samples on their way from noise to data: a column per time, a row per sample; scatter plots for vectors.

    Args:
        frames: (f, k, *event).
        times: (f,).
        path: the PNG to write.
    """
    if frames.ndim < 4:
        return _scatter([(f"t = {t:.2g}", x) for t, x in zip(times, frames, strict=True)], path)
    figure = _figure(len(frames) * 0.8, frames.shape[1] * 0.8 + 0.3)
    for axes, t, x in zip(figure.subplots(1, len(frames), squeeze=False)[0], times, frames, strict=True):
        # each frame has its own range: at t_max a VE process is hundreds of times wider than the data
        _show(axes, _mosaic(x, 1, _limits(x)))
        axes.set_title(f"t = {t:.2g}", fontsize=7)
    return _write(figure, path)


def restored(
    given: Tensor,
    made: Tensor,
    truth: Tensor | None,
    path: Path,
    *,
    seen: Tensor | None = None,
    limits: tuple[float, float] = (-1.0, 1.0),
) -> Path:
    """An inverse problem, a row per input: given, truth, mean, standard deviation, samples. At most 8 inputs of 16.

    Args:
        given: (k, *y), what was measured.
        made: (k, n, *event), samples of each; a scatter plot if they are not images.
        truth: (k, *event), or None where it is not known.
        path: the PNG to write.
        seen: (*y) bool, a chequerboard where it is False.
        limits: least and greatest value of the data, black and white.
    """
    known = [] if truth is None else [("truth", truth)]
    if made.ndim < 4:
        return _scatter([("restored", made.flatten(0, 1)), *known], path, shared=True)
    given, made = given[:8], made[:8, :16]
    columns = -(-made.shape[1] // 2)
    means = [*known, ("mean", made.mean(1))]
    titles = ["given", *(title for title, _ in means), "standard deviation", "samples"]
    widths = [1.0] * (len(titles) - 1) + [max(columns / 2, 1.0)]
    figure = _figure(1.6 * sum(widths), 1.8 * len(given) + 0.3)
    for k, row in enumerate(figure.subplots(len(given), len(titles), squeeze=False, width_ratios=widths)):
        std = made[k].std(0, correction=0).mean(0, keepdim=True) / (limits[1] - limits[0])
        pictures = [_given(given[k], seen, limits), *(_tile(x[k], limits) for _, x in means)]
        pictures += [_tile(std, (0.0, float(std.max()))), _mosaic(made[k], columns, limits)]
        for axes, title, picture in zip(row, titles, pictures, strict=True):
            _show(axes, picture, cmap="magma" if title == "standard deviation" else "gray")
            axes.set_title(title if k == 0 else "", fontsize=8)
        brightest = f"brightest: {std.max():.2g} of the range"
        row[-2].text(0.5, -0.03, brightest, ha="center", va="top", fontsize=6, transform=row[-2].transAxes)
    return _write(figure, path)


def loss_curve(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Training and held-out loss against images seen, from the rows of `metrics.jsonl`."""
    figure = _figure(6, 3.5)
    axes = figure.subplots()
    for key, style in (("train/loss", "-"), ("eval/loss", "o-")):
        pairs = [(number(row.get("images")), number(row.get(key))) for row in rows]
        points = [(x, y) for x, y in pairs if x is not None and y is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=key, markersize=3)
        if points and key == "train/loss" and min(loss for _, loss in points) > 0:
            axes.set_yscale("log")
    axes.set(xlabel="images seen", ylabel="loss")
    if axes.lines:
        axes.legend()
    return _write(figure, path)


def _scatter(sets: Sequence[tuple[str, Tensor]], path: Path, *, shared: bool = False) -> Path:
    figure = _figure(3 * len(sets), 3.2)
    panels = figure.subplots(1, len(sets), squeeze=False, sharex=shared, sharey=shared)[0]
    for axes, (title, points) in zip(panels, sets, strict=True):
        flat = points.flatten(1).cpu().float().numpy()
        if flat.shape[1] > 1:
            axes.scatter(flat[:, 0], flat[:, 1], s=2)
            axes.set_aspect("equal")
        else:
            axes.hist(flat[:, 0], bins=50)
        axes.set_title(title, fontsize=8)
    return _write(figure, path)


def _mosaic(images: Tensor, columns: int, limits: tuple[float, float]) -> np.ndarray:
    """(rows·H, columns·W) or (…, 3) picture of images (n, C, H, W), (n, C, L) or (n, C, D, H, W), scaled to [0, 1]."""
    x, (low, high) = images.cpu().float(), limits
    if x.ndim == 5:
        x = x[:, :, x.shape[2] // 2]  # the middle slice of a volume
    if x.ndim == 3:
        x = x[:, None]  # a signal is shown as a strip of its channels
    x = ((x - low) / max(high - low, 1e-12)).clamp(0, 1)
    x = x[:, :3] if x.shape[1] >= 3 else x[:, :1]
    rows = -(-len(x) // columns)
    x = F.pad(x, (0, 1, 0, 1, 0, 0, 0, rows * columns - len(x)), value=1.0)  # white lines, and white places at the end
    tiles = x.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2)
    picture = tiles.flatten(2, 3).flatten(0, 1).numpy()
    return picture[..., 0] if picture.shape[-1] == 1 else picture


def _tile(x: Tensor, limits: tuple[float, float]) -> np.ndarray:
    """The picture of one event."""
    return _mosaic(x[None], 1, limits)[:-1, :-1]


def _given(y: Tensor, seen: Tensor | None, limits: tuple[float, float]) -> np.ndarray:
    """The picture of a measurement: a strip where it has no two axes, grey squares where nothing is seen."""
    if y.ndim < 2:
        y = y[None, None]
    picture = _tile(y, limits)
    if seen is None:
        return picture
    hole = _tile(seen.float(), (0.0, 1.0)) == 0
    rows, columns = np.indices(picture.shape[:2])
    side = max(min(picture.shape[:2]) // 14, 1)
    squares = np.where((rows // side + columns // side) % 2 == 0, 0.55, 0.75)
    return np.where(hole, squares if picture.ndim == 2 else squares[..., None], picture)


def _show(axes: Any, picture: np.ndarray, cmap: str = "gray") -> None:
    axes.imshow(picture, cmap=cmap, vmin=0, vmax=1, interpolation="nearest")
    axes.axis("off")


def _limits(x: Tensor) -> tuple[float, float]:
    return float(x.min()), float(x.max())


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(max(width, 3), max(height, 2)), layout="constrained")


def _write(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        figure.savefig(file, dpi=150, format="png")
    return path
