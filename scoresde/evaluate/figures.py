"""Pictures of a run, by the object interface of matplotlib: there is no window and no global state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ..runs.listing import number
from ..runs.publish import replacing
from .strips import strips

_PICTURES, _SHOWN, _ACROSS = 128, 16, 4  # pictures and signals of a block, and signals in a row of it


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


def sample_grid(
    made: Tensor,
    real: Tensor,
    path: Path,
    *,
    columns: int = 8,
    sampler: str = "",
    beside: str = "real",
    title: str = "generated",
) -> Path:
    """Generated samples beside real ones: images as two blocks, videos as strips of their frames, signals as lines,
    points as a scatter plot. Of many the first are drawn: 128 images, 16 videos and signals.

    Args:
        made, real: (n, *event), in data coordinates.
        path: the PNG to write.
        columns: images per row of a block.
        sampler: by which they were made, for the title.
        beside, title: the titles of `real` and of `made`.
    """
    titles = (f"{title}{sampler and ' by '}{sampler}", beside)
    made, real = _signals(made), _signals(real)
    if made.ndim < 3:
        return _scatter(list(zip(titles, (made, real), strict=True)), path, shared=True)
    if made.ndim == 3:
        empty: list[Tensor | None] = [None] * _ACROSS
        left, right = (_rows(x[:_SHOWN], _ACROSS) for x in (made, real))
        rows = [[*a, *b] for a, b in zip_longest(left, right, fillvalue=empty)]
        heads = [titles[0], *[""] * (_ACROSS - 1), titles[1], *[""] * (_ACROSS - 1)]
        return _lines(rows, heads, path, limits=[_limits(real)] * len(heads))
    made, real, wide = made[:_PICTURES], real[:_PICTURES], 1
    if made.ndim == 5:
        columns, wide = 1, made.shape[2]
        made, real = strips(made[:_SHOWN]), strips(real[:_SHOWN])
    figure = _figure(2 * columns * wide * 0.5 + 0.6, -(-len(made) // columns) * 0.5 + 0.4)
    for axes, title, images in zip(figure.subplots(1, 2), titles, (made, real), strict=True):
        _show(axes, _mosaic(images, columns, _limits(real)))
        axes.set_title(title)
    return _write(figure, path)


def trajectory(frames: Tensor, times: Sequence[float], path: Path) -> Path:
    """Samples on their way from noise to data: a column per time, a row per sample; scatter plots for points.

    Args:
        frames: (f, k, *event).
        times: (f,).
        path: the PNG to write.
    """
    heads = [f"t = {t:.2g}" for t in times]
    frames = frames if frames.ndim > 3 else _signals(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
    if frames.ndim < 4:
        return _scatter(list(zip(heads, frames, strict=True)), path)
    if frames.ndim == 4:
        return _lines([list(x) for x in frames.unbind(1)], heads, path, limits=[_limits(x) for x in frames])
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
    """An inverse problem, a row per input: given, truth, mean, standard deviation, samples. At most 8 inputs of 16, of
    videos, in strips, 4.

    Args:
        given: (k, *y), what was measured.
        made: (k, n, *event), samples of each; a scatter plot if they are not images.
        truth: (k, *event), or None where it is not known.
        path: the PNG to write; of signals the mean has a band of a standard deviation.
        seen: (*y) bool, a chequerboard where it is False.
        limits: least and greatest value of the data, black and white.
    """
    known = [] if truth is None else [("truth", truth)]
    made = made if made.ndim > 3 else _signals(made.flatten(0, 1)).unflatten(0, made.shape[:2])
    if made.ndim == 4:
        return _restored_signals(given, made, truth, path)
    if made.ndim < 4:
        return _scatter([("restored", made.flatten(0, 1)), *known], path, shared=True)
    given, made, wide = given[:8], made[:8, :16], 1
    if made.ndim == 6:
        wide, made = made.shape[3], strips(made[:, :4])
        known = [(title, strips(x)) for title, x in known]
        seen = None if seen is None else strips(seen.float()) > 0
        given = strips(given) if given.ndim == 5 else given
    columns = -(-made.shape[1] // 2) if wide == 1 else 1
    means = [*known, ("mean", made.mean(1))]
    titles = ["given", *(title for title, _ in means), "standard deviation", "samples"]
    widths = [1.0] * (len(titles) - 1) + [max(columns / 2, 1.0)]
    figure = _figure(1.6 * sum(widths) * max(wide / 3, 1), (1.8 if wide == 1 else 1.0) * len(given) + 0.3)
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


def _restored_signals(given: Tensor, made: Tensor, truth: Tensor | None, path: Path) -> Path:
    """`restored` of signals: made (k, n, C, L)."""
    count = min(len(given), 8)
    columns = {"given": given, **({} if truth is None else {"truth": truth.reshape(made[:, 0].shape)})}
    columns |= {"mean ± std": made.mean(1), "samples": made[:, :16]}
    rows = [[column[k] for column in columns.values()] for k in range(count)]
    limits = [_limits(given), *[_limits(made)] * (len(columns) - 1)]
    bands = {len(columns) - 2: list(made.std(1, correction=0))}
    return _lines(rows, list(columns), path, limits=limits, bands=bands)


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
    _readable(axes)
    if axes.lines:
        axes.legend()
    return _write(figure, path)


def score_chart(
    costs: Mapping[str, Mapping[str, float]],
    scores: Mapping[str, Mapping[str, tuple[float, float]]],
    path: Path,
) -> Path:
    """Every number of every sampler, ± its standard error, against what the samples cost: a column per number, a row
    per cost. Rows of `scores` without a cost are dashed lines.

    Args:
        costs: what is paid, "network calls" or "seconds" -> sampler -> how much.
        scores: sampler -> number -> (value, standard error).
        path: the PNG to write.
    """
    names = list(dict.fromkeys(name for row in scores.values() for name in row))
    figure = _figure(2.8 * len(names), 2.6 * len(costs))
    panels = figure.subplots(len(costs), len(names), squeeze=False)
    for (cost, paid), row in zip(costs.items(), panels, strict=True):
        for axes, name in zip(row, names, strict=True):
            for index, (sampler, values) in enumerate(scores.items()):
                value, error = values.get(name, (math.nan, math.nan))
                if sampler in paid:
                    axes.errorbar(paid[sampler], value, error, fmt="o", color=f"C{index}", capsize=3, label=sampler)
                else:
                    axes.axhline(value, color="grey", linestyle="--", label=sampler)
            axes.set(xlabel=cost, ylabel=name)
            axes.margins(x=0.2)
    panels[0, 0].legend(fontsize=7)
    return _write(figure, path)


def noise_chart(noise: Sequence[float], losses: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> Path:
    """Losses (value, standard error) by their names, at each noise level σ/α."""
    figure = _figure(6, 3.5)
    axes = figure.subplots()
    for name, points in losses.items():
        values, errors = zip(*points, strict=True)
        axes.errorbar(noise, values, errors, fmt="o-", markersize=3, capsize=3, label=name)
    axes.set(xscale="log", xlabel="noise level σ/α", ylabel="mean square error of the noise")
    axes.legend()
    return _write(figure, path)


def _readable(axes: Any) -> None:
    """Numbers at the ticks as one says them: 20k images; 0.5 and not 5×10⁻¹, at least three of them."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if axes.get_yscale() == "log":
        low, high = axes.get_ylim()
        axes.yaxis.set_minor_formatter(NullFormatter())
        wide = high > 20 * low
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(8, steps=[1, 2, 5, 10]))


def _scatter(sets: Sequence[tuple[str, Tensor]], path: Path, *, shared: bool = False) -> Path:
    figure = _figure(3 * len(sets), 3.2)
    panels = figure.subplots(1, len(sets), squeeze=False, sharex=shared, sharey=shared)[0]
    for axes, (title, points) in zip(panels, sets, strict=True):
        flat = points.flatten(1).cpu().float().numpy()
        if flat.shape[1] > 1:
            axes.scatter(flat[:, 0], flat[:, 1], s=2)
            spans = np.ptp(flat[:, :2], axis=0)
            axes.set_aspect("equal" if spans.max() < 20 * spans.min() else "auto")  # columns may have other units
            axes.set(xlabel="x₁", ylabel="x₂")
        else:
            axes.hist(flat[:, 0], bins=50)
            axes.set(xlabel="x", ylabel="samples")
        axes.set_title(title, fontsize=8)
    return _write(figure, path)


def _signals(x: Tensor) -> Tensor:
    """Vectors of more than three entries (n, D) as signals of one channel (n, 1, D); anything else as it is."""
    return x[:, None] if x.ndim == 2 and x.shape[1] > 3 else x


def _rows(x: Tensor, columns: int) -> list[list[Tensor | None]]:
    filled: list[Tensor | None] = [*x, *[None] * (-len(x) % columns)]
    return [filled[first : first + columns] for first in range(0, len(filled), columns)]


def _lines(
    rows: Sequence[Sequence[Tensor | None]],
    heads: Sequence[str],
    path: Path,
    *,
    limits: Sequence[tuple[float, float]],
    bands: Mapping[int, Sequence[Tensor]] | None = None,
) -> Path:
    """A grid of signals (…, L): a line for each channel, or for each channel of each signal.

    Args:
        rows: what is in each place, None for nothing.
        heads, limits: title and range of each column.
        path: the PNG to write.
        bands: column -> the half-width (C, L) of a band around the signals of each row.
    """
    figure = _figure(1.5 * len(heads), 0.9 * len(rows) + 0.4)
    for k, panels in enumerate(figure.subplots(len(rows), len(heads), squeeze=False)):
        for column, (axes, signal) in enumerate(zip(panels, rows[k], strict=True)):
            axes.set_title(heads[column] if k == 0 else "", fontsize=8, loc="left")
            if signal is None:
                axes.axis("off")
                continue
            channels = signal.cpu().float().reshape(-1, signal.shape[-1])
            axes.plot(channels.T.numpy(), linewidth=0.8)
            for line, width in zip(channels, bands[column][k], strict=True) if bands and column in bands else ():
                axes.fill_between(range(len(line)), line - width, line + width, alpha=0.3)
            low, high = limits[column]
            axes.set_ylim(low - 0.05 * (high - low) - 1e-6, high + 0.05 * (high - low) + 1e-6)
            axes.tick_params(labelsize=5, labelbottom=k == len(rows) - 1)
    figure.supxlabel("position", fontsize=7)
    figure.supylabel("value", fontsize=7)
    return _write(figure, path)


def _mosaic(images: Tensor, columns: int, limits: tuple[float, float]) -> np.ndarray:
    """(rows·H, columns·W) or (…, 3) picture of images (n, C, H, W) or (n, C, D, H, W), scaled to [0, 1]."""
    x, (low, high) = images.cpu().float(), limits
    if x.ndim == 5:
        x = x[:, :, x.shape[2] // 2]  # the middle slice of a volume
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
